"""Degradation-aware depth: losses against their definitions, the distillation on a tiny model, and the file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bokeh_core.depth.checkpoint import load_depth_model
from bokeh_core.depth.depth_anything import DepthAnything, DepthAnythingConfig
from bokeh_core.depth.dpt import DPTConfig
from bokeh_core.depth.preprocessing import normalised
from bokeh_core.depth.vit import ViTConfig
from bokeh_core.errors import BokehError
from bokeh_core.training import degraded_depth, depth_losses, engine, settings
from bokeh_core.training.degraded_depth import Data, DegradedDepth, Model, Options
from tests.stand_ins.depth import HEAD, VIT, depth_anything, video_depth_anything
from tests.stand_ins.training import tiny_settings

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "magicbokeh"
MARGIN = 1.0  # dB of agreement


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("degraded_depth")
    plan = tiny_settings("degraded_depth", folder, steps=14, checkpoint_every=1000, held_out=6)
    task = plan.build()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    return engine.fit(task, plan, folder / "run"), task, before, plan, folder


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    rough = [torch.rand(3, 1, 6, 8, generator=generator) for _ in range(2)]
    one, other = (F.interpolate(r, size=(30, 40), mode="bicubic")[:, 0].double() + 1.5 for r in rough)
    return one, other, torch.rand(3, 30, 40, generator=generator) > 0.3


# losses


def test_silog_is_the_deviation_of_the_log_ratio(maps):
    a, b, mask = maps
    found = depth_losses.silog(a, b, mask, variance_focus=1.0)
    for i in range(3):
        ratio = np.log(a[i][mask[i]].numpy() / b[i][mask[i]].numpy())
        assert float(found[i]) == pytest.approx(ratio.std(), rel=1e-4)
    assert torch.allclose(depth_losses.silog(7 * a, b, mask, 1.0), found, rtol=1e-3)  # forgives scale
    half = depth_losses.silog(2 * a, a, variance_focus=0.5)
    assert torch.allclose(half, torch.full((3,), math.log(2) * 0.5**0.5), rtol=1e-4)  # half of it


def test_scale_and_shift_are_forgiven_and_outliers_trimmed(maps):
    a, b, mask = maps
    for loss in (depth_losses.scale_shift_invariant, depth_losses.gradient_matching):
        found = loss(a, b, mask)
        assert float(loss(3 * b + 2, b, mask).max()) < 1e-4 and bool((found > 0.1).all())
        assert torch.allclose(loss(3 * a + 2, 5 * b - 1, mask), found, rtol=1e-4)
        assert torch.equal(loss(a, torch.where(mask, b, 9.0), mask) > 0, torch.ones(3, dtype=bool))
    wrong = b.clone()
    wrong[:, :2] += 50  # 7 % of the pixels
    assert float(depth_losses.scale_shift_invariant(wrong, b).min()) > 0.5
    steady = depth_losses.aligned(b)
    assert torch.allclose(steady.flatten(1).median(1).values, torch.zeros(3), atol=1e-6)
    assert torch.allclose(steady.abs().mean((1, 2)), torch.ones(3), rtol=1e-5)
    error = (depth_losses.aligned(a) - steady).abs().flatten(1).sort(1).values
    trimmed = depth_losses.scale_shift_invariant(a, b, trim=0.1)
    assert torch.allclose(trimmed, error[:, : round(0.9 * 1200)].mean(1), rtol=2e-3)


def test_gradient_matching_is_the_sum_over_scales_and_counts_no_masked_pixel(maps):
    a, b, mask = maps
    difference = (depth_losses.aligned(a) - depth_losses.aligned(b)).numpy()
    expected = sum(np.abs(np.diff(difference[:, ::step, ::step], axis=axis)).mean((1, 2)) for step in (1, 2, 4, 8) for axis in (1, 2))
    assert np.allclose(depth_losses.gradient_matching(a, b).numpy(), expected, rtol=1e-4)
    spoilt = a.clone()
    spoilt[~mask] = 77.0
    for loss in (depth_losses.scale_shift_invariant, depth_losses.gradient_matching, depth_losses.silog):
        assert torch.allclose(loss(spoilt, b, mask), loss(a, b, mask), rtol=1e-5)


def test_empty_masks_count_nothing_and_gradients_stay_finite(maps):
    a, b, mask = maps
    mask[1] = False
    a.requires_grad_(True)
    losses = depth_losses.silog(a, b, mask), depth_losses.scale_shift_invariant(a, b, mask, 0.1), depth_losses.gradient_matching(a, b, mask)
    assert all(float(loss[1].detach()) < 1e-5 for loss in losses)
    sum(loss.sum() for loss in losses).backward()
    assert bool(a.grad.isfinite().all()) and float(a.grad[1].abs().max()) == 0 < float(a.grad[0].abs().max())


def test_feature_distance_is_one_minus_the_cosine():
    one = torch.randn(2, 5, 8)
    assert torch.allclose(depth_losses.feature_distance(one, 3 * one), torch.zeros(2), atol=1e-6)
    assert torch.allclose(depth_losses.feature_distance(one, -one), torch.full((2,), 2.0))


# training


def test_the_student_learns_and_the_teacher_stays(trained):
    outcome, task, before, _, folder = trained
    assert outcome.after["agreement"] > outcome.before["agreement"] + MARGIN
    assert outcome.after["features"] < 0.9 * outcome.before["features"]
    lines = [json.loads(line) for line in (folder / "run" / "losses.jsonl").read_text().splitlines()]
    losses = [line["losses"] for line in lines if "losses" in line]
    for name in ("features", "output", "gradient"):
        assert np.mean([loss[name] for loss in losses[-4:]]) < np.mean([loss[name] for loss in losses[:4]])
    now = dict(task.named_parameters())
    changed = {name for name in now if not torch.equal(before[name], now[name])}
    assert {name.split(".")[0] for name in changed} == {"student"}
    unused = {name for name in now if name.startswith("student.")} - changed  # no pass reads them
    assert all("mask_token" in name or "refinenet4.resConfUnit1" in name for name in unused)


def test_the_file_is_what_the_loader_takes(trained):
    outcome, task, _, _, _ = trained
    file = outcome.checkpoint / "files" / degraded_depth.FILE
    model = load_depth_model(file)
    assert "MagicBokeh's depth model" in model.info.title and not model.info.metric
    pictures = task.held_out(0)["degraded"][None]
    with torch.no_grad():
        assert torch.allclose(model.network(normalised(pictures)), degraded_depth._see(task.student, pictures)[0], atol=1e-6)
    assert load_file(file).keys() == depth_anything().keys()


def test_the_file_has_the_names_and_shapes_of_the_released_one():
    """The student's state is the file; at full size it is DAdepth.pth's manifest, both ways."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference is not beside the repository")
    listed = {name: tuple(shape) for name, shape, _ in json.loads((REFERENCE / "keys_DAdepth.json").read_text())}
    with torch.device("meta"):
        network = DepthAnything(DepthAnythingConfig(ViTConfig(1024, 24, 16, (4, 11, 17, 23)), DPTConfig(1024, 256, (256, 512, 1024, 1024))))
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == listed


