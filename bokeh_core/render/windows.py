"""Large pictures, window by window, so that the memory of a picture is bounded.

A window is rendered with as much around it as light and layering reach, and only its core is kept. How a hidden surface goes on beyond a
window is taken from a small copy of the whole picture, cut into the same layers.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from ..optics.lens import Aperture
from .aperture import AXIAL_SCALE, LATERAL_SCALE
from .scene import Scene

WHOLE = 9_000_000  # px rendered in one piece: DCI 4K and all below it
SMALL = 1_500_000  # px of the small copy
ALIGN = 64  # px; grids halved up to six times have their samples at the same places in every window and in the whole
SETTLED = 64  # px around a pixel after which layering knows nothing more of it than the small copy
MOST_WORK = 4  # times the pixels of the picture that its windows may come to, where the blur is too wide for windows of WHOLE


@dataclass(frozen=True)
class Window:
    """rows, columns: what is computed; core: the part that is kept, counted from the picture's corner. height, width: the whole picture."""

    rows: slice
    columns: slice
    core: tuple[slice, slice]
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    @property
    def within(self) -> tuple[slice, slice]:
        """The core, counted from the window's corner."""
        rows, columns = self.core
        top, left = self.rows.start, self.columns.start
        return slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)

    def of(self, picture: torch.Tensor) -> torch.Tensor:
        """The window of [..., H, W]."""
        return picture[..., self.rows, self.columns]


def step(height: int, width: int) -> int:
    """Pixels of a picture in one of its small copy, along an axis; 1 for what is rendered in one piece."""
    return 1 if height * width <= WHOLE else math.ceil(math.sqrt(height * width / SMALL))


def thin(planes: torch.Tensor, step: int) -> torch.Tensor:
    """Every step-th sample of [..., H, W] along both axes: depth must not be averaged."""
    if step == 1:
        return planes
    return planes[..., step // 2 :: step, step // 2 :: step][..., : planes.shape[-2] // step, : planes.shape[-1] // step]


def margin(size: tuple[int, int], widest: float, aperture: Aperture, layering: int) -> int:
    """Pixels around a window's core that light or layering reach from.

    size      height and width of the whole picture
    widest    blur radius in px
    layering  px that edges are mended from, beside SETTLED
    """
    farthest = 1.25 * widest * (1 + AXIAL_SCALE * aperture.chromatic_longitudinal)  # the coarser grids spread a little farther
    farthest += LATERAL_SCALE * aperture.chromatic_lateral * max(size) / 2
    return math.ceil(farthest if farthest <= 1e9 else 1e9) + 8 + layering + SETTLED  # 1e9 for NaN too: `render` refuses both


def plan(height: int, width: int, margin: int) -> list[Window]:
    """The windows of a picture, row by row; a single one up to WHOLE px.

    Above it the grid with the fewest pixels whose windows have no more than WHOLE. Where the margin leaves none, the one with the smallest
    windows whose pixels come to at most MOST_WORK pictures.
    """
    if height * width <= WHOLE:
        return _grid(_spans(height, 0, 1), _spans(width, 0, 1))
    best, least = None, None
    across = [_spans(width, margin, n) for n in range(1, math.ceil(width / 256) + 1)]
    for rows in (_spans(height, margin, n) for n in range(1, math.ceil(height / 256) + 1)):
        for columns in across:
            lengths = [[outer.stop - outer.start for _, outer in spans] for spans in (rows, columns)]
            total, largest = (math.prod(of(part) for part in lengths) for of in (sum, max))
            if total > MOST_WORK * height * width:
                break
            cost = (largest > WHOLE, total if largest <= WHOLE else largest, len(rows) * len(columns))
            if least is None or cost < least:
                best, least = (rows, columns), cost
    return _grid(*best)


def _grid(rows: list[tuple[slice, slice]], columns: list[tuple[slice, slice]]) -> list[Window]:
    height, width = rows[-1][0].stop, columns[-1][0].stop
    return [
        Window(outer_rows, outer_columns, (core_rows, core_columns), height, width)
        for core_rows, outer_rows in rows
        for core_columns, outer_columns in columns
    ]


def _spans(size: int, margin: int, count: int) -> list[tuple[slice, slice]]:
    """Core and outer span of each of `count` parts of an axis. Outer spans begin at multiples of ALIGN and are as odd as the axis."""
    cuts = sorted({round(size * i / count / ALIGN) * ALIGN for i in range(count)} | {0, size})
    spans = []
    for start, stop in pairwise(cuts):
        first = max(0, (start - margin) // ALIGN * ALIGN)
        length = stop + margin - first
        last = first + length + (size - length) % ALIGN
        spans.append((slice(start, stop), slice(first, last if stop + margin < size else size)))
    return spans


@dataclass(frozen=True)
class Overview:
    """The small copy of a picture, cut into layers.

    scene    its layers
    step     pixels of the picture in one of it, along an axis
    grown    [2, h, w] disparity of the matted subject and of its surroundings, or None
    reaches  px of the picture that these were grown again over, as from `layering.bands`
    """

    scene: Scene
    step: int
    grown: torch.Tensor | None = None
    reaches: tuple[int, int] | None = None


class Rim:
    """The border of a window, where the picture goes on behind it: there hidden surfaces are tied to the small copy's."""

    def __init__(self, overview: Overview, window: Window, device: torch.device):
        height, width = window.rows.stop - window.rows.start, window.columns.stop - window.columns.start
        mask = torch.zeros(height, width, dtype=torch.bool, device=device)
        mask[0], mask[-1] = window.rows.start > 0, window.rows.stop < window.height
        mask[:, 0] |= window.columns.start > 0
        mask[:, -1] |= window.columns.stop < window.width
        self.overview, self.mask = overview, mask
        y, x = mask.nonzero(as_tuple=True)
        self.y, self.x = y + window.rows.start, x + window.columns.start

    def tie(self, values: torch.Tensor, known: torch.Tensor, small: torch.Tensor) -> None:
        """Make the unknown border of values [C, H, W] known, as in the small copy's planes [C, h, w]; in place, as is `known` [H, W]."""
        hidden = known[self.mask] == 0
        h, w = small.shape[-2:]
        # The middle of a small pixel is that of its step x step pixels.
        y, x = ((place[hidden] - (self.overview.step - 1) / 2) / self.overview.step for place in (self.y, self.x))
        grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1).to(values)[None, None]
        found = F.grid_sample(small[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]
        where = self.mask.clone()
        where[self.mask] = hidden
        values[:, where] = found
        known[where] = 1

    def layer(self, number: int) -> torch.Tensor | None:
        """[5, h, w] colour, disparity and alpha of a layer in the small copy, by the number of its interval between the cuts."""
        scene = self.overview.scene
        if number not in scene.numbers:
            return None
        layer = scene.layers[scene.numbers.index(number)]
        return torch.cat([layer.color, layer.disparity[None], layer.alpha[None]])
