"""The node that turns an image and a defocus into a photograph."""

from comfy_api.latest import io

from ..bokeh_core.errors import BokehError
from ..bokeh_core.render import QUALITIES, render
from . import host
from .schema import Defocus, choice, known, switch

BYTES_PER_PIXEL = 1000  # working memory of one frame, measured generously


class BokehRender(io.ComfyNode):
    """Physically based depth of field, no model needed."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehRender",
            display_name="Render Bokeh",
            category="bokeh/render",
            description="Renders depth of field as a lens does: light spreads over disks, near blur covers what lies behind it. "
            "Needs no model; works on CPU and GPU. The result has exactly the size of the input.",
            search_aliases=["bokeh", "dof", "depth of field", "lens blur", "defocus", "refocus", "depth blur", "portrait mode"],
            inputs=[
                known(io.Image.Input, "image", tooltip="The sharp photo or the frames of a clip. Alpha, if any, is kept as it is."),
                known(Defocus.Input, "defocus", tooltip="Depth, focus and blur strength from the node Set Focus and Blur."),
                choice("quality", QUALITIES, "fast: scattered disks over ordered depth layers, in linear light."),
                switch(
                    "linear",
                    "linear light",
                    "display (sRGB)",
                    "What the numbers of the image mean. Photos and videos: display (sRGB). "
                    "Linear light, as from EXR files or 3D renders, comes out linear again; values above 1 survive.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The image with bokeh, of the same size.")],
        )

    @classmethod
    def execute(cls, image, defocus, quality=QUALITIES[0], linear=False) -> io.NodeOutput:
        frames, (_, height, width, channels) = len(image), image.shape
        steps = len(defocus.focus)
        if frames != steps and 1 not in (frames, steps):
            raise BokehError(
                f"The image has {frames} frames and the defocus {steps}; the counts must be equal, or one of them 1. "
                "Connect the same frames to both nodes."
            )
        if channels not in (3, 4):
            raise BokehError(f"The image has {channels} channels; expected 3 (RGB) or 4 (RGB and alpha).")
        host.make_room(height * width * BYTES_PER_PIXEL)
        result = image.new_empty((max(frames, steps), height, width, channels), device=host.output_device())
        result[..., 3:] = image[..., 3:]
        render(
            image[..., :3].movedim(-1, 1),
            defocus,
            linear=linear,
            quality=quality,
            progress=host.progress(),
            device=host.compute_device(),
            out=result[..., :3].movedim(-1, 1),
        )
        return io.NodeOutput(result)
