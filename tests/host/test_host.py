"""The pack inside a real ComfyUI: it loads clean, the shipped workflows run, and the pictures are right."""

import re

import numpy as np
import pytest
import torch

from bokeh_core.metrics.image import psnr
from bokeh_core.optics import defocus as optics
from bokeh_core.optics import focus as focusing
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import render

from .comfy import INPUT, WORKFLOWS, error_of, lens, node, picture, saved, shipped, shrunk, succeeded, video

NODES = [
    "BokehLoadDepthModel",
    "BokehEstimateDepth",
    "BokehRefineDepth",
    "BokehDepthFromSweep",
    "BokehLens",
    "BokehFocusTrack",
    "BokehDefocus",
    "BokehRender",
    "BokehMeasure",
    "BokehLoadSalientModel",
    "BokehSalientMask",
    "BokehStackAdapter",
    "BokehGenerateStack",
    "BokehStackRendered",
    "BokehStackFromImages",
    "BokehSaveStack",
    "BokehLoadStack",
    "BokehLoadMagicBokeh",
    "MagicBokehRender",
    "BokehLoadBokehDiff",
    "BokehDiffRender",
    "BokehLoadAnyToBokeh",
    "AnyToBokehRender",
    "BokehMPIMasks",
]


def read_depth(frames):
    """[frames, H, W] disparity of depth pictures [frames, 3, H, W] as the node reads them."""
    return optics.disparity_from_image(frames.movedim(1, -1))


def sharpness(image):
    """Mean absolute Laplacian, a number that falls with blur."""
    middle = image[..., 1:-1, 1:-1]
    around = image[..., :-2, 1:-1] + image[..., 2:, 1:-1] + image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    return (4 * middle - around).abs().mean(-3)


def test_pack_loads_clean_and_quickly(host):
    log = host.log().partition("To see the GUI")[0]  # what other tests provoked comes later
    assert "IMPORT FAILED" not in log and "Traceback" not in log, log
    lines = [line for line in log.splitlines() if "bokeh" in line.lower()]
    times = [re.search(r"([\d.]+) seconds: .*bokeh-nodes$", line) for line in lines]
    assert len(lines) == 1 and times[0], f"the pack must show up in the log once, with its import time: {lines}"
    assert float(times[0][1]) < 0.5


@pytest.mark.parametrize("name", NODES)
def test_node_is_described(host, object_info, name):
    info = object_info[name]
    assert info["category"].startswith("bokeh/")
    assert info["display_name"] and info["description"]
    assert all(info["output_tooltips"]) and len(info["output_tooltips"]) == len(info["output"])
    for group in ("required", "optional"):
        for field, spec in info["input"].get(group, {}).items():
            assert spec[1].get("tooltip"), f"{name}.{field} has no tooltip"
    assert host.fetch(f"/extensions/bokeh-nodes/docs/{name}.md").startswith(b"# ")


def test_no_other_nodes_are_added(object_info):
    ours = [name for name, info in object_info.items() if info["category"].startswith("bokeh/")]
    assert sorted(ours) == sorted(NODES)


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_translations_are_served(host, language):
    words = host.get("/i18n")[language]
    assert set(NODES) <= set(words["nodeDefs"]) and "bokeh" in words["nodeCategories"]


def test_rare_widgets_are_folded_away_where_the_host_can(object_info):
    """All or none: ComfyUI older than 0.10 does not know the word."""
    known = [spec[1].get("advanced") for spec in object_info["BokehLens"]["input"]["optional"].values()]
    assert sum(map(bool, known)) in (0, 8), known


