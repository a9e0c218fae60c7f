"""BokehDiff inside a real ComfyUI, with tiny files that have the names and layouts of SDXL and of the release."""

import shutil

import pytest
import torch

from bokeh_core.optics import focus as focusing
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.bokehdiff.checkpoint import LORA_FILE, VAE_FILE, load_bokehdiff
from bokeh_core.samplers.bokehdiff.sampler import render
from tests.stand_ins import bokehdiff as stand_ins

from .comfy import INPUT, check_second_run, choices, error_of, node, picture, set_focus, shipped, shrunk, succeeded
from .inside import inside

SINGLE, FOLDER = "RealVisXL_V5.0_fp16.safetensors", "tiny_sdxl"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder like ComfyUI's models."""
    root = tmp_path_factory.mktemp("models")
    stand_ins.write_all(root / "checkpoints", root / "diffusers", root / "loras", root / "vae")
    (root / "checkpoints" / f"{FOLDER}.safetensors").rename(root / "checkpoints" / SINGLE)
    return root


@pytest.fixture(scope="module")
def models(host, written):
    shutil.copytree(written, host.base / "models", dirs_exist_ok=True)
    return host.base / "models"


def prompt_of(base=SINGLE, lora=LORA_FILE, encoder=VAE_FILE, size=(160, 120), amount=1, strength=200, **widgets):
    """Load, shrink, repeat, defocus, render, save: API format."""
    return {
        "photo": node("LoadImage", image="bokeh_demo_photo.png"),
        "map": node("LoadImage", image="bokeh_demo_depth.png"),
        "small": shrunk(["photo", 0], *size),
        "low": shrunk(["map", 0], *size),
        "many": node("RepeatImageBatch", image=["small", 0], amount=amount),
        "defocus": set_focus(["small", 0], ["low", 0], strength=strength),
        "model": node("BokehLoadBokehDiff", base=base, lora=lora, encoder=encoder),
        "render": node(
            "BokehDiffRender", image=["many", 0], bokehdiff=["model", 0], defocus=["defocus", 0], **{"fidelity": "best", **widgets}
        ),
        "save": node("SaveImage", images=["render", 0], filename_prefix="bokehdiff"),
    }


def pictures(host, outputs):
    """[B, 3, H, W] 0..1 of what the node `save` saved."""
    return host.pictures(outputs["save"]["images"])


def test_files_are_listed(object_info):
    base = choices(object_info, "BokehLoadBokehDiff", "base")
    assert base[0] == SINGLE and FOLDER in base
    for field, name in (("lora", LORA_FILE), ("encoder", VAE_FILE)):
        assert choices(object_info, "BokehLoadBokehDiff", field)[0] == name


def test_photo_workflow(host, models, object_info):
    result = host.result(succeeded(host.run(shipped("photo_bokehdiff", object_info)[0], timeout=600)))
    sharp, disparity = (picture(INPUT / f"bokeh_demo_{name}.png") for name in ("photo", "depth"))
    disparity = disparity[:, 0]
    model = load_bokehdiff(models / "checkpoints" / SINGLE, models / "loras" / LORA_FILE, models / "vae" / VAE_FILE)
    expected = render(model, sharp, make_defocus(disparity, Lens(strength=24), focusing.auto(disparity, sharp), width=sharp.shape[-1]))
    assert result.shape == sharp.shape and expected.std() > 0.02
    off = ((result * 255).round() - expected * 255).abs()
    assert off.mean() < 0.6 and off.quantile(0.999) < 2, (off.mean(), off.max())  # SaveImage cuts the fraction off


def test_folder_and_single_file_and_odd_sizes(host, models):
    results = [pictures(host, succeeded(host.run(prompt_of(base=base, size=(131, 97))))) for base in (SINGLE, FOLDER)]
    assert results[0].shape[-2:] == (97, 131)
    off = ((results[0] - results[1]) * 255).abs()  # sums depend on how the files' tensors lie in memory, and SaveImage cuts
    assert off.max() < 1.01 and off.mean() < 0.02, (off.max(), off.mean())


def test_strength_zero_is_the_input(host, models):
    prompt = prompt_of(strength=0)
    prompt["plain"] = node("SaveImage", images=["small", 0], filename_prefix="plain")
    outputs = succeeded(host.run(prompt))
    assert torch.equal(pictures(host, outputs), host.pictures(outputs["plain"]["images"]))


def test_a_second_run_reloads_nothing(host, models):
    check_second_run(host, prompt_of(strength=210), ("defocus", "strength", 220), "model", "render")


def test_batches_and_seeds(host, models):
    same = pictures(host, succeeded(host.run(prompt_of(amount=3))))
    assert len(same) == 3 and torch.equal(same[0], same[2])
    noisy = [
        pictures(host, succeeded(host.run(prompt_of(fidelity="as published", random_seed=seed, size=(160, 121))))) for seed in (1, 2, 1)
    ]
    assert torch.equal(noisy[0], noisy[2]) and not torch.equal(noisy[0], noisy[1])


