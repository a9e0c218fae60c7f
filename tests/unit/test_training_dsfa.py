"""BokehDepth stage 2: data, gradients, the tiny runs, and their files in our loader."""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import default_collate

from bokeh_core.depth import refine
from bokeh_core.depth.checkpoint import load_depth_model
from bokeh_core.depth.dsfa import DSFABlock, DSFAConfig
from bokeh_core.depth.unidepth import made_up_camera
from bokeh_core.errors import BokehError
from bokeh_core.optics.stack import BokehStack
from bokeh_core.stack_files import save_stack
from bokeh_core.training import dsfa, engine, settings
from bokeh_core.training.dsfa import DSFA, Options
from tests.stand_ins.depth import depth_anything
from tests.stand_ins.dsfa import dav2_dsfa
from tests.stand_ins.training import tiny_settings

KEYS = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "bokehdepth_stage2"
MODELS = ("dsfa_depth_anything", "dsfa_unidepth")


def digests(network) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tmp_path_factory):
    """(settings, task that has trained 30 steps on 16 samples, outcome, digests before)."""
    folder = tmp_path_factory.mktemp("files")
    run = tiny_settings(request.param, folder, steps=30, checkpoint_every=30, held_out=6)
    task = run.build()
    make = lru_cache(task.sample)
    task.sample = lambda index: make(index % 16)
    before = digests(task.network)
    return run, task, engine.fit(task, run, folder / "out"), before


def test_training_helps_on_what_it_has_not_seen(tiny):
    """Margins: 5 of 100 pixels more within a factor of 1.25, and two thirds of the mean error."""
    _, _, outcome, _ = tiny
    assert outcome.after["delta1"] > outcome.before["delta1"] + 0.05
    assert outcome.after["abs_rel"] < 0.67 * outcome.before["abs_rel"]
    lines = [json.loads(line) for line in (outcome.checkpoint.parent / "losses.jsonl").read_text().splitlines()]
    losses = [line["losses"]["silog"] for line in lines if "losses" in line]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


def test_blocks_and_head_move_and_nothing_else(tiny):
    _, task, _, before = tiny
    moved = {name for name, word in digests(task.network).items() if word != before[name]}
    assert not any(name.startswith(dsfa.ENCODERS) or any(mark in name for mark in dsfa.CAMERA) for name in moved)
    blocks = {name for name in before if name.startswith(dsfa.FUSION)}
    assert blocks <= moved and any(name not in blocks for name in moved)


def test_the_file_gives_the_trained_network(tiny):
    _, task, outcome, _ = tiny
    (file,) = (outcome.checkpoint / "files").iterdir()
    model = load_depth_model(file)
    assert model.info.family.endswith("+ DSFA")
    sample = task.held_out(3)
    stack = BokehStack(sample["sharp"], sample["stack"], sample["k"])
    theirs = refine.refine(model, stack, resolution=84, camera=made_up_camera(84, 84)[0] if task.uni else None).depth
    with torch.no_grad():
        ours = task.predict(default_collate([sample]))[0][0]
    assert torch.allclose(theirs, ours, rtol=1e-4)


@pytest.mark.parametrize("train", ["dsfa", "all"])
def test_what_is_trained(tmp_path, train):
    run = tiny_settings("dsfa_depth_anything", tmp_path, steps=1, batch=1, held_out=0)
    task = replace(run, options=replace(run.options, train=train)).build()
    before = digests(task.network)
    engine.fit(task, run, tmp_path / "out")
    moved = {name for name, word in digests(task.network).items() if word != before[name]}
    if train == "dsfa":
        assert moved == {name for name in before if name.startswith(dsfa.FUSION)}
    else:
        still = before.keys() - moved  # the mask token, and one unit of the last fusion step that no pass uses
        assert all("mask_token" in name or "refinenet4.resConfUnit1" in name for name in still)


