"""FAST back end: every source pixel spreads over its own disk of confusion (variable-radius scatter).

The published definition is the scatter sum

    out(p) = sum_q values(q) * w(s_q, p - q) * (1 + (p - q) . slope_q / |s_q|),     sum_p w(s, p) = 1,

with w the aperture's image at signed defocus s, for a plain lens the disk of radius |s|, convolved with the bilinear tent of one pixel
(RENDERERS.md, sections 1 and 2, pitfall 5): exactly what rays through an aperture see of a bilinearly sampled picture, and the identity at
s = 0. The last factor is the Jacobian of x = p + a s(x), the point of a sloping surface that aperture point a sees; it matters only where
the radius itself changes from pixel to pixel. A cat's eye multiplies w by the share that the rear rim of the barrel lets through.

`scatter_dense` is that sum, written plainly: the judge. `scatter` is what users run: the same sum turned round (each pixel collects from
the offsets that can reach its tile), with the kernel's symmetry halving the additions and a resolution pyramid above the kernel's r0.
It has no atomics and no running sums, so it is deterministic on every device and keeps full float32 precision next to bright lights.
On a GPU with Triton `scatter_triton` does a level in one kernel; the torch form runs everywhere else.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..optics.lens import Aperture
from .aperture import Kernel, barrel_shift, kernel
from .pyramid import down, up2
from .scene import View, whole

FLAT = 0.02  # slopes below this change no pixel visibly (about 60 dB)
SHARP = 1e-3  # px; a smaller disk is its own pixel
BLOCK = 32  # px; how finely `lit` is looked at


def scatter_dense(
    values: torch.Tensor, radius: torch.Tensor, slope: torch.Tensor | None = None, aperture: Aperture | None = None
) -> torch.Tensor:
    """The definition, for radii up to the kernel's r0; arguments as for `scatter`, result in float64. Slow; judges `scatter`."""
    shape = kernel(aperture)
    radius = radius.double()
    index, fraction = _index(shape, radius)
    reach = math.ceil(float(radius.abs().max())) + 1
    c, h, w = values.shape
    shift = barrel_shift(aperture or Aperture(), h, w)
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64), indexing="ij")
    out = torch.zeros(c, h + 2 * reach, w + 2 * reach, dtype=torch.float64)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            row = shape.row(dx, dy).double()
            weight = torch.lerp(row[index], row[index + 1], fraction)
            if slope is not None:
                tilt = _tilt(slope.double(), radius)
                weight = weight * (1 + dx * tilt[0] + dy * tilt[1])
            if shift:  # the circle as the pixel that is reached sees it
                mx, my = shift * (x + dx - (w - 1) / 2), shift * (y + dy - (h - 1) / 2)
                distance = torch.hypot(dx - radius * mx, dy - radius * my)
                passed = (0.5 + (radius.abs() - distance) / (1 - radius * shift)).clamp(0, 1)
                whole = (0.5 + radius.abs() - math.hypot(dx, dy)).clamp(RIM, 1)
                weight = weight * torch.maximum(passed / whole, 1 - radius.abs()).clamp(0, 1)
            out[:, reach + dy : reach + dy + h, reach + dx : reach + dx + w] += values.double() * weight
    return out[:, reach : reach + h, reach : reach + w]


RIM = 0.02  # a pixel that the aperture covers by less than this counts as this much covered, when its clipped share is asked for


