"""BokehDepth stage 1: data, gradients, the tiny run, and its file in our loader."""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import default_collate

from bokeh_core.errors import BokehError
from bokeh_core.samplers.kontext_stack import checkpoint, recipe
from bokeh_core.samplers.kontext_stack.adapter import RELEASED, BokehAdapter, read_adapter
from bokeh_core.samplers.kontext_stack.transformer import attach
from bokeh_core.training import engine, kontext_stack, settings
from bokeh_core.training.kontext_stack import I2I, T2I, KontextStack, Options, attach_trainable, needed_prompts
from bokeh_core.training.manifests import write_manifest
from tests.stand_ins import kontext_stack as stand_in
from tests.stand_ins.training import tiny_recipe, tiny_settings

KEYS = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "bokehdepth_stage1" / "keys_bokeh_lora.json"


def digest(network, trained) -> str:
    word = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if name not in trained:
            word.update(name.encode() + tensor.numpy().tobytes())
    return word.hexdigest()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(settings, task that has trained 40 steps on 32 samples, outcome, digests of what is frozen before and after)."""
    run = tiny_settings(
        "kontext_stack", tmp_path_factory.mktemp("files"), steps=40, checkpoint_every=40, held_out=6
    )  # fmt: skip
    task = run.build()
    make = lru_cache(task.sample)
    task.sample = lambda index: make(index % 32)
    trained = set(task.groups()["adapter"][0].parameters)
    before = digest(task, trained)
    outcome = engine.fit(task, run, tmp_path_factory.mktemp("run") / "out")
    return run, task, outcome, (before, digest(task, trained))


def test_training_helps_on_what_it_has_not_seen(tiny):
    """The margin is 1 dB of the velocity's error. The random stand-in can not paint, so its pictures say nothing."""
    _, _, outcome, _ = tiny
    assert outcome.after["velocity"] > outcome.before["velocity"] + 1.0
    lines = [json.loads(line) for line in (outcome.checkpoint.parent / "losses.jsonl").read_text().splitlines()]
    losses = [line["losses"]["velocity"] for line in lines if "losses" in line]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_only_the_adapter_moves(tiny):
    run, task, _, (before, after) = tiny
    assert before == after
    start = kontext_stack.new_adapter(task.adapter.config, run.train.seed).state_dict()
    moved = {name for name, tensor in task.adapter.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if ".to_k_dof." not in name}


def test_the_file_gives_the_trained_network(tiny):
    run, task, outcome, _ = tiny
    adapter = read_adapter(outcome.checkpoint / "files" / kontext_stack.FILE, blocks=3, width=stand_in.HEAD)
    batch = default_collate([task.held_out(i) for i in range(2)])
    with torch.no_grad():
        ours = task.velocity_errors(batch, torch.tensor([0.3, 0.7]), I2I)
        fresh = run.build()
        untrained = fresh.velocity_errors(batch, torch.tensor([0.3, 0.7]), I2I)
        attach(fresh.transformer, adapter)  # as the sampler does it
        fresh.adapter = adapter
        theirs = fresh.velocity_errors(batch, torch.tensor([0.3, 0.7]), I2I)
    assert torch.allclose(ours, theirs, rtol=1e-5) and (ours < 0.9 * untrained).all()


def test_a_new_adapter_leaves_the_base_as_it_is_and_starts_as_published():
    network = stand_in.diffusers_flux(stand_in.flux())
    adapter = kontext_stack.new_adapter(replace(RELEASED, blocks=(0, 1, 2), width=stand_in.HEAD), 3)
    assert float(adapter.adapter_modules["0"]["to_q_adp"].down.weight.detach().std()) == pytest.approx(1 / 128, rel=0.03)
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator), "timestep": torch.tensor([0.5]), "guidance": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 4, stand_in.TEXT, generator=generator), "txt_ids": torch.zeros(4, 3),
        "pooled_projections": torch.randn(1, stand_in.POOLED, generator=generator), "img_ids": recipe.position_ids(8, 8, 0),
    }  # fmt: skip
    with torch.no_grad():
        base = network(**given)[0]
        attach_trainable(network, adapter)
        out = network(**given, joint_attention_kwargs={"bokeh_vectors": adapter.vectors_of_k([20.0])})[0]
    assert (out - base).abs().max() < 1e-5


@pytest.mark.skipif(not KEYS.exists(), reason="the manifest of the released file is not here")
def test_saved_names_and_shapes_are_those_of_the_release():
    with torch.device("meta"):
        adapter = BokehAdapter(RELEASED)
    ours = {name: list(tensor.shape) for name, tensor in adapter.state_dict().items()}
    assert ours == {name: shape for name, shape, _ in json.loads(KEYS.read_text())}


