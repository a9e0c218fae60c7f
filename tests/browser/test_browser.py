"""The shipped workflows in the real front end, in headless Chromium. Needs node and playwright-core (npm install playwright-core)."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..host.comfy import NOTES, WORKFLOWS, to_api

HERE = Path(__file__).parent
FILES = sorted(WORKFLOWS.glob("*.json"))


@pytest.fixture(scope="module", params=["classic", "vue"])
def opened(request, host, tmp_path_factory):
    """What the front end made of the workflows, on the canvas and with Nodes 2.0."""
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
    profile = tmp_path_factory.mktemp("profile")
    done = subprocess.run(
        ["node", "open_workflows.cjs", host.url, browser, str(profile), request.param, *map(str, FILES)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"renderer": request.param}


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


@pytest.mark.parametrize(
    ("file", "saver", "previews"),
    [("photo_physical", "SaveImage", 1), ("photo_matte_and_lens", "SaveImage", 1), ("video_focus_pull", "SaveVideo", 4)],
)
def test_workflow_runs_from_the_browser(opened, file, saver, previews):
    outputs = opened["workflows"][file]["outputs"]
    assert len(outputs[saver]) == 1
    assert len(outputs["BokehDefocus"]) == previews, "the node must show its overlay"


def test_nodes_are_drawn_by_the_chosen_renderer(opened):
    for workflow in opened["workflows"].values():
        assert workflow["drawn"] == (len(workflow["types"]) if opened["renderer"] == "vue" else 0)


def test_measure_shows_its_table_and_saves_nothing_of_it(opened):
    scores = opened["scores"]
    assert "PSNR in focus" in scores["text"] and scores["height"] > 60
    assert scores["saved"] == [] and sorted(scores["inputs"]) == ["defocus", "result", "truth"]


def test_no_errors_from_the_pack(opened):
    assert not [error for error in opened["errors"] if "bokeh" in error.lower()]
