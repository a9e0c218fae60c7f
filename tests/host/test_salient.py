"""Finding the subject inside a real ComfyUI, with a narrow LDF file under the published name."""

import numpy as np
import pytest
import torch
from PIL import Image

from bokeh_core.metrics.image import psnr
from bokeh_core.optics import defocus as optics
from bokeh_core.optics import focus as focusing
from bokeh_core.optics.lens import Lens
from bokeh_core.render import render
from bokeh_core.salient.ldf import Config, load_ldf, salient_masks
from tests.stand_ins.salient import write_ldf

from .comfy import INPUT, check_second_run, choices, error_of, node, picture, shipped, succeeded
from .inside import inside


@pytest.fixture(scope="module")
def models(host):
    folder = host.base / "models" / "salient"
    write_ldf(folder / "model-40", legacy=True)
    write_ldf(folder / "sub" / "wide.pth", Config(stem=16, width=16))
    torch.save({"fc.weight": torch.ones(2)}, folder / "resnet50-19c8e357.pth")
    return folder


def mask_prompt(model="model-40", amount=1, image="bokeh_demo_photo.png", **widgets):
    """Load, repeat, find the subject, save the mask."""
    return {
        "load": node("LoadImage", image=image),
        "many": node("RepeatImageBatch", image=["load", 0], amount=amount),
        "model": node("BokehLoadSalientModel", model=model),
        "mask": node("BokehSalientMask", image=["many", 0], salient_model=["model", 0], **widgets),
        "show": node("MaskToImage", mask=["mask", 0]),
        "save": node("SaveImage", images=["show", 0], filename_prefix="mask"),
    }


def masks_of(host, prompt):
    """[B, H, W]"""
    return host.pictures(succeeded(host.run(prompt))["save"]["images"])[:, 0]


def test_files_without_a_suffix_are_listed(object_info):
    found = choices(object_info, "BokehLoadSalientModel", "model")
    assert set(found) == {"model-40", "sub/wide.pth", "resnet50-19c8e357.pth"}


def test_workflow(host, models, object_info):
    result = host.result(succeeded(host.run(shipped("photo_subject_focus", object_info)[0])))
    sharp, disparity = picture(INPUT / "bokeh_demo_photo.png"), picture(INPUT / "bokeh_demo_depth.png")[:, 0]
    mask = salient_masks(load_ldf(models / "model-40"), sharp)
    assert result.shape == sharp.shape

    def likeness(focus):
        defocus = optics.make_defocus(disparity, Lens(strength=24), focus, width=sharp.shape[-1])
        return psnr(result, render(sharp, defocus).clamp(0, 1))

    found, without = likeness(focusing.from_mask(disparity, mask)), likeness(focusing.auto(disparity, sharp))
    assert found > 40 and found > without + 6, (found, without)


def test_masks_are_those_of_the_library(host, models):
    for name in ("model-40", "sub/wide.pth"):
        masks = masks_of(host, mask_prompt(name, amount=3))
        expected = salient_masks(load_ldf(models / name), picture(INPUT / "bokeh_demo_photo.png"))
        assert masks.shape == (3, *expected.shape[1:]) and expected.std() > 0.01
        assert (masks - expected).abs().max() <= 2 / 255
    hard = masks_of(host, mask_prompt(threshold=0.5))
    assert set(hard.unique().tolist()) <= {0.0, 1.0}


def test_alpha_and_small_pictures(host, models):
    rgba = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(host.base / "input" / "tiny.png")
    assert masks_of(host, mask_prompt(image="tiny.png")).shape == (1, 9, 7)


def test_second_run_loads_nothing(host, models):
    check_second_run(host, mask_prompt("sub/wide.pth", threshold=0.1), ("mask", "threshold", 0.2), "model", "mask")


def test_wrong_files_are_refused(host, models):
    for name, words in (
        ("resnet50-19c8e357.pth", ("resnet50-19c8e357.pth is not the LDF", "fc.weight", "model-40")),
        ("gone", ("no salient-object model 'gone'", "model-40", "https://github.com/", "models/salient")),
    ):
        message = error_of(host.run(mask_prompt(name)))
        assert all(word in message for word in words), message


def test_interrupting(host, models):
    assert host.interrupt(mask_prompt("sub/wide.pth", amount=400), after=3) < 60  # the whole batch takes minutes
    succeeded(host.run(mask_prompt(threshold=0.3)))


def test_partial_load(host, models):
    """The same numbers with half of the weights left where they rest, and every layer cast where it is used."""
    out = inside(
        f"""
from bokeh_pack.bokeh_core.salient.ldf import build, folded_tensors, logits, read_ldf
tensors = folded_tensors(read_ldf({str(models / "sub" / "wide.pth")!r}))
inputs = torch.randn(2, 3, 352, 352, generator=torch.Generator().manual_seed(0))
managed = host.managed(build, tensors, (torch.float32,))
with torch.no_grad():
    host.load([managed], 0)
    full = managed.network(inputs)
    partial(managed)
    half = managed.network(inputs)
    again = host.managed(build, tensors, (torch.float32,))
    on_meta(again)
    shape = again.network(inputs.to("meta")).shape
print("difference", (full - half).abs().max().item(), managed.dtype, tuple(shape))
"""
    )
    difference, dtype, shape = out.split("difference ")[1].split(" ", 2)
    assert float(difference) < 1e-5 and dtype == "torch.float32" and shape.strip() == "(2, 1, 88, 88)"