def test_gradients_of_the_fast_block_are_those_of_the_published_one():
    generator = torch.Generator().manual_seed(0)
    block = DSFABlock(32, DSFAConfig((0,), heads=4))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    block.double()
    reference, stack = (
        torch.randn(*shape, 32, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (2, 3, 5))
    )
    k = torch.tensor([[0.5, 1.0, 2.0], [0.1, 0.4, 3.0]])
    weights = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    inputs = [reference, stack, *block.parameters()]
    ours, theirs = (
        torch.autograd.grad((out * weights).sum(), inputs) for out in (block(reference, stack, k), block.dense(reference, stack, k)[:, 0])
    )
    for mine, published in zip(ours, theirs, strict=True):
        assert (mine - published).abs().max() <= 1e-5 * published.abs().max() and published.any()  # the fast softmax is in float32


@pytest.mark.skipif(not KEYS.exists(), reason="the manifests of the released files are not here")
@pytest.mark.parametrize(
    "start, end, name",
    [
        ("keys_dav2_vitl", "keys_dav2_dsfa_vitl", "depth_anything_v2_metric_vkitti_vitl.pth"),
        ("keys_dav2_dsfa_vitl", "keys_dav2_dsfa_vitl", "DAV2_dsfa_release.pth"),
        ("keys_udv2_dsfa_vitl14", "keys_udv2_dsfa_vitl14", "UDv2_dsfa_release.pth"),
        ("plain unidepth", "keys_udv2_dsfa_vitl14", "unidepth-v2-vitl14.bin"),
    ],
)
def test_saved_names_and_shapes_are_those_of_the_releases(monkeypatch, start, end, name):
    """From the released files a network of the released shape; on the meta device."""
    plain = start == "plain unidepth"
    listed = json.loads((KEYS / f"{'keys_udv2_dsfa_vitl14' if plain else start}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape, _ in listed if not (plain and ".fusion_blocks." in key)}
    if plain:
        tensors = {key.replace("pixel_encoder.backbone.", "pixel_encoder."): tensor for key, tensor in tensors.items()}
    monkeypatch.setattr(dsfa, "read_depth_file", lambda path: tensors)
    with torch.device("meta"):
        _, network = dsfa.with_dsfa(Path(name), "auto", "single", 0)
    ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert ours == {key: shape for key, shape, _ in json.loads((KEYS / f"{end}.json").read_text())}


def test_new_blocks_start_as_published(tmp_path):
    run = tiny_settings("dsfa_depth_anything", tmp_path)
    network = run.build().network
    block = network.blocks[3]
    assert all((gate == 0.1).all() for name, gate in block.named_parameters() if name.startswith("gamma_"))
    assert (block.ln_space_attn.weight == 1).all() and block.k_embed[0].weight.std() > 0
    again = run.build().network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())
    double = dsfa.with_dsfa(run.model.depth, "auto", "double", 0)[1]
    assert double.config.vit.squared_scale and double.blocks[2].space_attn.scale is not None


def test_samples(tmp_path):
    run = tiny_settings("dsfa_depth_anything", tmp_path)
    task = run.build()
    sample, again = task.sample(4), run.build().sample(4)
    assert all(torch.equal(sample[name], again[name]) for name in sample)
    assert sample["stack"].shape == (2, 3, 84, 84) and sample["k"].tolist() == [10.0, 30.0] and sample["valid"].all()
    assert 1 <= sample["depth"].min() and sample["depth"].max() <= 20.01
    blur = (sample["stack"] - sample["sharp"]).abs().mean((1, 2, 3))
    assert 0 < blur[0] < blur[1]
    task.options = replace(task.options, frames=1, deliver_k=False)
    short = task.sample(4)
    assert short["stack"].shape == (1, 3, 84, 84)
    batch = default_collate([short])
    with torch.no_grad():
        told, other = (task.predict(batch | {"k": torch.tensor([[k]])})[0] for k in (10.0, 25.0))
        assert torch.equal(told, other)  # K does not arrive
        task.options = replace(task.options, deliver_k=True)
        assert not torch.equal(told, task.predict(batch)[0])


def test_stacks_from_disk(tmp_path):
    run = tiny_settings("dsfa_depth_anything", tmp_path)
    stack = BokehStack(torch.rand(3, 90, 120), torch.rand(3, 3, 90, 120), [8.0, 16.0, 24.0])
    manifest = save_stack(tmp_path / "stack", stack)
    depth = np.tile(np.linspace(2, 100, 120, dtype=np.float32), (90, 1))
    depth[:, :60][::2] = np.nan
    np.save(tmp_path / "stack" / "depth.npy", depth)
    with pytest.raises(BokehError, match="no depth map"):
        DSFA(run.model, replace(run.data, stacks=manifest), run.options, 0)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"depth": "depth.npy"}) + "\n")
    task = DSFA(run.model, replace(run.data, stacks=manifest), run.options, 0)
    sample = task.sample(0)
    assert sample["stack"].shape == (2, 3, 84, 84) and sample["k"].tolist() == [8.0, 16.0]
    assert not sample["valid"].all() and (sample["depth"][sample["valid"]] <= 80).all() and sample["depth"].isfinite().all()
    losses = task("depth", default_collate([sample]), 0)
    assert torch.isfinite(losses["silog"])
    with pytest.raises(BokehError, match="has 3 frames"):
        DSFA(run.model, replace(run.data, stacks=manifest), replace(run.options, k=(1.0, 2.0, 3.0, 4.0)), 0).sample(0)


