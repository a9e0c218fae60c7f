"""The dense prediction head of the depth networks: four taps of the ViT to one map (bokehdepth_stage2 SPEC section 6)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# The last layers compute in float32: half precision would step a depth of 500 by 0.25 or more, and the steps would show as terraces
# in the blur. (Video Depth Anything was published so.)
IN_FLOAT32 = ".scratch.output_conv2."


@dataclass(frozen=True)
class DPTConfig:
    """width of the ViT's tokens; features of the fusion; out_channels of the four levels, finest first."""

    width: int
    features: int
    out_channels: tuple[int, int, int, int]


class DPTHead(nn.Module):
    """Levels 0..3 have 4, 2, 1 and 1/2 times the resolution of the patches; they are fused from the coarsest to the finest.

    Names are those of the original checkpoints (below `depth_head.` or `head.`).
    """

    def __init__(self, config: DPTConfig, ops=nn):
        super().__init__()
        features, channels = config.features, config.out_channels
        self.projects = nn.ModuleList(ops.Conv2d(config.width, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            [
                ops.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                ops.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                ops.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()
        for k, c in enumerate(channels, start=1):
            setattr(self.scratch, f"layer{k}_rn", ops.Conv2d(c, features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{k}", Fusion(features, ops))
        self.scratch.output_conv1 = ops.Conv2d(features, features // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(ops.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(inplace=True), ops.Conv2d(32, 1, 1))

    def project(
        self,
        tap: torch.Tensor,  # [B, 1 + h w, width]
        level: int,
        rows: int,
    ) -> torch.Tensor:
        """[B, out_channels[level], h, w] the patches of a tap as a map, before it takes the level's resolution."""
        from einops import rearrange

        return self.projects[level](rearrange(tap[:, 1:], "b (h w) c -> b c h w", h=rows))

    def level(self, projected: torch.Tensor, level: int) -> torch.Tensor:
        """[B, features, ...] a projected map (resized already at the levels 2 and 3) ready to be fused."""
        resized = self.resize_layers[level](projected) if level < 2 else projected
        return getattr(self.scratch, f"layer{level + 1}_rn")(resized)

    def finish(
        self,
        path: torch.Tensor,  # [B, features, 2 h, 2 w] levels 3 and 2 fused
        projected: tuple[torch.Tensor, torch.Tensor],  # levels 0 and 1, [B, out_channels, h, w]
        size: tuple[int, int],  # of the result
    ) -> torch.Tensor:
        """[B, H, W] float32, before the last activation."""
        fine, middle = projected
        rows, columns = path.shape[-2:]
        path = self.scratch.refinenet2(path, self.level(middle, 1), size=(2 * rows, 2 * columns))
        path = self.scratch.refinenet1(path, self.level(fine, 0), size=(4 * rows, 4 * columns))
        path = self.scratch.output_conv1(path)
        path = F.interpolate(path.float(), size, mode="bilinear", align_corners=True)
        return self.scratch.output_conv2(path)[:, 0]

    def forward(
        self,
        taps: list[torch.Tensor],  # four times [B, 1 + h w, width], finest level first
        size: tuple[int, int],  # of the pixels: (14 h, 14 w)
        patch: int = 14,
    ) -> torch.Tensor:
        """[B, H, W] float32, before the last activation."""
        rows, columns = size[0] // patch, size[1] // patch
        coarse = self.resize_layers[3](self.project(taps[3], 3, rows))
        path = self.scratch.refinenet4(self.level(coarse, 3), size=(rows, columns))
        path = self.scratch.refinenet3(path, self.level(self.project(taps[2], 2, rows), 2), size=(2 * rows, 2 * columns))
        return self.finish(path, (self.project(taps[0], 0, rows), self.project(taps[1], 1, rows)), size)


class Fusion(nn.Module):
    """One refinement step: add a finer level, refine, enlarge."""

    def __init__(self, features: int, ops):
        super().__init__()
        self.out_conv = ops.Conv2d(features, features, 1)
        self.resConfUnit1 = ResidualConvUnit(features, ops)  # of refinenet4 it is in every file and never used
        self.resConfUnit2 = ResidualConvUnit(features, ops)

    def forward(self, path: torch.Tensor, skip: torch.Tensor | None = None, *, size: tuple[int, int]) -> torch.Tensor:
        if skip is not None:
            path = path + self.resConfUnit1(skip)
        # Published the other way round; a 1x1 convolution commutes with bilinear weights (they add up to 1) and is 4 times cheaper here.
        path = self.out_conv(self.resConfUnit2(path))
        return F.interpolate(path, size, mode="bilinear", align_corners=True)


class ResidualConvUnit(nn.Module):
    """x + conv2(relu(conv1(relu x)))."""

    def __init__(self, features: int, ops):
        super().__init__()
        self.conv1 = ops.Conv2d(features, features, 3, padding=1)
        self.conv2 = ops.Conv2d(features, features, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x)), inplace=True))
