"""Graph nodes for ComfyUI. Thin: schema, words, units and host services; all mathematics lives in bokeh_core."""

from comfy_api.latest import ComfyExtension

from .defocus import BokehDefocus, BokehFocusTrack, BokehLens
from .inspect import BokehMeasure
from .render import BokehRender

NODES = [BokehLens, BokehFocusTrack, BokehDefocus, BokehRender, BokehMeasure]


class BokehExtension(ComfyExtension):
    """What comfy_entrypoint hands to ComfyUI."""

    async def get_node_list(self):
        return NODES
