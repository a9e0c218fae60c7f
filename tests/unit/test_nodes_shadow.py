"""The pack inside a host that has its own module `nodes`: who gets which module, what gets imported, what starts up.

A stand-in host plays ComfyUI's part with the few names the pack uses; tests/host does the same with the real one.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOST_FILES = {
    "nodes.py": "WHOSE = 'the host'\n",
    "comfy/__init__.py": "",
    "comfy/model_management.py": "",
    "comfy/model_patcher.py": "class ModelPatcher: ...\n",
    "comfy/ops.py": "",
    "folder_paths.py": """
models_dir, supported_pt_extensions, folder_names_and_paths = "models", {".safetensors"}, {}
def add_model_folder_path(key, folder): folder_names_and_paths[key] = ([folder], set())
def get_filename_list(key): return []
def get_folder_paths(key): return folder_names_and_paths.get(key, ([], set()))[0]
""",
    "comfy/utils.py": "class ProgressBar: ...\n",
    "comfy_api/__init__.py": "",
    "comfy_api/latest.py": """
from types import SimpleNamespace

class Field:
    def __init__(self, *args, **keywords): ...

Kind = SimpleNamespace(Input=Field, Output=Field)

class Io:
    ComfyNode = type("ComfyNode", (), {})
    Schema = NodeOutput = Field
    def Custom(name): return Kind
    def __getattr__(self, name): return Kind

Io.Custom = staticmethod(Io.Custom)
io = Io()
ui = SimpleNamespace(PreviewImage=Field)
class ComfyExtension: ...
""",
}

# How ComfyUI loads a custom node: from its path, under a module name made of that path.
LOAD = """
import asyncio, importlib.util, json, socket, sys, time
import torch  # the host has it already

def forbidden(*args, **keywords): raise AssertionError("the pack opened a socket while loading")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = forbidden
before = set(sys.modules)
start = time.process_time()
name = PACK.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, PACK + "/__init__.py")
pack = importlib.util.module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
classes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
for one in classes:
    one.define_schema()
seconds = time.process_time() - start
import nodes
print(json.dumps({
    "seconds": seconds,
    "nodes": nodes.WHOSE,
    "classes": [one.__module__ + "." + one.__name__ for one in classes],
    "new": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "path": sys.path,
}))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What a fresh interpreter saw after a stand-in host loaded the pack."""
    host = tmp_path_factory.mktemp("host")
    for name, text in HOST_FILES.items():
        (host / name).parent.mkdir(exist_ok=True)
        (host / name).write_text(text)
    (host / "main.py").write_text(f"PACK = {str(ROOT)!r}\n{LOAD}")
    for _ in range(2):  # the first start after an installation compiles the bytecode
        done = subprocess.run([sys.executable, "-W", "error", "main.py"], cwd=host, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])


def test_the_hosts_nodes_module_stays_the_hosts(loaded):
    assert loaded["nodes"] == "the host"
    assert "bokeh_core" not in loaded["new"], "the pack must use its own nested copy of the library"
    assert str(ROOT) not in loaded["path"]
    assert loaded["classes"] and all(name.startswith(str(ROOT).replace(".", "_x_")) for name in loaded["classes"])


def test_loading_is_light(loaded):
    heavy = {"diffusers", "transformers", "kornia", "einops", "av", "PIL", "accelerate", "torchvision", "scipy", "cv2"}
    assert not heavy & {name.partition(".")[0] for name in loaded["new"]}
    late = [name for name in loaded["new"] if name.endswith((".sampler", ".network", ".checkpoint", ".media", ".rays", ".flux"))]
    assert not late, f"only nodes that run need these: {late}"
    assert not loaded["cuda"]
    assert loaded["seconds"] < 0.5


def test_library_works_alone_and_inside_another_package(tmp_path):
    """bokeh_core imported top-level, and nested in a package of any name, in one process: neither needs a host or the other."""
    (tmp_path / "some_pack").mkdir()
    (tmp_path / "some_pack" / "__init__.py").write_text("")
    (tmp_path / "some_pack" / "bokeh_core").symlink_to(ROOT / "bokeh_core")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "bokeh_core").symlink_to(ROOT / "bokeh_core")
    program = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(tmp_path / "alone")!r}]
import bokeh_core.render, bokeh_core.optics.defocus
import some_pack.bokeh_core.render
assert bokeh_core.render.render is not some_pack.bokeh_core.render.render
assert not [name for name in sys.modules if name.partition(".")[0] in ("nodes", "comfy", "comfy_api")]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
