"""UniDepthV2: geometry of pictures and cameras against its definitions, the defects that are mended and those that are kept on request."""

import math

import pytest
import torch
import torch.nn.functional as F

from bokeh_core.depth import estimate, refine, unidepth
from bokeh_core.depth.checkpoint import DepthModel, build, load_depth_model, recognise
from bokeh_core.depth.clip import PHOTOS, estimate_clip, near_bright
from bokeh_core.depth.preprocessing import IMAGENET_MEAN
from bokeh_core.depth.unidepth import BEST, INFER, PIPELINE, UniDepthConfig
from bokeh_core.depth.vit import ViTConfig
from bokeh_core.errors import BokehError
from tests.live_bytes import LiveBytes
from tests.stand_ins import dsfa as stand_ins

CONFIG = UniDepthConfig(ViTConfig(8, 4, 2, (0, 1, 2, 3)))
SMALL = 70  # resolution: bounds of about 3700 to 11000 px


@pytest.fixture(scope="module")
def plain():
    info, tensors = recognise(stand_ins.unidepth(), "unidepth_v2_vitl14.safetensors")
    return DepthModel(build(info, tensors), info, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def fused():
    info, tensors = recognise(stand_ins.udv2_dsfa(), "UDv2_dsfa_release.pth")
    return DepthModel(build(info, tensors), info, torch.device("cpu"), torch.float32)


def picture(height, width, seed=0):
    small = torch.rand(1, 3, max(height // 8, 2), max(width // 8, 2), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0]


def camera(fx, fy, cx, cy):
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def depth(model, image, quirks=BEST, **how):
    return refine.decode(model, refine.encode(model, image, [], resolution=SMALL, quirks=quirks), **how)


def test_inside_the_bounds_nothing_is_padded():
    """As published int(H (W / H)) is W - 1 for one size in twenty (SPEC section 12.12)."""
    short = 0
    for height in range(64, 800, 7):
        for width in range(height // 2 + 1, 2 * height, 5):
            best, published = unidepth.fit(height, width, CONFIG), unidepth.fit(height, width, CONFIG, INFER)
            assert best.padded == (height, width) and (best.left, best.right, best.top, best.bottom) == (0, 0, 0, 0)
            short += published.padded[1] == width - 1
            assert all(side % 14 == 0 for side in best.network)
            assert 200_000 * 0.97 <= math.prod(best.network) <= 600_000 * 1.1
    assert short > 100


@pytest.mark.parametrize("size", [(40, 120), (300, 100), (35, 47), (512, 512), (1080, 1920)])
def test_a_camera_there_and_back(size):
    given = camera(0.8 * size[1], 0.9 * size[1], 0.45 * size[1], 0.55 * size[0])
    before = given.clone()
    for quirks in (BEST, INFER, PIPELINE):
        fit = unidepth.fit(*size, CONFIG, quirks)
        inside = unidepth.network_camera(given, fit, quirks)
        assert torch.allclose(unidepth.picture_camera(inside, fit, quirks)[0], given, rtol=1e-5, atol=1e-3)
    assert torch.equal(given, before), "the caller's matrix was changed"


def test_the_camera_sees_the_same_rays_at_both_sizes():
    """A pixel of the network's input and the place of the picture it shows lie in one direction; with one zoom factor they do not."""
    size, given = (300, 500), camera(400.0, 400.0, 250.0, 150.0)

    def miss(quirks):
        fit = unidepth.fit(*size, CONFIG, quirks)
        view = unidepth.rays(unidepth.network_camera(given, fit, quirks), fit.network)[0]
        h, w = fit.network
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        truth = torch.stack([(x * size[1] / w - 250) / 400, (y * size[0] / h - 150) / 400, torch.ones_like(x)])
        return float((view - F.normalize(truth, dim=0)).norm(dim=0).max())

    assert miss(BEST) < 1e-5 < 2e-3 < miss(INFER)


def test_rays_of_a_batch_of_cameras():
    two = torch.stack([camera(50.0, 60.0, 20.0, 10.0), camera(80.0, 80.0, 16.0, 14.0)])
    view = unidepth.rays(two, (28, 42))
    for i, one in enumerate(two):
        v, u = 5, 33
        expected = torch.tensor([(u + 0.5 - one[0, 2]) / one[0, 0], (v + 0.5 - one[1, 2]) / one[1, 1], 1.0])
        assert torch.allclose(view[i, :, v, u], expected / expected.norm(), atol=1e-6)


def test_half_precision_rays_are_published_and_worse():
    one = camera(1500.0, 1500.0, 1204.5, 700.0)[None]
    exact = unidepth.rays(one, (14, 2408))
    half = unidepth.rays(one, (14, 2408), torch.float16)
    assert float((exact - half).abs().max()) > 2e-4
    fine = (exact[0, 0, 7].diff() > 0).all()
    assert fine and not (half[0, 0, 7].diff() > 0).all(), "neighbours beyond pixel 2048 share a ray"


def test_the_polar_angle_never_breaks():
    """A cosine above 1 by rounding: NaN as published (SPEC section 12.2)."""
    view = torch.tensor([0.0, 0.0, 1.0000001]).view(1, 3, 1, 1).expand(1, 3, 56, 56)
    normal = unidepth.F.normalize
    try:
        unidepth.F.normalize = lambda x, dim: x  # what rounding does to some pixels
        assert unidepth.ray_embedding(view, (4, 4), 16).isfinite().all()
        assert unidepth.ray_embedding(view, (4, 4), 16, clamp=False).isnan().any()
    finally:
        unidepth.F.normalize = normal


def test_borders():
    """Wide pictures get rows of the mean colour; the published pipeline's are black."""
    image = torch.ones(1, 3, 40, 200)
    fit = unidepth.fit(40, 200, CONFIG)
    assert (fit.top, fit.bottom, fit.left, fit.right) == (20, 20, 0, 0) and fit.padded == (80, 200)
    best, black = (unidepth.network_input(image, fit, quirks)[0, :, 0, 0] for quirks in (BEST, PIPELINE))
    assert best.abs().max() < 1e-6
    std = torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(black, -torch.tensor(IMAGENET_MEAN) / std, atol=1e-5)


def test_published_defects_of_size(fused):
    """SPEC sections 5.5 and 12.12: a 35 x 47 picture gives one column, a 28 x 100 one 16 x 100."""
    one_column, cut = picture(35, 47), picture(28, 100)
    assert depth(fused, one_column, INFER).depth.shape == (35, 1)
    assert depth(fused, cut, PIPELINE).depth.shape == (16, 100)
    assert depth(fused, one_column).depth.shape == (35, 47) and depth(fused, cut).depth.shape == (28, 100)


def test_everything_agrees_at_the_picture_size(fused):
    image = picture(60, 90)
    found = depth(fused, image)
    assert torch.allclose(found.rays[2] * found.radius, found.depth, rtol=0.02)
    assert torch.allclose(found.rays.norm(dim=0), torch.ones(60, 90), atol=1e-5)
    assert float(found.confidence.min()) >= 0 and float(found.confidence.max()) <= 1 and found.confidence.std() > 0
    assert torch.equal(found.confidence.flatten().argsort()[:1], found.error.flatten().argsort(descending=True)[:1])
    # The picture's rays are those of the camera that is reported.
    expected = unidepth.rays(found.intrinsics[None], (60, 90))[0]
    assert float((found.rays - expected).abs().max()) < 5e-3


def test_a_given_camera_is_used_and_told(fused):
    image, given = picture(60, 90), camera(70.0, 70.0, 45.0, 30.0)
    features = refine.encode(fused, image, [], resolution=SMALL)
    found, estimated = refine.decode(fused, features, camera=given), refine.decode(fused, features)
    assert torch.allclose(found.intrinsics, given) and torch.allclose(found.estimated, estimated.intrinsics)
    assert not torch.allclose(found.depth, estimated.depth, rtol=1e-3)
    made_up = refine.decode(fused, refine.encode(fused, image, [], resolution=SMALL, quirks=PIPELINE))
    assert made_up.intrinsics[0, 0] == pytest.approx(0.7 * 90)


@pytest.mark.parametrize("size", [(60, 90), (30, 150), (160, 50)])
def test_estimate_depth_runs_plain_unidepth(plain, size):
    """Through the same door as every other depth model; padding does not move the picture."""
    frames = [picture(*size, seed) for seed in (0, 1)]
    raw = torch.empty(2, *size)
    starts = estimate_clip(plain, frames, raw, frames_are=PHOTOS, resolution=SMALL, guided=False)
    for frame, found in zip(frames, raw, strict=True):
        expected = depth(plain, frame).depth
        assert float(((found - expected).abs() / expected).median()) < 0.01 and float((found / expected).log().abs().max()) < 0.7
    grey = near_bright(raw, starts, True)
    assert float(grey.min()) == 0 and float(grey.max()) == 1
    smooth = raw.clone()
    estimate_clip(plain, frames, raw, frames_are=PHOTOS, resolution=SMALL)
    assert raw.isfinite().all() and float(((raw - smooth).abs() / smooth).median()) < 0.1


def test_the_inner_part_of_a_padded_map():
    fit = unidepth.fit(40, 200, CONFIG)
    y = (torch.arange(fit.network[0]) + 0.5) / fit.network[0] * fit.padded[0] - fit.top  # the picture's rows
    inner = fit.inside(y.view(1, -1, 1).expand(1, *fit.network).contiguous())[0]
    centres = (torch.arange(inner.shape[0]) + 0.5) / inner.shape[0] * 40
    assert torch.allclose(inner.mean(1), centres, atol=1e-3) and inner.shape[1] == fit.network[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(plain, dtype, tmp_path):
    torch.save(stand_ins.unidepth(), tmp_path / "u.pth")
    half = load_depth_model(tmp_path / "u.pth", dtype=dtype)
    image = picture(60, 90)
    expected, found = depth(plain, image), depth(half, image)
    assert float((found.depth / expected.depth).log().abs().median()) < (0.01 if dtype == torch.float16 else 0.08)
    assert found.depth.dtype == torch.float32 and len(found.depth.unique()) > 1000, "no terraces"
    assert torch.allclose(found.intrinsics, expected.intrinsics, rtol=0.05 if dtype == torch.bfloat16 else 0.01)


def test_resolution_levels():
    whole = unidepth.level_pixels(0)[0], unidepth.level_pixels(9)[1]
    assert whole == CONFIG.pixels and unidepth.level_pixels(4)[1] == unidepth.level_pixels(5)[0]
    with pytest.raises(BokehError, match=r"0 \(fewest pixels\) to 9"):
        unidepth.level_pixels(10)
    assert unidepth.bounds(CONFIG, 518) == CONFIG.pixels and unidepth.bounds(CONFIG, 1036)[0] == 800_000


def test_a_file_that_is_no_v2():
    with pytest.raises(BokehError, match="is a UniDepth, but not V2 with a ViT"):
        recognise({"pixel_encoder.stages.0.weight": torch.empty(1)}, "unidepth_cnvnxt.pth")


@pytest.mark.parametrize(("height", "width", "frames"), [(1024, 1024, 3), (720, 1280, 5)])
@pytest.mark.parametrize("kind", ["udv2", "dav2"])
def test_the_estimate_of_memory_is_above_the_truth_and_near_it(kind, height, width, frames, monkeypatch):
    """Full size on the meta device, where attention would otherwise be counted unfused."""
    from pathlib import Path

    name = {"udv2": "keys_udv2_dsfa_vitl14", "dav2": "keys_dav2_dsfa_vitl"}[kind]
    path = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "bokehdepth_stage2" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the list of names {path} is not here")
    import json

    meta = torch.device("meta")
    tensors = {key: torch.empty(shape, device="meta") for key, shape, _ in json.loads(path.read_text())}
    info, tensors = recognise(tensors, f"{kind}_dsfa.pth")
    model = DepthModel(build(info, tensors), info, meta, torch.float32)

    def attention(q, k, v, **more):
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    reference, stack = torch.empty(3, height, width, device="meta"), torch.empty(frames, 3, height, width, device="meta")
    with torch.no_grad(), LiveBytes(model.network.state_dict().values()) as live:
        found = refine.decode(model, refine.encode(model, reference, stack), torch.ones(frames, device="meta"))
    assert found.depth.shape == (height, width)
    promised = refine.activation_bytes(info, height, width, frames)
    assert live.peak < promised < 1.7 * live.peak, (live.peak / 2**30, promised / 2**30)
    if kind == "udv2":
        pixels = torch.empty(2, 3, 518, 518, device="meta")
        with torch.no_grad(), LiveBytes(model.network.state_dict().values()) as live:
            model.network(pixels)
        promised = estimate.activation_bytes(info, 518, 518, 2, False)
        assert live.peak < promised < 1.7 * live.peak, (live.peak / 2**30, promised / 2**30)
