"""A bokeh stack made by the physical renderer: the same picture, depth and focus with several blur strengths."""

from dataclasses import replace

import torch

from ..errors import BokehError
from ..optics.defocus import Defocus
from ..optics.stack import BokehStack, stack_radius
from . import Progress, render


def of_strength(defocus: Defocus, k: float, *, per_dioptre: bool) -> Defocus:
    """The same defocus with the blur of a stack's K (see `optics.stack.stack_radius`)."""
    return replace(defocus, k=torch.full_like(defocus.k, stack_radius(k, defocus, per_dioptre=per_dioptre)))


def render_stack(
    image: torch.Tensor,
    defocus: Defocus,
    k: list[float],
    *,
    per_dioptre: bool = False,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> BokehStack:
    """A stack of one picture.

    image        [3, H, W] display-encoded 0..1
    defocus      of one frame; its depth, focus and aperture are used, its strength is replaced by each K
    k            px of blur radius on a 512 px wide picture, of the whole depth range or per 1/m (per_dioptre)
    progress     (frames done, N), parts of a frame counted
    device       where to compute
    """
    if len(defocus.focus) != 1:
        raise BokehError(f"The defocus has {len(defocus.focus)} frames; a bokeh stack is made of one picture. Connect a single photo.")
    frames = torch.empty((len(k), *image.shape), dtype=torch.float32, device=image.device)
    for i, value in enumerate(k):

        def share(done: float, total: int, i: int = i) -> None:
            if progress is not None:
                progress(i + done / total, len(k))

        render(image[None], of_strength(defocus, value, per_dioptre=per_dioptre), progress=share, device=device, out=frames[i : i + 1])
    return BokehStack(image, frames.clamp(0, 1), k, per_dioptre, "rendered")
