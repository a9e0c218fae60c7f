"""FAST back end: every source pixel spreads over its own disk of confusion (variable-radius scatter).

The published definition is the scatter sum

    out(p) = sum_q values(q) * w(r_q, p - q) * (1 + (p - q) . slope_q / r_q),     sum_p w(r, p) = 1,

with w the disk of radius r convolved with the bilinear tent of one pixel (RENDERERS.md, sections 1 and 2, pitfall 5): exactly what rays
through an aperture see of a bilinearly sampled picture, and the identity at r = 0. The last factor is the Jacobian of x = p + a s(x), the
point of a sloping surface that aperture point a sees; it matters only where the radius itself changes from pixel to pixel.

`scatter_dense` is that sum, written plainly: the judge. `scatter` is what users run: the same sum turned round (each pixel collects from
the offsets that can reach its tile), with the kernel's symmetry halving the additions and a resolution pyramid above radius R0.
It has no atomics and no running sums, so it is deterministic on every device and keeps full float32 precision next to bright lights.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

R0 = 16  # px; larger disks are scattered on a coarser grid
STEPS = 64  # table entries per pixel of radius
FLAT = 0.02  # slopes below this change no pixel visibly (about 60 dB)


@lru_cache(maxsize=1)
def disk_table() -> torch.Tensor:
    """Weights of the disk (x) tent kernel: [R0 + 2, R0 + 2, R0 * STEPS + 1] float32, indexed |dx|, |dy|, radius * STEPS. Sums to 1 per radius.

    With y = r sin t the disk is |x| < r cos t, so one integral over x is closed and the other one smooth.
    """
    r = torch.arange(1, R0 * STEPS + 1, dtype=torch.float64) / STEPS
    t = (torch.arange(384, dtype=torch.float64) + 0.5) / 384 * math.pi - math.pi / 2
    h = r[:, None] * t.cos()
    y = r[:, None] * t.sin()
    offsets = torch.arange(R0 + 2, dtype=torch.float64)[:, None, None]

    def tent_integral(x: torch.Tensor) -> torch.Tensor:  # of max(0, 1 - |x|) from -inf to x
        x = x.clamp(-1, 1)
        return 0.5 + x - x * x.abs() / 2

    across = tent_integral(h - offsets) - tent_integral(-h - offsets)
    along = (1 - (y - offsets).abs()).clamp_min(0) * h  # h = r cos t is also the Jacobian dy / dt
    table = torch.einsum("arn,brn->abr", across, along)
    ones = torch.full((R0 + 2,), 2.0, dtype=torch.float64)
    ones[0] = 1
    table = (table + table.transpose(0, 1)) / 2
    table /= torch.einsum("abr,a,b->r", table, ones, ones)
    identity = torch.zeros(R0 + 2, R0 + 2, 1, dtype=torch.float64)
    identity[0, 0] = 1
    return torch.cat([identity, table], dim=2).float()


def scatter_dense(values: torch.Tensor, radius: torch.Tensor, slope: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, for radii up to R0; arguments as for `scatter`, result in float64. Slow; judges `scatter`."""
    table = disk_table().double()
    index = (radius.double() * STEPS).round().long()
    reach = math.ceil(float(radius.max())) + 1
    c, h, w = values.shape
    out = torch.zeros(c, h + 2 * reach, w + 2 * reach, dtype=torch.float64)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            weight = table[abs(dx), abs(dy)][index]
            if slope is not None:
                tilt = _tilt(slope.double(), radius.double())
                weight = weight * (1 + dx * tilt[0] + dy * tilt[1])
            out[:, reach + dy : reach + dy + h, reach + dx : reach + dx + w] += values.double() * weight
    return out[:, reach : reach + h, reach : reach + w]


