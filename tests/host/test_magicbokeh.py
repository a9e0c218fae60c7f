"""MagicBokeh inside a real ComfyUI, with a tiny base model and a tiny MagicBokeh file that have the names of the real ones."""

import shutil

import numpy as np
import pytest
import torch

from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.magicbokeh.checkpoint import load_magicbokeh
from bokeh_core.samplers.magicbokeh.sampler import AS_PUBLISHED, render
from tests.stand_ins import magicbokeh as stand_ins

from .comfy import INPUT, check_second_run, choices, error_of, node, picture, saved, shipped, shrunk, succeeded
from .inside import inside

BASE, RELEASED, CONVERTED = "stable-diffusion-2-1-base", "lora.pkl", "converted/magicbokeh.safetensors"


@pytest.fixture(scope="module")
def stand_in_files(tmp_path_factory):
    """A folder with the tiny base, lora.pkl and its converted twin."""
    folder = tmp_path_factory.mktemp("magicbokeh")
    content = stand_ins.own()
    stand_ins.write_base(folder / BASE)
    stand_ins.write_pickle(folder / RELEASED, content)
    stand_ins.write_converted(folder / CONVERTED, content)
    return folder


@pytest.fixture(scope="module")
def models(host, stand_in_files):
    """The same where the host looks for them."""
    folder = host.base / "models"
    shutil.copytree(stand_in_files / BASE, folder / "diffusers" / "some" / BASE)
    (folder / "loras" / "converted").mkdir(parents=True, exist_ok=True)
    for name in (RELEASED, CONVERTED):
        shutil.copy(stand_in_files / name, folder / "loras" / name)
    shutil.copy(stand_in_files / BASE / "vae" / "diffusion_pytorch_model.safetensors", folder / "loras" / "wrong.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(stand_in_files):
    """The same model in the library."""
    return load_magicbokeh(stand_in_files / BASE, stand_in_files / RELEASED)


def prompt_of(object_info, size=(321, 203), amount=1, file=RELEASED, strength=60, **widgets):
    """The shipped workflow on scaled pictures, as a prompt, and its nodes by type."""
    prompt, by_type = shipped("photo_magicbokeh_zoom", object_info)
    prompt[by_type["BokehLoadMagicBokeh"]]["inputs"].update(base=f"some/{BASE}", magicbokeh=file)
    defocus = prompt[by_type["BokehDefocus"]]["inputs"]
    defocus.update(strength=strength, focus="value", focus_value=0.3)
    for name in ("image", "depth"):
        prompt[name] = shrunk(defocus[name], *size)
        prompt["many " + name] = node("RepeatImageBatch", image=[name, 0], amount=amount)
        defocus[name] = ["many " + name, 0]
    prompt[by_type["MagicBokehRender"]]["inputs"].update(image=["many image", 0], **widgets)
    return prompt, by_type


def scaled(host, prompt, names):
    """The pictures the host's scaling made, [1, 3, H, W] each, at 8 bits."""
    found = []
    for name in names:
        wanted = {key: one for key, one in prompt.items() if one["class_type"] == "LoadImage"} | {name: prompt[name]}
        found.append(host.result(succeeded(host.run(wanted | {"file": node("SaveImage", images=[name, 0], filename_prefix=name)}))))
    return found


def test_files_are_listed(object_info):
    for name, some in (("base", [f"some/{BASE}"]), ("magicbokeh", [CONVERTED, RELEASED])):
        names = choices(object_info, "BokehLoadMagicBokeh", name)
        assert names[: len(some)] == some, names  # the most likely first


@pytest.mark.parametrize(("file", "fidelity"), [(RELEASED, "best"), (CONVERTED, "as published")])
def test_workflow_gives_what_the_library_gives(host, object_info, model, file, fidelity):
    prompt, _ = prompt_of(object_info, file=file, fidelity=fidelity)
    result = host.result(succeeded(host.run(prompt)))
    sharp, depth = scaled(host, prompt, ["image", "depth"])
    assert result.shape == sharp.shape == (1, 3, 203, 321)
    more = {"fidelity": AS_PUBLISHED} if fidelity != "best" else {}
    with torch.inference_mode():
        expected = render(model, sharp, make_defocus(depth[:, 0], Lens(strength=60), 0.3, width=321), **more)
    off = (result - expected).abs() * 255
    assert off.median() < 1.5 and off.mean() < 4, (off.median(), off.mean())  # the host's scaled picture has finer steps than ours
    assert ((result - sharp).abs() * 255).mean() > 20


def test_whole_workflow_as_shipped(host, object_info, models):
    """Nothing changed but the file names: several patches, the photo's own size."""
    prompt, by_type = shipped("photo_magicbokeh_zoom", object_info)
    loader = prompt[by_type["BokehLoadMagicBokeh"]]
    loader["inputs"]["base"] = f"some/{BASE}"
    assert loader["inputs"]["magicbokeh"] == RELEASED
    result = host.result(succeeded(host.run(prompt, timeout=600)))
    assert result.shape == picture(INPUT / "bokeh_demo_photo.png").shape and result.std() > 0.05


def test_alpha_upscale_subject_and_fast(host, object_info):
    prompt, by_type = prompt_of(object_info, mode="fast", upscale=1.5)
    prompt["grey"] = node("ImageToMask", image=["depth", 0], channel="red")
    prompt["alpha"] = node("JoinImageWithAlpha", image=["image", 0], alpha=["grey", 0])
    inputs = prompt[by_type["MagicBokehRender"]]["inputs"]
    inputs.update(image=["alpha", 0], subject=["grey", 0])
    outputs = succeeded(host.run(prompt))
    (entry,) = saved(outputs)
    result = host.picture(entry)
    assert result.mode == "RGBA" and result.size == (round(321 * 1.5), round(203 * 1.5))
    assert np.asarray(result)[..., 3].std() > 10
    del inputs["defocus"]
    assert "A subject is connected but no defocus" in error_of(host.run(prompt))


def test_no_defocus_and_strength_0_restore_alike(host, object_info):
    results = []
    for strength in (60, 0, None):
        prompt, by_type = prompt_of(object_info, strength=strength or 0)
        if strength is None:
            del prompt[by_type["MagicBokehRender"]]["inputs"]["defocus"]
        results.append(host.result(succeeded(host.run(prompt))))
    assert torch.equal(results[1], results[2]) and not torch.equal(results[0], results[1])


def test_a_second_run_reloads_nothing(host, object_info):
    prompt, by_type = prompt_of(object_info, size=(131, 97))
    change = (by_type["BokehDefocus"], "focus_value", 0.8)
    check_second_run(host, prompt, change, by_type["BokehLoadMagicBokeh"], by_type["MagicBokehRender"])


def test_wrong_and_missing_files_are_explained(host, object_info):
    prompt, by_type = prompt_of(object_info, file="wrong.safetensors")
    assert "wrong.safetensors is not MagicBokeh's file" in error_of(host.run(prompt))
    inputs = prompt[by_type["BokehLoadMagicBokeh"]]["inputs"]
    inputs["magicbokeh"] = "gone.pkl"
    assert "There is no MagicBokeh file 'gone.pkl': put lora.pkl from https://huggingface.co" in error_of(host.run(prompt))
    inputs.update(magicbokeh=RELEASED, base="gone")
    assert "There is no base model 'gone': put the folder stable-diffusion-2-1-base" in error_of(host.run(prompt))
    inputs.pop("base")  # what the front end sends of an empty list
    assert "No base model is installed" in error_of(host.run(prompt))


def test_interrupt_stops_within_a_patch_and_the_next_run_works(host, object_info):
    prompt, _ = prompt_of(object_info, amount=100)
    assert host.interrupt(prompt, after=8) < 15  # a patch takes a second on an idle machine
    succeeded(host.run(prompt_of(object_info, size=(99, 77))[0]))


RUN = """
from bokeh_pack.nodes.magicbokeh import MagicBokehRender
from bokeh_pack.bokeh_core.optics.defocus import make_defocus
from bokeh_pack.bokeh_core.optics.lens import Lens
from bokeh_pack.bokeh_core.samplers.magicbokeh import sampler
from bokeh_pack.bokeh_core.samplers.magicbokeh.checkpoint import MagicBokeh, read_blueprints
from bokeh_pack.bokeh_core.samplers.magicbokeh.network import focus_regions

def load():
    parts, scale = read_blueprints({base!r}, {file!r})
    networks = {name: host.managed(p.build, p.tensors, p.compute_in) for name, p in parts.items()}
    return host.Loaded(MagicBokeh(**networks, scaling_factor=scale), networks)

def run(model, image, mode="exact"):
    disparity = torch.linspace(0, 1, image.shape[2]).expand(1, *image.shape[1:3])
    defocus = make_defocus(disparity, Lens(strength=60), 0.3, width=image.shape[2])
    return MagicBokehRender.execute(image, model, "best", mode, "none", defocus=defocus).args[0]
"""


def script(files):
    return RUN.replace("{base!r}", repr(str(files / BASE))).replace("{file!r}", repr(str(files / CONVERTED)))


def test_a_partial_load_gives_the_same_numbers(stand_in_files):
    code = """
image = torch.rand(1, 60, 90, 3, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    whole = load()
    assert whole.patcher in whole.get_models() and len(whole.get_models()) == 4
    expected = run(whole, image)
    some = load()
    for managed in some.networks.values():
        partial(managed)
    difference = (run(some, image) - expected).abs().max()
    assert expected.std() > 0.05 and difference < 1e-5, difference
    nothing = load().model
    for name in ("encoder", "controlnet", "unet", "decoder"):
        on_meta(getattr(nothing, name))
    mask = (torch.arange(128) > 40).float().expand(2, 128, 128)
    mean, _ = nothing.encoder.network(torch.rand(2, 3, 128, 128, device="meta"))
    corrections = nothing.controlnet.network(mean, torch.rand(2, 3, 128, 128, device="meta"))
    eps = nothing.unet.network(mean, corrections, focus_regions(mask, "meta"))
    print("agreed", nothing.decoder.network(eps).device.type)
"""
    assert "agreed meta" in inside(script(stand_in_files) + code, timeout=600)


def test_out_of_memory_halves_the_work_and_finishes(stand_in_files):
    code = """
import comfy.model_management
image = torch.rand(1, 512, 800, 3, generator=torch.Generator().manual_seed(0))
plain_predict, plain_decode, sizes, tiles = sampler.predict, sampler.decoded, [], []

def predict(model, latents, maps):
    sizes.append(len(latents))
    if len(latents) > 1:
        raise comfy.model_management.OOM_EXCEPTION("no room")
    return plain_predict(model, latents, maps)

def decoded(model, x0):
    tiles.append(tuple(x0.shape[-2:]))
    if max(x0.shape[-2:]) > 64:
        raise comfy.model_management.OOM_EXCEPTION("no room")
    return plain_decode(model, x0)

with torch.inference_mode():
    model = load()
    roomy = run(model, image)
    sampler.predict, sampler.decoded = predict, decoded
    tight = run(model, image)
    assert sizes[0] > 1 and sizes[1:] == [1] * (len(sizes) - 1), sizes
    assert (tight - roomy).abs().max() < 1e-4
    sizes.clear(), tiles.clear()
    fast = run(model, image, "fast")
    assert tiles[0] == (64, 100) and set(tiles[1:]) == {(64, 58)}, tiles
    print("finished", tuple(fast.shape), bool(fast.isfinite().all()))
"""
    assert "finished (1, 512, 800, 3) True" in inside(script(stand_in_files) + code, timeout=600)
