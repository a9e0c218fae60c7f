"""The pack's door for ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import BokehExtension  # imported late: the library must be importable without ComfyUI

    return BokehExtension()
