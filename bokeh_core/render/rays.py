"""REFERENCE back end: rays through the aperture, across the layers of a scene (RENDERERS.md, section 1, "reverse ray tracing").

The ray of pixel p through aperture point a (inside the unit disk) meets layer l where x = p + a k (d_l(x) - focus). The layers it
meets are composed front to back. The mean over the aperture is the picture. Slow and exact: the teacher and the judge of FAST.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..optics.lens import Aperture
from .aperture import barrel_shift, colour_groups, profile, squeeze, transmission
from .scene import Layer, Scene, View, whole

CHUNK = 16  # rays summed in the scene's precision before they join the float64 total
TILE_PIXELS = 1 << 18  # pixels worked on at once: the working set stays near the processor
ITERATIONS = 3  # of x = p + a k (d(x) - focus) where the disparity is not a plane

Progress = Callable[[int, int], None]


def vogel_disk(count: int) -> torch.Tensor:
    """[count, 2] points x, y spread evenly over the unit disk: radius sqrt((i + 1/2) / n), golden angle (Vogel 1979). float64."""
    i = torch.arange(count, dtype=torch.float64)
    angle, radius = i * (math.pi * (3 - math.sqrt(5))), ((i + 0.5) / count).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def aperture_rays(aperture: Aperture, rays: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """About `rays` aperture points. Returns points [n, 2], weights [n] for light from in front of focus, weights [n] from behind.

    Points come from a Vogel disk large enough that about `rays` of them pass.
    """
    probe = transmission(aperture, vogel_disk(4096))
    open_share = float((probe > 0).double().mean())
    if open_share == 0:
        raise BokehError("The aperture picture lets no light through inside its inscribed circle; paint the shape nearer to the middle.")
    points = vogel_disk(max(round(rays / open_share), 1))
    light = transmission(aperture, points)
    points, light = points[light > 0], light[light > 0]
    radius = points.norm(dim=1)
    front, back = light * profile(aperture, radius, 1), light * profile(aperture, radius, -1)
    return points * torch.tensor(squeeze(aperture), dtype=points.dtype), front, back


class _Surface:
    """One layer, ready to be met by rays: premultiplied colour and alpha, and how its defocus varies."""

    def __init__(self, layer: Layer, k: float, focus: float, device: torch.device, last: bool):
        color = layer.color.to(device)
        self.last = last  # the farthest layer covers everything
        alpha = torch.ones_like(color[0]) if last else layer.alpha.to(color)
        self.rgba = torch.cat([color * alpha, alpha[None]])
        self.k, self.focus, self.plane = k, focus, layer.plane
        disparity = layer.disparity.to(color)
        low, high = disparity.aminmax()
        if layer.plane is None and low == high:
            self.plane = (float(low), 0.0, 0.0)
        if self.plane is None:
            self.offset = (disparity - focus)[None, None]
        elif abs(k) * math.hypot(*self.plane[1:]) >= 0.95:
            raise BokehError(
                f"A plane of the scene is too steep for this blur: its radius changes by {abs(k) * math.hypot(*self.plane[1:]):.2f} px "
                "per px, the limit is 0.95. Lower the blur strength or flatten the plane."
            )
        self.constant = k == 0 or (self.plane is not None and self.plane[1:] == (0.0, 0.0))
        if self.constant:
            height, width = alpha.shape
            # Beyond a shift of the whole picture only the border is seen, so the margin never has to be larger than that.
            self.shift = max(-max(height, width), min(max(height, width), k * (self.plane[0] - focus))) if k else 0.0
            self.margin = math.ceil(abs(self.shift)) + 1
            self.padded = F.pad(self.rgba[None], (self.margin,) * 4, mode="replicate" if self.margin else "constant")[0]
            self.box = _box(alpha)

    def shifted(self, ax: float, ay: float, rows: slice, width: int):
        """Where (row slice, column slice; within the tile) and what [4, h, w] the rays through (ax, ay) meet. Constant disparity only."""
        dx, dy = ax * self.shift, ay * self.shift
        x0, x1, y0, y1 = self.box
        left, right = max(0, math.floor(max(x0 - dx, -1e9))), min(width, math.ceil(min(x1 - dx, 1e9)) + 1)
        top, bottom = max(rows.start, math.floor(max(y0 - dy, -1e9))), min(rows.stop, math.ceil(min(y1 - dy, 1e9)) + 1)
        if left >= right or top >= bottom:
            return None
        ix, iy = math.floor(dx), math.floor(dy)
        fx, fy = dx - ix, dy - iy
        y, x = top + iy + self.margin, left + ix + self.margin
        block = self.padded[:, y : y + bottom - top + 1, x : x + right - left + 1]
        block = torch.lerp(block[:, :-1], block[:, 1:], fy) if fy else block[:, :-1]
        block = torch.lerp(block[..., :-1], block[..., 1:], fx) if fx else block[..., :-1]
        return (slice(top - rows.start, bottom - rows.start), slice(left, right)), block

    def sample(self, ax: float, ay: float, x: torch.Tensor, y: torch.Tensor, axial: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What [4, h, w] the rays through (ax, ay) meet, and whether that lies in front of focus [h, w]. x [h, w], y [h, w]: pixels."""
        near, far = self.k * (1 + axial), self.k * (1 - axial)
        if self.plane is not None:
            d0, gx, gy = self.plane
            offset = d0 - self.focus + gx * x + gy * y  # d - focus = (d(p) - focus) / (1 - k g.a), closed form
            slope = gx * ax + gy * ay
            front = offset > 0
            s = (
                offset * torch.where(front, near / (1 - near * slope), far / (1 - far * slope))
                if axial
                else offset * (near / (1 - near * slope))
            )
        else:
            s = torch.zeros_like(x)
            for _ in range(ITERATIONS + 1):
                offset = _bilinear(self.offset, x + ax * s, y + ay * s)[0]
                s = offset * torch.where(offset > 0, near, far)
            front = offset > 0
        return _bilinear(self.rgba[None], x + ax * s, y + ay * s), front


