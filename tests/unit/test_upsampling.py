"""Depth maps brought to the photo's size: against true disparity of our own scenes, shrunk and softened as networks do it."""

import pytest
import torch
import torch.nn.functional as F

from bokeh_core.depth.upsampling import TILE, guided_upsample
from bokeh_core.errors import BokehError
from bokeh_core.metrics.edges import edge_band
from bokeh_core.render.light import to_display
from bokeh_core.synthesis.demo import demo_scene
from bokeh_core.synthesis.scenes import flatten, make_scene


def network_like(disparity, ratio, noise=0.004):
    """[1, h, w]: area-shrunk, softened by 1.2 px, with small noise."""
    height, width = disparity.shape
    low = F.interpolate(disparity[None, None], size=(round(height / ratio), round(width / ratio)), mode="area")
    weights = torch.exp(-0.5 * (torch.arange(-4, 5) / 1.2) ** 2)
    weights = weights / weights.sum()
    low = F.pad(low, (4, 4, 4, 4), mode="replicate")
    low = F.conv2d(F.conv2d(low, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[0]
    return low + noise * torch.randn(low.shape, generator=torch.Generator().manual_seed(0))


def bilinear(low, disparity, align=False):
    return F.interpolate(low[None], size=disparity.shape[-2:], mode="bilinear", align_corners=align)[0]


@pytest.fixture(scope="module")
def demo():
    scene = demo_scene(21, 720, 480)
    return scene["image"][None].clamp(0, 1), scene["disparity"]


@pytest.mark.parametrize(("ratio", "gain"), [(2, 0.65), (4, 0.7), (6, 0.85)])
def test_edges_are_nearer_to_the_truth(demo, ratio, gain):
    image, true = demo
    low = network_like(true, ratio)
    plain, nearest = bilinear(low, true)[0], F.interpolate(low[None], size=true.shape, mode="nearest-exact")[0, 0]
    ours = guided_upsample(low, image, align_corners=False)[0]
    near_edges = edge_band(true, 40.0, 2 * ratio)
    error = [(one - true).abs() for one in (plain, nearest, ours)]
    assert error[2][near_edges].mean() < gain * min(error[0][near_edges].mean(), error[1][near_edges].mean())
    assert error[2][~near_edges].mean() < error[0][~near_edges].mean() + 0.002
    flying = [(one[near_edges] > 0.1).float().mean() for one in error]
    assert flying[2] < 0.8 * flying[0]


@pytest.mark.parametrize("kind", ["portrait", "three", "ground"])
def test_textures_at_their_worst(kind):
    """Noise, text and stripes on every surface, in the same colours: the edges still gain."""
    colour, true = flatten(make_scene(kind, 31, 288))
    low = network_like(true, 4)
    image = to_display(colour)[None].clamp(0, 1)
    edges = edge_band(true, 40.0, 8)
    ours, plain = guided_upsample(low, image, align_corners=False)[0], bilinear(low, true)[0]
    assert (ours - true).abs()[edges].mean() < 0.9 * (plain - true).abs()[edges].mean()
    assert (ours - true).abs()[~edges].mean() < (plain - true).abs()[~edges].mean() + 0.002


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_slopes_do_not_take_on_textures(ratio):
    colour, true = flatten(make_scene("plane", 5, 320))
    low = network_like(true, ratio)
    image = to_display(colour)[None].clamp(0, 1)
    ours, plain = guided_upsample(low, image, align_corners=False)[0], bilinear(low, true)[0]
    assert (ours - true).abs().mean() < (plain - true).abs().mean() + 0.001
    assert float((ours - plain).abs().max()) < 0.1


def box_scene(height=240, width=330, tilt=0.25):
    """A slanted bright box before a dark wall: image, disparity; its edge is a straight line."""
    y, x = torch.arange(float(height))[:, None], torch.arange(float(width))[None]
    inside = (x > 100 + tilt * y) & (x < 230 + tilt * y) & (y > 50) & (y < 190)
    texture = 0.06 * torch.sin(x / 3) * torch.sin(y / 4)
    return (torch.where(inside, 0.75, 0.3) + texture).expand(1, 3, -1, -1).contiguous(), torch.where(inside, 0.9, 0.15)


@pytest.mark.parametrize("align", [True, False])
def test_edges_are_where_the_picture_has_them_without_ramps_or_halos(align):
    image, true = box_scene()
    low = F.interpolate(true[None, None], size=(48, 66), mode="bilinear", align_corners=True, antialias=False)[0] if align else None
    low = network_like(true, 5, noise=0.0) if low is None else F.avg_pool2d(F.pad(low[None], (1,) * 4, mode="replicate"), 3, 1)[0]
    ours, plain = guided_upsample(low, image, align_corners=align)[0], bilinear(low, true, align)[0]
    between = ((ours > 0.25) & (ours < 0.8)).float().mean(), ((plain > 0.25) & (plain < 0.8)).float().mean()
    assert between[0] < 0.2 * between[1], "pixels that lie on neither surface"
    assert ((ours - true).abs() > 0.1).float().mean() < 0.25 * ((plain - true).abs() > 0.1).float().mean()
    # The slanted edge runs straight: where it crosses half the height, row by row, no more than a pixel from the true line.
    rows = torch.arange(75, 165)
    crossing = (ours[rows, 60:180] > 0.525).float().argmax(dim=1) + 60
    assert float((crossing - (100 + 0.25 * rows)).abs().max()) < 2.0 and float((crossing - 100.5 - 0.25 * rows).abs().mean()) < 0.8


def test_without_colours_the_edge_runs_through_the_middle_of_the_ramp():
    _, true = box_scene()
    low = network_like(true, 4, noise=0.0)
    grey = torch.full((1, 3, *true.shape), 0.5)
    ours, plain = guided_upsample(low, grey, align_corners=False)[0], bilinear(low, true)[0]
    assert (((ours > 0.525) != (plain > 0.525)).float().mean()) < 0.005
    assert (ours - true).abs().mean() < 0.6 * (plain - true).abs().mean()


def test_values_stay_within_the_map_nearby(demo):
    image, true = demo
    low = network_like(true, 5)
    ours = guided_upsample(low, image, align_corners=False)[0]
    wide = F.pad(low[None], (8, 8, 8, 8), mode="replicate")
    high, deep = F.max_pool2d(wide, 17, 1), -F.max_pool2d(-wide, 17, 1)
    assert bool((ours <= bilinear(high[0], true)[0] + 1e-5).all()) and bool((ours >= bilinear(deep[0], true)[0] - 1e-5).all())


def test_equal_sizes_and_flat_maps_are_plain():
    image = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    low = torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(guided_upsample(low, image), low, atol=1e-6)
    larger = torch.rand(2, 60, 70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(guided_upsample(larger, image), F.interpolate(larger[None], size=(40, 50), mode="bilinear", align_corners=True)[0])
    flat = torch.full((1, 7, 9), 3.5)
    assert torch.allclose(guided_upsample(flat, image[:1]), torch.full((1, 40, 50), 3.5))


def test_metres_are_enlarged_as_disparity():
    image, true = box_scene()
    low = network_like(true, 4, noise=0.0)
    metres = guided_upsample(2 / low, image, align_corners=False, metric=True)
    assert torch.allclose(2 / metres, guided_upsample(low, image, align_corners=False), atol=1e-3)
    low = 2 / low
    low[0, :3] = float("inf")
    assert bool(guided_upsample(low, image, align_corners=False, metric=True)[0, :5].isinf().all()), "the sky stays infinite"


def test_tiles_cannot_be_seen(monkeypatch, demo):
    import bokeh_core.depth.upsampling as module

    image, true = demo
    low = network_like(true, 4)
    whole = guided_upsample(low, image)
    assert max(true.shape) > TILE
    monkeypatch.setattr(module, "TILE", 100)
    assert torch.allclose(guided_upsample(low, image), whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (5, 3)])
def test_tiny_maps_and_scales(shape, demo):
    image, true = demo
    tiny = torch.rand(1, *shape, generator=torch.Generator().manual_seed(2))
    out = guided_upsample(tiny, image[..., :37, :53])
    assert out.shape == (1, 37, 53) and bool(out.isfinite().all()) and out.min() >= tiny.min() - 1e-6 and out.max() <= tiny.max() + 1e-6
    low = network_like(true, 4)
    once = guided_upsample(low, image)
    assert torch.equal(once, guided_upsample(low, image))
    other = (guided_upsample(low * 250 - 40, image) + 40) / 250
    assert ((other - once).abs() > 1e-4).float().mean() < 1e-3, "the unit does not matter"


def test_mistakes_are_explained():
    image = torch.zeros(2, 3, 8, 8)
    for low in (torch.zeros(8, 8), torch.zeros(3, 4, 4), torch.zeros(2, 0, 4)):
        with pytest.raises(BokehError, match="expected"):
            guided_upsample(low, image)
    with pytest.raises(BokehError, match="NaN"):
        guided_upsample(torch.full((2, 4, 4), float("nan")), image)
