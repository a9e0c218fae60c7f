"""From a network's small depth map to one of the photo's size, with the edges where the photo has them.

A network's map is soft: where depth jumps it ramps over a few of its pixels, which are dozens of the photo's. So every steep place of the
small map is asked what lies uphill and downhill of it; two plateaus make it an edge, a slope that goes on does not. Each of the photo's
pixels on an edge then belongs to the plateau whose colours it fits better, the ramp's middle being the prior. The method is ours.
"""

import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..filters import box_mean

# All lengths are pixels of the small map. Developed on our own synthetic scenes, shrunk 2 to 8 times and softened.
RAMP = 3  # half the width of a soft edge
REACH = 6  # radius in which depth and colours of both sides are measured
STEEP = 0.004  # of the map's range per px: less cannot be an edge
STEP = (0.03, 0.06)  # of the map's range: an edge of this height is not treated, is treated in full
GOES_ON = (0.3, 0.6)  # further climb between RAMP and 2 RAMP px, against that before: an edge, a slope
PURE = 0.8  # of the way from the middle of the ramp to a plateau: sure to be of that side
PRIOR = 1.5  # trust in the ramp's middle
TEMPER, CAP = 0.75, 3.5  # trust in colours, which are not as independent as the formula has them
NOISE = 0.002  # variance of display-encoded colour that is always there
SMOOTHING = 1.0  # how much a pixel wants to be on its neighbours' side: no speckles, no frayed edges
NEAREST = 0.01  # metres; networks that end in a ReLU say 0 for what almost touches the lens
TILE = 512  # px of the photo worked on at once


def guided_upsample(low: torch.Tensor, image: torch.Tensor, *, align_corners: bool = True, metric: bool = False) -> torch.Tensor:
    """Bring depth maps to the size of their pictures.

    low            [n, h, w] disparity (larger = nearer, any scale), finite; or metres when `metric`
    image          [n or 1, 3, H, W] display-encoded 0..1
    align_corners  how the maps lie on the pictures: True: corner pixels on corner pixels, as the published depth networks are
                   resized; False: borders on borders, as pictures are shrunk
    metric         metres are worked on as 1/m, 1 cm being the nearest: their far end would hide all near edges

    Returns [n, H, W] float32. Where the picture is no larger than the map, or the map has no edges, this is plain bilinear
    resampling. Values stay between those of the small map nearby. Memory beside the result: two planes of the picture, and what is in
    proportion to the small map. Raises BokehError for wrong shapes and values that are not finite.
    """
    if low.ndim != 3 or image.ndim != 4 or image.shape[1] != 3 or len(image) not in (1, len(low)) or 0 in (*low.shape, *image.shape):
        raise BokehError(f"The depth has shape {list(low.shape)} and the picture {list(image.shape)}; expected [n,h,w] and [n,3,H,W].")
    out = torch.empty((len(low), *image.shape[-2:]), dtype=torch.float32, device=low.device)
    for i, one in enumerate(low):
        one = one.float().clamp_min(NEAREST).reciprocal() if metric else one.float()
        if not bool(one.isfinite().all()):
            raise BokehError("The depth to enlarge holds NaN or infinite values; fill them first.")
        _upsample(one, image[i if len(image) > 1 else 0].to(low.device), align_corners, out[i])
    return out.reciprocal_() if metric else out


def _upsample(low: torch.Tensor, image: torch.Tensor, align: bool, out: torch.Tensor) -> None:
    """One map [h, w] of the picture [3, H, W] into out [H, W]."""
    size = (height, width) = image.shape[-2:]
    ratio = max(height / low.shape[0], width / low.shape[1])
    out.copy_(F.interpolate(low[None, None], size=size, mode="bilinear", align_corners=align)[0, 0])
    bottom, span = float(low.min()), float(low.max() - low.min())
    if ratio <= 1 or span == 0:
        return
    low, plain = (low - bottom) / span, (out - bottom) / span
    edges = _edges(low)
    if not len(edges[0]):
        return
    sides = _sides(low, image, *edges)
    radius = max(1, round(ratio / 3))
    halo = 2 * radius + 3
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            y0, x0, y1, x1 = max(top - halo, 0), max(left - halo, 0), min(top + TILE + halo, height), min(left + TILE + halo, width)
            here = _resample(sides, size, align, y0, y1, x0, x1)
            if not bool((here[-1] > 0).any()):
                continue
            box = (slice(y0, y1), slice(x0, x1))
            decided = _decide(plain[box], image[:, box[0], box[1]].float().clamp(0, 1), here, radius)
            changed = torch.where(here[-1] > 0, decided * span + bottom, out[box])
            inner = (slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width)))
            out[inner] = changed[top - y0 : top - y0 + TILE, left - x0 : left - x0 + TILE]


