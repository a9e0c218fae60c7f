"""Defocus and the ways depth comes in."""

import math

import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.optics.defocus import (
    deband,
    disparity_from_distance,
    disparity_from_geometry,
    disparity_from_image,
    disparity_from_mask,
    fill_holes,
    fit_disparity,
    make_defocus,
    robust_span,
)
from bokeh_core.optics.lens import Lens

RAMP = torch.linspace(0, 1, 65).expand(2, 33, 65).contiguous()


def test_signed_radius_by_hand():
    defocus = make_defocus(RAMP, Lens(strength=16.0), torch.tensor([0.25, 1.0]), width=65)
    s = defocus.signed_radius()
    k = 16.0 * 65 / 1024
    assert s.shape == RAMP.shape and s.dtype == torch.float32
    assert s[0, 0, 0].item() == pytest.approx(-0.25 * k) and s[0, 0, -1].item() == pytest.approx(0.75 * k)
    assert s[1].max().item() == 0.0
    one = defocus.frame(-1)
    assert torch.equal(one.signed_radius(), s[1:]) and one.focus.tolist() == [1.0]
    with pytest.raises(IndexError):
        defocus.frame(2)


def test_strength_covers_the_range_of_maps_outside_0_to_1():
    wide = make_defocus(RAMP * 300 - 20, Lens(strength=16.0), 40.0, width=1024)
    assert wide.k.tolist() == pytest.approx([16 / 300] * 2)
    metric = make_defocus(RAMP * 0.5 + 0.1, Lens(strength=16.0), 0.2, width=1024, metric=True)
    assert metric.k.tolist() == pytest.approx([32.0] * 2)
    relative = make_defocus(RAMP * 0.5 + 0.1, Lens(strength=16.0), 0.2, width=1024)
    assert relative.k.tolist() == [16.0] * 2
    piece = make_defocus(RAMP[:, :, :3], Lens(strength=16.0), 0.0, width=1024, disparity_range=2.0)
    assert piece.k.tolist() == [8.0] * 2


def test_focus_comes_from_the_argument_the_lens_or_the_picture():
    lens = Lens(f_number=2.0, focal_length=50, focus_distance=4.0)
    metric = RAMP + 0.05
    assert make_defocus(metric, lens, width=65, metric=True).focus.tolist() == [0.25] * 2
    assert make_defocus(metric, lens, 0.5, width=65, metric=True).focus.tolist() == [0.5] * 2
    assert make_defocus(RAMP, Lens(), width=65).focus.shape == (2,)


def test_bad_depth_is_refused():
    broken = RAMP.clone()
    broken[0, 0, :3] = math.nan
    with pytest.raises(BokehError, match="3 NaN"):
        make_defocus(broken, Lens(), 0.5, width=65)
    with pytest.raises(BokehError, match="1 infinite"):
        make_defocus(
            RAMP.clone().index_put_((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf)), Lens(), 0.5, width=65
        )
    with pytest.raises(BokehError, match="constant"):
        make_defocus(torch.full((2, 8, 8), 0.5), Lens(), 0.5, width=8)
    with pytest.raises(BokehError, match=r"3 focus values.*2 frames"):
        make_defocus(RAMP, Lens(), torch.zeros(3), width=65)
    with pytest.raises(BokehError, match="metres"):
        make_defocus(RAMP, Lens(f_number=2.0, focal_length=50), 0.5, width=65)


def test_in_focus_mask_is_soft_and_scales_with_width():
    defocus = make_defocus(RAMP, Lens(strength=1024.0), 0.5, width=65)  # 65 px per unit
    mask = defocus.in_focus_mask(threshold_px=4.0)[0, 0]
    radius = defocus.signed_radius()[0, 0].abs()
    assert bool((mask[radius <= 4] == 1).all()) and bool((mask[radius >= 8] == 0).all())
    between = mask[(radius > 4) & (radius < 8)]
    assert len(between) and bool(((between > 0) & (between < 1)).all())
    assert torch.equal(defocus.in_focus_mask(), defocus.in_focus_mask(65 / 1024))
    sharp = make_defocus(RAMP, Lens(strength=0.0), 0.5, width=65)
    assert bool((sharp.in_focus_mask() == 1).all())


