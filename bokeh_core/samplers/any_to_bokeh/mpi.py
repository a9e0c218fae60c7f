"""Multi-plane-image guidance: which pixels lie how far from the focus (paper, equation 2; SPEC section 2.3).

The released network is run with all its masks zero (SPEC section 0), so these maps do not change its pictures. They are here for the
switch that turns the masks on, for training, and as masks of their own.
"""

import torch

from ...optics.defocus import Defocus, clip_span
from .preparation import clip_range

PLANES = 4
PAPER, TRAINING, RELEASED = 1.0, 1.0, 1.5  # exponent of the focus disparity: equation 2, training loader, inference loader
_NO_FOCUS = 1e-6  # stands for focus^alpha where the focus disparity is 0 or less


def borders(focus: float, alpha: float = RELEASED, planes: int = PLANES) -> torch.Tensor:
    """[planes + 1] float32: base^(1 / focus^alpha) for base = 0, 1/planes, ..., 1. The inner ones part the regions.

    focus  disparity in focus, 0..1. Small ones push all borders to 0, so that nearly everything is in the last region
    """
    scale = focus**alpha if focus > 0 else _NO_FOCUS
    return torch.tensor([(i / planes) ** (1 / scale) for i in range(planes + 1)], dtype=torch.float32)


def regions(disparity: torch.Tensor, focus: torch.Tensor, alpha: float = RELEASED, planes: int = PLANES) -> torch.Tensor:
    """[B, H, W] uint8 0..planes-1: the number of borders strictly below |disparity - focus|; 0 holds what is in focus.

    disparity [B, H, W] 0..1, near = large; focus [B] 0..1
    """
    found = []
    for d, f in zip(disparity.float(), focus.tolist(), strict=True):
        inner = borders(f, alpha, planes)[1:-1].to(d.device)
        found.append(torch.bucketize((d - f).abs(), inner).to(torch.uint8))
    return torch.stack(found)


def regions_of(defocus: Defocus, alpha: float = RELEASED, planes: int = PLANES) -> torch.Tensor:
    """`regions` of every frame of a Defocus: its disparities and focus in the range of the whole clip, as the network gets them."""
    low, high = clip_range(clip_span(defocus.disparity), defocus.focus)
    return regions((defocus.disparity - low) / (high - low), (defocus.focus - low) / (high - low), alpha, planes)


def masks(region: torch.Tensor, level: int) -> torch.Tensor:
    """[B, H, W] float32 0 or 1: the planes up to `level`, from the focus outwards; level planes-1 is everything."""
    return (region <= level).float()


def level_of_stage(stage: str, index: int, planes: int = PLANES) -> int:
    """The plane up to which a stage of the UNet is meant to look: down block i up to i, mid block all, up block i up to planes-1-i.

    Read from the expression that the released code multiplies by zero (SPEC section 3.2); never active in the released runs.
    """
    return {"down": index, "mid": planes - 1, "up": planes - 1 - index}[stage]
