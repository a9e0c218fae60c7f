"""Synthetic scenes: seeded, complete, true to their own description."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.metrics.image import judge
from bokeh_core.render.rays import trace
from bokeh_core.synthesis import dataset
from bokeh_core.synthesis.any_to_bokeh_clip import ClipDraws, make_clip
from bokeh_core.synthesis.bokehdiff_pair import PairDraws, PairRecipe, make_pair
from bokeh_core.synthesis.demo import demo_clip, demo_scene
from bokeh_core.synthesis.scenes import KINDS, flatten, make_case, make_scene
from bokeh_core.synthesis.scenes import make_clip as make_moving


@pytest.mark.parametrize("kind", KINDS)
def test_case_is_consistent(kind):
    case = make_case(kind, 3, size=128, k=16.0, rays=32)
    scene = case["layers"]
    assert len(scene.layers) == {"plane": 1, "portrait": 2, "three": 3, "ground": 4}[kind]
    assert case["image_linear"].shape == case["truth_linear"].shape == case["background_linear"].shape == (128, 128, 3)
    assert case["image_linear"].dtype == case["disparity"].dtype == np.float32
    assert case["scored"].sum() == (128 - 2 * case["margin"]) ** 2
    assert 0 <= case["disparity"].min() and case["disparity"].max() <= 1
    assert max(float(layer.color.max()) for layer in scene.layers) > 1  # lamps
    for name in ("edge8", "edge24", "in_focus"):
        assert not (case[name] & ~case["scored"]).any()
    assert (case["edge24"] | ~case["edge8"]).all()
    # The sharp picture is what the rays see without blur, and the disparity is that of the layers.
    sharp = trace(scene, 0.0, 0.5)
    assert np.abs(sharp.permute(1, 2, 0).numpy() - case["image_linear"]).max() < 1e-5
    for layer in scene.layers:
        y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
        d0, gx, gy = layer.plane
        assert (layer.disparity - (d0 + gx * x + gy * y)).abs().max() < 1e-6
    if kind != "plane":
        matte = case["matte"]
        assert 0.02 < ((matte > 0.02) & (matte < 0.98)).mean() < 0.4  # soft, with hair
        nearest = matte >= 0.5
        assert np.allclose(case["disparity"][nearest], scene.layers[-1].disparity.numpy()[nearest])


def test_seeds_decide_everything():
    a, b, other = make_scene("three", 5, 96), make_scene("three", 5, 96), make_scene("three", 6, 96)
    for one, two in zip(a.layers, b.layers, strict=True):
        assert torch.equal(one.color, two.color) and torch.equal(one.alpha, two.alpha) and one.plane == two.plane
    assert not torch.equal(a.layers[0].color, other.layers[0].color)


def test_layers_of_a_clip_move_by_whole_pixels():
    first, last = make_scene("portrait", 4, 96), make_scene("portrait", 4, 96, time=1.0)
    moved = []
    for one, two in zip(first.layers, last.layers, strict=True):
        matches = [
            (dx, dy)
            for dx in range(-24, 25)
            for dy in range(-24, 25)
            if torch.equal(one.color[:, 30:60, 30:60], two.color[:, 30 + dy : 60 + dy, 30 + dx : 60 + dx])
        ]
        assert len(matches) == 1
        moved.append(np.hypot(*matches[0]))
    assert moved[1] > moved[0] > 0
    assert len(list(make_moving("plane", 1, 2, size=64, k=8.0, rays=4))) == 2


def test_photos_become_surfaces(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((90, 90, 3), (200, 100, 50), np.uint8)).save(tmp_path / "plain.png")
    scene = make_scene("plane", 0, 64, photos=tmp_path)
    dim = scene.layers[0].color.flatten(1).median(1).values
    assert torch.allclose(dim, (torch.tensor([200, 100, 50]) / 255) ** 2.2, atol=0.01)
    (tmp_path / "none").mkdir()
    with pytest.raises(BokehError, match="holds no"):
        make_scene("plane", 0, 64, photos=tmp_path / "none")


def test_bad_requests_are_told():
    with pytest.raises(BokehError, match="Unknown kind"):
        make_scene("portrayt", 0)
    with pytest.raises(BokehError, match="at least 64"):
        make_scene("plane", 0, 20)


def test_truth_judges_itself():
    case = make_case("portrait", 1, size=96, k=12.0, rays=64)
    scores = judge(torch.from_numpy(case["truth_linear"]).permute(2, 0, 1), case)
    assert scores["all"] == np.inf and scores["ssim"] == pytest.approx(1)
    sharp = judge(torch.from_numpy(case["image_linear"]).permute(2, 0, 1), case)
    assert sharp["all"] < 36 and sharp["in_focus"] > 42  # in focus means within 2/255


def test_dataset_resumes_and_reads_back(tmp_path):
    options = {"seed": 7, "kinds": ("plane", "portrait"), "size": 64, "rays": 8, "k": (8.0,)}
    ticks = []
    files = dataset.write_dataset(tmp_path, 2, progress=lambda *t: ticks.append(t), **options)
    assert ticks == [(0, 2), (1, 2), (2, 2)] and [f.name for f in files] == ["000000.npz", "000001.npz"]
    times = [f.stat().st_mtime_ns for f in files]
    files[1].with_suffix(".json").unlink()
    dataset.write_dataset(tmp_path, 3, **options)
    assert files[0].stat().st_mtime_ns == times[0] and files[1].stat().st_mtime_ns != times[1]
    assert not list(tmp_path.glob("*.part"))
    case = dataset.read_case(tmp_path / "000001.npz")
    fresh = make_case(**dataset.plan_case(1, json.loads((tmp_path / "dataset.json").read_text())))
    assert case["kind"] == "portrait" and case["k_px"] == 8.0 and case["focus"] == fresh["focus"]
    assert np.allclose(case["truth_linear"], fresh["truth_linear"], atol=4e-3)
    assert np.allclose(flatten(case["layers"])[0].permute(1, 2, 0), case["image_linear"], atol=8e-3)
    with pytest.raises(BokehError, match="other settings"):
        dataset.write_dataset(tmp_path, 2, **(options | {"seed": 8}))
    with pytest.raises(BokehError, match="Unknown kinds"):
        dataset.write_dataset(tmp_path / "b", 2, kinds=("x",))


def test_dataset_by_two_processes_is_the_same(tmp_path):
    options = {"seed": 1, "kinds": ("plane",), "size": 64, "rays": 4, "k": (8.0,)}
    one = dataset.write_dataset(tmp_path / "one", 2, **options)
    two = dataset.write_dataset(tmp_path / "two", 2, workers=2, **options)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(np.load(a)["truth_linear"], np.load(b)["truth_linear"])


def test_demo_scene_is_a_complete_picture():
    demo = demo_scene(0, 240, 160)
    image, disparity = demo["image"], demo["disparity"]
    assert image.shape == (3, 160, 240) and image.dtype == disparity.dtype == torch.float32
    assert bool(torch.isfinite(image).all()) and float(image.min()) >= 0 and float(image.max()) > 1
    assert float(disparity.min()) < 0.05 and float(disparity.max()) > 0.95
    found = [float(disparity[int(y * 160), int(x * 240)]) for x, y in (demo["focus_points"][name] for name in ("near", "middle", "far"))]
    assert found[0] > 0.75 and 0.45 < found[1] < 0.7 and found[2] < 0.05
    again = demo_scene(0, 240, 160)
    assert torch.equal(image, again["image"]) and torch.equal(disparity, again["disparity"])
    color, nearest = flatten(demo["layers"])
    assert torch.equal(nearest.clamp(0, 1), disparity) and color.shape == image.shape


def test_demo_clip_glides():
    frames = list(demo_clip(0, 3, 150, 100))
    assert len(frames) == 3 and frames[0][0].shape == (3, 100, 150) and frames[0][1].shape == (100, 150)
    steps = [float((a[0] - b[0]).abs().mean()) for a, b in pairwise(frames)]
    assert min(steps) > 0.005


def test_published_recipes_run_with_fresh_draws():
    rng = np.random.default_rng(0)
    cut = np.zeros((40, 30, 4), np.uint8)
    cut[5:35, 5:25] = (200, 80, 40, 255)
    pair = make_pair(cut, rng.integers(0, 255, (50, 60, 3), dtype=np.uint8), PairDraws(1), (2, 3), PairRecipe(48, 2, 32))
    assert pair["target"].shape == pair["aif"].shape == (3, 32, 32) and pair["disparity"].shape == (1, 32, 32)
    assert float(pair["target"].min()) >= -1 and float(pair["target"].max()) <= 1
    picture, matte = np.full((20, 20, 3), 99, np.uint8), np.full((20, 20), 255, np.uint8)
    files = make_clip([[picture] * 2], [[matte] * 2], np.zeros((9, 9, 3), np.uint8), ClipDraws(0), width=48, height=40, samples=7)
    assert len(files) == 2 * 3 + 4 * 2
    with pytest.raises(BokehError, match="do not fit"):
        make_clip([[picture]] * 3, [[matte]] * 3, np.zeros((9, 9, 3), np.uint8), ClipDraws(0), width=48, height=40)
