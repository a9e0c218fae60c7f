"""Where the lens is focused: one disparity per frame, from a click, a mask, a box, keyframes, or found by itself.

All functions return [B] float32 in the unit of the disparity [B, H, W] (larger = nearer), and give the same answer every time.
"""

import json
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import BokehError


def from_value(value: float, frames: int) -> torch.Tensor:
    """[frames], the same disparity for all."""
    if not math.isfinite(value):
        raise BokehError(f"The focus value is {value}; expected a finite disparity.")
    return torch.full((frames,), float(value))


def from_point(disparity: torch.Tensor, x, y, radius: float = 0.01) -> torch.Tensor:
    """[B] disparity of the surface under a point.

    x, y    0..1 from the left and top edge; a number, or [B] for a point per frame
    radius  of the disc that is looked at, as a fraction of the image diagonal; never less than 3 x 3 px
    A stray pixel does not count. Where the disc holds several surfaces the one under the point wins: the others, and the smeared
    values between them, are left out.
    """
    frames, height, width = disparity.shape
    xs, ys = _per_frame(x, frames, "x"), _per_frame(y, frames, "y")
    r = max(radius * math.hypot(height, width), 1.5)
    focus = []
    for d, fx, fy in zip(_frames(disparity), xs, ys, strict=True):
        column, row = min(int(fx * width), width - 1), min(int(fy * height), height - 1)
        reach = int(r) + 1
        top, left = max(row - reach, 0), max(column - reach, 0)
        patch = d[top : row + reach + 1, left : column + reach + 1]
        dy = torch.arange(patch.shape[0])[:, None] - (row - top)
        dx = torch.arange(patch.shape[1])[None, :] - (column - left)
        distance2 = (dx * dx + dy * dy).float()
        near = torch.exp(-distance2 / (0.5 * r * r)) * (distance2 <= r * r)
        tolerance = 0.02 * float(d.max() - d.min()) + 1e-12
        middle = patch[(dx.abs() <= 1) & (dy.abs() <= 1)]
        under = d[row, column]
        supported = int(((middle - under).abs() <= tolerance).sum()) >= 3
        seed = under if supported else middle.median()
        focus.append(_surface(patch, near / (_slope(patch) + tolerance), seed, tolerance))
    return torch.stack(focus).to(disparity.device)