def _tilt(slope: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """slope / radius, with the pixel's own tent (variance 2/3 of a disk of radius 1) taken off where the disk is no larger than a pixel."""
    return slope * radius / (radius.square() + 2 / 3)


def _down(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Halve one axis, keeping the sum: the transpose of `_up`. Odd lengths keep samples 0, 2, 4...; both choices are symmetric under a flip."""
    x = x.movedim(dim, -1)
    n = x.shape[-1]
    if n % 2:
        even, odd = x[..., ::2].clone(), x[..., 1::2] / 2
        even[..., :-1] += odd
        even[..., 1:] += odd
        return even.movedim(-1, dim)
    left, right = x[..., ::2], x[..., 1::2]
    out = 0.75 * (left + right)
    out[..., 1:] += 0.25 * right[..., :-1]
    out[..., :-1] += 0.25 * left[..., 1:]
    out[..., 0] += 0.25 * left[..., 0]
    out[..., -1] += 0.25 * right[..., -1]
    return out.movedim(-1, dim)


def _up(x: torch.Tensor, dim: int, n: int) -> torch.Tensor:
    """Double one axis to length n by linear interpolation (halved, so that densities stay per pixel)."""
    x = x.movedim(dim, -1) / 2
    out = x.new_empty(*x.shape[:-1], n)
    if n % 2:
        out[..., ::2] = x
        out[..., 1::2] = (x[..., :-1] + x[..., 1:]) / 2
    else:
        before = torch.cat([x[..., :1], x[..., :-1]], -1)
        after = torch.cat([x[..., 1:], x[..., -1:]], -1)
        out[..., ::2] = 0.75 * x + 0.25 * before
        out[..., 1::2] = 0.75 * x + 0.25 * after
    return out.movedim(-1, dim)


def scatter(
    values: torch.Tensor, radius: torch.Tensor, slope: torch.Tensor | None = None, check: Callable[[], None] | None = None
) -> torch.Tensor:
    """Spread every pixel of `values` over its disk.

    values  [C, H, W] float32, any range; give a plane of ones to get the weight that arrived at each pixel
    radius  [H, W] float32 >= 0, px; not bounded
    slope   [2, H, W] d radius / dx, d radius / dy, below 1 in size; None = locally constant radius
    check   called between tiles; may raise to interrupt

    Returns [C, H, W] float32. What leaves the frame is lost.
    """
    c, h, w = values.shape
    far = radius > R0
    if not bool(far.any()):
        return _scatter_level(values, radius, slope, check)
    near = ~far
    out = torch.zeros_like(values)
    if bool(near.any()):
        out = _scatter_level(values * near, radius * near, slope, check)
    # Extra variance of the coarser grid (spline down, linear up, wider tent): 2 px^2 an axis, taken off the disk's r^2 / 4.
    shrunk = (radius.square() - 8).clamp_min(0).sqrt()
    extra = [shrunk[None] / 2] if slope is None else [shrunk[None] / 2, slope]
    planes = torch.cat([*extra, torch.ones_like(radius)[None]]) * far
    coarse = _down(_down(torch.cat([values * far, planes]), 1), 2)
    means = coarse[c:-1] / coarse[-1:].clamp_min(1e-12)
    coarse = scatter(coarse[:c], means[0], means[1:] if slope is not None else None, check)
    return out + _up(_up(coarse, 2, w), 1, h)


def _scatter_level(
    values: torch.Tensor, radius: torch.Tensor, slope: torch.Tensor | None, check: Callable[[], None] | None
) -> torch.Tensor:
    """The scatter sum for radii up to R0, tile by tile."""
    c, h, w = values.shape
    table = disk_table().to(values.device)
    pad = R0 + 1
    index = F.pad((radius * STEPS).round().to(torch.int32), (pad,) * 4)
    padded = F.pad(values, (pad,) * 4)
    tilt = None if slope is None else F.pad(_tilt(slope, radius), (pad,) * 4)
    out = torch.empty_like(values)
    rows, cols = (64, 256) if values.device.type == "cpu" else (2048, 2048)
    for y in range(0, h, rows):
        for x in range(0, w, cols):
            if check is not None:
                check()
            th, tw = min(rows, h - y), min(cols, w - x)
            # The tile's reach: the largest disk that can touch it.
            reach = math.ceil(int(index[y : y + th + 2 * pad, x : x + tw + 2 * pad].max()) / STEPS) + 1
            here = (slice(y + pad - reach, y + pad + th + reach), slice(x + pad - reach, x + pad + tw + reach))
            if reach == 1:
                out[:, y : y + th, x : x + tw] = values[:, y : y + th, x : x + tw]
                continue
            tilted = None
            if tilt is not None:
                tilted = tilt[:, here[0], here[1]]
                if float(tilted.abs().max()) * (reach - 1) < FLAT:
                    tilted = None
            out[:, y : y + th, x : x + tw] = _collect(padded[:, here[0], here[1]].contiguous(), index[here].flatten(), tilted, table, reach)
    return out


def _collect(source: torch.Tensor, index: torch.Tensor, tilt: torch.Tensor | None, table: torch.Tensor, reach: int) -> torch.Tensor:
    """Sum over all offsets within `reach`: [C, h + 2 reach, w + 2 reach] -> [C, h, w].

    The kernel is even in dx and in dy, so each product serves its mirror images; the tilt is odd, and changes only their signs.
    """
    c, sh, sw = source.shape
    h, w = sh - 2 * reach, sw - 2 * reach
    tilted = tilt is not None
    source_x, source_y = (source * tilt[0], source * tilt[1]) if tilted else (None, None)
    out = source.new_zeros(c, h, w)
    even, odd = source.new_empty(c, h, sw), source.new_empty(c, h, sw) if tilted else None
    product = torch.empty_like(source)
    other = torch.empty_like(source) if tilted else None
    weight = source.new_empty(sh * sw)
    limit = (reach - 1) ** 2
    for a in range(reach + 1):
        even.zero_()
        if tilted:
            odd.zero_()
        for b in range(reach + 1):
            if max(a - 1, 0) ** 2 + max(b - 1, 0) ** 2 >= limit:
                break
            torch.index_select(table[a, b], 0, index, out=weight)
            plane = weight.view(sh, sw)
            plus, minus = slice(reach - b, reach - b + h), slice(reach + b, reach + b + h)
            torch.mul(source, plane, out=product)
            even += product[:, plus]
            if b:
                even += product[:, minus]
            if tilted and b:
                torch.mul(source_y, plane * b, out=other)
                even += other[:, plus]
                even -= other[:, minus]
            if tilted and a:
                torch.mul(source_x, plane * a, out=other)
                odd += other[:, plus]
                if b:
                    odd += other[:, minus]
        right, left = slice(reach - a, reach - a + w), slice(reach + a, reach + a + w)
        out += even[:, :, right]
        if a:
            out += even[:, :, left]
        if a and tilted:
            out += odd[:, :, right]
            out -= odd[:, :, left]
    return out
