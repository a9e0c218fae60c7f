import os

import pytest

from .comfy import Host


@pytest.fixture(scope="session", autouse=True)
def comfyui():
    """Everything here needs a ComfyUI. Set COMFYUI_PATH (and COMFYUI_PYTHON) to run these tests."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("NO HOST: set COMFYUI_PATH to a ComfyUI folder and COMFYUI_PYTHON to its interpreter to test the pack inside ComfyUI")


@pytest.fixture(scope="session")
def host(comfyui, tmp_path_factory):
    """A running ComfyUI with the pack and the workflows' input files."""
    running = Host(tmp_path_factory.mktemp("comfy") / "base")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def models(host):
    """The host's folder of models. A module that needs files there has a fixture of this name that writes them."""
    return host.base / "models"


@pytest.fixture(scope="module")
def object_info(host, models):
    return host.get("/object_info")
