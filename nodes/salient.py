"""The nodes that find the subject of a photo: loading the salient-object network, and making a mask with it."""

import torch
from comfy_api.latest import io

from . import host, inputs
from .schema import SalientModel, files, known, number

FOLDER = "salient"
host.register_folder(FOLDER, "")  # the published file, model-40, has no suffix


class BokehLoadSalientModel(io.ComfyNode):
    """The salient-object network from a local file."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehLoadSalientModel",
            display_name="Load Salient Object Model (Bokeh)",
            category="bokeh/optics",
            description="Loads LDF, the network MagicBokeh's authors find the subject with, for Find Subject. Other files are refused.",
            search_aliases=["ldf", "model-40", "salient object", "saliency", "subject", "segmentation", "loader", "bokeh"],
            inputs=[
                files("model", host.model_files(FOLDER), "A file in models/salient, subfolders included: model-40 of the LDF authors.")
            ],
            outputs=[SalientModel.Output(display_name="salient model", tooltip="Connect to Find Subject.")],
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return True  # a file that is not there is explained below

    @classmethod
    def execute(cls, model=None) -> io.NodeOutput:
        from ..bokeh_core.salient.ldf import build, folded_tensors, read_ldf

        get = "put model-40 (100 MB; linked on https://github.com/weijun88/LDF) into models/salient"
        host.chosen(model, host.model_files(FOLDER), "salient-object model", get)
        tensors = folded_tensors(read_ldf(host.model_path(model, FOLDER)), model)
        return io.NodeOutput(host.managed(build, tensors, (torch.float32,)))


class BokehSalientMask(io.ComfyNode):
    """A mask of what a photo is about."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehSalientMask",
            display_name="Find Subject (Bokeh)",
            category="bokeh/optics",
            description="Finds the subject of a photo as a soft mask. Connect it to the mask of Set Focus and Blur, and the focus "
            "lies on it; or to MagicBokeh, whose authors focus this way.",
            search_aliases=["salient object", "saliency", "subject mask", "auto focus", "segmentation", "ldf", "bokeh"],
            inputs=[
                known(io.Image.Input, "image", tooltip="A photo, or several; each is looked at by itself. Alpha is not looked at."),
                known(SalientModel.Input, "salient_model", tooltip="From Load Salient Object Model (Bokeh)."),
                number(
                    "threshold",
                    0.0,
                    0.0,
                    1.0,
                    0.05,
                    "0: a soft mask. Above: white where the subject is at least this likely, else black; 0.5 is the usual outline, 0.003 "
                    "takes every trace, as MagicBokeh's focus rule does.",
                    optional=True,
                ),
            ],
            outputs=[io.Mask.Output(display_name="mask", tooltip="White on the subject, 0 to 1, of the picture's size.")],
        )

    @classmethod
    def execute(cls, image, salient_model, threshold=0.0) -> io.NodeOutput:
        from ..bokeh_core.salient.ldf import activation_bytes, salient_masks

        count, height, width = inputs.image(image).shape[:3]
        masks = torch.empty((count, height, width), device=host.output_device())
        step = host.progress()

        def work(chunk):
            host.load([salient_model], activation_bytes(height, width, chunk))
            for start in range(0, count, chunk):
                step(start, count)
                frames = image[start : start + chunk, ..., :3].movedim(-1, 1)
                masks[start : start + chunk] = salient_masks(salient_model.network, frames, salient_model.device)
            step(count, count)

        host.shrinking(work, min(4, count))
        if threshold > 0:
            masks = (masks >= threshold).float()
        return io.NodeOutput(masks, ui=host.preview(masks[..., None].expand(-1, -1, -1, 3), cls))
