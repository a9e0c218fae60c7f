"""Metrics against closed forms."""

import math

import pytest
import torch

from bokeh_core.metrics.edges import depth_edges, dilate, edge_band, in_focus_region
from bokeh_core.metrics.image import psnr, ssim
from bokeh_core.metrics.lights import (
    disk_kernel,
    gradient_energy,
    highlight_shape_error,
    measured_radius,
    monotonicity,
    pull_roughness,
    spearman,
)
from bokeh_core.metrics.video import flicker, frechet_distance, relation_metric, vepi


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr():
    a = noise(3, 20, 20)
    assert psnr(a, a) == math.inf
    assert psnr(a + 0.1, a) == pytest.approx(20, abs=1e-4)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    assert math.isnan(psnr(a, a, mask))
    mask[3:5] = True
    worse = a.clone()
    worse[:, ~mask] = 9
    worse[:, mask] += 0.01
    assert psnr(worse, a, mask) == pytest.approx(40, abs=1e-3)


def test_ssim():
    a = noise(1, 3, 24, 24)
    assert ssim(a, a) == pytest.approx(1)
    # Constant pictures: only the brightness term is left.
    low, high = torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.6)
    assert ssim(low, high) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-5)
    assert ssim(a, noise(1, 3, 24, 24, seed=1)) < 0.2


def test_edges_and_bands():
    d = torch.zeros(30, 40)
    d[:, 20:] = 0.1
    edges = depth_edges(d, 20.0)  # a step of 2 px
    assert edges[:, 19:21].all() and int(edges.sum()) == 60
    assert not depth_edges(d, 14.0).any()  # 1.4 px
    assert int(edge_band(d, 20.0, 8).sum()) == 30 * 18
    point = torch.zeros(21, 21, dtype=torch.bool)
    point[10, 10] = True
    y, x = torch.meshgrid(torch.arange(21) - 10, torch.arange(21) - 10, indexing="ij")
    assert torch.equal(dilate(point, 7), x * x + y * y <= 49)


def test_in_focus_region():
    image = torch.full((3, 4, 4), 0.5)
    truth = image.clone()
    truth[:, 0] += 0.1
    d = torch.full((4, 4), 0.5)
    d[:, 3] = 0.9
    region = in_focus_region(image, truth, d, 10.0, 0.5)
    assert int(region.sum()) == 9 and region[1:, :3].all()


@pytest.mark.parametrize("radius", [1.5, 6.0, 13.3])
def test_disk_kernel_and_measured_radius(radius):
    kernel = disk_kernel(radius)
    assert float(kernel.sum()) == pytest.approx(1)
    middle = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2]
    if radius > 2:
        assert float(middle) == pytest.approx(1 / (math.pi * radius**2), rel=0.01)
    assert measured_radius(kernel) == pytest.approx(radius, rel=0.01)
    assert highlight_shape_error(3 * kernel, kernel) == pytest.approx(0, abs=1e-12)
    assert highlight_shape_error(torch.roll(kernel, 1, 0), kernel) > 0.02


def test_monotonicity():
    asked = torch.tensor([1.0, 2, 4, 8])
    assert monotonicity(asked, asked * 1.1) == pytest.approx((1.0, 0.1))
    assert spearman(asked, -asked) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([3.0, 3, 5])) == pytest.approx(1)
    assert spearman(asked, torch.ones(4)) == 0
    assert pull_roughness(torch.arange(9.0)) == 0
    assert pull_roughness(torch.tensor([0.0, 1, 5])) == 3
    ramp = torch.arange(6.0).expand(3, 5, 6)
    assert gradient_energy(ramp) == pytest.approx(1)
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[0, 0] = True
    assert gradient_energy(ramp * 2, mask) == pytest.approx(4)


def test_relation_metric_and_flicker():
    truth = noise(5, 3, 8, 8)
    assert relation_metric(truth, truth) == 0
    assert relation_metric(truth + 0.3, truth) == pytest.approx(0, abs=1e-7)  # a constant error does not flicker
    wobble = truth + torch.tensor([0, 0.1, 0, 0.1, 0]).view(-1, 1, 1, 1)
    assert relation_metric(wobble, truth) == pytest.approx(0.1, abs=1e-6)
    late = truth.clone()
    late[4] += 1
    assert relation_metric(late, truth, pairs=2) == 0 and relation_metric(late, truth) == pytest.approx(0.25, abs=1e-6)

    still = noise(1, 3, 8, 8).expand(4, -1, -1, -1).clone()
    assert flicker(still) == 0
    half = still.clone()
    half[..., :4] += torch.arange(4.0).view(-1, 1, 1, 1)  # the left half moves in truth
    broken = half.clone()
    broken[1, ..., 4:] += 0.3
    assert flicker(half, half) == 0
    assert flicker(broken, half) == pytest.approx(0.2, abs=1e-6)
    assert math.isnan(flicker(truth, truth))


def test_vepi():
    sharp, mask = noise(3, 3, 24, 24), torch.zeros(3, 24, 24)
    mask[:, 6:18, 6:18] = 1
    scores, smooth = vepi(sharp, sharp, mask)
    assert torch.allclose(scores, torch.ones(3).double()) and smooth == pytest.approx(1)
    blurred = torch.nn.functional.avg_pool2d(sharp, 7, 1, 3)
    worse, _ = vepi(blurred, sharp, mask)
    assert float(worse.max()) < 0.5
    nothing, _ = vepi(sharp, sharp, torch.zeros_like(mask))
    assert float(nothing.abs().max()) == 0
    assert vepi(sharp[:1], sharp[:1], mask[:1])[1] == 0


def test_frechet_distance_of_shifted_sets():
    a = noise(200, 4, seed=2).double()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 4, 0])) == pytest.approx(25, rel=1e-9)
    # Scaling by 2: means move, and the covariance term is tr S.
    expected = float((a.mean(0) ** 2).sum() + torch.trace(torch.cov(a.T)))
    assert frechet_distance(a, 2 * a) == pytest.approx(expected, rel=1e-9)
