"""The numbers around the network: K lists, prompts, sizes, noise and schedule (BokehDepth stage 1, SPEC sections 3 and 5)."""

import math
from dataclasses import dataclass

import torch

from ...errors import BokehError
from ...optics.published_k import BOKEHDEPTH_K
from ...pixels import from_bytes, lanczos, to_bytes

PROMPT = (
    "Set dof_cond = {value:.2f} (stronger background defocus); preserve subject sharpness; "
    "keep composition, lighting, and colors unchanged."
)
STEPS, GUIDANCE, SEED = 10, 7.0, 42
TEXT_TOKENS = 512  # of T5, padded and unmasked: the padding counts
MULTIPLE = 16  # of the sides the network works on
TIMESTEPS = 1000

# The Kontext VAE: latent = (z - shift) * scale.
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159


@dataclass(frozen=True)
class Fidelity:
    """How closely the published run is followed where it can be bettered."""

    square: bool  # the published script squashes every picture to a square; the shape is kept otherwise
    rounding: torch.dtype | None  # the published pipeline keeps K embedding, noise, latents and timestep in this dtype, not in float32
    match_contrast: bool  # the published colour transfer also matches the spread, which sharpens what the blur has flattened


@dataclass(frozen=True)
class Shift:
    """How the schedule follows the number of tokens: mu runs from `base` at `base_tokens` to `most` at `most_tokens`, and on."""

    base: float = 0.5
    most: float = 1.15
    base_tokens: int = 256
    most_tokens: int = 4096


KONTEXT = Shift()

BEST = Fidelity(square=False, rounding=None, match_contrast=False)
AS_PUBLISHED = Fidelity(square=True, rounding=torch.bfloat16, match_contrast=True)


def normalise_k(k: float) -> float:
    """What the K embedding takes: K clamped to 1..30, divided by 30 (SPEC section 3)."""
    low, high = BOKEHDEPTH_K
    return min(max(float(k), low), high) / high


def k_range(k_min: float, k_max: float, k_step: float) -> list[float]:
    """k_min, k_min + k_step, ... up to k_max, which is always in the list. Published in gen_bokeh_stack.main."""
    if not (k_step > 0 and k_max >= k_min):
        raise BokehError(f"The K list from {k_min} to {k_max} in steps of {k_step} is empty; expected a step above 0 and min <= max.")
    values, value = [], float(k_min)
    while value <= k_max:
        values.append(value)
        value += k_step
    if not values or abs(values[-1] - k_max) > 1e-6:
        values.append(float(k_max))
    return values


