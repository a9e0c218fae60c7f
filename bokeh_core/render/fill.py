"""Plausible content for parts of a layer that nothing in the picture shows."""

import torch
import torch.nn.functional as F

from .pyramid import down2, up2

SWEEPS = 2  # relaxations before and after each coarser correction
CYCLES = 4


def harmonic_fill(values: torch.Tensor, known: torch.Tensor, cycles: int = CYCLES) -> torch.Tensor:
    """Continue `values` smoothly into the unknown region (membrane interpolation: the Laplace equation with the known pixels fixed).

    Natural pictures have power spectra near 1/f^2, for which the membrane is the expected value of the hidden pixels: the right thing to
    blur. Multigrid: a coarse-to-fine start, then V-cycles.

    values  [C, H, W]
    known   [H, W] 0..1 weight; 1 = fixed, 0 = unknown, between = drawn towards its value. Nothing known: the values come back unchanged
    cycles  each brings the result about twice as near to the exact one; 0 = the start alone, for what is only needed roughly
    """
    if not bool((known > 0).any()) or bool((known >= 1).all()):
        return values.clone()
    weight = known[None].clamp(0, 1).to(values)
    out = _start(values * weight, weight)
    for _ in range(cycles):
        out = _cycle(out, values * weight, weight)
    return out


def _around(x: torch.Tensor) -> torch.Tensor:
    """Mean of the four neighbours; the border repeats."""
    p = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
    return (p[:, 1:-1, :-2] + p[:, 1:-1, 2:] + p[:, :-2, 1:-1] + p[:, 2:, 1:-1]) / 4


def _start(weighted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """First guess from averages of the known pixels at every scale. weighted = values * weight."""
    _, h, w = weight.shape
    mean = weighted / weight.clamp_min(1e-6)
    if bool((weight > 0).all()) or max(h, w) == 1:
        return mean
    coarse, coarse_weight = down2(weighted), down2(weight)
    gain = 1 / coarse_weight.clamp_min(1)  # one known pixel is enough for a coarse one
    guess = up2(_start(coarse * gain, coarse_weight * gain), h, w)
    out = torch.lerp(guess, mean, weight)
    for _ in range(SWEEPS):
        out = torch.lerp(_around(out), mean, weight)
    return out


def _cycle(x: torch.Tensor, source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One V-cycle for x = source + (1 - weight) * mean of x's neighbours."""
    _, h, w = weight.shape
    free = 1 - weight
    for _ in range(SWEEPS):
        x = source + free * _around(x)
    if min(h, w) > 4 and bool((free > 0.5).any()):
        residual = source + free * _around(x) - x
        # The grid is twice as wide, so the same bend weighs four times as much (and the sum over four pixels is four means).
        share = down2(torch.ones_like(weight))
        coarse_weight = (down2(weight) * 4 / share).clamp(max=1)
        coarse = _cycle(torch.zeros_like(down2(x)), down2(residual) * 4 / share * (1 - coarse_weight), coarse_weight)
        x = x + free * up2(coarse, h, w)
    for _ in range(SWEEPS):
        x = source + free * _around(x)
    return x
