"""The nodes that get depth out of a bokeh stack: by a network with DSFA, or by measuring blur."""

from comfy_api.latest import io

from ..bokeh_core.errors import BokehError
from ..bokeh_core.optics.lens import Lens as CoreLens
from ..bokeh_core.optics.stack import BokehStack
from . import host, inputs
from .defocus import disparity_of
from .depth import GUIDED, PLAIN, LoadedDepthModel
from .schema import FIDELITY, Depth, DepthModel, Geometry, Lens, Stack, choice, known, number, switch, whole

AS_GIVEN, NONE = "as given", "none"
BEHIND, FRONT, FROM_DEPTH = "behind the focus", "in front of the focus", "from depth"
SIDES = {BEHIND: "behind", FRONT: "in front", FROM_DEPTH: "from depth"}


class BokehRefineDepth(io.ComfyNode):
    """Depth of a photo, refined by a bokeh stack of it."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehRefineDepth",
            display_name="Refine Depth by Bokeh Stack",
            category="bokeh/depth",
            description="Estimates depth in metres from a photo and its bokeh stack, by a BokehDepth (DSFA) model. UniDepth V2 with DSFA "
            "also estimates the camera and how sure it is. The other K mode costs little: what the pictures show is remembered.",
            search_aliases=["bokehdepth", "dsfa", "depth from defocus", "unidepth", "metric depth", "focal stack", "bokeh"],
            inputs=[
                known(io.Image.Input, "image", tooltip="The sharp photo the stack was made of. The depth gets its size."),
                known(Stack.Input, "stack", tooltip="From Generate Bokeh Stack, Render Bokeh Stack, Bokeh Stack From Images or Load."),
                known(DepthModel.Input, "depth_model", tooltip="A BokehDepth (DSFA) model from Load Depth Model (Bokeh)."),
                choice(
                    "k",
                    [AS_GIVEN, NONE],
                    "What the model is told of the blur strengths. as given: the stack's K, as its authors do; with 10 and more the "
                    "blurred pictures count little. none: zeros, with which UniDepth's release was probably trained. Try both.",
                ),
                whole(
                    "resolution",
                    518,
                    140,
                    2072,
                    14,
                    "Short side of the pictures inside the model, in pixels. UniDepth: 518 stands for 200 000 to 600 000 pixels. All "
                    "pictures of the stack are read at it, so time and memory grow with their number.",
                ),
                choice(
                    "edges",
                    [GUIDED, PLAIN],
                    "How the model's small map is brought to the picture's size. follow the picture: edges snap to the picture's edges. "
                    "plain: smooth enlargement as the models' authors publish it.",
                ),
                choice(
                    "fidelity",
                    FIDELITY,
                    "best: UniDepth estimates the camera, and errors of the published program are mended. as published: made-up camera "
                    "(focal length 0.7 of the width), and wrong results for very wide, tall or some odd sizes.",
                ),
                known(
                    Lens.Input,
                    "lens",
                    optional=True,
                    tooltip="A real lens from Choose Lens: UniDepth uses its focal length and sensor instead of estimating the camera.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="depth", tooltip="Depth as an image, near bright, 0 to 1, of the photo's size."),
                Geometry.Output(
                    display_name="geometry",
                    tooltip="Depth in metres and, from UniDepth, the camera (intrinsics in pixels). For Set Focus and Blur.",
                ),
                io.Mask.Output(
                    display_name="confidence",
                    tooltip="How sure the model is, 1 most. Only UniDepth tells; 1 everywhere from Depth Anything.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image, stack, depth_model, k, resolution, edges, fidelity, lens=None) -> io.NodeOutput:
        from functools import partial

        from ..bokeh_core.depth import refine
        from ..bokeh_core.depth.checkpoint import DepthModel as Network
        from ..bokeh_core.depth.clip import NEAREST, near_bright
        from ..bokeh_core.depth.preprocessing import to_size
        from ..bokeh_core.depth.unidepth import BEST, PIPELINE
        from ..bokeh_core.depth.upsampling import guided_upsample

        inputs.require(depth_model, LoadedDepthModel, "depth_model", "Load Depth Model (Bokeh)")
        inputs.require(stack, BokehStack, "stack", "Generate Bokeh Stack")
        photo, managed, info = inputs.one(image).clamp(0, 1), depth_model.managed, depth_model.info
        refine.require_dsfa(info)
        height, width = photo.shape[1:]
        stack = BokehStack(photo, stack.frames, stack.k, stack.per_dioptre, stack.source, stack.settings).fitted(height, width)
        quirks, progress = dict(zip(FIDELITY, (BEST, PIPELINE), strict=True))[fidelity], host.progress()
        camera = None if lens is None else inputs.require(lens, CoreLens, "lens", "Choose Lens").intrinsics(height, width)
        upsample = None
        if edges == GUIDED and quirks == BEST:
            upsample = partial(guided_upsample, align_corners=info.align_corners, metric=True)
        host.load([managed], refine.activation_bytes(info, height, width, len(stack.k), resolution, managed.dtype.itemsize))
        model = Network(managed.network, info, managed.device, managed.dtype)
        word = refine.digest(stack, resolution, fidelity)
        features = depth_model.remembered.get(word)
        if features is None:
            features = refine.encode(model, photo, stack.frames, resolution=resolution, quirks=quirks, progress=progress)
            depth_model.remembered.clear()
            depth_model.remembered[word] = features.to(host.output_device())
        found = refine.decode(model, features, refine.strengths(stack, k), camera=camera, upsample=upsample, image=photo, progress=progress)
        here = host.output_device()
        metres, confidence = (  # as published the maps may have another size than the photo
            to_size(x[None].float(), (height, width), align_corners=False).to(here) for x in (found.depth, found.confidence)
        )
        metres = metres.clamp(min=NEAREST)
        geometry = {"depth": metres, "metric": True, "image": image}
        if found.intrinsics is not None:
            geometry["intrinsics"] = found.intrinsics[None].to(here)
        depth = near_bright(metres, [0], True)[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(depth, geometry, confidence, ui=host.preview(depth, cls))


class BokehDepthFromSweep(io.ComfyNode):
    """Depth measured from the blur of a stack, without a model."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehDepthFromSweep",
            display_name="Depth From Aperture Sweep",
            category="bokeh/depth",
            description="Measures how much every pixel is blurred in each picture of a bokeh stack, and computes depth from it in closed "
            "form. Needs no model. For rendered stacks and photographed ones: tripod, same focus, growing aperture.",
            search_aliases=["depth from defocus", "aperture sweep", "blur estimation", "bokeh", "focal stack", "depth"],
            inputs=[
                known(Stack.Input, "stack", tooltip="From Render Bokeh Stack, Bokeh Stack From Images, Generate Bokeh Stack or Load."),
                choice(
                    "side",
                    SIDES,
                    "Where the scene lies; the blur itself does not tell. behind the focus: the nearest thing is sharp. in front of the "
                    "focus: the farthest is. from depth: both sides, told apart by a connected rough depth map.",
                ),
                number(
                    "focus_distance",
                    2.0,
                    0.01,
                    100000.0,
                    0.1,
                    "Used by stacks whose K counts per dioptre (a real lens): metres from the camera to what is sharp. The depth is then "
                    "in metres.",
                ),
                switch(
                    "as_measured",
                    "as measured",
                    "fill unsure places",
                    "Places without texture, and a few pixels along edges, cannot be measured. Off: they take over what sure places "
                    "around them say.",
                ),
                choice(
                    "edges",
                    [GUIDED, PLAIN],
                    "How the map, measured at a width of at most 512 pixels, is brought to the picture's size. follow the picture: edges "
                    "snap to the picture's edges. plain: smooth.",
                ),
                known(
                    io.MultiType.Input,
                    "depth",
                    Depth,
                    optional=True,
                    tooltip="Used by side 'from depth': any depth of the sharp picture, near bright. It says which side of the focus a "
                    "pixel lies on, nothing else.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="depth", tooltip="Depth as an image, near bright, 0 to 1, of the sharp picture's size."),
                Geometry.Output(
                    display_name="geometry",
                    tooltip="The same with its meaning: metres for a stack with K per dioptre, else relative. For Set Focus and Blur.",
                ),
                io.Mask.Output(display_name="confidence", tooltip="How sure the measurement is, 1 most; low without texture and at edges."),
            ],
        )

    @classmethod
    def execute(cls, stack, side, focus_distance=2.0, as_measured=False, edges=GUIDED, depth=None) -> io.NodeOutput:
        from functools import partial

        from ..bokeh_core.depth.clip import near_bright
        from ..bokeh_core.depth.sweep import activation_bytes, depth_from_sweep
        from ..bokeh_core.depth.upsampling import guided_upsample

        inputs.require(stack, BokehStack, "stack", "Render Bokeh Stack")
        sides = None if depth is None else _one_map(depth)
        height, width = stack.reference.shape[-2:]
        host.make_room(activation_bytes(height, width, len(stack.k)))
        found = depth_from_sweep(
            stack,
            side=SIDES[side],
            focus_distance=focus_distance,
            depth=sides,
            fill=not as_measured,
            upsample=partial(guided_upsample, align_corners=False) if edges == GUIDED else None,
            device=host.compute_device(),
            progress=host.progress(),
        )
        here = host.output_device()
        disparity = found.disparity[None].to(here)
        grey = near_bright(disparity, [0], False)
        geometry = {"depth": disparity.reciprocal()} if found.metric else {"disparity": grey}
        geometry |= {"metric": found.metric, "image": stack.reference.movedim(0, -1)[None]}
        picture = grey[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(picture, geometry, found.confidence[None].to(here), ui=host.preview(picture, cls))


def _one_map(depth):
    """[h, w] disparity of whatever is connected as depth."""
    disparity, _ = disparity_of(inputs.depth(depth))
    if len(disparity) != 1:
        raise BokehError(f"The depth has {len(disparity)} frames; expected one, of the stack's sharp picture.")
    return disparity[0]
