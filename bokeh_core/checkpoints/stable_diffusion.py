"""Stable Diffusion base models (SD 2.1, SDXL, SVD) from the files users have: a diffusers folder or one checkpoint file.

Everything comes from the files on disk: configurations are read from the folder, or from the shapes of the tensors.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BokehError
from .reading import read_checkpoint

HEAD_WIDTH = 64  # of every attention head in SD 2.1, SDXL and SVD
ADDED_TIME_WIDTH = 256  # SDXL: width of each of the six embedded size ids


@dataclass(frozen=True)
class Part:
    """One network of a base model: its tensors under diffusers names, and the keywords of its diffusers class."""

    tensors: dict[str, torch.Tensor]
    config: dict


def read_unet(path: str | Path) -> Part:
    """The denoising UNet of a diffusers folder (its `unet` subfolder, or the subfolder itself) or of a single checkpoint file."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path, "unet")
    tensors = read_checkpoint(path).tensors
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        tensors = _unet_from_ldm(tensors)
    if "conv_in.weight" not in tensors or "down_blocks.0.resnets.0.conv1.weight" not in tensors:
        raise BokehError(f"{path.name} holds no Stable Diffusion UNet (found: {_some(tensors)}); choose the full base checkpoint.")
    return Part(tensors, unet_config(tensors))


def read_vae(path: str | Path, scaling_factor: float) -> Part:
    """The VAE of a diffusers folder (its `vae` subfolder, or the subfolder itself) or of a single checkpoint or VAE file.

    scaling_factor  used where the file does not name one
    """
    path = Path(path)
    if path.is_dir():
        part = read_folder(path, "vae")
        return Part(_new_attention_names(part.tensors), {"scaling_factor": scaling_factor, **part.config})
    tensors = read_checkpoint(path).tensors
    if any("encoder.down.0." in name for name in tensors):
        tensors = _vae_from_ldm(tensors)
    tensors = _new_attention_names(tensors)
    if "encoder.conv_in.weight" not in tensors or "encoder.down_blocks.0.resnets.0.conv1.weight" not in tensors:
        raise BokehError(f"{path.name} holds no Stable Diffusion VAE (found: {_some(tensors)}); choose the full base checkpoint or a VAE.")
    return Part(tensors, {"scaling_factor": scaling_factor, **vae_config(tensors)})


def read_folder(path: Path, name: str) -> Part:
    """The part `name` of a diffusers folder: config.json and its weights (.safetensors, sharded or not, fp16 variant, or .bin)."""
    folder = path / name if (path / name).is_dir() else path
    config = folder / "config.json"
    if not config.is_file():
        raise BokehError(f"{path} has no {name}/config.json; expected a diffusers folder with the subfolder {name}.")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BokehError(f"{config} is damaged ({error}); download it again.") from error
    stem = "diffusion_pytorch_model"
    indexes = [folder / f"{stem}.safetensors.index{variant}.json" for variant in ("", ".fp16")]
    index = next(filter(Path.is_file, indexes), None)
    if index is not None:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise BokehError(f"{index} names files outside its folder; it was not read.")
        files = [folder / file for file in files]
    else:
        names = [
            f"{stem}.safetensors",
            f"{stem}.fp16.safetensors",
            f"{stem}.bin",
            f"{stem}.fp16.bin",
            "model.safetensors",
            "model.fp16.safetensors",
            "pytorch_model.bin",
        ]
        files = [folder / file for file in names if (folder / file).is_file()][:1]
    if not files:
        raise BokehError(f"{folder} has no weights; expected {stem}.safetensors.")
    tensors = {}
    for file in files:
        tensors |= read_checkpoint(file).tensors
    return Part(tensors, {key: value for key, value in settings.items() if not key.startswith("_")})


def unet_config(tensors: dict[str, torch.Tensor]) -> dict:
    """Keywords of diffusers' UNet2DConditionModel, from the shapes of its tensors (SD 2.1 and SDXL: heads are 64 wide)."""
    depth = _count(tensors, "down_blocks.{}.resnets.0.conv1.weight")
    channels = [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(depth)]
    attended = [f"down_blocks.{i}.attentions.0.proj_in.weight" in tensors for i in range(depth)]
    some = attended.index(True)
    blocks = [max(1, _count(tensors, f"down_blocks.{i}.attentions.0.transformer_blocks.{{}}.attn1.to_q.weight")) for i in range(depth)]
    config = {
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_out.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": _count(tensors, "down_blocks.0.resnets.{}.conv1.weight"),
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attended)],
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in channels],
        "cross_attention_dim": tensors[f"down_blocks.{some}.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "transformer_layers_per_block": blocks,
        "use_linear_projection": tensors[f"down_blocks.{some}.attentions.0.proj_in.weight"].ndim == 2,
    }
    if "add_embedding.linear_1.weight" in tensors:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": ADDED_TIME_WIDTH,
            "projection_class_embeddings_input_dim": tensors["add_embedding.linear_1.weight"].shape[1],
        }
    return config


def vae_config(tensors: dict[str, torch.Tensor]) -> dict:
    """Keywords of diffusers' AutoencoderKL, from the shapes of its tensors."""
    depth = _count(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(depth)],
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "sample_size": 1024,
    }


def _unet_from_ldm(tensors):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    first = next((i for i in range(1, 16) if f"model.diffusion_model.input_blocks.{i}.0.op.weight" in tensors), None)
    if first is None:
        raise BokehError("The checkpoint's UNet has no downsampling layer at the usual place; expected an SD 2.1 or SDXL base checkpoint.")
    config = {"layers_per_block": first - 1}
    if "model.diffusion_model.label_emb.0.0.weight" in tensors:
        config["addition_embed_type"] = "text_time"
    return convert_ldm_unet_checkpoint(tensors, config)


def _vae_from_ldm(tensors):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    prefix = next((p for p in ("first_stage_model.", "vae.", "") if f"{p}encoder.down.0.block.0.conv1.weight" in tensors), "")
    tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    depth = _count(tensors, "encoder.down.{}.block.0.conv1.weight")
    return convert_ldm_vae_checkpoint(tensors, {"down_block_types": [""] * depth, "up_block_types": [""] * depth})


def _new_attention_names(tensors):
    """Older VAE files name the middle attention query, key, value, proj_attn, some as 1x1 convolutions."""
    new = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for name, tensor in tensors.items():
        if ".mid_block.attentions." in name:
            for old, word in new.items():
                name = name.replace(old, word)
            if tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


def _count(tensors, pattern: str) -> int:
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def _some(tensors) -> str:
    return ", ".join(list(tensors)[:3])
