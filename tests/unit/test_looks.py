"""Lens looks of the FAST renderer: each against its definition, and against the REFERENCE rays."""

import math

import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import composite, render
from bokeh_core.render.aperture import AXIAL_SCALE, LATERAL_SCALE, ONION_RINGS, kernel
from bokeh_core.render.light import recover_highlights, to_linear
from bokeh_core.render.rays import trace
from bokeh_core.render.scene import Layer, Scene


def half_picture():
    shape = torch.zeros(64, 64)
    shape[:, 32:] = 1.0  # the right half
    return shape


LOOKS = {
    "blades": Aperture(blades=6, rotation=20),
    "roundness": Aperture(blades=5, roundness=0.5),
    "anamorphic": Aperture(anamorphic=2.0),
    "bubble": Aperture(spherical=0.8),
    "creamy": Aperture(spherical=-0.8),
    "onion": Aperture(onion=1.0),
    "cats_eye": Aperture(cats_eye=0.8),
    "axial": Aperture(chromatic_longitudinal=1.0),
    "lateral": Aperture(chromatic_lateral=1.0),
    "picture": Aperture(picture=half_picture()),
    "all at once": Aperture(blades=7, anamorphic=1.3, cats_eye=0.5, spherical=0.4, chromatic_longitudinal=-0.5, chromatic_lateral=0.5),
}


def lamp(defocus, size=61, at=None, power=1.0):
    """A scene with one lit pixel, and k that gives it this defocus in px for a focus of 0.5."""
    color = torch.zeros(3, size, size)
    x, y = at or (size // 2, size // 2)
    color[:, y, x] = power
    disparity = torch.full((size, size), 0.9 if defocus > 0 else 0.1)
    return Scene((Layer(color, torch.ones(size, size), disparity),)), abs(defocus) / 0.4


def ball(aperture, defocus=-14.0, size=61, at=None):
    """[3, size, size] FAST picture of a lamp."""
    scene, k = lamp(defocus, size, at)
    return composite(scene, k, 0.5, aperture=aperture)


def coordinates(size=61, center=None):
    n = size // 2
    x0, y0 = center or (n, n)
    y, x = torch.meshgrid(torch.arange(size) - y0, torch.arange(size) - x0, indexing="ij")
    return x.double(), y.double()


@pytest.mark.parametrize("defocus", [-3.0, 9.0])
@pytest.mark.parametrize("look", LOOKS)
def test_point_light_is_the_reference_one(look, defocus):
    aperture = LOOKS[look]
    scene, k = lamp(defocus, 43, (28, 16))
    truth = trace(scene, k, 0.5, rays=3000, aperture=aperture)
    error = composite(scene, k, 0.5, aperture=aperture) - truth
    # Rays leave 1 to 2 % of noise. Where the two rims of a cat's eye cross, FAST approximates; magnified channels are sampled twice.
    approximate = aperture.cats_eye or aperture.chromatic_lateral
    assert float(error.abs().sum() / truth.sum()) < (0.09 if approximate and defocus == -3 else 0.04 if approximate else 0.025)


@pytest.mark.parametrize("look", LOOKS)
def test_scene_is_the_reference_one(look):
    """A sharp card in front of a blurred slope with lights."""
    generator = torch.Generator().manual_seed(5)
    h, w = 90, 110
    back = torch.nn.functional.avg_pool2d(torch.rand(1, 3, h, w, generator=generator), 5, 1, 2)[0]
    back[:, 20:23, 30:33] = 20.0
    card = torch.zeros(h, w)
    card[30:70, 60:90] = 1
    plane = (0.05, 0.001, 0.002)
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float32), torch.arange(w, dtype=torch.float32), indexing="ij")
    front = Layer(torch.rand(3, h, w, generator=generator), card, torch.full((h, w), 0.6))
    scene = Scene((Layer(back, torch.ones(h, w), plane[0] + plane[1] * x + plane[2] * y, plane), front))
    truth = trace(scene, 20.0, 0.6, rays=400, aperture=LOOKS[look])
    error = composite(scene, 20.0, 0.6, aperture=LOOKS[look]) - truth
    inner = error[:, 14:-14, 14:-14]  # beyond the frame rays see its repeated border, scatter sees nothing
    assert float(-10 * torch.log10(inner.square().mean())) > (38 if "lateral" in look or "all" in look else 44)


