"""From files to tensors as BokehDiff's own inference does it (SPEC section 5.3): disparity range, focus from a salient mask, sizes."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...pixels import lanczos

MULTIPLE = 8  # px: sides of the processed picture


@dataclass(frozen=True)
class Prepared:
    """One picture ready for the sampler, its sides multiples of 8.

    pixels     [3, H, W] -1..1
    disparity  [1, H, W] 0..1
    defocus    [1, H, W] signed: disparity - focus
    focus      disparity in focus
    """

    pixels: torch.Tensor
    disparity: torch.Tensor
    defocus: torch.Tensor
    focus: float


def prepare(image: np.ndarray, depth: np.ndarray, salient: np.ndarray, upsample: float = 1.0) -> Prepared:
    """image [H, W, 3] uint8 RGB; depth [h, w] float, used as disparity (larger = nearer); salient [h2, w2] uint8, white = in focus."""
    disparity, _, _ = spread(torch.from_numpy(depth).float())
    focus = focus_of(disparity, salient)
    height, width = image.shape[:2]
    image = lanczos(image, int(height * upsample), int(width * upsample))
    disparity = bilinear(disparity[None], *image.shape[:2])
    pixels, maps = to_multiples(image, torch.cat([disparity, disparity - focus]))
    return Prepared(pixels, maps[:1], maps[1:], focus)


def spread(disparity: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """([h, w] spread over 0..1, farthest, nearest): the range is that of the map without its one-pixel outliers, which are clipped.

    farthest, nearest: the values of the given map that became 0 and 1. A constant map becomes 0.
    """
    low, high = map(float, disparity.aminmax())
    span = (high - low) or 1.0
    disparity = (disparity - low) / span
    opened = _grow(-_grow(-disparity))
    inner_low, inner_high = map(float, opened.aminmax())
    inner = (inner_high - inner_low) or 1.0
    return ((disparity - inner_low) / inner).clamp(0, 1), low + inner_low * span, low + (inner_low + inner) * span


def _grow(plane):
    """Dilation by 3 x 3; the outside counts for nothing."""
    return F.max_pool2d(plane[None, None], 3, 1, 1)[0, 0]


def focus_of(disparity: torch.Tensor, salient: np.ndarray) -> float:
    """Median of the disparity [h, w] under the salient mask (uint8, any size); without a subject, under the middle of the picture."""
    mask = lanczos(salient, *disparity.shape).astype(np.float32) / 255
    if mask.max() == 0:
        height, width = mask.shape
        mask[int(height * 0.4) : int(height * 0.6), int(width * 0.4) : int(width * 0.6)] = 1
    return float(np.median(disparity.numpy()[mask > 0.5]))


def to_multiples(image: np.ndarray, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels [3, H, W] -1..1, maps [C, H, W]) of an 8-bit picture and its maps [C, h, w], stretched to the next multiples of 8."""
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in image.shape[:2])
    pixels = torch.from_numpy(lanczos(image, height, width)).movedim(-1, 0).float() / 127.5 - 1
    return pixels, bilinear(maps, height, width)


def focus_shifts(defocus: torch.Tensor) -> torch.Tensor:
    """[3] the published refocusing of one picture: added to the signed defocus before its absolute value (SPEC 5.4)."""
    return torch.stack([-0.6 * defocus.min(), defocus.new_zeros(()), -0.6 * defocus.max()])


def bilinear(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[C, H, W] resized with half-pixel centres and no smoothing."""
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps[None], size=(height, width), mode="bilinear", align_corners=False)[0]
