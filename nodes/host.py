"""The only file that talks to ComfyUI's services: devices, memory, progress, interruption and previews."""

import torch
from comfy import model_management
from comfy.utils import ProgressBar
from comfy_api.latest import ui


def compute_device() -> torch.device:
    """Where the host wants work to be done."""
    return model_management.get_torch_device()


def output_device() -> torch.device:
    """Where the host wants the results of nodes to lie."""
    return model_management.intermediate_device()


def make_room(size: int) -> None:
    """Ask the host to unload models until `size` bytes are free on the compute device."""
    model_management.free_memory(size, compute_device())


def progress():
    """A progress callback for bokeh_core that moves the node's bar and raises when the user interrupts."""
    bar = ProgressBar(1)

    def step(done: float, total: int) -> None:
        model_management.throw_exception_if_processing_interrupted()  # the bar alone checks too rarely: its updates are throttled
        bar.update_absolute(round(done * 100), total * 100)  # parts of a frame count

    return step


def preview(images: torch.Tensor, node, most: int = 4) -> ui.PreviewImage:
    """Show images [B,H,W,3] on the node: all of them, or `most` spread evenly from the first to the last."""
    count = len(images)
    if count > most:
        images = images[[round(i * (count - 1) / (most - 1)) for i in range(most)]]
    return ui.PreviewImage(images, cls=node)
