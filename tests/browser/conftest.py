from ..host.conftest import comfyui, host  # noqa: F401 - the same running ComfyUI