def gradients(task, batch) -> dict[str, torch.Tensor]:
    parameters = task.groups()["adapter"][0].parameters
    loss = task("adapter", batch, 0)["velocity"]
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def test_gradients(tiny):
    """Against finite differences; and the saving of memory changes nothing."""
    run, _, _, _ = tiny
    task = run.build()
    task.double()
    for group in task.groups()["adapter"]:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    kinds = {task._kind(number): number for number in range(16)}
    batch = default_collate([task.sample(2 * number + member) for number in kinds.values() for member in (0, 1)])
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    batch["pivot"][batch["kind"] == T2I] = 0  # the second leans on the first
    exact = gradients(task, batch)
    assert all(gradient.abs().max() > 0 for gradient in exact.values())
    task.transformer.enable_gradient_checkpointing()
    for name, gradient in gradients(task, batch).items():
        assert torch.allclose(gradient, exact[name], rtol=1e-9, atol=1e-12)
    # Along the gradient itself, by a step that float32 can still tell: the loss and the K embedding are in it.
    length = float(torch.stack([gradient.square().sum() for gradient in exact.values()]).sum().sqrt())
    values, step = [], 0.02
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in task.groups()["adapter"][0].parameters.items():
                parameter += sign * step * exact[name] / length
            values.append(float(task("adapter", batch, 0)["velocity"]))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(length, rel=5e-3)


def test_samples_are_the_published_mixture(tiny):
    run, _, _, _ = tiny
    task = run.build()
    assert sum(task._kind(number) == I2I for number in range(16)) == 8  # half of an epoch
    number = next(n for n in range(16) if task._kind(n) == T2I)
    sharp, blurred = task.sample(2 * number), task.sample(2 * number + 1)
    assert torch.equal(sharp["sharp"], blurred["sharp"]) and torch.equal(sharp["target"], sharp["sharp"])
    assert sharp["k"] == 0 and 1 <= blurred["k"] <= 30 and not torch.equal(blurred["target"], blurred["sharp"])
    again = run.build().sample(2 * number + 1)
    assert all(torch.equal(blurred[name], again[name]) for name in again)
    held = task.held_out(5)
    assert held["kind"] == I2I and held["condition"] == held["k"] / 30 and held["pivot"] == held["member"]
    # With all of a group leaning, all take the pivot's noise; I2I groups never do.
    task.options = replace(task.options, swap=1.0)
    seeds = {int(task.sample(2 * number + member)["noise_seed"]) for member in (0, 1)}
    assert len(seeds) == 1 and seeds <= {task._noise_seed(number, member) for member in (0, 1)}


def test_pivots_follow_the_samples_and_parts_of_groups_are_refused(tiny):
    _, task, _, _ = tiny
    batch = {"group": torch.tensor([4, 7, 4, 7]), "member": torch.tensor([1, 0, 0, 1]), "pivot": torch.tensor([0, 0, 0, 0])}
    assert task._pivots(batch) == (2, 1, 2, 1)
    with pytest.raises(BokehError, match="multiple of group"):
        task._pivots({name: tensor[:3] for name, tensor in batch.items()})


def manifest(folder: Path) -> Path:
    """A pair with captions, a photo with K and captions, and a sharp photo with depth."""
    rows = [
        "input_image_path,dof_cond,target_image_path,depth_map_path,fg_mask_path,captions,suitable_for_synthetic",
        "sharp.png,4,target.png,,,a pair,",
        "target.png,7,,,,real bokeh,false",
        "sharp.png,0,,depth.npy,mask.png,,true",
    ]
    (folder / "t.csv").write_text("\n".join(rows))
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(80, 112, 3, generator=generator) * 255).byte().numpy()
    Image.fromarray(pixels).save(folder / "sharp.png")
    Image.new("RGB", (112, 80), (200, 100, 50)).save(folder / "target.png")
    mask = torch.zeros(80, 112, dtype=torch.uint8)
    mask[20:60, 30:80] = 255
    Image.fromarray(mask.numpy()).save(folder / "mask.png")
    np.save(folder / "depth.npy", np.where(mask.numpy() > 0, 2.0, 9.0).astype(np.float32))
    write_manifest(folder / "t.csv", folder / "photos.jsonl")
    return folder / "photos.jsonl"