def from_mask(disparity: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B] median disparity of the masked subject, weighted by the mask.

    mask [B or 1, H', W'] or [H', W'] 0..1, of any size: it is resized to the disparity. A frame whose mask is empty (less than half a
    pixel in all) gets the automatic focus instead.
    """
    frames, height, width = disparity.shape
    mask = mask.float().reshape(-1, *mask.shape[-2:])
    if len(mask) not in (1, frames):
        raise BokehError(f"There are {len(mask)} focus masks for {frames} frames of depth; give one for all, or one for each.")
    if not bool(torch.isfinite(mask).all()):
        raise BokehError("The focus mask holds NaN or infinite values; expected 0..1.")
    focus = []
    for d, weight in zip(_frames(disparity), mask.expand(frames, -1, -1), strict=True):
        weight = weight.cpu()
        if weight.shape != d.shape:
            weight = F.interpolate(weight[None, None], size=(height, width), mode="bilinear", align_corners=False, antialias=True)[0, 0]
        weight = weight.clamp(min=0.0)
        focus.append(_weighted_median(d, weight) if float(weight.sum()) >= 0.5 else auto(d[None])[0])
    return torch.stack(focus).to(disparity.device)


def from_box(disparity: torch.Tensor, box: tuple[float, float, float, float]) -> torch.Tensor:
    """[B] disparity of the main surface in the box (left, top, right, bottom), each 0..1; the middle of the box counts most."""
    height, width = disparity.shape[-2:]
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise BokehError(f"The focus box is {tuple(box)}; expected left < right and top < bottom, all from 0 to 1.")
    x0, y0 = min(int(left * width), width - 1), min(int(top * height), height - 1)
    x1, y1 = max(math.ceil(right * width), x0 + 1), max(math.ceil(bottom * height), y0 + 1)
    focus = []
    for d in _frames(disparity):
        patch = d[y0:y1, x0:x1]
        weight = _bell(patch.shape[0], 0.5, 0.25)[:, None] * _bell(patch.shape[1], 0.5, 0.25)[None, :]
        tolerance = 0.02 * float(d.max() - d.min()) + 1e-12
        weight = weight / (_slope(patch) + tolerance)
        focus.append(_surface(patch, weight, _weighted_median(patch, weight), tolerance))
    return torch.stack(focus).to(disparity.device)


def smooth(focus: torch.Tensor, median: int = 5, sigma: float = 2.0) -> torch.Tensor:
    """[B] a per-frame focus made steady for video: running median against jumps, then a Gaussian.

    median: odd window in frames, 1 = off. sigma: frames, 0 = off. The ends are held.
    """
    if median < 1 or median % 2 == 0 or sigma < 0:
        raise BokehError(f"Smoothing got median {median} and sigma {sigma}; expected an odd window of 1 or more and a sigma of 0 or more.")
    if median > 1:
        focus = _hold_ends(focus, median // 2).unfold(0, median, 1).median(dim=1).values
    if sigma > 0:
        reach = math.ceil(3 * sigma)
        weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=focus.dtype, device=focus.device) / sigma) ** 2)
        focus = _hold_ends(focus, reach).unfold(0, 2 * reach + 1, 1) @ (weight / weight.sum())
    return focus.clone()


EASINGS = {
    "linear": lambda t: t,
    "ease": lambda t: t * t * (3 - 2 * t),
    "ease-in": lambda t: t * t,
    "ease-out": lambda t: t * (2 - t),
    "hold": lambda t: 0.0 if t < 1 else 1.0,
}


@dataclass(frozen=True)
class Keyframe:
    """At `frame` (0 = first) the track is at `value`: a number, or a point (x, y) 0..1 whose depth is looked up in that frame.

    easing: how the way from the keyframe before to this one runs, one of EASINGS; `hold` stays at the old value and jumps here.
    """

    frame: int
    value: float | tuple[float, float]
    easing: str = "linear"


@dataclass(frozen=True)
class FocusTrack:
    """Keyframes over time, of focus (disparity values or points) or of any other number such as the strength."""

    keys: tuple[Keyframe, ...]

    def __post_init__(self):
        if not self.keys:
            raise BokehError("The track has no keyframe; write at least one, such as `0: 0.9`.")
        for key in self.keys:
            if key.easing not in EASINGS:
                raise BokehError(f"The track uses the easing '{key.easing}', which is unknown; use one of {', '.join(EASINGS)}.")
            numbers = key.value if isinstance(key.value, tuple) else (key.value,)
            if key.frame < 0 or not all(math.isfinite(n) for n in numbers):
                raise BokehError(f"The keyframe at frame {key.frame} holds {key.value}; expected a frame of 0 or more and finite numbers.")
            if len(numbers) == 2 and not all(0 <= n <= 1 for n in numbers):
                raise BokehError(f"The keyframe at frame {key.frame} is at the point {key.value}; expected x and y from 0 to 1.")
        frames = [key.frame for key in self.keys]
        if len(set(frames)) < len(frames):
            double = next(f for f in frames if frames.count(f) > 1)
            raise BokehError(f"The track has two keyframes at frame {double}; keep one of them.")
        object.__setattr__(self, "keys", tuple(sorted(self.keys, key=lambda key: key.frame)))

    @classmethod
    def parse(cls, text: str) -> "FocusTrack":
        """A track from text.

        Short form `0: 0.9, 24: 0.35 ease, 48: (0.5, 0.4) hold`: frame, value or point, easing of the way to it. Keyframes are parted
        by comma, semicolon or line break. Or JSON: [{"frame": 0, "value": 0.9}, {"frame": 24, "point": [0.5, 0.4], "easing": "ease"}]
        or [[0, 0.9], [24, 0.35, "ease"]]. Raises BokehError naming the piece that can not be read.
        """
        return cls(tuple(_keys_from_json(text) if text.lstrip().startswith("[") else _keys_from_text(text)))

    def values(self, frames: int, disparity: torch.Tensor | None = None) -> torch.Tensor:
        """[frames] float32. Before the first and after the last keyframe its value is held.

        disparity [frames or 1, H, W], needed when the track holds points; a point beyond the last frame is looked up in the last.
        """
        keys = [(key.frame, self._number(key, disparity), EASINGS[key.easing]) for key in self.keys]
        track = []
        for frame in range(frames):
            before = [key for key in keys if key[0] <= frame]
            after = [key for key in keys if key[0] > frame]
            if not before or not after:
                track.append(before[-1][1] if before else keys[0][1])
                continue
            (f0, v0, _), (f1, v1, easing) = before[-1], after[0]
            track.append(v0 + (v1 - v0) * easing((frame - f0) / (f1 - f0)))
        return torch.tensor(track, dtype=torch.float32)

    def _number(self, key, disparity):
        if not isinstance(key.value, tuple):
            return float(key.value)
        if disparity is None:
            raise BokehError(f"The keyframe at frame {key.frame} is a point {key.value}; expected a number here.")
        frame = min(key.frame, len(disparity) - 1)
        return float(from_point(disparity[frame : frame + 1], *key.value)[0])


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_KEY = re.compile(rf"\s*(\d+)\s*:\s*(?:({_NUMBER})|\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\))(?:\s+([a-z-]+))?\s*")
_BETWEEN_KEYS = re.compile(r"[,;\n](?![^(]*\))")  # not the comma inside a point


def _keys_from_text(text):
    for piece in _BETWEEN_KEYS.split(text):
        if not piece.strip():
            continue
        match = _KEY.fullmatch(piece)
        if match is None:
            raise BokehError(
                f"The track has a piece '{piece.strip()}' that can not be read; write `frame: value easing`, such as `24: 0.35 ease`, "
                "or a point, such as `24: (0.5, 0.4)`."
            )
        frame, value, x, y, easing = match.groups()
        yield Keyframe(int(frame), float(value) if value is not None else (float(x), float(y)), easing or "linear")


def _keys_from_json(text):
    try:
        pieces = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BokehError(f"The track starts like JSON but can not be read: {error}.") from error
    for piece in pieces:
        try:
            if isinstance(piece, dict):
                frame, value, easing = piece["frame"], piece.get("value", piece.get("point")), piece.get("easing", "linear")
            else:
                frame, value, easing = (*piece, "linear")[:3]
            if int(frame) != frame or not isinstance(easing, str):
                raise ValueError
            if isinstance(value, list):
                x, y = value
                value = (float(x), float(y))
            else:
                value = float(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BokehError(
                f"The track has a piece {json.dumps(piece)} that can not be read; write "
                '{"frame": 24, "value": 0.35, "easing": "ease"} or [24, 0.35, "ease"].'
            ) from error
        yield Keyframe(int(frame), value, easing)


def auto(disparity: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
    """[B] disparity of the likely subject, found from depth and position (and sharpness, given the image).

    image [B, 3, H', W'] 0..1, optional: detailed places count more than plain ones.

    Every pixel votes for its own disparity. The vote is large near the middle of the picture (small at the bottom edge, where floors
    and table tops lie) and for whatever stands out in front of its own row: a floor or a wall spans the row and does not, a person or
    an object does. The focus is where the votes gather. A constant map gives its constant. Frames are judged one by one: use `smooth`
    on a video. The rule is ours.
    """
    if image is not None and len(image) not in (1, len(disparity)):
        raise BokehError(f"There are {len(image)} images for {len(disparity)} frames of depth; give one for all, or one for each.")
    pictures = [None] * len(disparity) if image is None else image.expand(len(disparity), -1, -1, -1)
    focus = [_likely_subject(d, picture) for d, picture in zip(_frames(disparity), pictures, strict=True)]
    return torch.stack(focus).to(disparity.device)


def _likely_subject(disparity, picture):
    """One frame of `auto`: disparity [H, W], picture [3, H', W'] or None."""
    scale = _AUTO_SIZE / max(disparity.shape)
    height, width = (max(round(side * scale), 8) for side in disparity.shape)
    small = F.interpolate(disparity[None, None], size=(height, width), mode="nearest-exact")[0, 0]
    low, high = small.aminmax()
    span = (high - low).clamp(min=1e-12)
    depth = (small - low) / span

    background = depth.kthvalue(1 + int(0.3 * (width - 1)), dim=1, keepdim=True).values  # of each row, floor included
    standing_out = (depth - background).clamp(min=0.0) ** 1.5
    position = _bell(height, 0.5, 0.2)[:, None] * _bell(width, 0.5, 0.22)
    votes = position * (standing_out + 0.05 * depth + 1e-3)
    if picture is not None:
        votes = votes * _detail(picture, (height, width))

    levels = torch.linspace(0, 1, 101)
    gathered = torch.exp(-0.5 * ((levels[:, None] - depth.flatten()) / 0.04) ** 2) @ votes.flatten()
    best = levels[gathered.argmax()]
    close = (depth - best).abs() <= 0.06
    return low + span * (_weighted_median(depth[close], votes[close]) if bool(close.any()) else best)


_AUTO_SIZE = 128  # px, long side at which the automatic focus looks


def _detail(picture, size):
    """[h, w] 0.5 .. 1.5, more where the picture has fine contrast."""
    grey = F.interpolate(picture.cpu().float().mean(dim=0)[None, None], size=(2 * size[0], 2 * size[1]), mode="area")
    contrast = (grey - F.avg_pool2d(grey, 5, stride=1, padding=2, count_include_pad=False)).abs()
    contrast = F.avg_pool2d(F.avg_pool2d(contrast, 2), 9, stride=1, padding=4, count_include_pad=False)[0, 0]
    return 0.5 + contrast / contrast.max().clamp(min=1e-6)


def _frames(disparity):
    """The frames [H, W] one by one on the CPU: the answers are then the same on every device, some of which lack float64."""
    return (d.cpu().float() for d in disparity)


def _surface(values, weights, seed, tolerance):
    """Weighted median of the surface that `seed` lies on.

    The values are split in two where the variance between the halves is largest (Otsu 1979), as long as that is a real gap rather
    than a slope, and the half on the seed's side is kept.
    """
    values, order = values.flatten().sort()
    weights = weights.flatten()[order]
    values, weights = values[weights > 0], weights[weights > 0]
    smallest = 0.02 * weights.sum()
    for _ in range(4):
        split = _otsu(values, weights, smallest)
        if split is None or float(values[split:].median() - values[:split].median()) <= 1.5 * tolerance:
            break
        border = 0.5 * (_weighted_median(values[:split], weights[:split]) + _weighted_median(values[split:], weights[split:]))
        keep = values >= border if seed >= border else values < border
        values, weights = values[keep], weights[keep]
    return _weighted_median(values, weights)


def _otsu(values, weights, smallest):
    """Index that splits sorted values in two clear clusters, each of weight `smallest` or more; None when there are none."""
    if len(values) < 2:
        return None
    w = weights.double()
    w0, m0 = w.cumsum(0)[:-1], (w * values).cumsum(0)[:-1]
    total, mean = w.sum(), (w * values).sum() / w.sum()
    variance = (w * (values - mean) ** 2).sum() / total
    between = (mean * w0 - m0) ** 2 / (w0 * (total - w0))
    between = between.where((w0 >= smallest) & (total - w0 >= smallest), torch.zeros_like(between))
    best = int(between.argmax())
    # An even slope reaches 0.75, two clean surfaces 1.
    return best + 1 if float(between[best]) > 0.85 * float(variance) else None


def _slope(d):
    """Size of the central difference, [H, W]: high on the smeared pixels between two surfaces, 0 on a thin line's own pixels."""
    padded = F.pad(d[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    gx = padded[1:-1, 2:] - padded[1:-1, :-2]
    gy = padded[2:, 1:-1] - padded[:-2, 1:-1]
    return 0.5 * torch.hypot(gx, gy)


def _weighted_median(values, weights):
    values, order = values.flatten().sort()
    total = weights.flatten()[order].double().cumsum(0)
    return values[int((total < 0.5 * total[-1]).sum())]


def _bell(length, centre, sigma):
    """[length] Gaussian over pixel centres 0..1."""
    at = (torch.arange(length) + 0.5) / length
    return torch.exp(-0.5 * ((at - centre) / sigma) ** 2)


def _hold_ends(values, count):
    return torch.cat([values[:1].expand(count), values, values[-1:].expand(count)])


def _per_frame(value, frames, name):
    values = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
    if len(values) not in (1, frames):
        raise BokehError(f"There are {len(values)} focus points for {frames} frames of depth; give one for all, or one for each.")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise BokehError(f"The focus point has {name} = {values.tolist()}; expected 0..1, from the left or top edge of the picture.")
    return values.expand(frames).tolist()
