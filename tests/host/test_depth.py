"""Depth estimation inside a real ComfyUI, with tiny checkpoints that have the names of the real ones."""

import pytest
import torch

from bokeh_core.depth.checkpoint import load_depth_model
from bokeh_core.depth.clip import estimate_clip, near_bright
from bokeh_core.optics import focus as focusing
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.render import render
from tests.stand_ins import depth as stand_ins

from .comfy import INPUT, check_second_run, choices, error_of, lens, node, picture, saved, shipped, shrunk, succeeded, video
from .inside import inside

RELATIVE, METRIC, VIDEO = "depth_anything_v2_vits.pth", "sub/depth_anything_v2_metric_vkitti_vits.pth", "video_depth_anything_vits.pth"


def write_models(folder):
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    torch.save(stand_ins.depth_anything(), folder / RELATIVE)
    torch.save(stand_ins.depth_anything(1), folder / METRIC)
    torch.save(stand_ins.video_depth_anything(), folder / VIDEO)
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, folder / "wrong.pth")
    return folder


@pytest.fixture(scope="module")
def models(host):
    return write_models(host.base / "models" / "depthanything")


def workflow(name, object_info, **widgets):
    """A shipped workflow with changed widgets of Estimate Depth, and its nodes by type."""
    prompt, by_type = shipped(name, object_info)
    prompt[by_type["BokehEstimateDepth"]]["inputs"].update(widgets)
    return prompt, by_type


def depth_of(path, frames, **more):
    """[B, H, W] near-bright, by the library."""
    model, raw = load_depth_model(path), torch.empty(len(frames), *frames.shape[2:])
    starts = estimate_clip(model, frames, raw, **more)
    return near_bright(raw, starts, model.info.metric)


def depth_prompt(image="bokeh_demo_photo.png", model=RELATIVE, size=(192, 128), amount=1, **widgets):
    """Load, shrink, repeat, estimate, save: API format."""
    widgets = {"frames": "one clip", "resolution": 140, "edges": "follow the picture", **widgets}
    return {
        "load": node("LoadImage", image=image),
        "small": shrunk(["load", 0], *size),
        "many": node("RepeatImageBatch", image=["small", 0], amount=amount),
        "model": node("BokehLoadDepthModel", model=model, kind="auto"),
        "depth": node("BokehEstimateDepth", image=["many", 0], depth_model=["model", 0], **widgets),
        "save": node("SaveImage", images=["depth", 0], filename_prefix="depth"),
    }


def test_files_are_listed(object_info):
    assert {RELATIVE, METRIC, VIDEO, "wrong.pth"} <= set(choices(object_info, "BokehLoadDepthModel", "model"))


def test_photo_workflow(host, models, object_info):
    prompt, _ = workflow("photo_depth_physical", object_info, resolution=280)
    outputs = succeeded(host.run(prompt))
    sharp = picture(INPUT / "bokeh_demo_photo.png")
    disparity = depth_of(models / RELATIVE, sharp, resolution=280)
    expected = render(sharp, make_defocus(disparity, Lens(strength=24), focusing.auto(disparity, sharp), width=sharp.shape[-1]))
    result = host.result(outputs)
    assert result.shape == sharp.shape
    off = ((result * 255).round() - expected.clamp(0, 1) * 255).abs()
    assert off.mean() < 0.6 and off.quantile(0.999) < 2, (off.mean(), off.max())  # SaveImage cuts the fraction off
    assert len([entry for output in outputs.values() for entry in output.get("images", []) if entry["type"] == "temp"]) >= 1


def test_video_workflow(host, models, object_info):
    prompt, by_type = workflow("video_depth_physical", object_info, resolution=140)
    for name, key in (("frames", "GetVideoComponents"), ("depth", "BokehEstimateDepth")):  # decoders differ a little between machines
        prompt[name] = node("SaveImage", images=[by_type[key], 0], filename_prefix=name)
    outputs = succeeded(host.run(prompt, timeout=600))
    sharp, found = (host.pictures(outputs.pop(name)["images"]) for name in ("frames", "depth"))
    expected = depth_of(models / VIDEO, sharp, resolution=140)
    assert len(found) == len(sharp) == 25
    # SaveImage cuts fractions off, which changes the frames a little too: 1 level. Neighbouring maps differ by 10.
    assert ((found[:, 0] - expected) * 255).abs().mean() < 2 < 0.3 * (expected.diff(dim=0) * 255).abs().mean()
    (entry,) = saved(outputs)
    assert video(host.file(entry)).shape == sharp.shape


