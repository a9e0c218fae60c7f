"""BokehDiff's files: an SDXL base model, the LoRA of its UNet, and new weights for its VAE's encoder (SPEC section 1)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoints.catalogue import Report
from ...checkpoints.lora import lora_pairs, merge_lora
from ...checkpoints.reading import read_checkpoint
from ...checkpoints.stable_diffusion import Part, read_unet, read_vae
from ...errors import BokehError
from ..arguments import Placed, place
from .network import build_unet, build_vae
from .prompt import embed_prompt, read_text_encoders

SCALING_FACTOR = 0.13025  # of SDXL's latents
LORA_FILE, VAE_FILE = "pytorch_lora_weights.safetensors", "vae.ckpt"
PAGE = "https://huggingface.co/zcx65535/bokehdiff"

# Layers the LoRA was trained on, by the end of their names (SPEC 1.1).
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
SECTIONS = ("down_blocks", "mid_block", "up_blocks")
# Parts of the VAE that were trained; an older form of the file holds the whole VAE (SPEC 1.2).
TRAINED_VAE = ("encoder.conv_in.", "encoder.mid_block.", "encoder.conv_out.")


@dataclass(frozen=True)
class Weights:
    """Everything read from the files, ready to build the networks.

    unet, vae  tensors under diffusers names, LoRA merged and encoder replaced, and the keywords of their classes
    text       [1, 77, D] and pooled [1, P] float32: the fixed prompt
    """

    unet: Part
    vae: Part
    text: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class BokehDiff:
    """What the sampler needs.

    unet, vae  objects with `network`, `device` and `dtype`: `Placed`, or the host's handles that move weights by themselves
    text, pooled  the fixed prompt
    """

    unet: Placed
    vae: Placed
    text: torch.Tensor
    pooled: torch.Tensor

    @property
    def scaling(self) -> float:
        """Factor from the VAE's latents to the UNet's."""
        return float(self.vae.network.config.scaling_factor)


def load_bokehdiff(
    base: str | Path, lora: str | Path, vae_ckpt: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> BokehDiff:
    """BokehDiff for use without ComfyUI.

    base      diffusers folder or single .safetensors file of an SDXL model; the weights were trained on RealVisXL V5.0
    lora      pytorch_lora_weights.safetensors
    vae_ckpt  vae.ckpt
    dtype     of the UNet; the VAE overflows in float16 and stays in float32 then
    Raises BokehError when a file is not what it should be.
    """
    weights, device = read_bokehdiff(base, lora, vae_ckpt), torch.device(device)
    in_vae = torch.float32 if dtype == torch.float16 else dtype
    unet = place(lambda ops, tensors: build_unet(weights.unet.config, tensors, ops), weights.unet.tensors, device, dtype)
    vae = place(lambda ops, tensors: build_vae(weights.vae.config, tensors, ops), weights.vae.tensors, device, in_vae)
    return BokehDiff(unet, vae, weights.text, weights.pooled)


def read_bokehdiff(base: str | Path, lora: str | Path, vae_ckpt: str | Path) -> Weights:
    """The weights from the files, LoRA merged and encoder replaced. The text encoders are read, used for the prompt, and let go."""
    unet = read_unet(base)
    unet = Part(merge(unet.tensors, read_checkpoint(lora).tensors, Path(lora).name), unet.config)
    vae = read_vae(base, SCALING_FACTOR)
    vae = Part(replace_encoder(vae.tensors, read_checkpoint(vae_ckpt).tensors, Path(vae_ckpt).name), vae.config)
    return Weights(unet, vae, *embed_prompt(*read_text_encoders(base)))


def merge(unet: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], file: str) -> dict[str, torch.Tensor]:
    """The UNet's tensors with BokehDiff's LoRA merged; alpha equals the rank, so the scale is 1.

    lora  PEFT names, with or without the prefix `unet.`. Which sections of the UNet it covers is read from the file; a section must be
          covered completely, and the down blocks are never left out. Raises BokehError otherwise.
    """
    try:
        pairs = lora_pairs(lora)
    except BokehError as error:
        raise BokehError(f"{file} is not BokehDiff's LoRA: {error} {_where(LORA_FILE, 'loras')}") from error
    wanted = lora_targets(unet)
    adapted = [section for section in SECTIONS if section == SECTIONS[0] or any(name.startswith(section) for name in pairs)]
    expected = {name for name in wanted if name.startswith(tuple(adapted))}
    if pairs.keys() != expected:
        strange, missing = sorted(pairs.keys() - expected), sorted(expected - pairs.keys())
        found = [f"{len(strange)} layers that BokehDiff does not adapt, such as {strange[0]}"] if strange else []
        found += [f"{len(missing)} of {len(expected)} layers missing, such as {missing[0]}"] if missing else []
        raise BokehError(f"{file} is not BokehDiff's LoRA for this base model: {'; '.join(found)}. {_where(LORA_FILE, 'loras')}")
    return merge_lora(unet, pairs, 1.0, file)


def lora_targets(unet: dict[str, torch.Tensor]) -> set[str]:
    """Names of all the UNet's layers that BokehDiff's training adapted."""
    layers = {name.removesuffix(".weight") for name in unet if name.endswith(".weight")}
    return {name for name in layers if name.endswith(tuple("." + target for target in TARGETS))}


def replace_encoder(vae: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], file: str) -> dict[str, torch.Tensor]:
    """The VAE's tensors in float32 with BokehDiff's trained ones in their place: parts of the encoder, or a whole VAE."""
    needed = {name for name in vae if name.startswith(TRAINED_VAE)}
    unknown, missing = sorted(trained.keys() - vae.keys()), sorted(needed - trained.keys())
    if unknown or missing:
        found = [f"{len(unknown)} unknown tensors, such as {unknown[0]}"] if unknown else []
        found += [f"{len(missing)} of {len(needed)} tensors of the trained encoder missing, such as {missing[0]}"] if missing else []
        raise BokehError(f"{file} is not BokehDiff's {VAE_FILE}: {'; '.join(found)}. {_where(VAE_FILE, 'vae')}")
    return {name: trained.get(name, tensor).float() for name, tensor in vae.items()}


def _where(file: str, folder: str) -> str:
    return f"Get {file} from {PAGE} and put it into models/{folder}."


# The full-size counts of the two known layouts (SPEC 1.1): adapted layers -> what was trained.
_LAYOUTS = {788: "the whole UNet", 378: "all but the up blocks"}


def report(tensors: dict[str, torch.Tensor], path: Path) -> Report | None:
    """What `bokeh models check` says of BokehDiff's LoRA and of its vae.ckpt; None for other files."""
    if any(".lora_A." in name for name in tensors) and any("down_blocks.1.attentions.0." in name for name in tensors):
        return _report_lora(tensors)
    if "encoder.mid_block.attentions.0.to_q.weight" in tensors and "encoder.conv_in.weight" in tensors:
        return _report_vae(tensors)
    return None


