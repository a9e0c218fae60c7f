"""A tiny SD 2.1-base that works: its weights are worked out by hand, so that training starts from a model that can see.

The VAE keeps the mean colour of each 8 x 8 cell, and the UNet predicts the noise that leaves a picture as it is. Norms would undo that;
therefore every value v travels in a group of four channels v, -v, C, -C with C far above v: normalising such a group divides by nearly
C / sqrt 2, whatever the picture. A bias far above v makes SiLU the identity. All other layers are small seeded noise in other channels.
"""

import json
from pathlib import Path

import torch

from .magicbokeh import UNET as _UNET
from .magicbokeh import VAE as _VAE

C, LIFT, SCALE = 8.0, 8.0, 1 / 0.18215  # SCALE: of the latents, so that they span -1..1 in the UNet
A = 0.00466009508818388  # alpha bar at t = 999
VAE = {**_VAE, "block_out_channels": [16] * 4, "layers_per_block": 1, "norm_num_groups": 4}
UNET = {**_UNET, "block_out_channels": [64] * 4, "attention_head_dim": [1] * 4, "norm_num_groups": 16}


def write_base(folder: Path, seed: int = 0, flaw: float = 0.0) -> Path:
    """As a diffusers folder. flaw: error of the predicted noise in red, its opposite in blue; 14.6 times that in the picture."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file

    for name, config, kind in (("unet", UNET, UNet2DConditionModel), ("vae", VAE, AutoencoderKL)):
        with torch.device("meta"):
            like = kind.from_config(config).state_dict()
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": kind.__name__, **config}))
        tensors = _unet(like, seed) if name == "unet" else _vae(like)
        if name == "unet":
            tensors["conv_out.bias"] += torch.tensor([flaw, 0.0, -flaw, 0.0])
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(folder / name / "diffusion_pytorch_model.safetensors"))
    (folder / "model_index.json").write_text("{}")
    return folder


def _vae(like) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros(t.shape) for name, t in like.items()}
    for name, t in tensors.items():
        if name.endswith("weight") and t.ndim == 1:
            t.fill_(1)
    mean = torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)])  # the fourth latent is the brightness
    _lead_in(tensors, "encoder.conv_in", mean)
    _lead_in(tensors, "decoder.conv_in", torch.eye(4) / SCALE)
    _lead_out(tensors, "encoder", torch.cat([torch.eye(4) * SCALE, torch.zeros(4, 4)]))
    tensors["encoder.conv_out.bias"][4:] = -20  # no spread
    _lead_out(tensors, "decoder", torch.eye(4)[:3])
    for name, t in tensors.items():
        if name.endswith("downsamplers.0.conv.weight"):
            for i in range(16):
                t[i, i, :2, :2] = 0.25
        if name.endswith("upsamplers.0.conv.weight"):
            for i in range(16):
                t[i, i, 1, 1] = 1
    for name, channels in (("quant_conv", 8), ("post_quant_conv", 4)):
        tensors[f"{name}.weight"][:] = torch.eye(channels)[..., None, None]
    return tensors


def _unet(like, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, t in like.items():
        noise = torch.randn(t.shape, generator=generator)
        if t.ndim > 1:
            tensors[name] = noise * t[0].numel() ** -0.5
        else:
            tensors[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        if name.startswith("up_blocks.3.") and ("conv2." in name or "proj_out." in name):
            tensors[name][:16] = 0  # where the latent passes
    _lead_in(tensors, "conv_in", torch.eye(4))
    shortcut = tensors["up_blocks.3.resnets.2.conv_shortcut.weight"]
    shortcut[:16] = 0
    shortcut[:16, 64:80] = torch.eye(16)[..., None, None]  # from the first skip
    tensors["up_blocks.3.resnets.2.conv_shortcut.bias"][:16] = 0
    _lead_out(tensors, "", torch.eye(4) * (1 - A**0.5) / (1 - A) ** 0.5)
    return tensors


def _lead_in(tensors, layer: str, values: torch.Tensor) -> None:
    """values [v, in]: v values into the first 4 v channels, each as v, -v, C, -C."""
    weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
    groups = len(values)
    weight[: 4 * groups], bias[: 4 * groups] = 0, 0
    for i, row in enumerate(values):
        weight[4 * i, :, 1, 1], weight[4 * i + 1, :, 1, 1] = row, -row
        bias[4 * i + 2], bias[4 * i + 3] = C, -C


def _lead_out(tensors, half: str, values: torch.Tensor) -> None:
    """values [out, 4]: the four values out of conv_norm_out, SiLU and conv_out."""
    prefix = f"{half}." if half else ""
    norm, layer = f"{prefix}conv_norm_out", f"{prefix}conv_out"
    tensors[f"{norm}.weight"][:16:4], tensors[f"{norm}.bias"][:16:4] = C / 2**0.5, LIFT
    tensors[f"{layer}.weight"][:] = 0
    tensors[f"{layer}.weight"][:, :16:4, 1, 1] = values
    tensors[f"{layer}.bias"][:] = -LIFT * values.sum(1)
