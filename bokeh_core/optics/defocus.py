"""Defocus: the only thing a renderer needs beside the image. And the ways a depth map of any kind becomes disparity."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import BokehError
from . import focus as focusing
from .lens import STRENGTH_WIDTH, Lens


@dataclass(frozen=True, eq=False)
class Defocus:
    """Disparity, focus and blur strength of a batch of frames.

    disparity  [B, H, W] float32, larger = nearer; 0..1 with one range for the clip, or 1/m when metric
    focus      [B] disparity in focus
    k          [B] blur radius in px of this image per unit of disparity difference
    lens       the lens k came from, and its aperture
    metric     the disparity is 1/m
    """

    disparity: torch.Tensor
    focus: torch.Tensor
    k: torch.Tensor
    lens: Lens
    metric: bool

    def __post_init__(self):
        frames = self.disparity.shape[0]
        if self.disparity.ndim != 3 or self.focus.shape != (frames,) or self.k.shape != (frames,):
            raise BokehError(
                f"A Defocus needs disparity [B,H,W], focus [B] and k [B]; got {list(self.disparity.shape)}, "
                f"{list(self.focus.shape)} and {list(self.k.shape)}."
            )

    def signed_radius(self) -> torch.Tensor:
        """[B, H, W] s = k (d - d_f) in px; > 0 in front of the focus plane."""
        return self.k[:, None, None] * (self.disparity - self.focus[:, None, None])

    def frame(self, i: int) -> "Defocus":
        """Frame i alone, as a batch of one."""
        i = range(len(self.disparity))[i]
        return Defocus(self.disparity[i : i + 1], self.focus[i : i + 1], self.k[i : i + 1], self.lens, self.metric)

    def in_focus_mask(self, threshold_px: float | None = None) -> torch.Tensor:
        """[B, H, W] 0..1: 1 where the blur radius is at most `threshold_px`, fading smoothly to 0 at twice that.

        threshold_px: px of this image; None = 1 px at 1024 px width, scaled to this width.
        """
        threshold = self.disparity.shape[-1] / STRENGTH_WIDTH if threshold_px is None else threshold_px
        if not threshold > 0:
            raise BokehError(f"The in-focus threshold is {threshold} px; expected a number above 0.")
        t = (self.signed_radius().abs() / threshold - 1.0).clamp(0.0, 1.0)
        return 1.0 - t * t * (3.0 - 2.0 * t)

    def overlay(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] display-encoded picture that shows what will be sharp.

        image [B, 3, H, W] display-encoded, of the disparity's size. Near blur is warm, far blur cool, the deeper the stronger; the
        focus zone keeps its colours inside a bright outline, with a cross on its middle.
        """
        from .overlay import draw_overlay

        return draw_overlay(image, self)


def make_defocus(
    disparity: torch.Tensor,
    lens: Lens,
    focus: torch.Tensor | float | None = None,
    *,
    width: int,
    metric: bool = False,
    disparity_range: float | None = None,
) -> Defocus:
    """Put depth, lens and focus together.

    disparity        [B, H, W] larger = nearer, finite
    focus            [B], [1] or a number in the disparity's unit; None = the lens's focus distance, else automatic
    width            px of the whole image (of which the disparity may be a crop)
    metric           the disparity is 1/m
    disparity_range  for `strength`: nearest minus farthest disparity of the whole clip. None = found here: 1 for a relative map
                     within 0..1, else maximum minus minimum. Give it when the clip comes in pieces
    Raises BokehError for NaN or infinite disparity, a constant map (unless the range is given), a wrong number of focus values, and
    for a thin lens without metric disparity.
    """
    if disparity.ndim != 3:
        raise BokehError(f"The disparity has shape {list(disparity.shape)}; expected [frames, height, width].")
    disparity = disparity.float()
    _require_finite(disparity)
    if disparity_range is None:
        low, high = map(float, disparity.aminmax())
        if high - low <= 1e-6 * max(abs(high), 1e-3):
            raise BokehError(
                f"The depth map is constant (every value is {high:g}), so there is nothing to focus; check that it is a depth map "
                "of this picture and was not clipped or saved empty."
            )
        disparity_range = high - low if metric else clip_span(disparity)[1] - clip_span(disparity)[0]
    if focus is None and lens.focus_distance is not None and metric:
        focus = 1.0 / lens.focus_distance
    elif focus is None:
        focus = focusing.auto(disparity)
    focus = torch.as_tensor(focus, dtype=torch.float32, device=disparity.device).reshape(-1)
    focus = _repeat(focus, len(disparity), "focus values", "frames of depth")
    if not bool(torch.isfinite(focus).all()):
        raise BokehError("The focus is not a finite number; give a disparity in the unit of the depth map.")
    k = lens.k(width, focus, metric=metric, disparity_range=disparity_range)
    if not bool(torch.isfinite(k).all()):
        raise BokehError("The blur strength is too large for this depth map; check the depth's range and the strength.")
    return Defocus(disparity, focus, k, lens, metric)


