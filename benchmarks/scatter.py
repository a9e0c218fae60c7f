"""Speed, memory and accuracy of the FAST scatter, as ratios measured in one run.

    python benchmarks/scatter.py [--size 1024] [--threads 1 2] [--json FILE]

Five planes (premultiplied RGB, alpha, ones) with radii uniform on 0..r_max and two depth steps, against

- gather: the plain O(r^2) torch form. Every offset of the largest disk is visited for every pixel, with the exact weights from a table.
  All offsets cost the same, so every 8th row of them is timed and the time multiplied
- simple gather: the same with clamp(r + 1/2 - distance) / (pi r^2) for a weight: cheaper, not of equal accuracy
- scanline: intervals of disk rows written into difference arrays and summed along the row, float64, fractional ends, under the same
  pyramid as FAST (RENDERERS.md, section 2)

PSNR: against the definition in float64 at 192 px and the same r_max, weights normalised, peak 1. Memory: growth of the resident peak of
a fresh process, less the result, in planes of one float32 per pixel. Wall time, best of three for FAST. Prints Markdown, then JSON.
"""

import argparse
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from bokeh_core.optics.lens import Aperture
from bokeh_core.render import aperture as apertures

fast = importlib.import_module("bokeh_core.render.scatter")
RADII = (8, 16, 64)
METHODS = ("FAST", "gather", "simple gather", "scanline")
ROWS = 8  # of the offsets of the gather, one in ROWS is timed


def case(size, r_max, r_min=0.0):
    """values [5, size, size] and radius [size, size]: smooth radii, evenly distributed, with two depth steps."""
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
    return values, (r_min + (r_max - r_min) * rank).contiguous()


def gather(values, radius, rows=1, table=None):
    """Plain O(r^2): out(p) = sum over offsets of values(p - d) w(r(p - d), d); w from the table, or a simple anti-aliased disk."""
    reach = math.ceil(float(radius.max())) + 1
    h, w = radius.shape
    pad = (reach,) * 4
    if table is None:
        source, far = F.pad(values / (math.pi * radius.square()).clamp_min(1), pad), F.pad(radius + 0.5, pad)
    else:
        source, index = F.pad(values, pad), F.pad((radius * table.steps).round().int(), pad)
    out = torch.zeros_like(values)
    for dy in range(-reach, reach + 1, rows):
        for dx in range(-reach, reach + 1):
            here = (slice(reach - dy, reach - dy + h), slice(reach - dx, reach - dx + w))
            if table is None:
                weight = (far[here] - math.hypot(dx, dy)).clamp_(0, 1)
            else:
                weight = table.row(dx, dy).index_select(0, index[here].flatten()).view(h, w)
            out += source[:, here[0], here[1]] * weight
    return out


def scanline_level(values, radius, slope, near, shape, shift, reached, block, moments, check):
    """Scanline prefix-sum scatter of the pixels `near`: four updates a row and channel, one cumulative sum."""
    c, h, w = values.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    chosen = torch.ones_like(radius, dtype=torch.bool) if near is None else near
    r, y, x = radius[chosen].double().clamp_min(0.5642), y[chosen], x[chosen].double()  # no disk is smaller than a pixel
    light = values[:, chosen].double() / (math.pi * r * r)
    ends = torch.zeros(c, h, w + 2, dtype=torch.float64)

    def area(t):  # of the half disk up to height t
        t = t.clamp(-1, 1)
        return (t * (1 - t * t).sqrt() + t.asin()) / 2

    for v in range(-math.ceil(float(r.max())), math.ceil(float(r.max())) + 1):
        half = r * r * (area((v + 0.5) / r) - area((v - 0.5) / r))  # mean half width of this row of pixels
        use = (half > 1e-9) & (y + v >= 0) & (y + v < h)
        row, amount = (y[use] + v) * (w + 2), light[:, use]
        for end, sign in ((x[use] + 0.5 - half[use], 1), (x[use] + 0.5 + half[use], -1)):
            end = end.clamp(0, w)
            cell = end.floor()
            part = end - cell
            cell = row + cell.long()
            for channel in range(c):
                flat = ends[channel].view(-1)
                flat.index_add_(0, cell, amount[channel] * (1 - part), alpha=sign)
                flat.index_add_(0, cell + 1, amount[channel] * part, alpha=sign)
    return ends.cumsum(2)[..., :w].to(values)


def scanline(values, radius):
    level = fast._scatter_level
    fast._scatter_level = scanline_level
    try:
        return fast.scatter(values, radius)
    finally:
        fast._scatter_level = level


def disk_table(r_max):
    return apertures._disk.__wrapped__(r0=r_max, steps=64 if r_max <= 16 else 16)


def truth(values, radius):
    """The definition in float64 with a disk table as large as it takes."""
    table = disk_table(math.ceil(float(radius.max())))
    known, fast.kernel = fast.kernel, lambda aperture: table
    try:
        return fast.scatter_dense(values, radius)
    finally:
        fast.kernel = known


