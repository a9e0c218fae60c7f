"""Bokeh stacks inside a real ComfyUI: the adapter on the core's FLUX, and the stack nodes in workflows."""

import json
import re

import pytest
import torch

from bokeh_core.stack_files import load_stack
from tests.stand_ins import kontext_stack as stand_ins

from .comfy import INPUT, ROOT, WORKFLOWS, error_of, lens, node, picture, shipped, shrunk, succeeded, use_stand_in_flux
from .inside import inside

GOLDENS = ROOT.parent / "shared" / "reference" / "bokehdepth_stage1" / "goldens"

# Imported by the code that runs in the host: a tiny FLUX, its adapter, and the same network by diffusers.
PREPARE = f"""
import importlib.util, sys
def module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
stand_ins = module("stand_ins", {str(ROOT / "tests/stand_ins/kontext_stack.py")!r})
nodes = module("stand_in_nodes", {str(ROOT / "tests/host/stand_in_nodes.py")!r})
from bokeh_pack.nodes import flux
from bokeh_pack.bokeh_core.samplers.kontext_stack import recipe, sampler, transformer
from bokeh_pack.bokeh_core.samplers.kontext_stack.adapter import build_corrections, read_adapter
weights = stand_ins.flux()
adapter_file = FOLDER + "/bokeh_lora.bin"
torch.save(stand_ins.adapter(128, 3), adapter_file)
adapter = read_adapter(adapter_file, blocks=3, width=128)
generator = torch.Generator().manual_seed(0)
reference, text, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((16, 8, 12), (20, 64), (64,)))
noise, sigmas = recipe.shared_noise(42, 16, 8, 12), recipe.schedule(96, 64, 3)
condition = [[text, {{"pooled_output": pooled, "guidance": 7.0, "reference_latents": [reference]}}]]

def load(weights, name="flux", **options):
    from safetensors.torch import save_file
    path = f"{{FOLDER}}/{{name}}.safetensors"
    save_file(weights, path)
    return comfy.sd.load_diffusion_model(path, model_options=options)

def run(model, k):
    return flux.sample(model, condition, k, noise, sigmas, 0, None)

def expected(weights, k=None):
    network = stand_ins.diffusers_flux(weights)
    if k is not None:
        transformer.attach(network, adapter)
    scaled = (reference - recipe.VAE_SHIFT) * recipe.VAE_SCALE
    out = sampler.sample(network, noise, scaled, text, pooled, {{}} if k is None else adapter.vectors_of_k([k]), sigmas, 7.0)
    return out / recipe.VAE_SCALE + recipe.VAE_SHIFT

def error(a, b):
    return float((a.float() - b.float()).abs().max())

def left_hooks(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.model.diffusion_model.modules())
"""


def numbers(tmp_path, code):
    """What the code put into the dict `out`, run in the host's interpreter."""
    code = f"FOLDER = {str(tmp_path)!r}\n{PREPARE}\nout = {{}}\n{code}\nimport json\nprint('RESULT', json.dumps(out))"
    found = json.loads(inside(code, timeout=600).rpartition("RESULT")[2])
    print(found)
    return found


