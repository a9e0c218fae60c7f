"""Depth from a bokeh stack in closed form: blur radii measured at every pixel, and a line fitted to them (SPEC section 10).

The published estimator (bokehdepth_stage2 SPEC, section 10): radius r_i = K_i D in every frame, D = |1/S1 - 1/S2| the distance from the
focus plane in dioptres, so D is the slope of r on K. How the radii are measured is not published; the method here is ours: the sharp
reference is blurred by disks of all radii in question, and every pixel of a frame is matched with the radius that explains its
surroundings best.

Assumptions: a thin lens with a round aperture; a tripod and a still scene; the same focus in all pictures; blur that is constant around
a pixel (wrong within a few px of depth edges, where the confidence is low); texture (without it no radius is better than another). Near
the focus radii come out too large, since a measured radius is never below 0. Which side of the focus a pixel lies on cannot be seen
from a stack: the caller says it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..optics.stack import STACK_WIDTH, BokehStack
from ..render.fill import harmonic_fill
from ..render.light import to_display, to_linear
from ..render.rays import vogel_disk
from .preprocessing import to_size

Progress = Callable[[float, int], None]
BEHIND, FRONT, FROM_DEPTH = "behind", "in front", "from depth"
SIDES = (BEHIND, FRONT, FROM_DEPTH)
FARTHEST = 1e-4  # 1/m: behind the focus nothing is farther than 10 km
NEAREST = 0.2  # m: in front of the focus nothing nearer is looked for
# Of the matching, in px at the working width and in display values; found on ray-traced scenes that no test uses.
WINDOW = 3.0  # sigma of the surroundings
MISMATCH = 0.02  # differences count up to this much: else one strong edge decides for all its surroundings
NOISE = 0.004  # of good pictures
MOST_RADIUS = 64.0
UNSURE, SURE = 0.1, 0.5  # confidences between which a pixel's own measurement comes to count when gaps are filled
LEAST_STEP, STEP = 0.5, 0.07  # radii in question: at least so far apart, and so much of the radius


def gain(focal_length: float, f_number: float, focus_distance: float, pixels_per_metre: float) -> float:
    """K of a thin lens in px per dioptre: 1/2 f^2 S1 / (N (S1 - f)) rho. Lengths in metres, rho in px per metre of sensor."""
    return 0.5 * focal_length**2 * focus_distance / (f_number * (focus_distance - focal_length)) * pixels_per_metre


def slope(
    k: torch.Tensor,  # [N] px per unit of disparity
    radii: torch.Tensor,  # [N, ...] measured, px
    weights: torch.Tensor | None = None,  # [N, ...] 1 / variance of each radius; None = the published plain fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """D = sum w K r / sum w K^2, the line through the origin, and its variance [...] in units of that of a radius of weight 1.

    Unbiased where the radii are; a frame of K = 0 says nothing. With equal variances s^2 of the radii that of D is s^2 / sum K^2.
    """
    k = torch.as_tensor(k, dtype=radii.dtype, device=radii.device).view(-1, *[1] * (radii.ndim - 1))
    weights = torch.ones_like(k) if weights is None else weights
    total = (weights * k * k).sum(0)
    return (weights * k * radii).sum(0) / total, 1 / total


def inverse_depth(offset: torch.Tensor, focus_distance: float, behind: torch.Tensor) -> torch.Tensor:
    """1/S2 = 1/S1 minus the offset behind the focus, plus it in front. Not clamped: noise can lead beyond infinity, below 0."""
    return 1 / focus_distance + torch.where(behind, -offset, offset)


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a stack tells of depth, at the size of its reference.

    offset      [H, W] >= 0 distance from the focus in disparity: 1/m, or a share of the whole depth range (BokehStack.per_dioptre)
    disparity   [H, W] larger = nearer: 1/m, or relative with the focus at 0
    confidence  [H, W] 0..1, 1 = sure: the radii agree and are narrowly determined, and blurring the reference explains the frames
    metric      the unit is 1/m
    """

    offset: torch.Tensor
    disparity: torch.Tensor
    confidence: torch.Tensor
    metric: bool