def _edges(low: torch.Tensor):
    """The pixels of edges of low [h, w] 0..1.

    Returns rows and columns [M], the depth downhill and uphill of each [M], and how sure it is that this is an edge [M] 0..1.
    """
    pad = 2 * RAMP + 1
    wide = _continued(low, pad + 1)
    calm = F.avg_pool2d(wide[None, None], 3, 1)[0, 0]  # [h + 2 pad, w + 2 pad]
    slope_y = ((calm[2:] - calm[:-2]) / 2)[pad - 1 : 1 - pad, pad:-pad]
    slope_x = ((calm[:, 2:] - calm[:, :-2]) / 2)[pad:-pad, pad - 1 : 1 - pad]
    steepness = slope_y.hypot(slope_x)
    y, x = (steepness > STEEP).nonzero(as_tuple=True)
    g = steepness[y, x]
    way = torch.arange(-2 * RAMP, 2 * RAMP + 1, device=low.device)
    path_y = (y[:, None] + pad + way * (slope_y[y, x] / g)[:, None]) * (2 / (calm.shape[0] - 1)) - 1
    path_x = (x[:, None] + pad + way * (slope_x[y, x] / g)[:, None]) * (2 / (calm.shape[1] - 1)) - 1
    path = F.grid_sample(calm[None, None], torch.stack([path_x, path_y], -1)[None], mode="bilinear", align_corners=True)[0, 0]

    def climb(heights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How far it goes up along heights [M, 2 RAMP + 1] within RAMP px, and beyond as a share of that. A flat place ends it."""
        steps = heights.diff(dim=1)
        steps = steps * (steps > 0.1 * g[:, None]).long().cumprod(1)
        first = steps[:, :RAMP].sum(1)
        return first, steps[:, RAMP:].sum(1) / first.clamp_min(1e-6)

    up, up_goes_on = climb(path[:, 2 * RAMP :])
    down, down_goes_on = climb(-path[:, : 2 * RAMP + 1].flip(1))
    lowest, highest = (side * F.max_pool2d(side * low[None, None], 4 * RAMP + 1, 1, 2 * RAMP)[0, 0, y, x] for side in (-1, 1))
    far, near = (path[:, 2 * RAMP] - down).maximum(lowest), (path[:, 2 * RAMP] + up).minimum(highest)
    sure = 1 - _between(torch.minimum(up_goes_on, down_goes_on), *GOES_ON)
    sure = sure * _between(near - far, *STEP)
    kept = sure > 0
    return y[kept], x[kept], far[kept], near[kept], sure[kept]


def _sides(low, image, y, x, far, near, sure) -> torch.Tensor:
    """[13, h, w]: of the far and the near side mean colour (3), colour variance, depth, known or not; and how sure. 0 off the edges."""
    h, w = low.shape
    mean, square = _moments(image, h, w)
    planes = torch.cat([mean, square, low[None], torch.ones_like(low)[None]]).flatten(1)
    sums = [planes.new_zeros(8, len(y)) for _ in range(2)]
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            distance2 = dy * dy + dx * dx
            if distance2 > REACH * REACH:
                continue
            values = planes[:, (y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1)]
            level = (values[6] - far) / (near - far)  # 0 far, 1 near
            for side, own in enumerate((1 - level, level)):
                weight = _between(own, PURE, PURE + 0.1) * (own < 1.4) / (1 + distance2 / 16)  # beyond 1.4 lies another surface
                sums[side] += weight * values
    found = []
    for (*totals, weight), own in zip(sums, (far, near), strict=True):
        mean, square = (torch.stack(totals[n : n + 3]) / weight.clamp_min(1e-6) for n in (0, 3))
        variance = (square - mean * mean).clamp_min(0).mean(0) + NOISE
        depth = torch.where(weight > 1e-3, totals[6] / weight.clamp_min(1e-6), own)
        found += [*mean, variance, depth, (weight > 0.3).to(mean)]
    out = planes.new_zeros(13, h * w)
    out[:, y * w + x] = torch.stack([*found, sure])
    return out.view(-1, h, w)


def _decide(plain: torch.Tensor, image: torch.Tensor, sides: torch.Tensor, radius: int) -> torch.Tensor:
    """[h, w] the depth of a tile: plain [h, w] bilinear, image [3, h, w], sides [14, h, w] from _resample."""
    sure, share = sides[-2], sides[-1]
    sides = sides / share.clamp_min(1e-6)
    (far_color, far_var, far, far_known), (near_color, near_var, near, near_known) = (
        (s[:3], s[3].clamp_min(NOISE), s[4], s[5]) for s in (sides[:6], sides[6:12])
    )
    level = ((plain - far) / (near - far).clamp_min(1e-9)).clamp(0.01, 0.99)
    likelier = (image - far_color).square().sum(0) / far_var - (image - near_color).square().sum(0) / near_var
    likelier = 0.5 * TEMPER * (likelier + 3 * (far_var / near_var).log())  # log of the likelihood of near against far
    evidence = PRIOR * (level / (1 - level)).log() + box_mean((likelier.clamp(-CAP, CAP) * far_known * near_known)[None], 1)[0]
    belief = evidence
    for _ in range(2):
        belief = evidence + SMOOTHING * (2 * box_mean(torch.sigmoid(belief)[None], radius)[0] - 1)
    across = F.pad(belief[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    change = ((across[2:, 1:-1] - across[:-2, 1:-1]) / 2).hypot((across[1:-1, 2:] - across[1:-1, :-2]) / 2)
    cover = (0.5 + belief / (change + 0.25)).clamp(0, 1)  # over change, belief is the distance to the edge in px
    new = cover * torch.maximum(plain, near) + (1 - cover) * torch.minimum(plain, far)
    return torch.lerp(plain, new, (2 * sure).clamp(0, 1))


def _between(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """0 up to low, 1 from high on, straight between."""
    return ((x - low) / (high - low)).clamp(0, 1)


def _continued(x: torch.Tensor, n: int) -> torch.Tensor:
    """[h, w] -> [h + 2n, w + 2n]: slopes go on beyond the border (point reflection), so that they are not taken for plateaus' ends."""
    for _ in range(2):
        x = x.T
        m = min(n, len(x) - 1)
        if m:
            x = torch.cat([2 * x[:1] - x[1 : m + 1].flip(0), x, 2 * x[-1:] - x[-m - 1 : -1].flip(0)])
        x = F.pad(x[None, None], (0, 0, n - m, n - m), mode="replicate")[0, 0]
    return x


def _moments(image: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the colours and of their squares under each pixel of the small map, two [3, h, w]. Strip by strip."""
    height, width = image.shape[-2:]
    cell = (max(1, height // h), max(1, width // w))
    rows = max(1, (1 << 18) // (width * cell[0])) * cell[0]
    strips = []
    for top in range(0, height, rows):
        part = image[:, top : top + rows].float().clamp(0, 1)
        strips.append(F.avg_pool2d(torch.cat([part, part * part])[None], cell, ceil_mode=True)[0])
    return tuple(F.interpolate(torch.cat(strips, 1)[None], size=(h, w), mode="area")[0].split(3))


def _resample(sides: torch.Tensor, size: tuple[int, int], align: bool, y0: int, y1: int, x0: int, x1: int) -> torch.Tensor:
    """[C + 1, y1 - y0, x1 - x0]: that part of planes [C, h, w] enlarged bilinearly to `size`, and the share that edge pixels have in it.

    The planes are 0 off the edges, so their mean over edge pixels is plane / share.
    """

    def places(start: int, stop: int, few: int, many: int):
        at = torch.arange(start, stop, device=sides.device, dtype=torch.float32)
        at = at * ((few - 1) / max(many - 1, 1)) if align else ((at + 0.5) * (few / many) - 0.5).clamp(0, few - 1)
        first = at.floor().long().clamp(max=few - 1)
        return first, (first + 1).clamp(max=few - 1), at - first

    (top, bottom, fy), (left, right, fx) = places(y0, y1, sides.shape[1], size[0]), places(x0, x1, sides.shape[2], size[1])
    r0, r1, c0, c1 = int(top[0]), int(bottom[-1]) + 1, int(left[0]), int(right[-1]) + 1
    part = sides[:, r0:r1, c0:c1]
    if not bool((part[-1] > 0).any()):
        return part.new_zeros(1, 1, 1)
    part = torch.cat([part, (part[-1:] > 0).to(part)])
    part = torch.lerp(part[:, top - r0], part[:, bottom - r0], fy[:, None])
    return torch.lerp(part[:, :, left - c0], part[:, :, right - c0], fx)
