"""DSFA: the fast form against the dense one, K, memory, checkpoints of every kind, and the node on a stand-in for ComfyUI."""

import argparse
import json
import pathlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bokeh_core.checkpoints.catalogue import NON_COMMERCIAL
from bokeh_core.depth import refine
from bokeh_core.depth.checkpoint import DepthModel, build, load_depth_model, read_depth_file, recognise
from bokeh_core.depth.dsfa import DSFABlock, DSFAConfig
from bokeh_core.depth.estimate import depth_maps
from bokeh_core.depth.report import report
from bokeh_core.errors import BokehError
from bokeh_core.models_cli import identify
from bokeh_core.optics.stack import BokehStack
from tests.stand_ins import depth as plain_stand_ins
from tests.stand_ins import dsfa as stand_ins

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "bokehdepth_stage2"
DAV2, UDV2, PLAIN = "DAV2_dsfa_release.pth", "UDv2_dsfa_release.pth", "unidepth_v2_vitl14.safetensors"
MAKE = {DAV2: stand_ins.dav2_dsfa, UDV2: stand_ins.udv2_dsfa, PLAIN: stand_ins.unidepth}


def block(width=32, seed=0, ops=torch.nn, **config):
    torch.manual_seed(seed)
    made = DSFABlock(width, DSFAConfig((0,), **{"heads": 4, **config}), ops).requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.startswith("gamma"):
            parameter.fill_(0.5)
    return made


def tokens(frames=3, patches=7, width=32, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, patches, width, generator=generator), torch.randn(batch, frames, patches, width, generator=generator)


def model(name, **how) -> DepthModel:
    info, tensors = recognise(MAKE[name](), name, **how)
    return DepthModel(build(info, tensors), info, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def stack():
    photo = F.interpolate(torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0)), (70, 98), mode="bilinear")[0]
    frames = [F.avg_pool2d(F.pad(photo[None], (n,) * 4, mode="replicate"), 2 * n + 1, 1)[0] for n in (1, 3)]
    return BokehStack(photo, torch.stack(frames), [10.0, 20.0])


class Streamed(torch.nn.Linear):
    """A layer of a host: its weights are its own affair."""


@pytest.mark.parametrize("ops", [torch.nn, SimpleNamespace(Linear=Streamed, LayerNorm=torch.nn.LayerNorm)])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("k", [None, torch.tensor([[0.1, 0.5, 2.0], [3.0, 0.0, 1.0]])])
def test_the_fast_form_is_the_dense_one(squared, k, ops):
    made, (reference, stack) = block(squared_space_scale=squared, ops=ops), tokens()
    assert torch.allclose(made(reference, stack, k), made.dense(reference, stack, k)[:, 0], atol=1e-6)


def test_the_dense_form_is_the_same_for_every_frame_order():
    """Frames know each other by K only: turning the stack round turns the results round."""
    made, (reference, stack) = block(), tokens()
    k = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    there, back = made.dense(reference, stack, k), made.dense(reference, stack.flip(1), k.flip(1))
    assert torch.allclose(there[:, 1:], back[:, 1:].flip(1), atol=1e-6) and torch.allclose(there[:, 0], back[:, 0], atol=1e-6)


def test_patches_meet_only_in_the_spatial_step():
    """Without its gates a patch sees the same patch of other frames and nothing else."""
    made, (reference, stack) = block(), tokens()
    made.gamma_space_attn.zero_()
    other = stack.clone()
    other[:, :, 3] += 1
    change = (made(reference, other) - made(reference, stack)).abs().amax((0, 2))
    assert change[3] > 1e-3 and change[torch.arange(7) != 3].max() < 1e-6