def test_blades_make_a_polygon_of_the_right_area_and_orientation():
    out = ball(Aperture(blades=6, rotation=30))[0]
    lit = (out > 0.5 * out.max()).double()
    assert float(lit.sum()) == pytest.approx(1.5 * math.sqrt(3) * 14**2, rel=0.03)
    x, y = coordinates()
    # A corner points at 30 degrees, so the flat side is to the right, at cos(30 deg) of the radius.
    assert float((x * lit).max()) == pytest.approx(14 * math.cos(math.pi / 6), abs=0.8)
    assert float((y * lit).max()) == pytest.approx(14, abs=1.2)
    rounded = ball(Aperture(blades=6, roundness=1.0))
    assert torch.equal(rounded, ball(None))


def test_odd_blades_turn_round_in_front_of_focus():
    behind, front = (ball(Aperture(blades=5, rotation=17), s) for s in (-13.0, 13.0))
    assert torch.allclose(behind.flip(-1, -2), front, atol=1e-7)
    assert float((behind - front).abs().sum() / front.sum()) > 0.1


def test_anamorphic_ball_is_twice_as_tall():
    out = ball(Aperture(anamorphic=2.0))[0]
    second = [float((out * v * v).sum() / out.sum()) for v in coordinates()]
    assert math.sqrt(second[0] * 4) == pytest.approx(7, abs=0.1)  # <x^2> of a uniform ellipse is a^2 / 4
    assert math.sqrt(second[1] * 4) == pytest.approx(14, abs=0.1)


def test_spherical_rim_flips_in_front_of_focus():
    x, y = coordinates()
    radius = (x * x + y * y).sqrt()
    rim, core = (radius > 10) & (radius < 12.5), radius < 5
    behind, front = (ball(Aperture(spherical=0.8), d)[0] for d in (-14.0, 14.0))
    expected = [(1 + c * 0.8 * (2 * (11.3 / 14) ** 2 - 1)) / (1 - c * 0.8 * (1 - 2 * (3.5 / 14) ** 2)) for c in (1, -1)]
    assert float(behind[rim].mean() / behind[core].mean()) == pytest.approx(expected[0], rel=0.1)
    assert float(front[rim].mean() / front[core].mean()) == pytest.approx(expected[1], rel=0.1)


@pytest.mark.parametrize("defocus", [-24.0, 40.0])
def test_onion_rings_are_seen(defocus):
    x, y = coordinates(101)
    radius = (x * x + y * y).sqrt()
    out = ball(Aperture(onion=1.0), defocus=defocus, size=101)[0]
    turn = (radius / abs(defocus)) ** 2 * ONION_RINGS % 1
    bright, dark = (turn < 0.15) | (turn > 0.85), (turn - 0.5).abs() < 0.15
    inside = radius < 0.85 * abs(defocus)
    assert float(out[bright & inside].mean()) > 1.4 * float(out[dark & inside].mean())


def test_cats_eye_is_two_circles_and_grows_towards_the_corner():
    size, center = 301, 150
    shift = 0.9 / math.hypot(center, center)
    areas = []
    for place in (0, 60, 125):
        out = ball(Aperture(cats_eye=0.9), -12.0, size, (center + place, center + place))[0]
        x, y = coordinates(size, (center + place, center + place))
        mx, my = (shift * coordinates(size)[i] for i in (0, 1))
        inside = (x * x + y * y <= 144) & ((x + 12 * mx) ** 2 + (y + 12 * my) ** 2 <= 144)
        lit = out > 0.4 * out.max()
        assert float((lit != inside).double().sum()) < 0.06 * float(inside.sum())
        areas.append(float(lit.sum()))
    assert areas[0] == pytest.approx(math.pi * 144, rel=0.1) and areas[0] > 1.2 * areas[1] > 1.2 * areas[2]
    flat = Scene((Layer(torch.full((3, 50, 70), 0.5), torch.ones(50, 70), torch.full((50, 70), 0.1)),))
    for k in (15.0, 90.0):
        assert (composite(flat, k, 0.4, aperture=Aperture(cats_eye=1.0)) - 0.5).abs().max() < 1e-6


def test_cats_eye_keeps_its_side_on_coarse_grids():
    for defocus in (-14.0, -30.0, 30.0):
        scene, k = lamp(defocus, 201, (150, 60))
        fast, truth = composite(scene, k, 0.5, aperture=LOOKS["cats_eye"])[0], trace(scene, k, 0.5, rays=500, aperture=LOOKS["cats_eye"])[0]
        x, y = coordinates(201, (150, 60))
        for v in (x, y):
            assert float((fast * v).sum() / fast.sum()) == pytest.approx(float((truth * v).sum() / truth.sum()), abs=0.15)


