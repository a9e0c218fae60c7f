"""MagicBokeh: attention by regions against its definition at the real size of the UNet's finest level, and the work of a whole photo.

4096 tokens of 320, 5 heads, bokeh LoRA of rank 128, random weights: the masked attention alone, and the whole layer as users run it
against all scores of both branches formed, as released. The photo's operations are counted with the networks at full size.
"""

import torch

from bokeh_core.samplers.magicbokeh import sampler
from bokeh_core.samplers.magicbokeh.focus_aware_attention import FocusAwareAttention, dense_masked_attention, part, split_masked_attention
from bokeh_core.samplers.magicbokeh.network import LATENT_CELL, ControlNet, Decoder, Encoder, PrunedUNet, focus_regions, pruned_unet
from bokeh_core.samplers.magicbokeh.patches import PATCH, grid, tiles

from .measure import Counted, Pair, flops

TOKENS, CHANNELS, HEADS, RANK = 4096, 320, 5, 128
UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 64,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def layer_case(share):
    """(layer, x [1, N, C], mask [1, N])."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = FocusAwareAttention(Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS), RANK).eval()
    return layer, torch.randn(1, TOKENS, CHANNELS), (torch.arange(TOKENS)[None] < share * TOKENS).float()


def dense(layer, x, mask):
    """The layer with all scores formed."""

    def heads(tokens):
        return tokens.unflatten(2, (HEADS, -1)).transpose(1, 2)

    def merged(tokens):
        return tokens.transpose(1, 2).flatten(2)

    lora = layer.processor
    plain = layer.to_q(x), layer.to_k(x), layer.to_v(x)
    changed = [t + layer.scale * d(x) for t, d in zip(plain, (lora.to_q_lora, lora.to_k_lora, lora.to_v_lora), strict=True)]
    q, k, v = map(heads, plain)
    everywhere = merged(((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v)
    within = merged(dense_masked_attention(*map(heads, changed), mask))
    return layer.to_out[0](everywhere) + layer.scale * lora.to_out_lora(within)


def costs(share):
    """(encode(h, w), denoise(), decode(h, w)): TFLOP of a tile of latents of this size; of ControlNet, and of the UNet, on one patch."""
    from diffusers import AutoencoderKL

    side = PATCH // LATENT_CELL
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(VAE).eval()
        encoder, decoder = Encoder(vae), Decoder(vae)
        controlnet, unet = ControlNet(pruned_unet(UNET), [16, 32, 96, 256]).eval(), PrunedUNet(pruned_unet(UNET), RANK).eval()
        latent, condition = torch.empty(1, 4, side, side), torch.empty(1, 3, PATCH, PATCH)
    mask = (torch.arange(PATCH) < share * PATCH).float()[None, :, None].expand(1, -1, PATCH)
    corrections = controlnet(latent, condition)

    def tile(network, channels, height, width):
        return flops(lambda: network(torch.empty(1, channels, height, width, device="meta")))

    return (
        lambda height, width: tile(encoder, 3, height * LATENT_CELL, width * LATENT_CELL),
        flops(lambda: controlnet(latent, condition)),
        flops(lambda: unet(latent, corrections, focus_regions(mask, "meta"))),
        lambda height, width: tile(decoder, 4, height, width),
    )


def photo_costs(height, width, share):
    """TFLOP of a photo by mode and phase."""
    encode, control, unet, decode = costs(share)
    side = PATCH // LATENT_CELL
    exact = len(grid(height, width))
    cells = [-(-n // LATENT_CELL) for n in (height, width)]
    fast = len(grid(*cells, side, sampler.FAST_STRIDE // LATENT_CELL))
    boxes = [
        (box[0].stop - box[0].start, box[1].stop - box[1].start)
        for _, box in tiles(*cells, sampler.FAST_TILE // LATENT_CELL, sampler.FAST_OVERLAP // LATENT_CELL)
    ]
    one = {"encode": encode(side, side), "controlnet": control, "unet": unet, "decode": decode(side, side)}
    large = {size: (encode(*size), decode(*size)) for size in set(boxes)}
    return {
        "patch": one,
        "exact": {name: exact * value for name, value in one.items()},
        "fast": {
            "encode": sum(large[size][0] for size in boxes),
            "controlnet": fast * control,
            "unet": fast * unet,
            "decode": sum(large[size][1] for size in boxes),
        },
        "patches": {"exact": exact, "fast": fast},
        "tiles": [[n * LATENT_CELL for n in size] for size in boxes],
    }


def measure(quick, device, share=0.5):
    layer, x, mask = layer_case(share)
    layer, x = layer.to(device), x.to(device)
    regions = part(mask, device)
    dense_mask = mask.to(device)
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, CHANNELS // HEADS).to(device)
    yield Pair(
        "masked attention, 4096 tokens, half in focus",
        lambda: split_masked_attention(q, k, v, regions),
        lambda: dense_masked_attention(q, k, v, dense_mask),
        "all scores formed, as released",
        target=4,
    )
    yield Pair(
        "the whole layer, both branches",
        lambda: layer(x, {TOKENS: regions}),
        lambda: dense(layer, x, dense_mask),
        "all scores formed, as released",
        target=4,
    )
    cost = photo_costs(1024, 1562, share)
    total = {mode: sum(cost[mode].values()) for mode in ("exact", "fast")}
    note = f"{cost['patches']['fast']} patches for {cost['patches']['exact']}"
    yield Counted("a photo of 1562 x 1024, fast mode", total["fast"], total["exact"], "exact mode, the published schedule", 2, note)