def test_a_metric_model_serves_a_real_lens(host, object_info):
    prompt, by_type = workflow("photo_depth_physical", object_info, resolution=140)
    prompt[by_type["BokehLoadDepthModel"]]["inputs"]["model"] = METRIC
    prompt["lens"] = lens("real lens")
    prompt[by_type["BokehDefocus"]]["inputs"]["lens"] = ["lens", 0]
    succeeded(host.run(prompt))
    prompt[by_type["BokehLoadDepthModel"]]["inputs"]["model"] = RELATIVE
    assert "need depth in metres" in error_of(host.run(prompt))


def test_a_second_run_reloads_nothing(host, models):
    check_second_run(host, depth_prompt(resolution=154), ("depth", "resolution", 168), "model", "depth")


def test_wrong_files_are_explained(host, models):
    assert "wrong.pth is a Stable Diffusion checkpoint" in error_of(host.run(depth_prompt(model="wrong.pth")))
    gone = error_of(host.run(depth_prompt(model="gone.pth")))
    assert "There is no depth model 'gone.pth': put depth_anything_v2_vits.pth from https" in gone


def test_an_empty_folder_is_explained(host, models):
    for file in models.rglob("*.pth"):
        file.unlink()
    try:
        assert not set(host.get("/object_info/BokehLoadDepthModel")) - {"BokehLoadDepthModel"}
        prompt = depth_prompt()
        del prompt["model"]["inputs"]["model"]  # what the front end sends of an empty list
        words = error_of(host.run(prompt))
    finally:
        write_models(models)
    assert "No depth model is installed" in words and "models/depthanything" in words and "https://huggingface.co/" in words


@pytest.mark.parametrize("model", [RELATIVE, VIDEO])
def test_interrupt_stops_within_a_chunk(host, models, model):
    prompt = depth_prompt(model=model, amount=300, resolution=280, size=(288, 192))
    assert host.interrupt(prompt, after=4) < 10  # a chunk of four frames takes well under a second on an idle machine
    succeeded(host.run(depth_prompt(model=model)))


def run_inside(folder, code):
    """folder: of the models. The code finds load(name) and estimate(model, image)."""
    start = f"""
import folder_paths
from bokeh_pack.nodes.depth import BokehEstimateDepth, BokehLoadDepthModel
folder_paths.add_model_folder_path("depthanything", {str(write_models(folder))!r})
host.preview = lambda images, node: None

def load(name):
    return BokehLoadDepthModel.execute(name).args[0]

def estimate(model, image, resolution=140):
    return BokehEstimateDepth.execute(image, model, "one clip", resolution, "plain").args[0]
"""
    return inside(start + code)


@pytest.mark.parametrize("name", [RELATIVE, METRIC, VIDEO])
def test_a_partial_load_gives_the_same_numbers(tmp_path, name):
    code = f"""
image = torch.rand(3, 90, 120, 3, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    whole = load({name!r})
    host.load([whole.managed], 0)
    expected = estimate(whole, image)
    some = load({name!r})
    partial(some.managed)
    difference = (estimate(some, image) - expected).abs().max()
    assert expected.std() > 0.05 and difference < 1e-6, difference
    nothing = load({name!r})
    on_meta(nothing.managed)
    pixels = torch.rand(2, 3, 28, 42, device="meta")
    maps = nothing.managed.network(pixels[None] if nothing.info.video else pixels)
    print("agreed", maps.device.type)
"""
    assert "agreed meta" in run_inside(tmp_path, code)


@pytest.mark.parametrize("name", [RELATIVE, VIDEO])
def test_long_clips_need_no_more_memory(tmp_path, name):
    """Ten times the frames raise the peak of the process by what comes out, and no second copy of it. The short clip holds as many
    values as are looked at for the range of a clip of any length; it runs twice, which settles the noise."""
    code = f"""
def peak_of(frames):
    image = torch.rand(1, 112, 112, 3).expand(frames, -1, -1, -1)
    estimate(model, image, 28)
    return peak() / 2**20
with torch.inference_mode():
    model = load({name!r})
    peak_of(90)
    first, last = peak_of(90), peak_of(900)
    result = (900 - 90) * 112 * 112 * 4 / 2**20
    print("MiB more:", last - first, "of which the result:", result)
    assert last - first < result + 6
"""
    print(run_inside(tmp_path, code))
