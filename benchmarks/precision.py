"""What half precision costs each stage: its result against that in float32, as a signal-to-noise ratio in dB.

Real widths, random weights of a sensible size, small pictures: rounding and its growth through the layers show, large values of trained
networks do not. 40 dB is an error of 1 %, which 8-bit pictures barely show; what a later stage magnifies needs more.
"""

import copy

import torch

from bokeh_core.depth.checkpoint import build, recognise
from bokeh_core.depth.dsfa import DSFABlock, DSFAConfig
from bokeh_core.render.scatter import scatter
from bokeh_core.samplers.any_to_bokeh.vae import LatentEncoder
from bokeh_core.samplers.bokehdiff import network, pisa

from . import any_to_bokeh, bokehdiff, depth, magicbokeh, physical
from .measure import Curve, random_weights

HALVES = (torch.bfloat16, torch.float16)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def snr(found: torch.Tensor, truth: torch.Tensor) -> float | str:
    error = (found.float() - truth).square().mean()
    return round(float(10 * torch.log10(truth.square().mean() / error)), 1) if bool(error.isfinite()) else "overflow"


def cast(module: torch.nn.Module, *given: torch.Tensor):
    """run(dtype): the module and what it is given in that dtype."""
    return lambda dtype: copy.deepcopy(module).to(dtype)(*(one.to(dtype) for one in given))


def stages():
    """(name, what computes it, run(dtype))."""
    values, radius = physical.case(128, 16)
    lamps = values.clone()
    lamps[:3, ::97, ::89] = 1e5
    yield "light of the physical renderer", "float32", lambda dtype: scatter(values.to(dtype).float(), radius)
    yield "the same with lamps of 100 000", "float32", lambda dtype: scatter(lamps.to(dtype).float(), radius)
    info, tensors = recognise(random_weights(depth.theirs()).state_dict(), "model.safetensors")
    pixels = noise(1, 3, 126, 126)

    def depth_map(dtype):
        return build(info, {name: tensor.to(dtype) for name, tensor in tensors.items()})(pixels.to(dtype))

    yield "Depth Anything V2 S (end of the head always in float32)", "float16 or float32, as ComfyUI says", depth_map
    block = random_weights(DSFABlock(1024, DSFAConfig((0,), squared_space_scale=True)))
    tokens, stack = noise(1, 162, 1024), noise(1, 3, 162, 1024)
    yield "DSFA block", "float16 or float32, as ComfyUI says", cast(block, tokens, stack, torch.ones(1, 3))
    found = pisa.scene_blocks(pisa.scene_of(bokehdiff.scene_maps(16, 60), (16, 16)), pisa.Pisa(), pisa.Draws(0))
    q, k, v = noise(3, 1, bokehdiff.HEADS, 256, bokehdiff.WIDTH)

    def attention(dtype):
        return pisa.block_attention(*(x.to(dtype) for x in (q, k, v)), (16, 16), found, pisa.Pisa(), pisa.Draws(0))

    yield "PISA (geometry always in float32)", "the UNet's, as ComfyUI says", attention
    from diffusers import AutoencoderKL

    vae = bokehdiff.random_weights(network.build_vae, bokehdiff.VAE, AutoencoderKL, torch.device("cpu"), torch.float32)
    picture, latents = noise(1, 3, 64, 64).clamp(-1, 1), noise(1, 4, 8, 8)
    chosen = "bfloat16 or float32, as ComfyUI says"
    yield "SDXL VAE, encoder", chosen, lambda dtype: copy.deepcopy(vae).to(dtype).encode(picture.to(dtype)).latent_dist.mean
    yield "SDXL VAE, decoder", chosen, lambda dtype: copy.deepcopy(vae).to(dtype).decode(latents.to(dtype)).sample
    layer, x, mask = magicbokeh.layer_case(0.5)
    regions = {magicbokeh.TOKENS: magicbokeh.part(mask, "cpu")}
    yield (
        "MagicBokeh, focus-aware attention",
        "float16 or float32: one step magnifies errors 14.6 times",
        lambda dtype: copy.deepcopy(layer).to(dtype)(x.to(dtype), regions),
    )
    encoder = random_weights(LatentEncoder(**any_to_bokeh.VAE))
    yield "Any-to-Bokeh, encoder", "float32: all frames are built on its latents", cast(encoder, picture)


def measure(quick, device):
    rows = []
    for name, computed, run in stages():
        with torch.no_grad():
            results = {dtype: run(dtype) for dtype in (torch.float32, *HALVES)}
        first = {dtype: one[0] if isinstance(one, tuple) else one for dtype, one in results.items()}
        decibels = {str(dtype).removeprefix("torch."): snr(first[dtype], first[torch.float32]) for dtype in HALVES}
        rows.append({"stage": name, **decibels, "computed in": computed})
    yield Curve("half precision against float32, dB", rows)
