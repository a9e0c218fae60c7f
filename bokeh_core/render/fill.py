"""Plausible content for parts of a layer that nothing in the picture shows."""

import torch
import torch.nn.functional as F


def harmonic_fill(values: torch.Tensor, known: torch.Tensor, sweeps: int = 8) -> torch.Tensor:
    """Continue `values` smoothly into the unknown region (membrane interpolation: the Laplace equation with the known pixels fixed).

    Natural pictures have power spectra near 1/f^2, for which the membrane is the expected value of the hidden pixels: the right thing to
    blur. Solved coarse to fine: averages of the known pixels at each level, relaxed where nothing is known.

    values  [C, H, W]
    known   [H, W] 0..1 weight (0 = unknown); if nothing at all is known the values are returned unchanged
    """
    if not bool((known > 0).any()):
        return values.clone()
    if bool((known >= 1).all()):
        return values.clone()
    weight = known[None, None].clamp(0, 1).to(values)
    return _fill_level(values[None] * weight, weight, sweeps)[0]


def _fill_level(weighted: torch.Tensor, weight: torch.Tensor, sweeps: int) -> torch.Tensor:
    """weighted = values * weight, both [1, *, H, W] -> filled [1, C, H, W]."""
    h, w = weight.shape[-2:]
    mean = weighted / weight.clamp_min(1e-6)
    if bool((weight > 0).all()) or max(h, w) == 1:
        return mean
    size = ((h + 1) // 2, (w + 1) // 2)
    odd = (0, w % 2, 0, h % 2)
    coarse_weight = F.avg_pool2d(F.pad(weight, odd), 2)
    coarse = F.avg_pool2d(F.pad(weighted, odd), 2)
    # Weights saturate: a coarse pixel counts as known once a quarter of it is.
    gain = (4 * coarse_weight).clamp(max=1) / coarse_weight.clamp_min(1e-12)
    guess = _fill_level(coarse * gain, coarse_weight * gain, sweeps)
    guess = F.interpolate(guess, size=(size[0] * 2, size[1] * 2), mode="bilinear", align_corners=False)[..., :h, :w]
    out = torch.lerp(guess, mean, weight)
    for _ in range(sweeps):
        p = F.pad(out, (1, 1, 1, 1), mode="replicate")
        around = (p[..., 1:-1, :-2] + p[..., 1:-1, 2:] + p[..., :-2, 1:-1] + p[..., 2:, 1:-1]) / 4
        out = torch.lerp(around, mean, weight)
    return out
