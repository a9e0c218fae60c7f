"""Real-ESRGAN's degradation: kernels against their definitions, noise against its statistics, and the whole against itself."""

import math

import numpy as np
import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.metrics.image import psnr
from bokeh_core.training import degradation as d


@pytest.fixture(scope="module")
def picture():
    """[3, 160, 200]: smooth colours, lines and a step."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 160), torch.linspace(0, 1, 200), indexing="ij")
    picture = torch.stack([x, y, 0.5 + 0.5 * torch.sin(40 * x) * torch.cos(30 * y)])
    picture[:, 60:100, 50:53], picture[:, 110:150, 120:190] = 1.0, 0.1
    return picture


def moments(kernel):
    """(variance along x, along y, covariance) of a kernel."""
    y, x = np.mgrid[: len(kernel), : len(kernel)] - len(kernel) // 2
    k = kernel.double().numpy()
    return (k * x * x).sum(), (k * y * y).sum(), (k * x * y).sum()


def test_kernels_have_their_widths_and_directions():
    xx, yy, xy = moments(d.shaped_kernel(41, "gaussian", 3.0, 1.5, 0.0))
    assert xx == pytest.approx(9.0, rel=1e-3) and yy == pytest.approx(2.25, rel=1e-3) and abs(xy) < 1e-6
    xx, yy, xy = moments(d.shaped_kernel(41, "gaussian", 3.0, 1.5, math.pi / 4))
    assert xx == pytest.approx(yy, rel=1e-3) and xy == pytest.approx((9 - 2.25) / 2, rel=1e-3)  # the long axis along y = x
    round_one = d.shaped_kernel(21, "generalised", 2.0, 2.0, 1.0, beta=1.0)
    assert torch.allclose(round_one, d.shaped_kernel(21, "gaussian", 2.0, 2.0, 0.0), atol=1e-7)


def test_the_shape_parameter_flattens_and_sharpens():
    """A generalised Gaussian of large beta is nearly a box; a plateau falls slower than a Gaussian."""
    box = d.shaped_kernel(21, "generalised", 4.0, 4.0, 0.0, beta=4.0)
    assert float(box[10, 13] / box[10, 10]) > 0.9 and float(box[10, 17] / box[10, 10]) < 1e-3
    plateau, gaussian = (d.shaped_kernel(21, form, 2.0, 2.0, 0.0, 1.0) for form in ("plateau", "gaussian"))
    assert float(plateau[10, 18] / plateau[10, 10]) == pytest.approx(1 / 17) and float(gaussian[10, 18] / gaussian[10, 10]) < 1e-3


def test_sinc_passes_low_frequencies_and_stops_high_ones():
    kernel = d.sinc_kernel(21, math.pi / 2).double()
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6) and float(kernel.min()) < 0  # it rings
    spectrum = torch.fft.fft2(torch.nn.functional.pad(kernel, (0, 43, 0, 43))).abs()
    assert float(spectrum[0, 6]) == pytest.approx(1, abs=0.15)  # 0.19 pi
    assert float(spectrum[0, 26]) < 0.1  # 0.81 pi
    scipy = pytest.importorskip("scipy.special")
    y, x = np.mgrid[:21, :21] - 10
    r = np.hypot(x, y)
    r[10, 10] = 1
    expected = scipy.j1(math.pi / 2 * r) / (4 * r)
    expected[10, 10] = math.pi / 16
    assert np.allclose(kernel.numpy(), expected / expected.sum(), atol=1e-7)


def test_drawn_kernels_have_the_published_shares_and_ranges():
    rng, stage = np.random.default_rng(0), d.Stage()
    kernels = [d.blur_kernel(rng, stage) for _ in range(1500)]
    sizes = {len(kernel) for kernel in kernels}
    assert sizes == set(range(7, 22, 2))
    assert all(abs(float(kernel.sum()) - 1) < 1e-5 for kernel in kernels)
    rings = np.mean([float(kernel.min()) < -1e-6 for kernel in kernels])
    assert 0.07 < rings < 0.13  # sinc: 0.1
    assert sum(stage.shapes.values()) == pytest.approx(1)


def test_noise_has_the_published_strength(picture):
    grey_level = torch.full((3, 200, 200), 0.5)

    def stage(**more):
        return d.Stage(noise=(20.0, 20.0), poisson=(2.0, 2.0), **more)

    def noise(**more):
        return d.noisy(grey_level, np.random.default_rng(1), stage(**more)) - grey_level

    gaussian = noise(gaussian=1.0, grey=0.0)
    assert float(gaussian.std()) == pytest.approx(20 / 255, rel=0.02)
    assert abs(float(torch.corrcoef(gaussian.flatten(1))[0, 1])) < 0.02
    poisson = noise(gaussian=0.0, grey=0.0)
    assert float(poisson.std()) == pytest.approx(2 * (0.5 / 255) ** 0.5, rel=0.02)  # variance = mean, in photons
    for one in (noise(gaussian=1.0, grey=1.0), noise(gaussian=0.0, grey=1.0)):
        assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2]) and float(one.std()) > 0


def test_jpeg_is_a_jpeg_of_the_quality_asked_for(picture):
    better, worse = (psnr(d.jpeg(picture, quality), picture) for quality in (95, 30))
    assert 35 > worse > 20 and better > worse + 3
    colour = picture.new_tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 32, 32).clone()
    colour[:, :, 15:] = 0  # an edge within a pair of columns: colour is kept at half resolution
    assert float((d.jpeg(colour, 100)[:, :, 14:16] - colour[:, :, 14:16]).abs().max()) > 0.1


def test_the_whole_depends_on_its_generator_only(picture):
    before = picture.clone()
    one, again, other = (d.degrade(picture, np.random.default_rng([3, index])) for index in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other) and torch.equal(picture, before)
    assert one.shape == picture.shape and one.dtype == torch.float32 and 0 <= float(one.min()) <= float(one.max()) <= 1
    assert torch.allclose(one * 255, (one * 255).round(), atol=1e-4)


def test_pictures_come_out_poor_but_recognisable(picture):
    """Each sample is worse than the picture and nearer to it than a mirrored one; detail above the low resolution is gone."""
    for index in range(12):
        poor = d.degrade(picture, np.random.default_rng([0, index]))
        assert 10 < psnr(poor, picture) < 30
        assert psnr(poor, picture) > psnr(poor, picture.flip(-1)) + 2
        fine = torch.fft.fft2(poor - poor.mean((1, 2), keepdim=True)).abs() ** 2
        assert float(fine[:, 50:110, :].sum() / fine.sum()) < 0.02  # vertical frequencies above 1/3.2 per px


def test_small_and_odd_pictures_are_refused_or_kept(picture):
    assert d.degrade(picture[:, :97, :131], np.random.default_rng(0)).shape == (3, 97, 131)
    with pytest.raises(BokehError, match="sides of 96"):
        d.degrade(picture[:, :80], np.random.default_rng(0))
