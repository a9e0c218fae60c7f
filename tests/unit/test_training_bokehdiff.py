"""BokehDiff's recipe: tiny runs on a stand-in SDXL, the full size on the meta device, and PISA in its training state."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from bokeh_core.errors import BokehError
from bokeh_core.samplers.bokehdiff import checkpoint, sampler
from bokeh_core.samplers.bokehdiff.checkpoint import LORA_FILE, VAE_FILE, load_bokehdiff
from bokeh_core.samplers.bokehdiff.pisa import Pisa, dense_attention, dense_maps, scene_of
from bokeh_core.training import bokehdiff as recipe
from bokeh_core.training import settings
from bokeh_core.training.evaluate import evaluate, markdown
from bokeh_core.training.lora import add_lora, lora_parameters
from bokeh_core.training.sheet import sample_sheet
from bokeh_core.training.task import generator
from tests.stand_ins import bokehdiff as stand_in
from tests.stand_ins.training import tiny_recipe

pytest.importorskip("accelerate")
from bokeh_core.training.engine import fit

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "bokehdiff"
STEPS, HELD_OUT = 16, 3
GAIN = 1.5  # dB that training must win on held-out samples


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return tiny_recipe("bokehdiff", tmp_path_factory.mktemp("base"))


def parsed(content, options=(), **train):
    content = {**content, "train": content["train"] | train, "options": content["options"] | dict(options)}
    return settings.parse(content, Path())


@pytest.fixture(scope="module")
def run(content, tmp_path_factory):
    """A whole run: the task, its folder, the outcome, hashes of all parameters before."""
    plan, folder = parsed(content, steps=STEPS, held_out=HELD_OUT, checkpoint_every=100), tmp_path_factory.mktemp("run") / "out"
    task = plan.build()
    before = hashes(task)
    return task, folder, fit(task, plan, folder), before


def hashes(task):
    return {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in task.named_parameters()}


def batch_of(task, *numbers):
    return default_collate([task.sample(i) for i in numbers])


# --- a tiny run -------------------------------------------------------------------------------------------------------------------------


def test_training_wins_on_held_out_samples(run):
    _, folder, outcome, _ = run
    assert outcome.after["psnr"] > outcome.before["psnr"] + GAIN
    losses = [json.loads(line)["losses"]["mse"] for line in (folder / "losses.jsonl").read_text().splitlines() if "losses" in line]
    assert len(losses) == STEPS and sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_only_what_is_trained_changes(run):
    task, _, _, before = run
    after = hashes(task)
    trained = {name for groups in task.groups().values() for group in groups for name in group.parameters}
    assert {name for name in before if before[name] != after[name]} == trained
    assert not any("vae.decoder" in name or "up_blocks" in name or "original" in name for name in trained)
    assert {name.split(".")[2] for name in trained if name.startswith("vae.")} == {"mid_block", "conv_out"}


def test_files_load_strictly_and_give_the_trained_picture(run, content):
    task, _, outcome, _ = run
    files = outcome.checkpoint / "files"
    assert {path.name for path in files.iterdir()} == {LORA_FILE, VAE_FILE}
    model = load_bokehdiff(content["model"]["base"], files / LORA_FILE, files / VAE_FILE)
    batch = batch_of(task, 2**40)
    one = sampler.Condition(batch["aif"], batch["disparity"], 10 * batch["defocus_strength"] * batch["k"][..., None, None], (64, 64))
    picture = sampler.decode(model, sampler.bokeh_latents(model, sampler.encode(model, batch["aif"], 64), one, sampler.BEST, 64), 64)
    task.eval()
    assert (picture - task.rendered(batch)).abs().max() < 1e-5
    read = checkpoint.read_bokehdiff(content["model"]["base"], files / LORA_FILE, files / VAE_FILE).unet.tensors
    plain = checkpoint.read_unet(content["model"]["base"]).tensors
    changed = {name.removesuffix(".weight") for name in plain if not torch.equal(plain[name], read[name])}
    assert changed == {name for name in checkpoint.lora_targets(plain) if not name.startswith("up_blocks")}


def test_evaluation_of_the_run(run):
    _, folder, outcome, _ = run
    report = evaluate(folder, samples=HELD_OUT)
    rows = report["held_out"]
    assert set(rows) == {"trained", "untrained start", "the sharp picture", "the physical renderer"} and report["step"] == STEPS
    assert rows["trained"]["psnr"] == pytest.approx(outcome.after["psnr"], abs=1e-3)
    assert rows["untrained start"]["psnr"] == pytest.approx(outcome.before["psnr"], abs=1e-3)
    assert rows["the physical renderer"]["psnr"] > rows["the sharp picture"]["psnr"] + 1, "K, focus and disparity mean what they say"
    assert evaluate(outcome.checkpoint / "files", samples=1)["checkpoint"] == str(outcome.checkpoint)
    assert "| trained |" in markdown(report)
    with pytest.raises(BokehError, match="neither a run"):
        evaluate(folder / "previews")


# --- samples ----------------------------------------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_alone(content):
    task, other = parsed(content).build(), parsed(content, seed=8).build()
    first, again = task.sample(5), task.sample(5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["aif"], task.sample(6)["aif"]) and not torch.equal(first["aif"], other.sample(5)["aif"])
    assert first["seed"] != task.sample(6)["seed"] and not torch.equal(task.held_out(5)["aif"], first["aif"])
    sharp, blurred = first["aif"], first["target"]
    assert sharp.shape == blurred.shape == (3, 64, 64) and sharp.abs().max() <= 1 and first["disparity"].shape == (1, 64, 64)
    assert first["ids"][:2].tolist() == [80, 80] and first["ids"][4:].tolist() == [64, 64] and first["ids"][2:4].max() <= 16
    sheet = sample_sheet(task, 2, 64)
    assert sheet.shape[0] == 3 and sheet.shape[2] == 4 * 64 and 0 <= sheet.min() < sheet.max() <= 1


def test_users_pictures_and_bad_ones(content, tmp_path):
    from PIL import Image

    front, back = tmp_path / "front", tmp_path / "back"
    front.mkdir(), back.mkdir()
    cut = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    cut.paste((255, 0, 0, 255), (10, 5, 50, 35))
    cut.save(front / "a.png")
    Image.new("RGB", (50, 50), (0, 0, 255)).save(back / "b.png")
    data = {**content["data"], "foregrounds": str(front), "backgrounds": str(back)}
    task = parsed({**content, "data": data}).build()
    sharp = task.sample(0)["aif"]
    red, blue = (sharp[0] > 0) & (sharp[2] < 0), (sharp[2] > 0) & (sharp[0] < 0)
    assert red.any() and blue.any() and (red | blue).float().mean() > 0.9
    Image.new("RGB", (50, 50)).save(front / "c.png")
    with pytest.raises(BokehError, match=r"c\.png is no cut-out"):
        parsed({**content, "data": data}).build()
    for bad, words in (({"crop": 50}, "crop is 50"), ({"crop": 96}, "crop is 96"), ({"k0": 0}, "k0 is 0")):
        with pytest.raises(BokehError, match=words):
            parsed({**content, "data": content["data"] | bad})
    with pytest.raises(BokehError, match="leaves out down_blocks"):
        parsed(content, {"sections": ["mid_block"]})


# --- PISA in training -------------------------------------------------------------------------------------------------------------------


class Given:
    """Jitter and dropout that do not depend on the order in which they are asked for."""

    def __init__(self, count, samples, segments, heads, images):
        make = torch.Generator().manual_seed(4)
        self.numbers = torch.rand(images, samples, segments, count, count, 2, generator=make)
        self.keep = (torch.rand(images, heads, count, count, generator=make) > 0.1).float()

    def jitter(self, samples, segment, image, queries, keys):
        return self.numbers[image, :samples, segment][:, queries, keys]

    def kept(self, probability, heads, queries, keys, images):
        return self.keep[:, :, queries][..., keys].transpose(-1, -2)


def test_training_state_is_the_dense_form_with_its_gradients():
    """Two calls in a row: each looks at the scene anew, and the second has a harder mask (SPEC 4.2, 4.5, 4.6)."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention, grid = Attention(16, heads=2, dim_head=8), (9, 9)
    processor = recipe.TrainingPisa()
    attention.set_processor(processor)
    draws = Given(81, 3, 5, 2, 2)
    processor.grid, processor.draws = grid, draws
    processor.scene = scene_of(torch.rand(2, 2, 144, 144) * torch.tensor([1.0, 6.0])[:, None, None], grid)
    processor.pisa = replace(recipe.PISA, hardness=3.0, dropout=0.1)
    states = torch.randn(2, 81, 16, requires_grad=True)
    for hardness in (3.0, 4.0):
        assert processor.pisa.hardness == hardness
        found = [attention(states)]
        behaviour = replace(recipe.PISA, hardness=hardness, dropout=0.1)
        q, k, v = (layer(states).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v))
        dense = dense_attention(q, k, v, dense_maps(processor.scene, behaviour, draws), behaviour, draws)
        found.append(attention.to_out[0](dense.transpose(1, 2).flatten(2)))
        weights = torch.linspace(-1, 1, 16)
        gradients = [torch.autograd.grad((out * weights).sum(), [states, *attention.parameters()], retain_graph=True) for out in found]
        assert torch.allclose(*found, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))
    assert math.isclose(Pisa(hardness=5.0).slope, math.log(5))


