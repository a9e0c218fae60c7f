"""The DINOv2 vision transformer that the depth networks share (bokehdepth_stage2 SPEC section 2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoints.loading import cast


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the transformer, and where the published models differ.

    width   of a token
    depth   number of blocks
    heads   of the attention; they divide the width
    taps    blocks (counted from 0) whose outputs are handed on, through the final norm
    """

    width: int
    depth: int
    heads: int
    taps: tuple[int, ...]
    grid: int = 37  # the position table is grid x grid: trained at 518 px
    patch: int = 14
    mlp_ratio: int = 4
    final_norm_eps: float = 1e-6  # UniDepthV2 has 1e-5 here, and 1e-6 inside the blocks like everybody
    position_offset: float | None = 0.1  # Depth Anything steps grid/(n + 0.1) through the table; None = by size, as UniDepthV2 does
    unused_registers: int = 0  # UniDepthV2 stores a register token that no pass uses
    squared_scale: bool = False  # logits times 1/head_width: what BokehDepth's fused attention on CUDA does by scaling twice


class ViT(nn.Module):
    """Pixels to tapped tokens. Names are those of the original checkpoints (below `pretrained.`)."""

    def __init__(self, config: ViTConfig, ops=nn):
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, width))
        if config.unused_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.unused_registers, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))  # used in training only; the files have it
        self.patch_embed = nn.Module()
        self.patch_embed.proj = ops.Conv2d(3, width, config.patch, stride=config.patch)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.depth))
        self.norm = ops.LayerNorm(width, eps=config.final_norm_eps)

    def forward(
        self,
        pixels: torch.Tensor,  # [B, 3, H, W] normalised, H and W multiples of the patch
    ) -> list[torch.Tensor]:
        """One [B, 1 + h w, width] per tap, normed; token 0 is the class token, the patches follow row by row."""
        from einops import rearrange

        x = self.patch_embed.proj(pixels)
        rows, columns = x.shape[-2:]
        x = rearrange(x, "b c h w -> b (h w) c")
        x = torch.cat([cast(self.cls_token, x).expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(rows, columns, x)
        taps = {}
        for i, block in enumerate(self.blocks[: max(self.config.taps) + 1]):
            x = block(x)
            if i in self.config.taps:
                taps[i] = self.norm(x)
        return [taps[i] for i in self.config.taps]

    def positions(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """[1, 1 + rows columns, width] the position table for this many patches, resized in float32, in the dtype of `like`."""
        from einops import rearrange

        grid, offset = self.config.grid, self.config.position_offset
        table = cast(self.pos_embed, like)
        if rows == columns == grid:
            return table
        cells = rearrange(table[:, 1:].float(), "1 (h w) c -> 1 c h w", h=grid)
        to = {"size": (rows, columns)} if offset is None else {"scale_factor": ((rows + offset) / grid, (columns + offset) / grid)}
        cells = F.interpolate(cells, mode="bicubic", align_corners=False, antialias=False, **to)
        return torch.cat([table[:, :1], rearrange(cells, "1 c h w -> 1 (h w) c").to(table)], dim=1)


class Block(nn.Module):
    """x += ls1 attention(norm1 x); x += ls2 mlp(norm2 x)."""

    def __init__(self, config: ViTConfig, ops):
        super().__init__()
        width, mlp_ratio = config.width, config.mlp_ratio
        self.norm1 = ops.LayerNorm(width, eps=1e-6)
        self.attn = Attention(config, ops)
        self.ls1 = LayerScale(width)
        self.norm2 = ops.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = ops.Linear(width, mlp_ratio * width)
        self.mlp.fc2 = ops.Linear(mlp_ratio * width, width)
        self.ls2 = LayerScale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class Attention(nn.Module):
    """Self-attention over all tokens; one matrix makes queries, keys and values, logits are scaled by head_width^-1/2."""

    def __init__(self, config: ViTConfig, ops):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.scale = config.heads / width if config.squared_scale else None  # None = head_width^-1/2
        self.qkv = ops.Linear(width, 3 * width)
        self.proj = ops.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from einops import rearrange

        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * cast(self.gamma, x)
