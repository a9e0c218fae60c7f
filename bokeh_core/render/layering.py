"""From a picture with disparity to ordered, complete layers.

Where depth jumps, the renderer must know what lies in front; where it slopes gently, nothing needs to be cut. So the disparity range is cut
at a few thresholds, chosen to separate as many depth jumps as possible while cutting as little smooth surface as possible.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..filters import ROWS_PIXELS, box_max, box_mean, box_min, by_rows
from .fill import CYCLES, harmonic_fill
from .scene import Layer, Scene
from .windows import Rim

MAX_LAYERS = 4
JUMP = 1.5  # px of signed defocus between neighbours: a silhouette, not a slope
BINS = 256


def thresholds(disparity: torch.Tensor, k: float, max_layers: int = MAX_LAYERS) -> list[float]:
    """Disparities at which to cut, ascending; at most max_layers - 1 of them, none when there is no depth jump.

    disparity  [B, H, W] or [H, W], all frames that shall share the cuts
    k          px of defocus per unit of disparity; a jump is a neighbour difference above JUMP px

    Greedy: each cut is placed where (jumps crossed that no earlier cut separates) - (smooth neighbour pairs crossed) is largest, in the
    middle of the best interval, and only if that pays for more than a few percent of a picture edge.
    """
    frames = disparity.float() if disparity.ndim == 3 else disparity.float()[None]
    lo, hi = float(frames.min()), float(frames.max())
    if (hi - lo) * abs(k) <= JUMP:
        return []
    # Neighbour pairs [lower bin, higher bin]: how many are smooth, how many jump.
    smooth, jumps = (torch.zeros(BINS + 1, BINS + 1, dtype=torch.long, device=frames.device) for _ in range(2))
    for a, b in _neighbours(frames):
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        low, high = ((x - lo).mul_(BINS / (hi - lo)) for x in (low, high))
        jump = (high - low) * (hi - lo) / BINS * abs(k) > JUMP
        pair = low.long().clamp_(0, BINS) * (BINS + 1) + high.long().clamp_(0, BINS)
        for which, count in ((jump, jumps), (~jump, smooth)):
            count += torch.bincount(pair[which], minlength=count.numel()).view_as(count)

    def crossings(pairs: torch.Tensor) -> torch.Tensor:
        """How many of the pairs each of the BINS + 1 bin borders lies between."""
        return F.pad(pairs.sum(1) - pairs.sum(0), (1, 0)).cumsum(0)[: BINS + 1]

    across = crossings(smooth)
    enough = 0.02 * (frames.shape[-1] + frames.shape[-2]) * len(frames)
    cuts: list[int] = []
    while len(cuts) < max_layers - 1:
        score = crossings(jumps) - across
        best = int(score.max())
        if best <= enough:
            break
        first = int(score.argmax())
        last = first
        while last < BINS and int(score[last + 1]) >= 0.98 * best:
            last += 1
        cut = (first + last) // 2
        cuts.append(cut)
        jumps[:cut, cut:] = 0
    return [lo + cut * (hi - lo) / BINS for cut in sorted(cuts)]


def _neighbours(frames: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every horizontal and vertical neighbour pair of [B, H, W] once, as two flat tensors, some rows at a time."""
    for frame in frames:
        rows = max(1, ROWS_PIXELS // frame.shape[1])
        for top in range(0, len(frame), rows):
            part = frame[top : top + rows + 1]
            yield part[:rows, 1:].flatten(), part[:rows, :-1].flatten()
            yield part[1:].flatten(), part[:-1].flatten()


def harden_edges(disparity: torch.Tensor, k: float) -> torch.Tensor:
    """Give pixels on a soft depth edge the depth of one of its two sides.

    Estimated depth maps ramp over several pixels where the world jumps; blurring the ramp as if it were a surface leaves a half-sharp rim.
    A ramp is a neighbourhood steeper than 0.75 px of defocus per px (a real surface that steep would hide itself), and a pixel without a
    plateau of its own; it takes the nearer of the lowest and highest disparity around it, within 1/300 of the width. Hard edges and slopes
    stay as they are.

    disparity [H, W] -> [H, W]
    """
    if k == 0:
        return disparity
    radius = math.ceil(disparity.shape[1] / 300)
    return by_rows(lambda part: _harden(part, k, radius), disparity, max(radius, 2))


def _harden(disparity: torch.Tensor, k: float, radius: int) -> torch.Tensor:
    height, width = disparity.shape
    padded = F.pad(disparity[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    steepest, level = torch.zeros_like(disparity), torch.zeros_like(disparity, dtype=torch.uint8)
    for y in range(3):
        for x in range(3):
            difference = (padded[y : y + height, x : x + width] - disparity).abs_().mul_(abs(k))
            torch.maximum(steepest, difference, out=steepest)
            level += difference < 0.25
    steep = box_max((steepest > 0.75).to(disparity), 1) > 0
    ramp = steep & (level < 4)  # no plateau: that would be itself and three of its eight neighbours
    if not bool(ramp.any()):
        return disparity
    high, low = box_max(disparity, radius), box_min(disparity, radius)
    return torch.where(ramp, torch.where(disparity - low < high - disparity, low, high), disparity)


def _colours(x: torch.Tensor, weight: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean colours [3, H, W], their variance [H, W], mean weight [H, W]) of the weighted pixels around each."""
    share = box_mean(weight[None], radius)
    total = share.clamp_min(1e-6)
    mean = box_mean(x * weight, radius) / total
    return mean, (box_mean(x * x * weight, radius) / total - mean * mean).clamp_min(0).mean(0), share[0]


def edge_alpha(color: torch.Tensor, near: torch.Tensor, jump: torch.Tensor) -> torch.Tensor:
    """Coverage of the pixels along a silhouette, from their colours: [H, W] 0..1.

    A depth map says on which side of a silhouette a pixel lies, not how much of it is covered; its colour does: I = a F + (1 - a) B,
    with F and B continued from the pure pixels of either side. The estimate is the posterior mean for that mixture, with the hard mask
    as prior and the local colour variances as noise, so that where texture makes colours unreliable the hard mask stays.

    color  [3, H, W] linear light
    near   [H, W] bool, the nearer side
    jump   [H, W] bool, pixels next to a depth jump; elsewhere the answer is the mask
    """
    mask = near.to(color)
    if not bool(jump.any()):
        return mask
    soft = box_mean(box_mean(mask[None], 1), 1)[0]
    soft = torch.where(near, soft.clamp(0.5, 1), soft.clamp(0, 0.5))
    x = color.clamp_min(0).sqrt()  # roughly perceptual: equal errors count equally in light and shade

    def side(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return harmonic_fill(x, weight, cycles=0)[:, jump], _colours(x, weight, 3)[1][jump]

    behind, behind_var = side((1 - soft) ** 4)
    front, front_var = side(soft**4)
    out, mask, near, x = mask, mask[jump], near[jump], x[:, jump]  # nothing else is asked for
    line = front - behind
    along, length = ((x - behind) * line).sum(0), (line * line).sum(0)
    noise = PRIOR + CONTRAST * torch.where(near, front_var, behind_var)
    alpha = ((along + noise * mask) / (length + noise)).clamp(0, 1)
    noise = noise + RESIDUAL * (x - behind - alpha * line).square().sum(0)  # colours off the line between F and B explain nothing
    alpha = (along + noise * mask) / (length + noise)
    alpha = torch.where(near, alpha.clamp(0.5, 1), alpha.clamp(0, 0.5))
    out[jump] = torch.where(alpha > 1 - CERTAIN, 1.0, torch.where(alpha < CERTAIN, 0.0, alpha))
    return out


# Noise model of edge_alpha, in the square-root domain (developed on our own synthetic scenes).
PRIOR, CONTRAST, RESIDUAL = 0.01, 3.0, 3.0
CERTAIN = 0.13  # guessed coverage this close to 0 or 1 is rounded to it: a missed sliver shows less than a leaking background
PURE = 0.1  # coverage this close to 0 or 1 says nothing of the other side


SNAP_WINDOW = 8  # px around a pixel in which each side's colours are measured
SNAP_EVIDENCE = 3.0  # how much likelier (log of the likelihood, twice) the other side's colours must be


def snap_to_colors(color: torch.Tensor, disparity: torch.Tensor, cuts: list[float], k: float, frame: int | None = None) -> torch.Tensor:
    """Move misplaced depth edges to where the colours change: [H, W] disparity -> [H, W].

    Pixels within 1/256 of the width of a depth jump are judged by the colours of the pixels farther in on either side (mean and variance
    in a window): one that fits the other side clearly better takes its depth. Flat surroundings move, texture stays. Worth 1 to 8 dB
    where depth is shrunk by 2 px, but costs up to 2.5 dB where it is exact and hair-fine: a matte is always better.

    color [3, H, W] linear light; cuts and k as for `build_scene`; frame: width in px of the whole picture, where this is a part of it.
    """
    x = color.clamp_min(0).sqrt()
    reach = math.ceil((frame or color.shape[-1]) / 256)
    for cut in cuts:
        near = disparity > cut
        band = box_max((_jump(disparity, k) & _beside(near)).to(color), reach) > 0
        fits, grown, known = [], [], band
        for side in (near & ~band, ~near & ~band):
            weight = side.to(color)
            mean, variance, share = _colours(x, weight, SNAP_WINDOW)
            variance = variance + 0.002
            fits.append((x - mean).square().mean(0) / variance + variance.log())
            grown.append(harmonic_fill(disparity[None], weight, cycles=0)[0])
            known = known & (share > 0.03)
        evidence = box_mean(torch.where(known, fits[1] - fits[0], 0)[None], 1)[0]  # > 0: like the near side
        far = near & known & (evidence < -SNAP_EVIDENCE)
        forward = ~near & known & (evidence > SNAP_EVIDENCE)
        disparity = torch.where(far, grown[1], torch.where(forward, grown[0], disparity))
    return disparity


BAND = 10  # px at widths up to 1024, in proportion above: depth this close to a matte's edge is not believed


def believed_band(width: int) -> int:
    """px around a matte's edge in which depth is not believed, for pictures of a width."""
    return max(BAND, math.ceil(BAND * width / 1024))


def bands(matte: torch.Tensor, band: int) -> tuple[int, int]:
    """The band in px inside and outside of a matte [H, W], narrowed where nothing of that side is as far from the edge."""
    found = []
    for inside in (matte, 1 - matte):
        reach = band
        while reach > 1 and not bool((by_rows(lambda part, r=reach: box_max((part < 1 - PURE).to(part), r), inside, reach) == 0).any()):
            reach //= 2
        found.append(reach)
    return tuple(found)


def regrow(
    disparity: torch.Tensor, matte: torch.Tensor, reaches: tuple[int, int] | None = None, rim: Rim | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Disparity of the matted subject and of what surrounds it, each continued over the matte's edge: two [H, W].

    disparity, matte  [H, W]; matte 0..1, 1 = subject
    reaches           as from `bands`; None = of this matte
    rim               where the picture goes on beyond this part of it

    Depth maps are wrong by a few pixels along silhouettes, a matte is not. So both sides are grown again over the band within BAND px of
    the matte's edge from what lies farther in (RENDERERS.md, section 0, point 4). In the band a pixel keeps its own depth only if that
    fits its side of the matte better than the other side. Where a side is thinner than the band, the band narrows.
    """
    grown = []
    for n, (inside, reach) in enumerate(zip((matte, 1 - matte), reaches or bands(matte, believed_band(matte.shape[-1])), strict=True)):
        core = box_max((inside < 1 - PURE).to(matte), reach) == 0
        core = (core if bool(core.any()) else inside > 0.5).to(disparity)
        values = disparity[None].clone()
        if rim is not None:
            rim.tie(values, core, rim.overview.grown[n : n + 1])
        grown.append(harmonic_fill(values, core)[0])
    subject, around = grown
    own = (disparity - subject).abs() <= (disparity - around).abs()
    return torch.where((matte > 0.5) & own, disparity, subject), torch.where((matte <= 0.5) & ~own, disparity, around)


def _label(disparity: torch.Tensor, cuts: list[float]) -> torch.Tensor:
    label = torch.zeros_like(disparity, dtype=torch.uint8)
    for cut in cuts:
        label += disparity > cut
    return label


def _jump(disparity: torch.Tensor, k: float) -> torch.Tensor:
    """[H, W] bool: pixels with a depth jump to one of their neighbours."""
    return (box_max(disparity, 1) - box_min(disparity, 1)) * abs(k) > JUMP


def _beside(mask: torch.Tensor) -> torch.Tensor:
    """[H, W] bool: pixels next to a border of the mask, on both sides."""
    m = mask.float()
    return box_max(m, 1) > box_min(m, 1)


def build_scene(
    color: torch.Tensor,
    disparity: torch.Tensor,
    cuts: list[float],
    k: float,
    matte: torch.Tensor | None = None,
    plate: torch.Tensor | None = None,
    check: Callable[[], None] | None = None,
    reaches: tuple[int, int] | None = None,
    rim: Rim | None = None,
) -> Scene:
    """Cut a picture, or a part of it, into complete layers.

    color      [3, H, W] linear light
    disparity  [H, W]
    cuts       ascending disparities from `thresholds`
    k          px of defocus per unit of disparity: says which disparity steps are silhouettes
    matte      [H, W] 0..1 coverage of a subject, to be believed more than depth; its edge is the silhouette
    plate      [3, H, W] linear light, the scene without the subject (true or inpainted): shown where something nearer hides the rest
    check      called between steps; may raise to interrupt
    reaches    for `regrow`; None = of this matte
    rim        where the picture goes on beyond this part of it

    Silhouette pixels are split between the layers they mix. What a nearer layer hides is taken from the plate, or else continued smoothly
    from what is visible, in colour and in disparity; the farthest layer covers everything.
    """
    if matte is not None:
        subject, around = regrow(disparity, matte, reaches, rim)
        disparity = torch.where(matte > 0.5, subject, around)
    label = _label(disparity, cuts)
    # Which layer the plate shows: the surroundings of the subject, or without a matte the farthest layer.
    farthest = int(label.min()) if rim is None else min(rim.overview.scene.numbers)
    uncovered = _label(around, cuts) if matte is not None else torch.full_like(label, farthest)
    present = [i for i in range(len(cuts) + 1) if bool((label == i).any())]
    jump = _jump(disparity, k)

    # covered[n]: how much of a pixel the layers from present[n] forward take.
    covered = [torch.ones_like(disparity)]
    for index in present[1:]:
        if check is not None:
            check()
        near = label >= index
        cover = edge_alpha(color, near, jump & _beside(near))
        if matte is not None:
            known = matte * (subject > cuts[index - 1]) + (1 - matte) * (around > cuts[index - 1])
            cover = torch.where(box_max(((matte > 0) & (matte < 1)).to(matte), 1) > 0, known, cover)
        covered.append(cover)
    covered.append(torch.zeros_like(disparity))

    layers: list[Layer] = []
    behind = color
    for n, index in enumerate(present):
        if check is not None:
            check()
        own = label == index
        mine, nearer = covered[n], torch.minimum(covered[n + 1], covered[n])
        visible = nearer < PURE
        front = ((1 - mine) * behind).neg_().add_(color).div_(mine.clamp_min(1e-3)).clamp_min_(0) if n else color
        pure = own & visible & (mine > 1 - PURE)
        pure = pure if bool(pure.any()) else own
        hides = n + 1 < len(present)  # nothing hides the nearest layer: what lies beyond its edge is never seen
        beyond = None if rim is None else rim.layer(index)
        values, known = torch.cat([front, disparity[None]]), pure.to(color)
        if beyond is not None:
            rim.tie(values, known, beyond[:4])
        full = harmonic_fill(values, known, CYCLES if hides else 0)
        del values, known
        hidden = full[:3] if plate is None else torch.where(uncovered == index, plate, full[:3])
        shown, depth = torch.where(visible & (mine > 0), front, hidden), torch.where(own, disparity, full[3])
        full = hidden = front = None  # freed: there are as many again in the next fill
        if n == 0:
            alpha = torch.ones_like(disparity)
        else:
            values, known = own[None].to(color), (label <= index).to(color)
            if beyond is not None:
                rim.tie(values, known, beyond[4:])
            continues = harmonic_fill(values, known, cycles=1)[0] > 0.5
            alpha = torch.where(nearer < 0.5, (mine - nearer) / (1 - nearer), continues.to(color))
        layers.append(Layer(color=shown, alpha=alpha, disparity=depth))
        behind = shown if n == 0 else behind + alpha * (shown - behind)
    return Scene(tuple(layers), estimated=matte is None, numbers=tuple(present))
