"""From files to networks: an SD 2.1-base model and MagicBokeh's own file (SPEC sections 1 to 4)."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...checkpoints.loading import adopt, load_strict
from ...checkpoints.lora import lora_pairs, merge_lora
from ...checkpoints.stable_diffusion import Part, read_unet, read_vae
from ...errors import BokehError
from ..arguments import Placed, place
from .lora_file import MagicBokehFile, read_magicbokeh
from .network import ControlNet, Decoder, Encoder, PrunedUNet, pruned_unet

LORA_ALPHA = 8.0  # peft's default, which the authors never set: SR and VAE LoRA count 8 / rank
SCALING_FACTOR = 0.18215
DROPPED = re.compile(r"mid_block\.|.*\.transformer_blocks\.\d+\.(attn2|norm2)\.")  # of the base UNet
HALF = (torch.float16, torch.float32)  # one step divides by 0.068: bfloat16's 8 bits would show (SPEC section 6)
FULL = (torch.float32,)  # of the VAE: its latent is divided by it too, and half precision bands smooth blur


@dataclass(frozen=True)
class Blueprint:
    """One network, not built yet: build(ops, tensors) -> network; compute_in: dtypes its arithmetic allows, the preferred one first."""

    build: Callable[[object, dict[str, torch.Tensor]], nn.Module]
    tensors: dict[str, torch.Tensor]
    compute_in: tuple[torch.dtype, ...]


@dataclass(frozen=True, eq=False)
class MagicBokeh:
    """The four networks (each `Placed`, or managed by a host: anything with .network, .device and .dtype) and the latents' scale."""

    encoder: Placed
    controlnet: Placed
    unet: Placed
    decoder: Placed
    scaling_factor: float = SCALING_FACTOR


def load_magicbokeh(base: str | Path, file: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> MagicBokeh:
    """The model for use without a host.

    base    SD 2.1-base: a diffusers folder or a single checkpoint file
    file    lora.pkl, or magicbokeh.safetensors made from it
    dtype   of ControlNet and UNet: float32 or float16; the VAE is float32
    """
    parts, scaling_factor = read_blueprints(base, file)
    placed = {
        name: place(part.build, part.tensors, torch.device(device), dtype if dtype in part.compute_in else torch.float32)
        for name, part in parts.items()
    }
    return MagicBokeh(**placed, scaling_factor=scaling_factor)


def read_blueprints(base: str | Path, file: str | Path) -> tuple[dict[str, Blueprint], float]:
    """The networks by their names in `MagicBokeh`, and the VAE's scaling factor. Raises BokehError for files that are not these."""
    own = read_magicbokeh(file)
    unet, vae = read_base(base)
    return blueprints(unet, vae, own, Path(base).name), vae.config["scaling_factor"]


def read_base(base: str | Path) -> tuple[Part, Part]:
    """UNet and VAE of SD 2.1-base: a diffusers folder or a single checkpoint file. Raises BokehError for the 768 px model and others."""
    _check_prediction(Path(base))
    return read_unet(base), read_vae(base, SCALING_FACTOR)


def blueprints(unet: Part, vae: Part, own: MagicBokehFile, base: str = "the base model") -> dict[str, Blueprint]:
    """Base and LoRA put together: SR and VAE LoRA merged, the bokeh LoRA beside. `base`: its name for messages."""
    if unet.config.get("addition_embed_type") or not unet.config.get("use_linear_projection"):
        raise BokehError(f"{base} is not Stable Diffusion 2.1-base (it looks like SD 1.x or SDXL); MagicBokeh was trained on 2.1-base.")
    kept = {name: tensor for name, tensor in unet.tensors.items() if not DROPPED.match(name)}
    adapters = dict(own.unet)
    for half in ("weight", "bias"):  # the file brings a conv_in of its own
        kept[f"conv_in.{half}"] = adapters.pop(f"conv_in.base_layer.{half}")
    unet_tensors = merge_lora(kept, lora_pairs(adapters), LORA_ALPHA / own.rank_unet, f"MagicBokeh on {base}") | own.processors
    vae_tensors = merge_lora(vae.tensors, lora_pairs(own.vae), LORA_ALPHA / own.rank_vae, f"MagicBokeh on {base}")
    encoder = {name: tensor for name, tensor in vae_tensors.items() if name.startswith(("encoder.", "quant_conv."))}
    decoder = {name: tensor for name, tensor in vae_tensors.items() if name not in encoder}
    widths = conditioning_widths(own.controlnet)

    def builder(what: str, make: Callable[[], nn.Module]):
        def build(ops, tensors: dict[str, torch.Tensor]) -> nn.Module:
            with torch.device("meta"):
                network = make()
            return load_strict(adopt(network, ops), tensors, what)

        return build

    config = {key: value for key, value in unet.config.items() if key != "mid_block_type"}
    return {
        "encoder": Blueprint(builder(f"The VAE of {base}", lambda: Encoder(_vae(vae.config))), encoder, FULL),
        "controlnet": Blueprint(
            builder("The ControlNet of the MagicBokeh file", lambda: ControlNet(pruned_unet(config), widths)), own.controlnet, HALF
        ),
        "unet": Blueprint(builder(f"The UNet of {base}", lambda: PrunedUNet(pruned_unet(config), own.rank_bokeh)), unet_tensors, HALF),
        "decoder": Blueprint(builder(f"The VAE of {base}", lambda: Decoder(_vae(vae.config))), decoder, FULL),
    }


def conditioning_widths(controlnet: dict[str, torch.Tensor]) -> list[int]:
    """Widths of the ControlNet's conditioning embedding, from its tensors."""
    first, strided = "controlnet_cond_embedding.conv_in.weight", "controlnet_cond_embedding.blocks.{}.weight"
    if first not in controlnet:
        raise BokehError(f"The MagicBokeh file's ControlNet lacks {first}; download the file again.")
    widths = [controlnet[first].shape[0]]
    while strided.format(2 * len(widths) - 1) in controlnet:
        widths.append(controlnet[strided.format(2 * len(widths) - 1)].shape[0])
    return widths


def _vae(config: dict) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def _check_prediction(base: Path) -> None:
    """SD 2.1 for 768 px has the same shapes but predicts something else; a folder says so."""
    settings = base / "scheduler" / "scheduler_config.json"
    if not settings.is_file():
        return
    kind = json.loads(settings.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise BokehError(f"{base.name} predicts '{kind}'; expected Stable Diffusion 2.1-base (the 512 px model), which predicts epsilon.")