@torch.no_grad()
def depth_from_sweep(
    stack: BokehStack,
    *,
    side: str = BEHIND,
    focus_distance: float = 2.0,
    depth: torch.Tensor | None = None,
    fill: bool = True,
    upsample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Depth from a bokeh stack without a network.

    side            where the scene lies: BEHIND the focus, all IN FRONT of it, or FROM_DEPTH: on the side that `depth` says
    focus_distance  m, for stacks with K per dioptre; `inf` allowed
    depth           [h, w] disparity of the reference, near = large, any scale and size: tells the sides only
    fill            pixels that are not sure take over what their surroundings say
    upsample        (low [1, h, w], image [1, 3, H, W]) -> [1, H, W]; None = bilinear. Stacks wider than 512 px are measured at that width
    progress        (done, total)
    Raises BokehError for an unknown side, a missing depth, or a distance that is not above 0.
    """
    if side not in SIDES:
        raise BokehError(f"The side is '{side}'; expected one of {', '.join(SIDES)}.")
    if side == FROM_DEPTH and depth is None:
        raise BokehError("The sides are to come from a depth map, but none is connected; connect one, or choose another side.")
    if stack.per_dioptre and not focus_distance > 0:
        raise BokehError(f"The focus distance is {focus_distance} m; expected more than 0.")
    height, width = stack.reference.shape[-2:]
    zoom = min(1.0, STACK_WIDTH / width)
    small = stack.fitted(max(round(height * zoom), 1), max(round(width * zoom), 1))
    reference, frames = (x.to(device or stack.reference.device, torch.float32).clamp(0, 1) for x in (small.reference, small.frames))
    k = (small.k * (reference.shape[-1] / STACK_WIDTH)).to(reference)
    largest = (k * _most_offset(stack.per_dioptre, side, focus_distance)).clamp(LEAST_STEP, MOST_RADIUS)
    radii, variance, mismatch = measure_radii(reference, frames, largest, progress)
    offset, confidence = combine(k, radii, variance, mismatch)
    if fill:
        offset = harmonic_fill(offset[None], ((confidence - UNSURE) / (SURE - UNSURE)).clamp(0, 1))[0]
    behind = torch.ones_like(offset, dtype=torch.bool)
    if side == FRONT:
        behind = ~behind
    elif side == FROM_DEPTH:
        sides = F.interpolate(depth[None, None].to(offset), offset.shape, mode="bilinear", align_corners=False, antialias=True)[0, 0]
        behind = sides < focus_of(sides, offset, confidence)
    if stack.per_dioptre:
        disparity = inverse_depth(offset, focus_distance, behind).clamp(min=FARTHEST)
    else:
        disparity = torch.where(behind, -offset, offset)

    def full(low):
        return to_size(low[None], (height, width), align_corners=False)[0]

    if upsample:
        finished = upsample(disparity[None], stack.reference[None].to(disparity))[0]
    else:
        finished = full(disparity)
    return Sweep(full(offset), finished, full(confidence), stack.per_dioptre)


def _most_offset(per_dioptre: bool, side: str, focus_distance: float) -> float:
    """The largest offset looked for, a little more than there can be."""
    if not per_dioptre:
        return 1.1
    farthest, nearest = 1 / focus_distance, max(1 / NEAREST - 1 / focus_distance, 1.0)
    return 1.1 * {BEHIND: farthest, FRONT: nearest}.get(side, max(farthest, nearest))


def measure_radii(
    reference: torch.Tensor,  # [3, H, W] display-encoded 0..1, sharp
    frames: torch.Tensor,  # [N, 3, H, W] the same, blurred
    largest: torch.Tensor,  # [N] px, the largest radius in question in each frame
    progress: Progress | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radii [N, H, W] in px, their variances [N, H, W] in px^2, and the differences [N, H, W] that are left, in display values.

    Light is blurred as light and compared as display values, where noise and the eye count alike. The least of the smoothed squared
    differences is refined by a parabola; its curvature says how well the radius is determined.
    """
    from kornia.filters import gaussian_blur2d

    candidates = _candidates(float(largest.max()))
    size = 2 * math.ceil(3 * WINDOW) + 1
    # By frame: the least cost so far, its neighbours before and after, and which candidate it was.
    best = frames.new_full((4, len(frames), *frames.shape[-2:]), torch.inf)
    last = torch.full_like(best[0], torch.inf)
    for i, blurred in enumerate(_blurred(to_linear(reference), candidates)):
        cost = (to_display(blurred.clamp(0, 1)) - frames).square().mean(1, keepdim=True).clamp(max=MISMATCH**2)
        cost = gaussian_blur2d(cost, (size, size), (WINDOW, WINDOW), border_type="replicate")[:, 0]
        in_question = (largest >= candidates[max(i - 1, 0)]).view(-1, 1, 1)
        cost = torch.where(in_question, cost, torch.inf)
        best[2] = torch.where(best[3] == i - 1, cost, best[2])
        better = cost < best[0]
        found = torch.stack([cost, last, torch.full_like(cost, torch.inf), torch.full_like(cost, i)])
        best = torch.where(better, found, best)
        last = cost
        if progress:
            progress(i + 1, len(candidates))
    return _refined(best, torch.tensor(candidates, device=frames.device))


def _refined(best: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bottom of the parabola through the least cost and its two neighbours."""
    cost, before, after, index = best
    index = index.long()
    left, here, right = (candidates[(index + step).clamp(0, len(candidates) - 1)] for step in (-1, 0, 1))
    inner = before.isfinite() & after.isfinite()
    before, after = (torch.where(x.isfinite(), x, cost) for x in (before, after))
    rise_left = (cost - before) / (here - left).clamp(min=LEAST_STEP)
    rise_right = (after - cost) / (right - here).clamp(min=LEAST_STEP)
    curvature = ((rise_right - rise_left) / (right - left).clamp(min=LEAST_STEP)).clamp(min=1e-9)
    bottom = (left + here) / 2 - rise_left / (2 * curvature)
    radius = torch.where(inner, torch.maximum(torch.minimum(bottom, right), left), here)
    samples = 4 * math.pi * WINDOW**2  # that a Gaussian window averages
    return radius, (cost + NOISE**2) / (samples * curvature), cost.clamp(min=0).sqrt()


def _candidates(largest: float) -> list[float]:
    radii = [0.0]
    while radii[-1] < largest:
        radii.append(radii[-1] + max(LEAST_STEP, STEP * radii[-1]))
    return radii


def _blurred(light: torch.Tensor, radii: list[float]) -> Iterator[torch.Tensor]:
    """[3, H, W] the picture [3, H, W] under each disk. The border goes on outwards."""
    pad = math.ceil(radii[-1]) + 1
    padded = F.pad(light[None], (pad,) * 4, mode="replicate")[0]
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded)
    for radius in radii:
        kernel = F.pad(_disk(radius).to(light), (0, size[1] - 2 * math.ceil(radius) - 3, 0, size[0] - 2 * math.ceil(radius) - 3))
        kernel = kernel.roll((-math.ceil(radius) - 1,) * 2, (0, 1))
        yield torch.fft.irfft2(spectrum * torch.fft.rfft2(kernel), s=size)[:, pad:-pad, pad:-pad]


def _disk(radius: float) -> torch.Tensor:
    """[n, n] a disk seen through bilinear samples, as the renderers see it; n = 2 ceil(radius) + 3, sum 1."""
    reach = math.ceil(radius) + 1
    side = 2 * reach + 1
    points = radius * vogel_disk(max(256, round(8 * math.pi * radius**2))) + reach
    corner = points.floor()
    share = points - corner
    kernel = torch.zeros(side * side, dtype=points.dtype)
    for dx, wx in ((0, 1 - share[:, 0]), (1, share[:, 0])):
        for dy, wy in ((0, 1 - share[:, 1]), (1, share[:, 1])):
            kernel.index_add_(0, ((corner[:, 1] + dy) * side + corner[:, 0] + dx).long(), wx * wy)
    return (kernel / len(points)).view(side, side).float()


def combine(k: torch.Tensor, radii: torch.Tensor, variance: torch.Tensor, mismatch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(offset [H, W], confidence [H, W] 0..1) of radii measured in frames of strengths k [N]: the published plain fit.

    The confidence falls to a half where the offset is uncertain by 3 % of the largest one (by the curvature of the match, or by how
    far the frames disagree), where a mean difference of 0.01 in display values is left, or where offsets in the window differ by 15 %
    of the largest one: near a depth edge the stronger texture decides for both sides.
    """
    offset, _ = slope(k, radii)
    _, spread = slope(k, radii, variance.reciprocal())
    each = radii / k.view(-1, 1, 1)
    spread = spread + (each - offset).square().mean(0)
    largest = offset.flatten().kthvalue(max(round(0.98 * offset.numel()), 1)).values.clamp(min=1e-6)
    size = 4 * round(WINDOW) + 1
    around = [F.max_pool2d(x[None, None], size, 1, size // 2)[0, 0] for x in (offset, -offset)]
    edge = (around[0] + around[1]) / (0.15 * largest)
    return offset, 1 / (1 + spread / (0.03 * largest) ** 2 + mismatch.square().mean(0) / 0.01**2 + edge**2)


def focus_of(depth: torch.Tensor, offset: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """The disparity in `depth` [H, W] (any scale) that is in focus: the one for which |depth - focus| is most like the offsets [H, W]."""
    few = slice(None, None, max(1, depth.numel() >> 16))
    d, o, w = (x.flatten()[few].cpu().double() for x in (depth, offset, confidence))
    candidates = torch.quantile(d, torch.linspace(0, 1, 101, dtype=d.dtype, device=d.device))
    away = (d - candidates[:, None]).abs()
    scale = (w * away * o).sum(1) / (w * away.square()).sum(1).clamp(min=1e-12)
    error = (w * (o - scale[:, None] * away).square()).sum(1)
    return candidates[error.argmin()].to(depth)


def activation_bytes(height: int, width: int, frames: int) -> int:
    """Bytes that `depth_from_sweep` needs at most for a stack of `frames` pictures of height x width px."""
    zoom = min(1.0, STACK_WIDTH / width)
    around = 2 * MOST_RADIUS + 16
    small = (height * zoom + around) * (width * zoom + around)
    return round(4 * (small * (40 + 24 * frames) + 24 * height * width))