def parse_k_list(text: str) -> list[float]:
    """ "10, 20, 30" as numbers. Raises BokehError for words, for K of 0 and below (the sharp picture itself) and for an empty list."""
    try:
        values = [float(word) for word in text.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        raise BokehError(f"The K list is '{text}'; expected numbers parted by commas, such as 10, 20, 30.") from None
    check_k_list(values)
    return values


def check_k_list(values: list[float]) -> None:
    if not values:
        raise BokehError("The K list is empty; give at least one K, such as 10, 20, 30.")
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise BokehError(
                f"The K list holds {value:g}; expected numbers above 0 (1 to 30 is what the network knows; 0 is the picture itself)."
            )


def prompt_for(template: str, k: float) -> str:
    """The instruction for one K. Placeholders: value and K_abs (the K as asked for), aperture (max(1, 30 / K)).

    As published: a template that can not be filled in is returned as it is, and K = 0 raises ZeroDivisionError whatever it holds.
    """
    aperture = max(1.0, BOKEHDEPTH_K[1] / k)
    try:
        return template.format(value=k, K_abs=k, aperture=aperture)
    except (KeyError, IndexError, ValueError):
        return template


def parse_block_ids(text: str) -> list[int]:
    """ "0-3,9" as [0, 1, 2, 3, 9]: numbers and inclusive ranges in the order given."""
    ids = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if first or dash:
            ids.extend(range(int(first), int(last if dash else first) + 1))
    return ids


def compress_block_ids(ids: list[int]) -> str:
    """The same as a name: sorted, without repetition, runs of two or more as a-b, joined by underscores."""
    runs: list[list[int]] = []
    for number in sorted(set(ids)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "_".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def reference_size(
    size: tuple[int, int], *, ref_width: int | None = None, ref_height: int | None = None, short_side: int | None = None
) -> tuple[int, int]:
    """(width, height) of the published ref.png: an optional exact size (both needed), then an optional short side (rounded, >= 8)."""
    if ref_width and ref_height:
        size = (ref_width, ref_height)
    if short_side:
        scale = short_side / min(size)
        size = (max(8, round(size[0] * scale)), max(8, round(size[1] * scale)))
    return size


def generated_size(size: tuple[int, int], assigned: int | None = None) -> tuple[int, int]:
    """(width, height) the network works on: each side floored to a multiple of 16, or `assigned` twice as it is (datasets)."""
    if assigned:
        return assigned, assigned
    return max(MULTIPLE, size[0] // MULTIPLE * MULTIPLE), max(MULTIPLE, size[1] // MULTIPLE * MULTIPLE)


def working_size(width: int, height: int, resolution: int, fidelity: Fidelity) -> tuple[int, int]:
    """(width, height) for a picture: `resolution` on the short side in its own shape, or that square as published."""
    if fidelity.square:
        return generated_size((resolution, resolution))
    scale = resolution / min(width, height)
    return tuple(max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (width, height))


def shared_noise(seed: int, channels: int, height: int, width: int, rounding: torch.dtype | None = None) -> torch.Tensor:
    """[1, channels, height, width] float32 noise on the CPU, the same for every frame of a stack."""
    noise = torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return noise if rounding is None else noise.to(rounding).float()


def schedule(width: int, height: int, steps: int, shift: Shift = KONTEXT) -> torch.Tensor:
    """[steps + 1] float32 sigmas from 1 to 0 for a picture of that size in px, shifted by its number of tokens (16 x 16 px each).

    mu = 0.5 + 0.65 (L - 256) / 3840 for the Kontext shift; sigma' = e^mu / (e^mu + 1 / sigma - 1), in float32 as the scheduler does it.
    """
    if steps < 1:
        raise BokehError(f"There are {steps} steps; expected 1 or more.")
    tokens = (width // MULTIPLE) * (height // MULTIPLE)
    slope = (shift.most - shift.base) / (shift.most_tokens - shift.base_tokens)
    strength = torch.tensor(math.exp(tokens * slope + (shift.base - slope * shift.base_tokens)))
    # The steps are spaced in double precision and rounded once.
    even = torch.tensor([1.0 + (1.0 / steps - 1.0) * i / max(steps - 1, 1) for i in range(steps)], dtype=torch.float64).float()
    return torch.cat([strength / (strength + (1.0 / even - 1.0)), torch.zeros(1)])


def network_timesteps(sigmas: torch.Tensor, rounding: torch.dtype | None) -> torch.Tensor:
    """What the network is given for each step: sigma; as published 1000 sigma rounded, divided by 1000 and rounded again."""
    timesteps = sigmas[:-1] * TIMESTEPS
    return timesteps / TIMESTEPS if rounding is None else timesteps.to(rounding) / TIMESTEPS


def pack(latent: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] latents as tokens [B, H/2 * W/2, 4 C]."""
    from einops import rearrange

    return rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens as latents [B, C, height, width]."""
    from einops import rearrange

    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, w=width // 2, p=2, q=2)


def position_ids(height: int, width: int, first: int) -> torch.Tensor:
    """[H/2 * W/2, 3] float32 positions (first, y, x) of the tokens of a latent; first is 0 for the target, 1 for the reference."""
    y, x = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.full_like(y, first), y, x], -1).flatten(0, 1).float()


def resize(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """[3, height, width] from an image [3, H, W] 0..1, by the 8-bit Lanczos filter the published run uses. float32."""
    return from_bytes(lanczos(to_bytes(image), height, width))
