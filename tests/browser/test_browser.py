"""The shipped workflows in the real front end, in headless Chromium. Needs node and playwright-core (npm install playwright-core)."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.stand_ins.everything import write_all

from ..host.comfy import NOTES, WORKFLOWS, to_api

HERE = Path(__file__).parent
FILES = sorted(WORKFLOWS.glob("*.json"))


@pytest.fixture(scope="module", params=["classic", "vue"])
def browse(request, host, tmp_path_factory):
    """Runs a script in a browser on the host, on the canvas and with Nodes 2.0: browse(script, *arguments) -> the JSON it prints."""
    version = host.get("/system_stats")["system"]["comfyui_version"]
    if request.param == "vue" and tuple(map(int, version.split(".")[:2])) < (0, 4):
        pytest.skip(f"NO NODES 2.0: that of ComfyUI {version} is a first trial, which draws no DOM widgets; 0.8 is tested")
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("NO BROWSER: install Chromium or set CHROMIUM to test the workflows in the front end")
    if (
        shutil.which("node") is None
        or subprocess.run(["node", "-e", "require('playwright-core')"], cwd=HERE, capture_output=True).returncode
    ):
        pytest.skip("NO PLAYWRIGHT: run `npm install playwright-core` in tests/browser, or name its folder in NODE_PATH")

    def run(script, *arguments):
        profile = tmp_path_factory.mktemp("profile")
        done = subprocess.run(
            ["node", script, host.url, browser, str(profile), request.param, *map(str, arguments)],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) | {"renderer": request.param}

    return run


# Opened, not run: core's nodes load FLUX, for which there is no tiny stand-in; video diffusion takes minutes, tests/host runs it.
OPEN_ONLY = ["bokeh_stack_kontext", "depth_from_bokeh_stack", "photo_compare_renderers"]
OPEN_ONLY += ["video_any_to_bokeh", "video_any_to_bokeh_focus_pull"]


@pytest.fixture(scope="session")
def models(host):
    """Stand-ins for all model files that the workflows name."""
    write_all(host.base / "models")


@pytest.fixture(scope="module")
def opened(models, browse):
    """What the front end made of the workflows."""
    return browse("open_workflows.cjs", ",".join(OPEN_ONLY), *FILES)


@pytest.fixture(scope="module")
def picked(browse):
    """What happened when the focus was set by hand."""
    return browse("pick_focus.cjs", WORKFLOWS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_opens_whole(host, opened, file):
    saved = json.loads(file.read_text())
    seen = opened["workflows"][file.stem]
    assert not seen["missing"]
    assert sorted(seen["types"]) == sorted(node["type"] for node in saved["nodes"])
    # The front end's own conversion agrees with the one the host tests run.
    nodes = host.get("/object_info")
    ours = to_api(saved, nodes)
    assert set(seen["prompt"]) == set(ours)
    for key, node in ours.items():
        theirs = seen["prompt"][key]
        assert theirs["class_type"] == node["class_type"]
        for name, value in node["inputs"].items():
            assert theirs["inputs"][name] == value, f"{node['class_type']}.{name}"
    assert not NOTES & {node["class_type"] for node in seen["prompt"].values()}


@pytest.mark.parametrize("file", [file.stem for file in FILES if file.stem not in OPEN_ONLY])
def test_workflow_runs_from_the_browser(opened, file):
    outputs = opened["workflows"][file]["outputs"]
    shown = {kind: count for kind, count in outputs.items() if kind.startswith(("Save", "Preview", "BokehStackRendered"))}
    assert shown and all(shown.values()), f"each of these should have shown a result: {shown}"
    if "BokehDefocus" in outputs:
        assert outputs["BokehDefocus"] == (4 if file.startswith("video") else 1), "the node must show its frames"


def test_nodes_are_drawn_by_the_chosen_renderer(opened):
    for workflow in opened["workflows"].values():
        assert workflow["drawn"] == (len(workflow["types"]) if opened["renderer"] == "vue" else 0)


def test_measure_shows_its_table_and_saves_nothing_of_it(opened):
    scores = opened["scores"]
    assert "PSNR in focus" in scores["text"] and scores["height"] > 60
    assert scores["saved"] == [] and sorted(scores["inputs"]) == ["defocus", "result", "truth"]


def test_no_errors_from_the_pack(opened, picked):
    assert not [error for seen in (opened, picked) for error in seen["errors"] if "bokeh" in error.lower()]


def test_focus_is_picked_before_the_first_run(picked):
    before, early = picked["before"], picked["early"]
    assert before["focus"] == "auto" and before["width"] == 512 and before["seen"] > 100, "the picture from upstream must be shown"
    assert (early["focus"], early["x"], early["y"]) == ("point", 0.3, 0.6)
    assert early["sum"] != before["sum"], "the cross must be drawn"


def test_focus_is_picked_by_click_drag_and_keys(picked):
    assert picked["ran"]["sum"] != picked["before"]["sum"], "after a run the zone in focus must be shown"
    clicked, dragged, nudged = picked["clicked"], picked["dragged"], picked["nudged"]
    assert (clicked["focus"], clicked["x"], clicked["y"]) == ("point", 0.12, 0.85)
    assert clicked["sum"] != picked["ran"]["sum"], "the zone must follow at once, before anything is run"
    assert (dragged["x"], dragged["y"]) == (0.7, 0.4) and (nudged["x"], nudged["y"]) == (0.705, 0.45)
    assert picked["prompt"]["focus"] == "point" and picked["prompt"]["focus_x"] == 0.705
    assert "focus_picker" not in picked["prompt"]


def test_a_click_changes_the_picture(host, picked):
    def near_pawn(saved):  # where the click was
        picture = host.picture(saved).convert("L")
        width, height = picture.size
        return picture.crop((int(0.02 * width), int(0.75 * height), int(0.3 * width), int(0.95 * height)))

    def detail(picture):
        return sum(abs(a - b) for a, b in zip(picture.tobytes(), picture.tobytes()[1:], strict=False))

    assert detail(near_pawn(picked["second"])) > 1.2 * detail(near_pawn(picked["first"]))


def test_the_picked_focus_survives_saving_copying_and_subgraphs(picked):
    again = picked["reloaded"]
    assert again["values"][1:4] == ["point", 0.705, 0.45] and len(again["values"]) == 7, "the widget must not shift the saved values"
    assert again["node"] == again["copy"] == {"focus": "point", "focus_x": 0.705, "focus_y": 0.45}
    assert again["pickers"] == 2
    if picked["subgraph"] is not None:
        assert picked["subgraph"]["picker"] and picked["subgraph"]["inputs"]["focus_x"] == 0.705


def test_a_keyframe_is_dragged(picked):
    first, then = picked["track"]
    assert first.startswith("0: (0.27, 0.72)")
    assert then == "0: 0.2\n14: 0.5 ease\n20: (0.5, 0.5)"
