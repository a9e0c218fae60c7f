"""The nodes that estimate depth: loading a depth model, and running it over photos or a clip."""

from dataclasses import dataclass, field

import torch
from comfy_api.latest import io

from ..bokeh_core.checkpoints.catalogue import DEPTH_FOLDERS, entry
from ..bokeh_core.errors import BokehError
from . import host, inputs
from .schema import DepthModel, Geometry, choice, files, known, number, whole

host.register_folder(DEPTH_FOLDERS[0])

# Words of the widget `kind` and what they mean to bokeh_core.
KINDS = {
    "auto": "auto",
    "relative": "relative",
    "metric indoor (20 m)": "metric indoor",
    "metric outdoor (80 m)": "metric outdoor",
}
ATTENTION = ("single", "double")
FRAMES = ("one clip", "clip with cuts", "separate photos")
GUIDED, PLAIN = "follow the picture", "plain"


@dataclass(frozen=True)
class LoadedDepthModel:
    """A depth model under the host's memory management.

    remembered  what the model saw in the last bokeh stack, for Refine Depth
    """

    managed: host.Managed
    info: object
    remembered: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def patcher(self):
        return self.managed.patcher


class BokehLoadDepthModel(io.ComfyNode):
    """A depth model from a local file."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehLoadDepthModel",
            display_name="Load Depth Model (Bokeh)",
            category="bokeh/depth",
            description="Loads a depth model for Estimate Depth: Depth Anything V2 or Video Depth Anything, small, base or large, relative "
            "or in metres, MagicBokeh's depth model, UniDepth V2, and BokehDepth's DSFA models. What a file is, is told from its contents.",
            search_aliases=[
                "depth anything",
                "video depth anything",
                "unidepth",
                "bokehdepth",
                "dsfa",
                "depth model",
                "loader",
                "metric depth",
            ],
            inputs=[
                files(
                    "model",
                    host.model_files(*DEPTH_FOLDERS),
                    "A file in models/depthanything or models/geometry_estimation, subfolders included. For clips take a Video Depth "
                    "Anything file, which is steady over time; for a real lens one that gives metres.",
                ),
                choice(
                    "kind",
                    KINDS,
                    "What the model gives. auto: told from the file's name (metric, hypersim, vkitti), since the contents do not say. "
                    "Set it for renamed files. Relative depth has no unit; metric depth is in metres, up to the range the model learnt.",
                    optional=True,
                ),
                choice(
                    "attention",
                    ATTENTION,
                    "Only for Depth Anything V2 with DSFA. Its authors' programs scale the attention in two ways, and which one the "
                    "released weights need is not known. single: as their inference command. double: as their training.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                DepthModel.Output(display_name="depth model", tooltip="Connect to Estimate Depth, or a BokehDepth model to Refine Depth.")
            ],
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return True  # a file that is not there is explained below

    @classmethod
    def execute(cls, model=None, kind="auto", attention="single") -> io.NodeOutput:
        from ..bokeh_core.depth.checkpoint import build, read_depth_file, recognise

        small = entry("depth-anything-v2-small")
        get = f"put {small.file} from {small.page} (or another one, see this node's help) into models/{small.folder}"
        host.chosen(model, host.model_files(*DEPTH_FOLDERS), "depth model", get)
        path = host.model_path(model, *DEPTH_FOLDERS)
        info, tensors = recognise(read_depth_file(path), path, KINDS[kind], attention)
        # Not bfloat16: its eight bits would show as steps in the depth.
        managed = host.managed(lambda ops, some: build(info, some, ops), tensors, (torch.float16, torch.float32))
        return io.NodeOutput(LoadedDepthModel(managed, info))


class BokehEstimateDepth(io.ComfyNode):
    """Depth of photos or of a clip."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehEstimateDepth",
            display_name="Estimate Depth (Bokeh)",
            category="bokeh/depth",
            description="Estimates the depth of photos or of a clip, near bright, at exactly the picture's size and with edges that follow "
            "the picture. Connect either output to Set Focus and Blur; a real lens needs the geometry of a metric model.",
            search_aliases=["depth map", "depth anything", "video depth", "disparity", "z depth", "metric depth", "bokeh", "geometry"],
            inputs=[
                known(io.Image.Input, "image", tooltip="A photo, several photos, or the frames of a clip. Alpha is not looked at."),
                known(DepthModel.Input, "depth_model", tooltip="From Load Depth Model (Bokeh)."),
                choice(
                    "frames",
                    FRAMES,
                    "What the frames are. one clip: they share one range, so brightness means the same distance throughout, and video "
                    "models look at neighbours. clip with cuts: the same for each shot, cuts are found. separate photos: each has its "
                    "own range. A single photo is right in any of them.",
                ),
                whole(
                    "resolution",
                    518,
                    140,
                    2072,
                    14,
                    "Short side of the picture inside the model, in pixels; each side becomes a multiple of 14. 518 is what the models "
                    "were made for. More shows hair and twigs, costs time and memory, and may lose the large shapes.",
                ),
                choice(
                    "edges",
                    [GUIDED, PLAIN],
                    "How the model's small map is brought to the picture's size. follow the picture: edges snap to the picture's edges. "
                    "plain: smooth enlargement as the models' authors publish it.",
                ),
                number(
                    "steadiness",
                    0.0,
                    0.0,
                    1.0,
                    0.05,
                    "Smooths flicker of a clip along the motion in it, 0 off, 1 most. For photo models on clips; video models are steady "
                    "by themselves and ignore it.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="depth", tooltip="Depth as an image, near bright, 0 to 1, of the picture's size."),
                Geometry.Output(
                    display_name="geometry",
                    tooltip="Depth with its meaning: metres for a metric model, else relative. For Set Focus and Blur.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image, depth_model, frames, resolution, edges, steadiness=0.0) -> io.NodeOutput:
        from ..bokeh_core.depth.checkpoint import DepthModel as Network
        from ..bokeh_core.depth.clip import estimate_clip, near_bright
        from ..bokeh_core.depth.estimate import activation_bytes

        inputs.require(depth_model, LoadedDepthModel, "depth_model", "Load Depth Model (Bokeh)")
        managed, info = depth_model.managed, depth_model.info
        count, height, width = inputs.image(image).shape[:3]
        raw = torch.empty((count, height, width), device=host.output_device())
        clip = frames != FRAMES[2]

        def work(chunk):
            host.load([managed], activation_bytes(info, height, width, chunk, clip, resolution, managed.dtype.itemsize))
            return estimate_clip(
                Network(managed.network, info, managed.device, managed.dtype),
                _Frames(image),
                raw,
                frames_are=frames,
                resolution=resolution,
                guided=edges == GUIDED,
                steady=steadiness,
                chunk=chunk,
                progress=host.progress(),
            )

        starts = host.shrinking(work, min(4, count))
        grey = near_bright(raw, starts, info.metric, keep=info.metric)
        geometry = {"depth": raw} if info.metric else {"disparity": grey}
        geometry |= {"metric": info.metric, "image": image}
        depth = grey[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(depth, geometry, ui=host.preview(depth, cls))


class _Frames:
    """The frames of an image batch as bokeh_core takes them, one at a time and as often as needed."""

    def __init__(self, image):
        self.image = image

    def __iter__(self):
        for i, frame in enumerate(self.image):
            if bool(frame[..., :3].isnan().any()):
                raise BokehError(f"Frame {i} of the image holds values that are not numbers (NaN). Repair it before depth is estimated.")
            yield frame[..., :3].movedim(-1, 0).float().clamp(0, 1)
