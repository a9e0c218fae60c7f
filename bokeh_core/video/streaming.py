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

    path           picture (serves every frame), folder or video; or one that is already open, or behaves like it
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
        self.source: Frames | VideoFile = open_clip(path) if isinstance(path, str | Path) else path
        self.path, self.frames, self.size, self.unit, self.far_is_bright = self.source.path, frames, size, unit, far_is_bright
        self.metric = unit != "relative"
        if far_is_bright and self.metric:
            raise BokehError(f"Depth in {unit} says by itself what is near; leave far-is-bright out.")
        _check_count(self.source, frames, "depth maps")
        if self.metric and not self.source.holds_floats():
            raise BokehError(f"{path}: depth in {unit} needs a file of floats (EXR or .npy); this one holds integers, so its unit is lost.")
        self.note = _check_shape(self.source, size, "depth map")
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
        chosen = _sampled(self.frames)
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


class MatteClip:
    """The matte of a clip, frame by frame: where the subject is, 1, and how much of a pixel it covers along its edge.

    path, frames, size, progress: see DepthClip

    samples  [S, H, W] of the frames that DepthClip samples, or the single matte of all frames
    note     a sentence for the user, or empty

    Raises BokehError for wrong counts, another shape, values that are not 0..1.
    """

    def __init__(self, path: str | Path, frames: int, size: tuple[int, int], progress: Progress = None):
        self.source, self.frames, self.size = open_clip(path), frames, size
        _check_count(self.source, frames, "mattes")
        self.note = _check_shape(self.source, size, "matte")
        chosen, samples = _sampled(len(self.source)), []
        for index, matte in enumerate(self._read()):
            if index in chosen:
                samples.append(matte)
            if progress:
                progress(index + 1, len(self.source))
        self.samples = torch.stack(samples)

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[torch.Tensor]:
        """[H, W] float32 0..1 at the frames' size, one per frame."""
        if self.source.is_picture:
            return itertools.repeat(self.samples[0], self.frames)
        return self._read()

    def _read(self) -> Iterator[torch.Tensor]:
        for index, matte in enumerate(self.source.planes("matte")):
            where = f"{self.source.path}" if self.source.is_picture else f"{self.source.path}, frame {index}"
            if tuple(matte.shape) != self.source.size:
                raise BokehError(f"{where}: this matte has another size than the first; expected one size for the clip.")
            if not bool(((matte >= -1e-3) & (matte <= 1.001)).all()):
                raise BokehError(f"{where}: the matte holds values that are not from 0 (surroundings) to 1 (subject); scale or repair it.")
            yield fit_disparity(matte[None], 1, *self.size)[0]


def _check_count(source: Frames | VideoFile, frames: int, what: str) -> None:
    if len(source) != frames and not source.is_picture:
        raise BokehError(
            f"{source.path} has {len(source)} {what} for {frames} frame{'s' * (frames > 1)}; "
            "expected one for each, or a single picture for all."
        )


def _check_shape(source: Frames | VideoFile, size: tuple[int, int], what: str) -> str:
    """A sentence when the maps of `source` must be resized to the frames' size (height, width)."""
    (height, width), (h, w) = size, source.size
    if (h, w) == (height, width):
        return ""
    if abs((w / h) / (width / height) - 1) > 0.02:
        raise BokehError(
            f"{source.path}: the {what} is {w} x {h} but the picture is {width} x {height}, another shape; "
            "expected the same view, so crop or turn one of them."
        )
    return f"the {what} is {w} x {h} and was resized to the picture's {width} x {height}."


def _sampled(frames: int) -> set[int]:
    """Numbers of the frames that stand for a whole clip."""
    return {round(i * (frames - 1) / max(1, SAMPLES - 1)) for i in range(SAMPLES)}


class PlateClip:
    """The clean plate of a clip: the scene without its subject, frame by frame.

    path     picture (serves every frame), folder or video, of exactly the frames' size
    convert  brings a Picture of it to the light of the frames

    Raises BokehError for wrong counts and sizes.
    """

    def __init__(self, path: str | Path, frames: int, size: tuple[int, int], convert: Callable[[Picture], Picture]):
        self.source, self.frames, self.size, self.convert = open_clip(path), frames, size, convert
        _check_count(self.source, frames, "clean plates")
        if self.source.size != size:
            (height, width), (h, w) = size, self.source.size
            raise BokehError(f"{path}: the clean plate is {w} x {h} but the picture is {width} x {height}; expected the same size.")

    def __iter__(self) -> Iterator[torch.Tensor]:
        """[3, H, W] one per frame, in the light of the frames."""
        for index, picture in enumerate(self.source):
            pixels = self.convert(picture).pixels
            if tuple(pixels.shape[1:]) != self.size:
                raise BokehError(
                    f"{self.source.path}: clean plate {index} has another size than the first; expected one size for the clip."
                )
            yield from itertools.repeat(pixels, self.frames) if self.source.is_picture else (pixels,)