def test_same_as_diffusers_and_gone_without_a_trace(tmp_path):
    found = numbers(
        tmp_path,
        """
model = load(weights)
before = {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}
patched = flux.attach(model, adapter_file, [10.0])
for k in (1.0, 10.0, 30.0, 60.0):
    out[f"k{k:g}"] = error(run(patched, k), expected(weights, k))
out["effect"] = error(expected(weights, 10.0), expected(weights))
out["clamped"] = error(run(patched, 30.0), run(patched, 60.0))

# several K in one batch, conditions outermost, by the core's own forward
def forward(model, x, options):
    wanted = {"c_crossattn": text.expand(len(x), -1, -1), "y": pooled.expand(len(x), -1), "guidance": torch.full((len(x),), 7.0)}
    wanted["ref_latents"] = [reference.expand(len(x), -1, -1, -1)]
    comfy.model_management.load_models_gpu([model] + model.get_nested_additional_models())
    options = {**options, "wrappers": model.wrappers}
    with torch.inference_mode():
        return model.model.apply_model(x, torch.full((len(x),), 0.7), **wanted, transformer_options=options)

x = noise.repeat(6, 1, 1, 1)
options = {"cond_or_uncond": [0, 1]}
mixed = forward(patched, x, {**options, flux.OPTION: ([1.0, 10.0, 30.0], "float32")})
for i, k in enumerate((1.0, 10.0, 30.0)):
    alone = forward(patched, x[:1], {**options, flux.OPTION: ([k], "float32")})
    out[f"mixed{k:g}"] = max(error(mixed[i : i + 1], alone), error(mixed[i + 3 : i + 4], alone))
out["spread"] = error(mixed[0], mixed[2])
try:
    forward(patched, x[:4], {**options, flux.OPTION: ([1.0, 10.0, 30.0], "float32")})
except Exception as problem:
    out["count"] = str(problem)

out["plain"] = error(flux.sample(model, condition, 10.0, noise, sigmas, 0, None), expected(weights))
out["hooks"] = left_hooks(model)
after = model.model.diffusion_model.state_dict()
out["bits"] = list(before) == list(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())

# the bar of a stack of two frames, with the picture so far
import comfy.utils, latent_preview
told = []
comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **more: told.append((value, total, preview and preview[1].size)))
latent_preview.args.preview_method = latent_preview.LatentPreviewMethod.Latent2RGB
flux.sample(patched, condition, 10.0, noise, sigmas, 0, flux.stack_progress(patched, 2, 3)(1))
out["bar"] = [told[0], told[-1]]

clip = nodes.tiny_clip()
encoded = flux.encode_prompts(clip, [recipe.prompt_for(recipe.PROMPT, 10)], 7.0, reference)
out["tokens"] = encoded[0][0][0].shape[1]
tried = clip.tokenize("a \\\\(stronger background\\\\) b")["l"][0]
out["weights"] = sorted({weight for _, weight, *_ in tried})
out["options"] = clip.tokenizer_options
""",
    )
    for k in ("1", "10", "30", "60"):
        assert found[f"k{k}"] < 1e-4
    assert found["effect"] > 0.1 and found["clamped"] == 0
    assert max(found[f"mixed{k}"] for k in ("1", "10", "30")) < 1e-5 and found["spread"] > 0.1
    assert "3 values of K for a batch of 4" in found["count"]
    assert found["plain"] < 1e-4 and found["hooks"] == 0 and found["bits"]
    assert found["bar"][-1] == [6, 6, [12, 8]] and found["bar"][0][0] == 4
    assert found["tokens"] >= 512 and found["weights"] == [1.0] and found["options"] == {}


