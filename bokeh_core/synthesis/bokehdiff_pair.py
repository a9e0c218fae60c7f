"""BokehDiff's training pairs: one cut-out before one slanted picture, ray traced on the fly (its dataset.OnTheFlyDataset)."""

from dataclasses import dataclass

import numpy as np
import torch

from ..render.rays import trace
from ..render.scene import Layer, Scene
from .planar import resolve, trace_bokehdiff


@dataclass(frozen=True)
class PairRecipe:
    """Published constants."""

    size: int = 768  # px of the picture before the crop
    k0: int = 12  # blur radius in px that everything is scaled from; 2 k0 px of margin on each side
    crop: int = 512
    gamma: float = 2.2
    rays: int | None = None  # None: the published tracer, minutes per picture; else at most so many rays of render.rays, seconds


class PairDraws:
    """The random decisions, in the published order. Tests replay recorded ones."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)

    def uniform(self, low: float, high: float) -> float:
        return float(self.generator.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        return int(self.generator.integers(low, high))

    def choice(self, options: list[float]) -> float:
        return options[self.integer(0, len(options))]


def resize_lanczos4(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Float picture [h, w, C] to [height, width, C] with OpenCV's Lanczos4: 8 taps, no smoothing when shrinking, overshoot kept."""

    def taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
        place = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)  # single precision, as in OpenCV
        first = np.floor(place)
        distance = (place - first)[:, None] - np.arange(-3, 5)[None]
        kernel = np.sinc(distance) * np.sinc(distance / 4)
        kernel /= kernel.sum(1, keepdims=True)
        return np.clip(first[:, None].astype(int) + np.arange(-3, 5), 0, source - 1), kernel.astype(np.float32)

    columns, kernel = taps(image.shape[1], width)
    image = np.einsum("ywkc,wk->ywc", image[:, columns], kernel)
    rows, kernel = taps(image.shape[0], height)
    return np.einsum("hkwc,hk->hwc", image[rows], kernel).astype(np.float32)


