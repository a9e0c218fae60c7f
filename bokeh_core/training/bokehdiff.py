"""BokehDiff's recipe: a LoRA of SDXL's UNet and parts of the VAE's encoder, on pairs that are traced on the fly (SPEC section 8)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from ..checkpoints.stable_diffusion import read_unet, read_vae
from ..errors import BokehError
from ..metrics.edges import encode
from ..metrics.image import psnr, ssim
from ..optics.defocus import Defocus
from ..optics.lens import Lens
from ..pixels import to_bytes
from ..samplers.arguments import Placed
from ..samplers.bokehdiff import checkpoint, sampler
from ..samplers.bokehdiff.network import PisaProcessor, build_unet, build_vae, put_pisa, token_grid
from ..samplers.bokehdiff.pisa import Draws, Pisa, scene_blocks, scene_of
from ..samplers.bokehdiff.prompt import embed_prompt, read_text_encoders
from ..synthesis.bokehdiff_pair import PairDraws, PairRecipe, make_pair
from .lora import add_lora, lora_tensors
from .losses import EDGE_PAPER, EDGE_SCRIPT, FAKE, REAL, GanHead, cosine, edge_loss, gan_loss
from .task import Group, Task, generator

EDGES = {"paper": EDGE_PAPER, "script": EDGE_SCRIPT}
PX = 10  # px of a 512 px tile in a unit of the CoC radius
SMALLEST = 16  # px of a cut-out's sides


@dataclass(frozen=True)
class Model:
    """Released files.

    base           diffusers folder or single file of an SDXL model; the published weights start from RealVisXL V5.0
    vgg            torchvision's VGG-16, for the perceptual loss; without it that loss is off
    linear         LPIPS's linear weights; by default those in the package lpips
    discriminator  timm's convnext_base of ImageNet 22k, for the adversarial loss; without it that loss is off
    """

    base: Path
    vgg: Path | None = None
    linear: Path | None = None
    discriminator: Path | None = None


@dataclass(frozen=True)
class Data:
    """Pairs of one cut-out before one slanted picture.

    foregrounds  folder of pictures with alpha; without it figures from procedural scenes
    backgrounds  folder of pictures; without it procedural ones
    size, crop   px of the traced picture and of what is cut out of it: multiples of 32
    k0           px of blur that everything is scaled from
    rays         at most, through the aperture of our tracer; 0: the published one, the same light in many times the time
    """

    foregrounds: Path | None = None
    backgrounds: Path | None = None
    size: int = 768
    crop: int = 512
    k0: int = 12
    rays: int = 256

    def __post_init__(self):
        if self.crop % sampler.MULTIPLE or not 0 < self.crop <= self.size:
            raise BokehError(f"[data] crop is {self.crop} and size {self.size}; expected a multiple of {sampler.MULTIPLE}, up to size.")
        if self.k0 < 1 or self.rays < 0:
            raise BokehError(f"[data] k0 is {self.k0} and rays {self.rays}; expected at least 1 and 0.")


@dataclass(frozen=True)
class Options:
    """The paper's recipe; `script` has what the released script does otherwise (SPEC sections 8.3 to 8.5 and 11).

    rate                     learning rate of the LoRA
    encoder_share            of it for the VAE's encoder
    discriminator_share      of it for the discriminator
    warmup, schedule_steps   of the cosine: up a line, then down to the end
    rank                     of the LoRA; alpha is the same
    sections                 of the UNet that get the LoRA
    encoder_parts            of the VAE's encoder that are trained
    mse, edge, perceptual, adversarial   weights of the losses
    edge_form                "paper" (Sobel, 1 / scale^2) or "script" (forward differences, 1 / scale, 1 + maximum)
    gan_step                 first step with the adversarial term; the discriminator learns from step 0
    hardness                 of PISA's mask at the first step; each call adds 1
    dropout                  of PISA's weights
    keep_encoder_gradients   published quirk: the script never zeroes the encoder's gradients, each step takes the running sum
    """

    rate: float = 1e-4
    encoder_share: float = 0.1
    discriminator_share: float = 2.0
    warmup: int = 20
    schedule_steps: int = 120_000
    rank: int = 8
    sections: tuple[Literal["down_blocks", "mid_block", "up_blocks"], ...] = ("down_blocks", "mid_block")
    encoder_parts: tuple[Literal["conv_in", "mid_block", "conv_out"], ...] = ("mid_block", "conv_out")
    mse: float = 1.0
    edge: float = 1.0
    perceptual: float = 5.0
    adversarial: float = 0.5
    edge_form: Literal["paper", "script"] = "paper"
    gan_step: int = 30_000
    hardness: float = 3.0
    dropout: float = 0.1
    keep_encoder_gradients: bool = False

    def __post_init__(self):
        if checkpoint.SECTIONS[0] not in self.sections:
            raise BokehError("[options] sections leaves out down_blocks, which BokehDiff's loader asks for; add it.")
        if not 1 < self.hardness < 1e6:
            raise BokehError(f"[options] hardness is {self.hardness:g}; expected a number above 1 and below a million.")

    @classmethod
    def script(cls) -> "Options":
        """What the authors' README runs: its own rates, weights, edge loss and places, and the encoder's gradients never zeroed."""
        return cls(
            rate=5e-5,
            sections=checkpoint.SECTIONS,
            encoder_parts=("conv_in", "mid_block", "conv_out"),
            adversarial=0.1,
            edge_form="script",
            keep_encoder_gradients=True,
        )


PISA = Pisa(segments=5, samples=4, random_jitter=True)  # in training (SPEC 4.2); in training state nothing is occluded completely


class TrainingPisa(PisaProcessor):
    """PISA in its training state while `scene` is set: each call looks at the scene anew and leaves the mask a little harder."""

    scene = None

    def __call__(self, attn, hidden_states, *unused, **more):
        if self.scene is None:
            return super().__call__(attn, hidden_states)
        self.blocks = scene_blocks(self.scene, self.pisa, self.draws)
        out = super().__call__(attn, hidden_states)
        self.pisa = self.pisa.harder()
        return out


class SampleDraws(Draws):
    """Jitter and dropout from one seed per sample, so that they do not depend on the other samples in the batch. They are many millions:
    drawn where they are needed."""

    def __init__(self, seeds: torch.Tensor):
        self.generators = [torch.Generator(seeds.device).manual_seed(int(seed)) for seed in seeds]

    def jitter(self, samples, segment, image, queries, keys):
        return torch.rand(samples, len(queries), 2, generator=self.generators[image], device=queries.device)

    def kept(self, probability, heads, queries, keys, images):
        shape = heads, len(keys), len(queries)
        return torch.stack([torch.rand(shape, generator=one, device=queries.device) >= probability for one in self.generators])


class BokehDiffTask(Task):
    """Parts: "generator" (LoRA and encoder) and, where a file for its features is named, "discriminator"."""

    Model, Data, Options = Model, Data, Options

    def __init__(self, model: Model, data: Data, options: Options, seed: int):
        super().__init__()
        from .features import convnext, perceptual

        self.data, self.options, self.seed = data, options, seed
        self.foregrounds, self.backgrounds = _pictures(data.foregrounds, alpha=True), _pictures(data.backgrounds)
        unet, vae = read_unet(model.base), read_vae(model.base, checkpoint.SCALING_FACTOR)
        text, pooled = embed_prompt(*read_text_encoders(model.base))
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        self.unet = build_unet(unet.config, {name: tensor.float() for name, tensor in unet.tensors.items()})
        self.vae = build_vae(vae.config, {name: tensor.float() for name, tensor in vae.tensors.items()})
        self.unet.processor = TrainingPisa()
        for block in self.unet.unet.down_blocks[1].attentions[0].transformer_blocks:
            put_pisa(block.attn1, self.unet.processor)
        targets = sorted(name for name in checkpoint.lora_targets(unet.tensors) if name.startswith(options.sections))
        add_lora(self.unet.unet, targets, options.rank, options.rank, generator(seed, 1))
        self.features = convnext(model.discriminator) if model.discriminator and options.adversarial else None
        self.perceptual = perceptual(model.vgg, model.linear) if model.vgg and options.perceptual else None
        self.head = GanHead(_width(self.features), seed=seed) if self.features else None
        self._made: dict[tuple, torch.Tensor] = {}  # predictions of this step that the discriminator will see

    def notes(self) -> list[str]:
        off = [("perceptual", "vgg", self.perceptual), ("adversarial", "discriminator", self.features)]
        return [
            f"the {loss} loss is off: [model] {key} names no file."
            for loss, key, network in off
            if network is None and getattr(self.options, loss)
        ]

    def groups(self) -> dict[str, list[Group]]:
        o = self.options
        names = dict(self.named_parameters())
        parts = tuple(f"vae.encoder.{part}." for part in o.encoder_parts)
        lora = {name: p for name, p in names.items() if name.startswith("unet.") and name.endswith((".A", ".B"))}
        encoder = {name: p for name, p in names.items() if name.startswith(parts)}

        def group(parameters, share=1.0, keep=False):
            return Group(
                parameters,
                o.rate * share,
                betas=(0.9, 0.95),
                eps=1e-7,
                weight_decay=0.01,
                clip=1.0,
                keep_gradients=keep,
                schedule=lambda step: cosine(step, o.warmup, o.schedule_steps),
            )

        groups = {"generator": [group(lora), group(encoder, o.encoder_share, o.keep_encoder_gradients)]}
        if self.head is not None:
            head = {name: p for name, p in names.items() if name.startswith("head.")}
            groups["discriminator"] = [group(head, o.discriminator_share)]
        return groups

    # Data

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """target, aif [3, crop, crop] -1..1; disparity, defocus_strength |d - d_f| [1, crop, crop]; k [1], focus [1]; ids [6] of the size;
        seed []."""
        rng = np.random.default_rng([self.seed, index])
        data = self.data
        recipe = PairRecipe(size=data.size, k0=data.k0, crop=data.crop, rays=data.rays or None)
        at = tuple(int(side) for side in rng.integers(0, data.size - data.crop + 1, 2))
        front = _drawn_cutout(rng, data.size) if self.foregrounds is None else _cutout(_one_of(self.foregrounds, rng))
        back = _drawn_background(rng, data.size) if self.backgrounds is None else _read(_one_of(self.backgrounds, rng))[0]
        pair = make_pair(front, back, PairDraws(int(rng.integers(2**62))), at, recipe)
        return {name: pair[name].float().contiguous() for name in ("target", "aif", "disparity", "defocus_strength", "k")} | {
            "focus": pair["disp_focus"].float(),
            "ids": torch.tensor([data.size, data.size, *at, data.crop, data.crop], dtype=torch.float32),
            "seed": torch.tensor(int(rng.integers(2**62))),
        }

    # Losses

    def forward(self, part: str, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        o, key = self.options, tuple(batch["seed"].tolist())
        if part == "discriminator":
            real, fake = batch["target"], self._made.pop(key)
            logits = [self.head(self._look(picture)) for picture in (real, fake)]
            return {f"{name}": gan_loss(one, aim).mean() for name, one, aim in zip(("real", "fake"), logits, (REAL, FAKE), strict=True)}
        made = self.predict(batch, step)
        losses = {"mse": o.mse * (made - batch["target"]).square().mean()}
        made = made.clamp(-1, 1)
        if o.edge:
            losses["edge"] = o.edge * edge_loss(made, batch["target"], batch["aif"], form=EDGES[o.edge_form])
        if self.perceptual is not None:
            losses["perceptual"] = o.perceptual * self.perceptual(made, batch["target"]).mean()
        if self.head is not None:
            if step >= o.gan_step:
                losses["adversarial"] = o.adversarial * gan_loss(self.head(self._look(made)), REAL).mean()
            self._made[key] = made.detach()
        return losses

    def _look(self, picture: torch.Tensor) -> torch.Tensor:
        return self.features(picture / 2 + 0.5)

    def predict(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """[B, 3, H, W] -1..1 and beyond: the networks' picture in training state, with gradients."""
        latents = self.vae.encode(batch["aif"]).latent_dist.mode() * self.vae.config.scaling_factor
        processor, grid = self.unet.processor, token_grid(*latents.shape[-2:])
        disp_coc = torch.cat([batch["disparity"], batch["defocus_strength"] * batch["k"][..., None, None]], 1)
        # Two layers call once each in every pass.
        pisa = Pisa(
            hardness=self.options.hardness + 2 * step,
            segments=PISA.segments,
            samples=PISA.samples,
            random_jitter=True,
            dropout=self.options.dropout,
        )
        count = len(latents)
        text, pooled = self.text.expand(count, -1, -1), self.pooled.expand(count, -1)
        processor.scene = scene_of(disp_coc, grid)
        try:
            noise = self.unet(latents, sampler.TIMESTEP, text, pooled, batch["ids"], [], pisa, SampleDraws(batch["seed"]))
        finally:
            processor.scene = None
        clean = sampler.one_step(latents, noise, float(sampler.alpha_bar()[sampler.TIMESTEP]))
        return self.vae.decode(clean / self.vae.config.scaling_factor).sample

    # What is seen

    @torch.no_grad()
    def rendered(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, 3, H, W] 0..1: what a user of the trained files gets."""
        model, pictures = self._model(), []
        for i in range(len(batch["aif"])):
            sharp, disparity, strength, k = (batch[name][i : i + 1] for name in ("aif", "disparity", "defocus_strength", "k"))
            one = sampler.Condition(sharp, disparity, PX * strength * k[..., None, None], tuple(sharp.shape[-2:]))
            tile = sharp.shape[-1]
            latents = sampler.bokeh_latents(model, sampler.encode(model, sharp, tile), one, sampler.BEST, tile)
            pictures.append(sampler.decode(model, latents, tile))
        return torch.cat(pictures)

    def preview(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([batch["aif"] / 2 + 0.5, self.rendered(batch), batch["target"] / 2 + 0.5], 3)

    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return _scores(self.rendered(batch), batch)

    def renderer(self):
        """The trained networks behind the sampler, in linear light."""
        model = self._model()

        def render(image: torch.Tensor, defocus: Defocus, **unused) -> torch.Tensor:
            return sampler.render(model, encode(image).to(model.unet.device), defocus).cpu() ** 2.2

        return render

    def _model(self) -> checkpoint.BokehDiff:
        unet, vae = (Placed(network, self.text.device, torch.float32) for network in (self.unet, self.vae))
        return checkpoint.BokehDiff(unet, vae, self.text, self.pooled)

    def baselines(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        from ..render import render

        sharp = (batch["aif"] / 2 + 0.5).cpu()
        k, focus = PX * batch["k"].flatten().cpu(), batch["focus"].flatten().cpu()
        physical = render(sharp, Defocus(batch["disparity"][:, 0].cpu(), focus, k, Lens(), False))
        return {"the sharp picture": _scores(sharp, batch), "the physical renderer": _scores(physical, batch)}

    def save(self, folder: Path) -> list[Path]:
        from safetensors.torch import save_file

        files = [folder / checkpoint.LORA_FILE, folder / checkpoint.VAE_FILE]
        save_file(lora_tensors(self.unet.unet), files[0])
        trained = {name: p for name, p in self.vae.state_dict().items() if name.startswith(checkpoint.TRAINED_VAE)}
        torch.save({name: tensor.detach().float().cpu().clone() for name, tensor in trained.items()}, files[1])
        return files


def _scores(pictures, batch):
    pairs = [(ours.cpu(), truth.cpu() / 2 + 0.5) for ours, truth in zip(pictures, batch["target"], strict=True)]
    return {name: torch.tensor([score(*pair) for pair in pairs]) for name, score in (("psnr", psnr), ("ssim", ssim))}


def _width(features: nn.Module) -> int:
    with torch.no_grad():
        return features(torch.zeros(1, 3, 64, 64)).shape[-1]


def _pictures(folder: Path | None, alpha: bool = False) -> list[Path] | None:
    """The pictures of a folder. Raises BokehError where there are none, one cannot be read, or a cut-out has no usable alpha."""
    if folder is None:
        return None
    from .composites import picture_files

    files = picture_files(folder)
    for file in files if alpha else ():
        _cutout(file)
    return files


def _one_of(files: list[Path], rng: np.random.Generator) -> Path:
    return files[rng.integers(len(files))]


def _read(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(colour [H, W, 3], alpha [H, W] or None) uint8, display-encoded."""
    from ..media import read_picture

    picture = read_picture(file)
    colour = encode(picture.pixels) if picture.linear else picture.pixels
    return to_bytes(colour), None if picture.alpha is None else (picture.alpha.clamp(0, 1) * 255).round().byte().numpy()


def _cutout(file: Path) -> np.ndarray:
    """[H, W, 4] uint8."""
    colour, alpha = _read(file)
    spans = [0, 0] if alpha is None else [np.ptp(np.flatnonzero((alpha > 0).any(axis))) if (alpha > 0).any() else 0 for axis in (0, 1)]
    if min(spans) < SMALLEST:
        raise BokehError(f"{file} is no cut-out: it needs an alpha channel that shows {SMALLEST} px or more each way; save it as PNG.")
    return np.concatenate([colour, alpha[..., None]], 2)


def _drawn_cutout(rng: np.random.Generator, size: int) -> np.ndarray:
    from ..synthesis.scenes import make_scene

    subject = make_scene("portrait", int(rng.integers(2**31)), max(64, size // 2)).layers[-1]
    alpha = (subject.alpha[..., None] * 255).round().byte().numpy()
    return np.concatenate([_drawn(subject.color), alpha], 2)


def _drawn_background(rng: np.random.Generator, size: int) -> np.ndarray:
    from ..synthesis.scenes import texture

    return _drawn(torch.from_numpy(texture(rng, size, size, lights=size * size // 6000)))


def _drawn(linear: torch.Tensor) -> np.ndarray:
    return to_bytes(encode(linear))
