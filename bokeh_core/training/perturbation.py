"""Any-to-Bokeh's perturbation of disparity, which teaches the temporal layers to bear the flicker of estimated depth (SPEC section 9.2).

In order: the focused object's outline is warped (elastic), noise is added where the warp uncovered something (Perlin), and the whole
map grows or shrinks by a few pixels (morphology). Disparity is 0..1 here, larger = nearer; the published numbers are for 0..255.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

# Ken Perlin's permutation of 0..255.
# fmt: off
_PERMUTATION = (
    151, 160, 137, 91, 90, 15, 131, 13, 201, 95, 96, 53, 194, 233, 7, 225, 140, 36, 103, 30, 69, 142, 8, 99, 37, 240, 21, 10, 23, 190, 6,
    148, 247, 120, 234, 75, 0, 26, 197, 62, 94, 252, 219, 203, 117, 35, 11, 32, 57, 177, 33, 88, 237, 149, 56, 87, 174, 20, 125, 136, 171,
    168, 68, 175, 74, 165, 71, 134, 139, 48, 27, 166, 77, 146, 158, 231, 83, 111, 229, 122, 60, 211, 133, 230, 220, 105, 92, 41, 55, 46,
    245, 40, 244, 102, 143, 54, 65, 25, 63, 161, 1, 216, 80, 73, 209, 76, 132, 187, 208, 89, 18, 169, 200, 196, 135, 130, 116, 188, 159,
    86, 164, 100, 109, 198, 173, 186, 3, 64, 52, 217, 226, 250, 124, 123, 5, 202, 38, 147, 118, 126, 255, 82, 85, 212, 207, 206, 59, 227,
    47, 16, 58, 17, 182, 189, 28, 42, 223, 183, 170, 213, 119, 248, 152, 2, 44, 154, 163, 70, 221, 153, 101, 155, 167, 43, 172, 9, 129,
    22, 39, 253, 19, 98, 108, 110, 79, 113, 224, 232, 178, 185, 112, 104, 218, 246, 97, 228, 251, 34, 242, 193, 238, 210, 144, 12, 191,
    179, 162, 241, 81, 51, 145, 235, 249, 14, 239, 107, 49, 192, 214, 31, 181, 199, 106, 157, 184, 84, 204, 176, 115, 121, 50, 45, 127, 4,
    150, 254, 138, 236, 205, 93, 222, 114, 67, 29, 24, 72, 243, 141, 128, 195, 78, 66, 215, 61, 156, 180,
)
_GRADIENTS = (
    (1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (1, 0), (-1, 0),
    (0, 1), (0, -1), (0, 1), (0, -1), (1, 0), (-1, 0), (0, -1), (0, 1),
)
# fmt: on


@dataclass(frozen=True)
class Recipe:
    """Published constants."""

    reach: float = 50.0  # of the warp, in units of 1 / side of half the picture
    sigma: float = 4.0  # px of blur of the warp
    kernel: int = 33
    scales: tuple[int, ...] = (50, 20, 10)  # px of a cell of the noise
    amplitudes: tuple[float, ...] = (0.5, 0.3, 0.2)
    octaves: int = 3
    strength: float = 0.2  # of the noise, times the focus disparity
    sizes: tuple[int, ...] = (3, 5, 7)  # px of the growing or shrinking square


PUBLISHED = Recipe()


class Draws:
    """The random decisions of one frame, in the published order. Tests replay recorded ones."""

    def __init__(self, *seed: int):
        self.generator = np.random.default_rng(seed)

    def uniform(self) -> float:
        return float(self.generator.random())

    def field(self, height: int, width: int) -> torch.Tensor:
        """[H, W] uniform in 0..1."""
        return torch.from_numpy(self.generator.random((height, width), dtype=np.float32))

    def integer(self, low: int, high: int) -> int:
        return int(self.generator.integers(low, high))

    def choice(self, options: tuple[int, ...]) -> int:
        return options[self.integer(0, len(options))]


def displacement(dx: torch.Tensor, dy: torch.Tensor, recipe: Recipe = PUBLISHED) -> torch.Tensor:
    """[H, W, 2] smooth warp x, y in units of half the picture, from uniform fields 0..1 [H, W].

    As published, x is divided by the height and y by the width.
    """
    from kornia.filters import gaussian_blur2d

    fields = torch.stack([dx, dy])[:, None] * 2 - 1
    kernel, sigma = (recipe.kernel, recipe.kernel), (recipe.sigma, recipe.sigma)
    smooth = gaussian_blur2d(fields, kernel, sigma, border_type="reflect", separable=True)[:, 0] * recipe.reach
    return torch.stack([smooth[0] / dx.shape[-2], smooth[1] / dx.shape[-1]], dim=-1)


def warp(maps: torch.Tensor, moved: torch.Tensor, mode: str) -> torch.Tensor:
    """[H, W] of a map [H, W], every pixel fetched from its centre plus `moved` [H, W, 2]; 0 comes in from outside. mode of grid_sample."""
    height, width = maps.shape
    y, x = ((2 * torch.arange(n) + 1) / n - 1 for n in (height, width))
    grid = torch.stack([repeat(x, "w -> h w", h=height), repeat(y, "h -> h w", w=width)], dim=-1) + moved
    both = torch.stack([maps, torch.ones_like(maps)])[None]
    found, inside = F.grid_sample(both, grid[None], mode=mode, padding_mode="zeros", align_corners=False)[0]
    return found * inside if mode == "bilinear" else torch.where(inside < 0.5, 0.0, found)  # the border counts twice, as published


def elastic(disparity: torch.Tensor, mask: torch.Tensor, moved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(disparity, mask) with the object warped over the still picture. disparity [H, W] 0..1, mask [H, W] 0 or 1."""
    warped = warp(mask, moved, "nearest")
    mixed = disparity * (1 - warped) + warp(disparity, moved, "bilinear") * warped
    return mixed.clamp(0, 1), warped


