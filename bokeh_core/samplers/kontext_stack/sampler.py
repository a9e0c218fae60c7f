"""Picture and K list in, bokeh stack out (BokehDepth stage 1, SPEC section 5).

make_stack is the recipe. generate_stack runs it with diffusers' FLUX transformer and VAE, for use without ComfyUI; ComfyUI runs it with
its own FLUX model, samplers and memory management.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...errors import BokehError
from ...optics.stack import BokehStack
from .adapter import BokehAdapter
from .colour import color_transfer
from .recipe import (
    BEST,
    GUIDANCE,
    PROMPT,
    SEED,
    STEPS,
    TEXT_TOKENS,
    Fidelity,
    check_k_list,
    network_timesteps,
    pack,
    position_ids,
    prompt_for,
    resize,
    schedule,
    shared_noise,
    unpack,
    working_size,
)

COLOURS = ("off", "mean", "mean and contrast")

EncodeText = Callable[[str], tuple[torch.Tensor, torch.Tensor]]
Progress = Callable[[float, int], None]
Step = Callable[[int, torch.Tensor, torch.Tensor], None]


def make_stack(
    image: torch.Tensor,
    k: list[float],
    *,
    encode: Callable[[torch.Tensor, list[str]], tuple[torch.Tensor, list]],
    sample: Callable[[int, Any, torch.Tensor, torch.Tensor], torch.Tensor],
    decode: Callable[[int, torch.Tensor], torch.Tensor],
    fidelity: Fidelity,
    resolution: int,
    steps: int,
    guidance: float,
    seed: int,
    colour: str | None,
    template: str,
    device: torch.device | str = "cpu",
) -> BokehStack:
    """The stack of an image [3, H, W] by networks of any kind, each of which does all its work before the next one is needed.

    encode    (reference [3, h, w], prompts) -> (its latent [1, C, h/8, w/8], a condition for each prompt)
    sample    (number of the frame, its condition, noise like the latent, sigmas [steps + 1]) -> the latents of the frame
    decode    (number of the frame, its latents) -> the frame [3, h, w] 0..1
    guidance  for the stack's settings; `sample` uses it
    device    where to put the stack
    Others as in generate_stack. Raises BokehError for K of 0 and below, an unknown colour transfer and steps below 1.
    """
    check_k_list(k)
    colour = colour or ("mean and contrast" if fidelity.match_contrast else "mean")
    if colour not in COLOURS:
        raise BokehError(f"The colour transfer is '{colour}'; expected one of {', '.join(COLOURS)}.")
    height, width = image.shape[-2:]
    size = working_size(width, height, resolution, fidelity)
    sigmas = schedule(*size, steps)
    reference = resize(image, *size)
    latent, conditions = encode(reference, [prompt_for(template, value) for value in k])
    noise = shared_noise(seed, *latent.shape[1:], rounding=fidelity.rounding)
    latents = [sample(i, condition, noise, sigmas) for i, condition in enumerate(conditions)]
    frames = torch.empty((len(k), *reference.shape), device=device)
    for i, sampled in enumerate(latents):
        frame = decode(i, sampled)
        frames[i] = frame if colour == "off" else color_transfer(frame, reference, match_contrast=colour == "mean and contrast")
    settings = {"guidance_scale": guidance, "num_inference_steps": steps, "prompt_template": template, "original_size": [width, height]}
    return BokehStack(reference.to(device), frames, k, source="kontext", settings=settings)


def generate_stack(
    image: torch.Tensor,
    k: list[float],
    *,
    transformer,
    vae,
    adapter: BokehAdapter,
    encode_text: EncodeText,
    fidelity: Fidelity = BEST,
    resolution: int = 512,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = SEED,
    colour: str | None = None,
    template: str = PROMPT,
    progress: Progress | None = None,
) -> BokehStack:
    """A stack at the working size (about `resolution` px on the short side) with its reference scaled to the same size.

    image        [3, H, W] display-encoded 0..1, sharp
    k            values of K as they go into the prompts; the network sees them clamped to 1..30
    transformer  diffusers' FluxTransformer2DModel of FLUX.1-Kontext with the adapter attached (transformer.attach)
    vae          its AutoencoderKL
    adapter      the same adapter
    encode_text  prompt -> (T5 states [1, 512, 4096], CLIP pooled vector [1, 768]); see `text_of`
    colour       one of COLOURS, None: as the fidelity says
    progress     (frames done, N), parts of a frame counted
    """

    def tell(done: int) -> None:
        """done: sampling steps and decoded frames together."""
        if progress is not None:
            progress(done / (steps + 1), len(k))

    def encode(reference: torch.Tensor, prompts: list[str]):
        latent = encode_image(vae, reference)
        return latent, [(latent, *encode_text(prompt)) for prompt in prompts]

    def sample_frame(i: int, condition, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        vectors = adapter.vectors_of_k([k[i]], fidelity.rounding or torch.float32)
        args = (transformer, noise, *condition, vectors, sigmas, guidance, fidelity.rounding)
        return sample(*args, step=lambda done, *_: tell(i * steps + done + 1))

    def decode(i: int, sampled: torch.Tensor) -> torch.Tensor:
        frame = decode_image(vae, sampled)
        tell(len(k) * steps + i + 1)
        return frame

    return make_stack(
        image,
        k,
        encode=encode,
        sample=sample_frame,
        decode=decode,
        fidelity=fidelity,
        resolution=resolution,
        steps=steps,
        guidance=guidance,
        seed=seed,
        colour=colour,
        template=template,
    )


@torch.inference_mode()
def sample(
    transformer,
    noise: torch.Tensor,
    reference: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor,
    vectors: dict[int, torch.Tensor],
    sigmas: torch.Tensor,
    guidance: float,
    rounding: torch.dtype | None = None,
    step: Step | None = None,
) -> torch.Tensor:
    """Latents [B, C, h, w] of B frames by Euler steps along the schedule. The latents stay float32 unless `rounding` says otherwise.

    noise, reference  [1, C, h, w] float32, shared by the frames
    text, pooled      [B, T, D] and [B, P]
    vectors           {block: [B, width]} of the frames' K, {} for a transformer without the adapter
    sigmas            [steps + 1]
    step              called after each step with (number, tokens before it, velocity)
    """
    like = next(transformer.parameters())
    batch, (height, width) = len(text), noise.shape[-2:]
    tokens, fixed = (pack(x).to(like.device, torch.float32).expand(batch, -1, -1) for x in (noise, reference))
    ids = torch.cat([position_ids(height, width, 0), position_ids(height, width, 1)]).to(like.device)
    conditions = {
        "encoder_hidden_states": text.to(like),
        "pooled_projections": pooled.to(like),
        "txt_ids": torch.zeros(text.shape[1], 3, device=like.device),
        "img_ids": ids,
        "guidance": torch.full((batch,), guidance, device=like.device) if transformer.config.guidance_embeds else None,
        "joint_attention_kwargs": {"bokeh_vectors": {i: rows.to(like.device) for i, rows in vectors.items()}} if vectors else None,
        "return_dict": False,
    }
    for i, timestep in enumerate(network_timesteps(sigmas, rounding).to(like.device)):
        given = torch.cat([tokens, fixed], 1).to(like.dtype)
        velocity = transformer(hidden_states=given, timestep=timestep.expand(batch), **conditions)[0][:, : tokens.shape[1]].float()
        before = tokens
        tokens = tokens + (sigmas[i + 1] - sigmas[i]).to(like.device) * velocity
        if rounding is not None:
            tokens = tokens.to(rounding).float()
        if step is not None:
            step(i, before, velocity)
    return unpack(tokens, height, width)


@torch.inference_mode()
def encode_image(vae, image: torch.Tensor) -> torch.Tensor:
    """[1, C, h, w] float32: the mode of the VAE's posterior for an image [3, H, W] 0..1, scaled as FLUX wants it."""
    like = next(vae.parameters())
    mode = vae.encode((image[None] * 2 - 1).to(like)).latent_dist.mode()
    return (mode.float() - vae.config.shift_factor) * vae.config.scaling_factor


@torch.inference_mode()
def decode_image(vae, latent: torch.Tensor) -> torch.Tensor:
    """[3, H, W] float32 0..1 in 8-bit steps, from latents [1, C, h, w]."""
    decoded = vae.decode((latent / vae.config.scaling_factor + vae.config.shift_factor).to(next(vae.parameters()))).sample
    return ((decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255


def text_of(pipeline) -> EncodeText:
    """encode_text by the text encoders of a diffusers FluxKontextPipeline."""

    def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            text, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=prompt, max_sequence_length=TEXT_TOKENS)
        return text, pooled

    return encode
