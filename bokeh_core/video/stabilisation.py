"""Steady depth over time: where shots begin, and disparity without flicker."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..filters import box_mean

# find_shots
WATCHED = (36, 64)  # px at which frames are compared
ALIKE = 0.4  # frames this alike (see _likeness) belong to one shot
DROP = 0.15  # a cut is this much less alike than the frames on both of its sides: whip pans are unlike for several frames
AROUND = 3  # frames on each side that are compared over a suspected cut, so that a flash of up to two frames is none
OVERLAP = 0.4  # share of the frame that a pan must leave in view from one frame to the next

# smooth_disparity
SMALL = 256  # px, long side at which motion is measured
LEAK = 0.02  # share per frame by which scale and shift go back to the raw map's, so that they cannot drift for ever
COLOR_TOLERANCE = 0.06  # of display-encoded light: moved pixels that differ by this are half trusted
MOST = 0.92  # weight of the past at strength 1
DEPTH_TOLERANCE = 3.0  # times the usual difference from the past: what differs by more is another surface


def find_shots(frames: Iterable[torch.Tensor]) -> list[int]:
    """Numbers of the frames with which the shots of a clip begin; the first is always 0.

    frames  [3, H, W] display-encoded, taken one at a time; six small ones are kept

    Hard cuts only: fades and dissolves are not found. Two frames are compared by their contours at 64 x 36 px, over every shift that
    leaves 40 % of the picture in view, so that pans, focus pulls and changes of brightness keep a shot together. A cut is where none of
    the three frames before looks like any of the three after, and both sides are like themselves. The measure is ours.
    """
    shots, window, count, likes = [0], deque(), 0, {}

    def like(i: int, j: int) -> float:
        """Likeness of frames i < j of the clip, both in the window."""
        if (i, j) not in likes:
            first = count - len(window)
            likes[i, j] = _likeness(window[i - first], window[j - first])
        return likes[i, j]

    def judge(at: int) -> None:
        """Is there a cut before frame `at`? All of its surroundings that the clip has are in the window."""
        first = count - len(window)
        before, after = range(max(first, at - AROUND, shots[-1]), at), range(at, min(count, at + AROUND))
        across = like(at - 1, at)
        if across > ALIKE:
            return
        sides = [like(i, i + 1) for i in (at - 2, at) if i >= before[0] and i + 1 < count]
        alike = max(like(i, j) for i in before for j in after)
        if alike <= ALIKE and all(one >= across + DROP for one in sides):
            shots.append(at)

    for frame in frames:
        window.append(_contours(frame))
        count += 1
        if len(window) > 2 * AROUND:
            window.popleft()
            for pair in [pair for pair in likes if pair[0] < count - len(window)]:
                del likes[pair]
        if count > AROUND:
            judge(count - AROUND)
    for at in range(max(1, count - AROUND + 1), count):
        judge(at)
    return shots


def _contours(frame: torch.Tensor) -> torch.Tensor:
    """[h, w] the band between fine detail and large areas of a frame, at the size of WATCHED, in units of its own local contrast."""
    grey = F.interpolate(frame[None].float(), size=WATCHED, mode="area").clamp(0, 1).mean(1, keepdim=True)
    band = grey - box_mean(grey, 4)
    return (band / (box_mean(band * band, 8).sqrt() + 0.01))[0, 0]


def _likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest correlation -1..1 of two pictures [h, w] over all shifts, a little less for those that leave little in common."""
    height, width = a.shape
    size = (2 * height, 2 * width)

    def correlate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x, size) * torch.fft.rfft2(y, size).conj(), size)

    ones = torch.ones_like(a)
    common = correlate(ones, ones) / ones.numel()
    energy = (correlate(a * a, ones) * correlate(ones, b * b)).clamp_min(1e-9).sqrt()
    return float((correlate(a, b) / energy * common.sqrt())[common >= OVERLAP].max())


def smooth_disparity(
    frames: Iterable[torch.Tensor],
    maps: Iterable[torch.Tensor],
    shots: list[int] | None = None,
    strength: float = 0.7,
    *,
    metric: bool = False,
) -> Iterator[torch.Tensor]:
    """The maps of a clip without flicker, in the same pieces as they come. For models that see one frame at a time.

    frames    [3, H, W] display-encoded, one per map, in order
    maps      [n, h, w] float32 some at a time; disparity of any scale, larger = nearer, or metres when `metric`
    shots     numbers of the frames at which a shot begins: nothing is carried over
    strength  0..1; 0 gives the maps as they are

    Each map is first brought to the scale and shift of the past (metres: the scale alone), which follows the raw maps slowly. Then it is
    averaged with the past, moved along the motion of the picture, where colours and depth agree: what moves otherwise, appears, or
    lies at another depth keeps its own value, so edges are never smeared. Keeps one map and one small frame. The method is ours.
    """
    if not 0 <= strength <= 1:
        raise BokehError(f"The strength of smoothing is {strength}; expected 0 (off) to 1.")
    frames, starts, past = iter(frames), set(shots or ()), None
    number = itertools.count()
    for some in maps:
        smooth = torch.empty_like(some)
        for i, raw in enumerate(some):
            frame = next(frames, None)
            if frame is None:
                raise BokehError("There are fewer frames than depth maps to smooth; expected one for each.")
            if strength == 0:
                smooth[i] = raw
                continue
            past = None if next(number) in starts else past
            disparity = raw.clamp_min(1e-6).reciprocal() if metric else raw.float()
            past = _steadied(disparity, _small(frame.to(raw.device)), past, MOST * strength, metric)
            smooth[i] = torch.where(past[0] > 1e-5, past[0].reciprocal(), raw) if metric else past[0]
        yield smooth