def test_overlay_shows_near_warm_far_cool_and_leaves_the_focus_alone():
    disparity = torch.full((1, 360, 480), 0.0)
    disparity[:, :, 160:320], disparity[:, :, 320:] = 0.5, 1.0
    image = torch.full((1, 3, 360, 480), 0.5)
    before = image.clone()
    out = make_defocus(disparity, Lens(strength=40.0), 0.5, width=480).overlay(image)
    assert torch.equal(image, before) and out.shape == image.shape and 0 <= out.min() and out.max() <= 1
    far, sharp, near = out[0, :, 20, 60], out[0, :, 20, 200], out[0, :, 20, 400]
    assert far[2] > far[0] + 0.2 and near[0] > near[2] + 0.2 and torch.equal(sharp, image[0, :, 20, 200])
    line = out[0, :, 20, 150:170]
    assert bool((line[1] > line[0] + 0.3).any()), "the focus zone has no outline"
    assert bool((out[0, :, :, 170:310] == 1.0).all(dim=0).any()), "there is no cross in the focus zone"
    with pytest.raises(BokehError, match="same frames and size"):
        make_defocus(disparity, Lens(), 0.5, width=480).overlay(image[:, :, :100])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (64, 64), (37, 401)])
def test_overlay_of_any_size(height, width):
    d = torch.linspace(0, 1, height * width).reshape(1, height, width)
    out = make_defocus(d, Lens(), 0.5, width=width, disparity_range=1.0).overlay(torch.rand(1, 3, height, width))
    assert out.shape == (1, 3, height, width) and bool(torch.isfinite(out).all())


def test_disparity_from_image_grey_colour_alpha_and_inverted():
    grey = torch.rand(2, 5, 7, 1)
    assert torch.equal(disparity_from_image(grey), grey[..., 0])
    assert torch.equal(disparity_from_image(grey.expand(-1, -1, -1, 3)), grey[..., 0])
    assert torch.equal(disparity_from_image(torch.cat([grey.expand(-1, -1, -1, 3), torch.zeros(2, 5, 7, 1)], -1)), grey[..., 0])
    green = torch.tensor([0.0, 1.0, 0.0]).expand(1, 2, 2, 3)
    assert disparity_from_image(green).max().item() == pytest.approx(0.7152)
    assert torch.equal(disparity_from_image(grey, inverted=True), 1 - grey[..., 0])
    wide = disparity_from_image(grey * 100 + 5, inverted=True)
    assert torch.allclose(wide.aminmax().min, (grey * 100 + 5).min()) and wide.argmax() == grey.argmin()
    assert disparity_from_image(grey.half()).dtype == torch.float32
    for bad in (torch.rand(5, 7, 3), torch.rand(1, 5, 7, 2), torch.rand(1, 0, 7, 3)):
        with pytest.raises(BokehError):
            disparity_from_image(bad)


def test_disparity_from_mask():
    mask = torch.rand(5, 7)
    assert torch.equal(disparity_from_mask(mask), mask[None])
    assert torch.equal(disparity_from_mask(mask[None], inverted=True), 1 - mask[None])
    with pytest.raises(BokehError):
        disparity_from_mask(torch.rand(1, 1, 5, 7))


def test_distance_becomes_dioptres_and_sky_is_far():
    depth = torch.tensor([[[0.5, 2.0, math.inf, 0.0, -1.0]]])
    assert disparity_from_distance(depth).tolist() == [[[2.0, 0.5, 0.0, 0.0, 0.0]]]
    assert disparity_from_distance(torch.tensor([[[math.nan, 1.0]]])).tolist() == [[[1.0, 1.0]]]
    with pytest.raises(BokehError, match="nothing but NaN"):
        disparity_from_distance(torch.full((1, 2, 3), math.nan))


