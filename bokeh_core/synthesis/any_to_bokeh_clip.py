"""Any-to-Bokeh's training clips: cut-outs wandering before a still picture, each on its own level plane (its dataset_synthsis)."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import BokehError
from .planar import flatten_planes, trace_any_to_bokeh

DEPTHS = (1.0, 5.0)  # of the objects
BACKGROUND_DEPTHS = (100.0, 200.0)
K_LEVELS = (32, 16, 8, 4)
K_LEVELS_PULL = (28, 24, 20, 16, 12)  # when the focus moves
MODES = ("fixed", "test", "focus")


class ClipDraws:
    """The random decisions, in the published order. Tests replay recorded ones."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)

    def integers(self, low: int, high: int, count: int) -> list[int]:
        return self.generator.integers(low, high, count).tolist()

    def uniform(self, low: float, high: float) -> float:
        return float(self.generator.uniform(low, high))

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.generator.random(shape, dtype=np.float32))

    def permutation(self, count: int) -> list[int]:
        return self.generator.permutation(count).tolist()


def place_objects(
    foregrounds: list[list[np.ndarray]],
    mattes: list[list[np.ndarray]],
    width: int,
    height: int,
    draws: ClipDraws,
    window: range | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut-outs on the frames of a clip. Returns colour [F, n, H, W, 3] and matte [F, n, H, W], uint8.

    foregrounds[object][frame] [h, w, 3] uint8, mattes[object][frame] [h, w] uint8. Each object starts in its own cell of a grid and takes
    random steps of up to 40 px. window: only these consecutive frames are made, as they are in the whole clip.
    Errors: BokehError when a frame has an empty matte (the published script drops such a clip).
    """
    from PIL import Image

    count, frames = len(foregrounds), len(foregrounds[0])
    window = window or range(frames)
    rows, columns = math.ceil(math.sqrt(count)), math.floor(math.sqrt(count))
    if rows * columns < count:
        raise BokehError(f"{count} objects do not fit the published grid of {rows} x {columns} cells; use 1, 2, 4, 5 or 6.")
    cell = ((width - 20) // columns, (height - 20) // rows)
    xs, ys = (draws.integers(-(side // 2), side - side // 2, count) for side in cell)
    colour = np.zeros((len(window), count, height, width, 3), np.uint8)
    matte = np.zeros((len(window), count, height, width), np.uint8)
    for i in range(count):
        center = [int((i % columns + 0.5) * cell[0]) + xs[i], int((i // columns + 0.5) * cell[1]) + ys[i]]
        factor, angle = draws.uniform(0.5, 0.8), draws.uniform(-10, 10)
        scale = None
        for frame in range(frames):
            if frame and frame not in window:
                center = [c + step for c, step in zip(center, draws.integers(-40, 40, 2), strict=True)]
                continue
            inside = mattes[i][frame] > 128
            y, x = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            if len(y) < 2 or len(x) < 2:
                raise BokehError(f"The matte of object {i} in frame {frame} is empty; leave this clip out.")
            box = np.s_[y[0] : y[-1], x[0] : x[-1]]  # the last row and column are left out, as published
            pictures = [Image.fromarray(np.ascontiguousarray(source[i][frame][box])) for source in (foregrounds, mattes)]
            if scale is None:
                scale = min(width / pictures[0].width, height / pictures[0].height) * factor
            size = (int(pictures[0].width * scale), int(pictures[0].height * scale))
            pictures = [np.asarray(picture.resize(size).rotate(angle)) for picture in pictures]
            center = [c + step for c, step in zip(center, draws.integers(-40, 40, 2), strict=True)]
            if frame not in window:
                continue
            left, top = (min(max(int(c - side / 2), 0), whole - side) for c, side, whole in zip(center, size, (width, height), strict=True))
            spot = (frame - window.start, i, slice(top, top + size[1]), slice(left, left + size[0]))
            colour[spot], matte[spot] = pictures
    return colour, matte


@dataclass(frozen=True, eq=False)
class LayeredClip:
    """A clip as level planes, near to far, the background last.

    images     [F, L, 3, H, W] 0..255
    alphas     [F, L, 1, H, W] 0..1
    depth      [F, L] of the planes; disparity is 1 / depth
    all_depth  [frames, L] of the whole clip that these frames are a window of
    """

    images: torch.Tensor
    alphas: torch.Tensor
    depth: torch.Tensor
    all_depth: torch.Tensor

    @property
    def planes(self) -> torch.Tensor:
        """[F, L, 3] as the tracers of `planar` take them."""
        return torch.stack([torch.zeros_like(self.depth), torch.zeros_like(self.depth), self.depth], -1)


def layered_clip(
    foregrounds: list[list[np.ndarray]],
    mattes: list[list[np.ndarray]],
    background: np.ndarray,
    draws: ClipDraws,
    width: int,
    height: int,
    window: range | None = None,
) -> LayeredClip:
    """The moving planes of a clip, before any lens. Arguments as of `place_objects`; background [h, w, 3] uint8."""
    from PIL import Image

    window = window or range(len(foregrounds[0]))
    colour, matte = place_objects(foregrounds, mattes, width, height, draws, window)
    frames, count = len(foregrounds[0]), colour.shape[1]
    near, far = DEPTHS
    wobble = (2 * draws.rand(frames, count) - 1) * ((far - near) / count / 4)
    depth = (torch.linspace(near, far, count) + wobble).clamp(near, far)
    layer_of = draws.permutation(count)  # object i goes to layer layer_of[i]
    low, high = BACKGROUND_DEPTHS
    depth = torch.cat([depth, (low + (high - low) * draws.rand(frames))[:, None]], 1)
    order = np.argsort(layer_of)
    still = np.asarray(Image.fromarray(background).resize((width, height)))
    images = np.concatenate([colour[:, order], np.broadcast_to(still, (len(window), 1, *still.shape))], 1)
    alphas = np.concatenate([matte[:, order], np.full((len(window), 1, height, width), 255, np.uint8)], 1)
    images = torch.from_numpy(images).permute(0, 1, 4, 2, 3).float()
    return LayeredClip(images, torch.from_numpy(alphas)[:, :, None].float() / 255, depth[window.start : window.stop], depth)


def make_clip(
    foregrounds: list[list[np.ndarray]],
    mattes: list[list[np.ndarray]],
    background: np.ndarray,
    draws: ClipDraws,
    *,
    width: int = 1024,
    height: int = 576,
    mode: str = "fixed",
    samples: int = 101,
) -> dict[str, np.ndarray]:
    """One clip as the files the published script writes: name -> array 0..255, RGB float32 or uint8 mask, in writing order.

    foregrounds, mattes: see place_objects; background [h, w, 3] uint8. mode "fixed": every K of K_LEVELS for every focused object (what the
    training list needs), "test": one K per focused object, "focus": the focus moves through the clip. samples: aperture points per side.

    Names: mask/FRAME_LAYER, aif/FRAME, disp/FRAME (255 x disparity), bokeh/k=K/obj_LAYER/FRAME_zf_FOCUS, layer 0 nearest.
    """
    if mode not in MODES:
        raise BokehError(f"Unknown mode '{mode}'. Use one of: {', '.join(MODES)}.")
    clip = layered_clip(foregrounds, mattes, background, draws, width, height)
    images, alphas, depth, planes = clip.images, clip.alphas, clip.depth, clip.planes
    frames, count = depth.shape[0], depth.shape[1] - 1

    files = {}
    sharp, disparity = flatten_planes(images, alphas, planes)
    for frame in range(frames):
        for layer in range(count - 1, -1, -1):
            files[f"mask/{frame}_{layer}.jpg"] = ((alphas[frame, layer, 0] > 0.5) * 255).to(torch.uint8).numpy()
        files[f"aif/{frame}.jpg"] = sharp[frame].permute(1, 2, 0).numpy()
        files[f"disp/{frame}.jpg"] = (255 * disparity[frame, 0]).numpy()

    def trace(folder: str, k: int, focus: torch.Tensor, suffix: str = "") -> None:
        bokeh = trace_any_to_bokeh(images, alphas, planes, torch.full((frames,), float(k)), 1 / focus, samples)
        for frame in range(frames):
            files[f"bokeh/{folder}/{frame}_zf_{float(focus[frame]):.5f}{suffix}.jpg"] = bokeh[frame].permute(1, 2, 0).numpy()

    levels = 1 / depth
    if mode == "focus":
        k = K_LEVELS_PULL[draws.integers(0, len(K_LEVELS_PULL), 1)[0]]
        backwards = float(draws.rand()) <= 0.5
        first, last, name = (count - 1, 0, "far2near") if backwards else (0, count - 1, "near2far")
        t = torch.linspace(0, 1, frames)
        trace(f"k={k}/obj_{name}", k, levels[0, first] * (1 - t) + levels[-1, last] * t)
    elif mode == "test":
        draws.integers(0, 2, 1)  # drawn and never used
        for layer, index in enumerate(draws.integers(0, len(K_LEVELS), count)):
            trace(f"k=rand/obj_{layer}", K_LEVELS[index], levels[:, layer], f"_k_{K_LEVELS[index]}")
    else:
        for k in K_LEVELS:
            for layer in range(count):
                trace(f"k={k}/obj_{layer}", k, levels[:, layer])
    return files