def test_mask_hardens_by_two_a_step_and_never_outside_training(content):
    task = parsed(content, {"hardness": 3.0}).build()
    seen = []
    task.unet.register_forward_hook(lambda module, given, noise: seen.append((given[6].hardness, module.processor.pisa.hardness)))
    with torch.no_grad():
        for step in (0, 10):
            task.predict(batch_of(task, 0), step)
        assert seen == [(3.0, 5.0), (23.0, 25.0)]
        task.rendered(batch_of(task, 0))
    assert seen[-1] == (1e7, 1e7)


def test_prediction_does_not_depend_on_the_rest_of_the_batch(content):
    task = parsed(content).build().train()
    with torch.no_grad():
        both = task.predict(batch_of(task, 0, 1), 0)
        alone = task.predict(batch_of(task, 1), 0)
    assert (both[1] - alone[0]).abs().max() < 1e-4


# --- the other losses and the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A tiny ConvNeXt under timm's names, with a head as the real file has one."""
    from bokeh_core.training.features import ConvNeXt

    torch.manual_seed(2)
    file = tmp_path_factory.mktemp("features") / "convnext.safetensors"
    save_file(ConvNeXt([8, 16, 24, 32], [1, 1, 2, 1]).state_dict() | {"head.fc.weight": torch.zeros(5, 32)}, file)
    return file


