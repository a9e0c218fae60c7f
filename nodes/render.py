"""The node that turns an image and a defocus into a photograph."""

from comfy_api.latest import io

from ..bokeh_core.errors import BokehError
from ..bokeh_core.optics.defocus import fit_disparity
from . import host, inputs
from .schema import Defocus, choice, known, switch, whole

QUALITIES = ("fast", "reference")


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
                choice(
                    "quality",
                    QUALITIES,
                    "fast: disks scattered over ordered depth layers; for everyday use. "
                    "reference: rays through the aperture across the same layers; exact, and very much slower.",
                ),
                switch(
                    "linear",
                    "linear light",
                    "display (sRGB)",
                    "What the numbers of the image mean. Photos and videos: display (sRGB). "
                    "Linear light, as from EXR files or 3D renders, comes out linear again; values above 1 survive.",
                ),
                known(
                    io.Mask.Input,
                    "matte",
                    optional=True,
                    tooltip="The subject, white, with soft edges where hair or fur covers part of a pixel: one matte or one per frame, any "
                    "size. Its edge is believed more than the depth's. Wherever it is in depth; it need not be in focus.",
                ),
                known(
                    io.Image.Input,
                    "clean_plate",
                    optional=True,
                    tooltip="The scene without the subject, of the image's size: shot, or inpainted. Shows through where the subject "
                    "blurs. One plate or one per frame. Without a matte it stands for the farthest layer alone.",
                ),
                whole(
                    "rays",
                    1024,
                    64,
                    4096,
                    64,
                    "Used by quality 'reference': rays per pixel. Fewer are quicker and grainier.",
                    optional=True,
                    advanced=True,
                ),
                switch(
                    "snap_edges",
                    "at the colours",
                    "as in the depth",
                    "Where silhouettes are. At the colours: depth edges that are off by a few pixels move to where the colours change, for "
                    "soft or misplaced depth maps without a matte. With a matte this does nothing.",
                    optional=True,
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The image with bokeh, of the same size.")],
        )

    @classmethod
    def execute(
        cls, image, defocus, quality=QUALITIES[0], linear=False, matte=None, clean_plate=None, rays=1024, snap_edges=False
    ) -> io.NodeOutput:
        from ..bokeh_core.render import activation_bytes, render
        from ..bokeh_core.video.stabilisation import find_shots

        count = inputs.scene(image, defocus)
        frames, height, width, channels = image.shape
        if matte is not None:
            matte = inputs.mask(matte, "matte")
            _check_count("matte", matte, frames)
            matte = fit_disparity(matte.float(), len(matte), height, width)
        if clean_plate is not None:
            inputs.image(clean_plate, "clean_plate")
            _check_count("clean plate", clean_plate, frames)
            plates_height, plates_width = clean_plate.shape[1:3]
            if (plates_height, plates_width) != (height, width):
                raise BokehError(
                    f"The clean plate is {plates_width}x{plates_height} px and the image {width}x{height} px; expected the same view "
                    "at the same size. Scale or crop the plate."
                )
            clean_plate = clean_plate[..., :3].movedim(-1, 1)
        host.make_room(activation_bytes(height, width, defocus, matte=matte is not None, snap_edges=snap_edges))
        result = image.new_empty((count, height, width, channels), device=host.output_device())
        result[..., 3:] = image[..., 3:]
        step = host.progress()
        pictures = image[..., :3].movedim(-1, 1)
        render(
            pictures,
            defocus,
            linear=linear,
            quality=quality,
            rays=rays,
            matte=matte,
            clean_plate=clean_plate,
            snap_edges=snap_edges,
            shots=find_shots(_watched(pictures, step)) if frames > 1 else None,
            progress=step,
            device=host.compute_device(),
            out=result[..., :3].movedim(-1, 1),
        )
        return io.NodeOutput(result)


def _watched(pictures, step):
    """The pictures one by one, so that the search for cuts can be interrupted."""
    for picture in pictures:
        step(0, len(pictures))
        yield picture


def _check_count(name, batch, frames):
    if len(batch) not in (1, frames):
        raise BokehError(f"The {name} has {len(batch)} frames and the image {frames}; connect one for all frames, or one for each.")