def test_stored_weights_stay_what_they_are(tmp_path):
    """fp8 equals its dequantised weights; a core LoRA still works; loading in part changes nothing."""
    found = numbers(
        tmp_path,
        """
eight = torch.float8_e4m3fn
rounded = {name: tensor.to(eight).float() for name, tensor in weights.items()}
small = flux.attach(load(weights, "fp8", dtype=eight), adapter_file, [10.0])
out["stored"] = str(next(small.model.diffusion_model.parameters()).dtype)
one = run(small, 10.0)
out["fp8"] = error(one, run(flux.attach(load(rounded, "rounded"), adapter_file, [10.0]), 10.0))
out["fp8 diffusers"] = error(one, expected(rounded, 10.0))
out["rounding"] = error(one, expected(weights, 10.0))

# a LoRA by the core's own loader, in the order LoRA after adapter and adapter after LoRA
target, rank = "transformer.single_transformer_blocks.0.attn.to_q", 4
down, up = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((rank, 128), (128, rank)))
lora = {f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": up}
merged = {name: tensor.clone() for name, tensor in weights.items()}
merged["single_blocks.0.linear1.weight"][:128] += up @ down
model = load(weights)
after = comfy.sd.load_lora_for_models(flux.attach(model, adapter_file, [10.0]), None, lora, 1.0, 0.0)[0]
first = flux.attach(comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0], adapter_file, [10.0])
out["lora"] = max(error(run(one, 10.0), expected(merged, 10.0)) for one in (after, first))
out["lora effect"] = error(expected(merged, 10.0), expected(weights, 10.0))
out["lora gone"] = error(run(flux.attach(model, adapter_file, [10.0]), 10.0), expected(weights, 10.0))

# partial loads: the patcher of FLUX and the one of the corrections
patched = flux.attach(load(weights), adapter_file, [10.0])
corrections = patched.get_additional_models()[0]
for one in (patched, corrections):
    one.detach()
    one.model.model_lowvram = False
    one.patch_model(one.load_device, lowvram_model_memory=int(one.model_size() * 0.5))
    assert one.model.model_lowvram
attached = patched.get_attachment(flux.KEY)
hooks = next(iter(attached._hooks.values()))
hooks.vectors = adapter.vectors_of_k([10.0])
scaled = (reference - recipe.VAE_SHIFT) * recipe.VAE_SCALE
with torch.inference_mode():
    given = {"context": text, "y": pooled, "guidance": torch.tensor([7.0]), "ref_latents": [scaled]}
    partly = patched.model.diffusion_model(noise, torch.tensor([0.7]), **given, transformer_options={})
network = stand_ins.diffusers_flux(weights)
transformer.attach(network, adapter)
ids = torch.cat([recipe.position_ids(8, 12, 0), recipe.position_ids(8, 12, 1)])
with torch.no_grad():
    want = network(
        hidden_states=torch.cat([recipe.pack(noise), recipe.pack(scaled)], 1), encoder_hidden_states=text, pooled_projections=pooled,
        timestep=torch.tensor([0.7]), guidance=torch.tensor([7.0]), img_ids=ids, txt_ids=torch.zeros(20, 3),
        joint_attention_kwargs={"bokeh_vectors": adapter.vectors_of_k([10.0])}, return_dict=False,
    )[0][:, : 24]
out["partial"] = error(recipe.pack(partly), want)

# on a device without data: what is not cast where it is used fails there
managed = host.casting(lambda ops, tensors: build_corrections(adapter, ops, tensors), adapter.correction_tensors(), torch.float16)
on_meta(managed)
x = torch.empty(1, 5, 128, device="meta", dtype=torch.bfloat16)
out["meta"] = [str(pair[name](x).dtype) for pair in managed.network.values() for name in pair]
""",
    )
    assert found["stored"] == "torch.float8_e4m3fn"
    assert found["fp8"] == 0 and found["fp8 diffusers"] < 1e-4 and found["rounding"] > 1e-3
    assert found["lora"] < 1e-4 and found["lora gone"] < 1e-4 and found["lora effect"] > 1e-2
    assert found["partial"] < 1e-4
    assert set(found["meta"]) == {"torch.bfloat16"} and len(found["meta"]) == 6