def test_adversarial_part(content, features, tmp_path):
    content = {**content, "model": content["model"] | {"discriminator": str(features)}}
    plan = parsed(content, {"gan_step": 2, "keep_encoder_gradients": True}, batch=2, steps=3, held_out=0, checkpoint_every=2)
    task = plan.build()
    assert not any("adversarial" in note for note in task.notes()) and any("perceptual" in note for note in task.notes())
    before = hashes(task)
    fit(task, plan, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    parts = ("generator", "discriminator")
    assert [(line["step"], line["part"]) for line in log if "part" in line] == [(step, part) for step in range(3) for part in parts]
    assert ["adversarial" in line["losses"] for line in log if line.get("part") == "generator"] == [False, False, True]
    after = hashes(task)
    assert all(before[name] == after[name] for name in before if name.startswith("features."))
    assert all(before[name] != after[name] for name in before if name.startswith("head."))
    assert not task._made
    saved = load_file(tmp_path / "run" / "steps-3" / "trained.safetensors")
    assert any(name.startswith("gradient of vae.encoder.") for name in saved), "the running sums go on after a resume"


def test_every_parameter_gets_a_gradient(content, features):
    """From all losses together, through decoder, one step, UNet, PISA and encoder."""
    content = {**content, "model": content["model"] | {"discriminator": str(features)}}
    task = parsed(content, {"gan_step": 0, "hardness": 3.0}).build().train()
    parameters = {name: p for group in task.groups()["generator"] for name, p in group.parameters.items()}
    task.requires_grad_(False)
    for name, p in parameters.items():
        p.requires_grad_(True)
        if name.endswith(".B"):
            p.data += 0.01  # else A has none
    losses = task("generator", batch_of(task, 0), 0)
    assert set(losses) == {"mse", "edge", "adversarial"}
    sum(losses.values()).backward()
    dead = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    # Biases of key projections have none: the softmax over queries cannot tell.
    assert [name for name in dead if "to_k.bias" not in name] == []


@pytest.mark.parametrize(("name", "options"), [("bokehdiff", recipe.Options()), ("bokehdiff_script", recipe.Options.script())])
def test_shipped_recipes_are_the_presets(content, name, options):
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    text = settings.shipped()[name].read_text()
    shipped = tomllib.loads(text)
    plan = settings.parse({**shipped, "model": content["model"]}, Path())
    assert plan.options == options and plan.data == recipe.Data() and plan.options.schedule_steps == plan.train.steps == 120_000
    assert plan.train.batch == (1 if "script" in name else 2)


@pytest.mark.parametrize(
    ("options", "manifest"),
    [(recipe.Options(), "pytorch_lora_weights_alt_no_up_blocks"), (recipe.Options.script(), "pytorch_lora_weights")],
)
def test_full_size_lora_has_the_published_names_and_shapes(options, manifest):
    from diffusers import UNet2DConditionModel

    path = REFERENCE / f"keys_{manifest}.json"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the repository")
    listed = json.loads(path.read_text())
    listed = listed.get("keys", listed.get("tensors")) if isinstance(listed, dict) else listed
    sdxl = {
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10],
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**stand_in.UNET, **sdxl})
    targets = [name for name in checkpoint.lora_targets(unet.state_dict()) if name.startswith(options.sections)]
    add_lora(unet, targets, options.rank, options.rank, generator(0))
    ours = {name.replace(".parametrizations.weight.0.", ".lora_") + ".weight": list(p.shape) for name, p in lora_parameters(unet).items()}
    assert ours == {name: list(shape) for name, shape, _ in listed}


