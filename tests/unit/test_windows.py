"""Large pictures, rendered window by window: the same picture, in memory that does not grow with it."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from bokeh_core import filters
from bokeh_core.errors import BokehError
from bokeh_core.metrics.image import psnr
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import layering, piece_pixels, render, shot_cuts, windows
from bokeh_core.synthesis.demo import demo_scene
from tests.live_bytes import LiveBytes

WIDTH, HEIGHT = 690, 518
PIECE = 180_000


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(windows, "WHOLE", PIECE)
    monkeypatch.setattr(windows, "SMALL", 40_000)


def case(width=WIDTH, height=HEIGHT, radius=9.0, focus=0.5, aperture=None):
    scene = demo_scene(0, width, height)
    lens = Lens() if aperture is None else Lens(aperture=aperture)
    return scene["image"][None], Defocus(scene["disparity"][None], torch.tensor([focus]), torch.tensor([2 * radius]), lens, False)


def subject(number=4):
    """The true matte of one of the demo's things."""
    return demo_scene(0, WIDTH, HEIGHT)["layers"].layers[number].alpha[None].float()


@pytest.mark.parametrize(
    ("height", "width", "margin"),
    [(4320, 7680, 160), (4320, 7680, 700), (9504, 6336, 90), (3001, 5003, 200), (2999, 12001, 77), (20000, 30000, 300)],
)
def test_windows_cover_a_picture_once_with_what_they_need(height, width, margin):
    plan = windows.plan(height, width, margin)
    seen = torch.zeros(height, width, dtype=torch.uint8)
    for window in plan:
        assert window.pixels <= windows.WHOLE
        seen[window.core] += 1
        for core, outer, size in zip(window.core, (window.rows, window.columns), (height, width), strict=True):
            assert outer.start <= max(0, core.start - margin) and min(size, core.stop + margin) <= outer.stop <= size
            assert outer.start % windows.ALIGN == 0 and (outer.stop - outer.start - size) % windows.ALIGN == 0
        corner = seen[window.rows, window.columns][window.within]
        assert corner.shape == seen[window.core].shape and corner.data_ptr() == seen[window.core].data_ptr()
    assert bool((seen == 1).all())
    assert sum(window.pixels for window in plan) < (1.7 if margin <= 200 else 4) * height * width


def test_one_window_up_to_4k_and_where_nothing_else_helps():
    assert len(windows.plan(2160, 4096, 500)) == 1
    (window,) = windows.plan(4320, 7680, 9000)  # every window would be the picture
    assert window.pixels == 4320 * 7680 and window.within == window.core
    assert windows.margin((100, 100), float("nan"), Aperture(), 0) > 1e8  # `render` says what is wrong
    middling = windows.plan(4320, 7680, 1500)
    assert 1 < len(middling) and sum(w.pixels for w in middling) <= windows.MOST_WORK * 4320 * 7680


LOOKS = Aperture(cats_eye=0.8, chromatic_lateral=1.0, chromatic_longitudinal=1.0)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"radius": 40.0, "focus": 0.95}, {}),
        ({"aperture": LOOKS, "radius": 4.0, "focus": 0.1}, {}),
        ({}, {"snap_edges": True}),
        ({"radius": 15.0}, {"matte": 4, "clean_plate": 0.3}),
        ({"radius": 5.0, "aperture": LOOKS}, {"quality": "reference", "rays": 12}),
    ],
)
def test_windows_give_the_picture_that_one_piece_gives(monkeypatch, given, options):
    image, defocus = case(**given)
    options = dict(options)
    if "matte" in options:
        options["matte"] = subject(options["matte"])
    if "clean_plate" in options:
        options["clean_plate"] = image * options["clean_plate"]
    whole = render(image, defocus, **options)
    monkeypatch.setattr(windows, "WHOLE", PIECE)
    monkeypatch.setattr(windows, "SMALL", 40_000)
    pieces = render(image, defocus, **options)
    # Whether colours move an edge, or a matte's side keeps its depth, is a matter of yes or no for a pixel here and there.
    others = ((pieces - whole).abs() > 1 / 255).float().mean()
    assert float(others) <= (1e-4 if {"snap_edges", "matte"} & options.keys() else 0)
    assert psnr(pieces, whole) > 75


