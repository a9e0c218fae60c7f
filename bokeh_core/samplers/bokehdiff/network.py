"""BokehDiff's networks: diffusers' SDXL UNet with PISA in two self-attention layers, and diffusers' VAE."""

import torch
from torch import nn

from ...checkpoints.loading import adopt, load_strict
from .pisa import Block, Draws, Pisa, block_attention


class PisaProcessor:
    """diffusers attention processor. What it needs beside q, k and v is set for the time of one UNet pass.

    grid    (h, w) tokens
    blocks  of `scene_blocks`
    """

    def __init__(self):
        self.grid: tuple[int, int] = (0, 0)
        self.blocks: list[Block] = []
        self.pisa: Pisa | None = None
        self.draws: Draws | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **unused):
        from einops import rearrange

        heads = attn.heads
        q, k, v = (rearrange(layer(hidden_states), "b n (h c) -> b h n c", h=heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
        out = block_attention(q, k, v, self.grid, self.blocks, self.pisa, self.draws)
        return attn.to_out[0](rearrange(out, "b h n c -> b n (h c)"))


def put_pisa(attention: nn.Module, processor: PisaProcessor) -> None:
    """Give a diffusers attention module PISA if it is self-attention; cross-attention stays as it is."""
    if not attention.is_cross_attention:
        attention.set_processor(processor)


class BokehDiffUNet(nn.Module):
    """SDXL's UNet with PISA in the self-attention of down_blocks.1.attentions.0, half as fine as the latents."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        self.processor = PisaProcessor()
        for block in unet.down_blocks[1].attentions[0].transformer_blocks:
            put_pisa(block.attn1, self.processor)
            put_pisa(block.attn2, self.processor)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: int,
        text: torch.Tensor,
        pooled: torch.Tensor,
        size_ids: torch.Tensor,
        blocks: list[Block],
        pisa: Pisa,
        draws: Draws | None = None,
    ) -> torch.Tensor:
        """Predicted noise [B, 4, h, w].

        latents   [B, 4, h, w] scaled
        text      [B, 77, D] and pooled [B, P]: the prompt
        size_ids  [B, 6] height, width, crop top, crop left, target height, target width
        blocks    the scene on the token grid (half of h and w, rounded up)
        """
        height, width = latents.shape[-2:]
        self.processor.grid = token_grid(height, width)
        self.processor.blocks, self.processor.pisa, self.processor.draws = blocks, pisa, draws
        try:
            conditions = {"text_embeds": pooled, "time_ids": size_ids}
            return self.unet(latents, timestep, encoder_hidden_states=text, added_cond_kwargs=conditions, return_dict=False)[0]
        finally:
            self.processor.blocks, self.processor.draws = [], None


def token_grid(height: int, width: int) -> tuple[int, int]:
    """Tokens of the PISA layers for latents of this size: the UNet halves them once before, rounding up."""
    return -(-height // 2), -(-width // 2)


def build_unet(config: dict, tensors: dict[str, torch.Tensor], ops=nn) -> BokehDiffUNet:
    """The UNet with these weights, LoRA already merged; `config` holds the keywords of UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return BokehDiffUNet(load_strict(adopt(unet, ops), tensors, "The base model's UNet")).train(False)


def build_vae(config: dict, tensors: dict[str, torch.Tensor], ops=nn) -> nn.Module:
    """The VAE with these weights; `config` holds the keywords of AutoencoderKL."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    return load_strict(adopt(vae, ops), tensors, "The base model's VAE")