def make_pair(
    foreground: np.ndarray, background: np.ndarray, draws: PairDraws, crop_at: tuple[int, int], recipe: PairRecipe | None = None
) -> dict[str, torch.Tensor]:
    """One training pair.

    foreground [h, w, 4] uint8 RGBA, background [h, w, 3] uint8 RGB, crop_at: (y, x) of the crop inside the picture

    Returns target and aif [3, crop, crop] in -1..1, disparity and defocus_strength |d - d_f| [1, crop, crop], k and disp_focus [1]; and of
    the whole canvas: images_linear [1, 2, 3, H, W], alphas [1, 2, 1, H, W], planes [1, 2, 3], radius [1], focus_depth [1], and of
    the published tracer sums [1, 4, H, W], weight [1, 1, H, W]; layer 0 is the foreground.
    """
    from PIL import Image

    recipe = recipe or PairRecipe()
    margin = 2 * recipe.k0
    canvas = recipe.size + 2 * margin
    times = 2 ** (5 * draws.uniform(0, 1) - 2)

    # Both pictures at their size. The last row and column of the cut-out's bounding box are left out, as published.
    rows, columns = (np.flatnonzero((foreground[..., 3] > 0).any(axis)) for axis in (1, 0))
    cut = foreground[rows[0] : rows[-1], columns[0] : columns[-1]].astype(np.float32) / 255
    fit = float(np.sqrt(canvas * canvas / (cut.shape[0] * cut.shape[1])))
    scale = draws.uniform(0.5 * fit, fit)
    width, height = int(cut.shape[1] * scale), int(cut.shape[0] * scale)
    while width >= canvas or height >= canvas:
        width, height = int(0.9 * width), int(0.9 * height)
    cut = resize_lanczos4(cut, width, height)
    behind = np.asarray(Image.fromarray(background).resize((canvas, canvas), Image.LANCZOS), np.float32) / 255

    # The background is a slanted plane from disparity 0.001 to 0.001 + spread.
    a, b = draws.uniform(-1, 1), draws.uniform(-1, 1)
    spread = draws.uniform(0, 0.249)
    y, x = np.mgrid[:canvas, :canvas].astype(np.float64)
    ramp = a * x + b * y
    shrink = spread / (ramp.max() - ramp.min())
    a, b, ramp = a * shrink, b * shrink, ramp * shrink
    origin = 0.001 + ramp.max()
    far = (origin - ramp).astype(np.float32)
    near = draws.uniform(float(far.max()), 1)

    offset = [draws.integer(-(recipe.size // 4), recipe.size // 4 + 1) for _ in range(2)]  # x first
    left, top = (min(max(canvas // 2 - side // 2 + o, 0), canvas - side) for side, o in zip((width, height), offset, strict=True))
    for _ in range(2):
        draws.uniform(-1, 1)  # a slant of the foreground is drawn and never used
    placed = np.zeros((canvas, canvas, 4), np.float32)
    placed[top : top + height, left : left + width] = cut
    color, alpha = placed[..., :3], placed[..., 3:]

    sharp = np.clip(alpha * color + (1 - alpha) * behind, 0, 1)
    disparity = alpha[..., 0] * near + (1 - alpha[..., 0]) * far
    focus = draws.choice([float(np.float32(near)), float(far.mean(dtype=np.float32))])
    radius = recipe.k0 * times / max(focus, 1 - focus)

    def chw(array):
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0), np.float32))

    images = torch.stack([chw(np.clip(color, 0, 1)), chw(behind)])[None] ** recipe.gamma
    alphas = torch.stack([chw(alpha), torch.ones(1, canvas, canvas)])[None]
    planes = torch.tensor([[[0, 0, 1 / near], [a / origin, b / origin, 1 / origin]]], dtype=torch.float32)
    samples = int(21 * times)  # along a side of the aperture
    traced = {}
    if recipe.rays is None:
        sums, weight = trace_bokehdiff(images, alphas, planes, torch.tensor([radius]), torch.tensor([1 / focus]), samples)
        traced = {"sums": sums, "weight": weight}
        target = resolve(sums, weight, recipe.gamma)[0]
    else:
        flat = (np.full_like(far, near), (float(near), 0.0, 0.0)), (far, (float(origin), -float(a), -float(b)))
        layers = [
            Layer(image, alpha[0], torch.from_numpy(disparity), plane)
            for image, alpha, (disparity, plane) in zip(images[0], alphas[0].clamp(0, 1), flat, strict=True)
        ]
        light = trace(Scene(tuple(reversed(layers))), radius, focus, rays=max(1, min(recipe.rays, round(samples**2 * np.pi / 4))))
        target = light.clamp(0, 1) ** (1 / recipe.gamma)

    k = recipe.k0 * times * (2 / 3 + draws.uniform(0, 1) / 3) / 10
    maps = torch.cat([target, chw(sharp), torch.from_numpy(disparity)[None]])[:, margin:-margin, margin:-margin]
    maps = maps[:, crop_at[0] : crop_at[0] + recipe.crop, crop_at[1] : crop_at[1] + recipe.crop]
    for axis in (2, 1):
        if draws.uniform(0, 1) < 0.5:
            maps = maps.flip(axis)
    pictures, disparity = maps[:6], maps[6:]
    if draws.uniform(0, 1) < 0.75:
        exposure = min(max(0.7 + draws.uniform(0, 1), 0.5), 1.1)
        pictures = (pictures * exposure).clamp(0, 1)
    return {
        "target": pictures[:3] * 2 - 1,
        "aif": pictures[3:] * 2 - 1,
        "disparity": disparity,
        "defocus_strength": (disparity - focus).abs(),
        "k": torch.tensor([k]),
        "disp_focus": torch.tensor([focus]),
        "images_linear": images,
        "alphas": alphas,
        "planes": planes,
        "radius": torch.tensor([radius]),
        "focus_depth": torch.tensor([1 / focus]),
        **traced,
    }
