"""Depth from bokeh stacks inside a real ComfyUI, with tiny checkpoints that have the names of the real ones."""

import argparse
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bokeh_core.depth import refine, sweep
from bokeh_core.depth.checkpoint import load_depth_model
from bokeh_core.depth.clip import near_bright
from bokeh_core.depth.upsampling import guided_upsample
from bokeh_core.optics.stack import BokehStack
from tests.stand_ins import dsfa as stand_ins
from tests.stand_ins import kontext_stack as kontext_stand_ins

from .comfy import INPUT, cached, error_of, node, picture, set_focus, shipped, shrunk, succeeded, use_stand_in_flux
from .inside import inside

DAV2, UDV2, PLAIN = "DAV2_dsfa_release.pth", "UDv2_dsfa_release.pth", "unidepth_v2_vitl14.safetensors"
SIZE = (192, 128)
FRESH = itertools.count()


def write_models(folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": stand_ins.dav2_dsfa(), "args": argparse.Namespace(lr=1.0)}, folder / DAV2)
    torch.save(stand_ins.udv2_dsfa(), folder / UDV2)
    save_file(stand_ins.unidepth(), folder / PLAIN)
    return folder


@pytest.fixture(scope="module")
def models(host):
    return write_models(host.base / "models" / "depthanything")


def workflow(name, object_info):
    """(prompt, node by type) of a shipped workflow, made small: every picture is shrunk where it is loaded."""
    prompt, by_type = shipped(name, object_info)
    for loader in [key for key, one in prompt.items() if one["class_type"] == "LoadImage"]:
        for one in prompt.values():
            for input_name, link in one["inputs"].items():
                if link == [loader, 0]:
                    one["inputs"][input_name] = [f"small_{loader}", 0]
        prompt[f"small_{loader}"] = shrunk([loader, 0], *SIZE)
    return prompt, by_type


def shown(prompt, **outputs):
    """The prompt with nodes that save what others make: name=(node, output number). Each is new to the host, which tells no cached ones."""
    for name, (key, number) in outputs.items():
        prompt[name] = node("SaveImage", images=[key, number], filename_prefix=f"{name}{next(FRESH)}")
    return prompt


def grey(host, outputs, name):
    """[H, W] of a saved depth picture."""
    return host.pictures(outputs[name]["images"])[0, 0]


def test_workflow_from_a_physical_stack(host, object_info):
    prompt, by_type = workflow("depth_from_physical_stack", object_info)
    stacked, measured = by_type["BokehStackRendered"], by_type["BokehDepthFromSweep"]
    shown(prompt, frames=(stacked, 1), reference=(stacked, 2), depth=(measured, 0))
    outputs = succeeded(host.run(prompt, timeout=600))
    frames, reference = (host.pictures(outputs[name]["images"]) for name in ("frames", "reference"))
    found = grey(host, outputs, "depth")
    stack = BokehStack(reference[0], frames, [10.0, 20.0, 30.0])
    upsample = lambda low, image: guided_upsample(low, image, align_corners=False)  # noqa: E731
    expected = near_bright(sweep.depth_from_sweep(stack, upsample=upsample).disparity[None], [0], False)[0]
    assert found.shape == (SIZE[1], SIZE[0]) and float((found - expected).abs().median()) < 0.02  # the pictures went through 8 bit
    truth = F.interpolate(picture(INPUT / "bokeh_demo_depth.png")[:, :1], found.shape, mode="area")[0, 0]
    assert float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1]) > 0.6


def loop(prompt, by_type, **widgets):
    """Render a stack from the demo scene's depth and refine depth by it, in place of the sweep."""
    sharp = prompt[by_type["BokehStackRendered"]]["inputs"]["image"]
    prompt["model"] = node("BokehLoadDepthModel", model=UDV2, kind="auto", attention="single")
    widgets = {"k": "as given", "resolution": 140, "edges": "follow the picture", "fidelity": "best", **widgets}
    prompt["refine"] = node("BokehRefineDepth", image=sharp, stack=[by_type["BokehStackRendered"], 0], depth_model=["model", 0], **widgets)
    for one in prompt.values():
        for name, link in one["inputs"].items():
            if link == [by_type["BokehDepthFromSweep"], 1]:
                one["inputs"][name] = ["refine", 1]
    del prompt[by_type["BokehDepthFromSweep"]]
    return shown(prompt, frames=(by_type["BokehStackRendered"], 1), sharp=sharp, depth=("refine", 0))