def test_large_k_hides_the_stack():
    """SPEC section 3.1: K is raw, and the bias -|K| leaves little of a frame of K = 20."""
    made, (reference, stack) = block(), tokens()

    def change(k):
        k = torch.full((2, 3), k)
        return float((made(reference, stack, k) - made(reference, stack.flip(0), k)).abs().mean())

    assert change(20.0) < 1e-4 * change(0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype):
    made, (reference, stack) = block(), tokens()
    k = torch.tensor([[1.0, 10.0, 30.0]] * 2)
    expected = made(reference, stack, k)
    ours = made.to(dtype)(reference.to(dtype), stack.to(dtype), k)
    assert ours.dtype == dtype and (ours - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.parametrize("name", [DAV2, UDV2])
def test_modes_of_k(name, stack):
    """Zeros, the stack's K, and none at all, for which the two networks differ as published."""
    m = model(name)
    features = refine.encode(m, stack.reference, stack.frames, resolution=70)
    given, zeros, none = (refine.decode(m, features, k).depth for k in (stack.k.float(), torch.zeros(2), None))
    alone = refine.decode(m, refine.encode(m, stack.reference, [], resolution=70)).depth
    assert given.shape == (70, 98) and not torch.allclose(given, zeros, atol=1e-3)
    assert torch.equal(none, alone if name == DAV2 else zeros)
    assert torch.equal(refine.refine(m, stack, resolution=70).depth, given)
    assert torch.equal(refine.refine(m, stack, k="none", resolution=70).depth, zeros)


@pytest.mark.parametrize("name", [DAV2, UDV2])
def test_without_a_stack_it_is_an_ordinary_model(name, stack):
    m = model(name)
    alone = refine.decode(m, refine.encode(m, stack.reference, [], resolution=70)).depth
    ordinary = next(depth_maps(m, [stack.reference], 1, clip=False, resolution=70))[0]
    assert torch.allclose(alone, ordinary, rtol=1e-4) and ordinary.std() > 0.01


def test_the_plain_part_is_depth_anything():
    tensors = stand_ins.dav2_dsfa()
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder_fusion.")}
    info, plain = recognise(plain, "depth_anything_v2_metric_vkitti_vitl.pth")
    pixels = torch.randn(1, 3, 56, 70)
    assert torch.equal(build(info, plain)(pixels), model(DAV2).network(pixels))


@pytest.mark.parametrize("name", [DAV2, UDV2])
def test_progress_ends_and_may_stop(name, stack):
    told = []
    refine.refine(model(name), stack, resolution=70, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4) and [done for done, _ in told] == sorted(done for done, _ in told) and len(told) >= 6

    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        refine.refine(model(name), stack, resolution=70, progress=stop)


def test_wrong_calls_are_explained(stack):
    info, tensors = recognise(plain_stand_ins.depth_anything(), "depth_anything_v2_metric_vkitti_vits.pth")
    plain = DepthModel(build(info, tensors), info, torch.device("cpu"), torch.float32)
    with pytest.raises(BokehError, match="cannot use a bokeh stack; expected a model with DSFA"):
        refine.refine(plain, stack)
    m = model(DAV2)
    with pytest.raises(BokehError, match="98x70 px and its frames"):
        refine.encode(m, stack.reference, stack.frames[..., :50])
    with pytest.raises(BokehError, match="2 blurred pictures and 3 values of K"):
        refine.decode(m, refine.encode(m, stack.reference, stack.frames, resolution=70), torch.ones(3))
    with pytest.raises(BokehError, match="K is 'some'"):
        refine.refine(m, stack, k="some")


@pytest.mark.parametrize(("file", "name"), [("keys_dav2_dsfa_vitl", DAV2), ("keys_udv2_dsfa_vitl14", UDV2)])
def test_the_released_files_fit_key_for_key(file, name):
    path = REFERENCE / f"{file}.json"
    if not path.is_file():
        pytest.skip(f"the list of names {path} is not here")
    wanted = json.loads(path.read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape, _ in wanted}
    info, renamed = recognise(tensors, name)
    network = build(info, renamed)
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == {key: shape for key, shape, _ in wanted}
    assert info.size == "L" and info.config.dsfa.taps == ((2, 3) if name == DAV2 else (0, 1, 2, 3)) and info.metric
    gone = next(iter(wanted))[0]
    with pytest.raises(BokehError, match="1 tensors missing"):
        build(info, {key: tensor for key, tensor in renamed.items() if key != gone})
    with pytest.raises(BokehError, match="1 tensors unexpected: extra"):
        build(info, renamed | {"extra": torch.empty(1)})


def test_double_attention_is_for_depth_anything_only(stack):
    single, double = (refine.refine(model(DAV2, attention=one), stack, resolution=70).depth for one in ("single", "double"))
    assert not torch.allclose(single, double, rtol=0.01)
    config = model(DAV2, attention="double").info.config
    assert config.vit.squared_scale and config.dsfa.squared_space_scale
    released = model(UDV2).info.config
    assert released.dsfa.squared_space_scale and not released.vit.squared_scale
    with pytest.raises(BokehError, match="one known attention scaling"):
        model(UDV2, attention="double")
    with pytest.raises(BokehError, match="expected single or double"):
        model(DAV2, attention="triple")


def test_a_renamed_file_is_still_metres():
    assert recognise(stand_ins.dav2_dsfa(), "something.pth")[0].max_depth == 80
    assert recognise(stand_ins.dav2_dsfa(), "something.pth", "metric indoor")[0].max_depth == 20
    with pytest.raises(BokehError, match="gives metres"):
        recognise(stand_ins.dav2_dsfa(), "something.pth", "relative")


class Anything:
    """A live object of a training script."""


@pytest.mark.parametrize("name", [DAV2, UDV2])
def test_training_containers(name, tmp_path, stack):
    """Options, paths, numpy numbers, the optimiser and live objects around the weights, which have a prefix."""
    tensors = MAKE[name]()
    around = {"args": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("runs/1")), "epoch": np.float64(3.5), "extra": Anything()}
    around |= {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}}
    torch.save({"model": {f"module.{key}": tensor for key, tensor in tensors.items()}, **around}, tmp_path / name)
    torch.save(tensors, tmp_path / f"bare_{name}")
    whole, bare = (load_depth_model(tmp_path / file) for file in (name, f"bare_{name}"))
    expected = refine.refine(bare, stack, resolution=70).depth
    assert torch.equal(refine.refine(whole, stack, resolution=70).depth, expected)
    found = identify(tmp_path / name)
    assert "DSFA" in found.title and not found.problems and found.licence.startswith(NON_COMMERCIAL)


