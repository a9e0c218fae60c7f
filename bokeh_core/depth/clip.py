"""Depth of a whole clip, or of separate photos: network, upsampling, steadiness and ranges put together."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from ..errors import BokehError
from ..optics.defocus import robust_span
from ..video.stabilisation import find_shots, smooth_disparity
from .estimate import depth_maps
from .upsampling import NEAREST, guided_upsample

ONE_CLIP, WITH_CUTS, PHOTOS = "one clip", "clip with cuts", "separate photos"


def estimate_clip(
    model,
    frames: Iterable[torch.Tensor],
    raw: torch.Tensor,
    *,
    frames_are: str = ONE_CLIP,
    resolution: int = 518,
    guided: bool = True,
    steady: float = 0.0,
    chunk: int = 4,
    progress: Callable[[float, int], None] | None = None,
) -> list[int]:
    """Write the depth of `frames` into `raw`; returns the first frames of the stretches that share one range.

    model       DepthModel
    frames      [3, H, W] display-encoded 0..1, one per map of raw; read in order, more than once: a list or a clip, no generator
    raw         [B, H, W] float32 to be filled: metres for metric models, else relative disparity of any scale, larger = nearer
    frames_are  ONE_CLIP; WITH_CUTS: cuts are found, and nothing is carried across them; PHOTOS: every frame stands for itself
    resolution  px of the short side in the network, see depth_maps
    guided      edges follow the colours of the frames; else bilinear, as published
    steady      0..1 how much flicker is smoothed along the motion; not for photos and video models
    progress    called as progress(done, len(raw))
    """
    count = len(raw)
    clip, shots = frames_are != PHOTOS, [0]
    if frames_are == WITH_CUTS and count > 1:
        shots = find_shots(_watched(frames, count, progress))
    maps = depth_maps(
        model,
        iter(frames),
        count,
        clip=clip,
        resolution=resolution,
        shots=shots if clip else None,
        chunk=chunk,
        upsample=partial(guided_upsample, align_corners=model.info.align_corners, metric=model.info.metric) if guided else None,
        progress=progress,
    )
    if steady > 0 and clip and count > 1 and not model.info.video:
        maps = smooth_disparity(frames, maps, shots, steady, metric=model.info.metric)
    done = 0
    for some in maps:
        raw[done : done + len(some)] = some.clamp(min=NEAREST) if model.info.metric else some
        done += len(some)
    if done != count:
        raise BokehError(f"The clip ended after {done} of {count} frames; check the file.")
    return list(range(count)) if frames_are == PHOTOS else shots


def near_bright(raw: torch.Tensor, starts: list[int], metric: bool, *, keep: bool = True) -> torch.Tensor:
    """[B, H, W] disparity 0..1, near = 1, of the maps of estimate_clip: each stretch from its farthest to its nearest (see robust_span).

    metric  raw is metres; the range is that of 1 / metres
    keep    leave raw as it is; else it is turned into the result
    """
    result = torch.empty_like(raw) if keep else raw
    for i, grey in enumerate(near_bright_maps(raw, starts, metric)):
        result[i] = grey
    return result


def near_bright_maps(raw: torch.Tensor, starts: list[int], metric: bool) -> Iterator[torch.Tensor]:
    """The same, [H, W] one at a time."""
    for start, end in zip(starts, [*starts[1:], len(raw)], strict=True):
        values = raw[start:end].flatten()
        few = torch.cat([torch.stack(values.aminmax()), values[:: max(1, values.numel() >> 20)]])  # the ends, and a sample of the rest
        low, high = robust_span(_disparity(few, metric))
        for one in raw[start:end]:
            yield ((_disparity(one, metric) - low) / max(high - low, 1e-12)).clamp(0, 1)


def _disparity(values: torch.Tensor, metric: bool) -> torch.Tensor:
    return values.reciprocal() if metric else values


def _watched(frames, count, progress):
    """The frames, so that a long search can be interrupted."""
    for frame in frames:
        if progress:
            progress(0, count)
        yield frame
