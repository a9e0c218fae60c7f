"""MagicBokeh's training: gradients against the definition, first weights, data, the two stages on a tiny model, and the files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bokeh_core.checkpoints.stable_diffusion import Part, unet_config
from bokeh_core.errors import BokehError
from bokeh_core.media import Picture, write_picture
from bokeh_core.samplers.magicbokeh import sampler
from bokeh_core.samplers.magicbokeh.checkpoint import load_magicbokeh
from bokeh_core.samplers.magicbokeh.focus_aware_attention import (
    FocusAwareAttention,
    dense_masked_attention,
    part,
    split_masked_attention,
)
from bokeh_core.samplers.magicbokeh.lora_file import BASE_LAYER
from bokeh_core.samplers.magicbokeh.network import PrunedUNet, focus_regions, pruned_unet
from bokeh_core.synthesis.scenes import flatten
from bokeh_core.training import composites, engine, magicbokeh, settings
from bokeh_core.training.lora import add_lora
from bokeh_core.training.magicbokeh import Data, MagicBokehTraining, Model, Options
from tests.stand_ins import linear_sd
from tests.stand_ins.training import tiny_settings

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "magicbokeh"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return linear_sd.write_base(tmp_path_factory.mktemp("magicbokeh") / "base")


@pytest.fixture(scope="module")
def first(base):
    """The task of stage "restoration", not trained."""
    return MagicBokehTraining(Model(base), Data(size=96, rays=64), Options(rank_unet=4, rank_bokeh=8), 0)


@pytest.fixture(scope="module")
def start(first, tmp_path_factory):
    """Its file."""
    return first.save(tmp_path_factory.mktemp("start"))[0]


@pytest.fixture(scope="module")
def second(base, start):
    """The task of stage "bokeh", not trained, with turns of two steps."""
    return MagicBokehTraining(Model(base, start), Data(size=96, rays=64), Options("bokeh", phase_steps=2), 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Outcome, task and folder of the tiny run of a stage."""
    torch.set_num_threads(1)
    runs = {}

    def run(stage):
        if stage not in runs:
            folder = tmp_path_factory.mktemp(f"magicbokeh_{stage}")
            runs[stage] = (*_run(stage, folder), folder)
        return runs[stage]

    return run


def _run(stage, folder):
    plan = tiny_settings(f"magicbokeh_{stage}", folder, steps=STEPS[stage], checkpoint_every=1000, held_out=4)
    task = plan.build()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    return engine.fit(task, plan, folder / "run"), task, before, plan


STEPS = {1: 12, 2: 14}
MARGIN = 0.5  # dB


def losses(folder, part):
    lines = [json.loads(line) for line in (folder / "run" / "losses.jsonl").read_text().splitlines()]
    return [sum(line["losses"].values()) for line in lines if line.get("part") == part]


