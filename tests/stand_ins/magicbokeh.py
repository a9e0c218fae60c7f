"""A tiny SD 2.1-base and a tiny MagicBokeh file: the names of the real ones, heads of 64, seeded random weights.

Random networks make noise of a photo, but noise that depends on everything that should matter.
"""

import json
from pathlib import Path

import torch

from bokeh_core.samplers.magicbokeh.lora_file import BASE_LAYER, FORMAT, PROCESSORS
from bokeh_core.samplers.magicbokeh.network import ControlNet, pruned_unet

from .ldm import unet_to_ldm, vae_to_ldm
from .lora_pkl import write_lora

WIDTHS = (64, 128, 64, 64)  # steps where the real one (320, 640, 1280, 1280) has them: there lie shortcuts
UNET = {
    "block_out_channels": WIDTHS,
    "attention_head_dim": [1, 2, 1, 1],
    "cross_attention_dim": 32,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE = {
    "block_out_channels": [8, 16, 32, 32],
    "layers_per_block": 2,
    "latent_channels": 4,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
RANKS = {"rank_unet": 4, "rank_vae": 4, "rank_bokeh": 8}


def base(seed: int = 0, vae: dict = VAE) -> tuple[dict, dict]:
    """Tensors of the whole UNet (with all that pruning drops) and of the VAE with these settings, under diffusers names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        networks = UNet2DConditionModel.from_config(UNET), AutoencoderKL.from_config(vae)
    return tuple(_weights(network, seed + n) for n, network in enumerate(networks))


def write_base(folder: Path, seed: int = 0) -> Path:
    """The base model as a diffusers folder. Returns it."""
    from safetensors.torch import save_file

    for (name, config), tensors in zip({"unet": UNET, "vae": VAE}.items(), base(seed), strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": name, **config}))
        save_file(tensors, str(folder / name / "diffusion_pytorch_model.safetensors"))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    (folder / "model_index.json").write_text("{}")
    return folder


def write_single_base(path: Path, vae: dict, seed: int = 0) -> Path:
    """The base model as the one file users have. It tells no number of norm groups: the widths of `vae` must suit 32."""
    from safetensors.torch import save_file

    unet, vae = base(seed, vae)
    tensors = unet_to_ldm(unet, UNET["layers_per_block"]) | vae_to_ldm(vae) | {"cond_stage_model.model.logit_scale": torch.zeros(())}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path))
    return path


def own(seed: int = 7, vae: dict = VAE) -> dict:
    """What is in lora.pkl, with the ControlNet as a table of tensors."""
    unet, vae = base(vae=vae)
    generator = torch.Generator().manual_seed(seed)
    encoder = ["conv_in", *(n for n in _adapted(unet) if n.startswith("down_blocks."))]
    decoder = [*(n for n in _adapted(unet) if n.startswith("up_blocks.")), "conv_out"]
    vae_modules = [n for n in _modules(vae) if n.startswith("encoder.") or n == "quant_conv"]
    adapters = _lora(unet, encoder, "default_encoder", RANKS["rank_unet"], generator)
    adapters |= _lora(unet, decoder, "default_decoder", RANKS["rank_unet"], generator)
    adapters |= {name: unet[name.replace(".base_layer", "")] + 0.01 for name in BASE_LAYER}
    processors = {}
    for name in sorted(PROCESSORS):
        width = unet[name[: name.index("processor.")] + "to_q.weight"].shape[0]
        shape = (RANKS["rank_bokeh"], width) if ".0.weight" in name[-9:] else (width, RANKS["rank_bokeh"])
        processors[name] = torch.randn(shape, generator=generator) * 0.3
    with torch.device("meta"):
        controlnet = ControlNet(pruned_unet(UNET), [8, 16, 16, 32])
    return {
        **{"rank_unet": RANKS["rank_unet"], "rank_vae": RANKS["rank_vae"], "state_dict_attn": RANKS["rank_bokeh"]},
        "unet_lora_encoder_modules": encoder,
        "unet_lora_decoder_modules": decoder,
        "vae_lora_encoder_modules": vae_modules,
        "state_dict_unet": adapters,
        "state_dict_vae": _lora(vae, vae_modules, "default_encoder", RANKS["rank_vae"], generator),
        "processor_state_dict": processors,
        "controlnet": _weights(controlnet, seed),
    }


def write_converted(path: Path, content: dict | None = None) -> Path:
    """As `bokeh models convert` writes it."""
    from safetensors.torch import save_file

    content = content or own()
    tables = {"unet": "state_dict_unet", "vae": "state_dict_vae", "processors": "processor_state_dict", "controlnet": "controlnet"}
    tensors = {f"{table}.{name}": tensor for table, entry in tables.items() for name, tensor in content[entry].items()}
    plain = {
        "rank_unet": content["rank_unet"],
        "rank_vae": content["rank_vae"],
        "rank_bokeh": content["state_dict_attn"],
        "encoder_modules": content["unet_lora_encoder_modules"],
        "decoder_modules": content["unet_lora_decoder_modules"],
        "controlnet_config": {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata={"format": FORMAT, **{name: json.dumps(value) for name, value in plain.items()}})
    return path


def write_pickle(path: Path, content: dict | None = None) -> Path:
    """As released: lora.pkl with a live ControlNet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, content or own())
    return path


def _modules(tensors: dict) -> list[str]:
    return [name.removesuffix(".weight") for name, tensor in tensors.items() if name.endswith(".weight") and tensor.ndim > 1]


def _adapted(unet: dict) -> list[str]:
    """The modules that carry SR LoRA: all of the kept ones but the time embedding and its projections."""
    return [name for name in _modules(unet) if "attn2" not in name and "time_emb" not in name]


def _lora(tensors, modules, adapter, rank, generator) -> dict:
    found = {}
    for name in modules:
        weight = tensors[f"{name}.weight"]
        found[f"{name}.lora_A.{adapter}.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
        found[f"{name}.lora_B.{adapter}.weight"] = up[..., None, None] if weight.ndim == 4 else up
    return found


def _weights(network, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in network.state_dict().items():
        noise = torch.randn(like.shape, generator=generator)
        if like.ndim > 1:
            tensors[name] = noise * like[0].numel() ** -0.5
        else:
            tensors[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    return tensors
