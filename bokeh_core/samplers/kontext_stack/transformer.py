"""The adapter on diffusers' FluxTransformer2DModel, written as published: the plain form that the hooks are held to (SPEC section 4)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import BokehError
from .adapter import BokehAdapter, LowRank, build_corrections


@dataclass(frozen=True)
class Grounded:
    """Attention that leans on a pivot sample. The released generator does not use it; training and the predecessor do.

    pivot  None: every sample takes the q of sample 0 and also its keys, with its own values twice (image to image, all blocks).
           Else for each sample the sample whose q it takes and whose keys join its own (text to image, single-stream blocks only)
    """

    pivot: tuple[int, ...] | None = None


class BokehAttention(nn.Module):
    """Attention processor of one block. Runs in place of diffusers' own, on any of its attention classes.

    index         of the block, double-stream blocks first
    low_q, low_k  the corrections, None for a block or a side that is not adapted
    """

    def __init__(self, index: int, low_q: LowRank | None, low_k: LowRank | None, lora_scale: float = 1.0, bokeh_scale: float = 1.0):
        super().__init__()
        self.index, self.lora_scale, self.bokeh_scale = index, lora_scale, bokeh_scale
        self.low_q, self.low_k = low_q, low_k

    def __call__(  # not forward: diffusers reads the names of its arguments
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        bokeh_vectors: dict[int, torch.Tensor] | None = None,
        grounded: Grounded | None = None,
    ):
        """hidden_states [B, L, dim]; with encoder_hidden_states [B, T, dim] a double-stream block, which returns both.

        bokeh_vectors  {block: [B, dim]} of the pictures' K, None: without
        """
        from einops import rearrange

        double = encoder_hidden_states is not None
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if self.low_q is not None:
            q = q + self.lora_scale * self.low_q(q)
        if self.low_k is not None:
            k = k + self.lora_scale * self.low_k(k)
        q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=attn.heads) for x in (q, k, v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if double:
            text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [rearrange(project(encoder_hidden_states), "b l (h d) -> b h l d", h=attn.heads) for project in text]
            text = attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2]
            q, k, v = (torch.cat(pair, 2) for pair in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = rotate(q, *image_rotary_emb), rotate(k, *image_rotary_emb)
        q, k, v = self._ground(q, k, v, grounded, double)

        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = rearrange(out, "b h l d -> b l (h d)").to(q.dtype)
        if bokeh_vectors is not None and self.index in bokeh_vectors:
            out = out + self.bokeh_scale * bokeh_vectors[self.index].to(out)[:, None]
        if not double:
            return out
        tokens = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, tokens:])), attn.to_add_out(out[:, :tokens])

    def _ground(self, q, k, v, grounded, double):
        if grounded is None or (grounded.pivot is not None and double):
            return q, k, v
        if grounded.pivot is None:
            swap = [0] * len(q)
            return q[swap], torch.cat([k, k[swap]], 2), torch.cat([v, v], 2)
        swap = list(grounded.pivot)
        if self.low_k is None:
            return q[swap], k, v
        return q[swap], torch.cat([k, k[swap]], 2), torch.cat([v, v], 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [B, heads, L, D] by cos and sin [L, D], neighbouring channels as pairs; in float32."""
    from einops import rearrange

    even, odd = rearrange(x.float(), "... (d p) -> p ... d", p=2)
    turned = rearrange(torch.stack([-odd, even]), "p ... d -> ... (d p)")
    return (x.float() * cos + turned * sin).to(x.dtype)


def attach(transformer, adapter: BokehAdapter) -> None:
    """Put the adapter into a FluxTransformer2DModel: its attention processors are replaced, its weights are not touched.

    Afterwards `joint_attention_kwargs={"bokeh_vectors": adapter.vectors_of_k([10.0, ...])}` sets the K of the samples of a batch.
    Raises BokehError when the adapter belongs to another network.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    width, config = transformer.config.num_attention_heads * transformer.config.attention_head_dim, adapter.config
    if width != config.width or max(config.blocks) >= len(blocks):
        raise BokehError(
            f"The adapter is made for blocks up to {max(config.blocks)} of width {config.width}; "
            f"this FLUX has {len(blocks)} blocks of width {width}."
        )
    like = next(transformer.parameters())
    tensors = {name: tensor.to(like.device, like.dtype) for name, tensor in adapter.correction_tensors().items()}
    corrections = build_corrections(adapter, nn, tensors)
    for i, block in enumerate(blocks):
        pair = corrections[str(i)] if str(i) in corrections else {"to_q_adp": None, "to_k_adp": None}
        block.attn.set_processor(BokehAttention(i, pair["to_q_adp"], pair["to_k_adp"]))