def test_files_with_dsfa_are_trained_on_and_others_refused(tmp_path):
    tensors = dav2_dsfa()
    save_file(tensors, tmp_path / "DAV2_dsfa_release.safetensors")
    info, network = dsfa.with_dsfa(tmp_path / "DAV2_dsfa_release.safetensors", "auto", "double", 0)
    assert info.config.max_depth == 80 and network.config.vit.squared_scale
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(BokehError, match=r"x\.safetensors holds other tensors"):
        dsfa.with_dsfa(tmp_path / "x.safetensors", "auto", "single", 0)
    save_file(depth_anything(), tmp_path / "depth_anything_v2_vits.safetensors")  # relative and metric files have the same tensors
    with pytest.raises(BokehError, match="is Depth Anything V2 custom, relative; DSFA goes on a metric"):
        dsfa.with_dsfa(tmp_path / "depth_anything_v2_vits.safetensors", "auto", "single", 0)
    info, _ = dsfa.with_dsfa(tmp_path / "depth_anything_v2_vits.safetensors", "metric indoor", "single", 0)
    assert info.config.max_depth == 80  # the range of the released DSFA, whatever the start


@pytest.mark.parametrize(
    "table, message",
    [
        ({"options": {"size": 100}}, "multiple of 14"),
        ({"options": {"k": [10.0], "frames": 2}}, "no more frames than K"),
        ({"options": {"train": "head"}}, r"\[options\] train"),
        ({"data": {"near": 5.0, "far": 2.0}}, "0 < near < far"),
    ],
)
def test_bad_settings_are_refused(tmp_path, table, message):
    with pytest.raises(BokehError, match=message):
        settings.parse({"recipe": "dsfa", "train": {"steps": 1}, "model": {"depth": str(tmp_path)}, **table}, tmp_path)


@pytest.mark.parametrize("name", ["dsfa", "dsfa_script"])
def test_shipped_recipes(tmp_path, name):
    (tmp_path / "r.toml").write_text(settings.shipped()[name].read_text(encoding="utf-8"), encoding="utf-8")
    for file in ("depth_anything_v2_metric_vkitti_vitl.pth", "unidepth-v2-vitl14.safetensors"):
        (tmp_path / file).touch()
    found = settings.read(tmp_path / "r.toml")
    assert found.options.total == found.train.steps
    if name == "dsfa":
        assert found.options == Options(total=found.train.steps)  # the dataclasses' defaults are the paper's recipe
    else:
        assert not found.options.deliver_k and found.options.frames == 1