def test_an_average_of_the_weights_takes_their_place(tmp_path):
    tensors = stand_ins.udv2_dsfa()
    shadow = {key: tensor + 1 for key, tensor in tensors.items()}
    first = next(iter(tensors))
    kinds = {
        "names": {"ema": {"shadow_params": {f"module.{key}": tensor for key, tensor in shadow.items()}}},
        "list": {"ema_state_dict": {"average_params": list(shadow.values()), "decay": 0.9}},
        "short": {"ema": {"shadow_params": list(shadow.values())[:-1]}},
        "some": {"ema": {"shadow_params": {first: shadow[first], "other": torch.zeros(1)}}},
    }
    for kind, more in kinds.items():
        torch.save({"model": tensors, **more}, tmp_path / "udv2.pth")
        read = read_depth_file(tmp_path / "udv2.pth")
        assert list(read) == list(tensors)
        changed = [key for key in tensors if torch.equal(read[key], shadow[key])]
        assert changed == {"names": list(tensors), "list": list(tensors), "short": [], "some": [first]}[kind], kind
    torch.save({"model": stand_ins.dav2_dsfa(), "ema": {"shadow_params": {"pretrained.cls_token": torch.zeros(1)}}}, tmp_path / "d.pth")
    assert read_depth_file(tmp_path / "d.pth")["pretrained.cls_token"].numel() > 1, "only UniDepth's loader has this rule"


