"""FAST back end: every source pixel spreads over its own disk of confusion (variable-radius scatter).

The published definition is the scatter sum

    out(p) = sum_q values(q) * w(|r_q|, p - q),     sum_p w(r, p) = 1,

with w the disk of radius r convolved with the bilinear tent of one pixel (RENDERERS.md, sections 1 and 2, pitfall 5): exactly what rays
through an aperture see of a bilinearly sampled picture, and the identity at r = 0.

`scatter_dense` is that sum, written plainly: the judge. `scatter` is what users run: the same sum turned round (each pixel collects from
the offsets that can reach its tile), with the kernel's symmetry halving the additions and a resolution pyramid above radius R0.
It has no atomics and no running sums, so it is deterministic on every device and keeps full float32 precision next to bright lights.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch

R0 = 16  # px; larger disks are scattered on a coarser grid
STEPS = 64  # table entries per pixel of radius


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


def scatter_dense(values: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """The definition, for radii up to R0: [C, H, W] values, [H, W] radius px -> [C, H, W] in float64. Slow; judges `scatter`."""
    table = disk_table().double()
    index = (radius.double() * STEPS).round().long()
    reach = math.ceil(float(radius.max())) + 1
    c, h, w = values.shape
    out = torch.zeros(c, h + 2 * reach, w + 2 * reach, dtype=torch.float64)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            weight = table[abs(dx), abs(dy)][index]
            out[:, reach + dy : reach + dy + h, reach + dx : reach + dx + w] += values.double() * weight
    return out[:, reach : reach + h, reach : reach + w]


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


def scatter(values: torch.Tensor, radius: torch.Tensor, check: Callable[[], None] | None = None) -> torch.Tensor:
    """Spread every pixel of `values` over its disk.

    values  [C, H, W] float32, any range; give a plane of ones to get the weight that arrived at each pixel
    radius  [H, W] float32 >= 0, px; not bounded
    check   called between tiles; may raise to interrupt

    Returns [C, H, W] float32. What leaves the frame is lost.
    """
    c, h, w = values.shape
    far = radius > R0
    if not bool(far.any()):
        return _scatter_level(values, radius, check)
    near = ~far
    out = _scatter_level(values * near, radius * near, check) if bool(near.any()) else torch.zeros_like(values)
    # Extra variance of the coarser grid (spline down, linear up, wider tent): 2 px^2 an axis, taken off the disk's r^2 / 4.
    mass = far.to(values)
    coarse = torch.cat([values * mass, (mass * (radius.square() - 8).clamp_min(0).sqrt())[None], mass[None]])
    coarse = _down(_down(coarse, 1), 2)
    coarse_radius = coarse[-2] / coarse[-1].clamp_min(1e-12) / 2
    coarse_out = scatter(coarse[:-2], coarse_radius, check)
    return out + _up(_up(coarse_out, 2, w), 1, h)


def _scatter_level(values: torch.Tensor, radius: torch.Tensor, check: Callable[[], None] | None) -> torch.Tensor:
    """The scatter sum for radii up to R0, tile by tile."""
    c, h, w = values.shape
    device = values.device
    table = disk_table().to(device)
    pad = R0 + 1
    index = torch.nn.functional.pad((radius * STEPS).round().to(torch.int32), (pad, pad, pad, pad))
    padded = torch.nn.functional.pad(values, (pad, pad, pad, pad))
    out = torch.empty_like(values)
    rows, cols = (64, 256) if device.type == "cpu" else (2048, 2048)
    for y in range(0, h, rows):
        for x in range(0, w, cols):
            if check is not None:
                check()
            th, tw = min(rows, h - y), min(cols, w - x)
            # The tile's reach: the largest disk that can touch it.
            window = index[y : y + th + 2 * pad, x : x + tw + 2 * pad]
            reach = math.ceil(int(window.max()) / STEPS) + 1
            if reach == 1:
                out[:, y : y + th, x : x + tw] = values[:, y : y + th, x : x + tw]
                continue
            cut = pad - reach
            window = window[cut : cut + th + 2 * reach, cut : cut + tw + 2 * reach].contiguous()
            source = padded[:, y + cut : y + cut + th + 2 * reach, x + cut : x + cut + tw + 2 * reach].contiguous()
            out[:, y : y + th, x : x + tw] = _collect(source, window, table, reach)
    return out


def _collect(source: torch.Tensor, index: torch.Tensor, table: torch.Tensor, reach: int) -> torch.Tensor:
    """Sum over all offsets within `reach`: [C, h + 2 reach, w + 2 reach] -> [C, h, w]."""
    c, sh, sw = source.shape
    h, w = sh - 2 * reach, sw - 2 * reach
    out = source.new_zeros(c, h, w)
    column = source.new_empty(c, h, sw)
    weighted = torch.empty_like(source)
    weight = source.new_empty(sh * sw)
    index = index.view(-1)
    limit = (reach - 1) ** 2
    for a in range(reach + 1):
        column.zero_()
        for b in range(reach + 1):
            if max(a - 1, 0) ** 2 + max(b - 1, 0) ** 2 >= limit:
                break
            torch.index_select(table[a, b], 0, index, out=weight)
            torch.mul(source, weight.view(sh, sw), out=weighted)
            column += weighted[:, reach - b : reach - b + h]
            if b:
                column += weighted[:, reach + b : reach + b + h]
        out += column[:, :, reach - a : reach - a + w]
        if a:
            out += column[:, :, reach + a : reach + a + w]
    return out
