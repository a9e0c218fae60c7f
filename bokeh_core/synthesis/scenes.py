"""Seeded scenes of one to four layers with exact truth: what renderers are judged by (RENDERERS.md, section 4, "layered ray bench")."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ..errors import BokehError
from ..metrics.edges import edge_band, in_focus_region
from ..render.rays import trace
from ..render.scene import Layer, Scene
from .textures import Noise, area_reduce, stroke

KINDS = ("portrait", "three", "ground", "plane")
# Where to focus, per kind: the subject, the background, in front of everything, and so on.
FOCUS = {"portrait": (0.8, 0.2, 0.95), "three": (0.5, 0.9, 0.12), "ground": (0.35, 0.62, 0.2), "plane": (0.45, 0.3, 0.6)}
SUPERSAMPLE = 4  # of coverage
TRAVEL = 24  # px a layer may move during a clip
WORDS = ("bokeh", "lens 50", "f/1.4", "focus", "ABCDEF", "0123", "iris", "depth")


def texture(rng: np.random.Generator, height: int, width: int, *, lights: int = 0, photos: list[Path] | None = None) -> np.ndarray:
    """[3, height, width] linear light: soft colour noise with shapes, text, lines, stripes and small bright lamps up to 8, or a photo."""
    from PIL import Image, ImageDraw, ImageFont

    if photos:
        with Image.open(photos[rng.integers(len(photos))]) as file:
            photo = file.convert("RGB")
        scale = max(height / photo.height, width / photo.width) * rng.uniform(1.0, 1.4)
        photo = photo.resize((max(round(photo.width * scale), width), max(round(photo.height * scale), height)), Image.LANCZOS)
        x, y = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
        display = np.asarray(photo.crop((x, y, x + width, y + height)), np.float32) / 255
    else:
        ys, xs = np.mgrid[:height, :width].astype(np.float32)
        cell = rng.uniform(30, 90)
        noise = np.stack([Noise(rng).fractal(xs / cell, ys / cell, 5, 0.62) for _ in range(3)])
        base = rng.uniform(0.4, 0.7, (3, 1, 1)).astype(np.float32)
        display = np.clip(base + (noise - 0.5) * rng.uniform(0.9, 1.5), 0.02, 0.98)
        canvas = Image.fromarray((display.transpose(1, 2, 0) * 255).astype(np.uint8))
        draw = ImageDraw.Draw(canvas)
        count = height * width / 9000

        def colour():
            return tuple(int(v) for v in rng.integers(10, 245, 3))

        def place():
            return float(rng.uniform(0, width)), float(rng.uniform(0, height))

        for _ in range(round(count * 0.8)):
            x, y = place()
            r = rng.uniform(3, 14)
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x - r, y - r, x + r * rng.uniform(0.6, 1.6), y + r), fill=colour())
        for _ in range(round(count * 0.5)):
            (x, y), (dx, dy) = place(), rng.normal(0, 40, 2)
            draw.line((x, y, x + dx, y + dy), fill=colour(), width=int(rng.integers(1, 4)))
        for _ in range(round(count * 0.5)):
            font = ImageFont.load_default(float(rng.uniform(12, 30)))
            draw.text(place(), WORDS[rng.integers(len(WORDS))], fill=colour(), font=font)
        for _ in range(round(count * 0.15)):
            x, y = place()
            period, n = int(rng.integers(2, 6)), int(rng.integers(4, 9))
            for i in range(n):
                draw.rectangle((x + 2 * period * i, y, x + 2 * period * i + period - 1, y + 30), fill=colour() if i == 0 else (20, 20, 20))
        display = np.asarray(canvas, np.float32).transpose(2, 0, 1) / 255
    if display.shape[-1] == 3:
        display = display.transpose(2, 0, 1)
    linear = display**2.2
    ys, xs = np.mgrid[-4:5, -4:5]
    for _ in range(lights):
        x, y = rng.integers(4, width - 5), rng.integers(4, height - 5)
        cover = np.clip(rng.uniform(0.7, 1.6) - np.hypot(xs, ys) + 0.5, 0, 1)
        tint = np.clip(rng.uniform(0.6, 1.1, (3, 1, 1)), 0, 1) * rng.uniform(2, 8)
        box = np.s_[:, y - 4 : y + 5, x - 4 : x + 5]
        linear[box] = np.maximum(linear[box], cover * tint)
    return np.ascontiguousarray(linear, np.float32)


class _Canvas:
    """Coverage of one layer, drawn SUPERSAMPLE times as large. Coordinates are pixels of the picture."""

    def __init__(self, height: int, width: int):
        self.mask = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.float32)
        ys, xs = np.ogrid[: self.mask.shape[0], : self.mask.shape[1]]
        self.x, self.y = (xs + 0.5) / SUPERSAMPLE - 0.5, (ys + 0.5) / SUPERSAMPLE - 0.5

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> None:
        self.mask[((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 <= 1] = 1

    def box(self, x: float, y: float, half_width: float, half_height: float, angle: float) -> None:
        c, s = np.cos(angle), np.sin(angle)
        u, v = c * (self.x - x) + s * (self.y - y), c * (self.y - y) - s * (self.x - x)
        self.mask[(abs(u) <= half_width) & (abs(v) <= half_height)] = 1

    def hair(self, rng: np.random.Generator, x: float, y: float, rx: float, ry: float, count: int, length: float) -> None:
        """Forked strands growing outwards from the upper rim of an ellipse; 0.6 to 2 px wide, thinner at the tips."""
        for angle in rng.uniform(-np.pi - 0.35, 0.35, count):
            start = np.array([x + rx * np.cos(angle), y + ry * np.sin(angle)])
            self._strand(rng, start, angle + rng.normal(0, 0.25), length * rng.uniform(0.5, 1.2), rng.uniform(1.0, 2.0), 2)

    def _strand(self, rng, start, heading, length, width, forks) -> None:
        steps = 8
        turns = heading + np.cumsum(rng.normal(0, 0.13, steps))
        moves = np.stack([np.cos(turns), np.sin(turns)], 1) * length / steps
        points = np.concatenate([start[None], start + np.cumsum(moves, 0)])
        s = SUPERSAMPLE
        stroke(self.mask, (points + 0.5) * s - 0.5, np.maximum(width * (1 - 0.65 * np.linspace(0, 1, steps + 1)), 0.6) * s)
        if forks:
            for at in rng.integers(2, steps, forks):
                self._strand(rng, points[at], turns[at - 1] + rng.choice((-1, 1)) * rng.uniform(0.2, 0.6), length * 0.5, width * 0.7, 0)

    def alpha(self) -> np.ndarray:
        return area_reduce(self.mask, SUPERSAMPLE)


def _figure(rng, canvas: _Canvas, x: float, y: float, size: float) -> None:
    """Head with hair, shoulders and a raised board; size = head height in px, x and y = centre of the head."""
    rx, ry = size * rng.uniform(0.36, 0.42), size * 0.5
    canvas.ellipse(x, y, rx, ry)
    canvas.ellipse(x + rng.normal(0, 0.05) * size, y + 1.45 * size, size * rng.uniform(0.75, 0.95), size * 1.05)
    canvas.hair(rng, x, y, rx, ry, int(rng.integers(35, 75)), size * rng.uniform(0.45, 0.8))
    side = rng.choice((-1, 1))
    canvas.box(x + side * rng.uniform(1.0, 1.3) * size, y + 0.7 * size, 0.17 * size, 0.5 * size, rng.uniform(-0.6, 0.6))


def _slope(rng, middle: float, spread: float, size: int) -> tuple[float, float, float]:
    """A plane of mean disparity `middle` whose corners differ by up to `spread`."""
    gx, gy = rng.uniform(-1, 1, 2)
    scale = spread * rng.uniform(0.4, 1.0) / max(abs(gx) + abs(gy), 1e-6) / (size - 1)
    gx, gy = float(gx * scale), float(gy * scale)
    return middle - (gx + gy) * (size - 1) / 2, gx, gy


def make_scene(kind: str, seed: int, size: int = 416, *, photos: str | Path | None = None, time: float = 0.0) -> Scene:
    """A scene of size x size px, disparity 0..1, linear light with lamps up to 8.

    kind    portrait: a figure with hair before a slanted wall. three: two figures and a wall. ground: a receding floor with things
            standing on it, four layers. plane: one slanted plane
    seed    decides everything; the same seed gives the same scene on every machine with the same numpy and Pillow
    photos  a folder of pictures to use as surfaces instead of procedural ones
    time    0..1: layers of a clip move by whole pixels, up to TRAVEL, nearer ones further
    """
    if kind not in KINDS:
        raise BokehError(f"Unknown kind of scene '{kind}'. Use one of: {', '.join(KINDS)}.")
    if size < 64:
        raise BokehError(f"Scenes need at least 64 px; {size} were asked for.")
    files = None
    if photos is not None:
        files = sorted(p for p in Path(photos).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not files:
            raise BokehError(f"The folder {photos} holds no PNG, JPEG or WebP picture to use as texture.")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    full = size + 2 * TRAVEL
    lamps = round(full * full / 6000)
    # (plane, coverage or None): back to front; coordinates of coverage include the TRAVEL border.
    planned: list[tuple[tuple[float, float, float], np.ndarray | None]] = []

    def canvas() -> _Canvas:
        return _Canvas(full, full)

    def level(d: float) -> tuple[float, float, float]:
        """Mostly a level plane, now and then a gently slanted one."""
        return _slope(rng, d, 0.06, size) if rng.random() < 0.25 else (d, 0.0, 0.0)

    if kind == "plane":
        planned.append((_slope(rng, 0.45, 0.9, size), None))
    if kind == "portrait":
        planned.append((_slope(rng, 0.2, 0.16, size), None))
        drawing = canvas()
        _figure(rng, drawing, full * rng.uniform(0.4, 0.6), full * rng.uniform(0.36, 0.46), size * rng.uniform(0.26, 0.36))
        planned.append((level(0.8), drawing.alpha()))
    if kind == "three":
        planned.append((_slope(rng, 0.12, 0.13, size), None))
        drawing = canvas()
        x, y = full * rng.uniform(0.55, 0.72), full * rng.uniform(0.4, 0.55)
        drawing.box(x, y, size * rng.uniform(0.14, 0.2), size * rng.uniform(0.18, 0.24), rng.uniform(-0.4, 0.4))
        drawing.ellipse(x + 0.16 * size, y + 0.06 * size, size * 0.09, size * 0.12)
        drawing.hair(rng, x + 0.08 * size, y - 0.16 * size, size * 0.06, size * 0.05, 30, size * 0.12)
        planned.append((level(0.5), drawing.alpha()))
        drawing = canvas()
        _figure(rng, drawing, full * rng.uniform(0.25, 0.42), full * rng.uniform(0.5, 0.6), size * rng.uniform(0.2, 0.28))
        planned.append((level(0.9), drawing.alpha()))
    if kind == "ground":
        slope = 0.7 / (size - 1)
        planned.append(((0.1, 0.0, slope), None))
        for d in sorted((0.35, rng.uniform(0.24, 0.46))):
            foot = (d - 0.1) / slope + TRAVEL
            drawing = canvas()
            x, tall = full * rng.uniform(0.5, 0.85), size * rng.uniform(0.15, 0.35) * (0.5 + d)
            drawing.box(x, foot - tall / 2, size * rng.uniform(0.02, 0.09), tall / 2, rng.uniform(-0.12, 0.12))
            planned.append(((d, 0.0, 0.0), drawing.alpha()))
        d = 0.62
        foot, head = (d - 0.1) / slope + TRAVEL, size * rng.uniform(0.17, 0.21)
        drawing = canvas()
        _figure(rng, drawing, full * rng.uniform(0.25, 0.5), foot - 2.4 * head, head)
        planned.append(((d, 0.0, 0.0), drawing.alpha()))

    layers = []
    heading = rng.uniform(0, 2 * np.pi)
    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    for plane, cover in planned:
        color = texture(rng, full, full, lights=lamps if cover is None else lamps // 4, photos=files)
        reach = TRAVEL * time * (0.25 + 0.75 * max(min(plane[0], 1), 0))
        x, y = TRAVEL + round(reach * np.cos(heading)), TRAVEL + round(0.5 * reach * np.sin(heading))
        window = np.s_[..., y : y + size, x : x + size]
        alpha = np.ones((size, size), np.float32) if cover is None else cover[window]
        disparity = plane[0] + plane[1] * xs + plane[2] * ys
        layers.append(
            Layer(
                torch.from_numpy(np.ascontiguousarray(color[window])), torch.from_numpy(np.ascontiguousarray(alpha)),
                torch.from_numpy(disparity.astype(np.float32)), plane,
            )
        )  # fmt: skip
    return Scene(tuple(layers))


def flatten(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """The sharp picture [3,H,W] in linear light, and the disparity [H,W] of the nearest surface that covers half a pixel or more."""
    color = scene.layers[0].color.clone()
    disparity = scene.layers[0].disparity.clone()
    for layer in scene.layers[1:]:
        color = color * (1 - layer.alpha) + layer.color * layer.alpha
        disparity = torch.where(layer.alpha >= 0.5, layer.disparity, disparity)
    return color, disparity


def _case(scene: Scene, kind: str, seed: int, focus: float, k: float, rays: int, progress: Callable[[int, int], None] | None) -> dict:
    image, disparity = flatten(scene)
    truth = trace(scene, k, focus, rays=rays, progress=progress)
    size = image.shape[-1]
    margin = min(round(1.1 * k), size // 4)
    scored = torch.zeros(size, size, dtype=torch.bool)
    scored[margin : size - margin, margin : size - margin] = True
    behind = flatten(Scene(scene.layers[:-1]))[0] if len(scene.layers) > 1 else image
    pictures = {"image_linear": image, "truth_linear": truth, "background_linear": behind}
    maps = {"disparity": disparity, "matte": scene.layers[-1].alpha if len(scene.layers) > 1 else torch.zeros(0), "scored": scored}
    maps |= {f"edge{r}": edge_band(disparity, k, r) & scored for r in (8, 24)}
    maps["in_focus"] = in_focus_region(image, truth, disparity, k, focus) & scored
    case = {name: x.permute(1, 2, 0).numpy() for name, x in pictures.items()} | {name: x.numpy() for name, x in maps.items()}
    return case | {"kind": kind, "seed": seed, "k_px": k, "focus": focus, "margin": margin, "rays": rays, "layers": scene}


def make_case(
    kind: str,
    seed: int,
    size: int = 416,
    focus: float | None = None,
    k: float = 40.0,
    *,
    rays: int = 1024,
    photos: str | Path | None = None,
    time: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """A scene with everything known about it.

    kind, seed, size, photos, time: see make_scene. focus: disparity, None = the first of FOCUS[kind]. k: blur radius in px per unit of
    disparity. rays: of the truth.

    Returns numpy arrays, linear light [H,W,3] float32: image_linear (sharp), truth_linear, background_linear (all but the nearest
    layer); [H,W]: disparity float32, matte float32 (coverage of the nearest layer, empty for one layer), and boolean scored (the
    margin of 1.1 k px cut off), edge8, edge24 (px around depth edges), in_focus. And kind, seed, k_px, focus, margin, rays, layers (Scene).
    """
    scene = make_scene(kind, seed, size, photos=photos, time=time)
    return _case(scene, kind, seed, FOCUS[kind][0] if focus is None else focus, k, rays, progress)


def make_clip(kind: str, seed: int, frames: int, size: int = 288, focus: float | None = None, k: float = 40.0, **options) -> Iterator[dict]:
    """Yields `frames` cases of one scene whose layers move past each other; options as for make_case."""
    for i in range(frames):
        yield make_case(kind, seed, size, focus, k, time=i / max(frames - 1, 1), **options)
