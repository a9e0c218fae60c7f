"""Pictures to network inputs as Depth Anything wants them (bokehdepth_stage2 SPEC sections 7 and 8.2)."""

import math

import torch
import torch.nn.functional as F

from ..errors import BokehError

PATCH = 14
RESOLUTION = 518
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def network_size(height: int, width: int, resolution: int = RESOLUTION, rule: str = "lower bound") -> tuple[int, int]:
    """(height, width) of the network's input for a picture: multiples of 14, its aspect ratio kept as well as they allow.

    rule  "lower bound": no side below the resolution, the published choice; "upper bound": none above it;
          "minimal": the smaller change of size (what the transformers library does)
    Raises BokehError for a resolution below 14.
    """
    if resolution < PATCH:
        raise BokehError(f"The depth resolution is {resolution}; expected at least {PATCH}, {RESOLUTION} is what the models were made for.")
    factors = (resolution / height, resolution / width)
    if rule == "minimal":
        factor = min(factors, key=lambda f: abs(1 - f))
        return _multiple(factor * height), _multiple(factor * width)
    if rule == "lower bound":
        factor = max(factors)
        return _multiple(factor * height, least=resolution), _multiple(factor * width, least=resolution)
    factor = min(factors)
    return _multiple(factor * height, most=resolution), _multiple(factor * width, most=resolution)


def video_network_size(height: int, width: int, resolution: int = RESOLUTION) -> tuple[int, int]:
    """The same for Video Depth Anything: clips wider than about 16:9 get a lower resolution, so that the work stays bounded."""
    ratio = max(height, width) / min(height, width)
    if ratio > 1.78:
        resolution = round(int(resolution * 1.777 / ratio) / PATCH) * PATCH
    return network_size(height, width, max(resolution, PATCH))


def _multiple(length: float, least: float = 0, most: float = math.inf) -> int:
    steps = round(length / PATCH)  # half to even
    if steps * PATCH < least:
        steps = math.ceil(length / PATCH)
    elif steps * PATCH > most:
        steps = math.floor(length / PATCH)
    return steps * PATCH


def network_input(
    image: torch.Tensor,  # [B, 3, H, W] display-encoded sRGB; values outside 0..1 are clipped
    size: tuple[int, int],  # from a size rule
) -> torch.Tensor:
    """[B, 3, h, w] float32, normalised. Bicubic without antialias, as OpenCV resizes (agrees to 3e-5)."""
    image = F.interpolate(image.float().clamp(0, 1), size, mode="bicubic", align_corners=False, antialias=False)
    return normalised(image)


def normalised(image: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] float32 0..1 in the units that networks trained on ImageNet want."""
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def to_size(maps: torch.Tensor, size: tuple[int, int], align_corners: bool = True) -> torch.Tensor:
    """[B, h, w] -> [B, H, W] as published: bilinear, corners on corners (UniDepthV2: borders on borders)."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=align_corners)[:, 0]