def test_workflow_from_photos(host, object_info):
    """Four photos and their EXIF: metres, and a new photo by a real lens."""
    prompt, by_type = shipped("depth_from_photo_stack", object_info)
    shown(prompt, depth=(by_type["BokehDepthFromSweep"], 0))
    outputs = succeeded(host.run(prompt, timeout=600))
    found, result = grey(host, outputs, "depth"), host.pictures(outputs[by_type["SaveImage"]]["images"])
    truth = F.interpolate(picture(INPUT / "bokeh_demo_depth.png")[:, :1], found.shape, mode="area")[0, 0]
    assert float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1]) > 0.6
    assert float((found - truth).abs().median()) < 0.05

    def detail(picture, left, top, right, bottom):
        height, width = picture.shape[-2:]
        part = picture[..., int(top * height) : int(bottom * height), int(left * width) : int(right * width)]
        return float(part.diff(dim=-1).abs().mean())

    queen, branch = (0.44, 0.27, 0.54, 0.7), (0.0, 0.0, 0.3, 0.4)
    narrow, wide = (picture(INPUT / f"bokeh_demo_f{n}.jpg") for n in ("22", "1.4"))
    assert result.shape == narrow.shape
    assert detail(result, *queen) > 2 * detail(wide, *queen), "the photo at f/1.4 has the queen out of focus"
    assert detail(result, *branch) < 0.5 * detail(narrow, *branch), "the focus has left the branch"


@pytest.mark.parametrize("name", [UDV2, DAV2])
def test_the_loop_with_a_physical_stack(host, object_info, models, name):
    prompt = loop(*workflow("depth_from_physical_stack", object_info))
    prompt["model"]["inputs"]["model"] = name
    outputs = succeeded(host.run(prompt, timeout=600))
    model = load_depth_model(models / name)
    stack = BokehStack(host.pictures(outputs["sharp"]["images"])[0], host.pictures(outputs["frames"]["images"]), [10.0, 20.0, 30.0])

    def expected(k):
        upsample = lambda low, image: guided_upsample(low, image, align_corners=model.info.align_corners, metric=True)  # noqa: E731
        metres = refine.refine(model, stack, k=k, resolution=140, upsample=upsample).depth.clamp(min=0.01)
        return near_bright(metres[None], [0], True)[0]

    given = grey(host, outputs, "depth")
    assert float((given - expected("as given")).abs().mean()) < 0.02 < float(given.std())

    before = host.loads()
    prompt["refine"]["inputs"]["k"] = "none"
    entry = host.run(prompt, timeout=600)
    none = grey(host, succeeded(entry), "depth")
    assert {"model", "refine"} & set(cached(entry)) == {"model"} and host.loads() == before > 0, "a second run reloads nothing"
    assert float((none - expected("none")).abs().mean()) < 0.02 and not torch.allclose(none, given, atol=0.01)


def test_the_whole_loop_as_shipped(host, object_info, models):
    """The Kontext workflow on stand-ins for FLUX, its text encoders and its VAE; only those loaders are replaced."""
    kontext_stand_ins.write(host.base / "models")
    prompt, by_type = workflow("depth_from_bokeh_stack", host.get("/object_info"))
    use_stand_in_flux(prompt, by_type)
    prompt[by_type["BokehRefineDepth"]]["inputs"].update(resolution=140)
    shown(prompt, depth=(by_type["BokehRefineDepth"], 0))
    outputs = succeeded(host.run(prompt, timeout=600))
    depth = grey(host, outputs, "depth")
    assert depth.shape == (SIZE[1], SIZE[0]) and float(depth.std()) > 0.02, "the depth has the photo's size, not the stack's"
    final = host.pictures(outputs[by_type["SaveImage"]]["images"])
    assert final.shape[-2:] == depth.shape