def test_a_container_without_tensors_is_explained(tmp_path):
    torch.save({"model": {"a": 1}}, tmp_path / "a.pth")
    with pytest.raises(BokehError, match="holds no tensors in its entry 'model'"):
        read_depth_file(tmp_path / "a.pth")


def test_the_report_tells_the_open_questions():
    found = report(stand_ins.dav2_dsfa(), Path(DAV2))
    facts = dict(found.facts)
    assert "DSFA" in found.title and facts["DSFA"].startswith("taps 2 3") and "single" in facts["attention"] and not found.problems
    assert "1/head width" in dict(report(stand_ins.udv2_dsfa(), Path(UDV2)).facts)["attention"]
    tensors = stand_ins.udv2_dsfa()
    tensors.popitem()
    assert "1 tensors missing" in report(tensors, Path(UDV2)).problems[0]
    assert report(stand_ins.unidepth(), Path(PLAIN)).title.startswith("UniDepth V2 custom")


def test_the_better_attention_scale_is_found(stack):
    """A plain model made of the same weights: the single scale agrees with it."""
    from bokeh_core.depth.report import compare_attention

    plain = {name: tensor for name, tensor in stand_ins.dav2_dsfa().items() if not name.startswith("encoder_fusion.")}
    found = compare_attention(stand_ins.dav2_dsfa(), plain, [stack.reference], resolution=70)
    assert found["single"] > 0.999 > found["double"]


# The node.


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "models" / "depthanything"
    folder.mkdir(parents=True)
    torch.save(stand_ins.dav2_dsfa(), folder / DAV2)
    torch.save({"model": stand_ins.udv2_dsfa(), "args": argparse.Namespace(a=1)}, folder / UDV2)
    torch.save(plain_stand_ins.depth_anything(), folder / "depth_anything_v2_vits.pth")
    return folder


def packed(nodes, stack):
    """The same stack by the pack's own classes."""
    k = ", ".join(f"{value:g}" for value in stack.k.tolist())
    pictures = stack.reference[None].movedim(1, -1), stack.frames.movedim(1, -1)
    return nodes["BokehStackFromImages"].execute(*pictures, k_values=k).args[0]


def run(nodes, image, stack, loaded, **inputs):
    stack = packed(nodes, stack) if isinstance(stack, BokehStack) else stack
    inputs = {"k": "as given", "resolution": 70, "edges": "plain", "fidelity": "best", **inputs}
    return nodes["BokehRefineDepth"].execute(image, stack, loaded, **inputs).args


@pytest.mark.parametrize("name", [DAV2, UDV2])
def test_node(nodes, folder, stack, name, bar, loads):
    loaded = nodes["BokehLoadDepthModel"].execute(name).args[0]
    image = stack.reference.movedim(0, -1)[None]
    before = image.clone(), stack.frames.clone()
    depth, geometry, confidence = run(nodes, image, stack, loaded)
    expected = refine.refine(load_depth_model(folder / name), stack, resolution=70)
    assert torch.allclose(geometry["depth"][0], expected.depth, rtol=1e-4) and geometry["metric"] and geometry["image"] is image
    near = 1 / expected.depth
    assert torch.allclose(depth[0, ..., 0], (near - near.min()) / (near.max() - near.min()), atol=1e-3) and depth.shape == (1, 70, 98, 3)
    assert torch.allclose(confidence[0], expected.confidence, atol=1e-5)
    assert ("intrinsics" in geometry) == (name == UDV2)
    assert loads == [[loaded.patcher]] and bar[-1] == (400, 400)
    assert torch.equal(image, before[0]) and torch.equal(stack.frames, before[1])
    lens = nodes["BokehDefocus"].execute(
        image, geometry, strength=9.0, focus="auto", focus_x=0.5, focus_y=0.5, focus_value=0.5, depth_values="near is bright", follow=False
    )
    assert lens.args[0].metric