def psnr(out, exact):
    error = (out[:4] / out[4:].clamp_min(1e-6)).double() - exact[:4] / exact[4:]
    return float(-10 * torch.log10(error.square().mean()))


def seconds(function, repeat=3):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def slope(radius):
    return torch.stack(torch.gradient(radius, dim=(1, 0))).clamp(-0.5, 0.5)


def measure(size):
    """All figures of this process's thread count."""
    start = time.perf_counter()
    apertures.kernel(None)
    result = {"table_s": time.perf_counter() - start}
    looks = {
        "FAST": {},
        "FAST, slopes": {"slope": True},
        "FAST, 6 blades": {"aperture": Aperture(blades=6)},
        "FAST, cat's eye": {"aperture": Aperture(cats_eye=0.6)},
        "FAST, onion rings": {"aperture": Aperture(onion=1.0)},
    }
    for r_max in RADII:
        values, radius = case(size, r_max)
        for name, options in looks.items():
            options = {**options, "slope": slope(radius)} if "slope" in options else options
            repeat = 3 if name == "FAST" else 1
            result[f"{name} {r_max}"] = seconds(lambda: fast.scatter(values, radius, **options), repeat)  # noqa: B023
        result[f"gather {r_max}"] = _gather_seconds(values, radius, disk_table(r_max))
        result[f"simple gather {r_max}"] = _gather_seconds(values, radius, None)
        result[f"scanline {r_max}"] = seconds(lambda: scanline(values, radius), 1)  # noqa: B023
    return result


def _gather_seconds(values, radius, table):
    rows = 2 * (math.ceil(float(radius.max())) + 1) + 1
    return seconds(lambda: gather(values, radius, ROWS, table), 1) * rows / len(range(0, rows, ROWS))


def accuracy(size=192):
    result = {}
    for r_max in RADII:
        values, radius = case(size, r_max)
        radius = (radius * 16).round() / 16
        exact = truth(values, radius)
        table = disk_table(r_max)
        functions = (fast.scatter, lambda v, r: gather(v, r, table=table), gather, scanline)  # noqa: B023
        for name, function in zip(METHODS, functions, strict=True):
            result[f"{name} {r_max}"] = psnr(function(values, radius), exact)
    return result


def memory(size, r_max):
    """Peak growth in planes beyond input and output."""
    fast.scatter(*case(64, 40))  # tables and code are loaded
    values, radius = case(size, r_max)
    before = _peak_reset()
    out = fast.scatter(values, radius)
    return (_peak() - before - out.numel() * 4) / (size * size * 4)


def _peak_reset():
    try:  # Linux: start the peak anew from what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _peak()


def _peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(what, *arguments, threads=1):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if what == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc would keep freed blocks, and hide the peak
    command = [sys.executable, __file__, "--child", what, *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+")
    options = parser.parse_args()
    if options.child:
        what, *rest = options.child
        print(json.dumps({"measure": measure, "accuracy": accuracy, "memory": memory}[what](*map(int, rest))))
        return
    size = options.size
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    result = {"size": size, "torch": torch.__version__, "load_before": load, "psnr_db": child("accuracy")}
    result["memory_planes"] = {str(r): child("memory", size, r) for r in RADII}
    result["seconds"] = {str(n): child("measure", size, threads=n) for n in options.threads}
    result["load_after"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")

    print(f"{size}², 5 planes, torch {torch.__version__}, load {result['load_before']:.1f} before, {result['load_after']:.1f} after\n")
    print("| threads | method | " + " | ".join(f"r_max {r}: s" for r in RADII) + " | 64 / 16 |")
    print("|---|---|" + "---|" * (len(RADII) + 1))
    for threads, times in result["seconds"].items():
        for name in dict.fromkeys(key.rsplit(" ", 1)[0] for key in times if key != "table_s"):
            row = [times[f"{name} {r}"] for r in RADII]
            print(f"| {threads} | {name} | " + " | ".join(f"{t:.2f}" for t in row) + f" | {row[2] / row[1]:.2f} |")
        for name in METHODS[1:]:
            row = [times[f"{name} {r}"] / times[f"FAST {r}"] for r in RADII]
            print(f"| {threads} | {name} / FAST | " + " | ".join(f"**{t:.1f}x**" for t in row) + " | |")
    print("\n| | " + " | ".join(f"r_max {r}" for r in RADII) + " |\n|---|" + "---|" * len(RADII))
    for name in METHODS:
        print(f"| PSNR of {name}, dB | " + " | ".join(f"{result['psnr_db'][f'{name} {r}']:.1f}" for r in RADII) + " |")
    print("| memory of FAST, planes | " + " | ".join(f"{result['memory_planes'][str(r)]:.1f}" for r in RADII) + " |")
    print("\n" + json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