def test_chromatic_looks():
    x, y = coordinates()
    for defocus, sign in ((-14.0, 1), (14.0, -1)):
        out = ball(Aperture(chromatic_longitudinal=1.0), defocus)
        size = [math.sqrt(2 * float((c * (x * x + y * y)).sum() / c.sum())) for c in out]
        assert size == pytest.approx([14 * (1 - sign * AXIAL_SCALE), 14, 14 * (1 + sign * AXIAL_SCALE)], rel=0.01)
    out = ball(Aperture(chromatic_lateral=1.0), 2.0, 201, (190, 100))
    x, _ = coordinates(201)
    place = [float((c * x).sum() / c.sum()) for c in out]
    assert place == pytest.approx([90 * (1 + LATERAL_SCALE), 90, 90 * (1 - LATERAL_SCALE)], abs=0.03)


def test_aperture_picture_shows_in_far_lights_and_may_change():
    shape = half_picture()
    far, near = ball(Aperture(picture=shape))[0], ball(Aperture(picture=shape), 14.0)[0]
    x, _ = coordinates()
    assert float(far[x > 0].sum() / far.sum()) > 0.95
    assert float(near[x < 0].sum() / near.sum()) > 0.95
    shape.copy_(shape.flip(1))  # the same tensor with another content is another aperture
    assert torch.allclose(ball(Aperture(picture=shape))[0], far.flip(1), atol=1e-6)
    with pytest.raises(BokehError, match="lets no light"):
        corner = torch.zeros(64, 64)
        corner[0, 0] = 1.0
        ball(Aperture(picture=corner))


def test_plain_shapes_share_the_disk_kernel():
    for plain in (Aperture(), Aperture(blades=2, rotation=40), Aperture(blades=6, roundness=1.0), Aperture(cats_eye=0.5)):
        assert kernel(plain) is kernel(None)
    assert kernel(Aperture(blades=6)) is kernel(Aperture(blades=6, cats_eye=0.3, chromatic_lateral=1))


def test_render_uses_the_lens_and_keeps_light():
    image = torch.zeros(1, 3, 160, 160)
    image[0, :, 80, 80] = torch.tensor([1.0, 30.0, 1000.0])
    disparity = torch.full((1, 160, 160), 0.1)
    disparity[0, 0, 0] = 0.101  # nearly constant
    for look in ("blades", "anamorphic", "bubble", "picture"):
        lens = Lens(aperture=LOOKS[look])
        out = render(image, Defocus(disparity, torch.tensor([0.6]), torch.tensor([40.0]), lens, False), linear=True)
        assert torch.allclose(out.sum((2, 3)), image.sum((2, 3)), rtol=1e-3)
        truth = ball(LOOKS[look], -20.0, 160, (80, 80))[1] * 30
        assert float((out[0, 1] - truth).abs().sum() / truth.sum()) < 0.01


def test_highlights_follow_the_formula():
    lens = Lens(highlights=3.0, highlight_threshold=0.8)
    t = float(to_linear(torch.full((3, 1, 1), 0.8))[0])
    image = torch.tensor([[0.2, t, 0.9, 1.0, 0.5], [0.1, 0.1, 0.3, 1.0, 0.5], [0.3, 0.0, 0.95, 0.4, 2.5]])[:, None]
    blurred = recover_highlights(image, lens, torch.full((1, 5), -7.0))
    gain = [1 + 3 * max(0.0, min(1.0, (m - t) / (1 - t))) ** 2 for m in (0.3, t, 0.95, 1.0, 2.5)]
    assert torch.allclose(blurred, image * torch.tensor(gain), rtol=1e-5)
    assert torch.equal(recover_highlights(image, lens, torch.zeros(1, 5)), image)  # in focus whites stay
    assert recover_highlights(image, Lens(), torch.full((1, 5), 9.0)) is image


def test_highlights_brighten_clipped_lights_through_render():
    image = torch.full((1, 3, 96, 96), 0.2)
    image[:, :, 46:50, 46:50] = 1.0
    disparity = torch.full((1, 96, 96), 0.1)
    disparity[0, 0, 0] = 0.101
    peaks = []
    for boost in (0.0, 2.0, 8.0):
        defocus = Defocus(disparity, torch.tensor([0.6]), torch.tensor([24.0]), Lens(highlights=boost), False)
        peaks.append(float(render(image, defocus, linear=True)[0, :, 48, 48].mean()) - 0.2)
    # 16 px of light 1 + b on a ground of 0.2, spread over a disk of radius 12.
    assert peaks == pytest.approx([16 * (1 + b - 0.2) / (math.pi * 144) for b in (0.0, 2.0, 8.0)], rel=0.02)


@pytest.mark.parametrize(
    "wrong", [{"highlights": -1.0}, {"highlights": math.inf}, {"highlight_threshold": 1.0}, {"highlight_threshold": -0.1}]
)
def test_wrong_highlights_are_named(wrong):
    with pytest.raises(BokehError, match=r"The highlight (boost|threshold) is .*; expected"):
        Lens(**wrong)
