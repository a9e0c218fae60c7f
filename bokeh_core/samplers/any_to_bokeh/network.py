"""The UNet of Any-to-Bokeh: Stable Video Diffusion's, with a fuser in every spatial transformer (SPEC section 3).

Needs diffusers; import it inside functions.
"""

from dataclasses import replace

import torch
from diffusers.models.resnet import AlphaBlender
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from einops import rearrange, repeat
from torch import nn

from ...checkpoints.loading import cast
from .fuser import Condition, Fuser, attend, embed_k
from .mpi import level_of_stage, masks

TIMESTEP = 1.0  # embedded as it is; one call, no scheduler
ADDED_IDS = (6.0, 127.0, 0.0)  # frames per second less one, motion, noise: as inference calls it (training: 7, 127, 0)


class Mixer(AlphaBlender):
    """The learned mix of the spatial and the temporal branch; its raw factor comes to wherever the branches are."""

    def forward(self, x_spatial, x_temporal, image_only_indicator=None):
        share = cast(torch.sigmoid(self.mix_factor.float()), x_spatial)
        if self.switch_spatial_to_temporal_mix:
            share = 1.0 - share
        return share * x_spatial + (1.0 - share) * x_temporal


def use_mixers(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, AlphaBlender):
            module.__class__ = Mixer


class FusedTransformer(TransformerSpatioTemporalModel):
    """Spatial block with fuser, then temporal block. Cross-attention to a single key is its constant, whatever the query."""

    def forward(self, hidden_states, encoder_hidden_states: Condition, image_only_indicator=None, return_dict=False):
        """hidden_states [n, C, h, w], n = clips * frames, to (the same shape,). The condition comes through diffusers' blocks as it is."""
        condition, frames = encoder_hidden_states, encoder_hidden_states.frames
        clips, (height, width) = len(hidden_states) // frames, hidden_states.shape[-2:]
        x = self.proj_in(rearrange(self.norm(hidden_states), "n c h w -> n (h w) c"))
        place = self.time_proj(torch.arange(frames, device=x.device)).to(x.dtype)
        place = repeat(self.time_pos_embed(place), "f c -> (b f) 1 c", b=clips)
        for block, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            x = x + attend(block.attn1, block.norm1(x))
            x = block.fuser(x, condition)
            x = x + single_key(block.attn2, condition.clip)[:, None]
            x = x + block.ff(block.norm3(x))

            t = rearrange(x + place, "(b f) n c -> (b n) f c", f=frames)
            t = t + temporal.ff_in(temporal.norm_in(t))
            t = t + attend(temporal.attn1, temporal.norm1(t))
            context = single_key(temporal.attn2, condition.clip[::frames])  # the first frame's
            order = "b c -> (n b) 1 c" if condition.released_order else "b c -> (b n) 1 c"
            t = t + repeat(context, order, n=height * width)
            t = t + temporal.ff(temporal.norm3(t))
            x = self.time_mixer(x, rearrange(t, "(b n) f c -> (b f) n c", b=clips))
        x = rearrange(self.proj_out(x), "n (h w) c -> n c h w", h=height, w=width)
        return (x.contiguous() + hidden_states,)


def single_key(attention, context: torch.Tensor) -> torch.Tensor:
    """[B, C]: cross-attention to the one key context [B, D]; the softmax over one key is 1, so queries and keys do not matter."""
    return attention.to_out[0](attention.to_v(context))


class AnyToBokehUNet(UNetSpatioTemporalConditionModel):
    """Sharp latents, latents of the disparity difference, K and CLIP embeddings in; latents with bokeh out, in one call.

    Keywords are those of diffusers' UNetSpatioTemporalConditionModel.
    """

    def __init__(self, **config):
        super().__init__(**config)
        context = self.conv_in.out_channels
        self.conv_in_mpi = nn.Conv2d(self.conv_in.in_channels // 2, context, 3, padding=1)
        use_mixers(self)
        for module in list(self.modules()):
            if isinstance(module, TransformerSpatioTemporalModel):
                module.__class__ = FusedTransformer
                for block in module.transformer_blocks:
                    block.fuser = Fuser(module.inner_dim, module.num_attention_heads, context)

    def forward(
        self,
        sharp: torch.Tensor,
        difference: torch.Tensor,
        clip: torch.Tensor,
        k: torch.Tensor,
        *,
        region: torch.Tensor | None = None,
        k_table: str = "float16",
        released_order: bool = False,
        added_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[clips, frames, 4, h, w] predicted latents, scaled like the inputs.

        sharp, difference  [clips, frames, 4, h, w] VAE latents of the pictures and of the disparity differences, both times 0.18215
        clip               [clips * frames, D] CLIP embedding of every frame
        k                  [clips, frames] raw K
        region             [clips, frames, H, W] uint8 0..3 turns the visual tokens on with the masks that seem intended; never
                           active in the released runs
        k_table            which E(K), see fuser.FREQUENCIES
        released_order     see Condition
        added_ids          [clips, 3], default ADDED_IDS
        """
        clips, frames = sharp.shape[:2]
        dtype, device = sharp.dtype, sharp.device
        if added_ids is None:
            added_ids = torch.tensor(ADDED_IDS, device=device).expand(clips, -1)
        time = self.time_embedding(self.time_proj(torch.full((clips,), TIMESTEP, device=device)).to(dtype))
        ids = self.add_time_proj(added_ids.flatten().to(device)).reshape(clips, -1).to(dtype)
        time = repeat(time + self.add_embedding(ids), "b c -> (b f) c", f=frames)

        condition = Condition(frames, clip.to(dtype), embed_k(k, k_table).flatten(0, 1), released_order)
        if region is not None:
            condition = replace(condition, visual=self.conv_in_mpi(sharp.flatten(0, 1)))

        def shared(block, stage, index):
            """The keywords every block takes; diffusers' blocks hand the condition on to their transformers."""
            keywords = {"temb": time, "image_only_indicator": torch.zeros(clips, frames, device=device)}
            if getattr(block, "has_cross_attention", False):
                seen = None if region is None else masks(region, level_of_stage(stage, index))
                keywords["encoder_hidden_states"] = replace(condition, mask=seen)
            return keywords

        x = self.conv_in(torch.cat([sharp, difference], dim=2).flatten(0, 1))
        skips = [x]
        for index, block in enumerate(self.down_blocks):
            x, more = block(hidden_states=x, **shared(block, "down", index))
            skips.extend(more)
        x = self.mid_block(hidden_states=x, **shared(self.mid_block, "mid", 0))
        for index, block in enumerate(self.up_blocks):
            count = len(block.resnets)
            x = block(hidden_states=x, res_hidden_states_tuple=tuple(skips[-count:]), **shared(block, "up", index))
            del skips[-count:]
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return rearrange(x, "(b f) c h w -> b f c h w", f=frames)


def drop_unused(network: AnyToBokehUNet, keep_visual: bool = False) -> AnyToBokehUNet:
    """Take out what does not change the result: feed-forwards never called, queries and keys of single-key attention, and, unless
    `keep_visual`, the layers of the visual tokens. Returns the network.
    """
    for module in list(network.modules()):
        if isinstance(module, FusedTransformer):
            for block in module.transformer_blocks:
                del block.fuser.ff_k
                if not keep_visual:
                    del block.fuser.linear
            for block in (*module.transformer_blocks, *module.temporal_transformer_blocks):
                del block.norm2, block.attn2.to_q, block.attn2.to_k
    if not keep_visual:
        del network.conv_in_mpi
    return network
