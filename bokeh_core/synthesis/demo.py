"""A seeded, self-made RGB-D picture to show depth of field with: a chess table on a terrace at dusk.

All surfaces live in one perspective: the table is the plane d = (y - horizon) / (height - horizon), things standing on it have
the disparity of their foot, sizes are proportional to disparity, and the camera can be moved (`demo_clip`).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from ..render.light import to_display
from ..render.scene import Layer, Scene
from .scenes import flatten
from .textures import Noise, area_reduce, smoothstep, stroke

HORIZON = 0.25  # height of the eye line, fraction of the picture height
SQUARE = 0.277  # width of one chess square at disparity 1, fraction of the picture width
FOCAL = 1.1  # focal length, fraction of the picture width
BOARD_CENTRE = (0.15, 7.6)  # right of the camera, away from it; in squares
BOARD_ANGLE = math.radians(27)
SUPERSAMPLE = 2

# Profiles of turned pieces: (height, radius) in squares.
FOOT = [(0, 0.30), (0.02, 0.33), (0.09, 0.33), (0.11, 0.29), (0.16, 0.285), (0.18, 0.25)]


def _ball(centre: float, radius: float, start: float = -1.0) -> list[tuple[float, float]]:
    return [(centre + radius * np.sin(a), radius * np.cos(a)) for a in np.linspace(start, np.pi / 2, 24)]


PROFILES = {
    "pawn": [
        *FOOT, (0.25, 0.17), (0.40, 0.115), (0.53, 0.10), (0.55, 0.19), (0.59, 0.20), (0.61, 0.13), *_ball(0.77, 0.165),
    ],
    "rook": [
        *FOOT, (0.28, 0.20), (0.45, 0.165), (0.72, 0.15), (0.76, 0.22), (0.82, 0.235), (0.84, 0.24), (1.04, 0.25), (1.045, 0.17), (1.0, 0),
    ],
    "bishop": [
        *FOOT, (0.27, 0.18), (0.5, 0.12), (0.80, 0.10), (0.82, 0.20), (0.86, 0.205), (0.88, 0.13), (0.92, 0.12), (1.0, 0.17),
        (1.07, 0.178), (1.17, 0.15), (1.28, 0.09), (1.35, 0.035), (1.36, 0.05), (1.40, 0.06), (1.44, 0.05), (1.46, 0),
    ],
    "queen": [
        *FOOT, (0.26, 0.20), (0.5, 0.135), (0.95, 0.10), (1.02, 0.105), (1.04, 0.21), (1.08, 0.22), (1.10, 0.15), (1.13, 0.145),
        (1.16, 0.19), (1.18, 0.19), (1.2, 0.135), (1.38, 0.195), (1.47, 0.235), (1.50, 0.235), (1.52, 0.15), *_ball(1.60, 0.075, -0.9),
    ],
    "king": [
        *FOOT, (0.26, 0.21), (0.5, 0.145), (1.0, 0.11), (1.08, 0.115), (1.10, 0.22), (1.14, 0.23), (1.16, 0.15), (1.2, 0.145),
        (1.22, 0.195), (1.25, 0.195), (1.27, 0.14), (1.45, 0.205), (1.58, 0.24), (1.61, 0.23), (1.66, 0.12), (1.70, 0.06), (1.71, 0),
    ],
    "pot": [
        (0, 0.36), (0.03, 0.385), (0.3, 0.43), (0.62, 0.50), (0.63, 0.55), (0.80, 0.575), (0.82, 0.56), (0.825, 0.50), (0.74, 0.46),
        (0.7, 0),
    ],
}  # fmt: skip
LIGHT_WOOD, DARK_WOOD, CLAY = (0.70, 0.44, 0.20), (0.075, 0.032, 0.022), (0.42, 0.15, 0.075)
# (piece, colour, x as a fraction of the width, disparity): each moves to the centre of the nearest square
PIECES = [
    ("rook", DARK_WOOD, 0.30, 0.34),
    ("pawn", LIGHT_WOOD, 0.55, 0.37),
    ("king", DARK_WOOD, 0.68, 0.47),
    ("bishop", LIGHT_WOOD, 0.31, 0.47),
    ("queen", LIGHT_WOOD, 0.47, 0.58),
    ("pawn", DARK_WOOD, 0.19, 0.80),
    ("pawn", LIGHT_WOOD, 0.83, 0.70),
]
SUBJECT = 4


class _Camera:
    """Pixel geometry at the supersampled size; `eye` is the camera's place (right, forward) in squares."""

    def __init__(self, width: int, height: int, eye: tuple[float, float]):
        self.width, self.height = width * SUPERSAMPLE, height * SUPERSAMPLE
        self.horizon, self.centre = HORIZON * self.height, self.width / 2
        self.square, self.focal = SQUARE * self.width, FOCAL * self.width
        self.eye = eye

    def disparity(self, away: float) -> float:
        return self.focal / self.square / (away - self.eye[1])

    def column(self, right: float, d: float) -> float:
        return self.centre + self.square * d * (right - self.eye[0])

    def row(self, d: float) -> float:
        return self.horizon + (self.height - self.horizon) * d

    def from_picture(self, x: float, d: float) -> tuple[float, float]:
        """Place on the table (right, away) seen at fraction x of the width at disparity d by the resting camera."""
        return (x * self.width - self.centre) / (self.square * d), self.focal / self.square / d

    def table(self, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """right [h,W], away [h,W] in squares and disparity [h,1] of the table plane, for the rows from `first` (below the horizon) on."""
        ys, xs = np.arange(first, self.height, dtype=np.float32)[:, None], np.arange(self.width, dtype=np.float32)[None]
        d = (ys - self.horizon) / (self.height - self.horizon)
        return (xs - self.centre) / (self.square * d) + self.eye[0], self.focal / self.square / d + self.eye[1] + 0 * xs, d


def _rotate(right, away, angle):
    c, s = math.cos(angle), math.sin(angle)  # Python floats keep float32 arrays float32
    return c * right + s * away, -s * right + c * away


def _rgb(*colour: float) -> np.ndarray:
    return np.array(colour, np.float32)[:, None, None]


def _surroundings(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Light [3,...] arriving from direction x right, y up, z towards the viewer: what polished wood mirrors."""
    up = smoothstep(-0.1, 0.9, y)
    sky = _rgb(0.10, 0.14, 0.30) * up + _rgb(0.55, 0.26, 0.16) * np.exp(-((y / 0.22) ** 2)) * smoothstep(0.5, -0.6, z)
    ground = _rgb(0.10, 0.055, 0.03) * smoothstep(0.05, -0.3, y)
    lamp = _rgb(6.0, 4.3, 2.6) * smoothstep(0.955, 0.985, -0.52 * x + 0.60 * y + 0.61 * z)  # a paper lamp beside the photographer
    window = _rgb(3.2, 1.8, 0.7) * smoothstep(0.25, 0.2, np.abs(y - 0.28)) * smoothstep(0.13, 0.09, np.abs(np.arctan2(x, -z) - 1.15))
    bulbs = 0.0
    for i in range(9):
        azimuth, elevation = -1.5 + 0.36 * i, 0.36 + 0.1 * np.sin(1.7 * i)
        bulb = np.array((np.sin(azimuth) * np.cos(elevation), np.sin(elevation), -np.cos(azimuth) * np.cos(elevation)))
        bulbs = bulbs + smoothstep(0.9955, 0.999, bulb[0] * x + bulb[1] * y + bulb[2] * z)
    return (sky + ground + lamp + window + _rgb(14, 8.5, 3.5) * bulbs).astype(np.float32)


def _shade(normal: tuple[np.ndarray, ...], tilt: float, albedo: np.ndarray, gloss: float) -> np.ndarray:
    """Lit colour [3,h,w] of a polished surface with the given unit normals under the terrace's lamps."""
    x, y, z = normal
    lamp = np.clip(-0.52 * x + 0.60 * y + 0.61 * z, 0, None)
    window = np.clip(0.86 * x + 0.25 * y - 0.40 * z + 0.1, 0, None)
    light = _rgb(0.95, 0.66, 0.40) * lamp + _rgb(0.95, 0.5, 0.2) * window + _rgb(0.10, 0.13, 0.22) * (0.6 + 0.4 * y)
    facing = np.clip(y * math.sin(tilt) + z * math.cos(tilt), 0, 1)
    mirror = (2 * facing * x, 2 * facing * y - math.sin(tilt), 2 * facing * z - math.cos(tilt))
    fresnel = gloss * (0.05 + 0.95 * (1 - facing) ** 5)
    return (albedo * light + fresnel * _surroundings(*mirror)).astype(np.float32)


def _turned(profile: list[tuple[float, float]], scale: float, tilt: float, shift: tuple[float, float], notches: bool = False):
    """Orthographic view of a turned body. Returns coverage [h,w], normals, height on the body, angle, and its foot (column, row).

    scale: pixels per square; tilt: angle the camera looks down; shift: the foot lies so far (right, down) of the middle of its pixel.
    Rays march from the front until they enter x² + z² <= r(h)².
    """
    heights = np.array([p[0] for p in profile])
    # The list may turn back down (a hollow top), so the outline is sampled along its length and the widest radius kept.
    fine = np.linspace(0, len(profile) - 1, 40000)
    h_line, r_line = np.interp(fine, np.arange(len(profile)), heights), np.interp(fine, np.arange(len(profile)), [p[1] for p in profile])
    bins, top = 800, heights.max()
    outline = np.zeros(bins, np.float32)
    np.maximum.at(outline, np.clip((h_line / top * bins).astype(int), 0, bins - 1), r_line)
    rounding = np.hanning(25)[1:-1]
    outline = np.convolve(np.pad(outline, 11, mode="edge"), rounding / rounding.sum(), "valid").astype(np.float32)
    outline[-1] = 0
    slope = np.gradient(outline, top / bins)
    r_max = outline.max()

    half, foot = int(np.ceil(r_max * scale)) + 2, int(np.ceil(r_max * math.tan(tilt) * scale)) + 2
    tall = int(np.ceil((top + r_max * math.tan(tilt)) * scale)) + 2
    xs = ((np.arange(-half, half + 1, dtype=np.float32) - shift[0]) / scale)[None]
    up = ((np.arange(tall, -foot - 1, -1, dtype=np.float32) + shift[1]) / scale)[:, None]

    def inside(z):
        h = up + z * math.tan(tilt)
        r = outline[np.clip((h / top * bins).astype(np.int32), 0, bins - 1)]
        solid = (h >= 0) & (h < top) & (xs * xs + z * z < r * r)
        if notches:  # the battlements of the rook: six gaps in a rim around a hollow
            rim = h > 0.86 * top
            gap = np.cos(6 * np.arctan2(xs, z) + 0.9) > 0.72
            solid &= ~(rim & (gap | (xs * xs + z * z < 0.165**2)))
        return solid

    steps = np.linspace(r_max, -r_max, 72, dtype=np.float32)
    entry = np.full((len(up), xs.shape[1]), np.nan, np.float32)
    for z in steps:
        new = inside(z) & np.isnan(entry)
        entry[new] = z
    cover = ~np.isnan(entry)
    far = np.where(cover, entry, 0)
    near = far + (steps[0] - steps[1])
    for _ in range(6):
        middle = (near + far) / 2
        hit = inside(middle)
        far, near = np.where(hit, middle, far), np.where(hit, near, middle)
    h = up + far * math.tan(tilt)
    index = np.clip((h / top * bins).astype(np.int32), 0, bins - 1)
    r = np.maximum(outline[index], 1e-3)
    normal = (xs / r + 0 * far, -np.clip(slope[index], -6, 6), far / r)
    if notches:
        floor = (h > 0.84 * top) & (xs * xs + far * far < 0.2**2)
        normal = tuple(np.where(floor, v, n) for n, v in zip(normal, (0.0, 0.4, 0.3), strict=True))
    length = np.sqrt(sum(n * n for n in normal)) + 1e-6
    return cover.astype(np.float32), tuple(n / length for n in normal), h, np.arctan2(xs, far), (half, tall)


class _Painter:
    """Collects layers: full-size colour and coverage at the supersampled size, reduced to the picture's pixels."""

    def __init__(self, camera: _Camera):
        self.camera = camera
        self.layers: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]] = []

    def add(self, colour: np.ndarray, alpha: np.ndarray, plane: tuple[float, float, float]) -> None:
        """A layer from colour [3,H,W], alpha [H,W] and its plane (d0, gx, gy), all at supersampled pixels."""
        self.layers.append((*_reduce(colour, alpha), plane))

    def paste(self, colour: np.ndarray, alpha: np.ndarray, corner: tuple[int, int], d: float) -> None:
        """A layer at constant disparity from a small picture [3,h,w] whose top left supersampled pixel is corner (column, row)."""
        s = SUPERSAMPLE
        x, y = corner
        before = (y % s, x % s)
        after = [(-(b + n)) % s for b, n in zip(before, alpha.shape, strict=True)]
        around = [(b, a) for b, a in zip(before, after, strict=True)]
        colour, alpha = _reduce(np.pad(colour, [(0, 0), *around]), np.pad(alpha, around))
        x, y = x // s, y // s
        height, width = self.camera.height // s, self.camera.width // s
        full = np.empty((3, height, width), np.float32)
        full[:] = (colour * alpha).sum((1, 2), keepdims=True) / max(alpha.sum(), 1e-6)
        cover = np.zeros((height, width), np.float32)
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + alpha.shape[0], height), min(x + alpha.shape[1], width)
        if top < bottom and left < right:
            rows, columns = slice(top - y, bottom - y), slice(left - x, right - x)
            part = alpha[rows, columns]
            cover[top:bottom, left:right] = part
            full[:, top:bottom, left:right] = np.where(part > 0, colour[:, rows, columns], full[:, :1, :1])
        self.layers.append((full, cover, (d, 0.0, 0.0)))