def test_plain_unidepth_estimates(host, models, object_info):
    prompt = {
        "load": node("LoadImage", image="bokeh_demo_photo.png"),
        "small": shrunk(["load", 0], *SIZE),
        "model": node("BokehLoadDepthModel", model=PLAIN, kind="auto"),
        "depth": node(
            "BokehEstimateDepth",
            image=["small", 0],
            depth_model=["model", 0],
            frames="one clip",
            resolution=140,
            edges="plain",
            steadiness=0.0,
        ),
    }
    shown(prompt, map=("depth", 0))
    assert float(grey(host, succeeded(host.run(prompt)), "map").std()) > 0.02
    prompt["defocus"] = set_focus(["small", 0], ["depth", 1])
    prompt["stack"] = node("BokehStackRendered", image=["small", 0], defocus=["defocus", 0], k_values="10", k_per="whole depth range")
    prompt["refine"] = node(
        "BokehRefineDepth",
        image=["small", 0],
        stack=["stack", 0],
        depth_model=["model", 0],
        k="as given",
        resolution=140,
        edges="plain",
        fidelity="best",
    )
    shown(prompt, refined=("refine", 0))
    assert "UniDepth V2 custom, metric cannot use a bokeh stack" in error_of(host.run(prompt))


def test_a_wrong_attention_choice_is_explained(host, models, object_info):
    prompt = loop(*workflow("depth_from_physical_stack", object_info))
    prompt["model"]["inputs"]["attention"] = "double"
    assert "double is for Depth Anything V2 with DSFA only" in error_of(host.run(prompt))


def test_help_is_there(host):
    for name in ("BokehRefineDepth", "BokehDepthFromSweep"):
        assert host.fetch(f"/extensions/bokeh-nodes/docs/{name}.md").startswith(b"# ")


@pytest.mark.parametrize("name", [DAV2, UDV2, PLAIN])
def test_a_partial_load_gives_the_same_numbers(tmp_path, name):
    code = f"""
import folder_paths
from bokeh_pack.nodes.depth import BokehLoadDepthModel
from bokeh_pack.nodes.refine import BokehRefineDepth
from bokeh_pack.bokeh_core.depth.dsfa import fuse
from bokeh_pack.bokeh_core.optics.stack import BokehStack
folder_paths.add_model_folder_path("depthanything", {str(write_models(tmp_path))!r})
host.preview = lambda images, node: None

def load(name):
    return BokehLoadDepthModel.execute(name).args[0]

image = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(0)), (90, 120), mode="bilinear")
frames = torch.cat([torch.nn.functional.avg_pool2d(image, n, 1, n // 2)[..., :90, :120] for n in (3, 5)])
stack = BokehStack(image[0], frames, [10.0, 20.0])
picture = image.movedim(1, -1)
with torch.inference_mode():
    def run(model):
        return BokehRefineDepth.execute(picture, stack, model, "as given", 140, "plain", "best").args[1]["depth"]
    if {name!r} != {PLAIN!r}:
        whole = load({name!r})
        expected = run(whole)
        some = load({name!r})
        partial(some.managed)
        difference = ((run(some) - expected).abs() / expected).max()
        assert expected.std() > 0.05 and difference < 1e-5, difference
    nothing = load({name!r})
    on_meta(nothing.managed)
    network = nothing.managed.network
    pixels = torch.rand(3, 3, 28, 42, device="meta")
    taps = network.encode(pixels)
    reference, stack = [tap[:1] for tap in taps], {{tap: taps[tap][None, 1:, 1:] for tap in network.blocks}}
    taps = fuse(network.blocks, reference, stack, torch.ones(1, 2, device="meta"))
    depth = network.depth(taps, (28, 42)) if hasattr(network, "depth") else network.decode(taps, (28, 42)).depth
    print("agreed", depth.device.type)
"""
    assert "agreed meta" in inside(code)