@pytest.mark.parametrize("name", ["flux_tiny_a", "flux_tiny_subset_a"])
def test_recorded_numbers_on_the_core_network(tmp_path, name):
    """The published outputs, with the weights in the core's layout, in the core's own Flux class."""
    if not (GOLDENS / f"{name}.json").exists():
        pytest.skip(f"the recorded case {name} is not beside the repository")
    found = numbers(
        tmp_path,
        f"""
import json
from safetensors.torch import load_file
from comfy.ldm.flux.model import Flux
from bokeh_pack.bokeh_core.samplers.kontext_stack.adapter import build_adapter
from bokeh_pack.bokeh_core.samplers.kontext_stack.hooks import FluxHooks
start = {str(GOLDENS / name)!r}
t, config = load_file(start + ".safetensors"), json.load(open(start + ".json"))["config"]
dim = config["heads"] * config["head_dim"]
settings = dict(
    in_channels=config["in_channels"] // 4, out_channels=config["in_channels"] // 4, vec_in_dim=config["pooled_projection_dim"],
    context_in_dim=config["joint_attention_dim"], hidden_size=dim, mlp_ratio=4.0, num_heads=config["heads"], depth=config["num_layers"],
    depth_single_blocks=config["num_single_layers"], axes_dim=config["axes_dims_rope"], theta=10000, patch_size=2, qkv_bias=True,
    guidance_embed=config["guidance_embeds"], txt_ids_dims=[],
)
fields = Flux.__init__.__globals__["FluxParams"].__dataclass_fields__
settings = {{n: v for n, v in settings.items() if n in fields}}  # older hosts know fewer
network = Flux(**settings, operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu")
base = {{n[len("w.dit_bfl."):]: v for n, v in t.items() if n.startswith("w.dit_bfl.")}}
if "double_blocks.0.img_attn.norm.query_norm.scale" not in network.state_dict():
    base = {{n.replace("_norm.scale", "_norm.weight"): v for n, v in base.items()}}
network.load_state_dict(base)
tensors = {{n[len("w.adapter."):]: v for n, v in t.items() if n.startswith("w.adapter.")}}
adapter = build_adapter(tensors, "case", config["lora_alpha"] / config["lora_rank"])
hooks = FluxHooks(network, build_corrections(adapter))
count = config["target_tokens_hw"][0] * config["target_tokens_hw"][1]

def run(vectors):
    hooks.vectors = vectors
    with torch.no_grad():
        return recipe.pack(network(
            t["in.latents_unpacked"], t["in.timestep"], t["in.encoder_hidden_states"], t["in.pooled_projections"], t.get("in.guidance"),
            ref_latents=[t["in.ref_latents_unpacked"].expand(len(t["in.timestep"]), -1, -1, -1)], transformer_options={{}},
        ))

def compare(case, vectors):
    out[case] = error(run(vectors), t["out." + case][:, :count])

compare("base_no_adapter", None)
hooks.attach()
compare("no_embed", None)
batch = len(t["in.timestep"])
for k in (10, 20, 30):
    compare(f"K{{k}}", adapter.vectors_of_k([k] * batch))
compare("K0_clamped", adapter.vectors_of_k([0] * batch))
compare("uncond_m1", adapter.vectors(torch.full((batch, 1), -1.0)))
compare("mixed_batch", adapter.vectors_of_k([0, 10, 30][:batch]))
""",
    )
    assert len(found) == 8 and max(found.values()) < 1e-4


@pytest.fixture(scope="module")
def models(host):
    """Tiny files under the names the workflow asks for, and an adapter with a block missing."""
    stand_ins.write(host.base / "models")
    torch.save(stand_ins.adapter(128, 2), host.base / "models" / "loras" / "partial.bin")


@pytest.fixture
def kontext(object_info):
    """(prompt, node by type) of the Kontext workflow on the stand-ins, small and quick."""
    prompt, by_type = shipped("bokeh_stack_kontext", object_info)
    use_stand_in_flux(prompt, by_type)
    return prompt, by_type


def frames_of(host, outputs, key):
    return [host.picture(entry).convert("RGB") for entry in outputs[key]["images"]]


def test_kontext_workflow_makes_a_stack(host, kontext):
    prompt, by_type = kontext
    outputs = succeeded(host.run(prompt, timeout=600))
    frames = frames_of(host, outputs, by_type["BokehGenerateStack"])
    assert [frame.size for frame in frames] == [(96, 64)] * 3  # 1024 x 684
    manifest = sorted(host.base.glob("output/bokeh_stack*/manifest.jsonl"))[-1]
    stack = load_stack(manifest)
    assert stack.k.tolist() == [10, 20, 30] and stack.frames.shape == (3, 3, 64, 96) and stack.reference.shape == (3, 64, 96)
    assert stack.source == "kontext" and stack.settings["num_inference_steps"] == 2
    assert (stack.frames[0] - stack.frames[2]).abs().max() > 2 / 255  # K matters

    loads = host.loads()
    prompt[by_type["BokehGenerateStack"]]["inputs"].update(seed=8)
    again = succeeded(host.run(prompt, timeout=600))
    assert frames_of(host, again, by_type["BokehGenerateStack"])[0].tobytes() != frames[0].tobytes()
    assert host.loads() == loads > 0, "the second run loaded something again"


def test_model_without_adapter_and_partial_file_are_explained(host, kontext):
    prompt, by_type = kontext
    loader, generate, adapter = (by_type[name] for name in ("UNETLoader", "BokehGenerateStack", "BokehStackAdapter"))
    prompt[generate]["inputs"]["model"] = [loader, 0]
    assert "The model has no bokeh adapter" in error_of(host.run(prompt))
    prompt[generate]["inputs"]["model"] = [adapter, 0]
    prompt[adapter]["inputs"]["adapter"] = "partial.bin"
    assert "adapts 2 of the 3 attention blocks" in error_of(host.run(prompt))
    prompt[adapter]["inputs"]["adapter"] = "nowhere.bin"
    assert "There is no adapter file 'nowhere.bin'" in error_of(host.run(prompt))