def test_a_subject_larger_than_a_window_hides_the_same_in_all_of_them(monkeypatch):
    """Behind it the surroundings go on as across the whole picture: no window's border shows."""
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.12
    image = torch.where(inside, torch.tensor(0.2), torch.stack([x, 1 - y, y]))[None]
    defocus = Defocus(torch.where(inside, 0.9, 0.1)[None], torch.tensor([0.1]), torch.tensor([20.0]), Lens(), False)
    whole = render(image, defocus)
    monkeypatch.setattr(windows, "WHOLE", PIECE)
    monkeypatch.setattr(windows, "SMALL", 40_000)
    assert (render(image, defocus) - whole).abs().max() < 1 / 255


def test_a_plain_picture_stays_plain(small_pieces):
    image, defocus = case()
    flat = torch.full_like(image, 0.4)
    assert (render(flat, defocus) - 0.4).abs().max() < 1e-5


def test_a_clip_of_large_frames_shares_its_cuts(small_pieces):
    image, defocus = case(radius=6.0)
    cuts = shot_cuts(defocus.disparity, float(defocus.k))
    assert torch.equal(render(image, defocus, cuts=cuts), render(image, defocus))


def test_memory_follows_the_window_and_not_the_picture(small_pieces, monkeypatch):
    monkeypatch.setattr(windows, "WHOLE", 250_000)

    def peak(width, height):
        image, defocus = case(width, height, radius=4.0)
        with LiveBytes([image, defocus.disparity]) as live:
            render(image, defocus)
        return live.peak, piece_pixels(height, width, defocus)

    (small, piece), (large, larger_piece) = peak(620, 468), peak(1240, 936)
    assert 0.8 * larger_piece < piece <= 250_000 and larger_piece <= 250_000
    beside = 24 * (1240 * 936 - 620 * 468)  # the result, and a few planes of the whole
    assert large - small < beside + 300 * max(0, larger_piece - piece)


@pytest.mark.parametrize("part", ["image", "clean_plate", "matte"])
def test_values_that_are_not_numbers_are_refused_before_any_window(small_pieces, part):
    image, defocus = case()
    given = {"image": image.clone(), "clean_plate": image.clone(), "matte": subject()}
    given[part][..., -1, -1] = float("nan")  # the row that the small copy leaves out
    out, seen = torch.full_like(image, -1), []
    with pytest.raises(BokehError, match="not numbers"):
        render(given.pop("image"), defocus, **given, out=out, progress=lambda done, total: seen.append(done))
    assert bool((out == -1).all()) and seen in ([], [0])


def test_a_window_can_be_interrupted(small_pieces):
    image, defocus = case(radius=3.0)

    def stop(done, total):
        if done > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(image, defocus, progress=stop)
    seen = []
    render(image, defocus, progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen) and seen[-1] == 1 and max(b - a for a, b in itertools.pairwise(seen)) < 0.2


def test_edges_and_cuts_are_the_same_some_rows_at_a_time(monkeypatch):
    _, defocus = case()
    ramp = F.avg_pool2d(defocus.disparity, 5, 1, 2)[0]
    hard, cuts = layering.harden_edges(ramp, 60.0), layering.thresholds(ramp, 60.0)
    assert cuts and not torch.equal(hard, ramp)
    for module in (filters, layering):
        monkeypatch.setattr(module, "ROWS_PIXELS", 10_000)
    assert torch.equal(layering.harden_edges(ramp, 60.0), hard) and layering.thresholds(ramp, 60.0) == cuts