def test_workflows_are_offered_as_templates(host):
    assert sorted(host.get("/workflow_templates")["bokeh-nodes"]) == sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def test_photo_workflow(host, object_info):
    outputs = succeeded(host.run(shipped("photo_physical", object_info)[0]))
    result = host.result(outputs)

    sharp = picture(INPUT / "bokeh_demo_photo.png")
    disparity = read_depth(picture(INPUT / "bokeh_demo_depth.png"))
    focus = focusing.auto(disparity, sharp)
    defocus = optics.make_defocus(disparity, Lens(strength=24), focus, width=sharp.shape[-1])
    expected = render(sharp, defocus).clamp(0, 1) * 255
    levels = (result * 255).round()  # SaveImage cuts the fraction off; the band is for float rounding in another torch
    assert (levels <= expected + 0.02).all() and (levels >= expected - 1.02).all()

    # Truth that does not lean on our own renderer: the focus zone is the photo, the rest has lost its detail.
    radius = defocus.signed_radius()[0].abs()
    # Far from every edge of depth nothing else can spill onto the focus plane.
    calm = -torch.nn.functional.max_pool2d(-(radius < 0.5).float()[None], 61, 1, 30)[0] > 0
    detail = sharpness(sharp)[0], sharpness(result)[0]
    far = (radius > 6)[1:-1, 1:-1]
    assert detail[1][far].mean() < 0.35 * detail[0][far].mean()
    assert calm.any() and ((result - sharp)[0][:, calm].abs() * 255).max() < 3

    # The node hands out what its picture needs (web/focus_picker.js): a small photo, and the depth in 16 bit.
    (view,) = [view for output in outputs.values() for view in output.get("bokeh_focus", [])]
    photo, depth = host.picture(view["photo"]), np.asarray(host.picture(view["depth"])).astype(float)
    assert max(photo.size) == 512 and photo.size == depth.shape[1::-1]
    shown = view["low"] + (view["high"] - view["low"]) * (256 * depth[..., 0] + depth[..., 1]) / 65535
    small = torch.nn.functional.interpolate(disparity[None], size=depth.shape[:2], mode="nearest-exact")[0, 0].numpy()
    assert np.abs(shown - small).max() < 2e-5 * (view["high"] - view["low"]) + 1e-6


def test_matte_and_lens_workflow(host, object_info):
    outputs = succeeded(host.run(shipped("photo_matte_and_lens", object_info)[0]))
    result = host.result(outputs)
    sharp, plate = picture(INPUT / "bokeh_demo_photo.png"), picture(INPUT / "bokeh_demo_clean_plate.jpg")
    disparity, matte = read_depth(picture(INPUT / "bokeh_demo_depth.png")), picture(INPUT / "bokeh_demo_branch_matte.png")[:, 0]
    same = Lens(strength=40, aperture=Aperture(blades=7, roundness=0.4, cats_eye=0.5))
    defocus = optics.make_defocus(disparity, same, focusing.auto(disparity, sharp), width=sharp.shape[-1])
    expected = render(sharp, defocus, matte=matte, clean_plate=plate).clamp(0, 1)
    assert psnr(result, expected) > 51  # hosts differ in how they decode the JPEG plate
    assert psnr(render(sharp, defocus).clamp(0, 1), expected) < 50
    (scores,) = [output["text"][0] for output in outputs.values() if "text" in output]
    in_focus = float(re.search(r"PSNR in focus +\| ([\d.]+)", scores)[1])
    calm = (defocus.signed_radius().abs() <= 0.5)[:, None]
    assert in_focus == pytest.approx(psnr(expected, sharp, calm), abs=0.05)


def test_video_workflow(host, object_info):
    outputs = succeeded(host.run(shipped("video_focus_pull", object_info)[0], timeout=600))
    (entry,) = saved(outputs)
    result = video(host.file(entry))
    sharp = video(INPUT / "bokeh_demo_clip.mp4")
    disparity = read_depth(video(INPUT / "bokeh_demo_clip_depth.mp4"))
    assert result.shape == sharp.shape

    keys = "0: (0.27, 0.72), 4: (0.25, 0.72), 20: (0.62, 0.45) ease"
    focus = focusing.FocusTrack.parse(keys).values(len(sharp), disparity)
    expected = render(sharp, optics.make_defocus(disparity, Lens(strength=24), focus, width=sharp.shape[-1])).clamp(0, 1)
    psnr = -10 * torch.log10(((result - expected) ** 2).mean(dim=(1, 2, 3)))
    assert psnr.min() > 33, psnr  # what h264 costs

    # The pull itself: the near pawn loses its detail while the far king gains it.
    def detail(frame, point):
        height, width = sharp.shape[-2:]
        x, y = int(point[0] * width), int(point[1] * height)
        window = (..., slice(y - 12, y + 13), slice(x - 12, x + 13))
        return float(sharpness(result[frame])[window].mean() / sharpness(sharp[frame])[window].mean())

    pawn = detail(0, (0.27, 0.72)), detail(24, (0.11, 0.72))
    king = detail(0, (0.70, 0.47)), detail(24, (0.62, 0.45))
    assert pawn[0] > 1.5 * pawn[1] and king[1] > 1.5 * king[0], (pawn, king)


def photo_prompt(object_info, **defocus):
    """The photo workflow as a prompt, with changed widgets of Set Focus and Blur, and its nodes by type."""
    prompt, by_type = shipped("photo_physical", object_info)
    prompt[by_type["BokehDefocus"]]["inputs"].update(defocus)
    return prompt, by_type


