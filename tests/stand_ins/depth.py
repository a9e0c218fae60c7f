"""Tiny depth checkpoints: the names of the real files, a few blocks, heads of 64.

The weights are random but scaled so that depth varies over a picture and is neither 0 nor saturated.
"""

import torch

from bokeh_core.depth.depth_anything import DepthAnything, DepthAnythingConfig
from bokeh_core.depth.dpt import DPTConfig
from bokeh_core.depth.video_depth_anything import VideoDepthAnything, VideoDepthAnythingConfig
from bokeh_core.depth.vit import ViTConfig

VIT = ViTConfig(width=128, depth=4, heads=2, taps=(0, 1, 2, 3), grid=5)
HEAD = DPTConfig(width=128, features=64, out_channels=(16, 32, 64, 64))


def depth_anything(seed: int = 0, vit: ViTConfig = VIT, head: DPTConfig = HEAD) -> dict[str, torch.Tensor]:
    """Tensors of a Depth Anything V2 file. Relative and metric files have the same; save as ...metric_hypersim... for the latter."""
    with torch.device("meta"):
        network = DepthAnything(DepthAnythingConfig(vit, head))
    return _weights(network, seed)


def video_depth_anything(seed: int = 0, vit: ViTConfig = VIT, head: DPTConfig = HEAD) -> dict[str, torch.Tensor]:
    """Tensors of a Video Depth Anything file."""
    network = VideoDepthAnything(VideoDepthAnythingConfig(vit, head))
    return _weights(network, seed) | dict(network.named_buffers())


def _weights(network, seed):
    tensors = drawn(network, seed)
    last = next(name for name in tensors if name.endswith("output_conv2.2.weight"))
    tensors[last] = 0.3 * tensors[last].abs()  # towards above 0, where ReLU does not clip
    return tensors


def drawn(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Tensors for all names of a network: norms near 1, gates open, layers that keep the size of what goes through them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in network.state_dict().items():
        noise = torch.randn(like.shape, generator=generator)
        if ".gamma" in name:  # gates; all of them open
            tensors[name] = 0.5 + 0.1 * noise
        elif like.ndim == 1:
            tensors[name] = 0.05 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("weight"):
            tensors[name] = noise * like[0].numel() ** -0.5
        else:
            tensors[name] = 0.2 * noise
    return tensors