def _report_lora(tensors):
    problems = []
    try:
        pairs = lora_pairs(tensors)
    except BokehError as error:
        return Report("a LoRA of a diffusers UNet", problems=(str(error),))
    ranks = sorted({down.shape[0] for down, _ in pairs.values()})
    sections = [section for section in SECTIONS if any(name.startswith(section) for name in pairs)]
    kinds = {target for target in TARGETS if any(name.endswith("." + target) for name in pairs)}
    strange = sorted(name for name in pairs if not name.endswith(tuple("." + target for target in TARGETS)))
    if strange:
        problems.append(f"{len(strange)} layers that BokehDiff does not adapt, such as {strange[0]}.")
    if SECTIONS[0] not in sections or "conv1" not in kinds:
        problems.append("BokehDiff's LoRA adapts all convolutions and attention of the down blocks; this one does not.")
    with_prefix = all(name.startswith("unet.") for name in tensors)
    facts = (
        ("adapted layers", f"{len(pairs)}: {_LAYOUTS.get(len(pairs), 'a layout not known before')}"),
        ("sections", ", ".join(sections)),
        ("rank", ", ".join(map(str, ranks))),
        ("names", "with the prefix unet." if with_prefix else "without the prefix unet."),
    )
    title = "BokehDiff's LoRA" if not problems else "a LoRA of a diffusers UNet, not BokehDiff's"
    return Report(title, facts, tuple(problems))


def _report_vae(tensors):
    """A whole VAE of diffusers looks the same whoever trained it; the partial file is BokehDiff's alone."""
    whole = any(name.startswith("decoder.") for name in tensors)
    strange = sorted(name for name in tensors if not whole and not name.startswith(TRAINED_VAE))
    count = sum(tensor.numel() for tensor in tensors.values())
    facts = (("layout", "a complete VAE" if whole else "the trained parts of the encoder"), ("numbers", f"{count / 1e6:.2f} million"))
    problems = (f"{len(strange)} tensors BokehDiff did not train, such as {strange[0]}.",) if strange else ()
    return Report("a VAE of diffusers, which may be BokehDiff's" if whole else "BokehDiff's VAE encoder", facts, problems)
