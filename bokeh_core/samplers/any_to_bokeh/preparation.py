"""From pictures, disparity, focus and blur strength to what the networks take, and the helper scripts of the release (SPEC section 2)."""

import math
import re

import torch
import torch.nn.functional as F

from ...errors import BokehError

PUBLISHED_SIZE = (576, 1024)  # height, width of every training and test picture
MULTIPLE = 64  # width and height inside the network: three halvings of a latent at an eighth of the size
SCALE = 0.18215  # of latents, those of the pictures included
TRAINED_K = (1.0, 32.0)  # whole numbers in this range were seen in training
LARGEST_K = 655  # times the highest frequency, 100, it still is a number in float16


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[..., h, w] of maps [..., H, W]: bilinear, antialiased, the published way of making every input smaller or larger."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    flat = F.interpolate(flat, size=size, mode="bilinear", align_corners=False, antialias=True)
    return flat.reshape(*maps.shape[:-2], *size)


def resize_regions(region: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Region maps [..., H, W] uint8 at another size: resized as pictures are, then rounded."""
    return resize(region.float(), size).round().to(torch.uint8)


def restore(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[..., H, W] of pictures [..., h, w] 0..1: back at the size they came from, bicubic."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    return F.interpolate(picture, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0.0, 1.0)


def working_size(height: int, width: int, resolution: int = PUBLISHED_SIZE[1]) -> tuple[int, int]:
    """(height, width) inside the network: multiples of 64 with nearly the shape of the picture and the area of `resolution` at 16:9.

    Among the sizes of 0.6 to 1.05 times that area, the one with the smallest |log shape error| + 0.1 |log area error|.
    """
    area = resolution * resolution * PUBLISHED_SIZE[0] / PUBLISHED_SIZE[1]
    best, least = (MULTIPLE, MULTIPLE), math.inf
    most = int(1.05 * area) // MULTIPLE**2
    for rows in range(1, max(most, 1) + 1):
        for columns in range(1, max(most // rows, 1) + 1):
            share = rows * columns * MULTIPLE**2 / area
            if share < 0.6 and most > 1:
                continue
            error = abs(math.log(columns / rows * height / width)) + 0.1 * abs(math.log(share))
            if error < least:
                best, least = (rows * MULTIPLE, columns * MULTIPLE), error
    return best


def clip_range(span: tuple[float, float], focus: torch.Tensor) -> tuple[float, float]:
    """(low, high) of disparity that become 0 and 1 for the network: (0, 1) for relative maps, else the clip's own, focus included."""
    low, high = span
    return min(low, float(focus.min())), max(high, float(focus.max()))


def disparity_difference(disparity: torch.Tensor, focus: torch.Tensor) -> torch.Tensor:
    """[B, H, W] 0..1: V_D = |disparity - focus|, which no longer tells near from far. disparity [B, H, W] and focus [B], 0..1."""
    return (disparity.float() - focus.to(disparity.device).float()[:, None, None]).abs()


def trained_k(k: float, difference: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(K, V_D) with the same blur radius K * V_D and a K that training has seen: the nearest whole number from 1 to 32.

    The embedding of K has frequencies up to 100, so a K between whole numbers is as strange to the network as one above 32. V_D,
    which is continuous, takes up the difference; it ends at 1, and with it the radius at 32 px. The rule is ours.
    """
    low, high = TRAINED_K
    seen = min(max(float(round(k)), low), high)
    return seen, (difference * (k / seen)).clamp(max=1.0)


# The released scripts


FOCUS_IN_NAME = re.compile(r"_zf_(?P<focus>[0-9.]+?)(?:_k_(?P<k>[0-9.]+?))?(?:\.[A-Za-z]+)?$")


def read_name(name: str) -> tuple[int, float, float | None]:
    """(frame number, focus disparity, K or None) of a disparity file such as `00003_zf_0.53367_k_24.png` (SPEC section 2.1)."""
    number, values = re.match(r"\d+(?=[_.])", name), FOCUS_IN_NAME.search(name)
    if number is None or values is None:
        raise BokehError(f"'{name}' does not name its frame and focus; expected a name such as 00003_zf_0.53367.png.")
    return int(number[0]), float(values["focus"]), None if values["k"] is None else float(values["k"])


def focus_from_masks(depth: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, float]]]:
    """The preparation script: 8-bit disparity of a clip, and the focus of each frame whose mask is not empty (SPEC section 2.4).

    depth [n, H, W] raw disparity of any scale, masks [n, H, W] uint8. Returns ([n, H, W] uint8, brought to 0..255 by the clip's
    minimum and maximum and cut off, not rounded; [(frame, mean of the 8-bit values where the mask is above 128, over 255)]).
    """
    low, high = depth.aminmax()
    disparity = ((depth - low) / (high - low) * 255).to(torch.uint8)
    focus = []
    for index, (grey, mask) in enumerate(zip(disparity, masks, strict=True)):
        inside = grey[mask > 128]
        if len(inside):
            focus.append((index, float(inside.double().mean()) / 255))
    return disparity, focus


def rack_focus(greys: list[float], frames: int) -> torch.Tensor:
    """[frames] focus disparities that hold and move through three grey levels 0..255 (SPEC section 2.5)."""
    moving = int(0.7 * frames)
    step, hold = max(1, int(moving / 2)), max(1, int((frames - moving) / 3))
    first, middle, last = (torch.tensor([float(grey)]) for grey in greys)
    moves = [torch.linspace(float(a), float(b), step) for a, b in ((first, middle), (middle, last))]
    track = torch.cat([first.repeat(hold), moves[0], middle.repeat(hold), moves[1], last.repeat(frames)])
    return track[:frames] / 255


def k_ramp(frames: int) -> torch.Tensor:
    """[frames] whole K from 32 down to 1 along a parabola (SPEC section 2.5)."""
    return torch.tensor([int(1 + 31 * (i / max(1, frames - 1)) ** 2) for i in reversed(range(frames))])
