"""Divided Space Focus Attention: a sharp picture's tokens refined by those of a bokeh stack (bokehdepth_stage2 SPEC sections 3 and 4).

DSFA sits behind the vision transformer: it rewrites the tapped, normed patch tokens of the reference, tap by tap. Class tokens and
the transformer itself never see it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoints.loading import cast
from .depth_anything import DepthAnything, DepthAnythingConfig


@dataclass(frozen=True)
class DSFAConfig:
    """Where DSFA acts, and where the two releases differ.

    taps   numbers (from 0) of the taps that are rewritten, each by a block of its own
    heads  of both attentions; they divide the width
    """

    taps: tuple[int, ...]
    heads: int = 8
    alibi_scale: float = 1.0  # of the distance bias -|K_i - K_j| in the focus step
    squared_space_scale: bool = False  # spatial logits times 1/head_width: the published fused path scales twice (SPEC section 4.3)
    nested_film: bool = False  # the file calls the FiLM layer focus_film.0 (Depth Anything V2), not focus_film (UniDepthV2)


class DSFABlock(nn.Module):
    """One tap: K token, spatial step, FiLM, focus step. Names are those of the checkpoints."""

    def __init__(self, width: int, config: DSFAConfig, ops=nn):
        super().__init__()
        self.config = config
        for step in ("space", "focus"):
            setattr(self, f"gamma_{step}_attn", nn.Parameter(torch.empty(width)))
            setattr(self, f"gamma_{step}_ffn", nn.Parameter(torch.empty(width)))
            setattr(self, f"ln_{step}_attn", ops.LayerNorm(width, eps=1e-5))
            setattr(self, f"ln_{step}_ffn", ops.LayerNorm(width, eps=1e-5))
            setattr(self, f"{step}_ffn", _MLP(width, ops))
        self.space_attn = DSFAAttention(width, config.heads, ops, squared_scale=config.squared_space_scale)
        self.focus_attn = DSFAAttention(width, config.heads, ops)
        self.k_embed = nn.Sequential(ops.Linear(1, width // 4), nn.ReLU(), ops.Linear(width // 4, width))
        film = ops.Linear(width, 2 * width)
        self.focus_film = nn.Sequential(film) if config.nested_film else film

    def forward(
        self,
        reference: torch.Tensor,  # [B, P, D] tokens of the sharp picture
        stack: torch.Tensor,  # [B, N, P, D] tokens of the blurred ones
        k: torch.Tensor | None = None,  # [B, N] their strengths, raw; None = zeros. The reference's own is 0 and never part of it
    ) -> torch.Tensor:
        """[B, P, D] the reference refined. Frame after frame, and the focus step for the reference alone: see `dense`."""
        k = self.strengths(stack, k)
        tokens = self.k_tokens(k, reference)
        frames = [reference, *stack.unbind(1)]
        frames = [self.film(self.space(x, token)[:, 1:], token) for x, token in zip(frames, tokens.unbind(1), strict=True)]
        return self.focus(torch.stack(frames, dim=1), k, reference_only=True)[:, 0]

    def dense(self, reference: torch.Tensor, stack: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
        """The same, and every other frame refined too: [B, N + 1, P, D], the reference first. As published; the judge of `forward`."""
        k = self.strengths(stack, k)
        tokens = self.k_tokens(k, reference)
        frames = torch.cat([reference[:, None], stack], dim=1)
        y = self.space(frames.flatten(0, 1), tokens.flatten(0, 1))[:, 1:]
        return self.focus(self.film(y, tokens.flatten(0, 1)).unflatten(0, frames.shape[:2]), k, reference_only=False)

    def strengths(self, stack: torch.Tensor, k: torch.Tensor | None) -> torch.Tensor:
        """[B, N + 1] float32, the reference's 0 first."""
        k = stack.new_zeros(stack.shape[:2]) if k is None else k.reshape(stack.shape[:2]).to(stack.device)
        return F.pad(k.float(), (1, 0))

    def k_tokens(self, k: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B, F, D] what the strengths [B, F] mean to the network."""
        return self.k_embed(k[..., None].to(like.dtype))

    def space(
        self,
        x: torch.Tensor,  # [n, P, D] frames
        token: torch.Tensor,  # [n, D] of their K
    ) -> torch.Tensor:
        """[n, 1 + P, D] attention over the K token and all patches of a frame, and an MLP; the K token comes first."""
        s = torch.cat([token[:, None], x], dim=1)
        s = s + cast(self.gamma_space_attn, s) * self.space_attn(self.ln_space_attn(s))
        return s + cast(self.gamma_space_ffn, s) * self.space_ffn(self.ln_space_ffn(s))

    def film(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """[n, P, D] (1 + tanh a) x + b, with a and b made of the K token [n, D]."""
        scale, shift = self.focus_film(token)[:, None].chunk(2, dim=-1)
        return (1 + scale.tanh()) * x + shift

    def focus(
        self,
        y: torch.Tensor,  # [B, F, P, D]
        k: torch.Tensor,  # [B, F]
        reference_only: bool,
    ) -> torch.Tensor:
        """[B, F or 1, P, D] attention over the frames at each patch, nearer in K weighing more, and an MLP."""
        from einops import rearrange

        batch = len(y)
        bias = -self.config.alibi_scale * (k[:, :, None] - k[:, None, :]).abs()
        bias = bias.repeat_interleave(y.shape[2], dim=0)
        rows = rearrange(y, "b f p d -> (b p) f d")
        normed = self.ln_focus_attn(rows)
        x = rows[:, :1] if reference_only else rows
        x = x + cast(self.gamma_focus_attn, x) * (self.focus_attn.first(normed, bias) if reference_only else self.focus_attn(normed, bias))
        rows = x + cast(self.gamma_focus_ffn, x) * self.focus_ffn(self.ln_focus_ffn(x))
        return rearrange(rows, "(b p) f d -> b f p d", b=batch)


class DSFAAttention(nn.Module):
    """Self-attention with an optional bias on the logits, shared by all heads.

    Logits are scaled by head_width^-1/2, or by 1/head_width (squared_scale) where there is no bias.
    """

    def __init__(self, width: int, heads: int, ops=nn, *, squared_scale: bool = False):
        super().__init__()
        self.heads = heads
        self.scale = heads / width if squared_scale else None
        self.qkv = ops.Linear(width, 3 * width)
        self.out_proj = ops.Linear(width, width)

    def forward(
        self,
        x: torch.Tensor,  # [B, L, D]
        bias: torch.Tensor | None = None,  # [B, L, L] added to the scaled logits
        queries: int | None = None,  # only so many of the first tokens ask
    ) -> torch.Tensor:
        """[B, queries or L, D]"""
        from einops import rearrange

        q, k, v = rearrange(self.qkv(x), "b l (three heads d) -> three b heads l d", three=3, heads=self.heads)
        q = q[:, :, :queries]
        if bias is None:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, :queries].to(q.dtype))
        return self.out_proj(rearrange(y, "b heads l d -> b l (heads d)"))

    def first(
        self,
        x: torch.Tensor,  # [B, L, D]
        bias: torch.Tensor,  # [B, L, L]
    ) -> torch.Tensor:
        """[B, 1, D] what `forward` gives for the first token.

        One query needs no keys and values: q.(K x) = (K^T q).x, and a mean of V x is V of the mean, so the work does not grow with L.
        This reads the weights outside their layer, so only where they are plain; a host that streams them gets the ordinary form.
        """
        from einops import rearrange

        if type(self.qkv) is not nn.Linear:
            return self(x, bias, queries=1)
        to_q, to_k, to_v = (part.unflatten(0, (self.heads, -1)) for part in self.qkv.weight.chunk(3))
        bias_q, _, bias_v = (part.unflatten(0, (self.heads, -1)) for part in self.qkv.bias.chunk(3))  # a key's bias moves all logits alike
        q = rearrange(F.linear(x[:, 0], to_q.flatten(0, 1), bias_q.flatten()), "b (heads d) -> heads b d", heads=self.heads)
        asked = rearrange(torch.bmm(q * q.shape[-1] ** -0.5, to_k), "heads b c -> b heads c")
        weights = (asked @ x.mT + bias[:, :1]).float().softmax(-1).to(x)
        mean = rearrange(weights @ x, "b heads c -> heads b c")
        y = torch.baddbmm(bias_v[:, None], mean, to_v.mT)
        return self.out_proj(rearrange(y, "heads b d -> b 1 (heads d)"))


class _MLP(nn.Module):
    def __init__(self, width: int, ops):
        super().__init__()
        self.fc1 = ops.Linear(width, 4 * width)
        self.fc2 = ops.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def fuse(
    blocks: dict[int, DSFABlock],  # by tap
    taps: list[torch.Tensor],  # of the reference, [B, 1 + P, D] each
    stack: dict[int, torch.Tensor],  # by tap, [B, N, P, D] patches of the stack
    k: torch.Tensor | None,  # [B, N]
    tick: Callable[[int], None] | None = None,  # told how many blocks are done
) -> list[torch.Tensor]:
    """The taps of the reference, those with a block rewritten; class tokens stay."""
    taps, done = list(taps), 0
    for tap, block in blocks.items():
        taps[tap] = torch.cat([taps[tap][:, :1], block(taps[tap][:, 1:], stack[tap], k)], dim=1)
        done += 1
        if tick:
            tick(done)
    return taps


@dataclass(frozen=True)
class DepthAnythingDSFAConfig(DepthAnythingConfig):
    """Those of Depth Anything, and where DSFA acts: the release has it at the taps 2 and 3."""

    dsfa: DSFAConfig = DSFAConfig((2, 3), nested_film=True)


class DepthAnythingDSFA(DepthAnything):
    """Depth Anything V2, metric, with DSFA at some of its taps. Without a stack it is plain Depth Anything."""

    def __init__(self, config: DepthAnythingDSFAConfig, ops=nn):
        super().__init__(config, ops)
        self.encoder_fusion = nn.Module()
        self.encoder_fusion.layers = nn.ModuleDict()
        for tap in config.dsfa.taps:
            layer = nn.Module()
            layer.block = DSFABlock(config.vit.width, config.dsfa, ops)
            self.encoder_fusion.layers[str(tap)] = layer

    @property
    def blocks(self) -> dict[int, DSFABlock]:
        return {int(tap): layer.block for tap, layer in self.encoder_fusion.layers.items()}

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """[B, 1 + P, D] per tap of pixels [B, 3, H, W]."""
        return self.pretrained(pixels)
