"""Overlapping tiles of a large picture or latent, put together with weights. Every sampler brings its own grid and window."""

import torch


class Blend:
    """Weighted mean of overlapping tiles.

    shape   of the whole, [..., H, W]
    device, dtype  of the sums; float32 keeps the seams exact
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | None = None, dtype: torch.dtype = torch.float32):
        self.total = torch.zeros(shape, device=device, dtype=dtype)
        self.weight = torch.zeros(shape[-2:], device=device, dtype=dtype)

    def add(self, tile: torch.Tensor, top: int, left: int, window: torch.Tensor) -> None:
        """Add a tile [..., h, w] at (top, left), weighted by window [h, w] >= 0."""
        height, width = tile.shape[-2:]
        window = window.to(self.weight)
        self.total[..., top : top + height, left : left + width] += tile.to(self.total) * window
        self.weight[top : top + height, left : left + width] += window

    def result(self) -> torch.Tensor:
        """[..., H, W] the mean; 0 where no tile has weight."""
        return torch.where(self.weight > 0, self.total / self.weight.where(self.weight > 0, torch.ones_like(self.weight)), 0.0)
