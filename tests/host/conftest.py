import os

import pytest

from .comfy import Host


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """A running ComfyUI with the pack and the workflows' input files. Set COMFYUI_PATH (and COMFYUI_PYTHON) to run these tests."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("NO HOST: set COMFYUI_PATH to a ComfyUI folder and COMFYUI_PYTHON to its interpreter to test the pack inside ComfyUI")
    running = Host(tmp_path_factory.mktemp("comfy") / "base")
    yield running
    running.stop()