def perlin(x: np.ndarray, y: np.ndarray, octaves: int = 3) -> np.ndarray:
    """Improved Perlin noise in about -1..1, summed over octaves of half the size and strength, at points x, y >= 0 of any shape.

    In float32, as published; it repeats after 1024 cells.
    """
    table, gradients = np.array(_PERMUTATION * 2), np.array(_GRADIENTS, np.float32)
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    total, largest, amplitude, frequency = np.zeros(x.shape, np.float32), np.float32(0), np.float32(1), 1

    def fade(t):
        return t * t * t * (t * (t * 6 - 15) + 10)

    def corner(hashed, dx, dy):
        gx, gy = np.moveaxis(gradients[table[hashed] & 15], -1, 0)
        return gx * dx + gy * dy

    for _ in range(octaves):
        u, v, period = x * frequency, y * frequency, 1024 * frequency
        i, j = (np.floor(np.fmod(c, period)).astype(np.int64) for c in (u, v))
        i1, j1 = (i + 1) % period & 255, (j + 1) % period & 255
        i, j = i & 255, j & 255
        u, v = u - np.floor(u), v - np.floor(v)
        fu, fv = fade(u), fade(v)
        a, b = table[i], table[i1]
        near = corner(table[a + j], u, v) * (1 - fu) + corner(table[b + j], u - 1, v) * fu
        far = corner(table[a + j1], u, v - 1) * (1 - fu) + corner(table[b + j1], u - 1, v - 1) * fu
        total += (near * (1 - fv) + far * fv) * amplitude
        largest += amplitude
        amplitude, frequency = amplitude / 2, frequency * 2
    return total / largest


def noise_field(change: torch.Tensor, offset: tuple[int, int], recipe: Recipe = PUBLISHED) -> torch.Tensor:
    """[H, W] 0..1: noise where the warp uncovered something, one constant elsewhere.

    change  [H, W] warped mask less mask, -1, 0 or 1
    offset  of the rows and of the columns, integers in 0..9999, shared by all scales
    """
    rows, columns = (axis.numpy() for axis in torch.nonzero(change > 0, as_tuple=True))
    values = np.zeros(len(rows), np.float32)
    for scale, amplitude in zip(recipe.scales, recipe.amplitudes, strict=True):
        values += np.float32(amplitude) * perlin((rows + offset[0]) / scale, (columns + offset[1]) / scale, recipe.octaves)
    field = torch.zeros_like(change)
    field[change > 0] = torch.from_numpy(values)
    field = field * change
    low, high = field.aminmax()  # over the zeros around too, so that the whole picture is shifted a little, as published
    return (field - low) / (high - low) if high > low else torch.zeros_like(field)


def morphology(disparity: torch.Tensor, size: int, u: float, probability: float) -> torch.Tensor:
    """[H, W] with near things larger (u up to probability / 2), smaller (up to probability) or as they are, by a square of `size` px."""

    def largest(x):
        return F.max_pool2d(x[None, None], size, 1, size // 2)[0, 0]

    if u <= probability / 2:
        return largest(disparity)
    return -largest(-disparity) if u < probability else disparity


def perturb(
    disparity: torch.Tensor, mask: torch.Tensor, focus: float, draws: Draws, probability: float = 0.5, recipe: Recipe = PUBLISHED
) -> torch.Tensor:
    """[H, W] one frame's disparity with the errors of an estimate; it may leave 0..1 by 0.1 focus, as published.

    disparity    [H, W] 0..1, larger = nearer
    mask         [H, W] 0 or 1, where the object in focus is
    focus        its disparity
    probability  of the last step (half growing, half shrinking); whether a frame is perturbed at all is the caller's draw
    """
    moved = displacement(draws.field(*disparity.shape), draws.field(*disparity.shape), recipe)
    mixed, warped = elastic(disparity, mask, moved)
    offset = (draws.integer(0, 10000), draws.integer(0, 10000))
    mixed = mixed + (noise_field(warped - mask, offset, recipe) - 0.5) * (recipe.strength * focus)
    return morphology(mixed, draws.choice(recipe.sizes), draws.uniform(), probability)


def page(disparity: torch.Tensor, mask: torch.Tensor, focus: float, count: int = 4, seed: int = 0) -> torch.Tensor:
    """[3, rows, columns] 0..1, a page to look at: the map and `count` perturbed ones above what was changed in them (grey: nothing)."""
    changed = [perturb(disparity, mask, focus, Draws(seed, i), 1.0) for i in range(count)]
    top = torch.stack([disparity, *changed]).clamp(0, 1)
    bottom = torch.stack([mask, *((one - disparity) * 2 + 0.5 for one in changed)]).clamp(0, 1)
    return repeat(rearrange([top, bottom], "rows n h w -> (rows h) (n w)"), "h w -> 3 h w").contiguous()
