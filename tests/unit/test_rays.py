"""The reference renderer against closed forms that share no code with it."""

import math

import numpy as np
import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.optics.lens import Aperture
from bokeh_core.render.aperture import AXIAL_SCALE, LATERAL_SCALE
from bokeh_core.render.rays import trace, vogel_disk
from bokeh_core.render.scene import Layer, Scene


def picture(height=64, width=72, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, height, width, generator=generator, dtype=torch.float64)


def sheet(color, d, alpha=None, plane=None):
    alpha = torch.ones_like(color[0]) if alpha is None else alpha
    return Layer(color, alpha, torch.full_like(color[0], d) if plane is None else plane_map(plane, *color.shape[1:]), plane)


def plane_map(plane, height, width):
    d0, gx, gy = plane
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij")
    return d0 + gx * x + gy * y


def disk_tent_kernel(radius, fine=24):
    """Integral of the bilinear tent of every pixel over a disk, by a fine midpoint rule."""
    reach = math.ceil(radius) + 1
    step = 1 / fine
    line = np.arange(-reach + step / 2, reach, step)
    y, x = np.meshgrid(line, line, indexing="ij")
    inside = (x * x + y * y <= radius * radius).astype(np.float64)
    tents = np.clip(1 - np.abs(line[None] - np.arange(-reach, reach + 1)[:, None]), 0, None)
    kernel = tents @ inside @ tents.T
    return torch.from_numpy(kernel / kernel.sum())


def convolve(image, kernel):
    reach = kernel.shape[0] // 2
    padded = torch.nn.functional.pad(image[None], (reach,) * 4, mode="replicate")[0]
    return torch.nn.functional.conv2d(padded[:, None], kernel[None, None])[:, 0]


def psnr(a, b):
    return float(-10 * torch.log10(((a - b) ** 2).mean()))


