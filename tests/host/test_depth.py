"""Depth estimation inside a real ComfyUI, with tiny checkpoints that have the names of the real ones."""

import io
import json
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image

from bokeh_core.depth.checkpoint import load_depth_model
from bokeh_core.depth.clip import estimate_clip, near_bright
from bokeh_core.optics import focus as focusing
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.render import render
from tests.stand_ins import depth as stand_ins

from .comfy import WORKFLOWS, error_of, succeeded, to_api
from .inside import inside

INPUT = WORKFLOWS / "input"
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


@pytest.fixture(scope="module")
def object_info(host, models):
    return host.get("/object_info")


def workflow(name, object_info, **widgets):
    """A shipped workflow as a prompt, widgets of Estimate Depth changed, and its nodes by type."""
    prompt = to_api(json.loads((WORKFLOWS / f"{name}.json").read_text()), object_info)
    by_type = {one["class_type"]: key for key, one in prompt.items()}
    prompt[by_type["BokehEstimateDepth"]]["inputs"].update(widgets)
    return prompt, by_type


def picture(path):
    """[1, 3, H, W] 0..1."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).movedim(-1, 0)[None] / 255


def saved(host, outputs):
    """[1, 3, H, W] of the only picture that was saved."""
    entries = [entry for output in outputs.values() for entry in output.get("images", []) if entry["type"] == "output"]
    assert len(entries) == 1
    return pictures(host, entries)


def pictures(host, entries):
    """[B, 3, H, W] of saved pictures."""
    return torch.stack([torch.from_numpy(np.asarray(host.picture(one).convert("RGB")).copy()).movedim(-1, 0) for one in entries]) / 255


def video(source):
    """[frames, 3, H, W] 0..1 of the bytes of a video file."""
    with av.open(io.BytesIO(source)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1) / 255


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
        "small": node("ImageScale", image=["load", 0], upscale_method="area", width=size[0], height=size[1], crop="disabled"),
        "many": node("RepeatImageBatch", image=["small", 0], amount=amount),
        "model": node("BokehLoadDepthModel", model=model, kind="auto"),
        "depth": node("BokehEstimateDepth", image=["many", 0], depth_model=["model", 0], **widgets),
        "save": node("SaveImage", images=["depth", 0], filename_prefix="depth"),
    }


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_files_are_listed(object_info):
    listed = object_info["BokehLoadDepthModel"]["input"]["optional"]["model"]
    names = listed[0] if isinstance(listed[0], list) else listed[1]["options"]
    assert {RELATIVE, METRIC, VIDEO, "wrong.pth"} <= {name.replace("\\", "/") for name in names}


def test_photo_workflow(host, models, object_info):
    prompt, _ = workflow("photo_depth_physical", object_info, resolution=280)
    outputs = succeeded(host.run(prompt))
    sharp = picture(INPUT / "bokeh_demo_photo.png")
    disparity = depth_of(models / RELATIVE, sharp, resolution=280)
    expected = render(sharp, make_defocus(disparity, Lens(strength=24), focusing.auto(disparity, sharp), width=sharp.shape[-1]))
    result = saved(host, outputs)
    assert result.shape == sharp.shape
    off = ((result * 255).round() - expected.clamp(0, 1) * 255).abs()
    assert off.mean() < 0.6 and off.quantile(0.999) < 2, (off.mean(), off.max())  # SaveImage cuts the fraction off
    assert len([entry for output in outputs.values() for entry in output.get("images", []) if entry["type"] == "temp"]) >= 1


def test_video_workflow(host, models, object_info):
    prompt, by_type = workflow("video_depth_physical", object_info, resolution=140)
    for name, key in (("frames", "GetVideoComponents"), ("depth", "BokehEstimateDepth")):  # decoders differ a little between machines
        prompt[name] = node("SaveImage", images=[by_type[key], 0], filename_prefix=name)
    outputs = succeeded(host.run(prompt, timeout=600))
    sharp, found = (pictures(host, outputs.pop(name)["images"]) for name in ("frames", "depth"))
    expected = depth_of(models / VIDEO, sharp, resolution=140)
    assert len(found) == len(sharp) == 25
    # SaveImage cuts fractions off, which changes the frames a little too: 1 level. Neighbouring maps differ by 10.
    assert ((found[:, 0] - expected) * 255).abs().mean() < 2 < 0.3 * (expected.diff(dim=0) * 255).abs().mean()
    (entry,) = [entry for output in outputs.values() for entry in output.get("images", []) if entry["type"] == "output"]
    assert video(host.file(entry)).shape == sharp.shape


def test_a_metric_model_serves_a_real_lens(host, object_info):
    prompt, by_type = workflow("photo_depth_physical", object_info, resolution=140)
    prompt[by_type["BokehLoadDepthModel"]]["inputs"]["model"] = METRIC
    widgets = {"f_number": 1.8, "focal_length": 50, "sensor": "full frame", "upright": False, "sensor_width": 36, "focus_distance": 0}
    prompt["lens"] = node("BokehLens", mode="real lens", strength=24, **widgets)
    prompt[by_type["BokehDefocus"]]["inputs"]["lens"] = ["lens", 0]
    succeeded(host.run(prompt))
    prompt[by_type["BokehLoadDepthModel"]]["inputs"]["model"] = RELATIVE
    assert "need depth in metres" in error_of(host.run(prompt))


def requested(host):
    return host.log().count("Requested to load")


def cached(entry):
    return next(data["nodes"] for name, data in entry["status"]["messages"] if name == "execution_cached")


def test_a_second_run_reloads_nothing(host, models):
    prompt = depth_prompt(resolution=154)
    succeeded(host.run(prompt))
    before = requested(host)
    assert before > 0, "the host no longer says when it loads a model; find another sign"
    prompt["depth"]["inputs"]["resolution"] = 168
    entry = host.run(prompt)
    succeeded(entry)
    assert "model" in cached(entry) and "depth" not in cached(entry) and requested(host) == before
    entry = host.run(prompt)
    succeeded(entry)
    assert set(cached(entry)) == set(prompt) and requested(host) == before


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
    _, answer = host.post("/prompt", {"prompt": prompt})
    while not host.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(4)  # well inside the estimate, which takes much longer
    asked = time.monotonic()
    host.post("/interrupt", {})
    while not (history := host.get(f"/history/{answer['prompt_id']}")):
        time.sleep(0.05)
    seconds = time.monotonic() - asked
    assert "execution_interrupted" in [name for name, _ in history[answer["prompt_id"]]["status"]["messages"]]
    print(f"interrupted after {seconds:.1f} s")
    assert seconds < 10  # a chunk of four frames takes well under a second on an idle machine
    succeeded(host.run(depth_prompt(model=model)))


RUN = """
from bokeh_pack.nodes.depth import BokehEstimateDepth, BokehLoadDepthModel, LoadedDepthModel
from bokeh_pack.bokeh_core.checkpoints.reading import read_checkpoint
from bokeh_pack.bokeh_core.depth.checkpoint import build, recognise
host.preview = lambda images, node: None

