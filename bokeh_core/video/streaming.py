"""Long clips in bounded memory: depth measured once over the whole clip, then frames rendered a few at a time."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import BokehError
from ..media import Picture
from ..optics.defocus import Defocus, clip_span, disparity_from_distance, fit_disparity
from ..optics.lens import Lens
from ..render import render, shot_cuts
from .clips import Frames, VideoFile, open_clip

T = TypeVar("T")
Progress = Callable[[int, int], None] | None

CHUNK_PIXELS = 1 << 21  # one Full HD frame; a chunk is at most this many pixels, or one frame
SAMPLES = 8  # frames that stand for a whole clip


def chunk_length(height: int, width: int) -> int:
    """How many frames of this size to hold at once: 1 from Full HD up, at most 16."""
    return max(1, min(16, CHUNK_PIXELS // max(1, height * width)))


def chunks(items: Iterable[T], length: int) -> Iterator[list[T]]:
    """Lists of `length` items, the last one shorter. Takes nothing from `items` ahead of need."""
    items = iter(items)
    while chunk := list(itertools.islice(items, length)):
        yield chunk


class DepthClip:
    """The disparity of a clip, frame by frame, larger = nearer, in one unit and range.

    path           picture (serves every frame), folder or video
    frames, size   number and (height, width) of the frames it belongs to; maps of another size are resized to them
    unit           "relative": as stored, near = large; "metres": distance, becomes 1/m; "disparity": 1/m
    far_is_bright  relative maps only: values are mirrored, v -> low + high - v with (low, high) the clip's span
    progress       called as progress(done, total) while the whole clip is read once to be checked and measured

    span     (farthest, nearest): (0, 1) for relative maps within 0..1, else the clip's minimum and maximum
    metric   whether disparities are 1/m
    samples  [S, H, W] up to 8 frames evenly spread over the clip
    note     a sentence for the user, or empty

    Raises BokehError for wrong counts, another shape, NaN, infinity (allowed in metres: no surface), constant depth.
    """

    def __init__(
        self, path: str | Path, frames: int, size: tuple[int, int], unit="relative", far_is_bright=False, progress: Progress = None
    ):
        self.source: Frames | VideoFile = open_clip(path)
        self.path, self.frames, self.size, self.unit, self.far_is_bright = Path(path), frames, size, unit, far_is_bright
        self.metric = unit != "relative"
        if far_is_bright and self.metric:
            raise BokehError(f"Depth in {unit} says by itself what is near; leave far-is-bright out.")
        if len(self.source) != frames and not self.source.is_picture:
            raise BokehError(
                f"{path} has {len(self.source)} depth maps for {frames} frame{'s' * (frames > 1)}; "
                "expected one for each, or a single picture for all."
            )
        if self.metric and not self.source.holds_floats():
            raise BokehError(f"{path}: depth in {unit} needs a file of floats (EXR or .npy); this one holds integers, so its unit is lost.")
        self.note = self._check_shape()
        self._still = None
        self.span = (0.0, 0.0)
        self._measure(progress)

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[torch.Tensor]:
        """[H, W] float32 at the frames' size, one per frame."""
        low, high = self.span
        for disparity in self._raw():
            yield low + high - disparity if self.far_is_bright else disparity

    def _check_shape(self) -> str:
        (height, width), (h, w) = self.size, self.source.size
        if (h, w) == (height, width):
            return ""
        if abs((w / h) / (width / height) - 1) > 0.02:
            raise BokehError(
                f"{self.path}: the depth map is {w} x {h} but the picture is {width} x {height}, another shape; "
                "expected the same view, so crop or turn one of them."
            )
        return f"the depth map is {w} x {h} and was resized to the picture's {width} x {height}."

    def _raw(self) -> Iterator[torch.Tensor]:
        if self._still is not None:
            yield from itertools.repeat(self._still, self.frames)
            return
        for index, plane in enumerate(self.source.planes("depth map")):
            disparity = self._checked(plane, index)
            disparity = fit_disparity(disparity[None], 1, *self.size)[0]
            if self.source.is_picture:
                self._still = disparity
                yield from itertools.repeat(disparity, self.frames)
                return
            yield disparity

    def _checked(self, plane: torch.Tensor, index: int) -> torch.Tensor:
        if tuple(plane.shape) != self.source.size:
            raise BokehError(f"{self.path}: depth map {index} has another size than the first; expected one size for the clip.")
        where = f"{self.path}" if self.source.is_picture else f"{self.path}, frame {index}"
        if plane.isnan().any():
            raise BokehError(f"{where}: {int(plane.isnan().sum())} depth values are NaN; fill them before use.")
        if self.unit == "metres":
            if float(plane.min()) < 0:
                raise BokehError(
                    f"{where}: the depth holds negative distances ({float(plane.min()):g} m); expected metres from the camera."
                )
            return disparity_from_distance(plane[None])[0]
        if plane.isinf().any():
            raise BokehError(f"{where}: {int(plane.isinf().sum())} depth values are infinite; fill them, or say that the unit is metres.")
        return plane

    def _measure(self, progress: Progress) -> None:
        chosen = {round(i * (self.frames - 1) / max(1, SAMPLES - 1)) for i in range(SAMPLES)}
        low, high, samples = float("inf"), float("-inf"), []
        for index, disparity in enumerate(self._raw()):
            a, b = map(float, disparity.aminmax())
            low, high = min(low, a), max(high, b)
            if index in chosen and (self._still is None or not samples):
                samples.append(disparity)
            if progress:
                progress(index + 1, self.frames)
            if self._still is not None:
                break
        if high - low <= 1e-6 * max(abs(high), 1e-3):
            raise BokehError(
                f"{self.path}: the depth is constant ({high:g} everywhere), so nothing is nearer than the rest; check the file."
            )
        span = torch.tensor([low, high])
        self.span = (low, high) if self.metric else clip_span(span)
        self.samples = torch.stack([self.span[0] + self.span[1] - s if self.far_is_bright else s for s in samples])


def render_frames(
    clip: Frames | VideoFile,
    depth: DepthClip,
    focus: torch.Tensor,
    k: torch.Tensor,
    lens: Lens,
    *,
    linear: bool,
    quality: str = "fast",
    progress: Progress = None,
) -> Iterator[Picture]:
    """The frames of `clip` with depth of field, in order; only one chunk is in memory at a time.

    focus, k   [frames] one focus disparity and one blur radius per unit of disparity for each frame
    linear     the clip's pixels are linear light; the result is in the same light
    progress   called as progress(frames done, frames)
    """
    cuts = shot_cuts(depth.samples, float(k.abs().max()))
    done = 0
    for chunk in chunks(zip(clip, depth, strict=True), chunk_length(*clip.size)):
        here = slice(done, done + len(chunk))
        for number, (picture, _) in enumerate(chunk, start=done):
            if tuple(picture.pixels.shape[1:]) != clip.size:
                raise BokehError(f"{clip.path}: frame {number} has another size than the first; expected one size for the clip.")
        defocus = Defocus(torch.stack([d for _, d in chunk]), focus[here], k[here], lens, depth.metric)
        image = torch.stack([picture.pixels for picture, _ in chunk])
        step = (lambda n, _, before=done: progress(before + n, len(clip))) if progress else None
        result = render(image, defocus, linear=linear, quality=quality, cuts=cuts, progress=step)
        for (picture, _), pixels in zip(chunk, result, strict=True):
            yield replace(picture, pixels=pixels)
        done += len(chunk)