def test_full_size_encoder_has_the_published_names(content):
    task = parsed(content, {"encoder_parts": list(recipe.Options.script().encoder_parts)}).build()
    names = {name.removeprefix("vae.") for name in task.groups()["generator"][1].parameters}
    path = REFERENCE / "keys_vae_ckpt.json"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the repository")
    listed = json.loads(path.read_text())
    listed = listed.get("keys", listed.get("tensors")) if isinstance(listed, dict) else listed
    assert names == {name for name, *_ in listed}


# --- the commands -----------------------------------------------------------------------------------------------------------------------


def test_commands(content, tmp_path, capsys, monkeypatch):
    from bokeh_core.cli import main
    from tests.stand_ins.training import write_toml

    monkeypatch.chdir(tmp_path)
    short = {**content, "train": content["train"] | {"batch": 1, "held_out": 1, "checkpoint_every": 1}}
    recipe_file = write_toml(short, tmp_path / "mine.toml")
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and str(path) in listed for name, path in settings.shipped().items())
    assert main(["train", str(recipe_file), "--sheet", "sheet.png", "--rows", "2"]) == 0 and (tmp_path / "sheet.png").stat().st_size > 1000
    capsys.readouterr()
    assert main(["train", str(recipe_file), "--steps", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "mine/steps-1" and "the perceptual loss is off" in said.err and "held out, psnr" in said.err
    assert main(["train", str(recipe_file), "--steps", "1"]) == 2 and "--resume" in capsys.readouterr().err
    assert main(["train", str(recipe_file), "--steps", "2", "--resume"]) == 0 and (tmp_path / "mine" / "steps-2").is_dir()
    assert main(["evaluate", "mine", "--samples", "1", "-o", "report"]) == 0
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["step"] == 2
    assert "| the sharp picture |" in (tmp_path / "report" / "evaluation.md").read_text()
    for arguments, words in (
        (["train"], "A recipe is missing"),
        (["train", "gone.toml"], "no recipe file gone.toml"),
        (["train", str(recipe_file), "--steps", "0"], "steps is 0"),
        (["evaluate", str(tmp_path)], "neither a run"),
        (["evaluate", "mine", "--samples", "0"], "--samples is 0"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2 and words in capsys.readouterr().err
