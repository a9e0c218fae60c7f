"""A real ComfyUI for tests: start it with the pack installed as a user gets it, talk to it over HTTP, run saved workflows."""

import fnmatch
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
INPUT = WORKFLOWS / "input"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}  # drawn by the front end; the server does not know them


def install(custom_nodes: Path) -> Path:
    """Copy the pack to custom_nodes/bokeh-nodes, less what .gitignore and .comfyignore keep out of the published archive."""
    lines = [line.strip() for name in (".gitignore", ".comfyignore") for line in (ROOT / name).read_text().splitlines()]
    anywhere = [line.strip("/") for line in lines if line and line[0] not in "/#"]
    at_root = [line.strip("/") for line in lines if line.startswith("/")]

    def left_out(folder, names):
        patterns = [".git", *anywhere, *(at_root if Path(folder) == ROOT else [])]
        return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}

    return Path(shutil.copytree(ROOT, custom_nodes / "bokeh-nodes", ignore=left_out))


class Host:
    """ComfyUI at COMFYUI_PATH, run by COMFYUI_PYTHON on the CPU, in its own folder `base`, on a free loopback port."""

    def __init__(self, base: Path):
        self.base = base
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (base / folder).mkdir(parents=True)
        self.pack = install(base / "custom_nodes")
        shutil.copy(Path(__file__).with_name("stand_in_nodes.py"), base / "custom_nodes")
        (base / "user" / "default").mkdir()
        settings = {"Comfy.TutorialCompleted": True}  # else the front end opens on its template browser
        (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings))
        for file in INPUT.iterdir():
            shutil.copy(file, base / "input")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = base / "log.txt"
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        options = ["--cpu", "--base-directory", base, "--listen", "127.0.0.1", "--port", self.port, "--disable-auto-launch"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-s", "main.py", *map(str, options)],
                cwd=os.environ["COMFYUI_PATH"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._wait_until_up(240)

    def _wait_until_up(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with code {self.process.returncode}:\n{self.log()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not answer within {seconds} s:\n{self.log()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def fetch(self, path: str, **query: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return answer.read()

    def get(self, path: str, **query: str):
        return json.loads(self.fetch(path, **query))

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def queue(self, prompt: dict) -> str:
        """Send an API-format prompt; returns its id."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, f"the server refused the prompt: {json.dumps(answer, indent=1)}"
        return answer["prompt_id"]

    def _wait_for(self, what, seconds: float):
        """The first true result of `what`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            assert self.process.poll() is None, self.log()[-3000:]
            time.sleep(0.1)
        raise TimeoutError(f"the prompt did not get there within {seconds} s:\n{self.log()[-3000:]}")

    def run(self, prompt: dict, timeout: float = 300) -> dict:
        """Run an API-format prompt to its end and return its history entry: status, outputs."""
        key = self.queue(prompt)
        return self._wait_for(lambda: self.get(f"/history/{key}"), timeout)[key]

    def interrupt(self, prompt: dict, after: float, timeout: float = 120) -> float:
        """Start a prompt, interrupt it `after` seconds of running, and return the seconds until it had stopped for that reason."""
        key = self.queue(prompt)
        self._wait_for(lambda: self.get("/queue")["queue_running"], timeout)
        time.sleep(after)
        asked = time.monotonic()
        self.post("/interrupt", {})
        entry = self._wait_for(lambda: self.get(f"/history/{key}"), timeout)[key]
        seconds = time.monotonic() - asked
        kinds = [name for name, _ in entry["status"]["messages"]]
        assert "execution_interrupted" in kinds, kinds
        print(f"interrupted after {seconds:.1f} s")
        return seconds

    def loads(self) -> int:
        """How often the host has said that it brings a network to its device."""
        return len(re.findall("Requested to load|loaded completely|loaded partially", self.log()))

    def file(self, saved: dict) -> bytes:
        """The bytes of an entry of a node's ui output (filename, subfolder, type)."""
        return self.fetch("/view", **{key: saved[key] for key in ("filename", "subfolder", "type")})

    def picture(self, saved: dict) -> Image.Image:
        """The same as a PIL image."""
        return Image.open(io.BytesIO(self.file(saved)))

    def pictures(self, entries: list[dict]) -> torch.Tensor:
        """[B, 3, H, W] 0..1 of such entries."""
        return torch.cat([as_tensor(self.picture(one)) for one in entries])

    def result(self, outputs: dict) -> torch.Tensor:
        """[1, 3, H, W] of the only picture that a prompt saved."""
        (entry,) = saved(outputs)
        return self.pictures([entry])


def as_tensor(image: Image.Image) -> torch.Tensor:
    """[1, 3, H, W] 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).movedim(-1, 0)[None] / 255


def picture(path: Path) -> torch.Tensor:
    """[1, 3, H, W] 0..1 of a picture file."""
    return as_tensor(Image.open(path))


def video(source: Path | bytes) -> torch.Tensor:
    """[frames, 3, H, W] 0..1 of a video file or its bytes."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1) / 255


def saved(outputs: dict) -> list[dict]:
    """The files in a prompt's outputs, previews aside, as Host.file and Host.picture take them."""
    return [entry for output in outputs.values() for entry in output.get("images", []) if entry["type"] == "output"]


def succeeded(entry: dict) -> dict:
    """The outputs of a finished prompt by node id, or an assertion that shows the host's error."""
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)[:4000]
    return entry["outputs"]


def error_of(entry: dict) -> str:
    """The message the user reads when a node failed."""
    assert entry["status"]["status_str"] == "error", "the prompt was expected to fail but succeeded"
    return next(data["exception_message"] for name, data in entry["status"]["messages"] if name == "execution_error")


def cached(entry: dict) -> set[str]:
    """The nodes of a finished prompt that were not run again."""
    return next(set(data["nodes"]) for name, data in entry["status"]["messages"] if name == "execution_cached")


def check_second_run(host: Host, prompt: dict, change: tuple[str, str, object], loader: str, worker: str) -> None:
    """After a change (node, widget, value) the worker runs again but the loader does not, and no network is loaded; then nothing runs."""
    succeeded(host.run(prompt, timeout=600))
    before = host.loads()
    assert before > 0, "the host no longer says when it loads a model; find another sign"
    key, widget, value = change
    prompt[key]["inputs"][widget] = value
    entry = host.run(prompt, timeout=600)
    succeeded(entry)
    assert loader in cached(entry) and worker not in cached(entry) and host.loads() == before
    entry = host.run(prompt, timeout=600)
    succeeded(entry)
    assert cached(entry) == set(prompt) and host.loads() == before


def choices(nodes: dict, name: str, field: str) -> list[str]:
    """What a node's list offers, with forward slashes. nodes: the server's /object_info."""
    spec = nodes[name]["input"]["optional"][field]
    return [one.replace("\\", "/") for one in (spec[0] if isinstance(spec[0], list) else spec[1]["options"])]


def node(kind: str, /, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def shrunk(image: list, width: int, height: int) -> dict:
    return node("ImageScale", image=image, upscale_method="area", width=width, height=height, crop="disabled")


def set_focus(image: list, depth: list, **widgets) -> dict:
    """Set Focus and Blur."""
    usual = {"strength": 24, "focus": "auto", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.5}
    return node("BokehDefocus", **{"image": image, "depth": depth, **usual, "depth_values": "near is bright", "follow": False, **widgets})


def lens(mode: str, **widgets) -> dict:
    usual = {"strength": 24, "f_number": 1.8, "focal_length": 50, "sensor": "full frame", "sensor_width": 36}
    return node("BokehLens", **{"mode": mode, **usual, "upright": False, "focus_distance": 0, **widgets})


def shipped(name: str, nodes: dict) -> tuple[dict, dict]:
    """A shipped workflow as an API-format prompt, and its nodes by type. nodes: the server's /object_info."""
    prompt = to_api(json.loads((WORKFLOWS / f"{name}.json").read_text()), nodes)
    return prompt, {one["class_type"]: key for key, one in prompt.items()}


def use_stand_in_flux(prompt: dict, by_type: dict) -> None:
    """Replace FLUX's text encoders and VAE by what stand-ins exist for, and make the stack small."""
    prompt[by_type["DualCLIPLoader"]] = node("StandInFluxClip")
    prompt[by_type["VAELoader"]] = node("VAELoader", vae_name="taef1")
    prompt[by_type["BokehGenerateStack"]]["inputs"].update(resolution=64, steps=2, seed=7)


def to_api(workflow: dict, nodes: dict) -> dict:
    """UI-format workflow (version 0.4, no subgraphs) to an API-format prompt, as the front end does it.

    nodes is the server's /object_info. Widget values are positional in schema order. Every value must be used up, so a saved
    graph that no longer fits the schema fails here; only optional widgets, which newer versions append, may lack a value.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node["mode"] != 0:
            continue
        assert node["type"] in nodes, f"node {node['id']} is of unknown type {node['type']}"
        connected = {socket["name"]: links[socket["link"]] for socket in node["inputs"] if socket.get("link") is not None}
        values = list(node.get("widgets_values", []))
        inputs = {}
        _read_inputs(nodes[node["type"]]["input"], values, connected, inputs, f"node {node['id']} ({node['type']})")
        assert not values, f"node {node['id']} ({node['type']}) has values left over: {values}"
        assert not connected, f"node {node['id']} ({node['type']}) has links to unknown inputs: {connected}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _read_inputs(declared, values, connected, inputs, who, prefix=""):
    for group in ("required", "optional"):
        uploads = False
        for name, spec in declared.get(group, {}).items():
            name, kind, options = prefix + name, spec[0], spec[1] if len(spec) > 1 else {}
            dynamic = kind == "COMFY_DYNAMICCOMBO_V3"
            if (dynamic or isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
                if not values and group == "optional":
                    continue
                assert values, f"{who} has no value for its widget {name}"
                inputs[name] = values.pop(0)
                if dynamic:  # the fields of the chosen option follow, with dotted names
                    (chosen,) = [option for option in options["options"] if option["key"] == inputs[name]]
                    _read_inputs(chosen["inputs"], values, connected, inputs, who, name + ".")
                elif options.get("control_after_generate"):  # a second widget after its own
                    values.pop(0)
                uploads |= any(options.get(media + "_upload") for media in ("image", "video", "audio"))
            if name in connected:
                inputs[name] = connected.pop(name)
        if uploads:  # its button comes after all others
            values.pop(0)
