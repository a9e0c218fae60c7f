"""Every published K, converted from ours in one place.

Ours: `k` is the blur radius in px of this image per unit of disparity difference, `s` = k (d - d_f) the signed radius in px. The
published systems take disparities of 0..1; bring a metric disparity to that range first (and k with it: k times the range).
All functions take floats or tensors and keep their shape.
"""

import torch

from .lens import crop_factor, sensor_width_from_crop

BOKEHDEPTH_K = (1.0, 30.0)  # the K axis its network saw in training
_PUBLISHED_WIDTH = 512


def bokehdiff_k(k, side: int | None = None):
    """BokehDiff's K: px of radius per unit disparity on a 512 px tile.

    K = k when the image is processed in 512 px tiles (side None); K = k * 512 / side when an image of that side is processed whole,
    because its positions span the same 51.2 units either way. BokehDiff, inference script (SPEC sections 4 and 5.4).
    """
    return k if side is None else k * 512 / side


def magicbokeh_defocus(s):
    """MagicBokeh's condition D = |s| / 32, from D = |d - f| K / 32 with K in px. MagicBokeh, inference script (SPEC section 7)."""
    return abs(s) / 32


def any_to_bokeh_k(k, width: int):
    """Any-to-Bokeh's K = k * 1024 / width: it always works on a 1024 px wide frame. Any-to-Bokeh (SPEC section 2.2)."""
    return k * 1024 / width


def bokehdepth_k(k, width: int):
    """BokehDepth's K = k * 512 / width, clamped to 1..30 as its inference does. BokehDepth stage 1 (SPEC sections 3 and 7)."""
    low, high = BOKEHDEPTH_K
    value = k * _PUBLISHED_WIDTH / width
    return value.clamp(low, high) if isinstance(value, torch.Tensor) else min(max(value, low), high)


def dof_cond(f_number: float, f: float, f35: float | None, focus_distance: float, width: int, height: int) -> float:
    """BokehDepth's thin-lens K: px of blur radius per dioptre at the image's own width.

    |(f/1000)^2 s1 / (2 N (s1 - f/1000))| * 1000 * width / sensor width; f and f35 in mm (f35 None = full frame), focus distance s1 in
    m. Published as calc_dof_cond (BokehDepth stage 1, SPEC section 7), kept with its quirks: s1 = f raises ZeroDivisionError, s1 < f
    gives the absolute value. `Lens.k` is the same formula with its errors explained.
    """
    metres = f / 1000
    radius = abs(metres**2 * focus_distance / (2 * f_number * (focus_distance - metres)))
    return radius * 1000 * width / sensor_width_from_crop(f, f35, width, height)


def dof_cond_512(k, width: int):
    """The paper's `dof-cond`: K * 512 / width, not clamped (BokehDepth stage 1, SPEC section 7)."""
    return k * _PUBLISHED_WIDTH / width


def dof_cond_512_crop(k, width: int, f: float, f35: float | None):
    """The paper's `dof-cond-crop`: `dof-cond` divided by the crop factor f35 / f (BokehDepth stage 1, SPEC section 7)."""
    return dof_cond_512(k, width) / crop_factor(f, f35)