def _steadied(disparity, frame, past, weight: float, metric: bool):
    """(disparity [h, w], small frame, scale, shift): the map joined to the past of the same form, or None."""
    if past is None:
        return disparity, frame, 1.0, 0.0
    before, frame_before, scale, shift = past
    flow = _motion(_normalised(frame), _normalised(frame_before))
    moved_frame = _moved(frame_before, flow)
    trust = torch.exp(-((frame - moved_frame).abs().mean(1, keepdim=True) / COLOR_TOLERANCE).square())
    size = disparity.shape
    flow = F.interpolate(flow, size=size, mode="bilinear", align_corners=False)  # in fractions of the picture
    expected = _moved(before[None, None], flow)[0, 0]

    few = tuple(min(side, SMALL) for side in size)
    now, then = (F.interpolate(x[None, None], size=few, mode="nearest-exact")[0, 0] for x in (disparity, expected))
    sure = F.interpolate(trust, size=few, mode="nearest-exact")[0, 0] > 0.5
    if float(sure.float().mean()) > 0.05:
        found = _scale_and_shift(now[sure], then[sure], metric)
        scale, shift = (found[0] ** (1 - LEAK), found[1] * (1 - LEAK)) if found else (scale, shift)
    aligned = disparity * scale + shift
    difference = (expected - aligned).abs()
    usual = (then - now * scale - shift).abs()[sure]
    span = float(now.max() - now.min()) * scale
    tolerance = DEPTH_TOLERANCE * max(1.48 * float(usual.median()) if usual.numel() else 0.0, 0.002 * span, 1e-12)
    trust = F.interpolate(trust, size=size, mode="bilinear", align_corners=False)[0, 0]
    trust = trust * (1 - (difference / tolerance).square()).clamp_min(0)
    return torch.lerp(aligned, expected, weight * trust), frame, scale, shift


def _scale_and_shift(now: torch.Tensor, then: torch.Tensor, metric: bool) -> tuple[float, float] | None:
    """Scale and shift that bring values [n] to those of the past; robust. None for a flat map."""
    if metric:
        return float((then / now.clamp_min(1e-9)).median()), 0.0
    for _ in range(3):
        middle, target = now.median(), then.median()
        # The ratio of spreads, not a regression: that would shrink the range a little with every frame.
        a, b = (now - middle).abs().mean(), (then - target).abs().mean()
        if not float(a) > 1e-9 or not float(b) > 1e-9:
            return None
        scale = float(b / a)
        shift = float(target) - scale * float(middle)
        off = (then - now * scale - shift).abs()
        fits = off <= 3 * 1.48 * off.median() + 1e-12
        if int(fits.sum()) < 16:
            break
        now, then = now[fits], then[fits]
    return scale, shift


def _small(frame: torch.Tensor) -> torch.Tensor:
    """[1, 3, h, w] with a long side of SMALL or less."""
    height, width = frame.shape[-2:]
    scale = min(1.0, SMALL / max(height, width))
    size = (max(8, round(height * scale)), max(8, round(width * scale)))
    return F.interpolate(frame[None].float(), size=size, mode="area").clamp(0, 1)


def _normalised(frame: torch.Tensor) -> torch.Tensor:
    """[1, 1, h, w] local contrast, the same in light and shade."""
    grey = frame.mean(1, keepdim=True)
    band = grey - box_mean(grey, 5)
    return band / (box_mean(band * band, 5).sqrt() + 0.02)


def _moved(picture: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """picture [1, C, h, w] fetched from where flow [1, 2, h, w] (x, y as fractions of width and height) points."""
    _, _, height, width = picture.shape
    y = (torch.arange(height, device=flow.device) + 0.5) / height
    x = (torch.arange(width, device=flow.device) + 0.5) / width
    grid = torch.stack([x + flow[0, 0], y[:, None] + flow[0, 1]], -1) * 2 - 1
    return F.grid_sample(picture, grid[None].to(picture), mode="bilinear", padding_mode="border", align_corners=False)


def _motion(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Where each pixel of `now` [1, 1, h, w] lay before: [1, 2, h, w] (x, y) as fractions of width and height.

    Lucas and Kanade (1981) in a window of 7 px over a pyramid. Motion below a twentieth of a pixel is none.
    """
    levels = [(now, before)]
    while min(levels[-1][0].shape[-2:]) >= 24:
        levels.append(tuple(F.avg_pool2d(x, 2) for x in levels[-1]))
    flow = now.new_zeros(1, 2, *levels[-1][0].shape[-2:])
    for a, b in reversed(levels):
        height, width = a.shape[-2:]
        pixels = a.new_tensor([width, height]).view(1, 2, 1, 1)
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
        p = F.pad(a, (1, 1, 1, 1), mode="replicate")
        dx, dy = (p[..., 1:-1, 2:] - p[..., 1:-1, :-2]) / 2, (p[..., 2:, 1:-1] - p[..., :-2, 1:-1]) / 2
        xx, xy, yy = box_mean(torch.cat([dx * dx, dx * dy, dy * dy], 1), 3).split(1, 1)
        xx, yy = xx + 0.01, yy + 0.01  # plain places keep the motion of the coarser level
        for _ in range(3):
            off = a - _moved(b, flow)
            sx, sy = box_mean(torch.cat([dx * off, dy * off], 1), 3).split(1, 1)
            determinant = xx * yy - xy * xy
            step = torch.cat([yy * sx - xy * sy, xx * sy - xy * sx], 1) / determinant
            flow = box_mean(flow + step.clamp(-1, 1) / pixels, 1)
    still = ((flow * pixels).square().sum(1, keepdim=True) < 0.05**2).to(flow)
    return flow * (1 - still)
