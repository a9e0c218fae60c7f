"""All renderers on one photo, inside a real ComfyUI, with stand-ins for every model file."""

import json

import pytest

from bokeh_core.metrics.image import psnr
from tests.stand_ins.everything import write_all

from .comfy import WORKFLOWS, saved, shipped, shrunk, succeeded, to_api

NAME, SIZE = "photo_compare_renderers", (192, 128)
RENDERERS = {"BokehRender", "BokehDiffRender", "MagicBokehRender", "AnyToBokehRender"}


@pytest.fixture(scope="module")
def models(host):
    write_all(host.base / "models")


def small(prompt):
    """The photo and its depth are shrunk where they are loaded."""
    for loader in [key for key, one in prompt.items() if one["class_type"] == "LoadImage"]:
        for one in prompt.values():
            for name, link in one["inputs"].items():
                if link == [loader, 0]:
                    one["inputs"][name] = [f"small_{loader}", 0]
        prompt[f"small_{loader}"] = shrunk([loader, 0], *SIZE)
    return prompt


def test_all_renderers_side_by_side(host, object_info):
    prompt, by_type = shipped(NAME, object_info)
    for name in RENDERERS:
        assert prompt[by_type[name]]["inputs"]["defocus"] == [by_type["BokehDefocus"], 0], "one focus, depth and lens for all"
    assert prompt[by_type["BokehDefocus"]]["inputs"]["lens"] == [by_type["BokehLens"], 0]
    assert [one["class_type"] for one in prompt.values()].count("BokehLens") == 1
    prompt[by_type["AnyToBokehRender"]]["inputs"]["resolution"] = 128
    outputs = succeeded(host.run(small(prompt), timeout=600))

    pictures, tables = {}, {}
    for key, one in prompt.items():
        if one["class_type"] == "SaveImage":
            pictures[prompt[one["inputs"]["images"][0]]["class_type"]] = host.pictures(outputs[key]["images"])
        if one["class_type"] == "BokehMeasure":
            assert prompt[one["inputs"]["truth"][0]]["class_type"] == "BokehRender"
            tables[prompt[one["inputs"]["result"][0]]["class_type"]] = outputs[key]["text"][0]
    assert set(pictures) == RENDERERS and set(tables) == RENDERERS - {"BokehRender"}
    for name, picture in pictures.items():
        assert picture.shape == (1, 3, SIZE[1], SIZE[0]) and picture.std() > 0.02, name
        if name in tables:
            scores = {row.split("|")[1].strip(): float(row.split("|")[2].split()[0]) for row in tables[name].splitlines()[2:]}
            assert abs(scores["PSNR"] - psnr(picture, pictures["BokehRender"])) < 0.5, name  # the files are cut to 8 bits
            assert {"SSIM", "PSNR, 8 px around edges", "PSNR in focus"} < set(scores), name


def test_a_group_without_its_files_is_switched_off(host, object_info):
    """As the note says: "Set Group Nodes to Never" for each renderer whose files are missing leaves the others whole."""
    workflow = json.loads((WORKFLOWS / f"{NAME}.json").read_text())
    groups = {one["title"]: one["bounding"] for one in workflow["groups"]}
    assert set(groups) == {"Render Bokeh", "BokehDiff", "MagicBokeh", "Any-to-Bokeh"}
    for title in set(groups) - {"Render Bokeh"}:
        left, top, width, height = groups[title]
        for one in workflow["nodes"]:
            (x, y), (w, h) = one["pos"], one["size"]
            if left <= x and x + w <= left + width and top <= y and y + h <= top + height:
                one["mode"] = 2
    (lens,) = [one for one in workflow["nodes"] if one["type"] == "BokehLens"]
    lens["widgets_values"][1] = 30  # so that nothing comes from the cache
    prompt = small(to_api(workflow, object_info))
    assert RENDERERS & {one["class_type"] for one in prompt.values()} == {"BokehRender"}
    assert len(saved(succeeded(host.run(prompt)))) == 1