def _index(shape: Kernel, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of the kernel's table for signed radii, and how far each lies on the way to the next entry, 0..1."""
    at = radius * shape.steps + shape.r0 * shape.steps if shape.sided else radius.abs() * shape.steps
    index = at.floor().clamp(0, shape.table.shape[2] - 2)
    return index.int(), at - index


def _weights(
    row: torch.Tensor, following: torch.Tensor, index: torch.Tensor, fraction: torch.Tensor, out: torch.Tensor, spare: torch.Tensor
) -> torch.Tensor:
    """The table's row [n] read between its entries and the `following` ones; all others flat and of one length. Returns `out`."""
    torch.index_select(row, 0, index, out=out)
    torch.index_select(following, 0, index, out=spare)
    return out.lerp_(spare, fraction)


def _tilt(slope: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """slope / radius, with the pixel's own tent (variance 2/3 of a disk of radius 1) taken off where the disk is no larger than a pixel."""
    return slope * radius.abs() / (radius.square() + 2 / 3)


def scatter(
    values: torch.Tensor,
    radius: torch.Tensor,
    slope: torch.Tensor | None = None,
    check: Callable[[], None] | None = None,
    *,
    aperture: Aperture | None = None,
    lit: torch.Tensor | None = None,
    view: View | None = None,
) -> torch.Tensor:
    """Spread every pixel of `values` over its image of the aperture.

    values    [C, H, W] float32, any range; give a plane of ones to get the weight that arrived at each pixel
    radius    [H, W] float32 signed defocus in px, > 0 in front of focus; not bounded. A plain lens looks at its size only
    slope     [2, H, W] d |radius| / dx, d |radius| / dy, below 1 in size; None = locally constant radius
    check     called between tiles; may raise to interrupt
    aperture  shape and looks; its colours (chromatic_*) are for the caller to take apart. None = a plain disk
    lit       [H, W] bool. Where no lit pixel reaches, nothing is computed and the result is 0 in every plane. None = all are lit
    view      the part of the frame that the picture is; None = all of it

    Returns [C, H, W] float32. What leaves the frame, or is stopped by a cat's eye, is lost.
    """
    shape, eye = _shape(aperture, radius, view)
    blocks = None if view is None else _asked(view, radius)
    if lit is not None:
        blocks = reached(lit, radius) if blocks is None else reached(lit, radius) & blocks
    return _pyramid(values, radius, slope, shape, eye, blocks, BLOCK, False, check)


def scatter_moments(
    values: torch.Tensor,
    radius: torch.Tensor,
    blocks: torch.Tensor,
    check: Callable[[], None] | None = None,
    *,
    aperture: Aperture | None = None,
    view: View | None = None,
) -> torch.Tensor:
    """First moments over the aperture of what `scatter` averages: sum_q values(q) w(s_q, p - q) (q - p) / s_q.

    With x = p + a s, (q - p) / s_q is the aperture point a that sees q; so this is E[v a], where scatter gives E[v]. 0 where radii are.

    values, radius, check, aperture, view  as for `scatter`
    blocks  as from `reached`: where the answer is wanted; elsewhere it is 0

    Returns [2, C, H, W]: x and y.
    """
    shape, eye = _shape(aperture, radius, view)
    if view is not None:
        blocks = blocks & _asked(view, radius)
    out = _pyramid(values, radius, None, shape, eye, blocks, BLOCK, True, check)
    return out.view(2, *values.shape)


@dataclass(frozen=True)
class _Eye:
    """Cat's eye: how far the barrel's rear rim shifts per px, and from which row and column."""

    shift: float
    y: float
    x: float

    def coarser(self, h: int, w: int) -> "_Eye":
        """The same on the grid of half the size. There odd grids keep samples 0, 2, 4, ..., even ones lie between two."""
        y, x = (at if n == 1 else (at - 0.5 * (n % 2 == 0)) / 2 for at, n in ((self.y, h), (self.x, w)))
        return _Eye(2 * self.shift, y, x)


def _shape(aperture: Aperture | None, radius: torch.Tensor, view: View | None) -> tuple[Kernel, _Eye | None]:
    """The kernel, with its table where the radii [H, W] are, and the cat's eye if there is one."""
    shape = kernel(aperture)
    view = view or whole(*radius.shape)
    shift = barrel_shift(aperture, view.height, view.width) if aperture is not None else 0.0
    return replace(shape, table=shape.table.to(radius.device)), _Eye(shift, *view.axis) if shift else None


def _asked(view: View, radius: torch.Tensor) -> torch.Tensor:
    """[ceil(H / BLOCK), ceil(W / BLOCK)] bool: blocks that are asked for, and two around them for the coarser grids."""
    blocks = torch.zeros([-(-n // BLOCK) for n in radius.shape], dtype=torch.bool, device=radius.device)
    rows, columns = (slice(max(0, part.start // BLOCK - 2), -(-part.stop // BLOCK) + 2) for part in view.asked)
    blocks[rows, columns] = True
    return blocks


def reached(lit: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """[ceil(H / BLOCK), ceil(W / BLOCK)] bool: blocks that light from lit pixels may reach."""
    if not bool(lit.any()):
        return torch.zeros(1, 1, dtype=torch.bool, device=lit.device).expand(*(-(-n // BLOCK) for n in lit.shape))
    farthest = 1.25 * float(radius.abs()[lit].max()) + 4  # the coarser grids spread a little farther
    blocks = F.max_pool2d(lit[None, None].float(), BLOCK, ceil_mode=True)
    around = math.ceil(farthest / BLOCK)
    for size in ((2 * around + 1, 1), (1, 2 * around + 1)):
        n = [min(s // 2, around) for s in size]
        blocks = F.max_pool2d(F.pad(blocks, (n[1], n[1], n[0], n[0])), size, 1)
    return blocks[0, 0] > 0


def _pyramid(values, radius, slope, shape: Kernel, eye: _Eye | None, reached, block: float, moments: bool, check) -> torch.Tensor:
    """Radii up to r0 on this grid, larger ones on one of half the resolution. `block`: px of this grid in a block of `reached`."""
    h, w = radius.shape
    far = radius.abs() > shape.r0
    if not bool(far.any()):
        return _scatter_level(values, radius, slope, None, shape, eye, reached, block, moments, check)
    near = ~far
    if bool(near.any()):
        out = _scatter_level(values, radius, slope, near, shape, eye, reached, block, moments, check)
    else:
        out = torch.zeros_like(values).repeat(2 if moments else 1, 1, 1)

    def coarser(plane: torch.Tensor) -> torch.Tensor:
        return down(down(plane * far, 0), 1)

    weight = coarser(torch.ones_like(radius)).clamp_min(1e-12)
    # The coarser grid (spline down, linear up, wider tent) adds a variance of 2 px^2 an axis, taken off the kernel: r^2 / 4 for a disk.
    back, front = (2 / v for v in shape.variance)
    lost = back if back == front else torch.where(radius > 0, front, back)
    smaller = coarser((radius.square() - lost).clamp_min(0).sqrt() / 2) / weight
    if shape.sided or eye or moments:
        smaller = smaller.copysign(coarser(radius))
    slopes = None if slope is None else torch.stack([coarser(plane) / weight for plane in slope])
    area = (2 if h > 1 else 1) * (2 if w > 1 else 1)  # pixels of this grid in one of the coarser
    # One channel at a time: pictures are large, and memory is what users run out of.
    coarse = torch.stack([coarser(plane) for plane in values])
    coarse = _pyramid(coarse, smaller, slopes, shape, eye and eye.coarser(h, w), reached, block / 2, moments, check)
    for plane, add in zip(out, coarse, strict=True):
        plane += up2(add / area, h, w)
    return out


def _scatter_level(
    values, radius, slope, near, shape: Kernel, eye: _Eye | None, reached, block: float, moments: bool, check
) -> torch.Tensor:
    """The scatter sum of the pixels `near` (None = all), whose radii are up to r0, tile by tile."""
    fused = None if eye else _fused(values.device)
    if fused is not None:
        if check is not None:
            check()
        return _fused_level(fused, values, radius, slope, near, shape, reached, block, moments)
    _, h, w = values.shape
    pad = shape.r0 + 1
    out = values.new_empty(2 * len(values), h, w) if moments else torch.empty_like(values)
    rows, cols = (128, 256) if values.device.type == "cpu" else (2048, 2048)

    def collect(y: int, x: int) -> None:
        """The tile with its first pixel at (y, x)."""
        th, tw = min(rows, h - y), min(cols, w - x)
        here = out[:, y : y + th, x : x + tw]
        if reached is not None:
            first, last = (int(y / block), int(x / block)), (math.ceil((y + th) / block), math.ceil((x + tw) / block))
            if not bool(reached[first[0] : last[0], first[1] : last[1]].any()):
                here.zero_()
                return

        def window(plane: torch.Tensor, margin: int) -> torch.Tensor:
            """A copy of the tile and its surroundings, 0 beyond the frame and for pixels that are not near."""
            top, bottom, left, right = y - margin, y + th + margin, x - margin, x + tw + margin
            part = (..., slice(max(top, 0), bottom), slice(max(left, 0), right))
            part = plane[part] if near is None else plane[part] * near[part[1:]]
            return F.pad(part, (max(-left, 0), max(right - w, 0), max(-top, 0), max(bottom - h, 0)))

        # The tile's reach: the largest disk that can touch it.
        largest = float(window(radius, pad).abs().max())
        if largest < SHARP:
            here[:] = 0 if moments else window(values, 0)
            return
        reach = math.ceil(largest) + 1
        signed = window(radius, reach)
        tilt = None
        if slope is not None and not moments:
            tilt = _tilt(window(slope, reach), signed)
            if float(tilt.abs().max()) * (reach - 1) < FLAT:
                tilt = None
        boxes = _boxes(*_index(shape, signed), signed, reach)
        source = window(values, reach)
        if moments:
            source *= signed / (signed.square() + 2 / 3)  # 1 / s, damped as in _tilt
        here.zero_()
        if shape.even and not eye:
            _collect_even(here, source, boxes, tilt, shape, reach, moments)
        else:
            barrel = _Barrel(signed, eye.shift, (y - reach - eye.y, x - reach - eye.x)) if eye else None
            _collect(here, source, boxes, tilt, barrel, shape, reach, moments)

    _each(collect, [(y, x) for y in range(0, h, rows) for x in range(0, w, cols)], values.device, check)
    return out


def _fused_level(fused, values, radius, slope, near, shape: Kernel, reached, block: float, moments: bool) -> torch.Tensor:
    """`_scatter_level` by a kernel of the GPU's own: `fused` is scatter_triton.level."""
    if near is not None:
        values, radius = values * near, radius * near
    signed = torch.where(radius.abs() < SHARP, 0, radius)
    tilt = None if slope is None or moments else _tilt(slope if near is None else slope * near, signed)
    if moments:
        values = values * (signed / (signed.square() + 2 / 3))
    index, fraction = _index(shape, signed)
    return fused(values.contiguous(), index, fraction, signed, tilt, shape, reached, block, moments)


@lru_cache(maxsize=8)
def _fused(device: torch.device) -> Callable | None:
    """Triton's form of a level, where it runs and gives what the torch form gives; else None, and the torch form is used."""
    if device.type != "cuda":
        return None
    values = torch.arange(2 * 40 * 40, dtype=torch.float32, device=device).remainder(7).view(2, 40, 40)
    radius = torch.linspace(-9, 12, 40 * 40, device=device).view(40, 40)
    shape, _ = _shape(None, radius, None)
    try:
        from .scatter_triton import level

        found = _fused_level(level, values, radius, None, None, shape, None, BLOCK, False)
    except Exception:  # no Triton, no C compiler, a GPU it does not know: whatever it is, there is another way
        return None
    expected = scatter_dense(values.cpu(), radius.cpu())
    return level if bool((found.cpu() - expected).abs().max() < 1e-5 * expected.max()) else None


def _each(work: Callable, tiles: list[tuple], device: torch.device, check: Callable[[], None] | None) -> None:
    """work(*tile) for every tile; tiles write to different places.

    A tile's operations are too small to be shared between threads, so on a CPU threads take whole tiles. `check` stays in this thread.
    """
    threads = min(torch.get_num_threads(), len(tiles)) if device.type == "cpu" else 1
    if threads == 1:
        for tile in tiles:
            if check is not None:
                check()
            work(*tile)
        return
    before, inference, grad = torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(tile: tuple) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # modes belong to threads
            work(*tile)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in [pool.submit(run, tile) for tile in tiles]:
            if check is not None:
                check()
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what threads that begin later start with


def _boxes(index: torch.Tensor, fraction: torch.Tensor, radius: torch.Tensor, reach: int) -> list[tuple | None]:
    """For n = 0, 1, ...: rows from and to, columns from and to of the pixels with radius above n px, and what `_index` says there, flat.

    None where there are none; n = 0 is the whole window.
    """
    boxes: list[tuple | None] = [(0, index.shape[0], 0, index.shape[1], index.view(-1), fraction.view(-1))]
    lines = [radius.abs().amax(dim).cpu() for dim in (1, 0)]
    for n in range(1, reach):
        spans = [(line > n).nonzero().flatten().tolist() for line in lines]
        if not spans[0]:
            boxes.append(None)
            continue
        (top, bottom), (left, right) = ((s[0], s[-1] + 1) for s in spans)
        part = (slice(top, bottom), slice(left, right))
        boxes.append((top, bottom, left, right, index[part].reshape(-1), fraction[part].reshape(-1)))
    return boxes


def _offset(shape: Kernel, dx: int, dy: int) -> float:
    """The smallest radius whose kernel reaches offset (dx, dy)."""
    return math.hypot(max(abs(dx) - 1, 0) / shape.squeeze[0], max(abs(dy) - 1, 0) / shape.squeeze[1])


def _collect_even(
    out: torch.Tensor, source: torch.Tensor, boxes: list, tilt: torch.Tensor | None, shape: Kernel, reach: int, moments: bool
) -> None:
    """Adds to out [C, h, w] the sum over all offsets within `reach` of source [C, h + 2 reach, w + 2 reach].

    The kernel is even in dx and in dy, so each product serves its mirror images; tilt and moments are odd, and change only their signs.
    With `moments` out is [2 C, h, w]: the sums weighted by -dx, then by -dy.
    """
    _, h, w = out.shape
    c, sh, sw = source.shape
    tilted = tilt is not None
    # Sums even in dx, and behind them those odd in dx; `factors` are what the weights are multiplied with on the way there.
    sums = source.new_empty(2 * c if tilted or moments else c, h, sw)
    factors = torch.cat([source, source * tilt[0]]) if tilted else source
    sloping, source_y = factors[c:].clone() if tilted else None, source * tilt[1] if tilted else None
    product = torch.empty(len(factors) * sh * sw, dtype=source.dtype, device=source.device)
    weight, spare = source.new_empty(sh * sw), source.new_empty(sh * sw)
    # Columns of each box.
    parts = [None if box is None else [t if t is None else t[..., box[2] : box[3]] for t in (factors, source_y, sums)] for box in boxes]
    many = factors.shape[0]
    table = shape.table[: reach + 1, : reach + 1]
    for a in range(reach + 1):
        sums.zero_()
        if tilted:
            torch.mul(sloping, a, out=factors[c:])
        entries = zip(table[a].unbind(), table[a, :, 1:].unbind(), strict=True)
        for b, (row, following) in enumerate(entries):
            closest = _offset(shape, a, b)
            if closest >= reach - 1:
                break
            closest = int(closest)
            box = boxes[closest]
            if box is None:
                break
            top, bottom, left, right, index, fraction = box
            # Of these rows, the ones that some row of the tile asks for.
            y0, y1 = max(top, reach - b), min(bottom, reach + b + h)
            rows, width = y1 - y0, right - left
            if rows <= 0:
                continue
            count = rows * width
            plane = _weights(
                row,
                following,
                index.narrow(0, (y0 - top) * width, count),
                fraction.narrow(0, (y0 - top) * width, count),
                weight.narrow(0, 0, count),
                spare.narrow(0, 0, count),
            ).view(rows, width)
            values, values_y, total = parts[closest]
            place = product.narrow(0, 0, many * count).view(many, rows, width)
            torch.mul(values.narrow(1, y0, rows), plane, out=place)
            # The mirror images in dy: rows of the tile, and the rows of `place` that they ask for.
            images = []
            for signed in (b, -b) if b else (0,):
                lo, hi = max(y0, reach - signed), min(y1, reach - signed + h)
                if lo < hi:
                    images.append((signed, total.narrow(1, lo - reach + signed, hi - lo), lo - y0, hi - lo))
            for signed, there, first, lines in images:
                add = place.narrow(1, first, lines)
                if not moments:
                    there += add
                    continue
                there[:c] += add
                if b:
                    there[c:].add_(add, alpha=-signed)
            if tilted and b:
                place = place.narrow(0, 0, c)
                torch.mul(values_y.narrow(1, y0, rows), plane, out=place)
                for signed, there, first, lines in images:
                    there.narrow(0, 0, c).add_(place.narrow(1, first, lines), alpha=signed)
        even, odd = sums[:c], sums[c:]
        onward, backward = slice(reach - a, reach - a + w), slice(reach + a, reach + a + w)
        if moments:
            across, along = out[:c], out[c:]
            along += odd[:, :, onward]
            if a:
                along += odd[:, :, backward]
                across.add_(even[:, :, onward], alpha=-a).add_(even[:, :, backward], alpha=a)
            continue
        out += even[:, :, onward]
        if a:
            out += even[:, :, backward]
        if a and tilted:
            out += odd[:, :, onward]
            out -= odd[:, :, backward]


class _Barrel:
    """Cat's eye: the share of the light of each pixel of a window that the rear rim of the barrel lets through to an offset.

    The pixel p that is reached sees the rim as |d - s m(p)| <= |s| with m(p) = shift (p - centre) = m(q) + shift d, d = p - q: for a source
    pixel q a circle around s m(q) / e of radius |s| / e, e = 1 - s shift. Both rims of a ball may cross the same pixel, so the share is
    taken of what the front rim leaves; below 1 px of radius there is nothing to see, and the share goes to 1.
    """

    def __init__(self, signed: torch.Tensor, shift: float, corner: tuple[float, float]):
        """signed: [h, w] px; corner: row and column of the window's first pixel, from the lens's axis."""
        y, x = (torch.arange(n, device=signed.device) + start for n, start in zip(signed.shape, corner, strict=True))
        e = (1 - signed * shift).clamp_min(0.05)
        scale = signed * shift / e
        self.x, self.y = scale * x, scale * y[:, None]
        self.rear, self.front = 0.5 + signed.abs() / e, 0.5 + signed.abs()
        self.least = (1 - signed.abs()).clamp_min_(0)

    def share(self, dx: int, dy: int, part: tuple[slice, slice]) -> torch.Tensor:
        distance = (dx - self.x[part]).square_().add_((dy - self.y[part]).square_()).sqrt_()
        passed = (self.rear[part] - distance).clamp_(0, 1)
        passed /= (self.front[part] - math.hypot(dx, dy)).clamp_(RIM, 1)
        return torch.maximum(passed, self.least[part]).clamp_(max=1)


def _collect(
    out: torch.Tensor,
    source: torch.Tensor,
    boxes: list,
    tilt: torch.Tensor | None,
    barrel: _Barrel | None,
    shape: Kernel,
    reach: int,
    moments: bool,
) -> None:
    """As `_collect_even`, for kernels without symmetry: every offset on its own."""
    _, h, w = out.shape
    weight, spare = (torch.empty(source[0].numel(), dtype=source.dtype, device=source.device) for _ in range(2))
    for dx in range(-reach, reach + 1):
        for dy in range(-reach, reach + 1):
            closest = _offset(shape, dx, dy)
            box = boxes[int(closest)] if closest < reach - 1 else None
            if box is None:
                continue
            top, bottom, left, right, index, fraction = box
            rows, cols = reach - dy, reach - dx  # the source pixel that the tile's first pixel asks for
            y0, y1 = max(top, rows), min(bottom, rows + h)
            x0, x1 = max(left, cols), min(right, cols + w)
            if y0 >= y1 or x0 >= x1:
                continue
            part, count = slice((y0 - top) * (right - left), (y1 - top) * (right - left)), (y1 - y0) * (right - left)
            row = shape.row(dx, dy)
            _weights(row, row[1:], index[part], fraction[part], weight[:count], spare[:count])
            plane = weight[:count].view(y1 - y0, right - left)[:, x0 - left : x1 - left]
            part = (slice(y0, y1), slice(x0, x1))
            if tilt is not None:
                plane *= 1 + dx * tilt[0][part] + dy * tilt[1][part]
            if barrel is not None:
                plane *= barrel.share(dx, dy, part)
            there = (slice(None), slice(y0 - rows, y1 - rows), slice(x0 - cols, x1 - cols))
            if moments:
                c = len(source)
                out[:c][there].addcmul_(source[:, y0:y1, x0:x1], plane, value=-dx)
                out[c:][there].addcmul_(source[:, y0:y1, x0:x1], plane, value=-dy)
            else:
                out[there].addcmul_(source[:, y0:y1, x0:x1], plane)