def clip_span(disparity: torch.Tensor) -> tuple[float, float]:
    """(farthest, nearest) the whole clip is measured by: (0, 1) for a relative map within 0..1, else its minimum and maximum."""
    low, high = map(float, disparity.aminmax())
    return (0.0, 1.0) if low >= -1e-3 and high <= 1.001 else (low, high)


def disparity_from_image(image: torch.Tensor, *, inverted: bool = False) -> torch.Tensor:
    """Relative disparity [B, H, W] float32 from a depth picture [B, H, W, C], near = bright (`inverted`: far = bright).

    C is 1, 3 or 4 (alpha is ignored). Grey pictures are read as they are, coloured ones by their luma (Rec. 709). The steps of 8-bit
    maps are smoothed (see deband), NaN holes filled (see fill_holes). Raises BokehError for infinite values.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or image.numel() == 0:
        raise BokehError(f"The depth picture has shape {list(image.shape)}; expected [frames, height, width, 1, 3 or 4].")
    grey = image[..., 0].float()
    if image.shape[-1] > 1 and not all(torch.equal(image[..., 0].nan_to_num(), image[..., n].nan_to_num()) for n in (1, 2)):
        grey = 0.2126 * grey + 0.7152 * image[..., 1].float() + 0.0722 * image[..., 2].float()
    return _relative(grey, inverted)


def disparity_from_mask(mask: torch.Tensor, *, inverted: bool = False) -> torch.Tensor:
    """Relative disparity [B, H, W] float32 from a mask [B, H, W] or [H, W], near = 1 (`inverted`: far = 1), read as a picture is."""
    if mask.ndim not in (2, 3) or mask.numel() == 0:
        raise BokehError(f"The depth mask has shape {list(mask.shape)}; expected [height, width] or [frames, height, width].")
    return _relative(mask.float().reshape(-1, *mask.shape[-2:]), inverted)


def disparity_from_distance(depth: torch.Tensor) -> torch.Tensor:
    """Disparity 1 / depth [B, H, W] float32 from distances [B, H, W], near = small. Metres give metric disparity.

    Infinite, zero and negative distances (sky, no measurement) become disparity 0; NaN holes are filled (see fill_holes).
    """
    if depth.ndim != 3 or depth.numel() == 0:
        raise BokehError(f"The depth has shape {list(depth.shape)}; expected [frames, height, width].")
    depth = depth.float()
    disparity = fill_holes(torch.where(depth <= 0, torch.zeros_like(depth), 1.0 / depth))
    _require_finite(disparity)
    return disparity


def disparity_from_geometry(geometry: dict, *, metres: bool = False) -> tuple[torch.Tensor, bool]:
    """(disparity [B, H, W] float32, is it 1/m?) from a BOKEH_GEOMETRY, MOGE_GEOMETRY or DA3_GEOMETRY dict.

    depth      [B, H, W] near = small, may hold inf; or
    disparity  [B, H, W] near = large, finite
    metric     whether depth is metres (disparity: 1/m). Where it is missing, depth is taken for metres if there are normals: of the
               core models only MoGe-2 gives them, and its depth is metric. MoGe-1, panoramas and Depth Anything 3 have no known scale
    mask       [B, H, W] True where depth is valid; elsewhere (sky, no measurement) the disparity is 0
    sky        [B, H, W] 0..1 probability; at 0.5 and above the disparity is 0
    metres     the caller knows that depth is metres, whatever the dict says

    Depth of no known scale becomes relative disparity 0..1 over the whole clip. Outliers nearer than everything else, such as stray
    pixels before a silhouette, are clipped (see robust_span).
    """
    if not isinstance(geometry, dict) or (geometry.get("depth") is None and geometry.get("disparity") is None):
        found = ", ".join(sorted(map(str, geometry))) if isinstance(geometry, dict) else type(geometry).__name__
        raise BokehError(f"The geometry holds no depth (found: {found}); connect the geometry output of a depth node.")
    if geometry.get("depth") is None:
        disparity, metric = _map(geometry, "disparity").float(), bool(geometry.get("metric"))
        disparity = fill_holes(disparity)
        _require_finite(disparity)
        return disparity, metric
    depth = _map(geometry, "depth")
    far = torch.zeros_like(depth, dtype=torch.bool)
    if geometry.get("mask") is not None:
        far |= _map(geometry, "mask", depth.shape).to(far.device) <= 0
    if geometry.get("sky") is not None:
        far |= _map(geometry, "sky", depth.shape).to(far.device) >= 0.5
    disparity = disparity_from_distance(depth.float().masked_fill(far, float("inf")))
    low, high = robust_span(disparity)
    disparity = disparity.clamp(max=high)
    if metres or geometry.get("metric", geometry.get("normal") is not None):
        return disparity, True
    return (disparity.clamp(min=low) - low) / max(high - low, 1e-12), False


def _map(geometry, name, shape=None):
    """[B, H, W] of a geometry dict, of the given shape."""
    found = geometry[name]
    is_map = isinstance(found, torch.Tensor) and found.ndim == 3 and found.numel() > 0
    if not is_map or shape not in (None, found.shape):
        what = f"shape {list(found.shape)}" if isinstance(found, torch.Tensor) else f"the type {type(found).__name__}"
        expected = "[frames, height, width]" if shape is None else f"{list(shape)} like its depth"
        raise BokehError(f"The geometry's {name} has {what}; expected {expected}. Connect the geometry output of a depth node.")
    return found


def robust_span(disparity: torch.Tensor) -> tuple[float, float]:
    """(farthest, nearest) disparity of maps of any shape: minimum and maximum, unless those are outliers.

    An outlier lies beyond the middle 99.8 % of the values by more than a quarter of their range; the bound is put there.
    """
    low, high = map(float, disparity.aminmax())
    values = disparity.flatten()
    values = values[:: max(1, values.numel() >> 20)].sort().values
    cut = len(values) // 1000
    inner_low, inner_high = float(values[cut]), float(values[len(values) - 1 - cut])
    room = 0.25 * (inner_high - inner_low)
    return (max(low, inner_low - room), min(high, inner_high + room)) if room > 0 else (low, high)


def deband(maps: torch.Tensor) -> torch.Tensor:
    """Maps [B, H, W] without the staircase of a few hundred levels, such as 8-bit files have: [B, H, W].

    A map of 24 to 1100 evenly spaced levels counts as quantised; others, and maps of a few flat layers, come back as they are. Every
    pixel is drawn towards the middle of pairs of pixels on opposite sides of it, near and far, where these fit a smooth surface;
    pairs across an edge of two levels or more do not. No value moves by more than half a level, which is all that rounding can have
    done to it, so edges stay where they are. The method is ours.
    """
    steps = [_level_step(one) for one in maps]
    if not any(steps):
        return maps
    return torch.stack([_debanded(one, step) if step else one for one, step in zip(maps, steps, strict=True)])


def _level_step(values: torch.Tensor) -> float:
    """Distance of the levels of a quantised map; 0 for any other."""
    sample = values.flatten()[:: max(1, values.numel() >> 16)]
    levels = sample[sample.isfinite()].unique()
    if not 24 <= len(levels) <= 1100:
        return 0.0
    gaps = levels.diff()
    step = float(gaps.min())
    wide = gaps / step
    even = bool(((wide - wide.round()).abs() < 0.05).all()) and float(levels[-1] - levels[0]) <= 1100 * step
    return float(gaps[wide < 1.5].mean()) if even else 0.0


def _debanded(values: torch.Tensor, step: float) -> torch.Tensor:
    out = values.clone()
    for reach in (32, 16, 8, 4, 2, 1):
        for axis in (0, 1):
            inner = values.shape[axis] - 2 * reach
            if inner <= 0:
                continue
            before, here, after = (values.narrow(axis, n * reach, inner) for n in range(3))
            fits = ((before + after) / 2 - here).abs() <= 0.75 * step
            before, here, after = (out.narrow(axis, n * reach, inner) for n in range(3))
            drawn = torch.where(fits, (before + after) / 4 + here / 2, here)
            out = out.clone()
            out.narrow(axis, reach, inner).copy_(drawn)
            out = out.clamp(values - step / 2, values + step / 2)
    return out


def fill_holes(disparity: torch.Tensor) -> torch.Tensor:
    """Disparity [B, H, W] (larger = nearer) with NaN pixels replaced by the farthest value beside the hole: [B, H, W].

    Holes of scanners and stereo cameras lie behind silhouettes, where one of two views sees nothing, so what surrounds them at the
    back goes on. Raises BokehError for a frame that is nothing but NaN.
    """
    holes = disparity.isnan()
    if not bool(holes.any()):
        return disparity
    if bool(holes.flatten(1).all(1).any()):
        raise BokehError("A depth map is nothing but NaN (no measurement); check the file or the node it comes from.")
    level = disparity.masked_fill(holes, float("inf"))[:, None]
    levels = [level]
    while bool(level.isinf().any()) and max(level.shape[-2:]) > 1:
        level = -F.max_pool2d(-level, 2, ceil_mode=True)
        levels.append(level)
    for finer in reversed(levels[:-1]):
        wide = level.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : finer.shape[2], : finer.shape[3]]
        level = torch.where(finer.isinf(), wide, finer)
    return torch.where(holes, level[:, 0], disparity)


def fit_disparity(disparity: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """[frames, height, width]: disparity [B, h, w] brought to the image's size (bilinear, half-pixel centres).

    One map serves every frame; any other difference in number is an error.
    """
    disparity = _repeat(disparity, frames, "depth maps", "images", check_only=True)
    if disparity.shape[-2:] != (height, width):
        disparity = F.interpolate(disparity[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
    return disparity.expand(frames, height, width)


def _relative(values, inverted):
    """Relative disparity of a map [B, H, W] as stored."""
    side = -1 if inverted else 1
    disparity = side * fill_holes(side * deband(values))  # holes take the farthest value around
    if bool(torch.isinf(disparity).any()):
        raise BokehError(
            f"The depth map has {int(torch.isinf(disparity).sum())} infinite pixels of {disparity.numel()}; expected relative depth. "
            "If it holds distances, where the sky is infinite, read it as metres."
        )
    if not inverted:
        return disparity
    low, high = clip_span(disparity)
    return low + high - disparity


def _repeat(values, count, what, of_what, *, check_only=False):
    if len(values) not in (1, count):
        raise BokehError(f"There are {len(values)} {what} for {count} {of_what}; give one for all, or one for each.")
    return values if check_only else values.expand(count, *values.shape[1:])


def _require_no_nan(values):
    bad = int(torch.isnan(values).sum())
    if bad:
        raise BokehError(f"The depth map has {bad} NaN pixels of {values.numel()}; repair or fill them before use.")


def _require_finite(values):
    _require_no_nan(values)
    bad = int(torch.isinf(values).sum())
    if bad:
        raise BokehError(f"The depth map has {bad} infinite pixels of {values.numel()}; expected finite numbers, larger = nearer.")
