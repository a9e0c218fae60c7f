"""Plausible content for parts of a layer that nothing in the picture shows."""

import torch

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
    source = values * weight
    out = _start(source, weight)
    for _ in range(cycles):
        out = _cycle(out, source, weight)
    return out


def _around(x: torch.Tensor) -> torch.Tensor:
    """Mean of the four neighbours; the border repeats."""
    out = torch.empty_like(x)
    out[:, :1], out[:, 1:] = x[:, :1], x[:, :-1]
    out[:, -1] += x[:, -1]
    out[:, :-1] += x[:, 1:]
    out[..., 0] += x[..., 0]
    out[..., 1:] += x[..., :-1]
    out[..., -1] += x[..., -1]
    out[..., :-1] += x[..., 1:]
    return out.div_(4)


def _start(weighted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """First guess from averages of the known pixels at every scale. weighted = values * weight."""
    _, h, w = weight.shape
    mean = weighted / weight.clamp_min(1e-6)
    if bool((weight > 0).all()) or max(h, w) == 1:
        return mean
    coarse, coarse_weight = down2(weighted), down2(weight)
    gain = 1 / coarse_weight.clamp_min(1)  # one known pixel is enough for a coarse one
    out = up2(_start(coarse * gain, coarse_weight * gain), h, w).lerp_(mean, weight)
    for _ in range(SWEEPS):
        out = _around(out).lerp_(mean, weight)
    return out


def _cycle(x: torch.Tensor, source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One V-cycle for x = source + (1 - weight) * mean of x's neighbours."""
    _, h, w = weight.shape
    free = 1 - weight
    for _ in range(SWEEPS):
        x = _around(x).mul_(free).add_(source)
    if min(h, w) > 4 and bool((free > 0.5).any()):
        residual = down2(_around(x).mul_(free).add_(source).sub_(x))
        # The grid is twice as wide, so the same bend weighs four times as much (and the sum over four pixels is four means).
        share = down2(torch.ones_like(weight))
        coarse_weight = (down2(weight) * 4 / share).clamp(max=1)
        residual *= 4 / share * (1 - coarse_weight)
        coarse = _cycle(torch.zeros_like(residual), residual, coarse_weight)
        x = up2(coarse, h, w).mul_(free).add_(x)
    for _ in range(SWEEPS):
        x = _around(x).mul_(free).add_(source)
    return x
