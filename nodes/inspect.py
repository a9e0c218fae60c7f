"""The node that says how close one picture is to another."""

from comfy_api.latest import io, ui

from ..bokeh_core.errors import BokehError
from ..bokeh_core.optics.defocus import Defocus as CoreDefocus
from . import host, inputs
from .schema import Defocus, known

EDGE_BAND = 8  # pixels


class BokehMeasure(io.ComfyNode):
    """Scores of a result against the truth."""

    @classmethod
    def define_schema(cls):
        return known(
            io.Schema,
            node_id="BokehMeasure",
            display_name="Measure Against Truth",
            category="bokeh/inspect",
            description="Compares a result with the true picture: whole, at depth edges and where it should be sharp; "
            "for clips also how steady it is. Shows the scores on the node.",
            search_aliases=["compare", "psnr", "ssim", "metrics", "quality", "difference", "flicker", "benchmark", "evaluate"],
            is_output_node=True,
            inputs=[
                known(io.Image.Input, "result", tooltip="The picture or clip to judge. Values are compared as they are, cut to 0..1."),
                known(io.Image.Input, "truth", tooltip="What it should be, of the same size: one picture for all frames, or one for each."),
                known(
                    io.Mask.Input,
                    "mask",
                    optional=True,
                    tooltip="Only white pixels count for the PSNR scores: one mask or one per frame, of the result's size.",
                ),
                known(
                    Defocus.Input,
                    "defocus",
                    optional=True,
                    tooltip="The defocus the truth was made with, from Set Focus and Blur. Needed for the edge and in-focus scores.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="psnr", tooltip="Peak signal to noise ratio in dB over all frames; higher is better."),
                io.Float.Output(display_name="ssim", tooltip="Structural similarity, at most 1; higher is better."),
                io.Float.Output(display_name="edge psnr", tooltip=f"PSNR within {EDGE_BAND} pixels of depth edges. Needs the defocus."),
                io.Float.Output(display_name="in-focus psnr", tooltip="PSNR where the blur is at most half a pixel. Needs the defocus."),
                io.Float.Output(display_name="rm", tooltip="Clips: mean error of the change from frame to frame, 0..1; lower is better."),
                io.Float.Output(display_name="flicker", tooltip="Clips: mean change where the truth stands still, 0..1; lower is better."),
                io.String.Output(display_name="table", tooltip="The scores as a Markdown table."),
            ],
        )

    @classmethod
    def execute(cls, result, truth, mask=None, defocus=None) -> io.NodeOutput:
        from ..bokeh_core.metrics.compare import compare

        frames, height, width = inputs.image(result, "result").shape[:3]
        inputs.image(truth, "truth")
        if mask is not None:
            mask = inputs.mask(mask)
        if defocus is not None:
            inputs.require(defocus, CoreDefocus, "defocus", "Set Focus and Blur")
        depth = None if defocus is None else defocus.disparity
        for name, batch, size in (
            ("truth", truth, truth.shape[1:3]),
            ("mask", mask, mask is not None and mask.shape[1:]),
            ("defocus", depth, depth is not None and depth.shape[1:]),
        ):
            if batch is None:
                continue
            if tuple(size) != (height, width):
                raise BokehError(f"The {name} is {size[1]}x{size[0]} px and the result {width}x{height} px; expected the same size.")
            if len(batch) not in (1, frames):
                raise BokehError(f"The {name} has {len(batch)} frames and the result {frames}; connect one for all, or one for each.")
        if min(height, width) < 6:
            raise BokehError(f"The result is {width}x{height} px; scores need at least 6x6 px.")

        def channels_first(batch):
            return batch[..., :3].movedim(-1, 1)

        found = compare(channels_first(result), channels_first(truth), mask, defocus, host.progress())
        scores = (found.psnr, found.ssim, found.edges, found.in_focus, found.rm, found.flicker)
        table = _table(frames, *scores)
        return io.NodeOutput(*scores, table, ui=ui.PreviewText(table))


def _table(frames, whole, likeness, edges, sharp, change, restless):
    rows = [
        ("PSNR", f"{whole:.2f} dB"),
        ("SSIM", f"{likeness:.4f}"),
        (f"PSNR, {EDGE_BAND} px around edges", f"{edges:.2f} dB"),
        ("PSNR in focus", f"{sharp:.2f} dB"),
        ("RM", f"{change:.5f}"),
        ("flicker", f"{restless:.5f}"),
        ("frames", f"{frames}"),
    ]
    rows = [("score", "value"), ("---", "---"), *((name, value) for name, value in rows if not value.startswith("nan"))]
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"| {name.ljust(left)} | {value.ljust(right)} |" for name, value in rows)