def test_interrupt_stops_a_stack(host, kontext):
    prompt, by_type = kontext
    prompt[by_type["BokehGenerateStack"]]["inputs"].update(steps=200, resolution=128, seed=9)
    assert host.interrupt(prompt, after=6) < 15


def test_physical_workflow_saves_and_loads(host, object_info):
    prompt, by_type = shipped("bokeh_stack_physical", object_info)
    for name in ("image", "depth"):
        inputs = prompt[by_type["BokehDefocus"]]["inputs"]
        prompt[name] = shrunk(inputs[name], 192, 128)
        inputs[name] = [name, 0]
    prompt[by_type["BokehStackRendered"]]["inputs"]["image"] = ["image", 0]
    known = set(host.base.glob("output/bokeh_stack*/manifest.jsonl"))
    outputs = succeeded(host.run(prompt))
    (manifest,) = set(host.base.glob("output/bokeh_stack*/manifest.jsonl")) - known
    stack = load_stack(manifest)
    assert stack.k.tolist() == [10, 20, 30] and stack.frames.shape == (3, 3, 128, 192)
    again = host.pictures(outputs[by_type["PreviewImage"]]["images"])
    assert (again - stack.frames).abs().max() * 255 < 1.1, "the workflow loads what it has saved"

    def detail(pictures):
        return float(pictures.diff(dim=-1).abs().mean())

    levels = [detail(stack.reference), *(detail(frame) for frame in stack.frames)]
    assert levels == sorted(levels, reverse=True) and levels[-1] < 0.8 * levels[0]

    folder = manifest.parent.relative_to(host.base / "output").as_posix()
    loaded = {
        "load": node("BokehLoadStack", manifest=folder, entry=0),
        "save": node("SaveImage", images=["load", 1], filename_prefix="frames"),
    }
    outputs = succeeded(host.run(loaded))
    saved = [host.picture(entry) for entry in outputs["save"]["images"]]
    assert len(saved) == 3 and saved[1].size == (192, 128)
    assert "There is no" in error_of(host.run({**loaded, "load": node("BokehLoadStack", manifest="../input", entry=0)}))


def test_stack_of_photos(host, object_info):
    photo = ["photo", 0]
    prompt = {"photo": node("LoadImage", image="bokeh_demo_photo.png"), "two": node("RepeatImageBatch", image=photo, amount=2)}
    prompt["lens"] = lens("real lens", focus_distance=2)
    stack = {"reference": photo, "frames": ["two", 0], "k_values": "5, 10", "f_numbers": "4, 2", "photos": "", "focus_distance": 2}
    prompt["stack"] = node("BokehStackFromImages", **stack, k_from="f-numbers", lens=["lens", 0])
    prompt["save"] = node("BokehSaveStack", stack=["stack", 0], folder="photos")
    succeeded(host.run(prompt))
    saved = load_stack(sorted(host.base.glob("output/photos*/manifest.jsonl"))[-1])
    # f^2 / (2 N (1 - f / s)) * 512 / sensor, in mm
    expected = [50**2 / (2 * n * (1 - 0.05 / 2)) / 1000 * 512 / 36 for n in (4, 2)]
    assert saved.k.tolist() == pytest.approx(expected, rel=1e-5) and saved.per_dioptre
    prompt["stack"]["inputs"].update(k_from="typed", k_values="5, 10, 15")
    assert "2 blurred photos and 3 values of K" in error_of(host.run(prompt))


def test_help_and_examples_are_there(host, object_info):
    assert {"bokeh_stack_kontext", "bokeh_stack_physical"} <= {path.stem for path in WORKFLOWS.glob("*.json")}
    assert picture(INPUT / "bokeh_demo_photo.png").shape[1] == 3
    for name in [name for name in object_info if re.fullmatch(r"Bokeh\w*Stack\w*", name)]:
        assert host.fetch(f"/extensions/bokeh-nodes/docs/{name}.md").startswith(b"# ")
