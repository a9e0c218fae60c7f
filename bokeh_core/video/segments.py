"""Weighted overlap of segments: a clip of any length through a network that takes a fixed number of frames (Any-to-Bokeh, SPEC section 6).

A clip is cut into halves of `half` frames; segment i is the halves i and i + 1, so that neighbours share one. What two segments say
about the same frame is mixed with weights that fade from one to the other, and decoded in windows of two halves.

The plain definition (`segment_frames`, `overlap_weights`, `blend`, `decode_windows`) looks at the whole clip; `stream` does the same
with the frames of three halves in memory.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

HALF = 4  # frames; the published segment has 8
PAIR = 2  # segments that are worked on together, and after which a stream can be taken up again


def segment_count(frames: int, half: int = HALF) -> int:
    """Segments of a clip of `frames` frames, 1 or more."""
    return max(1, math.ceil(frames / half) - 1)


def segment_frames(frames: int, half: int = HALF) -> torch.Tensor:
    """[segments, 2 half] number of the frame at each place; -1 where a short last segment is filled up."""
    places = torch.arange(segment_count(frames, half))[:, None] * half + torch.arange(2 * half)
    return places.where(places < frames, torch.full_like(places, -1))


def fade(half: int = HALF) -> torch.Tensor:
    """[half] weight of the earlier segment over a shared half, (1 + cos(pi j / half)) / 2: 1 at the first frame."""
    return (1 + torch.cos(torch.pi * torch.arange(half) / half)) / 2


def overlap_weights(frames: int, half: int = HALF) -> torch.Tensor:
    """[segments, 2 half] float32 weights of the blend; they sum to 1 over the segments of a frame, and are 0 where filled up."""
    places = segment_frames(frames, half)
    weights = torch.ones(places.shape)
    weights[:-1, half:] = fade(half)
    weights[1:, :half] = 1 - fade(half)
    return weights * (places >= 0)


def blend(latents: torch.Tensor, frames: int) -> torch.Tensor:
    """[frames, ...] the weighted sum of what the segments [segments, 2 half, ...] say about each frame."""
    half = latents.shape[1] // 2
    places, weights = segment_frames(frames, half), overlap_weights(frames, half).to(latents)
    total = torch.zeros(frames, *latents.shape[2:], dtype=latents.dtype, device=latents.device)
    for segment in range(len(latents)):
        real = places[segment] >= 0
        weighted = latents[segment] * weights[segment].reshape(-1, *[1] * (latents.ndim - 2))
        total.index_add_(0, places[segment][real].to(latents.device), weighted[real])
    return total


def decode_windows(frames: int, half: int = HALF) -> list[tuple[int, slice, bool]]:
    """[(first frame, which of the 2 half frames from there are kept, are the latents blended?)], in order.

    Windows start at every second half. When the last segment is the second of its pair, its second half is decoded in a window of its
    own, with the segment's own latents, unblended, around it.
    """
    count = segment_count(frames, half)
    windows = [(start * half, slice(0, min(2 * half, frames - start * half)), True) for start in range(0, count, PAIR)]
    if count % PAIR == 0:
        start = (count - 1) * half
        windows.append((start, slice(half, frames - start), False))
    return windows


@dataclass(frozen=True, eq=False)
class Window:
    """Latents ready to be decoded.

    items    of its 2 half frames, as they came in or from `fill`
    latents  [2 half, ...]
    keep     which of the decoded frames belong to the clip and have not been kept before
    carry    [half, ...] what the next pair starts from when this is the last window of a pair and the clip goes on; else None
    """

    items: list
    latents: torch.Tensor
    keep: slice
    carry: torch.Tensor | None = None


def stream(
    items: Iterable[Any],
    frames: int,
    denoise: Callable[[int, list[list[Any]]], list[torch.Tensor]],
    *,
    fill: Callable[[Any], Any] = lambda last: last,
    half: int = HALF,
    start: int = 0,
    carry: torch.Tensor | None = None,
) -> Iterator[Window]:
    """The windows of a clip, in order; the kept frames of all windows are the frames of the clip from `start` on.

    items    one for each frame from `start` on; taken when they are needed, held as long as they are needed
    frames   of the whole clip
    denoise  denoise(number of the first segment, segments) -> [2 half, ...] latents for each; gets the two segments of a pair, as
             lists of 2 half items, or the last one alone
    fill     makes the item that fills up the end from the last item; default: the last one again
    start, carry  to go on after a window that had a carry: the frames that were kept up to there, and the carry
    """
    if start % (PAIR * half) or (carry is None) != (start == 0):
        raise ValueError(f"a stream can start at 0, or with its carry at a multiple of {PAIR * half}, not at {start}")
    items = iter(items)
    count = segment_count(frames, half)
    out = fade(half)
    filler = None

    def next_half(first: int) -> list[Any]:
        nonlocal filler
        real = max(min(half, frames - first), 0)
        taken = list(itertools.islice(items, real))
        if len(taken) < real:
            raise ValueError(f"the clip ended after {first + len(taken)} of {frames} frames")
        if 0 < real < half or (real == 0 and filler is None):
            filler = fill(taken[-1] if taken else halves[-1][-1])
        return taken + [filler] * (half - real)

    halves: list[list[Any]] = []
    for first in range(start // half, count, PAIR):
        pair = min(PAIR, count - first)
        while len(halves) < pair + 1:
            halves.append(next_half((first + len(halves)) * half))
        segments = [halves[i] + halves[i + 1] for i in range(pair)]
        latents = denoise(first, segments)
        fading = out.to(latents[0]).reshape(-1, *[1] * (latents[0].ndim - 1))
        begin = latents[0][:half] if carry is None else carry.to(latents[0]) + (1 - fading) * latents[0][:half]
        end = latents[0][half:] if pair == 1 else fading * latents[0][half:] + (1 - fading) * latents[1][:half]
        goes_on = first + pair < count
        carry = fading * latents[1][half:] if goes_on else None
        keep = slice(0, min(2 * half, frames - first * half))
        yield Window(segments[0], torch.cat([begin, end]), keep, carry)
        if pair == PAIR and not goes_on:
            yield Window(segments[1], latents[1], slice(half, frames - (first + 1) * half))
        halves = halves[PAIR:]
