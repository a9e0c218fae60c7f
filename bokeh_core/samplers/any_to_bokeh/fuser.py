"""The fuser: what Any-to-Bokeh adds to each of the 16 spatial transformers (SPEC section 3.2), and the embedding of K (section 3.3)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ...checkpoints.loading import cast

# 100^(i/15) for i = 0..15, in the precisions the network has met. With arguments of up to 3200 rad the last bits decide, so the
# values are written out. float16 is what the released inference computes, and the right one whatever the network runs in; autocast
# is what training computed; float32 is what most recordings of the reference were made with.
# fmt: off
FREQUENCIES = {
    "float16": (
        1.0, 1.359375, 1.84765625, 2.51171875, 3.4140625, 4.640625, 6.30859375, 8.5703125,
        11.6484375, 15.859375, 21.578125, 29.296875, 39.78125, 54.125, 73.625, 100.0,
    ),
    "autocast": (
        1.0, 1.3592544794082642, 1.8475728034973145, 2.511321783065796, 3.413525342941284, 4.639849662780762,
        6.306736469268799, 8.572460174560547, 11.652154922485352, 15.856060981750488, 21.57666778564453,
        29.29522705078125, 39.774925231933594, 54.125064849853516, 73.65250396728516, 100.0,
    ),
    "float32": (
        1.0, 1.3593564, 1.84784985, 2.5118866, 3.41454911, 4.64158916, 6.3095746, 8.57696056,
        11.6591425, 15.8489294, 21.5443439, 29.2864475, 39.8107185, 54.1169548, 73.5642242, 100.0,
    ),
}
# fmt: on


def embed_k(k: torch.Tensor, table: str = "float16") -> torch.Tensor:
    """[..., 32] E(K): sine and cosine of K times each frequency, interleaved.

    k      [...] raw blur radius in px of a 1024 px wide picture; 0 is legal
    table  one of FREQUENCIES; with "float16" every step is rounded to float16 and the result is float16, else float32
    """
    dtype = torch.float16 if table == "float16" else torch.float32
    frequencies = torch.tensor(FREQUENCIES[table], dtype=dtype, device=k.device)
    angle = (k.to(dtype)[..., None] * frequencies).float()
    return rearrange([angle.sin(), angle.cos()], "two ... f -> ... (f two)").to(dtype)


@dataclass(frozen=True, eq=False)
class Condition:
    """What the transformers are told beside their own tokens. n = clips * frames, clip after clip.

    frames          of each clip
    clip            [n, D] CLIP embedding of every frame
    k_embedding     [n, 32] E(K) of every frame
    released_order  the temporal cross-attention reads the contexts of a batch in the released order (SPEC section 3.4)
    visual          [n, C, h, w] features of the sharp latents for the visual tokens; None: no visual tokens
    mask            [clips, frames, H, W] 0..1 in px: which visual tokens may be looked at in this stage
    """

    frames: int
    clip: torch.Tensor
    k_embedding: torch.Tensor
    released_order: bool = False
    visual: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def attend(attention, x: torch.Tensor, keys: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[B, N, C] attention of diffusers' Attention layers, from x [B, N, C] to keys [B, M, C] (None: x).

    mask [B, M] True where a key may be looked at; None keeps the fused kernels
    """
    keys = x if keys is None else keys
    q, k, v = (
        rearrange(layer(tokens), "b n (h d) -> b h n d", h=attention.heads)
        for layer, tokens in ((attention.to_q, x), (attention.to_k, keys), (attention.to_v, keys))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return attention.to_out[0](rearrange(out, "b h n d -> b n (h d)"))


class Fuser(nn.Module):
    """Adds K to the stream and lets the tokens see each other, and the visual tokens where a mask allows it.

    width    C of the transformer
    heads    of its attention
    context  channels of `visual`

    The published networks are always given a mask of zeros; that is self-attention over the tokens alone, which is what runs when
    the condition has no visual tokens. `linear` is used with visual tokens only, `ff_k` never.
    """

    def __init__(self, width: int, heads: int, context: int):
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.linear = nn.Linear(context, width)
        self.mpi_attn = Attention(query_dim=width, heads=heads, dim_head=width // heads)
        self.norm1, self.norm2, self.norm_k = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.ff, self.ff_k = FeedForward(width, activation_fn="geglu"), FeedForward(width, activation_fn="geglu")
        self.k_encoder = nn.Linear(2 * len(FREQUENCIES["float16"]), width)
        self.alpha_attn, self.alpha_dense = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        """x [n, tokens, C], row by row, to the same shape."""
        x = x + self.k_encoder(condition.k_embedding.to(x.dtype))[:, None]
        if condition.visual is None:
            tokens = self.norm1(x)
            seen = attend(self.mpi_attn, tokens)
        else:
            visual, mask = self.visual_tokens(x, condition)
            tokens = self.norm1(torch.cat([x, visual], dim=1))
            seen = attend(self.mpi_attn, tokens[:, : x.shape[1]], tokens, mask)
        x = x + cast(self.alpha_attn, x).tanh() * seen
        gate = cast(self.alpha_dense, x).tanh()
        return x + gate * self.ff(self.norm2(x)) + gate * self.ff(self.norm_k(x))

    def visual_tokens(self, x: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
        """([n, tokens, C] visual tokens, [n, 2 tokens] which of the tokens and visual tokens may be looked at)."""
        height, width = condition.visual.shape[-2:]
        ratio = math.ceil(math.sqrt(height * width / x.shape[1]))
        size = (height // ratio, width // ratio)
        visual = F.interpolate(condition.visual, size=size, mode="bilinear", align_corners=False)
        visual = self.linear(rearrange(visual, "n c h w -> n (h w) c").to(x.dtype))
        mask = rearrange(condition.mask, "b f h w -> (b f) 1 h w").float()
        mask = F.interpolate(mask, size=size, mode="bilinear", align_corners=False).flatten(1) > 0.5
        return visual, torch.cat([torch.ones(x.shape[:2], dtype=torch.bool, device=mask.device), mask], dim=1)
