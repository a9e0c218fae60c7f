"""Focus from point, mask, box, track and by itself, on scenes whose answer is known."""

import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.optics.focus import FocusTrack, auto, from_box, from_mask, from_point, from_value, smooth

H, W = 240, 320
Y, X = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")


def two_halves(border=0.5, left=0.2, right=0.8):
    return torch.where(border > X, left, right)[None]


def portrait():
    d = torch.full((H, W), 0.1)
    d[(Y > 0.55) & ((X - 0.5).abs() < 0.3)] = 0.66
    d[((X - 0.5) / 0.14) ** 2 + ((Y - 0.38) / 0.2) ** 2 < 1] = 0.7
    return d[None]


@pytest.mark.parametrize("offset", range(-6, 6))
def test_point_beside_an_edge_takes_its_own_side(offset):
    column = W // 2 + offset
    focus = from_point(two_halves(), (column + 0.5) / W, 0.5)
    assert focus.item() == pytest.approx(0.2 if offset < 0 else 0.8)


@pytest.mark.parametrize("smear", [2, 3, 4, 5])
@pytest.mark.parametrize("offset", [-5, -4, -3, -2, 1, 2, 3, 4])
def test_point_on_a_smeared_edge_is_never_between_the_surfaces(offset, smear):
    blurred = (0.2 + 0.6 * ((X * W - W / 2) / smear + 0.5).clamp(0, 1))[None]
    focus = from_point(blurred, (W // 2 + offset + 0.5) / W, 0.5)
    assert min(abs(focus.item() - 0.2), abs(focus.item() - 0.8)) < 0.03
    assert (focus.item() < 0.5) == (offset < 0)


def test_point_ignores_a_stray_pixel_but_hits_a_thin_line():
    stray, line = two_halves(2.0), two_halves(2.0)
    stray[0, 100, 100] = 1.0
    line[0, :, 100] = 1.0
    assert from_point(stray, 100.5 / W, 100.5 / H).item() == pytest.approx(0.2)
    assert from_point(line, 100.5 / W, 100.5 / H).item() == pytest.approx(1.0)


def test_point_is_robust_to_noise_and_exact_on_a_slope():
    noise = torch.randn(1, H, W, generator=torch.Generator().manual_seed(0)) * 0.02
    assert from_point(two_halves() + noise, 0.25, 0.5).item() == pytest.approx(0.2, abs=0.01)
    assert from_point(X[None], 0.4, 0.3).item() == pytest.approx(0.4, abs=0.004)


def test_point_per_frame_and_at_the_corners():
    clip = torch.cat([two_halves(), two_halves(), two_halves()])
    assert from_point(clip, torch.tensor([0.1, 0.9, 1.0]), 0.0).tolist() == pytest.approx([0.2, 0.8, 0.8])
    assert from_point(torch.full((1, 1, 1), 0.3), 0.0, 1.0).item() == pytest.approx(0.3)


@pytest.mark.parametrize(("x", "y"), [(-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5), ([0.1, 0.2], 0.5)])
def test_bad_points_are_refused(x, y):
    with pytest.raises(BokehError):
        from_point(torch.rand(3, 8, 8), x, y)


def test_mask_of_any_size_and_soft():
    d = two_halves()
    mask = torch.zeros(H, W)
    mask[:, int(0.7 * W) :] = 1.0
    mask[:, : W // 10] = 0.4
    assert from_mask(d, mask).item() == pytest.approx(0.8)
    assert from_mask(d, mask[None, ::4, ::4]).item() == pytest.approx(0.8)
    assert from_mask(torch.cat([d, 1 - d]), mask[None]).tolist() == pytest.approx([0.8, 0.2])


def test_mask_soft_weights_decide():
    d = torch.tensor([[[0.1, 0.5, 0.9]]])
    assert from_mask(d, torch.tensor([[1.0, 0.3, 0.2]])).item() == pytest.approx(0.1)
    assert from_mask(d, torch.tensor([[0.4, 0.3, 0.4]])).item() == pytest.approx(0.5)


def test_empty_mask_falls_back_to_auto_for_that_frame_only():
    clip = torch.cat([portrait(), portrait()])
    masks = torch.zeros(2, H, W)
    masks[1, :10] = 1.0
    focus = from_mask(clip, masks)
    assert focus[0] == auto(clip)[0] and focus[1].item() == pytest.approx(0.1)


def test_wrong_number_of_masks_names_both():
    with pytest.raises(BokehError, match=r"2 .*3"):
        from_mask(torch.rand(3, 8, 8), torch.ones(2, 8, 8))


def test_box_takes_the_surface_in_its_middle():
    assert from_box(portrait(), (0.3, 0.1, 0.7, 0.65)).item() == pytest.approx(0.7)
    with pytest.raises(BokehError, match="left < right"):
        from_box(portrait(), (0.7, 0.1, 0.3, 0.65))


def test_value():
    assert torch.equal(from_value(0.5, 3), torch.full((3,), 0.5))
    with pytest.raises(BokehError):
        from_value(float("nan"), 3)


def test_auto_finds_the_portrait():
    assert 0.6 < auto(portrait()).item() < 0.75
    assert 0.6 < auto(portrait(), torch.rand(1, 3, 60, 80, generator=torch.Generator().manual_seed(0))).item() < 0.75


def test_auto_prefers_a_person_over_the_floor_and_the_frame_in_front():
    d = (1.1 * (Y - 0.35)).clamp(0, 1)
    person = torch.where(((X - 0.35).abs() < 0.05) & (Y > 0.3) & (Y < 0.8), torch.tensor(0.495), d)
    assert auto(person[None]).item() == pytest.approx(0.495, abs=0.03)
    framed = torch.full((H, W), 0.1)
    framed[((X - 0.55) / 0.15) ** 2 + ((Y - 0.55) / 0.35) ** 2 < 1] = 0.5
    framed[(X < 0.12) | (X > 0.9)] = 0.95
    assert auto(framed[None]).item() == pytest.approx(0.5, abs=0.03)


def test_auto_answers_in_the_unit_of_the_map_and_frame_by_frame():
    base = portrait()
    assert auto(3 * base + 2).item() == pytest.approx(3 * auto(base).item() + 2, abs=1e-4)
    assert auto(torch.full((1, 50, 40), 0.4)).item() == pytest.approx(0.4)
    assert torch.equal(auto(torch.cat([base, two_halves(), base]))[[0, 2]], auto(base).expand(2))
    assert auto(base.flip(2)).item() == pytest.approx(auto(base).item(), abs=1e-4)


def test_smooth_kills_jumps_and_keeps_lines():
    focus = torch.full((31,), 0.5)
    focus[15] = 0.1
    assert torch.allclose(smooth(focus), torch.full((31,), 0.5))
    line = torch.linspace(0, 1, 31)
    assert torch.allclose(smooth(line)[10:21], line[10:21], atol=1e-5)
    assert torch.equal(smooth(focus, median=1, sigma=0), focus)
    assert smooth(torch.tensor([0.3])).item() == pytest.approx(0.3)
    with pytest.raises(BokehError):
        smooth(focus, median=4)


def test_track_by_hand():
    track = FocusTrack.parse("0: 0.9, 4: 0.1")
    assert track.values(6).tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1])
    assert FocusTrack.parse("2: .5").values(4).tolist() == [0.5] * 4
    assert FocusTrack.parse("0: 0, 4: 1 ease").values(5).tolist() == pytest.approx([0, 0.15625, 0.5, 0.84375, 1])
    assert FocusTrack.parse("0: 0, 4: 1 ease-in").values(5).tolist() == pytest.approx([0, 0.0625, 0.25, 0.5625, 1])
    assert FocusTrack.parse("0: 0, 4: 1 ease-out").values(5).tolist() == pytest.approx([0, 0.4375, 0.75, 0.9375, 1])
    assert FocusTrack.parse("0: 0, 3: 1 hold").values(5).tolist() == [0, 0, 0, 1, 1]


def test_track_json_and_text_agree_and_order_does_not_matter():
    text = FocusTrack.parse("24: 0.35 ease\n0: 0.9; 30: (0.5, 0.25) hold")
    assert FocusTrack.parse('[[0, 0.9], [24, 0.35, "ease"], [30, [0.5, 0.25], "hold"]]') == text
    point = '{"frame": 30, "point": [0.5, 0.25], "easing": "hold"}'
    assert FocusTrack.parse('[{"frame": 0, "value": 0.9}, {"frame": 24, "value": 0.35, "easing": "ease"}, ' + point + "]") == text


def test_track_looks_points_up_in_their_own_frame():
    clip = torch.cat([two_halves(), 1 - two_halves(), two_halves(left=0.4)])
    values = FocusTrack.parse("0: (0.1, 0.5), 1: (0.1, 0.5), 2: (0.1, 0.5)").values(3, clip)
    assert values.tolist() == pytest.approx([0.2, 0.8, 0.4])
    with pytest.raises(BokehError, match="point"):
        FocusTrack.parse("0: (0.1, 0.5)").values(3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0: 0.9, 24 0.35", "24 0.35"),
        ("0: 0.9, 24: fast", "24: fast"),
        ("0: 0.9, 24: 0.4 bouncy", "bouncy"),
        ("0: 0.9, 0: 0.4", "frame 0"),
        ("0: (0.5, 1.5)", "from 0 to 1"),
        ("", "no keyframe"),
        ('[{"frame": 0}]', '{"frame": 0}'),
        ("[[0.5, 1]]", "0.5"),
        ("[1]", "1"),
        ("[", "JSON"),
        ("-3: 0.5", "-3"),
    ],
)
def test_track_errors_name_the_bad_piece(text, says):
    with pytest.raises(BokehError) as error:
        FocusTrack.parse(text)
    assert says in str(error.value)
