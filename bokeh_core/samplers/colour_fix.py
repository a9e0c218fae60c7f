"""Give a generated picture the colours of the photo it was made from (MagicBokeh SPEC section 10, BokehDiff SPEC section 8.6)."""

import torch
import torch.nn.functional as F

WAVELET_LEVELS = 5


def adain(picture: torch.Tensor, photo: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean and standard deviation of each channel made those of the photo; not clamped.

    picture, photo  [..., C, H, W]
    weight          [H, W] >= 0: how much a pixel counts for the statistics; None = all alike, as published
    """
    weight = torch.ones_like(photo[..., 0, :, :]) if weight is None else weight
    mean, deviation = _statistics(picture, weight)
    wanted_mean, wanted_deviation = _statistics(photo, weight)
    return (picture - mean) / deviation * wanted_deviation + wanted_mean


def _statistics(picture, weight):
    """Weighted mean and sqrt(unbiased variance + 1e-5), [..., C, 1, 1]."""
    weight = weight[..., None, :, :]
    total = weight.sum((-2, -1), keepdim=True)
    mean = (picture * weight).sum((-2, -1), keepdim=True) / total
    variance = ((picture - mean) ** 2 * weight).sum((-2, -1), keepdim=True) / (total - 1)
    return mean, (variance + 1e-5).sqrt()


def mean_fix(picture: torch.Tensor, photo: torch.Tensor) -> torch.Tensor:
    """The mean of each channel made that of the photo, contrast left alone: blur keeps means but not deviations. [..., C, H, W]."""
    return picture + (photo.mean((-2, -1), keepdim=True) - picture.mean((-2, -1), keepdim=True))


def wavelet_parts(picture: torch.Tensor, levels: int = WAVELET_LEVELS) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low band of [B, C, H, W]: `levels` passes of the kernel [1 2 1] x [1 2 1] / 16 with holes of 2^i, edges repeated."""
    line = torch.tensor([1.0, 2.0, 1.0], device=picture.device, dtype=picture.dtype)
    channels = picture.shape[1]
    kernel = (line[:, None] * line / 16).expand(channels, 1, 3, 3)
    high, low = torch.zeros_like(picture), picture
    for level in range(levels):
        step = 2**level
        smooth = F.conv2d(F.pad(low, (step,) * 4, mode="replicate"), kernel, groups=channels, dilation=step)
        high = high + (low - smooth)
        low = smooth
    return high, low


def wavelet_fix(picture: torch.Tensor, photo: torch.Tensor, levels: int = WAVELET_LEVELS) -> torch.Tensor:
    """The picture's details on the photo's colours, [B, C, H, W]; not clamped. Where the picture is blurred wide, the photo shows."""
    return wavelet_parts(picture, levels)[0] + wavelet_parts(photo, levels)[1]
