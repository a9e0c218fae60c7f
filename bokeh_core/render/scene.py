"""The scene model every back end renders: ordered, complete layers (RENDERERS.md, section 0)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layer:
    """One surface. Complete: colour and disparity are defined everywhere, also where the layer is hidden or absent.

    color      [3, H, W] linear light, not premultiplied by alpha
    alpha      [H, W] 0..1 coverage
    disparity  [H, W] larger = nearer, in the unit of the focus
    plane      (d0, gx, gy) when disparity is exactly d0 + gx*x + gy*y with x, y in pixels from the centre of pixel (0, 0); else None
    """

    color: torch.Tensor
    alpha: torch.Tensor
    disparity: torch.Tensor
    plane: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Scene:
    """Layers ordered back to front: layers[0] is the farthest.

    estimated  guessed from one picture
    numbers    of layers cut from one picture: the interval between the cuts that each is, 0 = below the lowest
    """

    layers: tuple[Layer, ...]
    estimated: bool = False
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class View:
    """Which part of the frame that a lens sees a picture is; the axis of the lens is in the frame's middle.

    height, width  of the whole frame, px
    top, left      of the frame's pixels, the picture's first
    asked          rows and columns of the picture that are asked for: elsewhere the result may be anything
    """

    height: int
    width: int
    top: int
    left: int
    asked: tuple[slice, slice]

    @property
    def axis(self) -> tuple[float, float]:
        """Row and column of the lens's axis, in pixels of the picture."""
        return (self.height - 1) / 2 - self.top, (self.width - 1) / 2 - self.left


def whole(height: int, width: int) -> View:
    """The view of a picture that is the whole frame."""
    return View(height, width, 0, 0, (slice(0, height), slice(0, width)))
