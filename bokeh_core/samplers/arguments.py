"""What the samplers are called with: networks in their places, pictures that belong to a defocus, and work that may be tried again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import BokehError
from ..optics.defocus import Defocus


@dataclass(frozen=True)
class Placed:
    """A network, where its inputs go, and the dtype it computes in. A host may hand in its own object with these three attributes."""

    network: nn.Module
    device: torch.device
    dtype: torch.dtype


def place(build: Callable, tensors: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> Placed:
    """The network of build(ops, tensors) on a device, for use without a host."""
    return Placed(build(nn, {name: tensor.to(device, dtype) for name, tensor in tensors.items()}), device, dtype)


def at_once(work: Callable, size: int, smallest: int = 1):
    """work(size) without a second try: what a sampler does where no host shrinks the work when memory runs out."""
    return work(size)


def check_pictures(image: torch.Tensor, defocus: Defocus | None, what: str = "picture") -> None:
    """Raise BokehError unless the image is [B, 3, H, W] and its defocus, if any, has that size: its radii are in px of that image.

    what  the image's name for messages
    """
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise BokehError(f"The {what} has shape {list(image.shape)}; expected [frames, 3, height, width] with no zero size.")
    if defocus is not None and defocus.disparity.shape[-2:] != image.shape[-2:]:
        (rows, columns), (height, width) = defocus.disparity.shape[-2:], image.shape[-2:]
        raise BokehError(f"The defocus is {columns}x{rows} px but the {what} is {width}x{height} px; make the defocus from this {what}.")
