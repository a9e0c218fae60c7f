from ..host.conftest import host  # noqa: F401 - the same running ComfyUI
