"""Defocus and the ways depth comes in."""

import math

import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.optics.defocus import (
    disparity_from_distance,
    disparity_from_geometry,
    disparity_from_image,
    disparity_from_mask,
    fit_disparity,
    make_defocus,
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
    with pytest.raises(BokehError, match="1 NaN"):
        disparity_from_distance(torch.tensor([[[math.nan, 1.0]]]))


def test_geometry_mask_and_sky():
    depth = torch.tensor([[[1.0, 2.0], [4.0, math.nan]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    assert disparity_from_geometry({"depth": depth, "mask": mask}).tolist() == [[[1.0, 0.5], [0.25, 0.0]]]
    sky = torch.tensor([[[0.0, 0.9], [0.0, 1.0]]])
    assert disparity_from_geometry({"depth": depth, "sky": sky, "mask": mask}).tolist() == [[[1.0, 0.0], [0.25, 0.0]]]
    with pytest.raises(BokehError, match="NaN"):
        disparity_from_geometry({"depth": depth})
    with pytest.raises(BokehError, match="image"):
        disparity_from_geometry({"image": depth})


def test_fit_resizes_and_repeats():
    small = torch.tensor([[[0.0, 1.0]]])
    # Half-pixel centres: the four columns of the large map lie at -0.25, 0.25, 0.75 and 1.25 of the small one.
    assert fit_disparity(small, 3, 1, 4)[2].tolist() == [[0.0, 0.25, 0.75, 1.0]]
    assert fit_disparity(RAMP, 2, 33, 65) is not None
    with pytest.raises(BokehError, match=r"2 depth maps for 3 images"):
        fit_disparity(RAMP, 3, 33, 65)
