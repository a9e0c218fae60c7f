"""The focus overlay: what a photographer sees before the picture is rendered."""

import torch
import torch.nn.functional as F

from ..errors import BokehError

NEAR = (1.0, 0.45, 0.1)  # display-encoded tints
FAR = (0.15, 0.45, 1.0)
OUTLINE = (0.35, 1.0, 0.35)
_LUMA = (0.2126, 0.7152, 0.0722)


def draw_overlay(image, defocus):
    """See Defocus.overlay. Frames are drawn one at a time, so that a long clip needs no more memory than its result."""
    frames, height, width = defocus.disparity.shape
    if image.ndim != 4 or tuple(image.shape) != (frames, 3, height, width):
        raise BokehError(
            f"The picture under the overlay is {list(image.shape)} and its depth {[frames, height, width]}; "
            "expected [frames, 3, height, width] of the same frames and size."
        )
    result = torch.empty_like(image)
    for i in range(frames):
        result[i] = _draw(image[i].float().clamp(0, 1), defocus.frame(i))
    return result


def small_views(pictures: torch.Tensor, disparity: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """What a click on a picture needs: (photos [B, h, w, 3], depths [B, h, w, 3], low, high), the longer side at most `side` px.

    pictures [B, 3, H, W] display-encoded, disparity [B, H, W]. A depth survives 8 bits a channel, cut off: with r and g the bytes of red
    and green it is low + (high - low) (256 r + g) / 65535.
    """
    scale = min(1.0, side / max(disparity.shape[1:]))
    size = [max(1, round(length * scale)) for length in disparity.shape[1:]]
    photos = F.interpolate(pictures.float(), size=size, mode="area").clamp(0, 1).movedim(1, -1)
    small = F.interpolate(disparity[:, None], size=size, mode="nearest-exact")[:, 0].cpu()  # not all devices have float64
    low, high = map(float, small.aminmax())
    levels = ((small.double() - low) / max(high - low, 1e-12) * 65535).round()
    bytes_ = torch.stack([levels // 256, levels % 256, torch.zeros_like(levels)], -1)
    return photos, ((bytes_ + 0.25) / 255).clamp(0, 1).float(), low, high


def _draw(image, defocus):
    s = defocus.signed_radius()[0]
    sharp = defocus.in_focus_mask()[0]
    strongest = s.abs().max().clamp(min=1e-6)
    depth = (s.abs() / strongest).sqrt()

    grey = torch.einsum("chw,c->hw", image, image.new_tensor(_LUMA))
    tint = torch.where(s[None] > 0, image.new_tensor(NEAR)[:, None, None], image.new_tensor(FAR)[:, None, None])
    tinted = (0.25 + 0.75 * grey)[None] * (tint * depth + (1 - depth) * 0.7)
    out = torch.lerp(tinted, image, sharp[None])

    unit = max(1, round(min(image.shape[1:]) / 360))
    outline = image.new_tensor(OUTLINE)[:, None, None].expand_as(out)
    out = torch.lerp(out, outline, 0.85 * _ring(sharp, unit)[None])
    return _cross(out, sharp, unit)


def _ring(sharp, unit):
    """[H, W] 0..1 line of about 2 `unit` px around the zone in focus; specks smaller than the line are not outlined."""
    soft = F.pad(sharp[None, None], [2 * unit] * 4, mode="replicate")
    soft = F.avg_pool2d(F.avg_pool2d(soft, (4 * unit + 1, 1), stride=1), (1, 4 * unit + 1), stride=1)
    zone = (soft > 0.5).float()
    return (_grow(zone, unit) + _grow(-zone, unit))[0, 0]


def _grow(zone, unit):
    """Largest value within `unit` px, in a square."""
    side = 2 * unit + 1
    return F.max_pool2d(F.max_pool2d(zone, (side, 1), 1, (unit, 0)), (1, side), 1, (0, unit))


def _cross(picture, sharp, unit):
    """White cross with a dark rim where the zone in focus is densest; nothing when no pixel is in focus."""
    height, width = sharp.shape
    if float(sharp.max()) <= 0:
        return picture
    cell = max(1, max(height, width) // 96)
    dense = F.avg_pool2d(sharp[None, None], cell, ceil_mode=True)
    dense = F.avg_pool2d(dense, 9, stride=1, padding=4)[0, 0]
    row, column = (
        min(cell * at + cell // 2, side - 1) for at, side in zip(divmod(int(dense.argmax()), dense.shape[1]), sharp.shape, strict=True)
    )
    y = (torch.arange(height, device=sharp.device) - row).abs()[:, None]
    x = (torch.arange(width, device=sharp.device) - column).abs()[None, :]
    gap, arm, half = 3 * unit, 10 * unit, unit // 2

    def bars(rim):
        along, across = torch.maximum(x, y), torch.minimum(x, y)
        return (along <= arm + rim) & (along >= gap - rim) & (across <= half + rim)

    picture = torch.where(bars(unit), picture.new_zeros(()), picture)
    return torch.where(bars(0), picture.new_ones(()), picture)
