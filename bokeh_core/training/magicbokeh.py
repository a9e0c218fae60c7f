"""MagicBokeh's training (magicbokeh SPEC section 13): restoration first, then bokeh and restoration in turn.

No training script is released; what the paper leaves open (steps, ranks, weights) is a field with the value of the code it builds on.
"""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoints.lora import lora_pairs
from ..checkpoints.stable_diffusion import Part
from ..errors import BokehError
from ..metrics.edges import encode
from ..metrics.image import psnr
from ..optics.defocus import Defocus
from ..optics.lens import Lens
from ..optics.published_k import magicbokeh_defocus
from ..render import render
from ..samplers.arguments import Placed
from ..samplers.magicbokeh import sampler
from ..samplers.magicbokeh.checkpoint import DROPPED, LORA_ALPHA, MagicBokeh, blueprints, read_base
from ..samplers.magicbokeh.lora_file import BASE_LAYER, PROCESSORS, MagicBokehFile, read_magicbokeh, write_magicbokeh
from ..samplers.magicbokeh.network import LATENT_CELL, ControlNet, pruned_unet
from ..synthesis.scenes import flatten
from .composites import GAMMA, Composites, Pictures, lens, photograph
from .degradation import REAL_ESRGAN, degrade
from .features import perceptual
from .lora import add_lora, lora_parameters, lora_tensors
from .task import Group, Task, noise

STAGES = ("restoration", "bokeh")
FILE = "magicbokeh.safetensors"
CONDITIONING = (16, 32, 96, 256)  # widths of a new ControlNet's conditioning embedding

# The layers that carry LoRA: all convolutions and projections of the UNet and of the VAE's encoder but those of the time embedding.
ADAPTED = re.compile(
    r"(.+\.)?(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv|conv[12]|conv_shortcut|conv_in|conv_out|quant_conv)"
)


@dataclass(frozen=True)
class Model:
    """base: SD 2.1-base, a diffusers folder or one file. start: the MagicBokeh file to go on from, lora.pkl or magicbokeh.safetensors;
    needed by stage "bokeh". vgg: torchvision's VGG-16 for the perceptual loss; without it that loss is left out."""

    base: Path
    start: Path | None = None
    vgg: Path | None = None


@dataclass(frozen=True)
class Data:
    """foregrounds, backgrounds: folders of cut-outs with alpha and of landscapes. photos: folder of sharp photos that restoration learns
    from; without it, the sharp composites. No folder named: synthetic scenes.

    size   px, of samples
    k_max  blur radius in px per unit of disparity, drawn from 0 to this
    rays   of the truth at a radius of k_max
    scale  the degraded picture is this many times smaller before it is enlarged back
    """

    foregrounds: Path | None = None
    backgrounds: Path | None = None
    photos: Path | None = None
    size: int = 512
    k_max: float = 32.0
    rays: int = 1024
    scale: int = REAL_ESRGAN.scale


@dataclass(frozen=True)
class Options:
    """The paper's recipe.

    stage             "restoration": LoRA of UNet and VAE encoder. "bokeh": ControlNet and bokeh LoRA, in turn with the UNet's LoRA
    phase_steps       steps before the turn changes in stage "bokeh"; the published code counts turns, the paper gives no number
    learning_rate     of stage "restoration" and of the bokeh turn
    restoration_rate  of the restoration turn in stage "bokeh"
    l2, lpips         weights of the losses; the paper gives none, these are OSEDiff's, as are betas, weight decay and clip
    train_conv_in     train the UNet's first layer in stage "restoration": the released file brings one
    sampled           draw latents from the VAE's posterior, as the released inference does; the paper has no noise
    rank_*            of new LoRA sets: OSEDiff's 4, and the bokeh LoRA's 64 that the published helper sets
    """

    stage: str = "restoration"
    phase_steps: int = 1
    learning_rate: float = 5e-5
    restoration_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0
    l2: float = 1.0
    lpips: float = 2.0
    train_conv_in: bool = True
    sampled: bool = False
    rank_unet: int = 4
    rank_vae: int = 4
    rank_bokeh: int = 64


