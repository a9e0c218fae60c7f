"""BokehDepth stage 1: the adapter that makes FLUX.1-Kontext blur by K (bokehdepth_stage1 SPEC sections 3, 4, 7 and 9).

Half of the work is image to image: the sharp picture is the reference, and the target is the same picture with shallow depth of
field. Half is text to image: pictures with a caption and a K, some of them groups of one scene at several K, whose attention leans on
one of the group. The loss is that of rectified flow, on the target's tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from ..errors import BokehError
from ..optics.published_k import BOKEHDEPTH_K
from ..samplers.kontext_stack import recipe
from ..samplers.kontext_stack.adapter import RELEASED, AdapterConfig, BokehAdapter, LowRank, read_adapter
from ..samplers.kontext_stack.checkpoint import TextEncoders, load_transformer, load_vae
from ..samplers.kontext_stack.sampler import decode_image, encode_image, sample
from ..samplers.kontext_stack.transformer import BokehAttention, Grounded
from . import photos
from .losses import cosine
from .manifests import Photo, clipped_k, read_photos
from .task import Group, Task, generator, noise
from .train_defocus import Quirks

FILE = "bokeh_lora.safetensors"
DROPPED = -1.0  # the condition of a sample whose K is withheld
I2I, T2I = 0, 1
HELD_OUT = 20  # every so many photos of a manifest, one is kept for measuring
SIGMAS = (0.2, 0.4, 0.6, 0.8)  # at which `measure` looks at the velocity
PREVIEW_STEPS = 8
# Streams of a sample's noise.
_NOISE, _OFFSET, _TIMESTEP, _TARGET, _REFERENCE = range(5)
# Uses of the numbers drawn for samples: by a group, by one of its members, for the order of an epoch, for a member's seed.
_SHARED, _OWN, _EPOCH, _SEED = range(1, 5)

# Ours: the released trainer has four paraphrases of the inference prompt, whose words we do not know. K to two decimals, as there.
PARAPHRASES = (
    "Set dof_cond to {:.2f}: blur what lies off the subject's distance, and leave the subject, its pose and its colors as they are.",
    "Apply a shallow depth of field with dof_cond = {:.2f}. Keep the subject crisp; do not change composition, light or colors.",
    "Same picture, taken with a wider aperture (dof_cond {:.2f}). The subject stays sharp, the surroundings melt into bokeh.",
    "Defocus the background with strength dof_cond = {:.2f} while every detail of the subject in focus is preserved.",
)


@dataclass(frozen=True)
class Model:
    """The released files.

    transformer    FLUX.1-Kontext-dev in 16 bits: its diffusers folder, or flux1-kontext-dev.safetensors
    vae            the same folder, or ae.safetensors
    text_encoders  the same folder (CLIP and T5 run during training); empty where [data] names encoded prompts
    adapter        a stage 1 adapter to train on; empty: a new one
    dtype          of the frozen networks
    """

    transformer: Path
    vae: Path
    text_encoders: Path | None = None
    adapter: Path | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class Data:
    """Pictures.

    photos   a manifest of pictures (manifests.write_manifest); empty: procedural scenes, with exact depth and layers
    prompts  all prompts, encoded once (write_prompts); makes the text encoders unnecessary. Options.k_step must then be coarse
    """

    photos: Path | None = None
    prompts: Path | None = None


@dataclass(frozen=True)
class Options:
    """The recipe.

    size             px of the square pictures
    native_size      pictures keep their own size (sides floored to 16): the paper's last phase. For a batch and a group of 1
    i2i_share        of the groups of samples that are image to image
    real_pairs       image to image uses the real targets of a manifest where it has them, as the paper says; the released trainer
                     never opens them
    group            samples that belong together: consecutive ones in a batch, which must hold whole groups
    real_share       of the text to image groups that show photos as they are, where a manifest has captions and K
    renderer         of targets: "physical", or "classical": BokehMe without its network, which mended the edges in the published run
    own_span_focus   quirk: see train_defocus.Quirks
    min_max_k        quirk: the condition of real photos is (K - min) / (max - min) over the manifest, not K / 30, so that it means
                     another blur than at inference
    k_step           K in prompts and targets is a multiple of it; the published prompts show two decimals
    keep_caption     chance that image to image is asked for with the photo's caption instead of the instruction
    drop_caption     chance of an empty caption in text to image
    drop_k           chance of a withheld K in text to image
    swap             chance that a sample of a text to image group leans on the group's pivot: takes its noise, timestep and q, and
                     adds its keys
    noise_offset     of the noise's mean per channel
    guidance         the embedded guidance. Inference uses 7
    posterior        latents are samples of the VAE's posterior; inference uses its mode
    optimiser, learning_rate, weight_decay, clip
    warmup, total    steps of the cosine; total: as many as [train] steps, 0: no decay
    checkpointing    activations are computed again in the backward pass, to save memory
    """

    size: int = 512
    native_size: bool = False
    i2i_share: float = 0.5
    real_pairs: bool = True
    group: int = 4
    real_share: float = 0.5
    renderer: Literal["physical", "classical"] = "physical"
    own_span_focus: bool = False
    min_max_k: bool = False
    k_step: float = 0.01
    keep_caption: float = 0.35
    drop_caption: float = 0.1
    drop_k: float = 0.1
    swap: float = 0.2
    noise_offset: float = 0.05
    guidance: float = 1.0
    posterior: bool = True
    optimiser: Literal["prodigy", "adamw"] = "prodigy"
    learning_rate: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 100
    total: int = 0
    checkpointing: bool = True

    def __post_init__(self):
        if self.group < 1 or self.k_step <= 0:
            raise BokehError(f"[options] group is {self.group} and k_step {self.k_step}; expected 1 or more, and a step above 0.")
        if self.native_size and (self.group != 1 or self.i2i_share != 1):
            raise BokehError(
                "[options] native_size is for image to image alone: it needs group = 1, i2i_share = 1, and batch = 1 in [train]."
            )
        if not self.native_size and (self.size % recipe.MULTIPLE or self.size < 64):
            raise BokehError(f"[options] size is {self.size}; expected a multiple of {recipe.MULTIPLE}, 64 or more.")


class KontextStack(Task):
    """The adapter on a frozen FLUX.1-Kontext."""

    Model, Data, Options = Model, Data, Options

    def __init__(self, model: Model, data: Data, options: Options, seed: int):
        super().__init__()
        self.options, self.seed = options, seed
        self.photos, self.held_out_photos = _read(data.photos, options)
        self.quirks = Quirks(own_span=options.own_span_focus)
        known = [photo.k for photo in (*self.photos, *self.held_out_photos) if photo.k is not None]
        self.k_span = (min(known), max(known)) if known and options.min_max_k else None
        if data.prompts is None and model.text_encoders is None:
            raise BokehError("The recipe names neither text_encoders in [model] nor prompts in [data]; FLUX needs the one or the other.")
        self.prompts = None if data.prompts is None else Prompts(data.prompts)
        if self.prompts:
            self.prompts.require(needed_prompts([*self.photos, *self.held_out_photos], options))

        dtype = getattr(torch, model.dtype)
        self.transformer, self.vae = load_transformer(model.transformer, dtype), load_vae(model.vae, dtype)
        if options.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.text = None if self.prompts else TextEncoders(model.text_encoders, dtype)
        blocks = len(self.transformer.transformer_blocks) + len(self.transformer.single_transformer_blocks)
        width = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
        if model.adapter:
            self.adapter = read_adapter(model.adapter, blocks=blocks, width=width).float()
        else:
            self.adapter = new_adapter(AdapterConfig(tuple(range(blocks)), width, RELEASED.rank), seed)
        attach_trainable(self.transformer, self.adapter)

    def groups(self) -> dict[str, list[Group]]:
        """All of the adapter but the bokeh keys: a softmax over one key gives them no gradient, and their zeros are in the files."""
        options = self.options
        parameters = {f"adapter.{name}": p for name, p in self.adapter.named_parameters() if ".to_k_dof." not in name}

        def schedule(step: int) -> float:
            total = options.total or 2**62
            return cosine(min(step, total), options.warmup, total)

        group = Group(
            parameters, options.learning_rate, options.optimiser, weight_decay=options.weight_decay, clip=options.clip, schedule=schedule
        )
        return {"adapter": [group]}

    # Data

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """sharp, target [3, H, W] 0..1; kind [] I2I or T2I; condition [] K / 30 or -1; k []; the prompt: its place among the encoded
        ones, or tokens (clip [77], t5 [512]); group [] and member [] numbers; pivot [] the member whose q it takes; noise_seed [] its."""
        return self._sample(index, self.photos)

    def held_out(self, index: int) -> dict[str, torch.Tensor]:
        """Image to image by the instruction, which is what the adapter is for; of photos that training does not see."""
        return self._sample(2**40 + index, self.held_out_photos or self.photos, held_out=True)

    def _sample(self, index: int, pictures: list[Photo], held_out: bool = False) -> dict[str, torch.Tensor]:
        options = self.options
        number, member = divmod(index, options.group)
        shared, own = self._draws(_SHARED, number), self._draws(_OWN, number, member)
        kind = I2I if held_out else self._kind(number)
        pivot = member
        if kind == I2I:
            sharp, target, k, words = self._image_to_image(pictures, own, held_out)
            condition = recipe.normalise_k(k)
        else:
            telling = [photo for photo in pictures if photo.captions and photo.k is not None]
            rendered = [photo for photo in pictures if photo.render]
            grouped = not telling or (bool(rendered) and shared.random() >= options.real_share)
            leader, swap, leans = int(shared.integers(options.group)), options.swap, own.random()
            if grouped:
                photo, _, _ = self._picture(rendered[shared.integers(len(rendered))] if rendered else None, shared, options.size)
                k = 0.0 if member == 0 and options.group > 1 else self._k(own)
                sharp, words = photo.image, photo.caption
                target = photo.blurred(k, options.renderer) if k else sharp
                condition = recipe.normalise_k(k)
                pivot = leader if leans < swap else member
            else:
                chosen = telling[own.integers(len(telling))]
                photo, real, zoom = self._picture(chosen, own, options.size)
                sharp = target = photo.image if real is None else real
                k, words = self._rounded(chosen.k * zoom), photo.caption
                condition = recipe.normalise_k(k)
                if self.k_span:
                    condition = (chosen.k - self.k_span[0]) / max(self.k_span[1] - self.k_span[0], 1e-6)
            words = "" if own.random() < options.drop_caption else words
            condition = DROPPED if own.random() < options.drop_k else condition
        return {
            "sharp": sharp, "target": target, "kind": torch.tensor(kind), "k": torch.tensor(float(k)),
            "condition": torch.tensor(float(condition)), **self._encoded(words),
            "group": torch.tensor(number), "member": torch.tensor(member), "pivot": torch.tensor(pivot),
            "seed": torch.tensor(self._noise_seed(number, member)), "noise_seed": torch.tensor(self._noise_seed(number, pivot)),
        }  # fmt: skip

    def _kind(self, number: int) -> int:
        """Of a group: epochs are shuffled lists with their shares of both kinds."""
        count = max(len(self.photos), 16)
        epoch, place = divmod(number, count)
        kinds = np.full(count, T2I)
        kinds[: round(count * self.options.i2i_share)] = I2I
        return int(self._draws(_EPOCH, epoch).permutation(kinds)[place])

    def _image_to_image(self, pictures, rng, held_out):
        """(sharp, target, K, prompt). What is held out is of one size and asked for by the instruction."""
        size = None if self.options.native_size and not held_out else self.options.size
        usable = [photo for photo in pictures if photo.render or self._paired(photo)]
        chosen = usable[rng.integers(len(usable))] if usable else None
        photo, real, zoom = self._picture(chosen, rng, size)
        if real is not None and self._paired(chosen):
            k, target = self._rounded(chosen.k * zoom), real
        else:
            k = self._k(rng)
            target = photo.blurred(k, self.options.renderer)
        words = PARAPHRASES[rng.integers(len(PARAPHRASES))].format(k)
        if photo.caption and rng.random() < self.options.keep_caption and not held_out:
            words = photo.caption
        return photo.image, target, k, words

    def _paired(self, photo: Photo) -> bool:
        return self.options.real_pairs and photo.target is not None and photo.k is not None

    def _picture(self, chosen: Photo | None, rng, size: int | None):
        """(photo, real target or None, K of the cut-out per K of the whole) of a picture, or of a procedural scene."""
        if chosen is None:
            return photos.synthetic_photo(rng, self.options.size, self.quirks), None, 1.0
        return photos.read_photo(chosen, rng, size, self.quirks)

    def _k(self, rng) -> float:
        return self._rounded(rng.uniform(*BOKEHDEPTH_K))

    def _rounded(self, k: float) -> float:
        return clipped_k(round(clipped_k(k) / self.options.k_step) * self.options.k_step)

    def _noise_seed(self, number: int, member: int) -> int:
        return int(self._draws(_SEED, number, member).integers(2**62))

    def _draws(self, use: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, use, *numbers])

    def _encoded(self, words: str) -> dict[str, torch.Tensor]:
        if self.prompts:
            return {"prompt": torch.tensor(self.prompts.places[words])}
        clip, t5 = self.text.tokenise(words)
        return {"clip": clip, "t5": t5}

    # Losses

    def forward(self, part: str, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        errors = []
        for kind in (I2I, T2I):
            rows = (batch["kind"] == kind).nonzero().flatten()
            if len(rows):
                some = {name: tensor[rows] for name, tensor in batch.items()}
                # 1000 unshifted steps, all alike.
                steps = [int(torch.randint(recipe.TIMESTEPS, (), generator=generator(int(seed), _TIMESTEP))) for seed in some["noise_seed"]]
                sigma = 1 - torch.tensor(steps, dtype=torch.float32) / recipe.TIMESTEPS
                errors.append(self.velocity_errors(some, sigma, kind, grounded=kind == T2I))
        return {"velocity": torch.cat(errors).mean()}

    def velocity_errors(self, batch: dict[str, torch.Tensor], sigma: torch.Tensor, kind: int, grounded: bool = False) -> torch.Tensor:
        """[B] mean squared error of the velocity, noise - latents, on the target's tokens, for samples of one kind at sigma [B]."""
        device = batch["sharp"].device
        sigma = sigma.to(device)
        latents = self._latents(batch["target"], batch["seed"], _TARGET)
        height, width = latents.shape[-2:]
        drawn = noise(batch["noise_seed"], latents.shape[1:], _NOISE)
        drawn = (drawn + self.options.noise_offset * noise(batch["noise_seed"], (len(latents[0]), 1, 1), _OFFSET)).to(device)
        along = sigma[:, None, None, None]
        tokens, ids = recipe.pack((1 - along) * latents + along * drawn), recipe.position_ids(height, width, 0)
        count = tokens.shape[1]
        if kind == I2I:
            reference = recipe.pack(self._latents(batch["sharp"], batch["seed"], _REFERENCE))
            tokens, ids = torch.cat([tokens, reference], 1), torch.cat([ids, recipe.position_ids(height, width, 1)])
        text, pooled = self._text(batch)
        like = next(self.transformer.parameters())
        with torch.autocast(device.type, enabled=False):  # in half precision K would have steps of 0.12
            conditions: dict = {"bokeh_vectors": self.adapter.vectors(batch["condition"][:, None])}
        if grounded:
            conditions["grounded"] = Grounded(self._pivots(batch))
        velocity = self.transformer(
            hidden_states=tokens.to(like.dtype),
            encoder_hidden_states=text.to(like.dtype),
            pooled_projections=pooled.to(like.dtype),
            timestep=sigma,
            img_ids=ids.to(device),
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            guidance=torch.full_like(sigma, self.options.guidance) if self.transformer.config.guidance_embeds else None,
            joint_attention_kwargs=conditions,
            return_dict=False,
        )[0][:, :count]
        return (velocity.float() - recipe.pack(drawn - latents)).square().mean((1, 2))

    def _pivots(self, batch) -> tuple[int, ...]:
        """Of each sample the place in the batch of the one it leans on; its own where it leans on none."""
        members, count = [batch[name].tolist() for name in ("group", "member", "pivot")], self.options.group
        places = {pair: i for i, pair in enumerate(zip(*members[:2], strict=True))}
        if len(places) != count * len(set(members[0])):
            raise BokehError(
                f"A batch of one process holds a part of a group of {count} samples; make batch in [train], divided by the processes and "
                "by accumulate, a multiple of group in [options]."
            )
        return tuple(places[group, pivot] for group, _, pivot in zip(*members, strict=True))

    @torch.no_grad()
    def _latents(self, images: torch.Tensor, seeds: torch.Tensor, stream: int) -> torch.Tensor:
        """[B, C, h, w] float32, scaled as FLUX wants them."""
        posterior = self.vae.encode((images * 2 - 1).to(next(self.vae.parameters()).dtype)).latent_dist
        latents = posterior.mode().float()
        if self.options.posterior:
            latents = latents + posterior.std.float() * noise(seeds, latents.shape[1:], stream).to(latents.device)
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _text(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prompts:
            return tuple(some.to(batch["sharp"].device) for some in self.prompts.read(batch["prompt"].tolist()))
        return self.text(batch["clip"], batch["t5"])

    # Results

    @torch.no_grad()
    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """velocity: -10 lg of the velocity's error, mean over four sigmas. psnr: of the picture that the sampler makes, in dB."""
        errors = [self.velocity_errors(batch, torch.full_like(batch["condition"], sigma), I2I) for sigma in SIGMAS]
        return {"velocity": -10 * torch.stack(errors).mean(0).log10(), "psnr": _psnr(self._made(batch), batch["target"])}

    def baselines(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        psnr = _psnr(batch["sharp"], batch["target"])
        return {"the sharp picture": {"velocity": torch.full_like(psnr, torch.nan), "psnr": psnr}}

    def notes(self) -> list[str]:
        said = ["The four sentences that ask for a K are ours; the released ones are not published."]
        return said if self.photos else [*said, "No photos are named: training on procedural scenes."]

    @torch.no_grad()
    def preview(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([batch["sharp"], self._made(batch), batch["target"]], -1)

    def _made(self, batch) -> torch.Tensor:
        """[B, 3, H, W] the pictures at the batch's K, by image to image in a few steps."""
        text, pooled = self._text(batch)
        pictures = []
        for i, sharp in enumerate(batch["sharp"]):
            reference = encode_image(self.vae, sharp)
            drawn = noise(batch["seed"][i : i + 1], reference.shape[1:])
            vectors = self.adapter.vectors(batch["condition"][i : i + 1, None])
            sigmas = recipe.schedule(sharp.shape[-1], sharp.shape[-2], PREVIEW_STEPS)
            one = slice(i, i + 1)
            made = sample(self.transformer, drawn, reference, text[one], pooled[one], vectors, sigmas, self.options.guidance)
            pictures.append(decode_image(self.vae, made))
        return torch.stack(pictures).clone()  # out of the sampler's inference mode

    def save(self, folder: Path) -> list[Path]:
        """The adapter under the names of the released bokeh_lora.bin, float32: for models/loras."""
        from safetensors.torch import save_file

        path = Path(folder) / FILE
        save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in self.adapter.state_dict().items()}, path)
        return [path]


def _psnr(pictures: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return -10 * (pictures - truth).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def new_adapter(config: AdapterConfig, seed: int) -> BokehAdapter:
    """The adapter before training: down factors normal with std 1 / rank, up factors zero, so that the base model is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = BokehAdapter(config)
        for module in adapter.modules():
            if isinstance(module, LowRank):
                nn.init.normal_(module.down.weight, std=1 / config.rank)
                nn.init.zeros_(module.up.weight)
    return adapter


def attach_trainable(transformer, adapter: BokehAdapter) -> None:
    """Put the adapter's own factors into a FluxTransformer2DModel, so that training moves them; they stay `adapter`'s alone."""
    for i, block in enumerate([*transformer.transformer_blocks, *transformer.single_transformer_blocks]):
        pair = adapter.adapter_modules[str(i)]
        block.attn.set_processor(BokehAttention(i, *(_InOwnPrecision(pair[name]) for name in ("to_q_adp", "to_k_adp"))))


class _InOwnPrecision:
    """A low-rank pair that computes in its weights' precision. No module: its parameters belong to the adapter."""

    def __init__(self, low: LowRank):
        self.low = low

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.low(x.to(self.low.down.weight.dtype)).to(x.dtype)


class Prompts:
    """Prompts encoded once: `text` [n, T, D], `pooled` [n, P] in a safetensors file that lists the prompts in its header."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                self.places = {words: i for i, words in enumerate(json.loads((file.metadata() or {})["prompts"]))}
                whole = {"text", "pooled"} <= set(file.keys())
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BokehError(f"{path} holds no encoded prompts ({error}); make it by kontext_stack.write_prompts.") from error
        if not whole:
            raise BokehError(f"{path} holds no encoded prompts; make it by kontext_stack.write_prompts.")
        self.path = path

    def require(self, prompts: set[str]) -> None:
        missing = sorted(prompts - self.places.keys())
        if missing:
            raise BokehError(
                f"{self.path} lacks {len(missing)} of {len(prompts)} prompts, such as '{missing[0]}'; encode all of "
                "kontext_stack.needed_prompts, with the same k_step in [options]."
            )

    def read(self, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """([B, T, D], [B, P]) float32 of the prompts at these places."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return tuple(torch.stack([file.get_slice(name)[i] for i in places]).float() for name in ("text", "pooled"))


def needed_prompts(pictures: list[Photo], options: Options) -> set[str]:
    """Every prompt that a run can ask for: captions, none, and the instructions at every K there is. Grows with 1 / k_step."""
    low, high = BOKEHDEPTH_K
    grid = {clipped_k(i * options.k_step) for i in range(round(low / options.k_step), round(high / options.k_step) + 1)} | {low, high}
    captions = {words for photo in pictures for words in photo.captions} | {"", *photos.CAPTIONS.values()}
    return captions | {sentence.format(k) for sentence in PARAPHRASES for k in grid}


def write_prompts(encode_text, prompts: set[str], out: Path) -> None:
    """Encode prompts for Data.prompts. encode_text: see sampler.EncodeText, for example checkpoint.TextEncoders(folder).encode_text."""
    from safetensors.torch import save_file

    listed = sorted(prompts)
    text, pooled = (torch.cat(list(some)).cpu() for some in zip(*map(encode_text, listed), strict=True))
    save_file({"text": text.contiguous(), "pooled": pooled.contiguous()}, out, {"prompts": json.dumps(listed)})


def _read(path: Path | None, options: Options) -> tuple[list[Photo], list[Photo]]:
    """(photos to train on, photos held out)."""
    if path is None:
        if options.native_size:
            raise BokehError("[options] native_size needs pictures: name a manifest as photos in [data].")
        return [], []
    found = read_photos(path)
    usable = [photo for photo in found if photo.render or photo.k is not None]
    if not usable:
        raise BokehError(
            f"{path} has no picture to blur (suitable_for_synthetic with foreground_clear) and none with a K; see docs/training.md."
        )
    if options.i2i_share and not any(photo.render or (options.real_pairs and photo.target and photo.k is not None) for photo in usable):
        raise BokehError(f"{path} has neither a picture to blur nor a pair, so image to image has no data; set i2i_share = 0 or add some.")
    if len(usable) < HELD_OUT:
        return usable, []
    return [photo for i, photo in enumerate(usable) if i % HELD_OUT], usable[::HELD_OUT]
