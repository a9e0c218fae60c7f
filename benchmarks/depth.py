"""Depth Anything V2 against the transformers library's with the same weights, and Video Depth Anything against its published scheme.

ViT-S, float32. Published: every window of a clip goes whole through the network; ours: every frame through the ViT once, the end of the
head only for frames that are used.
"""

import torch

from bokeh_core.depth.checkpoint import DepthModel, DepthModelInfo, build, recognise
from bokeh_core.depth.dpt import DPTConfig
from bokeh_core.depth.estimate import depth_maps
from bokeh_core.depth.upsampling import guided_upsample
from bokeh_core.depth.video_depth_anything import VideoDepthAnything, VideoDepthAnythingConfig, windows
from bokeh_core.depth.vit import ViTConfig
from bokeh_core.synthesis.demo import demo_scene

from .measure import Pair, random_weights

VIT = ViTConfig(width=384, depth=12, heads=6, taps=(2, 5, 8, 11))
HEAD = DPTConfig(width=384, features=64, out_channels=(48, 96, 192, 384))
CLIP = (84, 112)


def theirs():
    from transformers import DepthAnythingConfig as Config
    from transformers import DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=VIT.width,
        num_hidden_layers=VIT.depth,
        num_attention_heads=VIT.heads,
        image_size=518,
        patch_size=14,
        out_indices=[tap + 1 for tap in VIT.taps],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = Config(
        backbone_config=backbone,
        reassemble_hidden_size=HEAD.width,
        neck_hidden_sizes=list(HEAD.out_channels),
        fusion_hidden_size=HEAD.features,
        patch_size=14,
    )
    return DepthAnythingForDepthEstimation(config)


def measure(quick, device):
    size = 238 if quick else 518
    other = random_weights(theirs()).to(device)
    ours = build(*recognise(other.state_dict(), "model.safetensors")).to(device)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    yield Pair(
        f"Depth Anything V2 S, {size} x {size}", lambda: ours(x), lambda: other(x).predicted_depth, "transformers, same weights", target=1.0
    )
    scene = demo_scene(0, 624, 416) if quick else demo_scene(0, 1248, 832)
    picture = scene["image"][None].clamp(0, 1).to(device)
    low = torch.nn.functional.interpolate(scene["disparity"][None, None].to(device), size=(364, 518), mode="area")[0]
    yield Pair(f"guided upsampling to {picture.shape[3]} x {picture.shape[2]}", lambda: guided_upsample(low, picture), rounds=1)
    frames = 33 if quick else 76
    network = random_weights(VideoDepthAnything(VideoDepthAnythingConfig(VIT, HEAD))).to(device)
    info = DepthModelInfo("Video Depth Anything", "S", True, False, None, "a benchmark", network.config)
    model = DepthModel(network, info, torch.device(device), torch.float32)
    clip = [torch.rand(3, *CLIP, generator=torch.Generator().manual_seed(i)).to(device) for i in range(frames)]

    def cached():
        for _ in depth_maps(model, clip, frames, clip=True, resolution=CLIP[0]):
            pass

    def whole():
        for slots in windows(frames):
            network(torch.stack([clip[i] for i in slots])[None])

    yield Pair(f"Video Depth Anything S, {frames} frames", cached, whole, "published schedule", rounds=1)