class MagicBokehTraining(Task):
    """Parts: "restoration" in stage "restoration"; "bokeh" and "restoration" in stage "bokeh"."""

    Model, Data, Options = Model, Data, Options

    def __init__(self, model: Model, data: Data, options: Options, seed: int):
        super().__init__()
        if options.stage not in STAGES:
            raise BokehError(f"[options] stage is '{options.stage}'; expected one of {', '.join(STAGES)}.")
        if options.stage == "bokeh" and model.start is None:
            raise BokehError(f"Stage 'bokeh' starts from a restoration model: name [model] start, the {FILE} of stage 'restoration'.")
        if data.size % LATENT_CELL:
            raise BokehError(f"[data] size is {data.size}; expected a multiple of {LATENT_CELL}.")
        if options.phase_steps < 1:
            raise BokehError(f"[options] phase_steps is {options.phase_steps}; expected 1 or more.")
        self.data, self.options, self.seed = data, options, seed
        self.composites = Composites(data.foregrounds, data.backgrounds, data.size)
        self.photos = None if data.photos is None else Pictures(data.photos, data.size)
        self.degradation = replace(REAL_ESRGAN, scale=data.scale)

        unet, vae = read_base(model.base)
        own = fresh(unet, options, seed) if model.start is None else read_magicbokeh(model.start)
        self.scaling_factor, self.config = vae.config["scaling_factor"], own.controlnet_config
        self.encoder_modules, self.decoder_modules = own.encoder_modules, own.decoder_modules
        self.ranks = own.rank_unet, own.rank_vae, own.rank_bokeh
        base_layer = {name: own.unet[name] for name in BASE_LAYER}
        parts = blueprints(unet, vae, replace(own, unet=base_layer, vae={}), Path(model.base).name)  # LoRA is not merged but added below
        for name, part in parts.items():
            tensors = {key: tensor.to(torch.float32, copy=True) for key, tensor in part.tensors.items()}
            self.add_module(name, part.build(nn, tensors))
        self.perceptual = None if model.vgg is None else perceptual(model.vgg)
        draws = torch.Generator().manual_seed(seed)
        add_lora(self.unet, [*own.encoder_modules, *own.decoder_modules], own.rank_unet, LORA_ALPHA, draws)
        add_lora(self.encoder, list(lora_pairs(own.vae, ())) or _adapted(parts["encoder"].tensors), own.rank_vae, LORA_ALPHA, draws)
        _fill(self.unet, {name: tensor for name, tensor in own.unet.items() if name not in BASE_LAYER})
        _fill(self.encoder, own.vae)

    def groups(self) -> dict[str, list[Group]]:
        options = self.options
        common = {"betas": options.betas, "weight_decay": options.weight_decay, "clip": options.clip}
        everything, lora = dict(self.named_parameters()), lora_parameters(self)
        if options.stage == "restoration":
            first = ("unet.conv_in.parametrizations.weight.original", "unet.conv_in.bias") if options.train_conv_in else ()
            trained = lora | {name: everything[name] for name in first}
            return {"restoration": [Group(trained, options.learning_rate, **common)]}
        bokeh = {name: p for name, p in everything.items() if name.startswith("controlnet.") or ".processor." in name}
        restoration = {name: p for name, p in lora.items() if name.startswith("unet.")}
        return {
            "bokeh": [Group(bokeh, options.learning_rate, **common)],
            "restoration": [Group(restoration, options.restoration_rate, **common)],
        }

    def parts(self, step: int) -> list[str]:
        if self.options.stage == "restoration":
            return ["restoration"]
        turn = step // self.options.phase_steps  # the published counter: even = bokeh, odd = restoration
        return ["restoration" if turn % 2 else "bokeh"]

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """degraded, sharp [3, size, size] 0..1; in stage "bokeh" also bokeh [3, size, size], disparity [size, size], k and focus [] of the
        composite, and photo_degraded, photo where there are photos."""
        rng = np.random.default_rng([self.seed, index])
        seed = torch.tensor(int(rng.integers(2**62)))
        if self.options.stage == "restoration" and self.photos is not None:
            photo = self.photos.draw(rng)
            return {"degraded": degrade(photo, rng, self.degradation), "sharp": photo, "seed": seed}
        scene = self.composites.draw(rng)
        sharp, disparity = flatten(scene)
        sharp = encode(sharp)
        sample = {"degraded": degrade(sharp, rng, self.degradation), "sharp": sharp, "seed": seed}
        if self.options.stage == "bokeh":
            k, focus = lens(scene, rng, self.data.k_max)
            sample |= {"bokeh": photograph(scene, k, focus, self.data.rays, self.data.k_max), "disparity": disparity}
            sample |= {"k": torch.tensor(k), "focus": torch.tensor(focus)}
            if self.photos is not None:
                photo = self.photos.draw(rng)
                sample |= {"photo_degraded": degrade(photo, rng, self.degradation), "photo": photo}
        return sample

    def forward(self, part: str, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        if part == "bokeh":
            found, truth = self.render(batch["degraded"], batch["seed"], defocus(batch)), batch["bokeh"] * 2 - 1
        else:
            degraded, sharp = (batch.get(name, batch[other]) for name, other in (("photo_degraded", "degraded"), ("photo", "sharp")))
            found, truth = self.render(degraded, batch["seed"]), sharp * 2 - 1
        losses = {"l2": self.options.l2 * F.mse_loss(found, truth)}
        if self.perceptual is not None:
            losses["lpips"] = self.options.lpips * self.perceptual(found, truth).mean()
        return losses

    def render(self, degraded: torch.Tensor, seeds: torch.Tensor, d: torch.Tensor | None = None) -> torch.Tensor:
        """Pictures [B, 3, H, W] about -1..1, not clipped, of degraded [B, 3, H, W] 0..1 and defocus maps D [B, H, W].

        d None: restoration alone, D = 0 and all tokens of one region, as published.
        """
        model = self._model(degraded.device)
        trains_encoder = self.options.stage == "restoration" and torch.is_grad_enabled()
        with _full_precision(degraded.device), torch.set_grad_enabled(trains_encoder):
            mean, log_variance = sampler.posterior(model, degraded * 2 - 1)
            drawn = (lambda shape: noise(seeds, shape[1:])) if self.options.sampled else None
            latents = sampler.latent_of(model, mean, log_variance, drawn)
        d = torch.zeros_like(degraded[:, 0]) if d is None else d
        eps = sampler.predict_eps(model, latents, 2 * d - 1, sampler.in_focus(d))
        with _full_precision(degraded.device):
            return self.decoder(sampler.one_step(latents, eps) / self.scaling_factor)

    @torch.no_grad()
    def preview(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found, truth = self._judged(batch)
        return torch.cat([batch["degraded"], found, truth], -1)

    @torch.no_grad()
    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """psnr in dB of the stage's own purpose; in stage "bokeh" also of restoration."""
        metrics = {"psnr": _psnr(*self._judged(batch))}
        if self.options.stage == "bokeh":
            metrics["restoration_psnr"] = _psnr(self._picture(batch), batch["sharp"])
        return metrics

    def notes(self) -> list[str]:
        return [] if self.perceptual is not None else ["[model] vgg names no file, so the perceptual loss (LPIPS) is left out."]

    def baselines(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        truth = batch["sharp" if self.options.stage == "restoration" else "bokeh"].cpu()
        found = {"the degraded picture": batch["degraded"].cpu()}
        if self.options.stage == "bokeh":
            given = Defocus(batch["disparity"].cpu(), batch["focus"].cpu(), batch["k"].cpu(), Lens(), False)
            found |= {f"the physical renderer on the {name} picture": render(batch[name].cpu(), given) for name in ("degraded", "sharp")}
        return {name: {"psnr": _psnr(pictures, truth)} for name, pictures in found.items()}

    def renderer(self) -> Callable | None:
        """The trained networks behind the sampler, in linear light; none in stage "restoration"."""
        if self.options.stage == "restoration":
            return None

        def rendered(image: torch.Tensor, defocus: Defocus, **unused) -> torch.Tensor:
            model = self._model(next(self.parameters()).device)
            return sampler.render(model, encode(image), defocus).cpu() ** GAMMA

        return rendered

    def save(self, folder: Path) -> list[Path]:
        unet = {}
        for name, tensor in lora_tensors(self.unet).items():
            adapter = "default_encoder" if name.rsplit(".lora_", 1)[0] in set(self.encoder_modules) else "default_decoder"
            unet[_with_adapter(name, adapter)] = tensor
        conv_in = self.unet.conv_in
        for name, tensor in zip(BASE_LAYER, (conv_in.parametrizations.weight.original, conv_in.bias), strict=True):
            unet[name] = _file_tensor(tensor)
        vae = {_with_adapter(name, "default_encoder"): tensor for name, tensor in lora_tensors(self.encoder).items()}
        processors = {name: _file_tensor(tensor) for name, tensor in self.unet.state_dict().items() if ".processor." in name}
        content = MagicBokehFile(
            *self.ranks, unet, vae, processors, {n: _file_tensor(t) for n, t in self.controlnet.state_dict().items()},
            self.config, self.encoder_modules, self.decoder_modules,
        )  # fmt: skip
        write_magicbokeh(content, folder / FILE)
        return [folder / FILE]

    def _model(self, device: torch.device) -> MagicBokeh:
        parts = (self.encoder, self.controlnet, self.unet, self.decoder)
        return MagicBokeh(*(Placed(part, device, torch.float32) for part in parts), scaling_factor=self.scaling_factor)

    def _picture(self, batch: dict[str, torch.Tensor], d: torch.Tensor | None = None) -> torch.Tensor:
        return (self.render(batch["degraded"], batch["seed"], d) * 0.5 + 0.5).clamp(0, 1)

    def _judged(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the stage makes of the batch, and what it should."""
        if self.options.stage == "restoration":
            return self._picture(batch), batch["sharp"]
        return self._picture(batch, defocus(batch)), batch["bokeh"]


def defocus(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """D = |d - f| K / 32 [B, H, W] of a batch with disparity [B, H, W], k [B] and focus [B]."""
    k, focus = batch["k"][:, None, None], batch["focus"][:, None, None]
    return (batch["disparity"] - focus).abs() * magicbokeh_defocus(k)


def fresh(unet: Part, options: Options, seed: int) -> MagicBokehFile:
    """A file that leaves the base model as it is: no LoRA tensors yet; the ControlNet copies the UNet's way down and adds nothing."""
    draws = torch.Generator().manual_seed(seed)
    kept = {name: tensor for name, tensor in unet.tensors.items() if not DROPPED.match(name)}
    with torch.device("meta"):
        config = {key: value for key, value in unet.config.items() if key != "mid_block_type"}
        wanted = ControlNet(pruned_unet(config), list(CONDITIONING)).state_dict()
    controlnet = {name: kept[name] if name in kept else _initial(name, like, draws) for name, like in wanted.items()}
    processors = {}
    for name in sorted(PROCESSORS):
        width, rank = kept[name[: name.index("processor.")] + "to_q.weight"].shape[0], options.rank_bokeh
        down = name.endswith(".0.weight")
        processors[name] = _uniform((rank, width), width, draws) if down else torch.zeros(width, rank)
    adapted = _adapted(kept)
    encoder = [name for name in adapted if name == "conv_in" or name.startswith("down_blocks.")]
    return MagicBokehFile(
        options.rank_unet, options.rank_vae, options.rank_bokeh,
        unet={f"conv_in.base_layer.{half}": kept[f"conv_in.{half}"] for half in ("weight", "bias")},
        vae={}, processors=processors, controlnet=controlnet, controlnet_config={},
        encoder_modules=encoder, decoder_modules=[name for name in adapted if name not in set(encoder)],
    )  # fmt: skip


def _initial(name: str, like: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Of the ControlNet's own layers: those that lead out start at zero, the others as torch starts them."""
    if name.startswith(("controlnet_down_blocks.", "controlnet_cond_embedding.conv_out.")):
        return torch.zeros(like.shape)
    widths = (3, *(width for width in CONDITIONING for _ in range(2)))  # that go into conv_in, blocks 0, 1, ...
    block = re.search(r"blocks\.(\d+)", name)
    return _uniform(tuple(like.shape), 9 * widths[1 + int(block[1]) if block else 0], draws)


def _uniform(shape: tuple[int, ...], fan_in: int, draws: torch.Generator) -> torch.Tensor:
    """Uniform within 1 / sqrt(fan_in): Kaiming's with a = sqrt 5, and torch's own for weights and biases."""
    return (torch.rand(shape, generator=draws) * 2 - 1) / math.sqrt(fan_in)


def _adapted(tensors: Iterable[str]) -> list[str]:
    weights = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return [name for name in weights if ADAPTED.fullmatch(name)]


def _fill(network: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Take LoRA from a file."""
    with torch.no_grad():
        for module, (down, up) in lora_pairs(tensors, prefixes=()).items():
            lora = network.get_submodule(module).parametrizations.weight[0]
            lora.A.copy_(down)
            lora.B.copy_(up)


def _with_adapter(name: str, adapter: str) -> str:
    return f"{name.removesuffix('.weight')}.{adapter}.weight"


def _file_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().contiguous()


def _full_precision(device: torch.device) -> AbstractContextManager:
    """The VAE's arithmetic is float32 (see `checkpoint.FULL`)."""
    return torch.autocast(device.type, enabled=False)


def _psnr(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return torch.tensor([psnr(a, b) for a, b in zip(found, truth, strict=True)])
