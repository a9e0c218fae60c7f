"""Weighted overlap of segments: the stream against the plain definition, and against what the weights must do."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bokeh_core.video import segments

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 20, 21, 25, 33, 100]


def latents_of(first, parts):
    """What a network might say: different for every segment and place, and remembering what it was shown."""
    rows = []
    for number, part in enumerate(parts, start=first):
        place = torch.arange(len(part), dtype=torch.float32)
        rows.append(torch.stack([torch.tensor([float(item) for item in part]), torch.sin(3.7 * number + 1.3 * place)], 1))
    return rows


@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize("half", [2, 4])
def test_stream_is_the_plain_definition(frames, half):
    taken = []
    items = (taken.append(i) or i for i in range(frames))
    windows = []
    for window in segments.stream(items, frames, latents_of, half=half):
        windows.append(window)
        assert len(taken) <= sum(len(range(2 * half)[w.keep]) for w in windows) + half, "frames are taken before they are needed"
    kept = torch.cat([w.latents[w.keep] for w in windows])

    places = segments.segment_frames(frames, half)
    filled = places.where(places >= 0, torch.full_like(places, frames - 1))
    whole = torch.stack([latents_of(i, [row])[0] for i, row in enumerate(filled.tolist())])
    assert torch.allclose(kept, segments.blend(whole, frames), atol=1e-6)
    assert torch.allclose(kept[:, 0], torch.arange(frames, dtype=torch.float32), atol=1e-5)  # every frame's own item, once, in order

    plan = segments.decode_windows(frames, half)
    assert [(w.items[0], w.keep) for w in windows] == [(start, keep) for start, keep, _ in plan]
    for window, (start, _, blended) in zip(windows, plan, strict=True):
        assert window.items == [min(start + i, frames - 1) for i in range(2 * half)]
        if not blended:
            assert torch.equal(window.latents, whole[-1])


@pytest.mark.parametrize("frames", LENGTHS)
def test_weights_sum_to_one_and_fade(frames):
    places, weights = segments.segment_frames(frames), segments.overlap_weights(frames)
    total = torch.zeros(frames).index_add_(0, places[places >= 0], weights[places >= 0])
    assert torch.allclose(total, torch.ones(frames))
    assert (weights[places < 0] == 0).all() and (weights >= 0).all()
    if len(weights) > 1:
        assert weights[1, 0] == 0  # a new segment says nothing about its first frame
        assert torch.allclose(weights[0, 4:], torch.tensor([1.0, 0.853553, 0.5, 0.146447]), atol=1e-6)


@pytest.mark.parametrize("frames", [13, 20, 25, 33])
def test_a_stream_goes_on_where_it_stopped(frames):
    windows = list(segments.stream(range(frames), frames, latents_of))
    done = 0
    for index, window in enumerate(windows):
        done += len(range(8)[window.keep])
        if window.carry is None:
            continue
        rest = list(segments.stream(range(done, frames), frames, latents_of, start=done, carry=window.carry))
        assert len(rest) == len(windows) - index - 1
        for ours, theirs in zip(rest, windows[index + 1 :], strict=True):
            assert torch.equal(ours.latents, theirs.latents) and ours.items == theirs.items and ours.keep == theirs.keep
    assert window.carry is None and done == frames


def test_filling():
    (window,) = segments.stream(range(3), 3, latents_of, fill=lambda last: last + 100)
    assert window.items == [0, 1, 2, 102, 102, 102, 102, 102] and window.keep == slice(0, 3)


def test_pairs_are_handed_over_together():
    seen = []
    list(segments.stream(range(25), 25, lambda first, parts: seen.append((first, len(parts))) or latents_of(first, parts)))
    assert seen == [(0, 2), (2, 2), (4, 2)]


def test_a_clip_that_ends_early_is_an_error():
    with pytest.raises(ValueError, match="ended after 10 of 20"):
        list(segments.stream(range(10), 20, latents_of))
    with pytest.raises(ValueError, match="carry"):
        next(segments.stream(range(10), 20, latents_of, start=8))


MEMORY = """
import resource, sys, torch
from bokeh_core.video import segments

def items(count):
    for i in range(count):
        yield torch.full((1 << 17,), float(i))  # half a MB a frame

def run(count):
    for window in segments.stream(items(count), count, lambda first, parts: [torch.stack(part) for part in parts]):
        window.latents.sum()

run(int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_clip():
    """20 times the frames, of half a MB each: 475 MB more if anything held on to them."""

    def peak(count):
        command = [sys.executable, "-c", MEMORY, str(count)]
        exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once, so that the peak is what was held
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=exact).stdout)

    assert peak(1000) <= 1.1 * peak(50)


def test_every_frame_is_in_a_window_once():
    for frames, half in itertools.product(range(1, 60), (1, 2, 4)):
        kept = [start + i for start, keep, _ in segments.decode_windows(frames, half) for i in range(2 * half)[keep]]
        assert kept == list(range(frames)), (frames, half)
