"""Any-to-Bokeh's perturbation of disparity against SciPy, and what it may and may not change."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from bokeh_core.training import perturbation
from bokeh_core.training.perturbation import Draws, displacement, elastic, morphology, noise_field, page, perlin, perturb, warp


def scene(height=60, width=80):
    """(disparity, mask): a square at 0.6 before a slope."""
    disparity = torch.linspace(0.1, 0.3, width).repeat(height, 1)
    mask = torch.zeros(height, width)
    mask[20:40, 30:55] = 1
    return torch.where(mask > 0, 0.6, disparity), mask


def fields(height=60, width=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, height, width, generator=generator)


def test_displacement_is_a_gaussian_blur():
    dx, dy = fields()
    moved = displacement(dx, dy)
    for i, (field, side) in enumerate(((dx, 60), (dy, 80))):  # x by the height, y by the width, as published
        smooth = ndimage.gaussian_filter(field.double().numpy() * 2 - 1, 4, mode="mirror", truncate=4)
        assert np.allclose(moved[..., i].numpy(), smooth * 50 / side, atol=1e-4)


def test_warp_fetches_from_where_it_says():
    disparity, mask = scene()
    moved = displacement(*fields(seed=1))
    rows, columns = np.mgrid[:60, :80]
    at = np.stack([rows + moved[..., 1].numpy() * 60 / 2, columns + moved[..., 0].numpy() * 80 / 2])
    inside = (at[0] > 0) & (at[0] < 59) & (at[1] > 0) & (at[1] < 79)
    expected = ndimage.map_coordinates(disparity.double().numpy(), at, order=1)
    assert np.allclose(warp(disparity, moved, "bilinear").numpy()[inside], expected[inside], atol=1e-4)
    nearest = warp(mask, moved, "nearest")
    assert set(nearest.unique().tolist()) == {0.0, 1.0}
    beyond = (at[0] < -1) | (at[0] > 60) | (at[1] < -1) | (at[1] > 80)
    assert not warp(disparity + 1, moved, "bilinear").numpy()[beyond].any()


def test_elastic_changes_nothing_away_from_the_object():
    disparity, mask = scene()
    mixed, warped = elastic(disparity, mask, displacement(*fields()))
    assert torch.equal(mixed[warped == 0], disparity[warped == 0])
    assert 0 < float((warped != mask).float().mean()) < 0.1
    still, same = elastic(disparity, mask, torch.zeros(60, 80, 2))
    assert torch.allclose(still, disparity, atol=1e-6) and torch.equal(same, mask)


def test_perlin_noise():
    """0 on the lattice of the coarsest cells for one octave, continuous, within 1, the same after 1024 cells."""
    lattice = perlin(*np.mgrid[0:20, 0:20], octaves=1)
    assert not lattice.any()
    x, y = np.random.default_rng(0).uniform(0, 1024, (2, 5000)).astype(np.float32)
    noise = perlin(x, y)
    assert np.abs(noise).max() < 1 and 0.1 < noise.std() < 0.5
    assert np.abs(perlin(x + np.float32(1e-3), y) - noise).max() < 0.05
    assert np.allclose(perlin(x, y, 1), perlin(x + 1024, y, 1), atol=2e-3)


def test_noise_only_where_the_warp_uncovered_something():
    change = torch.zeros(40, 50)
    change[10:14, 20:30], change[14:16, 20:30] = 1, -1
    field = noise_field(change, (12, 34))
    assert float(field.min()) == 0 and float(field.max()) == 1
    assert len(field[change <= 0].unique()) == 1 and len(field[change > 0].unique()) > 20
    assert not noise_field(torch.zeros(40, 50), (1, 2)).any()


@pytest.mark.parametrize("size", (3, 5, 7))
def test_morphology_is_that_of_scipy(size):
    disparity, _ = scene()
    array = disparity.numpy()
    larger = ndimage.maximum_filter(array, size, mode="constant", cval=-np.inf)
    smaller = ndimage.minimum_filter(array, size, mode="constant", cval=np.inf)
    assert np.array_equal(morphology(disparity, size, 0.25, 0.5).numpy(), larger)
    assert np.array_equal(morphology(disparity, size, 0.3, 0.5).numpy(), smaller)
    assert np.array_equal(morphology(disparity, size, 0.5, 0.5).numpy(), array)


def test_perturb_is_seeded_and_leaves_its_input_alone():
    disparity, mask = scene()
    before = disparity.clone()
    first, again, other = (perturb(disparity, mask, 0.6, Draws(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(disparity, before)
    assert first.shape == disparity.shape and float((first - disparity).abs().mean()) < 0.1
    # The published shift of everything: at most a tenth of the focus disparity, where no outline passes.
    corner = perturb(disparity, mask, 0.6, Draws(1), probability=0.0)[:8, :8] - disparity[:8, :8]
    assert float(corner.max() - corner.min()) < 1e-6 and abs(float(corner.mean())) <= 0.06 + 1e-6


def test_the_constants_are_fields():
    disparity, mask = scene()
    recipe = perturbation.Recipe(reach=0.0, strength=0.0)
    assert torch.allclose(perturb(disparity, mask, 0.6, Draws(1), 0.0, recipe), disparity, atol=1e-6)


def test_a_page_of_samples():
    disparity, mask = scene()
    sheet = page(disparity, mask, 0.6, count=3)
    assert sheet.shape == (3, 120, 320) and torch.equal(sheet[0, :60, :80], disparity) and torch.equal(sheet[0, 60:, :80], mask)
    assert 0 <= float(sheet.min()) and float(sheet.max()) <= 1
    assert float((sheet[0, :60, 80:160] - disparity).abs().max()) > 0.05
