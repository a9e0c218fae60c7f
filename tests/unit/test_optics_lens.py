"""Lens, EXIF and the published K, against the textbook and the values of the published systems."""

import math

import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.optics.lens import Aperture, Lens, crop_factor, sensor_width_from_crop
from bokeh_core.optics.published_k import (
    any_to_bokeh_k,
    bokehdepth_k,
    bokehdiff_k,
    dof_cond,
    dof_cond_512,
    dof_cond_512_crop,
    magicbokeh_defocus,
)


def coc_diameter_mm(f, n, s1, s2):
    """Circle of confusion of a thin lens as optics textbooks give it: all in mm, f focal length, s1 in focus, s2 the object."""
    return (f / n) * abs(s2 - s1) / s2 * f / (s1 - f)


@pytest.mark.parametrize(("f", "n", "s1", "s2"), [(50, 1.8, 2.0, 5.0), (85, 1.4, 1.2, 0.9), (24, 8, 10.0, 300.0), (6.86, 1.8, 0.4, 2.0)])
def test_thin_lens_gives_the_textbook_radius(f, n, s1, s2):
    lens = Lens(f_number=n, focal_length=f, sensor_width=36.0)
    k = lens.k(3000, torch.tensor([1 / s1]), metric=True)
    expected = coc_diameter_mm(f, n, s1 * 1000, s2 * 1000) / 2 * 3000 / 36.0
    assert float(k) * abs(1 / s1 - 1 / s2) == pytest.approx(expected, rel=1e-5)


def test_thin_lens_focused_at_infinity_blurs_by_half_the_entrance_pupil():
    # A ray from distance S through the edge of the pupil f/n lands f * (f/2n) / S off the axis.
    lens = Lens(f_number=2.0, focal_length=50, sensor_width=36.0, focus_distance=math.inf)
    assert float(lens.k(3600, torch.tensor([0.0]), metric=True)) == pytest.approx(50 * 12.5 / 1000 * 100, rel=1e-6)


def test_focus_distance_rules_over_the_focus_of_the_frame():
    focus = torch.tensor([0.2, 1.0])
    fixed = Lens(f_number=2.0, focal_length=85, focus_distance=2.0).k(1000, focus, metric=True)
    moving = Lens(f_number=2.0, focal_length=85).k(1000, focus, metric=True)
    assert fixed[0] == fixed[1] and moving[0] < moving[1]


def test_strength_is_the_radius_of_the_whole_range_at_1024():
    focus = torch.zeros(3)
    assert torch.equal(Lens(strength=24.0).k(1024, focus, metric=False), torch.full((3,), 24.0))
    assert torch.equal(Lens(strength=24.0).k(512, focus, metric=False, disparity_range=4.0), torch.full((3,), 3.0))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": -1.0}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"f_number": 1.8}, "focal length"),
        ({"focal_length": 50}, "f-number"),
        ({"f_number": 0, "focal_length": 50}, "f-number"),
        ({"f_number": 2, "focal_length": -50}, "focal length"),
        ({"f_number": 2, "focal_length": 50, "sensor_width": 0}, "sensor width"),
        ({"f_number": 2, "focal_length": 50, "focus_distance": 0.05}, "focus distance"),
        ({"focus_distance": 2.0}, "focus distance"),
    ],
)
def test_impossible_lenses_are_refused(settings, says):
    with pytest.raises(BokehError, match=says):
        Lens(**settings)


def test_thin_lens_refuses_relative_depth_and_says_what_to_do():
    with pytest.raises(BokehError, match=r"metres.*strength"):
        Lens(f_number=2.0, focal_length=50).k(1024, torch.tensor([0.5]), metric=False)


def test_thin_lens_refuses_a_focus_inside_its_focal_length():
    with pytest.raises(BokehError, match="beyond its focal length"):
        Lens(f_number=2.0, focal_length=50).k(1024, torch.tensor([0.5, 25.0]), metric=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"blades": -1},
        {"roundness": 1.5},
        {"anamorphic": 0},
        {"cats_eye": -0.1},
        {"spherical": 2},
        {"rotation": math.inf},
        {"picture": torch.zeros(4, 4)},
        {"picture": -torch.ones(4, 4)},
        {"picture": torch.ones(3, 4, 4)},
    ],
)
def test_impossible_apertures_are_refused(settings):
    with pytest.raises(BokehError):
        Aperture(**settings)


def test_defaults_compare_equal():
    assert Lens() == Lens() and Lens().aperture == Aperture()


# (N, f, f35, s1, W, H) -> sensor mm, K native, K at 512: rows of the table in BokehDepth's reference, rounded as printed there.
BOKEHDEPTH_TABLE = [
    ((2.0, 50, 50, 1.8, 1920, 1080), 37.713, 32.728, 8.728),
    ((2.8, 85, 85, 3.2, 1920, 1080), 37.713, 67.476, 17.994),
    ((5.6, 35, 52, 4.0, 1280, 720), 25.384, 5.564, 2.226),
    ((22, 50, 50, 3.0, 6000, 4000), 36.003, 9.63, 0.82),
    ((1.8, 4.25, 26, 0.5, 4032, 3024), 5.658, 3.606, 0.458),
]