def _box(alpha: torch.Tensor) -> tuple[float, float, float, float]:
    """First and last x and y that can see the layer; endless where it touches the border, since the border repeats."""
    columns, rows = (alpha > 0).any(0).nonzero().flatten().tolist(), (alpha > 0).any(1).nonzero().flatten().tolist()
    if not columns:
        return math.inf, -math.inf, math.inf, -math.inf
    height, width = alpha.shape

    def span(found, size):
        return (-math.inf if found[0] == 0 else found[0] - 1), (math.inf if found[-1] == size - 1 else found[-1] + 1)

    return *span(columns, width), *span(rows, height)


def _bilinear(image: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[C, h, w] values of image [1, C, H, W] at pixel coordinates x, y [h, w]; the border repeats outside."""
    height, width = image.shape[-2:]
    grid = torch.stack([x * (2 / max(width - 1, 1)) - 1, y * (2 / max(height - 1, 1)) - 1], -1)[None]
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


def trace(
    scene: Scene,
    k: float,
    focus: float,
    *,
    rays: int = 1024,
    aperture: Aperture | None = None,
    tile: int | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    view: View | None = None,
) -> torch.Tensor:
    """The picture of a scene through a lens, by aperture rays.

    scene     complete layers, linear light; the farthest one counts as opaque. Outside the frame the border repeats
    k         blur radius in px per unit of disparity; focus: the disparity in focus
    rays      aperture rays per pixel; 1024 against 4096 differ by about 60 dB at 30 px radius (RENDERERS.md, section 0)
    aperture  shape and looks of the lens; None = a clean disk
    tile      rows worked on at once; None = about 260 000 pixels
    progress  called as progress(done, total) after every few rays of a tile; may raise to interrupt
    device    where to compute; None = where the scene is
    view      the part of the frame that the scene is, and its rows that are asked for; None = all of it

    Returns [3, H, W] linear light on that device, in the dtype of the scene's colours. Sums are float64.
    Errors: BokehError when a plane is too steep for the blur (k |slope| >= 0.95) or fewer than 1 ray is asked for.
    """
    if rays < 1:
        raise BokehError(f"{rays} rays were asked for; give 1 or more.")
    aperture = aperture or Aperture()
    first = scene.layers[0].color
    device = torch.device(device) if device is not None else first.device
    height, width = first.shape[1:]
    if k == 0 and aperture.chromatic_lateral == 0:
        rays = 1  # every ray meets the same points
    surfaces = [_Surface(layer, k, focus, device, last=i == 0) for i, layer in enumerate(scene.layers)][::-1]
    points, front, back = aperture_rays(aperture, rays)
    points, front, back = points.tolist(), front.tolist(), back.tolist()

    groups = colour_groups(aperture)
    view = view or whole(height, width)
    center = torch.tensor(view.axis[::-1])
    shift = barrel_shift(aperture, view.height, view.width)
    tile = tile or max(TILE_PIXELS // width, 1)
    asked = view.asked[0]
    tops = range(asked.start, asked.stop, tile)
    chunks = range(0, len(points), CHUNK)
    # Devices without float64 keep their totals on the processor.
    home = torch.device("cpu") if device.type == "mps" else device
    out = torch.empty_like(first, device=device)
    done = 0
    for top in tops:
        rows = slice(top, min(top + tile, asked.stop))
        y, x = torch.meshgrid(
            torch.arange(rows.start, rows.stop, device=device, dtype=first.dtype),
            torch.arange(width, device=device, dtype=first.dtype),
            indexing="ij",
        )
        total = torch.zeros(6, *x.shape, device=home, dtype=torch.float64)  # colour, and per colour the weight of the rays
        for start in chunks:
            part = torch.zeros(6, *x.shape, device=device, dtype=first.dtype)
            for i in range(start, min(start + CHUNK, len(points))):
                ax, ay = points[i]
                passes = None
                if shift:  # the rear rim of the barrel: a second circle, shifted against the direction of view
                    passes = (ax + shift * (x - float(center[0]))) ** 2 + (ay + shift * (y - float(center[1]))) ** 2 <= 1
                for channels, axial, magnification in groups:
                    _one_ray(part, surfaces, channels, ax, ay, (front[i], back[i]), passes, rows, x, y, axial, magnification, center)
            total += part.to(home)
            done += 1
            if progress is not None:
                progress(done, len(tops) * len(chunks))
        out[:, rows] = (total[:3] / total[3:].clamp_min(1e-12)).to(out)
    return out


def _one_ray(part, surfaces, channels, ax, ay, weights, passes, rows, x, y, axial, magnification, center) -> None:
    """Adds the light of one aperture point to part [6, h, w], in place."""
    if magnification != 1:
        x, y = (v if c is None else (v - float(c)) / magnification + float(c) for v, c in zip((x, y), center, strict=True))
    left = torch.ones_like(x) if passes is None else passes.to(x.dtype)  # transmittance so far
    color, light = part[channels], part[3:][channels]
    for surface in surfaces:
        everywhere = (slice(None), slice(None))
        if surface.constant and magnification == 1 and axial == 0:
            found = surface.shifted(ax, ay, rows, x.shape[1])
            if found is None:
                continue
            where, rgba = found
            weight = weights[0] if surface.shift > 0 else weights[1]
        else:
            rgba, front = surface.sample(ax, ay, x, y, axial)
            where = everywhere
            weight = weights[0] if weights[0] == weights[1] else torch.where(front, weights[0], weights[1])
        here = left[where]
        seen = here * weight
        color[(slice(None), *where)] += rgba[:3][channels] * seen
        light[(slice(None), *where)] += rgba[3] * seen
        if surface.last:
            break
        here *= 1 - rgba[3]
        if where == everywhere and not bool(left.any()):
            break