def shot_thresholds(
    depth: DepthClip, k: torch.Tensor, matte: MatteClip | None = None, shots: list[int] | None = None, progress: Progress = None
) -> list[list[float]]:
    """Layer thresholds of each shot, measured on up to 8 frames of it with its largest k.

    k         [frames] blur radius per unit of disparity
    shots     numbers of the frames at which shots begin; None = one shot
    progress  called as progress(done, total) while the maps of a clip of several shots are read once more
    """
    starts = sorted({0, *(shots or ())})
    if len(starts) == 1:  # DepthClip and MatteClip have kept the very frames
        return [shot_cuts(depth.samples, float(k.abs().max()), None if matte is None else matte.samples)]
    ends, found, chosen, maps, mattes = [*starts[1:], len(depth)], [], set(), [], []
    for index, (disparity, cover) in enumerate(zip(depth, itertools.repeat(None) if matte is None else matte, strict=False)):
        start, end = starts[len(found)], ends[len(found)]
        if index == start:
            chosen = {start + n for n in _sampled(end - start)}
        if index in chosen:
            maps.append(disparity)
            mattes.append(cover)
        if index + 1 == end:
            found.append(shot_cuts(torch.stack(maps), float(k[start:end].abs().max()), None if matte is None else torch.stack(mattes)))
            maps, mattes = [], []
        if progress:
            progress(index + 1, len(depth))
    return found


def render_frames(
    clip: Frames | VideoFile,
    depth: DepthClip,
    focus: torch.Tensor,
    k: torch.Tensor,
    lens: Lens,
    *,
    linear: bool,
    quality: str = "fast",
    rays: int = 1024,
    matte: MatteClip | None = None,
    plate: PlateClip | None = None,
    snap_edges: bool = False,
    shots: list[int] | None = None,
    start: int = 0,
    progress: Progress = None,
) -> Iterator[list[Picture]]:
    """The frames of `clip` with depth of field, in order, a chunk at a time; only one chunk is in memory.

    focus, k   [frames] one focus disparity and one blur radius per unit of disparity for each frame
    linear     the clip's pixels are linear light; the result is in the same light
    matte, plate  see MatteClip, PlateClip; made for this clip
    quality, rays, snap_edges  see render
    shots      numbers of the frames at which shots begin, each with layers of its own; None = one shot
    start      frames that an earlier run has already made, the end of one of its chunks: go on from there
    progress   called as progress(frames done, frames)
    """
    starts = sorted({0, *(shots or ())})
    cuts = shot_thresholds(depth, k, matte, shots)
    beside = (itertools.repeat(None, len(clip)) if one is None else one for one in (matte, plate))
    frames = itertools.islice(zip(clip, depth, *beside, strict=True), start, None)
    done, length = start, chunk_length(*clip.size)
    for shot, (first, end) in enumerate(itertools.pairwise((*starts, len(clip)))):
        for chunk in chunks(itertools.islice(frames, max(0, end - max(first, start))), length):
            here = slice(done, done + len(chunk))
            pictures, disparities, mattes, plates = zip(*chunk, strict=True)
            for number, picture in enumerate(pictures, start=done):
                if tuple(picture.pixels.shape[1:]) != clip.size:
                    raise BokehError(f"{clip.path}: frame {number} has another size than the first; expected one size for the clip.")
            result = render(
                torch.stack([picture.pixels for picture in pictures]),
                Defocus(torch.stack(disparities), focus[here], k[here], lens, depth.metric),
                linear=linear,
                quality=quality,
                rays=rays,
                matte=None if matte is None else torch.stack(mattes),
                clean_plate=None if plate is None else torch.stack(plates),
                snap_edges=snap_edges,
                cuts=cuts[shot],
                progress=(lambda n, _, before=done: progress(before + n, len(clip))) if progress else None,
            )
            yield [replace(picture, pixels=pixels) for picture, pixels in zip(pictures, result, strict=True)]
            done += len(chunk)
