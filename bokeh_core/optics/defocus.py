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
    return Defocus(disparity, focus, lens.k(width, focus, metric=metric, disparity_range=disparity_range), lens, metric)


def clip_span(disparity: torch.Tensor) -> tuple[float, float]:
    """(farthest, nearest) the whole clip is measured by: (0, 1) for a relative map within 0..1, else its minimum and maximum."""
    low, high = map(float, disparity.aminmax())
    return (0.0, 1.0) if low >= -1e-3 and high <= 1.001 else (low, high)


def disparity_from_image(image: torch.Tensor, *, inverted: bool = False) -> torch.Tensor:
    """Relative disparity [B, H, W] float32 from a depth picture [B, H, W, C], near = bright (`inverted`: far = bright).

    C is 1, 3 or 4 (alpha is ignored). Grey pictures are read as they are, coloured ones by their luma (Rec. 709).
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or image.numel() == 0:
        raise BokehError(f"The depth picture has shape {list(image.shape)}; expected [frames, height, width, 1, 3 or 4].")
    grey = image[..., 0].float()
    if image.shape[-1] > 1 and not (torch.equal(image[..., 0], image[..., 1]) and torch.equal(image[..., 0], image[..., 2])):
        grey = 0.2126 * grey + 0.7152 * image[..., 1].float() + 0.0722 * image[..., 2].float()
    return _oriented(grey, inverted)


def disparity_from_mask(mask: torch.Tensor, *, inverted: bool = False) -> torch.Tensor:
    """Relative disparity [B, H, W] float32 from a mask [B, H, W] or [H, W], near = 1 (`inverted`: far = 1)."""
    if mask.ndim not in (2, 3) or mask.numel() == 0:
        raise BokehError(f"The depth mask has shape {list(mask.shape)}; expected [height, width] or [frames, height, width].")
    return _oriented(mask.float().reshape(-1, *mask.shape[-2:]), inverted)


def disparity_from_distance(depth: torch.Tensor) -> torch.Tensor:
    """Disparity 1 / depth [B, H, W] float32 from distances [B, H, W], near = small. Metres give metric disparity.

    Infinite, zero and negative distances (sky, no measurement) become disparity 0. Raises BokehError for NaN.
    """
    if depth.ndim != 3 or depth.numel() == 0:
        raise BokehError(f"The depth has shape {list(depth.shape)}; expected [frames, height, width].")
    depth = depth.float()
    _require_no_nan(depth)
    disparity = torch.where(depth > 0, 1.0 / depth, torch.zeros_like(depth))
    _require_finite(disparity)
    return disparity


def disparity_from_geometry(geometry: dict) -> torch.Tensor:
    """Disparity [B, H, W] float32 from a MOGE_GEOMETRY or DA3_GEOMETRY dict.

    depth  [B, H, W] near = small, may hold inf; required. In metres for metric models, then the result is metric disparity
    mask   [B, H, W] True where depth is valid; elsewhere (sky, no measurement) the disparity is 0
    sky    [B, H, W] 0..1 probability; at 0.5 and above the disparity is 0
    """
    depth = geometry.get("depth") if isinstance(geometry, dict) else None
    if depth is None:
        found = ", ".join(sorted(map(str, geometry))) if isinstance(geometry, dict) else type(geometry).__name__
        raise BokehError(f"The geometry holds no depth (found: {found}); connect the geometry output of a depth node.")
    far = torch.zeros_like(depth, dtype=torch.bool)
    if geometry.get("mask") is not None:
        far |= geometry["mask"].to(far.device) <= 0
    if geometry.get("sky") is not None:
        far |= geometry["sky"].to(far.device) >= 0.5
    return disparity_from_distance(depth.float().masked_fill(far, float("inf")))


def fit_disparity(disparity: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """[frames, height, width]: disparity [B, h, w] brought to the image's size (bilinear, half-pixel centres).

    One map serves every frame; any other difference in number is an error.
    """
    disparity = _repeat(disparity, frames, "depth maps", "images", check_only=True)
    if disparity.shape[-2:] != (height, width):
        disparity = F.interpolate(disparity[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
    return disparity.expand(frames, height, width)


def _oriented(disparity, inverted):
    _require_finite(disparity)
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
