"""Where patches and tiles lie, and how much each counts where they overlap (SPEC section 9)."""

import math
from collections.abc import Iterator
from itertools import product

import torch

PATCH, STRIDE = 512, 256  # px, as published

Box = tuple[slice, slice]  # rows and columns


def _starts(size: int, patch: int, stride: int) -> tuple[list[int], list[int]]:
    """Where patches start along one side: the even ones, and a last one that ends at the border, if these do not."""
    return list(range(0, size - patch + 1, stride)), [size - patch] if (size - patch) % stride else []


def _profile(start: int, size: int, patch: int, overlap: int) -> torch.Tensor:
    """[patch] weights along one side: ramps over `overlap` towards neighbours, which reach 0."""
    line = torch.ones(patch)
    if start + patch < size:
        line[patch - overlap :] = torch.linspace(1, 0, overlap)
    if start > 0:
        line[:overlap] = torch.linspace(0, 1, overlap)
    return line


def grid(height: int, width: int, patch: int = PATCH, stride: int = STRIDE) -> list[tuple[int, int]]:
    """(row, column) of the patches in the published order: the even grid, then the last row, the last column and the corner."""
    (rows, last_row), (columns, last_column) = _starts(height, patch, stride), _starts(width, patch, stride)
    return [*product(rows, columns), *product(last_row, columns), *product(rows, last_column), *product(last_row, last_column)]


def window(row: int, column: int, height: int, width: int, patch: int = PATCH, overlap: int = STRIDE) -> torch.Tensor:
    """[patch, patch] weight of the patch at (row, column) of a picture of this size."""
    return _profile(row, height, patch, overlap)[:, None] * _profile(column, width, patch, overlap)


def tiles(height: int, width: int, side: int, overlap: int) -> Iterator[tuple[float, Box]]:
    """As few equal tiles of at most `side` as cover a plane, about `overlap` over one another: the share done before, and the tile."""

    def along(size: int) -> list[slice]:
        count = 1 if size <= side else math.ceil((size - overlap) / (side - overlap))
        one = math.ceil((size + (count - 1) * overlap) / count)
        starts = [i * (size - one) // max(count - 1, 1) for i in range(count)]
        return [slice(start, start + one) for start in starts]

    boxes = list(product(along(height), along(width)))
    for n, box in enumerate(boxes):
        yield n / len(boxes), box


def box_window(box: Box, height: int, width: int, overlap: int) -> torch.Tensor:
    """The weight of a tile of a plane of this size, as of a patch."""
    rows, columns = (_profile(s.start, size, s.stop - s.start, overlap) for s, size in zip(box, (height, width), strict=True))
    return rows[:, None] * columns


def reflected(size: int, wanted: int) -> tuple[torch.Tensor, int]:
    """Indices that make `wanted` entries of `size` by mirroring at both ends, as often as needed, and where the original starts."""
    before = (wanted - size) // 2
    period = max(2 * (size - 1), 1)
    places = (torch.arange(wanted) - before) % period
    return torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places), before