def test_vogel_disk_is_even():
    points = vogel_disk(2000)
    assert float(points.norm(dim=1).max()) < 1
    assert points.mean(0).abs().max() < 2e-3
    assert float((points**2).sum(1).mean()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("defocus", [0.8, 2.5, -7.3])
def test_one_plane_is_a_disk_blur(defocus):
    color = picture()
    scene = Scene((sheet(color, 0.5),))
    truth = convolve(color, disk_tent_kernel(abs(defocus)))
    assert psnr(trace(scene, defocus / 0.25, 0.25, rays=4096), truth) > 70


def test_strength_zero_is_the_composite_bit_for_bit():
    color = picture().float()
    near = sheet(picture(seed=1).float(), 0.9, alpha=(picture(seed=2)[0] > 0.5).float())
    expected = color * (1 - near.alpha) + near.color * near.alpha
    for scene, truth in ((Scene((sheet(color, 0.3),)), color), (Scene((sheet(color, 0.3), near)), expected)):
        assert torch.equal(trace(scene, 0.0, 0.4), truth)


def test_sharp_layer_over_blurred_one_in_closed_form():
    color, front = picture(), picture(seed=1)
    alpha = torch.zeros_like(color[0])
    alpha[20:44, 25:50] = 0.7
    scene = Scene((sheet(color, 0.2), sheet(front, 0.8, alpha)))
    truth = convolve(color, disk_tent_kernel(6.0)) * (1 - alpha) + front * alpha
    assert psnr(trace(scene, 10.0, 0.8, rays=4096), truth) > 70


def test_blurred_layer_over_sharp_one_in_closed_form():
    color, front = picture(), picture(seed=1)
    alpha = torch.zeros_like(color[0])
    alpha[20:44, 25:50] = 1.0
    scene = Scene((sheet(color, 0.2), sheet(front, 0.8, alpha)))
    kernel = disk_tent_kernel(6.0)
    truth = color * (1 - convolve(alpha[None], kernel)) + convolve(front * alpha, kernel)
    assert psnr(trace(scene, 10.0, 0.2, rays=4096), truth) > 70


def test_both_layers_blurred_keep_their_correlation():
    # Two coincident half planes at one disparity: "over" of separate blurs would let light through at the seam, rays must not.
    front = torch.ones(3, 48, 48, dtype=torch.float64)
    left = torch.zeros(48, 48, dtype=torch.float64)
    left[:, :24] = 1
    black = torch.zeros(3, 48, 48, dtype=torch.float64)
    scene = Scene((sheet(black, 0.0), sheet(front, 0.6, left), sheet(front, 0.6, 1 - left)))
    out = trace(scene, 20.0, 0.2, rays=256)
    inner = out[:, :, 12:36]
    # Pixel columns between the halves are shared by bilinear lookup, a fraction of one pixel column of 8 px radius.
    assert float(1 - inner.min()) < 0.03


def test_slanted_plane_closed_form_equals_iteration():
    plane = (0.1, 0.004, 0.009)
    color = torch.nn.functional.avg_pool2d(picture()[None], 5, 1, 2)[0]
    exact = Scene((sheet(color, 0, plane=plane),))
    free = Scene((Layer(color, torch.ones_like(color[0]), exact.layers[0].disparity),))
    a, b = trace(exact, 12.0, 0.4, rays=200), trace(free, 12.0, 0.4, rays=200)
    inner = np.s_[:, 10:-10, 10:-10]  # off the frame the plane goes on and the map repeats its border
    assert float((a[inner] - b[inner]).abs().max()) < 2e-4


def test_rays_converge():
    rng = picture(seed=3)
    alpha = (torch.nn.functional.avg_pool2d(picture(seed=4)[:1, None], 9, 1, 4)[0, 0] > 0.5).double()
    scene = Scene((sheet(torch.nn.functional.avg_pool2d(picture()[None], 3, 1, 1)[0], 0.1), sheet(rng, 0.9, alpha)))
    assert psnr(trace(scene, 20.0, 0.35, rays=1024), trace(scene, 20.0, 0.35, rays=4096)) > 60


def test_constant_scene_stays_constant_and_light_is_kept():
    flat = torch.full((3, 40, 40), 0.37, dtype=torch.float64)
    some = sheet(flat, 0.7, alpha=picture(40, 40, 5)[0])
    assert (trace(Scene((sheet(flat, 0.1), some)), 15.0, 0.4, rays=300) - 0.37).abs().max() < 1e-12
    lamp = torch.zeros(3, 61, 61, dtype=torch.float64)
    lamp[:, 30, 30] = 500.0
    out = trace(Scene((sheet(lamp, 0.9),)), 20.0, 0.2, rays=1024)
    assert float(out.sum()) == pytest.approx(1500.0, rel=1e-9)
    assert float(out[0].max()) == pytest.approx(500 / (math.pi * 14**2), rel=0.3)


def test_shifts_flips_and_offsets_commute():
    color = picture()
    base = trace(Scene((sheet(color, 0.6),)), 10.0, 0.2, rays=64)
    moved = trace(Scene((sheet(color + 0, 0.9),)), 10.0, 0.5, rays=64)
    assert torch.allclose(base, moved, atol=1e-12)
    rolled = trace(Scene((sheet(color.roll((3, 5), (1, 2)), 0.6),)), 10.0, 0.2, rays=64)
    assert torch.allclose(rolled[:, 10:-10, 12:-12], base.roll((3, 5), (1, 2))[:, 10:-10, 12:-12], atol=1e-12)


def test_tiles_change_nothing_and_progress_counts():
    scene = Scene((sheet(picture(), 0.1), sheet(picture(seed=1), 0.8, picture(seed=2)[0])))
    calls = []
    whole = trace(scene, 9.0, 0.5, rays=40)
    tiled = trace(scene, 9.0, 0.5, rays=40, tile=7, progress=lambda done, total: calls.append((done, total)))
    assert torch.allclose(whole, tiled, atol=1e-14)
    assert calls[-1] == (len(calls), len(calls)) and len(calls) == 10 * 3

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(scene, 9.0, 0.5, rays=40, progress=stop)


def ball(aperture, defocus=-14.0, at=(30, 30), size=61, rays=3000):
    """The picture of a small lamp; defocus in px."""
    lamp = torch.zeros(3, size, size, dtype=torch.float64)
    lamp[:, at[1], at[0]] = 1.0
    d = 0.9 if defocus > 0 else 0.1
    return trace(Scene((sheet(lamp, d),)), abs(defocus) / 0.4, 0.5, rays=rays, aperture=aperture)


def coordinates(size=61, center=(30, 30)):
    y, x = torch.meshgrid(torch.arange(size) - center[1], torch.arange(size) - center[0], indexing="ij")
    return x.double(), y.double()


def test_blades_make_a_polygon_of_the_right_area_and_orientation():
    out = ball(Aperture(blades=6, rotation=30))[0]
    lit = (out > 0.5 * out.max()).double()
    assert float(lit.sum()) == pytest.approx(1.5 * math.sqrt(3) * 14**2, rel=0.04)
    x, y = coordinates()
    # A corner points at 30 degrees, so the flat side is to the right, at cos(30 deg) of the radius.
    assert float((x * lit).max()) == pytest.approx(14 * math.cos(math.pi / 6), abs=0.8)
    assert float((y * lit).max()) == pytest.approx(14, abs=1.2)
    rounded = ball(Aperture(blades=6, roundness=1.0))[0]
    assert float((rounded > 0.5 * rounded.max()).sum()) == pytest.approx(math.pi * 14**2, rel=0.04)


def test_anamorphic_ball_is_twice_as_tall():
    out = ball(Aperture(anamorphic=2.0))[0]
    x, y = coordinates()
    second = [float((out * v * v).sum() / out.sum()) for v in (x, y)]
    assert second[1] / second[0] == pytest.approx(4.0, rel=0.02)
    assert math.sqrt(second[1] * 4) == pytest.approx(14, abs=0.2)  # <y^2> of a uniform ellipse is b^2 / 4


def test_spherical_rim_flips_in_front_of_focus():
    x, y = coordinates()
    radius = (x * x + y * y).sqrt()
    rim, core = (radius > 10) & (radius < 12.5), radius < 5
    behind, front = (ball(Aperture(spherical=0.8), d)[0] for d in (-14.0, 14.0))
    assert float(behind[rim].mean() / behind[core].mean()) > 2
    assert float(front[rim].mean() / front[core].mean()) < 0.5


def test_onion_rings_are_seen():
    x, y = coordinates()
    radius = (x * x + y * y).sqrt()
    out = ball(Aperture(onion=1.0), defocus=-24.0, size=61)[0]
    turn = (radius / 24) ** 2 * 6 % 1
    bright, dark = (turn < 0.15) | (turn > 0.85), (turn - 0.5).abs() < 0.15
    inside = radius < 22
    assert float(out[bright & inside].mean()) > 1.5 * float(out[dark & inside].mean())


def test_cats_eye_grows_towards_the_corner_and_keeps_brightness():
    aperture = Aperture(cats_eye=0.8)
    middle, corner = (ball(aperture, -8.0, at=at, size=161, rays=600) for at in ((80, 80), (148, 148)))
    plain = ball(Aperture(), -8.0, at=(80, 80), size=161, rays=600)
    area = [float((b[0] > 0.3 * b[0].max()).sum()) for b in (plain, middle, corner)]
    assert area[1] > 0.8 * area[0] and area[2] < 0.85 * area[0]
    flat = torch.full((3, 40, 40), 0.5, dtype=torch.float64)
    assert (trace(Scene((sheet(flat, 0.1),)), 15.0, 0.4, rays=200, aperture=Aperture(cats_eye=1.0)) - 0.5).abs().max() < 1e-12


def test_chromatic_looks():
    behind, front = (ball(Aperture(chromatic_longitudinal=1.0), d) for d in (-14.0, 14.0))
    x, y = coordinates()
    size = [[math.sqrt(2 * float((c * (x * x + y * y)).sum() / c.sum())) for c in out] for out in (behind, front)]
    assert size[0] == pytest.approx([14 * (1 - AXIAL_SCALE), 14, 14 * (1 + AXIAL_SCALE)], rel=0.02)
    assert size[1] == pytest.approx([14 * (1 + AXIAL_SCALE), 14, 14 * (1 - AXIAL_SCALE)], rel=0.02)

    lamp = torch.zeros(3, 201, 201, dtype=torch.float64)
    lamp[:, 100, 195] = 1.0
    out = trace(Scene((sheet(lamp, 0.5),)), 1.0, 0.5, aperture=Aperture(chromatic_lateral=1.0), rays=1)
    x, _ = coordinates(201, (100, 100))
    place = [float((c * x).sum() / c.sum()) for c in out]
    assert place == pytest.approx([95 * (1 + LATERAL_SCALE), 95, 95 * (1 - LATERAL_SCALE)], abs=0.03)


def test_aperture_picture_shows_in_far_lights():
    shape = torch.zeros(64, 64)
    shape[:, 32:] = 1.0  # the right half
    far, near = ball(Aperture(picture=shape))[0], ball(Aperture(picture=shape), 14.0)[0]
    x, _ = coordinates()
    assert float(far[x > 0].sum() / far.sum()) > 0.95
    assert float(near[x < 0].sum() / near.sum()) > 0.95
    with pytest.raises(BokehError, match="lets no light"):
        corner = torch.zeros(64, 64)
        corner[0, 0] = 1.0
        ball(Aperture(picture=corner))


def test_too_steep_plane_is_an_error():
    with pytest.raises(BokehError, match="too steep"):
        trace(Scene((sheet(picture(), 0, plane=(0.0, 0.1, 0.0)),)), 30.0, 0.5)
    with pytest.raises(BokehError, match="0 rays"):
        trace(Scene((sheet(picture(), 0.2),)), 30.0, 0.5, rays=0)