def test_a_smaller_student_is_taught_through_bridges(tmp_path):
    files = [tmp_path / f"depth_anything_v2_{name}.safetensors" for name in ("teacher", "student")]
    save_file(depth_anything(0), files[0])
    save_file(depth_anything(1, ViTConfig(64, 4, 1, VIT.taps, VIT.grid), DPTConfig(64, 32, HEAD.out_channels)), files[1])
    task = DegradedDepth(Model(*files), Data(size=98), Options(), 0)
    losses = task("student", {name: value[None] for name, value in task.sample(0).items()}, 0)
    sum(losses.values()).backward()
    assert all(bridge.weight.grad.abs().max() > 0 for bridge in task.bridges)
    names = {name for group in task.groups()["student"] for name in group.parameters}
    assert {"bridges.0.weight", "student.pretrained.cls_token"} <= names and not any(name.startswith("teacher.") for name in names)
    (file,) = task.save(tmp_path)
    assert load_depth_model(file).info.config.vit.width == 64


def test_a_copy_of_the_teacher_agrees_with_it_on_sharp_pictures(tmp_path):
    file = tmp_path / "depth_anything_v2.safetensors"
    save_file(depth_anything(0), file)
    task = DegradedDepth(Model(file), Data(size=98), Options(), 0)
    batch = {name: value[None] for name, value in task.sample(0).items()}
    row = task.baselines(batch)["the teacher on the degraded picture"]
    assert torch.equal(task.measure(batch)["agreement"], row["agreement"])
    assert float(task.measure(batch | {"degraded": batch["sharp"]})["agreement"]) > 100
    one, again = task.sample(1), task.sample(1)
    assert all(torch.equal(one[name], again[name]) for name in one) and one["degraded"].shape == (3, 98, 98)
    assert task.preview(batch).shape == (1, 3, 98, 3 * 98)


def test_files_and_sizes_that_do_not_fit_are_refused(tmp_path):
    for name, tensors in (("depth_anything_v2_metric_hypersim", depth_anything()), ("video_depth_anything", video_depth_anything())):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(BokehError, match="relative Depth Anything V2"):
            DegradedDepth(Model(tmp_path / f"{name}.safetensors"), Data(size=98), Options(), 0)
    with pytest.raises(BokehError, match="multiple of 14"):
        DegradedDepth(Model(tmp_path / "video_depth_anything.safetensors"), Data(size=100), Options(), 0)


def test_the_shipped_recipe_has_the_defaults(tmp_path):
    tomllib = pytest.importorskip("tomllib")
    save_file(depth_anything(0), tmp_path / "depth_anything_v2.safetensors")
    content = tomllib.loads(settings.shipped()["degraded_depth"].read_text(encoding="utf-8"))
    plan = settings.parse({**content, "model": {"teacher": "depth_anything_v2.safetensors"}}, tmp_path)
    assert plan.options == Options() and plan.data == Data()
