"""Runs Python inside the host's interpreter with its memory manager at hand, for what no workflow can show: partial loads."""

import os
import subprocess
import sys

from .comfy import ROOT

START = """
import sys, os, importlib.util, torch
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options
from comfy.cli_args import args
args.cpu = True
torch.set_num_threads(1)
import comfy.model_management
spec = importlib.util.spec_from_file_location("bokeh_pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["bokeh_pack"] = pack
spec.loader.exec_module(pack)
import bokeh_pack.nodes
from bokeh_pack.nodes import host


def partial(managed, share=0.5):
    '''Load only about `share` of the weights; the others stay where they rest and are cast layer by layer. Nodes keep it so.'''
    host.load = lambda models, activations: None
    patcher = managed.patcher
    patcher.detach()
    patcher.model.model_lowvram = False
    patcher.load(patcher.load_device, lowvram_model_memory=int(patcher.model_size() * share), full_load=False)
    assert patcher.model.model_lowvram, "nothing was left out"


def on_meta(managed, share=0.5):
    '''The same onto a device that holds no data: a layer or parameter that is not cast where it is used fails there, as on a GPU.'''
    managed.patcher.load_device = torch.device("meta")
    partial(managed, share)


def peak():
    '''Bytes this process has held at most (Linux: VmHWM, because getrusage starts from the parent's peak).'''
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024

"""


def inside(code: str, timeout: float = 300) -> str:
    """What `code` prints. It finds `torch`, `comfy`, the pack as `bokeh_pack`, `host`, `partial`, `on_meta` and `peak`."""
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), "-s", "-c", START.format(root=str(ROOT)) + code],
        cwd=os.environ["COMFYUI_PATH"],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
