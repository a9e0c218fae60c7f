"""Graph nodes for ComfyUI. Thin: schema, words, units and host services; all mathematics lives in bokeh_core."""

from comfy_api.latest import ComfyExtension

from .any_to_bokeh import AnyToBokehRender, BokehLoadAnyToBokeh, BokehMPIMasks
from .bokehdiff import BokehDiffRender, BokehLoadBokehDiff
from .defocus import BokehDefocus, BokehFocusTrack, BokehLens
from .depth import BokehEstimateDepth, BokehLoadDepthModel
from .inspect import BokehMeasure
from .magicbokeh import BokehLoadMagicBokeh, MagicBokehRender
from .refine import BokehDepthFromSweep, BokehRefineDepth
from .render import BokehRender
from .salient import BokehLoadSalientModel, BokehSalientMask
from .stack import (
    BokehGenerateStack,
    BokehLoadStack,
    BokehSaveStack,
    BokehStackAdapter,
    BokehStackFromImages,
    BokehStackRendered,
)

NODES = [
    BokehLoadDepthModel,
    BokehEstimateDepth,
    BokehRefineDepth,
    BokehDepthFromSweep,
    BokehLens,
    BokehFocusTrack,
    BokehDefocus,
    BokehRender,
    BokehMeasure,
    BokehLoadSalientModel,
    BokehSalientMask,
    BokehStackAdapter,
    BokehGenerateStack,
    BokehStackRendered,
    BokehStackFromImages,
    BokehSaveStack,
    BokehLoadStack,
    BokehLoadBokehDiff,
    BokehDiffRender,
    BokehLoadMagicBokeh,
    MagicBokehRender,
    BokehLoadAnyToBokeh,
    AnyToBokehRender,
    BokehMPIMasks,
]


class BokehExtension(ComfyExtension):
    """What comfy_entrypoint hands to ComfyUI."""

    async def get_node_list(self):
        return NODES