def test_node_remembers_the_pictures_when_only_k_changes(nodes, folder, stack, monkeypatch):
    loaded = nodes["BokehLoadDepthModel"].execute(UDV2).args[0]
    image, seen = stack.reference.movedim(0, -1)[None], []
    loaded.managed.network.pixel_encoder.backbone.register_forward_hook(lambda *given: seen.append(1))
    given = run(nodes, image, stack, loaded)[1]["depth"]
    assert len(seen) == 3
    none = run(nodes, image, stack, loaded, k="none")[1]["depth"]
    other = run(nodes, image, BokehStack(stack.reference, stack.frames, [1.0, 2.0]), loaded)[1]["depth"]
    assert len(seen) == 3, "the transformer ran again"
    assert not torch.equal(given, none) and not torch.equal(given, other)
    assert torch.equal(run(nodes, image, stack, loaded)[1]["depth"], given)
    changed = BokehStack(stack.reference, stack.frames * 0.9, stack.k)
    assert not torch.equal(run(nodes, image, changed, loaded)[1]["depth"], given) and len(seen) == 6
    run(nodes, image, changed, loaded, resolution=84)
    assert len(seen) == 9 and len(loaded.remembered) == 1, "one stack is remembered"


def test_node_takes_a_stack_of_another_size_and_a_lens(nodes, folder, stack):
    loaded = nodes["BokehLoadDepthModel"].execute(UDV2).args[0]
    image = F.interpolate(stack.reference[None], (90, 120)).movedim(1, -1)
    lens = (
        nodes["BokehLens"]
        .execute(
            mode="real lens",
            strength=24,
            f_number=1.8,
            focal_length=50,
            sensor="full frame",
            upright=False,
            sensor_width=36,
            focus_distance=0,
        )
        .args[0]
    )
    depth, geometry, _ = run(nodes, image, stack, loaded, lens=lens, edges="follow the picture")
    assert depth.shape == (1, 90, 120, 3) and geometry["intrinsics"][0, 0, 0] == pytest.approx(120 * 50 / 36)
    without = run(nodes, image, stack, loaded)[1]
    assert without["intrinsics"][0, 0, 0] != geometry["intrinsics"][0, 0, 0]
    with pytest.raises(Exception, match="needs a real lens"):
        run(nodes, image, stack, loaded, lens=type(lens)(strength=3))


@pytest.mark.parametrize("size", [(35, 47), (28, 100), (200, 60)])
def test_published_sizes_still_give_the_photo_size(nodes, folder, size):
    """As published some sizes give a map of one column or a cut one; the node stretches it to the photo."""
    loaded = nodes["BokehLoadDepthModel"].execute(UDV2).args[0]
    photo = torch.rand(3, *size)
    stack = BokehStack(photo, photo[None] * 0.9, [10.0])
    for fidelity in ("best", "as published"):
        depth, geometry, confidence = run(nodes, photo.movedim(0, -1)[None], stack, loaded, fidelity=fidelity)
        assert depth.shape == (1, *size, 3) and geometry["depth"].shape == confidence.shape == (1, *size)
        assert geometry["depth"].isfinite().all()


def test_node_refuses_what_it_cannot_use(nodes, folder, stack, loads):
    image = stack.reference.movedim(0, -1)[None]
    plain = nodes["BokehLoadDepthModel"].execute("depth_anything_v2_vits.pth").args[0]
    with pytest.raises(Exception, match="expected a model with DSFA"):
        run(nodes, image, stack, plain)
    loaded = nodes["BokehLoadDepthModel"].execute(DAV2).args[0]
    with pytest.raises(Exception, match="belongs to one"):
        run(nodes, image.repeat(2, 1, 1, 1), stack, loaded)
    with pytest.raises(Exception, match="input 'stack'"):
        run(nodes, image, None, loaded)
    assert not loads
