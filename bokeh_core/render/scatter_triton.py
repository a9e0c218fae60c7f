"""The FAST scatter as one GPU kernel: every program owns a tile of the result and collects, in registers, what reaches it.

The same sum as `scatter._scatter_level`, which judges it: no atomics, a fixed order of additions, the same table of weights. Without
Triton (Windows, Apple, some AMD) the torch form runs. Imported late, because Triton is not everywhere.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

SIDE = 16  # px; tiles are SIDE x SIDE


@triton.jit
def collect(
    values,  # [C, h, w] float32
    index,  # [h, w] int32, entry of the table for each pixel's radius
    fraction,  # [h, w] float32, on the way to the next entry
    tilt,  # [2, h, w] float32; not read unless TILTED
    table,  # [*, *, entries] float32, see aperture.Kernel
    reaches,  # [tiles down, tiles across] int32, how far away a pixel may lie that reaches the tile; below 0 where nothing does
    out,  # [C or 2 C, h, w] float32
    h,
    w,
    offsets,  # length of the table's second axis
    entries,  # length of its third
    first,  # what the table's index of offset 0 is; EVEN tables begin there
    C: tl.constexpr,
    SIDE: tl.constexpr,
    PLANES: tl.constexpr,  # the power of two from C up
    EVEN: tl.constexpr,
    TILTED: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    reach = tl.load(reaches + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    pixel = tl.arange(0, SIDE * SIDE)
    y = tl.program_id(1) * SIDE + pixel // SIDE
    x = tl.program_id(0) * SIDE + pixel % SIDE
    inside = (y < h) & (x < w)
    plane = tl.arange(0, PLANES)[:, None]
    total = tl.zeros([PLANES, SIDE * SIDE], tl.float32)
    along = tl.zeros([PLANES, SIDE * SIDE], tl.float32)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            near_x, near_y = tl.maximum(tl.abs(dx) - 1, 0), tl.maximum(tl.abs(dy) - 1, 0)
            if near_x * near_x + near_y * near_y <= reach * reach:
                row = tl.abs(dy) if EVEN else dy + first
                column = tl.abs(dx) if EVEN else dx + first
                here = inside & (y >= dy) & (y - dy < h) & (x >= dx) & (x - dx < w)
                at = (y - dy) * w + x - dx
                entry = table + (column * offsets + row) * entries + tl.load(index + at, mask=here, other=0)
                weight = tl.load(entry, mask=here, other=0.0)
                weight += tl.load(fraction + at, mask=here, other=0.0) * (tl.load(entry + 1, mask=here, other=0.0) - weight)
                if TILTED:
                    slope_x = tl.load(tilt + at, mask=here, other=0.0)
                    slope_y = tl.load(tilt + h * w + at, mask=here, other=0.0)
                    weight *= 1.0 + dx * slope_x + dy * slope_y
                light = tl.load(values + plane * h * w + at[None, :], mask=here[None, :] & (plane < C), other=0.0)
                light *= weight[None, :]
                if MOMENTS:
                    total -= dx * light
                    along -= dy * light
                else:
                    total += light
    to = out + plane * h * w + (y * w + x)[None, :]
    tl.store(to, total, mask=inside[None, :] & (plane < C))
    if MOMENTS:
        tl.store(to + C * h * w, along, mask=inside[None, :] & (plane < C))


def level(values, index, fraction, signed, tilt, shape, reached, block: float, moments: bool) -> torch.Tensor:
    """One level of the pyramid; see `scatter._scatter_level`.

    values [C, h, w], signed [h, w] 0 where a pixel does not belong to this level; index, fraction from `scatter._index`; tilt [2, h, w] or
    None; shape with its table on the device; reached, block as from `scatter.reached`. Returns [C or 2 C, h, w].
    """
    c, h, w = values.shape
    tiles = -(-h // SIDE), -(-w // SIDE)
    largest = F.max_pool2d(signed.abs()[None, None], SIDE, ceil_mode=True)
    around = -(-(shape.r0 + 1) // SIDE)
    reach = F.max_pool2d(largest, 2 * around + 1, 1, around)[0, 0].ceil().int()
    if reached is not None:
        rows, columns = (torch.arange(n, device=signed.device).div(block).long() for n in (h, w))
        wanted = F.max_pool2d(reached[rows[:, None], columns][None, None].float(), SIDE, ceil_mode=True)[0, 0]
        reach = torch.where(wanted > 0, reach, -1)
    out = values.new_empty((2 if moments else 1) * c, h, w)
    collect[(tiles[1], tiles[0])](
        values, index, fraction, fraction if tilt is None else tilt, shape.table, reach.contiguous(), out,
        h, w, shape.table.shape[1], shape.table.shape[2], 0 if shape.even else shape.r0 + 1,
        C=c, SIDE=SIDE, PLANES=triton.next_power_of_2(c), EVEN=shape.even, TILTED=tilt is not None, MOMENTS=moments,
    )  # fmt: skip
    return out
