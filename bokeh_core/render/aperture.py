"""The one definition of the aperture, for rays and for scatter: what light passes, how colours part, and the kernels that follow.

Geometry (RENDERERS.md, section 1): pixel p sees through aperture point a, in the unit disk, the point x = p + a s of a surface with
signed defocus s. So a point light behind focus (s < 0) shows the aperture as it is drawn, and one in front of focus shows it turned by
180 degrees.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..optics.lens import Aperture

AXIAL_SCALE = 0.12  # chromatic_longitudinal 1: red balls in front of focus 12 % larger, blue 12 % smaller; behind focus the reverse
LATERAL_SCALE = 0.005  # chromatic_lateral 1: red magnified by 0.5 %, blue reduced by as much
ONION_RINGS = 6
CELLS, SUBCELLS = 256, 4  # the aperture's square is cut into CELLS^2 cells, each the mean of SUBCELLS^2 points


def transmission(aperture: Aperture, points: torch.Tensor) -> torch.Tensor:
    """[n] light 0.. that passes the aperture at points [n, 2] of its unit disk: blades or picture. x right, y down.

    Blades have their corners on the unit circle, one of them at `rotation` degrees from the right, counter-clockwise. A picture spans
    the square around the disk, and is drawn as it appears in lights behind the focus plane. Squeeze and looks are not in here.
    """
    if aperture.picture is not None:
        picture = aperture.picture.to(points)
        grid = points.view(1, 1, -1, 2)
        return F.grid_sample(picture[None, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False).view(-1)
    radius = points.norm(dim=1)
    if aperture.blades < 3:
        return (radius <= 1).to(points.dtype)
    sector = 2 * math.pi / aperture.blades
    angle = torch.atan2(-points[:, 1], points[:, 0]) - math.radians(aperture.rotation)
    straight = math.cos(sector / 2) / (torch.remainder(angle, sector) - sector / 2).cos()
    return (radius <= straight + (1 - straight) * aperture.roundness).to(points.dtype)


def squeeze(aperture: Aperture) -> tuple[float, float]:
    """Factors (x, y) <= 1 that make the ball anamorphic inside the unit disk."""
    return 1 / max(aperture.anamorphic, 1.0), min(aperture.anamorphic, 1.0)


def profile(aperture: Aperture, radius: torch.Tensor, side: int) -> torch.Tensor:
    """Brightness of the ball at radius 0..1 from its centre, mean 1 over the disk; side +1 in front of focus, -1 behind.

    Spherical aberration tilts it, 1 - side c (2 r^2 - 1): a bright rim behind focus for c > 0. Onion rings have equal areas.
    """
    rings = 1 + 0.6 * aperture.onion * torch.cos(2 * math.pi * ONION_RINGS * radius**2)
    return (1 - side * aperture.spherical * (2 * radius**2 - 1)) * rings


def colour_groups(aperture: Aperture) -> list[tuple[slice, float, float]]:
    """Colours that travel together: (channels, axial, magnification). Radii grow by 1 + axial in front of focus, 1 - axial behind."""
    if not (aperture.chromatic_longitudinal or aperture.chromatic_lateral):
        return [(slice(0, 3), 0.0, 1.0)]
    axial, lateral = AXIAL_SCALE * aperture.chromatic_longitudinal, LATERAL_SCALE * aperture.chromatic_lateral
    return [(slice(i, i + 1), sign * axial, 1 + sign * lateral) for i, sign in enumerate((1, 0, -1))]


def barrel_shift(aperture: Aperture, height: int, width: int) -> float:
    """Cat's eye: at pixel p the rear rim of the barrel passes |a + shift (p - centre)| <= 1 (RENDERERS.md, section 1).

    The shift is per px, and in a corner of the picture comes to `cats_eye`.
    """
    return aperture.cats_eye / max(math.hypot(width - 1, height - 1) / 2, 1.0)


def magnify(image: torch.Tensor, magnification: float, axis: tuple[float, float]) -> torch.Tensor:
    """[C, H, W] image enlarged about the pixel at row and column `axis`, same size, bilinear; the border repeats."""
    if magnification == 1:
        return image
    height, width = image.shape[-2:]
    y, x = (
        ((torch.arange(n, device=image.device, dtype=image.dtype) - middle) / magnification + middle) * (2 / max(n - 1, 1)) - 1
        for n, middle in zip((height, width), axis, strict=True)
    )
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)[None]
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


@dataclass(frozen=True)
class Kernel:
    """Weights w(s, d) with which a pixel of signed defocus s reaches the pixel at offset d, tabulated up to |s| = r0. They sum to 1.

    table      [*, *, n] float32 indexed dx, dy and steps of s. Even kernels hold |dx|, |dy| <= r0 + 1, others dx + r0 + 1, dy + r0 + 1
    even       the same for -dx and for -dy
    sided      front and back of focus differ: n = 2 r0 steps + 1 with s = 0 in the middle; else n = r0 steps + 1, by |s|
    squeeze    half axes (x, y) of the ellipse that holds the kernel, for s = 1
    variance   per axis, of the kernel for s = 1: behind focus, in front of it
    """

    table: torch.Tensor
    r0: int
    steps: int
    even: bool
    sided: bool
    squeeze: tuple[float, float]
    variance: tuple[float, float]

    def row(self, dx: int, dy: int) -> torch.Tensor:
        """[n] weights at offset (dx, dy)."""
        return self.table[abs(dx), abs(dy)] if self.even else self.table[dx + self.r0 + 1, dy + self.r0 + 1]


def kernel(aperture: Aperture | None) -> Kernel:
    """The kernel of an aperture's shape and profile. Cat's eye and colours are not in it: they differ from place to place."""
    if aperture is None:
        return _disk()
    picture = None
    if aperture.picture is not None:
        picture = aperture.picture.detach().to("cpu", torch.float32)
        picture = (tuple(picture.shape), picture.numpy().tobytes())
    shape = None
    if picture is None and aperture.blades >= 3 and aperture.roundness < 1:
        shape = (aperture.blades, aperture.rotation, aperture.roundness)
    looks = (aperture.anamorphic, aperture.spherical, aperture.onion)
    if picture is None and shape is None and looks == (1, 0, 0):
        return _disk()
    return _general(shape, looks, picture)


def _tent_integral(x: torch.Tensor) -> torch.Tensor:
    """Of max(0, 1 - |t|) from -inf to x; changes x."""
    x.clamp_(-1, 1)
    return x.sub_(x * x.abs() / 2).add_(0.5)


@lru_cache(maxsize=1)
def _disk(r0: int = 16, steps: int = 64) -> Kernel:
    """The plain disk, convolved with the bilinear tent of a pixel.

    With y = r sin t the disk is |x| < r cos t, so one integral over x is closed and the other one smooth.
    """
    t = (torch.arange(192, dtype=torch.float64) + 0.5) / 384 * math.pi
    table = torch.zeros(r0 + 2, r0 + 2, r0 * steps + 1, dtype=torch.float64)
    table[0, 0, 0] = 1
    for start in range(1, r0 * steps, steps):
        r = torch.arange(start, start + steps, dtype=torch.float64) / steps
        h, y = r[:, None] * t.cos(), r[:, None] * t.sin()
        offsets = torch.arange(start // steps + 3, dtype=torch.float64)[:, None, None]
        across = _tent_integral(h - offsets) - _tent_integral(-h - offsets)
        along = (1 - (y - offsets).abs_()).clamp_min_(0) * h  # h = r cos t is also the Jacobian dy / dt
        along[0] *= 2  # the lower half of the disk
        part = torch.einsum("arn,brn->abr", across, along)
        table[: len(offsets), : len(offsets), start : start + steps] = (part + part.transpose(0, 1)) / 2
    return Kernel(_normalised(table, even=True), r0, steps, even=True, sided=False, squeeze=(1.0, 1.0), variance=(0.25, 0.25))


def _normalised(table: torch.Tensor, even: bool) -> torch.Tensor:
    count = torch.full((len(table),), 2.0 if even else 1.0, dtype=table.dtype)
    if even:
        count[0] = 1
    return (table / torch.einsum("abr,a,b->r", table, count, count)).float()


@lru_cache(maxsize=8)
def _general(shape: tuple | None, looks: tuple, picture: tuple | None) -> Kernel:
    """The kernel of any aperture, by its cells: each cell's light spread over the cell's rectangle, times the tent, in closed form."""
    anamorphic, spherical, onion = looks
    blades = dict(zip(("blades", "rotation", "roundness"), shape, strict=True)) if shape else {}
    if picture is not None:
        size, data = picture
        blades["picture"] = torch.frombuffer(bytearray(data), dtype=torch.float32).view(size)
    aperture = Aperture(**blades, anamorphic=anamorphic, spherical=spherical, onion=onion)
    even = shape is None and picture is None
    sided = not even or spherical != 0
    # Rings are finer than anything else here, and must not be lost on the coarser grids above r0.
    r0, steps = (32, 32) if onion else (16, 64)

    line = (torch.arange(CELLS * SUBCELLS, dtype=torch.float64) + 0.5) / (CELLS * SUBCELLS) * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius = (x * x + y * y).sqrt_()
    light = transmission(aperture, torch.stack([x.flatten(), y.flatten()], 1)).view_as(x) * (radius <= 1)
    if not bool((light > 0).any()):
        raise BokehError("The aperture picture lets no light through inside its inscribed circle; paint the shape nearer to the middle.")
    sx, sy = squeeze(aperture)
    cells, variance = [], []
    for side in (-1, 1):
        passed = light * profile(aperture, radius, side)
        total = passed.sum()
        moments = [float((passed * v**n).sum() / total) for v in (x, y) for n in (1, 2)]
        variance.append((sx**2 * (moments[1] - moments[0] ** 2) + sy**2 * (moments[3] - moments[2] ** 2)) / 2)
        cells.append((passed / total).view(CELLS, SUBCELLS, CELLS, SUBCELLS).sum((1, 3)))

    first = 0 if even else -r0 - 1
    zero = r0 * steps if sided else 0
    table = torch.zeros(r0 + 2 - first, r0 + 2 - first, zero + r0 * steps + 1, dtype=torch.float32)
    table[-first, -first, zero] = 1
    borders = torch.linspace(-1, 1, CELLS + 1, dtype=torch.float64)
    for start in range(1, r0 * steps, steps):
        reach = start // steps + 2
        r = torch.arange(start, start + steps, dtype=torch.float64)[:, None, None] / steps
        offsets = torch.arange(max(first, -reach), reach + 1, dtype=torch.float64)[:, None]
        scales = (sx, sy) if sx != sy else (sx,)
        tents = [(_tent_integral(r * scale * borders - offsets).diff(dim=2) / (r * scale)).float() for scale in scales]
        here = slice(int(offsets[0]) - first, reach + 1 - first)
        back, front = ((tents[0] @ light.T.float() @ tents[-1].transpose(1, 2)).permute(1, 2, 0) for light in cells)  # [dx, dy, steps]
        if sided:
            table[here, here, zero - start - steps + 1 : zero - start + 1] = back.flip(2)
        # x = p + a s: in front of focus the shape is turned round, which an even one does not show.
        table[here, here, zero + start : zero + start + steps] = front if even else front.flip(0, 1)
    return Kernel(_normalised(table.double(), even), r0, steps, even, sided, (sx, sy), tuple(variance))
