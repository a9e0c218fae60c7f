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
    """Layers ordered back to front: layers[0] is the farthest. `estimated` marks layers guessed from one picture."""

    layers: tuple[Layer, ...]
    estimated: bool = False