def test_photos(tiny, tmp_path, monkeypatch):
    run, _, _, _ = tiny
    data = replace(run.data, photos=manifest(tmp_path))

    class Words:
        """Knows every prompt; two by number."""

        def __init__(self, path):
            self.places = type("Places", (dict,), {"__missing__": lambda self, words: 0})({"a pair": 1, "real bokeh": 2})

        def require(self, prompts):
            assert self.places.keys() <= prompts

    monkeypatch.setattr(kontext_stack, "Prompts", Words)
    task = KontextStack(run.model, data, run.options, 0)
    images = [task.sample(2 * n + m) for n in range(16) for m in (0, 1)]
    pairs = [s for s in images if s["kind"] == I2I and abs(float(s["target"].mean(dim=(1, 2))[0]) - 200 / 255) < 0.02]
    # The pair's K: 4 px per unit at 112 px, seen on the 80 px that were cut out of it, rounded to the grid.
    expected = task._rounded(4 * 512 / 112 * 112 / 80)
    assert pairs and all(float(s["k"]) == pytest.approx(expected) for s in pairs)
    rendered = [s for s in images if s["kind"] == I2I and float(s["target"].mean(dim=(1, 2))[0]) < 0.7]
    assert rendered and all((s["target"] - s["sharp"]).abs().mean() > 0.01 for s in rendered)
    real = [s for s in images if s["kind"] == T2I and s["prompt"] == 2]
    assert real
    script = KontextStack(run.model, data, replace(run.options, real_pairs=False, min_max_k=True, drop_k=0.0), 0)
    assert not any(float(script.sample(i)["target"].mean(dim=(1, 2))[0]) > 0.7 for i in range(32) if script._kind(i // 2) == I2I)
    telling = [script.sample(2 * n + m) for n in range(16) if script._kind(n) == T2I for m in (0, 1)]
    conditions = {round(float(s["condition"]), 3) for s in telling if torch.equal(s["sharp"], s["target"]) and s["k"] > 0}
    low, high = script.k_span
    assert conditions <= {round((k - low) / (high - low), 3) for k in (4 * 512 / 112, 7 * 512 / 112)} and 1.0 in conditions
    native = KontextStack(run.model, data, replace(run.options, native_size=True, group=1, i2i_share=1.0), 0)
    assert native.sample(0)["sharp"].shape == (3, 80, 112) and native.held_out(0)["sharp"].shape == (3, 64, 64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"native_size": True}, "image to image alone"),
        ({"size": 72}, "multiple of 16"),
        ({"k_step": 0.0}, "above 0"),
        ({"renderer": "bokehme"}, r"\[options\] renderer"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    content = {"recipe": "kontext_stack", "train": {"steps": 1}, "model": {"transformer": ".", "vae": "."}, "options": options}
    content["model"] = dict.fromkeys(("transformer", "vae"), str(tmp_path))
    with pytest.raises(BokehError, match=message):
        settings.parse(content, tmp_path)


def test_prompts(tiny, tmp_path):
    run, _, _, _ = tiny
    needed = needed_prompts([], Options(k_step=1.0))
    assert len(needed) == 4 * 30 + 4 + 1 and any("7.00" in words for words in needed)
    with pytest.raises(BokehError, match=r"lacks 1\d\d of 125 prompts"):
        KontextStack(run.model, run.data, replace(run.options, k_step=1.0), 0)
    with pytest.raises(BokehError, match="neither text_encoders"):
        KontextStack(run.model, replace(run.data, prompts=None), run.options, 0)
    save_file({"x": torch.zeros(1)}, tmp_path / "p.safetensors")
    with pytest.raises(BokehError, match="no encoded prompts"):
        kontext_stack.Prompts(tmp_path / "p.safetensors")


def write_text_encoders(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "blur": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("tokenizer", "tokenizer_2"):
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder / name)
    sizes = {"vocab_size": 8, "num_hidden_layers": 1}
    clip = CLIPTextConfig(**sizes, hidden_size=stand_in.POOLED, intermediate_size=32, num_attention_heads=2, eos_token_id=3)
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    T5EncoderModel(T5Config(vocab_size=8, num_layers=1, d_model=stand_in.TEXT, d_kv=16, d_ff=32, num_heads=2)).save_pretrained(
        folder / "text_encoder_2"
    )


def test_text_encoders_run_in_the_task(tiny, tmp_path):
    run, _, _, _ = tiny
    write_text_encoders(tmp_path)
    task = KontextStack(replace(run.model, text_encoders=tmp_path), replace(run.data, prompts=None), run.options, 0)
    batch = default_collate([task.sample(i) for i in (0, 1)])
    assert batch["clip"].shape == (2, 77) and batch["t5"].shape == (2, 512)
    assert torch.isfinite(task("adapter", batch, 0)["velocity"])
    text, pooled = task.text.encode_text("blur blur")
    assert text.shape == (1, 512, stand_in.TEXT) and pooled.shape == (1, stand_in.POOLED)
    with pytest.raises(BokehError, match="lacks the folders text_encoder_2"):
        (tmp_path / "text_encoder_2").rename(tmp_path / "gone")
        checkpoint.TextEncoders(tmp_path)


def test_transformer_files(tmp_path, monkeypatch):
    """One file under diffusers' names; the original layout at its full size, without memory; and what is refused."""
    tensors = stand_in.to_diffusers(stand_in.flux())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "flux.safetensors")
    network = checkpoint.load_transformer(tmp_path / "flux.safetensors", torch.float32)
    assert len(network.single_transformer_blocks) == 2 and torch.equal(network.x_embedder.weight, tensors["x_embedder.weight"])

    with monkeypatch.context() as patched:
        patched.setattr(
            stand_in, "_random", lambda shapes, seed: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        )
        patched.setattr(stand_in, "TEXT", 4096)
        patched.setattr(stand_in, "POOLED", 768)
        whole = stand_in.flux(heads=24, double=19, single=38)
        for prefix in ("", "model.diffusion_model."):
            named = {prefix + name: tensor for name, tensor in whole.items()}
            patched.setattr(checkpoint, "read_checkpoint", lambda path, named=named: type("File", (), {"tensors": named}))
            network = checkpoint.load_transformer(tmp_path / "flux1-kontext-dev.safetensors")
            assert len(network.transformer_blocks) == 19 and network.dtype == torch.bfloat16

    save_file({"x.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(BokehError, match="no FLUX transformer"):
        checkpoint.load_transformer(tmp_path / "other.safetensors")
    save_file({"x_embedder.weight": torch.zeros(3, 3).to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    with pytest.raises(BokehError, match="float8_e4m3fn; expected weights of 16 or 32 bits"):
        checkpoint.load_transformer(tmp_path / "fp8.safetensors")


@pytest.mark.parametrize("name", ["kontext_stack", "kontext_stack_script", "kontext_stack_native"])
def test_shipped_recipes(tiny, tmp_path, name):
    text = settings.shipped()[name].read_text(encoding="utf-8")
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    (tmp_path / "FLUX.1-Kontext-dev").mkdir()
    (tmp_path / "bokeh_lora.safetensors").touch()
    (tmp_path / "photos.jsonl").touch()
    found = settings.read(tmp_path / "r.toml")
    if name == "kontext_stack":
        assert found.options == Options(total=found.train.steps)  # the dataclasses' defaults are the paper's recipe
    share = found.train.batch // found.train.accumulate
    assert found.options.total == found.train.steps and share % found.options.group == 0


def test_prodigy_a_half_precision_base_and_saved_memory(tiny, tmp_path):
    """The published optimiser on the published precision of the base. The first step of the warm-up has the rate 0."""
    run, _, _, _ = tiny
    options = replace(run.options, optimiser="prodigy", learning_rate=1.0, warmup=1, checkpointing=True)
    run = replace(run, model=replace(run.model, dtype="bfloat16"), options=options)
    run = replace(run, train=replace(run.train, steps=3, held_out=0))
    task = run.build()
    outcome = engine.fit(task, run, tmp_path / "out")
    start = kontext_stack.new_adapter(task.adapter.config, run.train.seed).state_dict()
    trained = read_adapter(outcome.checkpoint / "files" / kontext_stack.FILE, blocks=3, width=stand_in.HEAD).state_dict()
    name = "adapter_modules.0.to_q_adp.up.weight"
    assert trained[name].any() and trained[name].dtype == torch.float32 and all(tensor.isfinite().all() for tensor in trained.values())
    assert torch.equal(trained["adapter_modules.0.to_k_dof.up.weight"], start["adapter_modules.0.to_k_dof.up.weight"])


def test_training_goes_on_from_a_file(tiny, tmp_path):
    _, trained, outcome, _ = tiny
    content = tiny_recipe("kontext_stack", tmp_path)
    content["model"]["adapter"] = str(outcome.checkpoint / "files" / kontext_stack.FILE)
    task = settings.parse(content, tmp_path).build()
    assert all(torch.equal(a, b) for a, b in zip(task.adapter.state_dict().values(), trained.adapter.state_dict().values(), strict=True))