def _reduce(colour: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour and coverage averaged over the supersampled pixels; colour is weighted by coverage where there is any."""
    cover = area_reduce(alpha, SUPERSAMPLE)
    plain = area_reduce(colour, SUPERSAMPLE)
    if alpha.min() == 1:
        return plain, cover
    return np.where(cover > 1e-3, area_reduce(colour * alpha, SUPERSAMPLE) / np.maximum(cover, 1e-3), plain), cover


def _dots(colour: np.ndarray, alpha: np.ndarray, spots: list[tuple[float, float, float, np.ndarray]]) -> None:
    """Paints round lights (x, y, radius in px, rgb [3]) into colour [3,H,W] and alpha [H,W], in place."""
    h, w = alpha.shape
    for x, y, radius, rgb in spots:
        left, right = int(max(x - radius - 1, 0)), int(min(x + radius + 2, w))
        top, bottom = int(max(y - radius - 1, 0)), int(min(y + radius + 2, h))
        if left >= right or top >= bottom:
            continue
        ys, xs = np.mgrid[top:bottom, left:right]
        cover = np.clip(radius - np.hypot(xs - x, ys - y) + 0.5, 0, 1).astype(np.float32)
        box = np.s_[top:bottom, left:right]
        colour[:, box[0], box[1]] = np.where(cover > 0, rgb[:, None, None], colour[:, box[0], box[1]])
        alpha[box] = np.maximum(alpha[box], cover)


def _sky_and_town(camera: _Camera, rng: np.random.Generator, noise: Noise) -> np.ndarray:
    """The far background: sky after sunset, hills, and a town by the water with its lights. Returns colour [3,H,W]."""
    h, w, u = camera.height, camera.width, camera.width / 1280
    shift = -camera.square * 0.012 * camera.eye[0]
    ys, xs = np.arange(h, dtype=np.float32)[:, None], (np.arange(w, dtype=np.float32) - shift)[None]
    t = np.clip((camera.horizon - ys) / camera.horizon, -1, 1)  # 1 at the top, 0 at the horizon
    glow = np.exp(-(((xs / w - 0.30) / 0.45) ** 2))
    top, middle, low = _rgb(0.018, 0.035, 0.115), _rgb(0.12, 0.10, 0.22), _rgb(0.85, 0.33, 0.13)
    upper = smoothstep(0.15, 1.0, t)
    sky = middle * (1 - upper) + top * upper
    sky = sky + low * np.exp(-np.maximum(t, 0) / 0.22) * (0.35 + 0.65 * glow)
    clouds = noise.fractal(xs / (190 * u), ys / (26 * u), 4)
    sky = sky + smoothstep(0.48, 0.75, clouds) * smoothstep(0.05, 0.3, t) * smoothstep(0.95, 0.4, t) * _rgb(0.30, 0.10, 0.10)
    ridge = camera.horizon - (16 + 44 * noise.fractal(xs / (260 * u), 0 * xs + 5.5, 5)) * u
    hills = smoothstep(-1, 1, ys - ridge)
    sky = sky * (1 - hills) + hills * (_rgb(0.040, 0.032, 0.062) + _rgb(0.05, 0.02, 0.01) * glow)
    shore = camera.horizon + 6 * u
    water = smoothstep(-1, 1, ys - shore)
    ripple = 0.7 + 0.6 * noise(xs / (40 * u), ys / (2.0 * u))
    sky = sky * (1 - water) + water * ripple * (
        _rgb(0.10, 0.06, 0.09) + _rgb(0.30, 0.12, 0.05) * glow * np.exp(-(ys - shore) / (60 * u)).clip(0, 1)
    )
    spots = []
    tints = np.array(
        [(1.0, 0.62, 0.25), (1.0, 0.75, 0.42), (1.0, 0.50, 0.15), (0.75, 0.85, 1.0), (1.0, 0.30, 0.14), (0.35, 0.85, 0.75)], np.float32
    )
    for _ in range(150):
        x = rng.uniform(-0.1, 1.1) * w + shift
        y = shore - abs(rng.normal(0, 13)) * u - 1.5 * u
        tint = tints[rng.choice(6, p=(0.36, 0.27, 0.15, 0.10, 0.07, 0.05))]
        strength = 14 * np.exp(rng.normal(0, 0.9))
        spots.append((x, y, rng.uniform(0.9, 1.6) * u, tint * strength))
        if rng.random() < 0.5:  # its long reflection on the water
            for step in range(3):
                spots.append(
                    (
                        x + rng.normal(0, 0.6) * u,
                        shore + (4 + 11 * step + rng.uniform(0, 6)) * u,
                        0.9 * u,
                        tint * strength * 0.16 / (1 + step),
                    )
                )
    _dots(sky, np.ones((h, w), np.float32), spots)
    return sky.astype(np.float32)


def _house(camera: _Camera, noise: Noise) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """The brick house on the right, a wall receding from the viewer. Returns colour, alpha and its plane at supersampled pixels."""
    h, w = camera.height, camera.width
    # A vertical wall: disparity is affine in x. The near end is to the right of the frame.
    left_place, right_place = (3.1, 34.0), (6.6, 19.0)  # its two ends on the ground plan: right, away
    d0, d1 = camera.disparity(left_place[1]), camera.disparity(right_place[1])
    x0, x1 = camera.column(left_place[0], d0), camera.column(right_place[0], d1)
    gx = (d1 - d0) / (x1 - x0)
    first = min(max(int(x0) - 4, 0), w - 1)  # nothing to draw left of its corner
    xs, ys = np.arange(first, w, dtype=np.float32)[None], np.arange(h, dtype=np.float32)[:, None]
    d = np.clip(d0 + gx * (xs - x0), 0.02, None)
    along = (camera.focal / camera.square / d - (left_place[1] - camera.eye[1])) / (right_place[1] - left_place[1]) * 15.4  # squares
    up = (camera.horizon - ys) / (camera.square * d) + 1.8
    row = np.floor(up / 0.22)
    across = along / 0.62 + 0.5 * (row % 2)
    joint = np.maximum(
        smoothstep(0.42, 0.47, np.abs(across - np.floor(across) - 0.5)), smoothstep(0.36, 0.43, np.abs(up / 0.22 - row - 0.5))
    )
    shade = 0.7 + 0.6 * noise(np.floor(across) * 3.1 + 0.5, row * 5.3 + 0.5) * noise.fractal(along * 5, up * 5, 3)
    brick = _rgb(0.125, 0.052, 0.042) * shade * (1 - joint) + joint * _rgb(0.085, 0.066, 0.065)
    lit = np.zeros_like(shade)
    colour = brick
    for centre in (3.4, 8.6):
        wx, wy = (along - centre) / 1.15, (up - 2.35) / 1.5
        frame = np.maximum(np.abs(wx), np.abs(wy))
        bars = np.minimum(np.abs(wx), np.abs(np.abs(wy + 0.05) - 0.38) / 0.9)
        pane = smoothstep(1.0, 0.97, frame) * smoothstep(0.035, 0.055, bars)
        wood = smoothstep(1.16, 1.13, frame)
        inside = (
            _rgb(3.6, 2.0, 0.75)
            * (0.30 + 0.70 * np.exp(-(wx**2 * 0.8 + (wy - 0.35) ** 2 * 1.5)))
            * (0.75 + 0.4 * noise(along * 2.3, up * 1.1))
        )
        curtain = smoothstep(0.5, 0.95, np.abs(wx)) * (0.75 + 0.25 * np.sin(along * 38))
        colour = colour * (1 - wood) + wood * _rgb(0.16, 0.13, 0.12)
        colour = colour * (1 - pane) + pane * inside * (1 - 0.55 * curtain)
        lit = lit + np.exp(-(wx**2) * 0.35 - (wy - 0.0) ** 2 * 0.25)
    colour = colour + brick * _rgb(2.2, 1.1, 0.4) * lit * (colour < 0.5)
    alpha = smoothstep(x0 - 1.2, x0 + 1.2, xs + 0 * ys)
    colour = np.pad(colour.astype(np.float32), ((0, 0), (0, 0), (first, 0)), mode="edge")
    return colour, np.pad(alpha.astype(np.float32), ((0, 0), (first, 0))), (d0 - gx * x0, gx, 0.0)


def _garland(camera: _Camera, rng: np.random.Generator, start, end, sag: float, count: int, away: float, power: float):
    """A cord with light bulbs between two points (right, up in squares) at one distance. Returns colour, alpha, disparity."""
    d = camera.disparity(away)
    scale = camera.square * d
    t = np.linspace(0, 1, 80)
    right, up = start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t - sag * 4 * t * (1 - t)
    points = np.stack([camera.column(0, d) + right * scale, camera.horizon - (up - 1.8) * scale], 1)
    colour = np.empty((3, camera.height, camera.width), np.float32)
    colour[:] = _rgb(0.02, 0.016, 0.02)
    alpha = np.zeros((camera.height, camera.width), np.float32)
    stroke(alpha, points, np.full(len(t), max(0.035 * scale, 1.0)))
    spots = []
    for i in range(count):
        s = (i + 0.5 + rng.uniform(-0.1, 0.1)) / count
        x, y = np.interp(s, t, points[:, 0]), np.interp(s, t, points[:, 1])
        stroke(alpha, np.array([(x, y), (x, y + 0.12 * scale)]), np.full(2, 0.07 * scale))
        tint = np.array((1.0, 0.60 + rng.uniform(-0.05, 0.08), 0.24 + rng.uniform(-0.06, 0.1)), np.float32)
        spots.append((x, y + 0.18 * scale, 0.068 * scale, tint * power * rng.uniform(0.8, 1.25)))
    _dots(colour, alpha, spots)
    return colour, alpha, d


def _table(camera: _Camera, noise: Noise, behind: np.ndarray, feet: list[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """The table with the inlaid board. behind [3,H,W] is mirrored in the polish; feet (right, away, radius) cast shadows."""
    edge = camera.horizon + (camera.height - camera.horizon) * camera.disparity(17.5)
    first = int(edge) - 2
    right, away, d = camera.table(first)
    plank = np.floor(right / 0.9 + 100)
    grain = noise.fractal(right * 9 + plank * 7.7, away * 0.8 + plank * 31.1, 4)
    fine = noise(right * 70 + plank * 3.3, away * 2.5)
    seam = smoothstep(0.484, 0.497, np.abs(right / 0.9 + 100 - plank - 0.5))
    rings = 0.5 + 0.5 * np.sin(26 * grain + 5 * plank)
    wood = _rgb(0.17, 0.075, 0.032) * (0.55 + 0.55 * rings * grain + 0.25 * fine) * (0.8 + 0.4 * noise(plank + 0.5, 0 * plank + 9.5))
    wood = wood * (1 - 0.85 * seam)

    bu, bv = _rotate(right - BOARD_CENTRE[0], away - BOARD_CENTRE[1], BOARD_ANGLE)
    inside = np.maximum(np.abs(bu), np.abs(bv))
    column, line = np.floor(bu), np.floor(bv)
    dark = (column + line) % 2
    tone = noise.fractal(bu * 2.2 + 11 * column, bv * 13 + 5 * line, 4) * 0.7 + 0.3 * noise(bu * 6, bv * 60)
    light_square = _rgb(0.60, 0.36, 0.155) * (0.70 + 0.55 * tone)
    dark_square = _rgb(0.115, 0.045, 0.026) * (0.55 + 0.9 * tone)
    squares = light_square * (1 - dark) + dark_square * dark
    gap = np.maximum(smoothstep(0.478, 0.492, np.abs(bu - column - 0.5)), smoothstep(0.478, 0.492, np.abs(bv - line - 0.5)))
    squares = squares * (1 - 0.5 * gap)
    border = _rgb(0.10, 0.036, 0.02) * (0.6 + 0.8 * tone)
    blur = 0.5 / (camera.square * d * np.sin(np.arctan((camera.height - camera.horizon) * d / camera.focal)))  # half a pixel, in squares
    inlay = smoothstep(0.01 + blur, 0.01 - blur, np.abs(inside - 4.28)) * np.minimum(0.015 / blur, 1)  # too thin to be drawn far away
    border = border * (1 - inlay) + inlay * _rgb(0.55, 0.36, 0.12)
    on_squares, on_board = inside < 4, smoothstep(4.62, 4.60, inside)
    board = np.where(on_squares, squares, border)
    colour = wood * (1 - on_board) * (1 - 0.7 * smoothstep(4.95, 4.6, inside)) + board * on_board

    shadow = np.ones_like(bu)
    for foot_right, foot_away, radius in feet:
        x, z = (right - foot_right) / radius, (away - foot_away) / radius
        contact = np.exp(-(((x * x + z * z) / 2.4) ** 2))
        along, beside = _rotate(x, z, 0.35)  # the lamp stands front left, so shadows fall to the right and back
        cast = np.exp(-((beside / (0.85 + 0.10 * np.abs(along))) ** 2)) * smoothstep(-0.6, 0.6, along) * np.exp(-np.maximum(along, 0) / 4)
        shadow = shadow * (1 - 0.85 * contact) * (1 - 0.75 * cast)
    pool = 0.30 + 1.15 * np.exp(-((right + 0.2) ** 2) / 14 - (away - 6.2) ** 2 / 22)  # the lamp's light on the table
    colour = colour * (shadow * pool * _rgb(1.25, 0.92, 0.62) + _rgb(0.16, 0.19, 0.30) * (0.4 + 0.6 * shadow))

    # The polish mirrors what stands above the horizon, softened; a mirror in a level plane flips pictures about the eye line.
    rows = np.clip(2 * camera.horizon - np.arange(first, camera.height), 0, camera.horizon).astype(int)
    mirrored = behind[:, rows]
    mirrored = torch.from_numpy(mirrored * np.minimum(1, 1.2 / (mirrored.max(0) + 1e-6)))[None]  # lamps would show as hard spots
    u = camera.width / 1280
    size = (max(int(len(rows) / (16 * u)), 4), max(int(camera.width / (7 * u)), 4))
    soft = torch.nn.functional.interpolate(mirrored, size=size, mode="area")
    soft = torch.nn.functional.interpolate(soft, size=mirrored.shape[2:], mode="bilinear", align_corners=False)[0].clamp_min(0).numpy()
    cosine = 1 / np.sqrt(1 + (camera.focal / ((camera.height - camera.horizon) * d)) ** 2)
    colour = colour + (0.03 + 0.75 * (1 - cosine) ** 5) * soft * (0.45 + 0.55 * shadow)
    alpha = smoothstep(edge - 1, edge + 1, np.arange(first, camera.height, dtype=np.float32)[:, None] + 0 * right)
    colour = np.pad(colour.astype(np.float32), ((0, 0), (first, 0), (0, 0)), mode="edge")
    return colour, np.pad(alpha.astype(np.float32), ((first, 0), (0, 0)))


def _lavender(rng: np.random.Generator, scale: float, shift: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """A bunch of flowering stems, `scale` px per square. Returns colour, alpha and the (column, row) of its root."""
    width, height = int(3.4 * scale), int(2.6 * scale)
    alpha, colour = np.zeros((height, width), np.float32), np.zeros((3, height, width), np.float32)
    root = (width // 2, height - 2)
    green, grey = np.array((0.10, 0.15, 0.055)), np.array((0.20, 0.24, 0.13))
    for _ in range(70):  # leaves
        lean, length = rng.normal(0, 0.5), rng.uniform(0.5, 1.25)
        t = np.linspace(0, 1, 12)
        x = root[0] + shift[0] + scale * (rng.normal(0, 0.13) + lean * length * t**1.4)
        y = root[1] + shift[1] - scale * length * (t - 0.18 * abs(lean) * t**2)
        tone = rng.uniform(0.5, 1.3)
        stroke(alpha, np.stack([x, y], 1), 0.04 * scale * (1 - t * 0.95), np.outer(1 - t, green) * tone + np.outer(t, grey) * tone, colour)
    for _ in range(34):  # flowering stems
        lean, length = rng.normal(0, 0.36), rng.uniform(1.15, 2.0)
        t = np.linspace(0, 1, 16)
        x = root[0] + shift[0] + scale * (rng.normal(0, 0.10) + lean * length * t**1.5)
        y = root[1] + shift[1] - scale * length * (t - 0.15 * abs(lean) * t**2)
        stroke(alpha, np.stack([x, y], 1), np.full(16, max(0.016 * scale, 1.1)), np.outer(np.full(16, rng.uniform(0.7, 1.2)), grey), colour)
        side = np.clip(0.55 + 0.5 * lean, 0.2, 1.2)
        for s in np.linspace(0.72, 1.0, 9):  # whorls of little flowers
            px, py = np.interp(s, t, x), np.interp(s, t, y)
            for _ in range(4):
                angle, reach = rng.uniform(-1.2, 1.2), rng.uniform(0.03, 0.075) * scale * (1.25 - s * 0.5)
                tip = np.array([(px, py), (px + reach * np.sin(angle), py - reach * np.cos(angle))])
                violet = np.array((0.22, 0.105, 0.42)) * rng.uniform(0.5, 1.5) * side + np.array((0.10, 0.05, 0.03)) * (angle > 0)
                stroke(alpha, tip, np.array([0.035, 0.022]) * scale, np.stack([violet, violet * 1.3]), colour)
    return colour, alpha, root


def _branch(camera: _Camera, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Leaves hanging into the picture from above, close to the camera. Returns colour, alpha at full size."""
    h, w = camera.height, camera.width
    colour = np.empty((3, h, w), np.float32)
    colour[:] = _rgb(0.035, 0.06, 0.02)
    alpha = np.zeros((h, w), np.float32)
    shift = camera.centre - camera.centre + camera.square * 0.97 * -camera.eye[0]
    t = np.linspace(0, 1, 30)
    for bx, by, cx, cy, leaves in ((-0.04, 0.10, 0.27, 0.13, 9), (0.05, -0.06, 0.13, 0.37, 8)):
        x = (bx + (cx - bx) * t + 0.03 * np.sin(3 * t)) * w + shift
        y = (by + (cy - by) * t + 0.08 * t * (1 - t)) * h
        stroke(alpha, np.stack([x, y], 1), 0.008 * w * (1.1 - t), np.outer(np.ones(30), (0.06, 0.035, 0.02)), colour)
        for i in range(leaves):
            s = (i + 0.7) / leaves
            px, py = np.interp(s, t, x), np.interp(s, t, y)
            heading = np.arctan2(cy - by, cx - bx) + (0.8 if i % 2 else -0.8) + rng.normal(0, 0.2)
            length = w * rng.uniform(0.075, 0.105) * (1.15 - 0.4 * s)
            _leaf(colour, alpha, px, py, heading, length, rng)
    return colour, alpha


def _leaf(colour: np.ndarray, alpha: np.ndarray, x: float, y: float, heading: float, length: float, rng: np.random.Generator) -> None:
    """One pointed leaf with a midrib and veins, in place."""
    h, w = alpha.shape
    left, right, top, bottom = int(max(x - length, 0)), int(min(x + length, w)), int(max(y - length, 0)), int(min(y + length, h))
    if left >= right or top >= bottom:
        return
    ys, xs = np.mgrid[top:bottom, left:right].astype(np.float32)
    a, b = _rotate((xs - x) / length, (ys - y) / length, heading)
    b = b - 0.12 * a * a
    half = 0.27 * np.sqrt(np.clip(a, 0, 1)) * (1 - np.clip(a, 0, 1)) ** 0.75 * 1.5
    cover = np.clip((half - np.abs(b)) * length + 0.5, 0, 1) * (a > 0) * (a < 1)
    vein = smoothstep(0.016, 0.006, np.abs(b)) + 0.5 * smoothstep(0.10, 0.03, np.abs(np.modf((a - 0.7 * np.abs(b)) * 9 + 10)[0] - 0.5))
    tone = rng.uniform(0.7, 1.25) * (1 + 0.25 * np.sign(b))
    leaf = (
        _rgb(0.060, 0.115, 0.026) * tone
        + _rgb(0.045, 0.06, 0.015) * vein
        + _rgb(0.30, 0.15, 0.03) * smoothstep(0.035, 0.0, half - np.abs(b))
    )
    box = np.s_[top:bottom, left:right]
    colour[:, box[0], box[1]] = np.where(cover > 0, leaf, colour[:, box[0], box[1]])
    alpha[box] = np.maximum(alpha[box], cover)


def _build(seed: int, width: int, height: int, eye: tuple[float, float]) -> tuple[Scene, dict[str, tuple[float, float]]]:
    camera = _Camera(width, height, eye)
    rng = np.random.default_rng(seed)
    noise = Noise(rng)
    painter = _Painter(camera)

    town = _sky_and_town(camera, rng, noise)
    painter.add(town, np.ones_like(town[0]), (0.012, 0.0, 0.0))
    wall, wall_alpha, wall_plane = _house(camera, noise)
    painter.add(wall, wall_alpha, wall_plane)
    behind = town * (1 - wall_alpha) + wall * wall_alpha
    strings = [((-6.5, 4.2), (6.8, 4.0), 0.5, 15, 17.2, 9.0), ((-5.5, 3.35), (6.2, 3.75), 0.95, 12, 14.0, 8.0)]
    for start, end, sag, count, away, power in strings:
        colour, alpha, d = _garland(camera, rng, np.subtract(start, (eye[0], 0)), np.subtract(end, (eye[0], 0)), sag, count, away, power)
        painter.add(colour, alpha, (d, 0.0, 0.0))
        behind = behind * (1 - alpha) + colour * alpha

    standing = []  # name, colour, right, away
    for name, tint, x, d in PIECES:
        right, away = _Camera(width, height, (0, 0)).from_picture(x, d)
        u, v = _rotate(right - BOARD_CENTRE[0], away - BOARD_CENTRE[1], BOARD_ANGLE)
        right, away = _rotate(math.floor(u) + 0.5, math.floor(v) + 0.5, -BOARD_ANGLE)
        standing.append((name, tint, right + BOARD_CENTRE[0], away + BOARD_CENTRE[1]))
    subject = standing[SUBJECT]
    standing.append(("pot", CLAY, 3.55, 9.6))
    standing.sort(key=lambda piece: -piece[3])

    table, table_alpha = _table(camera, noise, behind, [(p[2], p[3], 0.55 if p[0] == "pot" else 0.34) for p in standing])
    slope = 1 / (camera.height - camera.horizon)
    painted = []
    for name, tint, right, away in standing:
        d = camera.disparity(away)
        scale, tilt = camera.square * d, math.atan((camera.height - camera.horizon) * d / camera.focal)
        column, row = round(camera.column(right, d)), round(camera.row(d))
        shift = (camera.column(right, d) - column, camera.row(d) - row)
        cover, normal, h, angle, foot = _turned(PROFILES[name], scale, tilt, shift, notches=name == "rook")
        grain = (
            noise.fractal(angle * 1.5 + right * 7, h * 9 + away * 5, 3)
            if name == "pot"
            else noise.fractal(np.sin(angle) * 9 + right * 7, h * 1.6 + away * 5, 4)
        )
        albedo = _rgb(*tint) * (0.65 + 0.7 * grain)
        colour = _shade(normal, tilt, albedo, 0.12 if name == "pot" else 1.0)
        colour = colour * (0.35 + 0.65 * smoothstep(-0.02, 0.22, h))  # darker towards the table
        if name == "king":
            colour, cover, foot = _crown(colour, cover, foot, shift, scale)
        corner = (column - foot[0], row - foot[1])
        painted.append((colour, cover, corner, d, name, shift))
        # The polished table mirrors the piece about its foot.
        flipped, flipped_cover = colour[:, ::-1], cover[::-1]
        top, left = 2 * row - (corner[1] + cover.shape[0] - 1), corner[0]
        y0, y1 = max(top, 0), min(top + cover.shape[0], camera.height)
        x0, x1 = max(left, 0), min(left + cover.shape[1], camera.width)
        if y0 < y1 and x0 < x1:
            part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
            fade = 0.16 * flipped_cover[part] * np.exp(-np.arange(y0 - top, y1 - top, dtype=np.float32)[:, None] / (0.9 * scale))
            table[:, y0:y1, x0:x1] = table[:, y0:y1, x0:x1] * (1 - fade) + fade * np.minimum(flipped[:, part[0], part[1]], 2)
    painter.add(table, table_alpha, (-camera.horizon * slope, 0.0, slope))
    for colour, cover, corner, d, name, shift in painted:
        if name == "pot":
            scale = camera.square * d
            flowers, flowers_alpha, root = _lavender(rng, scale, shift)
            base = (corner[0] + cover.shape[1] // 2, corner[1] + round(0.26 * scale))
            painter.paste(flowers, flowers_alpha, (base[0] - root[0], base[1] - root[1]), d)
        painter.paste(colour, cover, corner, d)
    leaves, leaves_alpha = _branch(camera, rng)
    painter.add(leaves, leaves_alpha, (0.97, 0.0, 0.0))

    # Supersampled pixel i covers the picture's pixel (i - (s - 1) / 2) / s.
    layers = []
    offset = (SUPERSAMPLE - 1) / 2
    ys, xs = torch.arange(height, dtype=torch.float32)[:, None], torch.arange(width, dtype=torch.float32)[None]
    for colour, alpha, (d0, gx, gy) in painter.layers:
        plane = (float(d0 + offset * (gx + gy)), float(gx * SUPERSAMPLE), float(gy * SUPERSAMPLE))
        disparity = plane[0] + plane[1] * xs + plane[2] * ys
        layers.append(Layer(torch.from_numpy(colour), torch.from_numpy(alpha), disparity.expand(height, width), plane))

    d = camera.disparity(subject[3])
    near = max(standing, key=lambda piece: piece[3] * -1)
    dn = camera.disparity(near[3])
    points = {
        "near": (camera.column(near[2], dn) / camera.width, (camera.row(dn) - 0.45 * camera.square * dn) / camera.height),
        "middle": (camera.column(subject[2], d) / camera.width, (camera.row(d) - 0.6 * camera.square * d) / camera.height),
        "far": (0.3, 0.12),
    }
    return Scene(tuple(layers)), points


def _crown(colour, cover, foot, shift, scale):
    """Puts the king's cross on top of his head. Returns colour, cover and foot of the taller picture."""
    extra = int(0.26 * scale)
    colour, cover = np.pad(colour, ((0, 0), (extra, 0), (0, 0)), mode="edge"), np.pad(cover, ((extra, 0), (0, 0)))
    foot = (foot[0], foot[1] + extra)
    head = np.argmax(cover.max(1) > 0)
    arm, x, y = 0.05 * scale, foot[0] + shift[0], foot[1] + shift[1] - 1.71 * scale
    tone = colour[:, head + 3 : head + int(0.3 * scale)].reshape(3, -1)[:, cover[head + 3 : head + int(0.3 * scale)].ravel() > 0].mean(1)
    shades = np.stack([tone * 1.3, tone * 0.7])
    stroke(cover, np.array([(x, y - 0.2 * scale), (x, y + 0.06 * scale)], float), np.array([arm * 1.3, arm * 0.9]), shades, colour)
    stroke(
        cover,
        np.array([(x - 0.08 * scale, y - 0.115 * scale), (x + 0.08 * scale, y - 0.115 * scale)], float),
        np.array([arm, arm]),
        shades,
        colour,
    )
    return colour, cover, foot


def _result(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    colour, disparity = flatten(scene)
    return to_display(colour), disparity.clamp(0, 1)


def demo_scene(seed: int = 0, width: int = 1280, height: int = 854) -> dict:
    """The chess table at dusk as one RGB-D picture with its true layers.

    Returns a dict: image [3,H,W] float32 display sRGB (the lamps exceed 1), disparity [H,W] float32 0..1 near large,
    focus_points {"near" | "middle" | "far": (x, y)} as fractions of width and height, layers: the Scene in linear light.
    The seed changes textures, lights and plants, not the arrangement. Meant for pictures of about 3:2.
    """
    scene, points = _build(seed, width, height, (0.0, 0.0))
    image, disparity = _result(scene)
    return {"image": image, "disparity": disparity, "focus_points": points, "layers": scene}


def demo_clip(seed: int = 0, frames: int = 24, width: int = 640, height: int = 427) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields `frames` pairs (image [3,H,W] display sRGB, disparity [H,W] 0..1): the same table while the camera glides to the right."""
    for i in range(frames):
        t = i / max(frames - 1, 1)
        swing = t * t * (3 - 2 * t)
        scene, _ = _build(seed, width, height, (0.7 * (swing - 0.5), 0.25 * swing))
        yield _result(scene)
