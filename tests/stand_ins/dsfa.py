"""Tiny DSFA checkpoints on Depth Anything V2 and UniDepthV2, and a tiny plain UniDepthV2: the names of the real files, heads of 64."""

import torch

from bokeh_core.depth.dsfa import DepthAnythingDSFA, DepthAnythingDSFAConfig, DSFAConfig
from bokeh_core.depth.unidepth import UniDepth, UniDepthConfig
from bokeh_core.depth.vit import ViTConfig

from .depth import HEAD, VIT, drawn

UNI_VIT = ViTConfig(width=128, depth=4, heads=2, taps=(0, 1, 2, 3), grid=5, final_norm_eps=1e-5, position_offset=None, unused_registers=1)
DSFA = DSFAConfig((0, 1, 2, 3), squared_space_scale=True)


def dav2_dsfa(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors like those of DAV2_dsfa_release.pth."""
    with torch.device("meta"):
        network = DepthAnythingDSFA(DepthAnythingDSFAConfig(VIT, HEAD, 80.0, DSFAConfig((2, 3), nested_film=True)))
    return _weights(network, seed)


def udv2_dsfa(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors like those of UDv2_dsfa_release.pth."""
    with torch.device("meta"):
        network = UniDepth(UniDepthConfig(UNI_VIT, DSFA, hidden=64))
    return _weights(network, seed)


def unidepth(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors like those of a plain UniDepthV2 file."""
    with torch.device("meta"):
        network = UniDepth(UniDepthConfig(UNI_VIT, None, hidden=64))
    return {name.replace("pixel_encoder.backbone.", "pixel_encoder."): tensor for name, tensor in _weights(network, seed).items()}


def _weights(network, seed):
    tensors = drawn(network, seed)
    for name in tensors:
        if name.endswith(("output_conv2.2.weight", "to_depth_hr.2.weight")):
            tensors[name] = 0.3 * tensors[name]
        elif name.endswith("focus_attn.qkv.weight"):  # raw K of 10 and more leave nothing of a stack at ordinary logits
            tensors[name] = 6 * tensors[name]
        elif name.endswith("k_embed.0.weight"):
            tensors[name] = 0.1 * tensors[name]
    return tensors
