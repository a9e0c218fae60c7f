"""The physical renderer: the scatter against the plain O(r^2) gather, its kernel's accuracy, and whole pictures.

The case: five planes (premultiplied RGB, alpha, ones), radii evenly distributed on 0..r_max, with two depth steps. The gather visits every
offset of the largest disk for every pixel, with exact weights from a table: equal output. All offsets cost the same, so one row in ROWS of
them runs, and its time is multiplied.
"""

import importlib
import math

import torch
import torch.nn.functional as F

from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import aperture as apertures
from bokeh_core.render import render
from bokeh_core.synthesis.demo import demo_scene

from .measure import Curve, Pair

fast = importlib.import_module("bokeh_core.render.scatter")
ROWS = 32


def case(size, r_max, device="cpu"):
    """values [5, size, size] and radius [size, size]."""
    generator = torch.Generator().manual_seed(0)
    values = F.avg_pool2d(torch.rand(5, size + 2, size + 2, generator=generator), 3, 1)
    values[:, ::97, ::89] = 4.0  # lights
    values[4] = 1
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    wave = 0.5 * x + 0.5 * y + 0.12 * torch.sin(9 * x + 4 * y)
    wave = (wave - wave.min()) / (wave.max() - wave.min())
    wave = torch.where((x - 0.35) ** 2 + (y - 0.4) ** 2 < 0.04, 1 - wave, wave)
    wave = torch.where((x > 0.6) & (y > 0.7), (wave + 0.5) % 1, wave)
    rank = wave.flatten().argsort().argsort().view(size, size).float() / (size * size - 1)
    return values.to(device), (r_max * rank).contiguous().to(device)


def gather(values, radius, table, rows=1):
    """out(p) = sum over offsets d of values(p - d) w(r(p - d), d)."""
    reach = math.ceil(float(radius.max())) + 1
    h, w = radius.shape
    source, index = F.pad(values, (reach,) * 4), F.pad((radius * table.steps).round().int(), (reach,) * 4)
    out = torch.zeros_like(values)
    for dy in range(-reach, reach + 1, rows):
        for dx in range(-reach, reach + 1):
            here = (slice(reach - dy, reach - dy + h), slice(reach - dx, reach - dx + w))
            weight = table.row(dx, dy).to(values.device).index_select(0, index[here].flatten()).view(h, w)
            out += source[:, here[0], here[1]] * weight
    return out


def disk_table(r_max):
    return apertures._disk.__wrapped__(r0=r_max, steps=64 if r_max <= 16 else 16)


def accuracy(r_max, size=128):
    """PSNR in dB of the scatter against the definition in float64, weights normalised, peak 1."""
    values, radius = case(size, r_max)
    radius = (radius * 16).round() / 16
    known, table = fast.kernel, disk_table(r_max)
    fast.kernel = lambda aperture: table
    try:
        exact = fast.scatter_dense(values, radius)
    finally:
        fast.kernel = known
    out = fast.scatter(values, radius)
    error = (out[:4] / out[4:].clamp_min(1e-6)).double() - exact[:4] / exact[4:]
    return float(-10 * torch.log10(error.square().mean()))


def photo(width, height, radius, device="cpu"):
    """The demo scene, enlarged from 2 megapixels where it is larger, and its defocus with radii up to `radius`."""
    shrunk = max(1.0, math.sqrt(width * height / 2e6))
    scene = demo_scene(0, round(width / shrunk), round(height / shrunk))
    image, disparity = scene["image"][None], scene["disparity"][None]
    if shrunk > 1:
        image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
        disparity = F.interpolate(disparity[None], (height, width), mode="nearest")[0]
    return image.to(device), Defocus(disparity.to(device), torch.tensor([0.5]), torch.tensor([2.0 * radius]), Lens(), False)


def measure(quick, device):
    size = 256 if quick else 512
    render(*photo(64, 64, 8, device))  # tables
    for r_max in (16, 64):
        values, radius = case(size, r_max, device)
        table = disk_table(r_max)
        offsets = 2 * (math.ceil(float(radius.max())) + 1) + 1
        share = len(range(0, offsets, ROWS)) / offsets
        yield Pair(
            f"scatter, {size} x {size}, radii to {r_max}",
            lambda: fast.scatter(values, radius),  # noqa: B023
            lambda: gather(values, radius, table, ROWS),  # noqa: B023
            "plain O(r²) gather",
            target=20 if r_max == 64 else 0,
            share=share,
            equal=False,
        )
    slope = torch.stack(torch.gradient(radius, dim=(1, 0))).clamp(-0.5, 0.5)
    for name, options in {
        "slopes": {"slope": slope},
        "6 blades": {"aperture": Aperture(blades=6)},
        "cat's eye": {"aperture": Aperture(cats_eye=0.6)},
    }.items():
        fast.scatter(values[:, :64, :64], radius[:64, :64], aperture=options.get("aperture"))
        yield Pair(f"scatter, {name}, radii to 64", lambda: fast.scatter(values, radius, **options), rounds=1)  # noqa: B023
    for width, height, r_max in ((624, 416, 16), (624, 416, 64)) if quick else ((1248, 832, 16), (1248, 832, 64), (1920, 1080, 64)):
        given = photo(width, height, r_max, device)
        yield Pair(f"render, {width} x {height}, radii to {r_max}", lambda: render(*given), rounds=1)  # noqa: B023
    yield Curve("PSNR of the scatter against its definition, dB", [{"radii to": r, "dB": round(accuracy(r), 1)} for r in (8, 16)])
