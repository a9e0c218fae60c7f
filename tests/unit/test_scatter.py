"""The FAST scatter against its plain definition, brute force and the invariants of light."""

import math

import numpy as np
import pytest
import torch

from bokeh_core.optics.lens import Aperture
from bokeh_core.render.aperture import kernel
from bokeh_core.render.scatter import scatter, scatter_dense


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def waves(h, w, r_max, signed=False):
    """Radii that vary smoothly and jump once."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    r = 0.5 + 0.25 * torch.sin(9 * x + 4 * y) + 0.25 * torch.cos(7 * y - 5 * x)
    r = torch.where((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.05, 1 - r, r).clamp(0, 1) * r_max
    return r * torch.where(x + y < 0.9, -1.0, 1.0) if signed else r


def disk(radius, fine=16):
    """Disk (x) tent by a fine midpoint rule, float64, sums to 1."""
    reach = math.ceil(radius) + 1
    line = np.arange(-reach + 0.5 / fine, reach, 1 / fine)
    inside = (line[:, None] ** 2 + line[None] ** 2 <= radius * radius).astype(np.float64)
    tents = np.clip(1 - np.abs(line[None] - np.arange(-reach, reach + 1)[:, None]), 0, None)
    out = tents @ inside @ tents.T
    return torch.from_numpy(out / out.sum())


@pytest.mark.parametrize("radius", [0.25, 0.75, 1.5, 4.03125, 16.0])
def test_disk_kernel_is_the_disk_times_the_tent(radius):
    truth, plain = disk(radius, fine=64), kernel(None)
    n = len(truth) // 2
    for dx in range(n + 1):
        for dy in range(n + 1):
            assert float(plain.row(dx, -dy)[round(radius * plain.steps)]) == pytest.approx(
                float(truth[n + dx, n + dy]), abs=2e-3 / max(radius, 1) ** 2
            )


@pytest.mark.parametrize("aperture", [None, Aperture(blades=5, rotation=10), Aperture(anamorphic=2, spherical=0.5), Aperture(onion=1)])
def test_kernels_sum_to_one_and_start_as_the_identity(aperture):
    shape = kernel(aperture)
    span = range(-shape.r0 - 1, shape.r0 + 2)
    total = sum(shape.row(dx, dy).double() for dx in span for dy in span)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
    assert float(shape.row(0, 0)[shape.r0 * shape.steps if shape.sided else 0]) == 1


@pytest.mark.parametrize("radius", [0.0, 0.3, 1.0, 5.5, 16.0, 16.5, 23.4, 57.0])
@pytest.mark.parametrize("size", [(257, 301), (256, 258)])
def test_interior_light_is_kept(radius, size):
    lamp = torch.zeros(1, *size)
    lamp[0, 120, 133] = 1
    out = scatter(lamp, torch.full(size, radius))
    assert float(out.double().sum()) == pytest.approx(1, abs=1e-6)
    assert float(out.min()) >= 0


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize(
    "aperture",
    [
        None,
        Aperture(spherical=0.7),
        Aperture(anamorphic=1.7, onion=0.5),
        Aperture(blades=5, rotation=13, roundness=0.3),
        Aperture(cats_eye=0.9),
        Aperture(blades=6, cats_eye=0.5, anamorphic=0.8),
    ],
)
def test_scatter_is_its_definition(aperture, slope):
    h, w = 67, 271  # odd, several tiles
    values, radius = noise(2, h, w), waves(h, w, 16.0 if slope else 9.0, signed=True)
    slope = torch.stack([noise(h, w, seed=1) - 0.5, noise(h, w, seed=2) - 0.5]) if slope else None
    truth = scatter_dense(values, radius, slope, aperture)
    assert float((scatter(values, radius, slope, aperture=aperture) - truth).abs().max()) < 2e-6 * max(1, float(truth.abs().max()))


@pytest.mark.parametrize("r_max", [12.0, 50.0])
@pytest.mark.parametrize("size", [(96, 128), (97, 131), (64, 99)])
def test_flips_and_transposition_commute(r_max, size):
    values, radius = noise(2, *size), waves(*size, r_max)
    out = scatter(values, radius)
    for dims in ((-1,), (-2,), (-2, -1)):
        assert torch.allclose(scatter(values.flip(dims), radius.flip(dims)).flip(dims), out, atol=1e-6)
    assert torch.allclose(scatter(values.mT.contiguous(), radius.mT.contiguous()).mT, out, atol=1e-6)


@pytest.mark.parametrize("radius", [17.0, 24.0, 33.0, 48.0])
def test_pyramid_is_close_to_the_large_disk(radius):
    size = (220, 231)
    values = torch.cat([noise(1, *size), torch.ones(1, *size)])
    out = scatter(values, torch.full(size, radius))
    weights = disk(radius, fine=8)
    n = len(weights) // 2
    truth = torch.fft.irfft2(torch.fft.rfft2(values.double(), (512, 512)) * torch.fft.rfft2(weights, (512, 512)), (512, 512))
    truth = truth[:, n : n + size[0], n : n + size[1]]
    error = out[0] / out[1] - truth[0] / truth[1]
    assert float(-10 * torch.log10((error**2).mean())) > 55


def test_bright_light_leaves_the_far_ground_alone():
    values = torch.full((1, 200, 300), 1e-3)
    ground = scatter(values, torch.full((200, 300), 8.0))
    values[0, 100, 40] = 1e6
    lit = scatter(values, torch.full((200, 300), 8.0))
    assert float((lit[..., 60:] / ground[..., 60:] - 1).abs().max()) < 1e-6
    y, x = torch.meshgrid(torch.arange(200) - 100, torch.arange(300) - 40, indexing="ij")
    assert float(lit[0][x * x + y * y < 49].min()) == pytest.approx(1e6 / (math.pi * 64), rel=1e-3)


@pytest.mark.parametrize("aperture", [None, Aperture(blades=6, cats_eye=0.4, spherical=0.3)])
def test_deterministic_and_inputs_untouched(aperture):
    values, radius = noise(3, 90, 110), waves(90, 110, 40.0, signed=True)
    slope = torch.stack([noise(90, 110, seed=1) - 0.5, noise(90, 110, seed=2) - 0.5])
    before = [t.clone() for t in (values, radius, slope)]
    first, second = (scatter(values, radius, slope, aperture=aperture) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (values, radius, slope), strict=True))


@pytest.mark.parametrize("r_max", [10.0, 60.0])
def test_unlit_tiles_are_skipped_without_a_trace(r_max):
    h, w = 400, 900
    radius, alpha = waves(h, w, r_max), torch.zeros(h, w)
    alpha[40:90, 30:80] = noise(50, 50)
    alpha[5, 120] = 1
    values = torch.stack([alpha, torch.ones(h, w)])
    whole, quick = scatter(values, radius), scatter(values, radius, lit=alpha > 0)
    reached = quick[1] > 0
    assert torch.equal(whole[0] * reached, quick[0]) and float((whole[0] * ~reached).abs().max()) == 0
    light = whole[0] > 0  # elsewhere the weight does not matter
    assert torch.equal(whole[1][light], quick[1][light])
    assert float(reached.double().mean()) < 0.8
    assert not bool(scatter(values, radius, lit=torch.zeros(h, w, dtype=torch.bool)).any())


def test_interruption_comes_through():
    def stop():
        raise KeyboardInterrupt

    for radius in (3.0, 40.0):
        with pytest.raises(KeyboardInterrupt):
            scatter(noise(1, 50, 50), torch.full((50, 50), radius), check=stop)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_tiny_pictures(size):
    ones = scatter(torch.ones(1, *size), torch.full(size, 40.0))
    out = scatter(torch.full((1, *size), 0.3), torch.full(size, 40.0))
    assert torch.allclose(out / ones, torch.full_like(out, 0.3), atol=1e-6)


@pytest.mark.parametrize("r_max", [9.0, 40.0])
def test_threads_share_tiles_and_change_nothing(r_max):
    def stop():
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    values, radius = noise(3, 150, 300), waves(150, 300, r_max)
    try:
        torch.set_num_threads(1)
        alone = scatter(values, radius)
        torch.set_num_threads(2)
        with torch.inference_mode():
            assert torch.equal(scatter(values, radius), alone)
        with pytest.raises(KeyboardInterrupt):
            scatter(values, radius, check=stop)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
