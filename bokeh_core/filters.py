"""Filters of pictures that several parts share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def box_mean(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Mean over a (2 radius + 1)^2 window of [C, H, W] or [B, C, H, W]; the border repeats."""
    size = 2 * radius + 1
    x = F.pad(x, (radius,) * 4, mode="replicate")
    return _windows(_windows(x, size, -2, torch.add), size, -1, torch.add).div_(size * size)


def box_max(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Maximum over a (2 radius + 1)^2 window of [..., H, W]; the border repeats."""
    size = 2 * radius + 1
    wide = F.pad(x.reshape(1, -1, *x.shape[-2:]), (radius,) * 4, mode="replicate")
    return _windows(_windows(wide, size, -2, torch.maximum), size, -1, torch.maximum).view(x.shape)


def box_min(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Minimum over a (2 radius + 1)^2 window of [..., H, W]; the border repeats."""
    return box_max(x.neg(), radius).neg_()


def by_rows(work: Callable[[torch.Tensor], torch.Tensor], plane: torch.Tensor, margin: int) -> torch.Tensor:
    """work([h, W]) -> [h, W] of a plane [H, W], some rows at a time, so that what it needs on the way does not grow with the plane.

    The same digits as work(plane), if no pixel depends on rows farther away than `margin`.
    """
    height, width = plane.shape
    rows = max(1, ROWS_PIXELS // width)
    if rows >= height:
        return work(plane)
    out = torch.empty_like(plane)
    for top in range(0, height, rows):
        first, last = max(0, top - margin), min(height, top + rows)
        out[top:last] = work(plane[first : last + margin])[top - first : last - first]
    return out


ROWS_PIXELS = 1 << 21


def _windows(x: torch.Tensor, size: int, dim: int, join: Callable) -> torch.Tensor:
    """`join` of `size` neighbours along an axis, which gets shorter by size - 1.

    Windows of 1, 2, 4, ... are joined from two halves, and those that make up `size` laid side by side: whole rows at a time, where
    torch's own pooling walks through each pixel's window (4 to 7 times slower on a CPU).
    """
    count = x.shape[dim] - size + 1
    out, at, width = None, 0, 1
    while True:
        if size & width:
            part = x.narrow(dim, at, count)
            out = part if out is None else join(out, part)
            at += width
        if 2 * width > size:
            return out
        length = x.shape[dim] - width
        x, width = join(x.narrow(dim, 0, length), x.narrow(dim, width, length)), 2 * width
