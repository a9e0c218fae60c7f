"""Seeded procedural patterns shared by the demo scene and the synthetic scenes. Plain numpy, float32."""

import numpy as np


class Noise:
    """Smooth value noise that can be read at any coordinates; period 256 lattice cells."""

    def __init__(self, rng: np.random.Generator):
        self.lattice = rng.random((256, 256), dtype=np.float32)

    def __call__(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Noise 0..1 at coordinates u, v (lattice cells), any common shape."""
        floor_u, floor_v = np.floor(u), np.floor(v)
        fu, fv = u - floor_u, v - floor_v
        fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
        i0, j0 = floor_v.astype(np.int32) & 255, floor_u.astype(np.int32) & 255
        row0, row1, j1 = i0 << 8, ((i0 + 1) & 255) << 8, (j0 + 1) & 255
        read = self.lattice.ravel().take
        upper, lower = read(row0 + j0), read(row1 + j0)
        upper = upper + (read(row0 + j1) - upper) * fu
        lower = lower + (read(row1 + j1) - lower) * fu
        return upper + (lower - upper) * fv

    def fractal(self, u: np.ndarray, v: np.ndarray, octaves: int = 4, gain: float = 0.5) -> np.ndarray:
        """Sum of octaves, each twice as fine and `gain` times as strong; 0..1, mean about 0.5."""
        total, weight, amplitude = 0.0, 0.0, 1.0
        for octave in range(octaves):
            total = total + amplitude * self(u * 2**octave + 17.3 * octave, v * 2**octave + 41.7 * octave)
            weight += amplitude
            amplitude *= gain
        return total / weight


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below low, 1 above high, a smooth cubic between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def area_reduce(x: np.ndarray, factor: int) -> np.ndarray:
    """Mean over factor x factor blocks of the last two axes, whose sizes must be multiples of factor."""
    total = sum(x[..., i::factor, j::factor] for i in range(factor) for j in range(factor))  # far quicker than mean over axes
    return total / np.float32(factor * factor)


def stroke(
    mask: np.ndarray, points: np.ndarray, widths: np.ndarray, value: np.ndarray | None = None, paint: np.ndarray | None = None
) -> None:
    """Draws a tapered polyline into mask [H,W] (maximum of coverages), in place.

    points [n, 2] x, y in pixels from the centre of pixel (0, 0); widths [n] in pixels.
    value  [n, c] colour along the line, written to paint [c, H, W] where this line covers more than half a pixel
    """
    h, w = mask.shape
    for i in range(len(points) - 1):
        (x0, y0), (x1, y1) = points[i], points[i + 1]
        reach = max(widths[i], widths[i + 1]) / 2 + 1
        left, right = int(max(np.floor(min(x0, x1) - reach), 0)), int(min(np.ceil(max(x0, x1) + reach) + 1, w))
        top, bottom = int(max(np.floor(min(y0, y1) - reach), 0)), int(min(np.ceil(max(y0, y1) + reach) + 1, h))
        if left >= right or top >= bottom:
            continue
        ys, xs = np.mgrid[top:bottom, left:right].astype(np.float32)
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((xs - x0) * dx + (ys - y0) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
        distance = np.hypot(xs - x0 - t * dx, ys - y0 - t * dy)
        width = widths[i] + (widths[i + 1] - widths[i]) * t
        cover = np.clip(width / 2 - distance + 0.5, 0, 1) * np.minimum(width, 1)
        box = np.s_[top:bottom, left:right]
        if paint is not None:
            inside = cover > 0.3
            colour = value[i][:, None, None] + (value[i + 1] - value[i])[:, None, None] * t
            paint[:, top:bottom, left:right][:, inside] = colour[:, inside]
        mask[box] = np.maximum(mask[box], cover)
