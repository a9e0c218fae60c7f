"""Cuts found and flicker removed, on clips whose truth is known; real clips are joined where they lie beside the repository."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bokeh_core.errors import BokehError
from bokeh_core.metrics.edges import edge_band
from bokeh_core.metrics.video import flicker
from bokeh_core.render.light import to_display
from bokeh_core.synthesis.demo import demo_clip
from bokeh_core.synthesis.scenes import flatten, make_scene
from bokeh_core.video.stabilisation import find_shots, smooth_disparity

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "any2bokeh_demo"


def photo(seed):
    """[3, 160, 240] a picture of its own."""
    scene = flatten(make_scene("three", seed, 240))
    return to_display(scene[0]).clamp(0, 1)[:, 40:200]


def moving(seed, count):
    """A clip whose layers move."""
    return [to_display(flatten(make_scene("portrait", seed, 128, time=i / (count - 1)))[0]).clamp(0, 1) for i in range(count)]


@pytest.fixture(scope="module")
def pictures():
    return [photo(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def glide():
    """(frames [10, 3, H, W], disparity [10, H, W]): the camera moves."""
    frames, maps = zip(*demo_clip(3, 10, 200, 134), strict=True)
    return torch.stack(frames).clamp(0, 1), torch.stack(maps)


def test_hard_cuts_are_found(pictures, glide):
    a, b, c, _ = pictures
    assert find_shots([a] * 5 + [b] * 4 + [c] * 7) == [0, 5, 9]
    assert find_shots([a, b, b, b, b]) == [0, 1] and find_shots([a] * 5 + [b]) == [0, 5]
    assert find_shots(moving(1, 8) + moving(2, 8) + moving(1, 8)) == [0, 8, 16]
    assert find_shots([*glide[0], *glide[0].flip(3)]) == [0, 10]
    assert find_shots([a]) == [0] and find_shots([]) == [0]


def test_within_a_shot_nothing_is_found(pictures, glide):
    a = pictures[0]
    assert find_shots(glide[0]) == [0] and find_shots(moving(4, 10)) == [0]
    grey = [torch.full((3, 60, 80), 0.5)] * 6
    assert find_shots(grey) == [0]
    noise = 0.1 * torch.randn(8, *a.shape, generator=torch.Generator().manual_seed(0))
    assert find_shots((a + noise).clamp(0, 1)) == [0]


@pytest.mark.parametrize("length", [1, 2])
def test_flashes_are_no_cuts(pictures, length):
    a, b = pictures[:2]
    flash = [(a * 1.8 + 0.35).clamp(0, 1)] * length
    white, black = [torch.ones_like(a)] * length, [torch.zeros_like(a)] * length
    for one in (flash, white, black):
        assert find_shots([a] * 4 + one + [a] * 4) == [0]
    assert find_shots([a] * 4 + flash + [a] * 4 + [b] * 4) == [0, 8 + length]
    assert find_shots([a * (0.3 + 0.1 * i) for i in range(8)]) == [0], "light that comes up"


@pytest.mark.parametrize("speed", [0.05, 0.15, 0.3])
def test_fast_pans_are_no_cuts(speed):
    wide = torch.cat([photo(seed) for seed in range(10, 16)], 2)
    wide = F.avg_pool2d(F.pad(wide[None], (0, 0, 2, 2), mode="replicate"), 5, 1)[0]
    step = int(speed * 240)
    frames = [wide[:, :, x : x + 240] for x in range(0, min(wide.shape[2] - 240, 12 * step), step)]
    assert len(frames) >= 8 and find_shots(frames) == [0]


def test_focus_pulls_are_no_cuts(pictures):
    blurred = [pictures[0]]
    for _ in range(9):
        blurred.append(F.avg_pool2d(F.pad(blurred[-1][None], (3, 3, 3, 3), mode="replicate"), 7, 1)[0])
    assert find_shots(blurred + blurred[::-1]) == [0]


def test_frames_are_taken_one_at_a_time(pictures):
    alive = []

    def source():
        for i in range(30):
            frame = pictures[i // 10].clone()
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(ref() is not None for ref in alive) <= 2

    assert find_shots(source()) == [0, 10, 20]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips lie beside the repository, not in it")
def test_real_clips_joined():
    from PIL import Image

    def clip(name, count):
        files = sorted((REAL / name / "frames").iterdir())[:count]
        return [
            torch.from_numpy(np.asarray(Image.open(file).convert("RGB").resize((320, 180))).copy()).permute(2, 0, 1) / 255 for file in files
        ]

    dance, talk, later = clip("breakdance_000_023", 24), clip("interview_000_023", 24), clip("interview_096_119", 24)
    assert find_shots(dance) == find_shots(talk) == find_shots(later) == [0]
    assert find_shots(dance[:9] + talk[:5] + dance[9:]) == [0, 9, 14]
    assert find_shots(later + dance) == [0, 24]


def network_like(truth, seed, scale=0.06, shift=0.03, noise=0.006):
    """What a photo model makes of a clip: soft edges, its own scale and shift in each frame, noise."""
    g = torch.Generator().manual_seed(seed)
    maps = F.avg_pool2d(F.pad(truth[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[:, 0]
    scales, shifts = 1 + scale * torch.randn(len(maps), generator=g), shift * torch.randn(len(maps), generator=g)
    return maps * scales[:, None, None] + shifts[:, None, None] + noise * torch.randn(maps.shape, generator=g)


def fitted(maps, truth):
    """Maps with the one scale and shift for the clip that suits the truth best."""
    a, b = maps - maps.mean(), truth - truth.mean()
    return a * ((a * b).mean() / (a * a).mean()) + truth.mean()


def rgb(maps):
    return maps[:, None].expand(-1, 3, -1, -1)


def smoothed(frames, maps, *arguments, pieces=3, **keywords):
    parts = list(smooth_disparity(frames, maps.split(pieces), *arguments, **keywords))
    assert [len(part) for part in parts] == [len(part) for part in maps.split(pieces)]
    return torch.cat(parts)


def test_a_still_scene_becomes_still():
    colour, d = flatten(make_scene("three", 9, 160))
    frames, truth = to_display(colour).clamp(0, 1).expand(20, -1, -1, -1), d.expand(20, -1, -1)
    raw = network_like(truth, 1)
    before, after = flicker(rgb(raw)), flicker(rgb(smoothed(frames, raw, [0], 0.8)))
    assert after < 0.12 * before, f"flicker {before:.4f} -> {after:.4f}"


def test_a_moving_camera_flickers_less_and_edges_stay(glide):
    frames, truth = glide
    raw = network_like(truth, 2)
    ours = smoothed(frames, raw, [0], 0.8)
    a, b = fitted(raw, truth) - truth, fitted(ours, truth) - truth
    assert b.diff(dim=0).abs().mean() < 0.5 * a.diff(dim=0).abs().mean()
    edges = torch.stack([edge_band(d, 40.0, 3) for d in truth])
    mixed = raw.clone()  # what an average over time without motion would do
    for i in range(1, len(mixed)):
        mixed[i] = 0.264 * raw[i] + 0.736 * mixed[i - 1]
    assert b.abs()[edges].mean() < 0.9 * a.abs()[edges].mean()
    assert b.abs()[edges].mean() < 0.6 * (fitted(mixed, truth) - truth).abs()[edges].mean()


def test_steady_maps_come_through(glide):
    """Nothing to repair: edges and values stay, but for the slow change of range that a moving camera makes."""
    frames, truth = glide
    ours = fitted(smoothed(frames, truth, [0], 1.0), truth)
    edges = torch.stack([edge_band(d, 40.0, 3) for d in truth])
    assert (ours - truth).abs().mean() < 0.012 and (ours - truth).abs()[edges].mean() < 0.02
    still = smoothed(frames[:1].expand(5, -1, -1, -1), truth[:1].expand(5, -1, -1), [0], 1.0)
    assert torch.allclose(still, truth[:1].expand(5, -1, -1), atol=1e-3)


def test_what_appears_is_not_mixed_with_the_past():
    """A near disc flies across: at its rims and where it was, no depth between the surfaces."""
    y, x = torch.arange(90.0)[:, None], torch.arange(160.0)[None]
    texture = 0.3 + 0.2 * torch.sin(x / 3) * torch.cos(y / 4)
    frames, truth = [], []
    for i in range(12):
        disc = (x - 20 - 9 * i).square() + (y - 45).square() < 18**2
        stripes = 0.75 + 0.15 * torch.sin((x - 9 * i) / 2)
        frames.append(torch.where(disc, stripes, texture).expand(3, -1, -1))
        truth.append(torch.where(disc, 0.9, 0.2))
    truth = torch.stack(truth)
    ours = smoothed(torch.stack(frames), truth, [0], 1.0)
    assert ((ours - truth).abs() > 0.05).float().mean() < 1e-3


def test_the_range_does_not_shrink_over_a_long_clip():
    colour, d = flatten(make_scene("three", 9, 64))
    frames = to_display(colour).clamp(0, 1).expand(150, -1, -1, -1)
    raw = network_like(d.expand(150, -1, -1), 5, scale=0.03, shift=0.01, noise=0.02)
    ours = smoothed(frames, raw, [0], 0.9, pieces=50)
    spread = ours[-50:].mean(0).std() / raw[-50:].mean(0).std()
    assert 0.95 < float(spread) < 1.05
    assert abs(float(ours[-50:].mean() - raw.mean())) < 0.02


def test_metres_keep_their_zero():
    colour, d = flatten(make_scene("three", 9, 96))
    frames = to_display(colour).clamp(0, 1).expand(12, -1, -1, -1)
    scales = 1 + 0.08 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    metres = (1 / (d + 0.1)).expand(12, -1, -1) * scales[:, None, None]
    metres[:, :4] = float("inf")
    ours = smoothed(frames, metres, [0], 0.8, metric=True)
    assert bool(ours[:, :4].isinf().all())
    low = ours[:, 4:]
    assert (low / low[:1]).sub(1).abs().mean() < 0.35 * (metres[:, 4:] / metres[:1, 4:]).sub(1).abs().mean()
    assert bool(((low / metres[:, 4:]).std(dim=(1, 2)) < 1e-3).all()), "a frame is scaled as a whole, nothing is shifted"


def test_shots_start_afresh_and_pieces_do_not_matter(glide):
    frames, truth = glide
    raw = network_like(truth, 4)
    both = torch.cat([frames, frames.flip(3)])
    maps = torch.cat([raw, raw.flip(2) * 3])
    ours = smoothed(both, maps, [0, 10], 0.7)
    assert torch.equal(ours, smoothed(both, maps, [0, 10], 0.7, pieces=7))
    assert torch.equal(ours[10], maps[10]) and torch.equal(ours[:10], smoothed(frames, raw, [0], 0.7))
    kept = maps.clone()
    assert torch.equal(smoothed(both, maps, None, 0.0), maps) and torch.equal(maps, kept)


def test_maps_of_any_size_and_flat_ones(glide):
    frames, truth = glide
    small = F.interpolate(truth[:3, None], size=(37, 51), mode="area")[:, 0]
    assert smoothed(frames[:3], small, [0], 0.5).shape == (3, 37, 51)
    flat = torch.full((3, 40, 60), 0.25)
    assert torch.allclose(smoothed(frames[:3], flat, [0], 1.0), flat)


def test_mistakes_are_explained(glide):
    frames, truth = glide
    with pytest.raises(BokehError, match="expected 0"):
        list(smooth_disparity(frames, [truth], [0], 1.5))
    with pytest.raises(BokehError, match="fewer frames"):
        list(smooth_disparity(frames[:4], [truth], [0], 0.5))
