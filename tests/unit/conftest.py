"""A stand-in for ComfyUI to load the nodes in."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAME = "a_pack_with_any_name"


class Recorder:
    """Stands for every input, output, schema and result class: keeps what it was given."""

    def __init__(self, *args, **keywords):
        self.args, self.keywords = args, keywords


class Input:
    """Stands for every input; knows few words too."""

    def __init__(self, id, types=None, default=None, optional=False, tooltip=None):
        self.id, self.default, self.optional, self.tooltip = id, default, optional, tooltip


class Preview(Recorder):
    """Stands for the host's preview: one saved file an image."""

    def as_dict(self):
        return {"images": [{"filename": f"{i}.png", "subfolder": "", "type": "temp"} for i in range(len(self.args[0]))]}


class Patcher:
    """Stands for ComfyUI's model patcher."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device = model, load_device


def fake_folders(root):
    """The host's module of model folders, rooted at `root`; the one folder every ComfyUI has is `loras`."""
    known = {"loras": ([str(root / "loras")], {".safetensors"}), "diffusers": ([str(root / "diffusers")], {"folder"})}

    def add(key, folder):
        known.setdefault(key, ([], set()))
        if folder not in known[key][0]:
            known[key][0].append(folder)

    def listed(key):
        return [
            path.relative_to(folder).as_posix()
            for folder in known[key][0]
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and (not known[key][1] or path.suffix in known[key][1])
        ]

    def full(key, name):
        return next((str(Path(folder) / name) for folder in known[key][0] if (Path(folder) / name).is_file()), None)

    return {
        "models_dir": str(root),
        "folder_names_and_paths": known,
        "supported_pt_extensions": {".safetensors", ".pth", ".ckpt", ".pt", ".bin", ".pkl"},
        "add_model_folder_path": add,
        "get_filename_list": listed,
        "get_folder_paths": lambda key: known[key][0],
        "get_full_path": full,
    }


class OldSchema:
    """A schema class that knows few words, as old hosts have them."""

    def __init__(self, node_id, display_name, category, description, inputs, outputs):
        self.node_id, self.inputs, self.outputs = node_id, inputs, outputs


class Io(SimpleNamespace):
    def __getattr__(self, name):
        return SimpleNamespace(Input=Input, Output=Recorder)


@pytest.fixture
def bar():
    """What the progress bar was told: [(done, total)]."""
    return []


@pytest.fixture
def loads():
    """What the host was asked to load: [[patcher, ...]]."""
    return []


@pytest.fixture
def nodes(monkeypatch, bar, loads, tmp_path):
    """The pack's node classes by name, loaded as a package of another name."""
    cpu = torch.device("cpu")
    fakes = {
        "comfy": {},
        "comfy.model_management": {
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "unet_dtype": lambda **keywords: torch.float32,
            "unet_manual_cast": lambda *given: None,
            "vae_dtype": lambda *given: torch.float32,
            "load_models_gpu": lambda models, memory_required=0: loads.append(models),
            "soft_empty_cache": lambda: None,
            "OOM_EXCEPTION": torch.OutOfMemoryError,
            "intermediate_device": lambda: cpu,
            "free_memory": lambda size, device: None,
            "throw_exception_if_processing_interrupted": lambda: None,
        },
        "comfy.model_patcher": {"ModelPatcher": Patcher},
        "comfy.ops": {"disable_weight_init": torch.nn, "manual_cast": torch.nn},
        "comfy.utils": {"ProgressBar": lambda total: SimpleNamespace(update_absolute=lambda *told: bar.append(told))},
        "folder_paths": fake_folders(tmp_path / "models"),
        "comfy_api": {},
        "comfy_api.latest": {
            "ComfyExtension": object,
            "io": Io(
                ComfyNode=object,
                Schema=OldSchema,
                NodeOutput=Recorder,
                Custom=lambda name: SimpleNamespace(Input=Input, Output=Recorder),
            ),
            "ui": SimpleNamespace(PreviewImage=Preview, PreviewText=Recorder),
        },
    }
    for name, members in fakes.items():
        module = ModuleType(name)
        vars(module).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, pack)
    spec.loader.exec_module(pack)
    classes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    yield {one.__name__: one for one in classes}
    for name in [name for name in sys.modules if name.startswith(NAME + ".")]:
        del sys.modules[name]
