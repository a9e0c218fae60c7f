"""The CLIP embedding of a frame: how a picture is prepared, and the vision tower with its projection (SPEC section 4)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ...checkpoints.loading import cast

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(images: torch.Tensor, size: int = 224, normalise: bool = False) -> torch.Tensor:
    """[n, 3, size, size] in 0..1 for the encoder, of images [n, 3, H, W] in -1..1: Gaussian blur against aliasing, then bicubic.

    normalise  with CLIP's mean and deviation, as training did; the released inference leaves it out
    """
    from kornia.filters import gaussian_blur2d

    sides = images.shape[-2:]
    sigmas = tuple(max((side / size - 1.0) / 2.0, 0.001) for side in sides)
    kernel = tuple(int(max(4.0 * sigma, 3)) // 2 * 2 + 1 for sigma in sigmas)
    images = gaussian_blur2d(images.float(), kernel, sigmas, border_type="reflect", separable=True)
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True)
    images = (images + 1.0) / 2.0
    if normalise:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        images = (images - mean) / std
    return images


class ImageEncoder(nn.Module):
    """CLIP vision transformer with projection, under the tensor names of transformers' CLIPVisionModelWithProjection.

    hidden, mlp, layers, heads, patch, size, projection: see `encoder_config`; exact GELU, layer norm eps 1e-5
    """

    def __init__(self, *, hidden: int, mlp: int, layers: int, heads: int, patch: int, size: int, projection: int, ops=nn):
        super().__init__()
        self.size = size
        self.vision_model = nn.Module()
        self.vision_model.embeddings = _Embeddings(hidden, patch, size, ops)
        self.vision_model.pre_layrnorm = ops.LayerNorm(hidden, eps=1e-5)
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(_Layer(hidden, mlp, heads, ops) for _ in range(layers))
        self.vision_model.post_layernorm = ops.LayerNorm(hidden, eps=1e-5)
        self.visual_projection = ops.Linear(hidden, projection, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[n, projection] embedding of prepared images [n, 3, size, size]."""
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(images))
        for layer in model.encoder.layers:
            x = layer(x)
        return self.visual_projection(model.post_layernorm(x[:, 0]))


class _Embeddings(nn.Module):
    def __init__(self, hidden, patch, size, ops):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(hidden))
        self.patch_embedding = ops.Conv2d(3, hidden, patch, stride=patch, bias=False)
        self.position_embedding = ops.Embedding((size // patch) ** 2 + 1, hidden)

    def forward(self, images):
        x = rearrange(self.patch_embedding(images), "n c h w -> n (h w) c")
        x = torch.cat([cast(self.class_embedding, x).expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding(torch.arange(x.shape[1], device=x.device)).to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, hidden, mlp, heads, ops):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = ops.LayerNorm(hidden, eps=1e-5), ops.LayerNorm(hidden, eps=1e-5)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: ops.Linear(hidden, hidden) for name in names})
        self.mlp = nn.ModuleDict({"fc1": ops.Linear(hidden, mlp), "fc2": ops.Linear(mlp, hidden)})

    def forward(self, x):
        tokens = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{name}_proj"](tokens), "n t (h d) -> n h t d", h=self.heads) for name in "qkv")
        seen = F.scaled_dot_product_attention(q, k, v)
        x = x + self.self_attn["out_proj"](rearrange(seen, "n h t d -> n t (h d)"))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


def encoder_config(tensors: dict[str, torch.Tensor], heads: int | None = None) -> dict:
    """Keywords of ImageEncoder from the shapes of its tensors. heads: None takes 80 channels each, as ViT-H/14 has."""
    hidden, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
    places = tensors["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    layers = 0
    while f"vision_model.encoder.layers.{layers}.mlp.fc1.weight" in tensors:
        layers += 1
    return {
        "hidden": hidden,
        "mlp": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layers": layers,
        "heads": heads or max(1, hidden // 80),
        "patch": patch,
        "size": round(places**0.5) * patch,
        "projection": tensors["visual_projection.weight"].shape[0],
    }
