"""Tiny files with the names and layouts of SDXL, of BokehDiff's LoRA and of its vae.ckpt; seeded random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .ldm import text_to_open_clip, unet_to_ldm, vae_to_ldm

WIDTH = 64  # of one attention head
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [WIDTH, WIDTH, 2 * WIDTH],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 1, 2],
    "cross_attention_dim": 2 * WIDTH,
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 256,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [32, 32, 32, 32],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "projection_dim": WIDTH,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
ACTIVATIONS = {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}
RANK = 8


def base_parts(seed: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """unet, vae, text_encoder and text_encoder_2: tensors under diffusers' and transformers' names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel.from_config(UNET).state_dict(),
            "vae": AutoencoderKL.from_config(VAE).state_dict(),
        }
        for (name, activation), kind in zip(ACTIVATIONS.items(), (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
            tensors = kind(CLIPTextConfig(**TEXT, hidden_act=activation)).state_dict()
            # The published files say `text_model.` everywhere; newer versions of transformers leave it out in one class.
            parts[name] = {
                key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value for key, value in tensors.items()
            }
    return {name: {key: value.contiguous() for key, value in tensors.items()} for name, tensors in parts.items()}


def write_folder(folder: Path, parts: dict, vae: dict | None = None) -> Path:
    """A diffusers folder. vae: entries of the VAE's config that differ from VAE."""
    configs = {"unet": UNET, "vae": VAE | (vae or {})} | {name: {**TEXT, "hidden_act": act} for name, act in ACTIVATIONS.items()}
    for name, config in configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(parts[name], folder / name / ("model.safetensors" if name in ACTIVATIONS else "diffusion_pytorch_model.safetensors"))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


def write_single(file: Path, parts: dict) -> Path:
    """The one file users have in models/checkpoints."""
    file.parent.mkdir(parents=True, exist_ok=True)
    first = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in parts["text_encoder"].items()}
    second = text_to_open_clip(parts["text_encoder_2"], "conditioner.embedders.1.model.")
    ballast = {  # what real files hold beside the weights
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.linspace(0.03, 14.6, 1000),
    }
    tensors = unet_to_ldm(parts["unet"], UNET["layers_per_block"]) | vae_to_ldm(parts["vae"]) | first | second | ballast
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    return file


def lora_tensors(unet: dict[str, torch.Tensor], modules, prefix: str = "", seed: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of rank 8 for these modules."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in sorted(modules):
        weight = unet[f"{module}.weight"]
        ends = (1,) * (weight.ndim - 2)
        down, up = (RANK, *weight.shape[1:]), (weight.shape[0], RANK, *ends)
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(down, generator=generator) * 0.05
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(up, generator=generator) * 0.05
    return tensors


def trained_vae(vae: dict[str, torch.Tensor], seed: int = 3) -> dict[str, torch.Tensor]:
    """What vae.ckpt holds: the trained parts of the encoder."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in vae if name.startswith(("encoder.conv_in.", "encoder.mid_block.", "encoder.conv_out."))]
    return {name: vae[name] + 0.05 * torch.randn(vae[name].shape, generator=generator) for name in names}


def write_all(checkpoints: Path, diffusers: Path, loras: Path, vaes: Path, name: str = "tiny_sdxl") -> None:
    """The single file, the folder, the LoRA and vae.ckpt where ComfyUI looks for them."""
    from bokeh_core.samplers.bokehdiff.checkpoint import LORA_FILE, VAE_FILE, lora_targets

    parts = base_parts()
    write_single(checkpoints / f"{name}.safetensors", parts)
    write_folder(diffusers / name, parts)
    for folder in (loras, vaes):
        folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(parts["unet"], lora_targets(parts["unet"])), loras / LORA_FILE)
    torch.save(trained_vae(parts["vae"]), vaes / VAE_FILE)
