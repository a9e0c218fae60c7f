"""Depth Anything V2: one picture to one depth map (bokehdepth_stage2 SPEC sections 2 and 6; magicbokeh SPEC section 11)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .dpt import DPTConfig, DPTHead
from .vit import ViT, ViTConfig


@dataclass(frozen=True)
class DepthAnythingConfig:
    """max_depth: metres at the far end of a metric model's range; None for a relative model."""

    vit: ViTConfig
    head: DPTConfig
    max_depth: float | None = None


class DepthAnything(nn.Module):
    """Pixels to a map of the same size: inverse depth of unknown scale and shift (near = large), or metres."""

    def __init__(self, config: DepthAnythingConfig, ops=nn):
        super().__init__()
        self.config = config
        self.pretrained = ViT(config.vit, ops)
        self.depth_head = DPTHead(config.head, ops)

    def forward(
        self,
        pixels: torch.Tensor,  # [B, 3, H, W] normalised, H and W multiples of 14
    ) -> torch.Tensor:
        """[B, H, W] float32."""
        return self.depth(self.pretrained(pixels), pixels.shape[-2:])

    def depth(
        self,
        taps: list[torch.Tensor],  # of the ViT, possibly rewritten since
        size: tuple[int, int],  # H, W
    ) -> torch.Tensor:
        """[B, H, W] float32."""
        raw = self.depth_head(taps, size, self.config.vit.patch)
        return F.relu(raw) if self.config.max_depth is None else torch.sigmoid(raw) * self.config.max_depth