def load(name):
    path = {folder!r} + "/" + name
    info, tensors = recognise(read_checkpoint(path).tensors, path)
    return LoadedDepthModel(host.managed(lambda ops, some: build(info, some, ops), tensors, (torch.float16, torch.float32)), info)

def estimate(model, image, resolution=140):
    return BokehEstimateDepth.execute(image, model, "one clip", resolution, "plain").args[0]
"""


@pytest.mark.parametrize("name", [RELATIVE, METRIC, VIDEO])
def test_a_partial_load_gives_the_same_numbers(tmp_path, name, needs_host):
    code = f"""
image = torch.rand(3, 90, 120, 3, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    whole = load({name!r})
    host.load([whole.managed], 0)
    expected = estimate(whole, image)
    some = load({name!r})
    partial(some.managed)
    host.load = lambda models, activations: None  # keep what was loaded as it is
    difference = (estimate(some, image) - expected).abs().max()
    assert expected.std() > 0.05 and difference < 1e-6, difference
    nothing = load({name!r})
    on_meta(nothing.managed)
    pixels = torch.rand(2, 3, 28, 42, device="meta")
    maps = nothing.managed.network(pixels[None] if nothing.info.video else pixels)
    print("agreed", maps.device.type)
"""
    assert "agreed meta" in inside(RUN.replace("{folder!r}", repr(str(write_models(tmp_path)))) + code)


@pytest.mark.parametrize("name", [RELATIVE, VIDEO])
def test_long_clips_need_no_more_memory(tmp_path, name, needs_host):
    """Peak of the process beyond what goes in and comes out; a second short run shows how much is noise."""
    code = f"""
import resource
def peak(frames):
    image = torch.rand(1, 28, 28, 3).expand(frames, -1, -1, -1)
    estimate(model, image, 28)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.inference_mode():
    model = load({name!r})
    peak(50)
    first, last = peak(50), peak(2000)
    result = 2000 * 28 * 28 * 4 / 2**20
    print("MiB more:", last - first, "of which the result:", result)
    assert last - first < result + 6
"""
    print(inside(RUN.replace("{folder!r}", repr(str(write_models(tmp_path)))) + code))


@pytest.fixture
def needs_host():
    import os

    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("NO HOST: set COMFYUI_PATH and COMFYUI_PYTHON to test the pack inside ComfyUI")