@pytest.fixture
def small(host, object_info):
    """(prompt, nodes by type, sharp [1,3,H,W], depth [1,3,H,W]): the photo workflow on 192 px wide pictures, read back as saved."""
    prompt, by_type = photo_prompt(object_info, focus="value", focus_value=0.2, strength=80)
    inputs = prompt[by_type["BokehDefocus"]]["inputs"]
    for name in ("image", "depth"):
        prompt[name] = shrunk(inputs[name], 192, 128)
        prompt[name + " file"] = node("SaveImage", images=[name, 0], filename_prefix=name)
        inputs[name] = [name, 0]
    prompt[by_type["BokehRender"]]["inputs"]["image"] = ["image", 0]
    for name in ("image", "depth"):  # so that both sides work on the same 8 bits
        wanted = {key: one for key, one in prompt.items() if one["class_type"] == "LoadImage" or key in (name, name + " file")}
        (entry,) = saved(succeeded(host.run(wanted)))
        del prompt[name + " file"]
        (host.base / "input" / f"small_{name}.png").write_bytes(host.file(entry))
        prompt[name] = node("LoadImage", image=f"small_{name}.png")
    sharp, depth = (picture(host.base / "input" / f"small_{name}.png") for name in ("image", "depth"))
    return prompt, by_type, sharp, depth


def test_matte_plate_and_looks_reach_the_picture(host, small):
    prompt, by_type, sharp, depth = small
    disparity = read_depth(depth)
    looks = {"blades": 6, "cats_eye": 0.5, "roundness": 0.2, "spherical": 0.5}
    prompt["lens"] = lens("strength", strength=80, **looks, blade_rotation=20, highlights=3)
    prompt[by_type["BokehDefocus"]]["inputs"]["lens"] = ["lens", 0]
    prompt["grey"] = node("ImageToMask", image=["depth", 0], channel="red")
    prompt["matte"] = node("ThresholdMask", mask=["grey", 0], value=0.5)
    prompt["plate"] = node("EmptyImage", width=192, height=128, batch_size=1, color=0x408020)
    prompt[by_type["BokehRender"]]["inputs"].update(matte=["matte", 0], clean_plate=["plate", 0])
    result = host.result(succeeded(host.run(prompt)))

    same = Lens(strength=80, aperture=Aperture(**looks, rotation=20), highlights=3)
    defocus = optics.make_defocus(disparity, same, 0.2, width=192)
    plate = torch.tensor([0x40, 0x80, 0x20])[None, :, None, None].expand_as(sharp) / 255
    expected = render(sharp, defocus, matte=(depth[:, 0] > 0.5).float(), clean_plate=plate).clamp(0, 1)
    assert (result - expected).abs().max() * 255 < 1.1  # SaveImage cuts the fraction off
    plain = render(sharp, optics.make_defocus(disparity, Lens(strength=80), 0.2, width=192)).clamp(0, 1)
    assert (plain - expected).abs().mean() * 255 > 2


def test_reference_agrees_with_fast(host, small):
    prompt, by_type, sharp, _ = small
    fast = host.result(succeeded(host.run(prompt)))
    prompt[by_type["BokehRender"]]["inputs"].update(quality="reference", rays=128)
    slow = host.result(succeeded(host.run(prompt)))
    assert not torch.equal(slow, fast)
    assert psnr(slow, fast) > psnr(sharp, fast) + 6


def test_measure(host, small):
    prompt, by_type, sharp, depth = small
    disparity = read_depth(depth)
    prompt["measure"] = node("BokehMeasure", result=[by_type["BokehRender"], 0], truth=["image", 0], defocus=[by_type["BokehDefocus"], 0])
    prompt["text"] = node("PreviewAny", source=["measure", 6])
    outputs = succeeded(host.run(prompt))
    (table,) = outputs["measure"]["text"]
    assert outputs["text"]["text"] == [table]
    scores = {row.split("|")[1].strip(): row.split("|")[2].split()[0] for row in table.splitlines()[2:]}
    defocus = optics.make_defocus(disparity, Lens(strength=80), 0.2, width=192)
    expected = render(sharp, defocus).clamp(0, 1)
    assert float(scores["PSNR"]) == pytest.approx(psnr(expected, sharp), abs=0.02)
    calm = (defocus.signed_radius().abs() <= 0.5)[:, None]
    assert float(scores["PSNR in focus"]) == pytest.approx(psnr(expected, sharp, calm), abs=0.05)
    assert set(scores) == {"PSNR", "SSIM", "PSNR, 8 px around edges", "PSNR in focus", "frames"}


