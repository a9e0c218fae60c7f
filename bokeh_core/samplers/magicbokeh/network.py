"""The networks of MagicBokeh: VAE halves, ControlNet and pruned UNet (SPEC sections 2, 4 and 5), on blocks of diffusers.

Latents are [B, 4, h, w], already scaled; pictures [B, 3, 8h, 8w] in -1..1. Everything runs at timestep 999 and without text.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .focus_aware_attention import FocusAwareAttention, Regions, part, token_mask

TIMESTEP = 999
LATENT_CELL = 8  # px of the picture per latent


def token_grids(height: int, width: int, levels: int = 4) -> list[tuple[int, int]]:
    """Sizes of the UNet's token grids for a latent of this size, the largest first."""
    grids = [(height, width)]
    while len(grids) < levels:
        height, width = (height + 1) // 2, (width + 1) // 2
        grids.append((height, width))
    return grids


def focus_regions(mask: torch.Tensor, device: torch.device | str = "cpu") -> dict[int, list[Regions]]:
    """The in-focus and the blurred tokens on every grid, by token count. mask [B, 8h, 8w], 1 = in focus."""
    mask = mask.cpu()
    grids = token_grids(mask.shape[-2] // LATENT_CELL, mask.shape[-1] // LATENT_CELL)
    return {height * width: part(token_mask(mask, height, width), device) for height, width in grids}


class Encoder(nn.Module):
    """The VAE's encoder (its weights hold the VAE LoRA)."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance (-30..20) of the posterior, [B, 4, h, w] each, not scaled."""
        mean, log_variance = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)


class Decoder(nn.Module):
    """The VAE's decoder."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """latent [B, 4, h, w], not scaled."""
        return self.decoder(self.post_quant_conv(latent))


class ControlNet(nn.Module):
    """Reads the defocus map and gives one correction for each of the UNet's skips."""

    def __init__(self, unet: nn.Module, widths: list[int]):
        """unet: a pruned diffusers UNet to take the down path from; widths: of the conditioning embedding, from the picture's side."""
        super().__init__()
        self.conv_in, self.time_proj, self.time_embedding = unet.conv_in, unet.time_proj, unet.time_embedding
        self.down_blocks = unet.down_blocks
        self.controlnet_cond_embedding = _Conditioning(widths, unet.conv_in.out_channels)
        skips = [unet.conv_in.out_channels]
        for block in unet.down_blocks:
            width = block.resnets[0].out_channels
            skips += [width] * (len(block.resnets) + (block.downsamplers is not None))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in skips)

    def forward(self, latent: torch.Tensor, condition: torch.Tensor) -> list[torch.Tensor]:
        """The corrections, finest first. condition [B, 3, 8h, 8w]: 2 D - 1, D = blur radius in px / 32."""
        sample = self.conv_in(latent) + self.controlnet_cond_embedding(condition)
        skips, _ = _contract(self, sample)
        return [out(skip) for out, skip in zip(self.controlnet_down_blocks, skips, strict=True)]


class _Conditioning(nn.Module):
    """From picture size to latent size in three steps of two."""

    def __init__(self, widths: list[int], out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, following in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, following, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv_in(condition))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class PrunedUNet(nn.Module):
    """The UNet without its middle and without text, with focus-aware attention in the up path."""

    def __init__(self, unet: nn.Module, rank: int):
        """unet: a pruned diffusers UNet to take the parts from; rank: of the bokeh LoRA."""
        super().__init__()
        self.conv_in, self.time_proj, self.time_embedding = unet.conv_in, unet.time_proj, unet.time_embedding
        self.down_blocks, self.up_blocks = unet.down_blocks, unet.up_blocks
        self.conv_norm_out, self.conv_act, self.conv_out = unet.conv_norm_out, unet.conv_act, unet.conv_out
        for block in _transformer_blocks(self.up_blocks):
            block.attn1 = FocusAwareAttention(block.attn1, rank)

    def forward(self, latent: torch.Tensor, corrections: list[torch.Tensor] | None, regions: dict[int, list[Regions]]) -> torch.Tensor:
        """eps [B, 4, h, w]. corrections: from the ControlNet, None = none; regions: from `focus_regions`."""
        skips, time = _contract(self, self.conv_in(latent))
        sample = skips[-1]  # the corrections reach the skips only
        if corrections is not None:
            skips = [skip + correction for skip, correction in zip(skips, corrections, strict=True)]
        for block in self.up_blocks:
            count = len(block.resnets)
            taken, skips = tuple(skips[-count:]), skips[:-count]
            more = {"cross_attention_kwargs": {"regions": regions}} if hasattr(block, "attentions") else {}
            size = skips[-1].shape[-2:] if skips else None
            sample = block(hidden_states=sample, res_hidden_states_tuple=taken, temb=time, upsample_size=size, **more)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


def _contract(network: nn.Module, sample: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The down path both networks have: its skips (finest first, the last is the deepest sample), and the time embedding."""
    time = network.time_proj(torch.tensor([TIMESTEP], device=sample.device))
    time = network.time_embedding(time.to(sample.dtype))
    skips = [sample]
    for block in network.down_blocks:
        sample, more = block(hidden_states=sample, temb=time)
        skips += more
    return skips, time


def pruned_unet(config: dict) -> nn.Module:
    """diffusers' UNet less the middle and, in every transformer block, the text attention and its norm. Call under a meta device."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config({**config, "mid_block_type": None})
    for block in _transformer_blocks(unet):
        block.attn2 = block.norm2 = None
    return unet


def _transformer_blocks(network: nn.Module) -> list[nn.Module]:
    return [block for module in network.modules() if hasattr(module, "transformer_blocks") for block in module.transformer_blocks]
