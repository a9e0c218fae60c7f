"""A real ComfyUI for tests: start it with the pack installed as a user gets it, talk to it over HTTP, run saved workflows."""

import fnmatch
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
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
        for file in (WORKFLOWS / "input").iterdir():
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

    def run(self, prompt: dict, timeout: float = 300) -> dict:
        """Run an API-format prompt to its end and return its history entry: status, outputs."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, f"the server refused the prompt: {json.dumps(answer, indent=1)}"
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return history[answer["prompt_id"]]
            assert self.process.poll() is None, self.log()[-3000:]
            time.sleep(0.2)
        raise TimeoutError(f"the prompt did not end within {timeout} s:\n{self.log()[-3000:]}")

    def file(self, saved: dict) -> bytes:
        """The bytes of an entry of a node's ui output (filename, subfolder, type)."""
        return self.fetch("/view", **{key: saved[key] for key in ("filename", "subfolder", "type")})

    def picture(self, saved: dict):
        """The same as a PIL image."""
        from PIL import Image

        return Image.open(io.BytesIO(self.file(saved)))


def succeeded(entry: dict) -> dict:
    """The outputs of a finished prompt by node id, or an assertion that shows the host's error."""
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)[:4000]
    return entry["outputs"]


def error_of(entry: dict) -> str:
    """The message the user reads when a node failed."""
    assert entry["status"]["status_str"] == "error", "the prompt was expected to fail but succeeded"
    return next(data["exception_message"] for name, data in entry["status"]["messages"] if name == "execution_error")


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
