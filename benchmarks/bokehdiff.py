"""BokehDiff: what PISA adds to one UNet pass, by blocks and by its dense definition; and whole pictures where there is a GPU.

At SDXL's width (10 heads of 64) with random weights: the maps and two attention layers. Dense finds the maps in both layers, as the
published code does; the blocks are found once.
"""

import torch
import torch.nn.functional as F

from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.bokehdiff import checkpoint, network, pisa, sampler

from .measure import Pair

HEADS, WIDTH, CELL = 10, 64, 16
BEHAVIOURS = {"best": pisa.Pisa(), "as published": pisa.PISA_AS_PUBLISHED}
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


def scene_maps(side, k):
    """[1, 2, H, W] disparity of a slanted floor with two boxes, and CoC radii, for side x side tokens."""
    generator = torch.Generator().manual_seed(0)
    size = side * CELL
    disparity = F.interpolate(torch.rand(1, 1, 5, 5, generator=generator) * 0.5, size=(size, size), mode="bilinear", align_corners=True)
    disparity[..., size // 4 : size // 2, size // 3 : size // 2] = 0.9
    disparity[..., size // 2 : -CELL, : size // 4] = 0.7
    return torch.cat([disparity, (disparity - 0.4).abs() * k / 10], 1)


def random_weights(build, config, kind, device, dtype):
    with torch.device("meta"):
        shapes = kind.from_config(config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    return build(
        config,
        {
            name: torch.randn(one.shape, generator=generator, device=device, dtype=dtype) * one[0].numel() ** -0.5
            if one.ndim > 1
            else torch.full(one.shape, float("norm" in name and name.endswith("weight")), device=device, dtype=dtype)
            for name, one in shapes.items()
        },
    )


def passes(side, k, behaviour, device):
    """(by blocks, dense): what PISA adds to a pass."""
    generator = torch.Generator().manual_seed(1)
    maps = scene_maps(side, k).to(device)
    q, key, v = (torch.randn(1, HEADS, side * side, WIDTH, generator=generator).to(device) for _ in range(3))

    def dense():
        scene = pisa.scene_of(maps, (side, side))
        for _ in range(2):
            found = pisa.dense_maps(scene, behaviour, pisa.Draws(0))
            out = pisa.dense_attention(q, key, v, found, behaviour, pisa.Draws(0))
        return out

    def blocks():
        scene = pisa.scene_of(maps, (side, side))
        found = pisa.scene_blocks(scene, behaviour, pisa.Draws(0))
        for _ in range(2):
            out = pisa.block_attention(q, key, v, (side, side), found, behaviour, pisa.Draws(0))
        return out

    return blocks, dense


def measure(quick, device):
    side = 16 if quick else 32
    for name, behaviour in BEHAVIOURS.items():
        for k in (20, 60) if name == "best" and not quick else (60,):
            blocks, dense = passes(side, k, behaviour, device)
            blocks()
            # Published behaviour draws in another order: there the results differ by their noise.
            same = name == "best"
            yield Pair(f"PISA, {side * side} tokens, {name}, K {k}", blocks, dense, "dense PISA", target=5, equal=same, rounds=1)
    if device == "cuda":
        yield from pictures(device, 512 if quick else 1024)


def pictures(device, side):
    """Whole pictures through the full-size networks; the baseline puts the dense definition in the blocks' place."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    place = torch.device(device)
    unet = random_weights(network.build_unet, SDXL, UNet2DConditionModel, place, torch.float16)
    vae = random_weights(network.build_vae, VAE, AutoencoderKL, place, torch.float32)
    parts = checkpoint.Placed(unet, place, torch.float16), checkpoint.Placed(vae, place, torch.float32)
    model = checkpoint.BokehDiff(*parts, torch.zeros(1, 77, 2048), torch.zeros(1, 1280))
    disparity = scene_maps(-(-side // CELL), 0)[:, 0, :side, :side].to(place)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2)).to(place)
    defocus = make_defocus(disparity, Lens(strength=30), 0.4, width=side)

    def dense_attention(q, k, v, grid, scene, *more):
        return pisa.dense_attention(q, k, v, pisa.dense_maps(scene, *more), *more)

    def dense():
        known = sampler.scene_blocks, network.block_attention
        sampler.scene_blocks, network.block_attention = (lambda scene, *_: scene), dense_attention
        try:
            return sampler.render(model, image, defocus)
        finally:
            sampler.scene_blocks, network.block_attention = known

    yield Pair(f"BokehDiff, {side} x {side}, fp16", lambda: sampler.render(model, image, defocus), dense, "dense PISA", equal=False)