def test_geometry_mask_and_sky():
    depth = torch.tensor([[[1.0, 2.0], [4.0, math.nan]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    metres = {"depth": depth, "metric": True}
    disparity, metric = disparity_from_geometry({**metres, "mask": mask})
    assert metric and disparity.tolist() == [[[1.0, 0.5], [0.25, 0.0]]]
    sky = torch.tensor([[[0.0, 0.9], [0.0, 1.0]]])
    assert disparity_from_geometry({**metres, "sky": sky, "mask": mask})[0].tolist() == [[[1.0, 0.0], [0.25, 0.0]]]
    assert disparity_from_geometry(metres)[0].tolist() == [[[1.0, 0.5], [0.25, 0.25]]], "the hole gets the farthest of its neighbours"
    with pytest.raises(BokehError, match="image"):
        disparity_from_geometry({"image": depth})


# What core's nodes put into their packets: MoGe-2, MoGe-1, a MoGe panorama, Depth Anything 3 alone and over several views, and ours.
PACKETS = [
    ({"points": 3, "depth": 1, "intrinsics": 0, "mask": 1, "normal": 3, "image": 3}, True),
    ({"points": 3, "depth": 1, "intrinsics": 0, "mask": 1, "image": 3}, False),
    ({"points": 3, "depth": 1, "mask": 1, "image": 3}, False),
    ({"depth": 1, "image": 3, "mode": "mono", "sky": 1}, False),
    ({"depth": 1, "image": 3, "mode": "mono", "confidence": 1}, False),
    ({"depth": 1, "image": 3, "mode": "multiview", "extrinsics": 0, "intrinsics": 0, "confidence": 1}, False),
    ({"depth": 1, "metric": True, "image": 3}, True),
    ({"disparity": 1, "metric": False, "image": 3}, False),
]


@pytest.mark.parametrize(("packet", "metric"), PACKETS)
def test_packets_of_depth_nodes(packet, metric):
    """Scale-free depth becomes 0..1 over the clip; metres stay metres unless nobody said so."""
    distance = torch.linspace(1, 9, 60).reshape(1, 6, 10).repeat(2, 1, 1)
    distance[1] *= 2
    shapes = {0: (2, 3, 3), 1: (2, 6, 10), 3: (2, 6, 10, 3)}
    filled = {key: kind if isinstance(kind, str | bool) else torch.zeros(shapes[kind]) for key, kind in packet.items()}
    if "mask" in filled:
        filled["mask"] = torch.ones(2, 6, 10, dtype=torch.bool)
    if "depth" in filled:
        filled["depth"] = distance
    else:
        filled["disparity"] = (1 / distance - 1 / 18) / (1 - 1 / 18)
    kept = {key: value.clone() for key, value in filled.items() if isinstance(value, torch.Tensor)}
    disparity, says = disparity_from_geometry(filled)
    assert says is metric
    expected = 1 / distance if metric else (1 / distance - 1 / 18) / (1 - 1 / 18)
    assert torch.allclose(disparity, expected, atol=1e-6)
    if "depth" in filled:
        forced, says = disparity_from_geometry(filled, metres=True)
        assert says and torch.allclose(forced, 1 / distance)
    assert all(torch.equal(filled[key], value) for key, value in kept.items())


def test_stray_near_pixels_do_not_squeeze_the_range():
    distance = torch.linspace(1, 4, 40000).reshape(1, 200, 200).clone()
    distance[0, 50, 60:70] = 0.001
    disparity, _ = disparity_from_geometry({"depth": distance})
    assert disparity.max() == 1 and 0.7 < float(disparity[0, 0, 0]) < 0.85, "ten pixels at a millimetre would have made this 0.001"
    assert disparity_from_geometry({"depth": distance, "metric": True})[0].max() < 1.3
    even = torch.rand(3, 50, 50, generator=torch.Generator().manual_seed(0))
    assert robust_span(even) == (float(even.min()), float(even.max())), "without outliers: minimum and maximum"
    assert robust_span(torch.full((2, 3, 3), 0.5)) == (0.5, 0.5)


def surface():
    """[200, 300] a floor, a bowl and, 0.3 nearer, a box with a slanted front."""
    y, x = torch.arange(200.0)[:, None], torch.arange(300.0)[None]
    d = 0.15 + 0.0004 * x + 0.0007 * y + 0.05 * torch.sin(x / 70) * torch.cos(y / 50)
    d[60:140, 100:220] = 0.55 + 0.0003 * x[:, 100:220]
    return d


@pytest.mark.parametrize("levels", [255, 219, 1023, 120])
def test_the_staircase_of_quantised_maps_goes(levels):
    true = surface()
    stairs = (true * levels).round() / levels
    smooth = deband(stairs[None])[0]
    assert float((smooth - stairs).abs().max()) <= 0.5001 / levels, "no value may move by more than rounding did"
    inside = torch.ones_like(true, dtype=torch.bool)  # away from the box's edge, where the slope is what it is
    for rows, columns in ((slice(58, 62), slice(98, 222)), (slice(138, 142), slice(98, 222)), (slice(58, 142), slice(98, 102))):
        inside[rows, columns] = False
    inside[58:142, 218:222] = False
    before, after = (((one - true)[:, 1:] - (one - true)[:, :-1])[inside[:, 1:] & inside[:, :-1]].abs().mean() for one in (stairs, smooth))
    assert after < 0.2 * before, f"terraces: {before * levels:.3f} levels a pixel before, {after * levels:.3f} after"
    assert (smooth - true).abs()[inside].mean() < 0.75 * (stairs - true).abs()[inside].mean()
    jump = (smooth[60:140, 100] - smooth[60:140, 99]) * levels
    true_jump = (true[60:140, 100] - true[60:140, 99]) * levels
    assert float((jump - true_jump).abs().max()) <= 1.01, "the edge is as high as it was and in its place"


def test_blur_of_an_8_bit_ramp_has_no_terraces():
    """A floor that rises by 0.2: with 40 px of blur an 8-bit map makes it in 51 steps of 0.16 px; the steps must go."""
    true = (0.3 + 0.2 * torch.arange(400.0) / 399).expand(40, 400)
    image = ((true * 255).round() / 255)[None, ..., None].expand(-1, -1, -1, 3)
    radius = make_defocus(disparity_from_image(image), Lens(strength=40.0 * 1024 / 400), 0.3, width=400).signed_radius()[0]
    change = radius.diff(dim=1)[:, 4:-4]
    assert float(change.max()) < 0.03 < 0.156 < float((40 * image[0, :, :, 0]).diff(dim=1).max()), "px of blur from pixel to pixel"
    assert float((change[:, 20:-20] - 40 * 0.2 / 399).abs().mean()) < 0.002


def test_what_is_not_quantised_stays_as_it_is():
    g = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 12, (1, 64, 64), generator=g) / 11  # a few layers, drawn by hand
    sixteen = (torch.rand(1, 64, 64, generator=g) * 65535).round() / 65535
    for one in (torch.rand(1, 64, 64, generator=g), flat, sixteen, torch.full((1, 8, 8), 0.5), torch.full((1, 8, 8), math.nan)):
        assert deband(one) is one
    assert deband(torch.randint(0, 256, (2, 9, 1), generator=g) / 255).shape == (2, 9, 1)


def test_holes_get_the_farthest_value_beside_them():
    d = torch.full((2, 20, 30), 0.2)
    d[:, 5:15, 10:20] = 0.8
    holed = d.clone()
    holed[0, 4:16, 18:23] = math.nan  # a stereo shadow beside the box
    filled = fill_holes(holed)
    assert torch.equal(filled[1], d[1]) and not bool(filled.isnan().any()) and bool(holed.isnan().any())
    assert bool((filled[0, 4:16, 20:23] == 0.2).all()), "the background goes on behind the silhouette"
    assert torch.equal(filled[0][~holed[0].isnan()], d[0][~holed[0].isnan()])
    image = holed[..., None].expand(-1, -1, -1, 3)
    assert bool((disparity_from_image(image)[0, 4:16, 20:23] == 0.2).all())
    far_bright = disparity_from_image(1 - image, inverted=True)
    assert torch.allclose(far_bright, disparity_from_image(image)), "in flipped maps too"
    with pytest.raises(BokehError, match="metres"):
        disparity_from_image(torch.full((1, 2, 2, 1), math.inf))


def test_every_way_of_saying_depth_reaches_the_same_blur(nodes):
    """One scene as near-bright and flipped picture, mask, 8 bit, metres with an infinite sky, 1 / metres, and every geometry."""
    d = surface()[None]
    sky = torch.zeros_like(d, dtype=torch.bool)
    sky[:, :30] = True
    d = torch.where(sky, 0.0, d)
    d = d / d.max()
    metres = torch.where(sky, math.inf, 0.7 / d.clamp(min=1e-3))
    invalid = metres.clone()
    invalid[sky] = math.nan
    image = torch.rand(1, 200, 300, 3, generator=torch.Generator().manual_seed(0))
    ways = {
        "near bright": (d[..., None].expand(-1, -1, -1, 3), "near is bright"),
        "mask": (d, "near is bright"),
        "far bright": (1 - d[..., None], "far is bright"),
        "8 bit": (((d * 255).round() / 255)[..., None].expand(-1, -1, -1, 3), "near is bright"),
        "16 bit": (((d * 65535).round() / 65535)[..., None], "near is bright"),
        "far bright 8 bit": (1 - ((d * 255).round() / 255)[..., None], "far is bright"),
        "metres": (metres[..., None], "metres"),
        "1 / metres": (d[..., None] / 0.7, "1 / metres"),
        "MoGe-2": ({"depth": metres, "mask": ~sky, "normal": image, "image": image}, "near is bright"),
        "MoGe-1, raw": ({"depth": invalid * 3, "mask": ~sky, "image": image}, "near is bright"),
        "Depth Anything 3": ({"depth": torch.where(sky, 30.0, metres), "sky": sky.float(), "mode": "mono"}, "near is bright"),
        "ours, metric": ({"depth": metres, "metric": True}, "near is bright"),
        "ours, relative": ({"disparity": d, "metric": False}, "near is bright"),
    }
    plain = {"strength": 60.0, "focus": "point", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.5, "follow": False}
    radii = {}
    for name, (depth, values) in ways.items():
        defocus = nodes["BokehDefocus"].execute(image=image, depth=depth, depth_values=values, **plain).args[0]
        radii[name] = defocus.signed_radius()
        assert defocus.metric is (name in ("metres", "1 / metres", "MoGe-2", "ours, metric"))
    for name, radius in radii.items():
        rounding = 0.6 / 255 * 60 * 300 / 1024 if "8 bit" in name else 2e-3
        assert float((radius - radii["near bright"]).abs().max()) < 2 * rounding, name
    assert float(radii["near bright"].amax() - radii["near bright"].amin()) == pytest.approx(60 * 300 / 1024, rel=1e-3)


def test_small_maps_get_the_edges_of_the_picture(nodes):
    image = torch.full((1, 160, 200, 3), 0.2)
    image[:, 43:117, 61:143] = 0.8
    true = torch.where(image[..., 0] > 0.5, 0.9, 0.2)
    small = torch.nn.functional.avg_pool2d(true[None], 4)[0]
    small = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(small[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    plain = {"strength": 60.0, "focus": "value", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.5, "follow": False}
    got = nodes["BokehDefocus"].execute(image=image, depth=small[..., None], depth_values="near is bright", **plain).args[0].disparity
    simple = fit_disparity(small, 1, 160, 200)
    assert float((got - true).abs().mean()) < 0.2 * float((simple - true).abs().mean())
    clip = nodes["BokehDefocus"].execute(image=image.expand(2, -1, -1, -1), depth=small, depth_values="near is bright", **plain).args[0]
    assert torch.equal(clip.disparity, simple.expand(2, -1, -1)), "one map for several pictures follows none of them"


def test_fit_resizes_and_repeats():
    small = torch.tensor([[[0.0, 1.0]]])
    # Half-pixel centres: the four columns of the large map lie at -0.25, 0.25, 0.75 and 1.25 of the small one.
    assert fit_disparity(small, 3, 1, 4)[2].tolist() == [[0.0, 0.25, 0.75, 1.0]]
    assert fit_disparity(RAMP, 2, 33, 65) is not None
    with pytest.raises(BokehError, match=r"2 depth maps for 3 images"):
        fit_disparity(RAMP, 3, 33, 65)
