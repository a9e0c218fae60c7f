"""Any-to-Bokeh's three stages: the whole UNet, its temporal layers on disturbed disparity, the VAE's decoder (SPEC section 9).

Every stage starts from a folder of the release, of Stable Video Diffusion xt (for stage 1), or of the stage before, and ends with the
folders unet and vae as released.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from ..checkpoints.reading import read_checkpoint
from ..checkpoints.stable_diffusion import read_folder
from ..errors import BokehError
from ..metrics.edges import encode
from ..metrics.image import psnr
from ..metrics.video import relation_metric
from ..optics.defocus import Defocus
from ..optics.lens import Lens
from ..render import render
from ..samplers.any_to_bokeh import checkpoint, sampler
from ..samplers.any_to_bokeh.image_encoder import encoder_config, prepare
from ..samplers.any_to_bokeh.preparation import PUBLISHED_SIZE, SCALE
from ..samplers.arguments import Placed
from .any_to_bokeh_clips import FRAMES, TRIES, Cutouts, Frames, Shots, listed_frames, read_list, synthetic_shot, training_sample
from .losses import texture_loss, texture_loss_paper
from .perturbation import Draws
from .task import Group, Task, noise

ADDED_IDS = (7.0, 127.0, 0.0)  # frames per second, motion, noise as training has them; inference has 6 frames per second
GAMMA = 2.2  # of `encode`
SKIPS = 1e-5  # first weights of the skip connections
TEXTURE = {"paper": texture_loss_paper, "script": texture_loss}


@dataclass(frozen=True)
class Stage:
    """Published constants of a stage."""

    frames: int
    learning_rate: float
    perturbed: float  # probability for each frame


STAGES = {1: Stage(4, 1e-5, 0.0), 2: Stage(8, 5e-6, 0.5), 3: Stage(3, 5e-6, 0.0)}


@dataclass(frozen=True)
class Model:
    """Base files.

    unet           a folder with unet (or unet/unet), vae and image_encoder in it; or a folder or file of the UNet alone
    vae            folder or file; left out: `vae` in that folder
    image_encoder  folder or file; left out: `image_encoder` in that folder
    """

    unet: Path
    vae: Path | None = None
    image_encoder: Path | None = None


@dataclass(frozen=True)
class Data:
    """Where clips come from: a list of rendered ones, the user's cut-outs and backgrounds, or (nothing named) synthetic ones.

    clips        csv file, see any_to_bokeh_clips
    foregrounds  folder of pictures with alpha (they wander as they are), or the published json of video mattes
    backgrounds  folder of pictures
    height, width  px, multiples of 64
    objects      in a clip made on the fly: 1, 2, 4, 5 or 6
    synthetic    px of synthetic cut-outs and backgrounds
    shots        how clips made on the fly are shot
    """

    clips: Path | None = None
    foregrounds: Path | None = None
    backgrounds: Path | None = None
    height: int = PUBLISHED_SIZE[0]
    width: int = PUBLISHED_SIZE[1]
    objects: int = 4
    synthetic: int = 416
    shots: Shots = field(default_factory=Shots)


@dataclass(frozen=True)
class Options:
    """The stage, and where paper and script differ. Left out, frames, learning_rate and perturbed are as published for the stage.

    stage            1, 2 or 3
    frames           of a sample
    learning_rate    of AdamW with betas 0.9 and 0.999, without a schedule
    perturbed        probability that a frame's disparity is disturbed (stage 2; for the user's own clips in any stage)
    weight_decay     of AdamW; 0 is the paper's Adam
    masks            the visual tokens behind the paper's masks; the script multiplies them by zero. A UNet trained with them has to be run
                     with them: the loader's switch mpi_masks
    texture          loss of stage 3: the paper's equation 4, or the script's difference of Sobel magnitudes
    normalised_clip  mean and deviation are taken out of what CLIP sees, as the script does; the released inference does not
    k_table          of E(K): float16 is what inference has, autocast what the script had
    recompute        forget what is inside the blocks of the trained network and compute it again in the backward pass: less memory
    """

    stage: Literal[1, 2, 3] = 1
    frames: int | None = None
    learning_rate: float | None = None
    perturbed: float | None = None
    weight_decay: float = 0.01
    masks: bool = True
    texture: Literal["paper", "script"] = "paper"
    normalised_clip: bool = True
    k_table: Literal["float16", "autocast", "float32"] = "float16"
    recompute: bool = False

    @classmethod
    def script(cls, stage: int) -> "Options":
        """As the released script has it. In stage 3 the frozen UNet runs in float16, E(K) too."""
        return cls(stage, masks=False, texture="script") if stage == 3 else cls(stage, masks=False, k_table="autocast")

    def complete(self) -> "Options":
        """With nothing left out."""
        if self.stage not in STAGES:
            raise BokehError(f"[options] stage is {self.stage}; use 1, 2 or 3.")
        published = {name: value for name, value in vars(STAGES[self.stage]).items() if getattr(self, name) is None}
        return replace(self, **published)


def is_trained(stage: int, name: str) -> bool:
    """Whether a stage trains a tensor, by its published name: of the UNet in stages 1 and 2, of the whole VAE in stage 3."""
    if stage == 1:
        return True
    if stage == 2:
        return "temporal" in name
    return "decoder" in name and "temporal" not in name and "time" not in name


class AnyToBokehTask(Task):
    """One of the three stages."""

    Model, Data, Options = Model, Data, Options

    def __init__(self, model: Model, data: Data, options: Options, seed: int):
        super().__init__()
        self.data, self.options, self.seed = data, options.complete(), seed
        options = self.options
        if not 1 <= options.frames <= FRAMES and data.clips is None:
            raise BokehError(f"[options] frames is {options.frames}; clips made on the fly have {FRAMES}.")
        if data.clips is not None and (data.foregrounds or data.backgrounds):
            raise BokehError("[data] names clips as well as foregrounds or backgrounds; name one or the other.")
        if math.ceil(data.objects**0.5) * math.floor(data.objects**0.5) < max(data.objects, 1):
            raise BokehError(f"[data] objects is {data.objects}; use 1, 2, 4, 5 or 6, which the published grid of places can hold.")
        self.rows = None if data.clips is None else read_list(data.clips, options.frames)
        self.cutouts = None if self.rows else Cutouts(data.foregrounds, data.backgrounds, data.synthetic)

        unet, given = _read(model.unet, "unet")
        unet = start_unet(unet, given, seed)
        vae, _ = _read(_part(model, "vae"), "vae")
        vae = start_vae(vae)
        clip, given_clip = _read(_part(model, "image_encoder"), "image_encoder")
        clip.pop("vision_model.embeddings.position_ids", None)
        clip = {name: tensor.float() for name, tensor in clip.items()}
        config = checkpoint.vae_config(vae)
        decoder = {name.removeprefix("decoder."): tensor for name, tensor in vae.items() if name.startswith("decoder.")}
        encoder = {name: tensor for name, tensor in vae.items() if not name.startswith("decoder.")}
        self.unet = checkpoint.build_unet(checkpoint.unet_config(unet, given), unet, what="The UNet to train from")
        self.encoder = checkpoint.build_encoder(config, encoder, what="The VAE to train from")
        self.decoder = checkpoint.build_decoder(config, decoder, what="The VAE to train from")
        self.image_encoder = checkpoint.build_image_encoder(encoder_config(clip, given_clip.get("num_attention_heads")), clip)
        self.vae_channels, self.vae_layers = config["channels"], config["layers"]
        multiple = 8 * 2 ** (len(self.unet.down_blocks) - 1)
        if data.height % multiple or data.width % multiple or min(data.height, data.width) < multiple:
            raise BokehError(f"[data] height and width are {data.height} and {data.width}; expected multiples of {multiple}.")
        if options.recompute:
            network = self.decoder if options.stage == 3 else self.unet
            for block in (*getattr(network, "down_blocks", ()), network.mid_block, *network.up_blocks):
                block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)

    def groups(self) -> dict[str, list[Group]]:
        stage = self.options.stage
        network, own, published = (self.decoder, "decoder.", "decoder.") if stage == 3 else (self.unet, "unet.", "")
        trained = {own + name: one for name, one in network.named_parameters() if is_trained(stage, published + name)}
        group = Group(trained, self.options.learning_rate, weight_decay=self.options.weight_decay)
        return {f"stage_{stage}": [group]}

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        size, count = (self.data.height, self.data.width), self.options.frames
        for attempt in range(TRIES):
            frames = self.frames((self.seed, index, attempt), count)
            sample = training_sample(frames, size, Draws(self.seed, index, attempt, 1, 1), self.options.perturbed)
            if sample is not None:
                return sample | {"seed": torch.tensor((self.seed * 1_000_003 + index) % 2**62)}
        raise BokehError(f"In {TRIES} clips in a row the object in focus is hidden; lower [options] perturbed or choose other clips.")

    def frames(self, seed: tuple[int, int, int], count: int) -> Frames:
        """Frames of a random clip, before they are disturbed and resized."""
        if self.rows is None:
            size = (self.data.height, self.data.width)
            return synthetic_shot(self.cutouts, self.data.shots, size, self.data.objects, seed, count).frames(self.data.shots)
        draws = Draws(*seed, 0, 1)
        row = self.rows[draws.integer(0, len(self.rows))]
        return listed_frames(row, draws.integer(0, len(row.sharp) - count + 1), count)

    def forward(self, part: str, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        stage = self.options.stage
        if stage == 3:
            with torch.no_grad():
                latents, residuals = self.predict(batch, sampled=True)
            pictures = self.decode(latents, residuals).float()
            return {"l1": F.l1_loss(pictures, batch["bokeh"]), "texture": TEXTURE[self.options.texture](pictures, batch["bokeh"])}
        target, _ = self.encode(batch["bokeh"], batch["seed"], 2)
        latents, _ = self.predict(batch, sampled=True)
        return {"mse": F.mse_loss(latents.float(), target)}

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None, stream: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(scaled latents [B, n, 4, h, w], what entered the encoder's down blocks, each [B, n, C, ...]) of images [B, n, 3, H, W] in -1..1.

        seeds  of the samples that latents are drawn with, in `stream`; None: their means
        In float32, frame by frame.
        """
        clips = images.shape[:2]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            parts = [(*self.encoder(one), self.encoder.first_residual(one)) for one in images.flatten(0, 1).float().split(1)]
        mean, std, first = (torch.cat([part[i] for part in parts]).unflatten(0, clips) for i in (0, 1, 3))
        residuals = [torch.cat(level).unflatten(0, clips) for level in zip(*(part[2] for part in parts), strict=True)]
        if seeds is not None:
            mean = mean + std * noise(seeds, tuple(mean.shape[1:]), stream).to(mean)
        return mean * SCALE, [first, *residuals]

    def predict(self, batch: dict[str, torch.Tensor], sampled: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(latents with bokeh [B, n, 4, h, w], the sharp frames' residuals). sampled: latents are drawn, as in training."""
        seeds = batch["seed"] if sampled else None
        sharp, residuals = self.encode(batch["sharp"], seeds, 0)
        difference, _ = self.encode(batch["difference"].expand(-1, -1, 3, -1, -1), seeds, 1)
        with torch.no_grad():
            seen = prepare(batch["sharp"].flatten(0, 1), self.image_encoder.size, self.options.normalised_clip)
            clip = self.image_encoder(seen)
        latents = self.unet(
            sharp,
            difference,
            clip,
            batch["k"],
            region=batch["region"][:, :, 0] if self.options.masks else None,
            k_table=self.options.k_table,
            added_ids=sharp.new_tensor(ADDED_IDS).expand(len(sharp), -1),
        )
        return latents, residuals

    def decode(self, latents: torch.Tensor, residuals: list[torch.Tensor]) -> torch.Tensor:
        """[B, n, 3, H, W] in about -1..1; every clip is one window."""
        clips = [self.decoder(one, [level[i] for level in residuals]) for i, one in enumerate(latents)]
        return torch.stack(clips)

    def preview(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            ours = self.decode(*self.predict(batch, sampled=False)).float()
        middle = ours.shape[1] // 2
        return torch.cat([part[:, middle] / 2 + 0.5 for part in (batch["sharp"], ours, batch["bokeh"])], dim=-1).clamp(0, 1)

    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Means over the frames of a clip: psnr in dB; rm, the error of changes between frames; latent_snr in dB, how far the predicted
        latents rise above their error."""
        with torch.no_grad():
            latents, residuals = self.predict(batch, sampled=False)
            target, _ = self.encode(batch["bokeh"], None, 0)
            ours = (self.decode(latents, residuals).float() / 2 + 0.5).clamp(0, 1).cpu()
        power, error = (one.float().square().flatten(1).mean(1).cpu() for one in (target, latents - target))
        return _scores(ours, batch) | {"latent_snr": 10 * (power / error).log10()}

    def baselines(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        sharp, maps, focus, k = (batch[name].cpu() for name in ("sharp", "disparity", "focus", "k"))
        sharp = sharp / 2 + 0.5
        given = [Defocus(one[:, 0], f, radius, Lens(), False) for one, f, radius in zip(maps, focus, k, strict=True)]
        # Values are averaged as they are, which is what made the truth.
        physical = torch.stack([render(clip, defocus, linear=True) for clip, defocus in zip(sharp, given, strict=True)])
        return {"the sharp clip": _scores(sharp, batch), "the physical renderer": _scores(physical.clamp(0, 1), batch)}

    def renderer(self) -> Callable:
        """The networks behind the sampler, in linear light."""
        device = next(self.parameters()).device
        names = ("unet", "encoder", "decoder", "image_encoder")
        parts = {name: Placed(getattr(self, name), device, torch.float32) for name in names}
        model = sampler.AnyToBokeh(**parts, visual=self.options.masks)
        how = replace(sampler.BEST, normalised_clip=self.options.normalised_clip, k_table=self.options.k_table)
        wide = round((self.data.height * self.data.width * 16 / 9) ** 0.5)

        def rendered(image: torch.Tensor, defocus: Defocus, **unused) -> torch.Tensor:
            with torch.no_grad():
                return sampler.render(model, encode(image), defocus, fidelity=how, resolution=wide).cpu() ** GAMMA

        return rendered

    def notes(self) -> list[str]:
        said = ["No clips or cut-outs are named: training on drawn figures."] if self.rows is None and self.cutouts.clips is None else []
        if self.options.masks:
            said.append("The masks are on: what is trained has to be run with the loader's switch mpi_masks.")
        return said

    def save(self, folder: Path) -> list[Path]:
        vae = self.encoder.state_dict() | {f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        depth = len(self.vae_channels)
        config = {
            "_class_name": "AutoencoderKLTemporalDecoder",
            "block_out_channels": list(self.vae_channels),
            "down_block_types": ["DownEncoderBlock2D"] * depth,
            "force_upcast": True,
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": self.decoder.conv_in.in_channels,
            "layers_per_block": self.vae_layers,
            "scaling_factor": SCALE,
        }
        unet = {"_class_name": "UNetSpatioTemporalConditionModel"}
        unet |= {name: value for name, value in self.unet.config.items() if not name.startswith("_")}
        return [*_write(folder / "unet", self.unet.state_dict(), unet), *_write(folder / "vae", vae, config)]


def _scores(pictures: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of pictures [B, n, 3, H, W] 0..1."""
    pairs = list(zip(pictures, (batch["bokeh"] / 2 + 0.5).cpu(), strict=True))
    scores = {"psnr": torch.tensor([psnr(a, b) for a, b in pairs])}
    if pictures.shape[1] > 1:
        scores["rm"] = torch.tensor([relation_metric(a, b) for a, b in pairs])
    return scores


# Base files


def _part(model: Model, name: str) -> Path:
    path = getattr(model, name) or model.unet / name
    if not path.exists():
        raise BokehError(f"[model] names no {name}, and there is none in {model.unet}; give its folder or file.")
    return path


def _read(path: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, config) of a file, or of a folder as released (unet/unet), as of diffusers (unet), or of the part alone."""
    if not path.is_dir():
        return dict(read_checkpoint(path).tensors), {}
    part = read_folder(path / name if (path / name / name).is_dir() else path, name)
    return dict(part.tensors), part.config


def start_unet(tensors: dict[str, torch.Tensor], given: dict, seed: int) -> dict[str, torch.Tensor]:
    """Float32 tensors of an Any-to-Bokeh UNet; to those of plain Stable Video Diffusion, fusers and conv_in_mpi are added.

    Fusers start closed (their gates are 0) but for the term of K, conv_in_mpi as the half of conv_in that sees the picture.
    """
    from ..samplers.any_to_bokeh.fuser import Fuser
    from ..samplers.any_to_bokeh.network import AnyToBokehUNet, FusedTransformer

    if "conv_in.weight" not in tensors or "down_blocks.0.resnets.0.temporal_res_block.conv1.weight" not in tensors:
        found = ", ".join(list(tensors)[:3])
        raise BokehError(f"[model] unet is no video UNet (found: {found}); expected Any-to-Bokeh's or that of Stable Video Diffusion xt.")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if "conv_in_mpi.weight" in tensors:
        return tensors
    half = tensors["conv_in.weight"].shape[1] // 2
    tensors["conv_in_mpi.weight"] = tensors["conv_in.weight"][:, :half].clone()
    tensors["conv_in_mpi.bias"] = tensors["conv_in.bias"].clone()
    with torch.device("meta"):
        network = AnyToBokehUNet(**checkpoint.unet_config(tensors, given))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in network.named_modules():
            if isinstance(module, FusedTransformer):
                for i in range(len(module.transformer_blocks)):
                    fuser = Fuser(module.inner_dim, module.num_attention_heads, network.conv_in.out_channels)
                    added = fuser.state_dict().items()
                    tensors |= {f"{name}.transformer_blocks.{i}.fuser.{key}": tensor for key, tensor in added}
    return tensors


def start_vae(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 tensors of an Any-to-Bokeh VAE; to those of plain Stable Video Diffusion, skip connections of constant weight are added."""
    from ..samplers.any_to_bokeh.vae import SkipDecoder

    if "decoder.time_conv_out.weight" not in tensors or "encoder.conv_in.weight" not in tensors:
        found = ", ".join(list(tensors)[:3])
        raise BokehError(f"[model] vae is no video VAE (found: {found}); expected Any-to-Bokeh's or that of Stable Video Diffusion xt.")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if "decoder.skip_conv_1.weight" not in tensors:
        with torch.device("meta"):
            decoder = SkipDecoder(**checkpoint.vae_config(tensors))
        skips = {name: one for name, one in decoder.state_dict().items() if name.startswith("skip_conv_")}
        tensors |= {f"decoder.{name}": torch.full(one.shape, SKIPS) for name, one in skips.items()}
    return tensors


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> list[Path]:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "config.json", folder / "diffusion_pytorch_model.safetensors"]
    files[0].write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, files[1])
    return files