# gradients


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_masked_attention_has_the_gradients_of_its_definition(share):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 30, generator=generator) < share).float()
    inputs = [torch.randn(2, 2, 30, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 2, 30, 8, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((split_masked_attention(*inputs, part(mask)) * weight).sum(), inputs)
    expected = torch.autograd.grad((dense_masked_attention(*inputs, mask) * weight).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6) and float(theirs.abs().max()) > 0.1


def test_a_whole_focus_aware_layer_has_the_gradients_of_the_published_form():
    """Every weight of the layer, written out from SPEC section 5 with dense attention."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = FocusAwareAttention(Attention(64, heads=2, dim_head=32), 8)
    x, mask = torch.randn(2, 40, 64), (torch.rand(2, 40) < 0.4).float()
    parameters = dict(layer.named_parameters())

    def heads(t):
        return t.unflatten(-1, (2, 32)).transpose(1, 2)

    def merged(t):
        return t.transpose(1, 2).flatten(2)

    def published():
        lora = layer.processor
        q, k, v = layer.to_q(x), layer.to_k(x), layer.to_v(x)
        everywhere = (heads(q) @ heads(k).transpose(-1, -2) * 32**-0.5).softmax(-1) @ heads(v)
        q2, k2, v2 = q + lora.to_q_lora(x) / 8, k + lora.to_k_lora(x) / 8, v + lora.to_v_lora(x) / 8
        within = dense_masked_attention(heads(q2), heads(k2), heads(v2), mask)
        return layer.to_out[0](merged(everywhere)) + lora.to_out_lora(merged(within)) / 8

    weight = torch.randn(2, 40, 64)
    ours = torch.autograd.grad((layer(x, {40: part(mask)}) * weight).sum(), parameters.values())
    theirs = torch.autograd.grad((published() * weight).sum(), parameters.values())
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-4), name
    assert sum(float(g.abs().max()) > 0 for g in theirs) == len(parameters)


def test_half_precision_trains_too(first):
    batch = {name: value[None] for name, value in first.sample(0).items()}
    with torch.autocast("cpu", torch.bfloat16):
        d = torch.zeros(1, 96, 96)
        d[:, :, :40] = 0.5  # two regions
        first.unet.requires_grad_(True)
        first.render(batch["degraded"], batch["seed"], d).square().mean().backward()
    gradients = [p.grad for p in first.unet.parameters() if p.grad is not None]
    first.requires_grad_(False).zero_grad()
    assert len(gradients) > 200 and all(bool(gradient.isfinite().all()) for gradient in gradients)


# first weights


def test_new_weights_leave_the_base_model_as_it_is(first):
    """LoRA and ControlNet add nothing at first; down halves are drawn with the published spreads."""
    task = first
    batch = {name: value[None] for name, value in task.sample(0).items()}
    d = torch.linspace(0, 1, 96).expand(1, 96, 96)
    with torch.no_grad():
        plain, blurred = task.render(batch["degraded"], batch["seed"]), task.render(batch["degraded"], batch["seed"], d)
        cells = F.interpolate(F.avg_pool2d(batch["degraded"], 8), scale_factor=8)
    assert torch.allclose(plain, blurred, atol=1e-4)
    assert float((plain * 0.5 + 0.5 - cells).abs().max()) < 0.04  # what the stand-in does of itself
    tensors = dict(task.named_parameters())
    downs = torch.cat([p.flatten() for name, p in tensors.items() if name.endswith("weight.0.A")])
    assert float(downs.detach().std()) == pytest.approx(1 / 4, rel=0.02)
    assert all(float(p.abs().max()) == 0 for name, p in tensors.items() if name.endswith("weight.0.B"))
    down = tensors["unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.0.weight"]
    assert float(down.abs().max()) <= 1 / 8 and float(down.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.1)  # kaiming: 1 / sqrt(64)
    copied = [name for name in dict(task.controlnet.named_parameters()) if name.startswith(("conv_in", "time_embedding", "down_blocks"))]
    unet = {name.replace(".parametrizations.weight.original", ".weight"): p for name, p in task.unet.named_parameters()}
    assert len(copied) > 50 and all(torch.equal(tensors[f"controlnet.{name}"], unet[name]) for name in copied)


def test_full_size_networks_give_the_released_files_names_and_shapes():
    """All of lora.pkl by its manifests, both ways: 70 + 112 modules of the UNet, 32 of the VAE, bokeh LoRA and ControlNet."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference is not beside the repository")

    def listed(name):
        return {key: tuple(shape) for key, shape, _ in json.loads((REFERENCE / f"keys_{name}.json").read_text())}

    tensors = {
        key: torch.empty(shape, device="meta") for key, shape in (listed("sd21base_unet_kept") | listed("sd21base_unet_dropped")).items()
    }
    unet, ranks = Part(tensors, unet_config(tensors)), {"rank_unet": 3, "rank_vae": 5, "rank_bokeh": 2}
    file = magicbokeh.fresh(unet, Options(**ranks), 0)

    def with_ranks(table):
        return {key: tuple(ranks.get(side, side) for side in shape) for key, shape in table.items()}

    def shapes(table):
        return {key: tuple(tensor.shape) for key, tensor in table.items()}

    assert shapes(file.controlnet) == listed("lora_pkl_controlnet")
    assert shapes(file.processors) == with_ranks(listed("lora_pkl_processor_state_dict"))
    lists = json.loads((REFERENCE / "keys_lora_pkl_module_lists.json").read_text())
    assert set(file.encoder_modules) == {*lists["unet_lora_encoder_modules"]} and len(file.encoder_modules) == 70
    assert set(file.decoder_modules) == {*lists["unet_lora_decoder_modules"]} and len(file.decoder_modules) == 112
    vae = [name for name in magicbokeh._adapted(listed("sd21base_vae")) if name.startswith(("encoder.", "quant_conv"))]
    assert set(vae) == {*lists["vae_lora_encoder_modules"]} and len(vae) == 32
    with torch.device("meta"):
        network = PrunedUNet(pruned_unet({key: value for key, value in unet.config.items() if key != "mid_block_type"}), 2)
    lora = add_lora(network, [*file.encoder_modules, *file.decoder_modules], 3, 8.0, torch.Generator())
    found = {name.split(".parametrizations.")[0] + f".lora_{name[-1]}": tuple(p.shape) for name, p in lora.items()}
    expected = with_ranks(listed("lora_pkl_state_dict_unet"))
    assert shapes(file.unet) == {key: expected.pop(key) for key in BASE_LAYER}
    assert found == {re.sub(r"\.default_(en|de)coder\.weight$", "", key): shape for key, shape in expected.items()}


# data


def test_samples_depend_on_seed_and_index_only(second, base, start):
    one, other = second, MagicBokehTraining(Model(base, start), Data(size=96, rays=64), Options("bokeh"), 1)
    first, again, next_one = one.sample(3), one.sample(3), one.sample(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["degraded"], next_one["degraded"]) and not torch.equal(first["degraded"], other.sample(3)["degraded"])
    assert int(first["seed"]) != int(next_one["seed"]) and 0 <= int(first["seed"]) < 2**62
    for name, shape in {
        "degraded": (3, 96, 96),
        "sharp": (3, 96, 96),
        "bokeh": (3, 96, 96),
        "disparity": (96, 96),
        "k": (),
        "focus": (),
    }.items():
        assert first[name].shape == shape and first[name].dtype == torch.float32 and bool(first[name].isfinite().all())
    assert one.held_out(0)["degraded"].shape == (3, 96, 96)


def test_composites_are_spread_as_published():
    drawn = [composites.Composites(None, None, 64).draw(np.random.default_rng([0, i])) for i in range(12)]
    for scene in drawn:
        far, middle, near = (layer.disparity for layer in scene.layers)
        assert 0 <= float(far.min()) and float(far.max()) < float(middle.min()) and float(middle.max()) <= float(near.min()) <= 1
        for layer in scene.layers:
            d, gx, gy = layer.plane
            assert float(layer.disparity[10, 20]) == pytest.approx(d + 20 * gx + 10 * gy, abs=1e-5)
    lenses = [composites.lens(scene, np.random.default_rng([1, i]), 32.0) for i, scene in enumerate(2 * drawn)]
    assert 8 < np.mean([k for k, _ in lenses]) < 24 and all(0 <= k <= 32 for k, _ in lenses)
    planes = [
        int(np.argmin([(layer.disparity - focus).abs().min() for layer in scene.layers]))
        for scene, (_, focus) in zip(2 * drawn, lenses, strict=True)
    ]
    assert {0, 1, 2} == set(planes)
    scene, (k, focus) = drawn[0], (24.0, float(drawn[0].layers[2].disparity[0, 0]))
    sharp, _ = flatten(scene)
    photo = composites.photograph(scene, k, focus, 512, 32.0)
    inside = F.avg_pool2d(scene.layers[2].alpha[None], 5, 1, 2)[0] > 0.999
    assert float((photo - composites.encode(sharp))[:, inside].abs().max()) < 1e-3  # in focus, nothing changes
    assert float((photo - composites.encode(sharp))[:, ~inside].abs().mean()) > 0.02


def test_the_users_pictures_are_used_and_bad_ones_refused(base, start, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("foregrounds", "backgrounds", "photos"):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = (
                torch.full((3, 80, 120), 0.25 * (i + 1))
                if name != "photos"
                else torch.from_numpy(rng.random((3, 200, 150), dtype=np.float32))
            )
            alpha = torch.zeros(80, 120)
            alpha[20:60, 30:90] = 1
            write_picture(tmp_path / name / f"{i}.png", Picture(pixels, alpha if name == "foregrounds" else None))
    folders = {name: tmp_path / name for name in ("foregrounds", "backgrounds", "photos")}
    task = MagicBokehTraining(Model(base, start), Data(**folders, size=96, rays=64), Options("bokeh"), 0)
    sample = task.sample(0)
    assert sample["photo"].shape == sample["photo_degraded"].shape == (3, 96, 96)
    assert torch.allclose(sample["sharp"], sample["sharp"][:1].expand(3, -1, -1), atol=1e-3) and len(sample["sharp"].unique()) < 2000
    assert len(sample["disparity"].unique()) > 2
    for wrong, words in (
        ({"foregrounds": folders["foregrounds"]}, "only one of"),
        ({"foregrounds": folders["photos"], "backgrounds": folders["photos"]}, "no alpha"),
        ({"photos": tmp_path / "nowhere"}, "not a folder"),
        ({"size": 100}, "multiple of 8"),
    ):
        with pytest.raises(BokehError, match=words):
            MagicBokehTraining(Model(base), Data(**({"size": 96} | wrong)), Options(), 0)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(BokehError, match="broken"):
        MagicBokehTraining(Model(base), Data(photos=folders["photos"], size=96), Options(), 0)


def test_stages_that_cannot_run_say_so(base):
    with pytest.raises(BokehError, match="name \\[model\\] start"):
        MagicBokehTraining(Model(base), Data(size=96), Options("bokeh"), 0)
    with pytest.raises(BokehError, match="restoration, bokeh"):
        MagicBokehTraining(Model(base), Data(size=96), Options("both"), 0)


@pytest.mark.parametrize(("name", "stage"), [("magicbokeh_1", "restoration"), ("magicbokeh_2", "bokeh")])
def test_shipped_recipes_are_the_papers(base, start, name, stage):
    tomllib = pytest.importorskip("tomllib")
    content = tomllib.loads(settings.shipped()[name].read_text(encoding="utf-8"))
    paths = {"base": str(base), "start": str(start)}
    plan = settings.parse({**content, "model": {key: paths[key] for key in content["model"]}}, base)
    assert plan.options == Options(stage) and plan.data == Data() and plan.model.start == (start if stage == "bokeh" else None)


# training


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_learns_and_touches_nothing_else(trained, stage):
    outcome, task, before, _, folder = trained(stage)
    assert outcome.after["psnr"] > outcome.before["psnr"] + MARGIN
    for part_name in task.groups():
        values = losses(folder, part_name)
        assert np.mean(values[-4:]) < np.mean(values[:4])
    owned = {name for groups in task.groups().values() for group in groups for name in group.parameters}
    now = dict(task.named_parameters())
    assert all(torch.equal(before[name], now[name]) for name in before.keys() - owned)
    changed = {name for name in owned if not torch.equal(before[name], now[name])}
    assert len(changed) > 0.9 * len(owned)
    if stage == 1:
        assert {name.split(".")[0] for name in owned} == {"unet", "encoder"} and "unet.conv_in.bias" in owned
        assert all(".parametrizations." in name or name == "unet.conv_in.bias" for name in owned)
    else:
        assert {name.split(".")[0] for name in owned} == {"unet", "controlnet"}
        assert all(".processor." in name or ".weight.0." in name for name in owned if name.startswith("unet."))


def test_turns_change_the_weights_of_their_part_only(second):
    task = second
    assert [task.parts(step) for step in range(5)] == [["bokeh"], ["bokeh"], ["restoration"], ["restoration"], ["bokeh"]]
    groups = task.groups()
    names = {part_name: {name for group in groups[part_name] for name in group.parameters} for part_name in groups}
    assert not names["bokeh"] & names["restoration"]
    batch = {name: value[None] for name, value in task.sample(0).items()}
    for part_name in groups:
        task.requires_grad_(False)
        for group in groups[part_name]:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        task.zero_grad()
        sum(task(part_name, batch, 0).values()).backward()
        reached = {name for name, p in task.named_parameters() if p.grad is not None}
        assert reached <= names[part_name] and len(reached) > 0.5 * len(names[part_name])


def test_the_restoration_turn_sees_no_defocus(second, monkeypatch):
    """Condition -1 and one region, whatever the sample's defocus (SPEC section 13)."""
    task = second
    batch = {name: value[None] for name, value in task.sample(0).items()}
    seen = []
    original = sampler.predict_eps

    def spy(model, latents, condition, mask):
        seen.append((condition, focus_regions(mask)))
        return original(model, latents, condition, mask)

    monkeypatch.setattr(sampler, "predict_eps", spy)
    with torch.no_grad():
        task("restoration", batch, 0), task("bokeh", batch, 0)
    (condition, regions), (blurred, _) = seen
    assert bool((condition == -1).all()) and all(region == [None] for region in regions.values())
    expected = 2 * (batch["disparity"] - batch["focus"]).abs() * batch["k"] / 32 - 1
    assert torch.allclose(blurred, expected, atol=1e-6) and float(blurred.max()) > -1


@pytest.mark.parametrize("stage", [1, 2])
def test_the_file_gives_the_trained_networks_output_in_the_sampler(trained, stage):
    outcome, task, _, plan, _ = trained(stage)
    file = outcome.checkpoint / "files" / magicbokeh.FILE
    model = load_magicbokeh(plan.model.base, file)
    batch = {name: value[None] for name, value in task.held_out(0).items()}
    d = torch.linspace(0, 1, 96).expand(1, 96, 96).contiguous()
    with torch.no_grad():
        latents = sampler.latent_of(model, *sampler.posterior(model, batch["degraded"] * 2 - 1), None)
        theirs = sampler.decoded(model, sampler.predict(model, latents, d))
        ours = task.eval().render(batch["degraded"], batch["seed"], d).clamp(-1, 1)
    assert torch.allclose(theirs, ours, atol=2e-4)
    again = MagicBokehTraining(Model(plan.model.base, file), plan.data, Options("bokeh"), 5)  # what goes on from a file
    with torch.no_grad():
        assert torch.allclose(again.render(batch["degraded"], batch["seed"], d).clamp(-1, 1), ours, atol=2e-4)


def test_the_task_serves_as_a_renderer_to_the_judge(trained):
    from bokeh_core.optics.defocus import Defocus
    from bokeh_core.optics.lens import Lens

    task = trained(2)[1].eval()
    defocus = Defocus(torch.linspace(0, 1, 96).expand(1, 96, 96).contiguous(), torch.tensor([0.5]), torch.tensor([16.0]), Lens(), False)
    with torch.no_grad():
        picture = task.renderer()(torch.rand(1, 3, 96, 96), defocus)
        rows = task.baselines({name: value[None] for name, value in task.held_out(0).items()})
    assert picture.shape == (1, 3, 96, 96) and 0 <= float(picture.min()) <= float(picture.max()) <= 1
    assert float(rows["the physical renderer on the sharp picture"]["psnr"]) > float(rows["the degraded picture"]["psnr"]) + 3