@pytest.mark.parametrize(("camera", "sensor", "native", "at_512"), BOKEHDEPTH_TABLE)
def test_bokehdepth_k_is_the_published_table_and_our_lens(camera, sensor, native, at_512):
    n, f, f35, s1, w, h = camera
    k = dof_cond(*camera)
    assert sensor_width_from_crop(f, f35, w, h) == pytest.approx(sensor, abs=6e-4)
    assert k == pytest.approx(native, abs=5e-3)
    assert dof_cond_512(k, w) == pytest.approx(at_512, abs=5e-3)
    lens = Lens(f_number=n, focal_length=f, sensor_width=sensor_width_from_crop(f, f35, w, h), focus_distance=s1)
    assert float(lens.k(w, torch.tensor([1 / s1]), metric=True)) == pytest.approx(k, rel=1e-6)


def test_dof_cond_quirks():
    assert dof_cond_512_crop(5.564, 1280, 35, 52) == pytest.approx(1.498, abs=1e-3)
    assert crop_factor(50, None) == 1.0
    assert dof_cond(2, 50, None, 3, 600, 400) == dof_cond(2, 50, 50, 3, 600, 400)
    assert dof_cond(2, 50, 50, 0.03, 640, 480) > 0
    with pytest.raises(ZeroDivisionError):
        dof_cond(2, 50, 50, 0.05, 640, 480)


def test_one_blur_reads_the_same_in_every_published_unit():
    # 20 px of radius across the whole range on a 1024 px wide picture is 10 px on a 512 px wide one.
    k, width = 20.0, 1024
    assert any_to_bokeh_k(k, width) == 20.0
    assert bokehdepth_k(k, width) == 10.0
    assert bokehdiff_k(k) == 20.0 and bokehdiff_k(k, side=1024) == 10.0
    assert float(magicbokeh_defocus(torch.tensor(-16.0))) == 0.5
    assert bokehdepth_k(0.0, width) == 1.0 and bokehdepth_k(1e3, width) == 30.0
    assert bokehdepth_k(torch.tensor([0.0, 20.0, 1e3]), width).tolist() == [1.0, 10.0, 30.0]


def _photo(path, tags, orientation=None, size=(60, 40)):
    from PIL import ExifTags, Image

    picture = Image.new("RGB", size)
    exif = picture.getexif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif).update({getattr(ExifTags.Base, name): value for name, value in tags.items()})
    picture.save(path, exif=exif)
    return path


def test_exif_with_35mm_equivalent(tmp_path):
    from PIL import Image

    tags = {"FNumber": 1.8, "FocalLength": 4.25, "FocalLengthIn35mmFilm": 26, "SubjectDistance": 0.5, "ExifImageWidth": 4032}
    path = _photo(tmp_path / "a.jpg", {**tags, "ExifImageHeight": 3024})
    lens = Lens.from_exif(path)
    assert (lens.f_number, lens.focal_length, lens.focus_distance) == pytest.approx((1.8, 4.25, 0.5))
    assert lens.sensor_width == pytest.approx(5.658, abs=1e-3)
    with Image.open(path) as picture:
        assert Lens.from_exif(picture) == lens and Lens.from_exif(picture.getexif()) == lens


def test_exif_with_focal_plane_resolution_and_sideways(tmp_path):
    # 6000 px at 6000/36 px per mm is a 36 mm sensor; upright, its short side lies along the picture's width.
    tags = {"FNumber": 2.0, "FocalLength": 50, "FocalPlaneResolutionUnit": 3, "ExifImageWidth": 6000, "ExifImageHeight": 4000}
    tags |= {"FocalPlaneXResolution": 6000 / 3.6, "FocalPlaneYResolution": 4000 / 2.4}
    assert Lens.from_exif(_photo(tmp_path / "a.jpg", tags)).sensor_width == pytest.approx(36.0, rel=1e-4)
    lens = Lens.from_exif(_photo(tmp_path / "b.jpg", tags, orientation=6))
    assert lens.sensor_width == pytest.approx(24.0, rel=1e-4) and lens.focus_distance is None


@pytest.mark.parametrize("missing", ["FNumber", "FocalLength", "FocalLengthIn35mmFilm"])
def test_exif_names_the_missing_tag(tmp_path, missing):
    tags = {"FNumber": 2.0, "FocalLength": 50.0, "FocalLengthIn35mmFilm": 75}
    del tags[missing]
    with pytest.raises(BokehError, match=missing):
        Lens.from_exif(_photo(tmp_path / "a.jpg", tags))


def test_exif_zero_means_unknown_and_no_file_is_said(tmp_path):
    with pytest.raises(BokehError, match="FNumber"):
        Lens.from_exif(_photo(tmp_path / "a.jpg", {"FNumber": 0.0, "FocalLength": 50.0, "FocalLengthIn35mmFilm": 50}))
    with pytest.raises(BokehError, match="can not be read"):
        Lens.from_exif(tmp_path / "none.jpg")