def test_wrong_files_are_explained(host, models):
    shutil.copy(models / "vae" / VAE_FILE, models / "loras" / "wrong.ckpt")
    shutil.copy(models / "loras" / LORA_FILE, models / "vae" / "wrong.safetensors")
    shutil.copy(models / "loras" / LORA_FILE, models / "checkpoints" / "wrong.safetensors")
    assert "wrong.ckpt is not BokehDiff's LoRA" in error_of(host.run(prompt_of(lora="wrong.ckpt")))
    assert "wrong.safetensors is not BokehDiff's vae.ckpt" in error_of(host.run(prompt_of(encoder="wrong.safetensors")))
    assert "wrong.safetensors holds no Stable Diffusion UNet" in error_of(host.run(prompt_of(base="wrong.safetensors")))
    gone = error_of(host.run(prompt_of(lora="gone.safetensors")))
    assert f"There is no BokehDiff LoRA 'gone.safetensors': put {LORA_FILE} from https" in gone


def test_missing_files_are_explained(host, models):
    prompt = prompt_of()
    prompt["model"]["inputs"] = {}  # what the front end sends of empty lists
    words = error_of(host.run(prompt))
    assert "No base model is installed" in words and "models/checkpoints" in words and "https://huggingface.co/" in words


def test_interrupt_stops_within_a_tile(host, models):
    assert host.interrupt(prompt_of(size=(1024, 768), amount=8), after=6) < 15  # a tile takes about two seconds on an idle machine
    succeeded(host.run(prompt_of()))


RUN = """
from dataclasses import replace
from bokeh_pack.nodes.bokehdiff import BokehDiffRender, BokehLoadBokehDiff
from bokeh_pack.bokeh_core.optics.defocus import make_defocus
from bokeh_pack.bokeh_core.optics.lens import Lens
from bokeh_pack.bokeh_core.samplers.bokehdiff import pisa, sampler
import folder_paths
for name in ("checkpoints", "loras", "vae", "diffusers"):
    folder_paths.add_model_folder_path(name, {root!r} + "/" + name)

def load():
    return BokehLoadBokehDiff.execute({base!r}, {lora!r}, {vae!r}).args[0]

generator = torch.Generator().manual_seed(0)
image, disparity = torch.rand(2, 100, 130, 4, generator=generator), torch.rand(2, 100, 130, generator=generator)
defocus = make_defocus(disparity, Lens(strength=300.0), 0.4, width=130)

def blur(model):
    return BokehDiffRender.execute(image, model, defocus, "best").args[0]
"""


def run_inside(written, code):
    return inside(RUN.format(root=str(written), base=SINGLE, lora=LORA_FILE, vae=VAE_FILE) + code)


def test_a_partial_load_gives_the_same_numbers(written):
    code = """
with torch.inference_mode():
    whole = load()
    assert whole.patcher is whole.networks["unet"].patcher and len(whole.get_models()) == 2
    expected = blur(whole)
    assert torch.equal(expected[..., 3], image[..., 3]) and expected[..., :3].std() > 0.02
    some = load()
    for managed in some.networks.values():
        partial(managed)
    difference = (blur(some) - expected).abs().max()
    assert difference < 1e-6, difference
    nothing = load().model
    on_meta(nothing.unet), on_meta(nothing.vae)
    scene = pisa.scene_of(torch.rand(1, 2, 128, 192), (8, 12))
    blocks = [replace(one, mask=one.mask.to("meta"), passed=one.passed.to("meta")) for one in pisa.scene_blocks(scene, pisa.Pisa())]
    text, pooled, ids = (tensor.to("meta") for tensor in (nothing.text, nothing.pooled, torch.zeros(1, 6)))
    noise = nothing.unet.network(torch.rand(1, 4, 16, 24, device="meta"), 499, text, pooled, ids, blocks, pisa.Pisa())
    latents = nothing.vae.network.encode(torch.rand(1, 3, 64, 64, device="meta")).latent_dist.mode()
    print("agreed", noise.device.type, nothing.vae.network.decode(latents).sample.device.type)
"""
    assert "agreed meta meta" in run_inside(written, code)


def test_running_out_of_memory_halves_the_tiles(written):
    code = """
from comfy import model_management
with torch.inference_mode():
    model = load()
    tall = image[:1, :, :120].repeat_interleave(4, 1).repeat_interleave(4, 2)  # one tile of the VAE at either size
    wide = make_defocus(disparity[:1, :, :120].repeat_interleave(4, 1).repeat_interleave(4, 2), Lens(strength=60.0), 0.4, width=480)
    expected = sampler.render(model.model, tall[..., :3].movedim(-1, 1), wide, tile=256)
    seen = []

    def full(module, given):
        seen.append(given[0].shape[-2] * given[0].shape[-1])
        if seen[-1] > 32 * 64:
            raise model_management.OOM_EXCEPTION("pretended")

    hook = model.model.unet.network.register_forward_pre_hook(full)
    result = BokehDiffRender.execute(tall, model, wide, "best").args[0]
    assert torch.equal(result[..., :3].movedim(-1, 1), expected)
    assert seen[0] > 2048 and max(seen[1:]) == 1024, seen
    hook.remove()
    again = model.model.unet.network.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(model_management.OOM_EXCEPTION("always")))
    try:
        BokehDiffRender.execute(tall, model, wide, "best")
    except model_management.OOM_EXCEPTION:
        print("halved")
"""
    assert "halved" in run_inside(written, code)