def test_strength_zero_is_the_input(host, object_info):
    prompt, _ = photo_prompt(object_info, strength=0)
    result = host.result(succeeded(host.run(prompt)))
    assert torch.equal(result, picture(INPUT / "bokeh_demo_photo.png"))


def test_flipped_depth_read_as_far_is_bright_gives_the_same(host, object_info):
    prompt, by_type = photo_prompt(object_info, focus="point", focus_x=0.49, focus_y=0.54)
    by_point = host.result(succeeded(host.run(prompt)))
    flipped, by_type = photo_prompt(object_info, focus="point", focus_x=0.49, focus_y=0.54, depth_values="far is bright")
    inputs = flipped[by_type["BokehDefocus"]]["inputs"]
    flipped["invert"] = node("ImageInvert", image=inputs["depth"])
    inputs["depth"] = ["invert", 0]
    by_flipped = host.result(succeeded(host.run(flipped)))
    assert (by_point - by_flipped).abs().max() * 255 < 2
    far, _ = photo_prompt(object_info, focus="value", focus_value=0.0)
    assert (host.result(succeeded(host.run(far))) - by_point).abs().mean() > 0.01


def test_a_still_and_a_track_make_a_clip(host, object_info):
    prompt, by_type = photo_prompt(object_info)
    prompt["track"] = node("BokehFocusTrack", keyframes="0: 0.9, 2: 0.1")
    prompt[by_type["BokehDefocus"]]["inputs"]["focus_track"] = ["track", 0]
    prompt["small"] = shrunk(prompt[by_type["BokehRender"]]["inputs"]["image"], 96, 64)
    for key in ("BokehDefocus", "BokehRender"):
        prompt[by_type[key]]["inputs"]["image"] = ["small", 0]
    outputs = succeeded(host.run(prompt))
    assert len(saved(outputs)) == 3


@pytest.mark.parametrize(
    ("images", "depths", "words"),
    [(3, 2, "2 depth maps for 3 images"), (1, 2, "2 depth maps for 1 images")],
)
def test_wrong_counts_are_explained(host, object_info, images, depths, words):
    prompt, by_type = photo_prompt(object_info)
    inputs = prompt[by_type["BokehDefocus"]]["inputs"]
    prompt["images"] = node("RepeatImageBatch", image=inputs["image"], amount=images)
    prompt["depths"] = node("RepeatImageBatch", image=inputs["depth"], amount=depths)
    inputs.update(image=["images", 0], depth=["depths", 0])
    assert words in error_of(host.run(prompt))


def test_image_of_another_clip_is_explained(host, object_info):
    prompt, by_type = photo_prompt(object_info)
    inputs = prompt[by_type["BokehDefocus"]]["inputs"]
    for name in ("image", "depth"):
        prompt[name] = node("RepeatImageBatch", image=inputs[name], amount=2)
        inputs[name] = [name, 0]
    render_inputs = prompt[by_type["BokehRender"]]["inputs"]
    prompt["three"] = node("RepeatImageBatch", image=render_inputs["image"], amount=3)
    render_inputs["image"] = ["three", 0]
    assert "The image has 3 frames and the defocus 2" in error_of(host.run(prompt))


def test_real_lens_without_metres_is_explained(host, object_info):
    prompt, by_type = photo_prompt(object_info)
    prompt["lens"] = lens("real lens")
    prompt[by_type["BokehDefocus"]]["inputs"]["lens"] = ["lens", 0]
    assert "need depth in metres" in error_of(host.run(prompt))
    prompt[by_type["BokehDefocus"]]["inputs"]["depth_values"] = "1 / metres"
    succeeded(host.run(prompt))


def test_missing_mask_is_explained(host, object_info):
    prompt, _ = photo_prompt(object_info, focus="mask")
    assert "no mask is connected" in error_of(host.run(prompt))


@pytest.mark.parametrize("quality", ["fast", "reference"])
def test_interrupt_stops_soon_and_the_next_run_works(host, object_info, quality):
    prompt, by_type = photo_prompt(object_info, strength=80)
    inputs = prompt[by_type["BokehRender"]]["inputs"]
    inputs["quality"] = quality
    prompt["many"] = node("RepeatImageBatch", image=inputs["image"], amount=40)
    inputs["image"] = ["many", 0]
    assert host.interrupt(prompt, after=5) < 15  # a second or two on an idle machine
    prompt, _ = photo_prompt(object_info, strength=1)
    succeeded(host.run(prompt))
