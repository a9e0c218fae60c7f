"""Focus-aware masked attention (FAMA): tokens in focus and blurred tokens do not see each other (SPEC section 5).

The plain definition (`dense_masked_attention`) and the form users run (`split_masked_attention`) stand side by side; tests tie them.
The mask only rules a low-rank correction: the layer's ordinary attention sees every token.
"""

import torch
import torch.nn.functional as F
from torch import nn

APART = -100.0  # added to the score of two tokens of different regions, after scaling; the paper writes minus infinity

# Token numbers of the two regions of one picture, [in focus], [blurred]; None when all tokens are of one region.
Regions = tuple[torch.Tensor, torch.Tensor] | None


def focus_bias(mask: torch.Tensor) -> torch.Tensor:
    """[B, N, N] float32 added to the attention scores: 0 within a region, -100 across. mask [B, N], equal = same region."""
    return (mask[:, :, None] != mask[:, None, :]).float() * APART


def dense_masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, the definition. q, k, v [B, heads, N, D]; mask [B, N]. Returns [B, heads, N, D]."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = (scores.float() + focus_bias(mask)[:, None]).softmax(-1)
    return weights.to(v.dtype) @ v


def split_masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, regions: list[Regions]) -> torch.Tensor:
    """The same for tokens already parted into regions: each region by itself, with fused kernels and without a mask.

    Differs from the definition by what exp(-100) lets through. regions: one entry per picture of the batch (see `part`).
    """
    if all(region is None for region in regions):
        return F.scaled_dot_product_attention(q, k, v)
    out = torch.empty_like(v)
    for i, region in enumerate(regions):
        one = slice(i, i + 1)
        if region is None:
            out[one] = F.scaled_dot_product_attention(q[one], k[one], v[one])
            continue
        for tokens in region:
            parts = (x[one].index_select(2, tokens) for x in (q, k, v))
            out[one] = out[one].index_copy(2, tokens, F.scaled_dot_product_attention(*parts))
    return out


def part(mask: torch.Tensor, device: torch.device | str = "cpu") -> list[Regions]:
    """The regions of each picture. mask [B, N] on the CPU, equal = same region; the token numbers go to `device`."""
    regions: list[Regions] = []
    for tokens in mask.bool():
        inside, outside = tokens.nonzero()[:, 0], (~tokens).nonzero()[:, 0]
        regions.append((inside.to(device), outside.to(device)) if len(inside) and len(outside) else None)
    return regions


def token_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, height * width] of a pixel mask [B, H, W]: nearest, the top left pixel of each cell, row by row."""
    return F.interpolate(mask[:, None].float(), size=(height, width), mode="nearest").flatten(1)


class FocusAwareAttention(nn.Module):
    """One self-attention of the up path: an unmasked branch, and a masked branch that only the bokeh LoRA lets through.

    Takes the layers of a diffusers `Attention`, whose weights hold base plus SR LoRA, and adds the bokeh LoRA under its own names
    (processor.to_q_lora.0 = down, .1 = up, ...). The LoRA stays a side branch: it is cheaper than a second set of weights below rank
    C / 2, and keeps half precision exact.
    """

    def __init__(self, attention: nn.Module, rank: int):
        super().__init__()
        self.heads = attention.heads
        self.scale = 1.0 / rank  # alpha 1
        self.to_q, self.to_k, self.to_v, self.to_out = attention.to_q, attention.to_k, attention.to_v, attention.to_out
        channels = attention.to_q.in_features
        self.processor = nn.Module()
        for name in ("to_q", "to_k", "to_v", "to_out"):
            down_up = nn.Sequential(nn.Linear(channels, rank, bias=False), nn.Linear(rank, channels, bias=False))
            setattr(self.processor, f"{name}_lora", down_up)

    def branches(self, x: torch.Tensor, regions: list[Regions]) -> tuple[torch.Tensor, torch.Tensor]:
        """Unmasked and masked attention of x [B, N, C], heads merged, before the output layers: [B, N, C] twice."""
        from einops import rearrange

        def heads(tokens: torch.Tensor) -> torch.Tensor:
            return rearrange(tokens, "b n (h d) -> b h n d", h=self.heads)

        plain = self.to_q(x), self.to_k(x), self.to_v(x)
        lora = self.processor
        low_rank = lora.to_q_lora(x), lora.to_k_lora(x), lora.to_v_lora(x)
        everywhere = F.scaled_dot_product_attention(*(heads(t) for t in plain))
        within = split_masked_attention(*(heads(t + self.scale * d) for t, d in zip(plain, low_rank, strict=True)), regions)
        return rearrange(everywhere, "b h n d -> b n (h d)"), rearrange(within, "b h n d -> b n (h d)")

    def forward(self, x: torch.Tensor, regions: dict[int, list[Regions]], **_ignored) -> torch.Tensor:
        """x [B, N, C] normed tokens; regions by token count. The other keywords are what diffusers' block passes to any attention."""
        everywhere, within = self.branches(x, regions[x.shape[1]])
        return self.to_out[0](everywhere) + self.scale * self.processor.to_out_lora(within)
