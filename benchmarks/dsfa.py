"""DSFA: the focus step for the reference alone against all frames, and the memory of a whole model.

The block: full width (1024), 8 heads, random weights, float32. Memory: full-size UniDepthV2 with DSFA on the meta device, at the most
pixels it takes (600 000), every tensor counted while it is alive.
"""

import torch
import torch.nn.functional as F

from bokeh_core.depth import refine
from bokeh_core.depth.checkpoint import DepthModel, DepthModelInfo
from bokeh_core.depth.dsfa import DSFABlock, DSFAConfig
from bokeh_core.depth.unidepth import UniDepth, UniDepthConfig
from bokeh_core.depth.vit import ViTConfig

from .measure import Curve, Pair, Traffic


def memory(frames: int) -> dict:
    """MiB of features and at the peak, of a picture of 600 000 px."""
    vit = ViTConfig(1024, 24, 16, (5, 11, 17, 23), final_norm_eps=1e-5, position_offset=None, unused_registers=1)
    config = UniDepthConfig(vit, DSFAConfig((0, 1, 2, 3), squared_space_scale=True))
    with torch.device("meta"):
        network = UniDepth(config)
    info = DepthModelInfo("UniDepth V2 + DSFA", "L", False, True, None, "", config)
    model = DepthModel(network, info, torch.device("meta"), torch.float32)
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **more: torch.empty_like(q)  # on meta it would be counted unfused
    try:
        pictures = torch.empty(frames + 1, 3, 672, 896, device="meta")
        with torch.no_grad(), Traffic() as traffic:
            features = refine.encode(model, pictures[0], pictures[1:])
            refine.decode(model, features, torch.ones(frames, device="meta"))
    finally:
        F.scaled_dot_product_attention = attention
    kept = sum(x.nbytes for x in (*features.taps, *features.stack.values()))
    return {"network px": list(features.network), "features MiB": kept / 2**20, "peak MiB": traffic.peak / 2**20}


def measure(quick, device):
    patches, frames = 342, 3
    torch.manual_seed(0)
    block = DSFABlock(1024, DSFAConfig((0,), squared_space_scale=True)).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if name.startswith("gamma"):
            parameter.fill_(0.1)
    block = block.to(device)
    given = torch.randn(1, patches, 1024).to(device), torch.randn(1, frames, patches, 1024).to(device), torch.ones(1, frames, device=device)
    yield Pair(
        f"DSFA block, {patches} patches, {frames + 1} frames",
        lambda: block(*given),
        lambda: block.dense(*given)[:, 0],
        "all frames, as published",
        target=1.5,
    )
    yield Curve("UniDepthV2 with DSFA at 600 000 px, float32, beside the weights", [memory(frames)])
