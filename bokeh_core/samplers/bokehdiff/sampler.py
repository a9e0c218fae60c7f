"""BokehDiff's sampler: encode, predict the noise once, tile by tile, take it away, decode (SPEC sections 2 to 6)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...errors import BokehError
from ...optics.defocus import Defocus, clip_span, fit_disparity
from ...optics.published_k import bokehdiff_k
from ...pixels import from_bytes, lanczos, to_bytes
from ...tiling import Blend
from ..arguments import Placed, at_once
from ..one_step import alphas_cumprod as alpha_bar
from ..one_step import one_step
from . import preparation
from .checkpoint import BokehDiff
from .network import token_grid
from .pisa import PISA_AS_PUBLISHED, Draws, Pisa, scene_blocks, scene_of

TIMESTEP = 499
LATENT = 8  # px along the side of a latent pixel
TILE = 512  # px along the side of a tile, as trained
SMALLEST_TILE = 128
MULTIPLE = 32  # px: sides that the UNet halves twice without rounding
TOGETHER = 8  # frames that go through a network before the next one is loaded
# Working memory in numbers per pixel of a tile. The VAE's are what ComfyUI itself reckons with for this VAE, 2.8 times what its tensors
# take; the UNet's is 1.4 times the most that was counted, PISA's pairs within reach (in float32) apart.
ENCODING, DECODING, DENOISING, PAIRS = 1767, 2178, 100, 25


@dataclass(frozen=True)
class Fidelity:
    """How the picture is treated around the network. The defaults are the corrected form."""

    pisa: Pisa = field(default_factory=Pisa)
    stretched: bool = False  # published: picture and maps resized to multiples of 8, the picture in 8 bits; else mirrored and cropped
    far_is_one: bool = False  # published: the disparity is stored inverted, so occlusion is judged on the inverted scene
    range_per_picture: bool = False  # published: disparity spread over 0..1 picture by picture, without outliers; else one range per clip
    latent_crops: bool = False  # published: the size ids tell a tile's corner in latents; training told it in px with the tile's size
    eight_bit: bool = False  # published: the result is cut to 8 bits


BEST = Fidelity()
AS_PUBLISHED = Fidelity(PISA_AS_PUBLISHED, stretched=True, far_is_one=True, range_per_picture=True, latent_crops=True, eight_bit=True)
FIDELITIES = {"best": BEST, "as published": AS_PUBLISHED}


@torch.no_grad()
def render(
    model: BokehDiff,
    image: torch.Tensor,
    defocus: Defocus,
    *,
    fidelity: Fidelity = BEST,
    seed: int = 0,
    tile: int = TILE,
    progress: Callable[[float, int], None] | None = None,
    load: Callable[[list[Placed], int], None] | None = None,
    shrinking: Callable | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Photographs with shallow depth of field, [max of both batches, 3, H, W] float32 0..1, of exactly the image's size.

    image     [B, 3, H, W] 0..1 display-encoded; values outside are clipped
    defocus   of B frames or of one; or B is 1. Frames with k = 0 come out bit for bit as they went in
    seed      used where the fidelity draws random numbers
    tile      px along the side of the UNet's tiles (the VAE's are twice that); pictures up to twice a tile's area go in one piece
    progress  called with (steps done, steps in all), with fractions, before every tile; may raise to stop
    load      called with ([network], bytes of working memory) before each phase
    shrinking (work, tile, smallest) -> work(tile), again with smaller tiles when memory runs out; None = no second try
    out       where to put the result
    """
    count = max(len(image), len(defocus.focus))
    if len(image) != len(defocus.focus) and 1 not in (len(image), len(defocus.focus)):
        raise BokehError(f"There are {len(image)} pictures and {len(defocus.focus)} frames of defocus; give as many, or one of either.")
    height, width = image.shape[-2:]
    out = image.new_empty((count, 3, height, width), dtype=torch.float32) if out is None else out
    shrinking = shrinking or at_once
    load = load or (lambda networks, size: None)
    span = (float(defocus.disparity.min()), float(defocus.disparity.max())) if defocus.metric else clip_span(defocus.disparity)
    blurred = [i for i in range(count) if float(defocus.k[i % len(defocus.k)]) != 0]
    for i in set(range(count)) - set(blurred):
        out[i] = image[i % len(image)]

    steps = _Steps(progress, 3 * len(blurred))
    tiles = {"unet": tile, "vae": tile}  # the sizes that fitted so far

    def through(part, work, items):
        """work(item, tile) for every item, through one part, see activation_bytes."""
        name = part.partition(" ")[0]
        network = getattr(model, name)
        load([network], activation_bytes(part, height, width, network.dtype.itemsize, tile))
        for item in items:

            def attempt(size, item=item):
                tiles[name] = size
                return work(item, size)

            yield shrinking(attempt, tiles[name], SMALLEST_TILE)
            steps.next()

    def blur(item, size):
        latents, one = item
        return bokeh_latents(model, latents, one, fidelity, size, Draws(seed), steps.inside)  # one seed: changing noise would flicker

    for start in range(0, len(blurred), TOGETHER):
        frames = blurred[start : start + TOGETHER]
        conditions = [condition(image[i % len(image)][None], defocus.frame(i % len(defocus.focus)), fidelity, span) for i in frames]
        latents = list(through("vae encoder", lambda one, size: encode(model, one.pixels, 2 * size, steps.inside), conditions))
        latents = list(through("unet", blur, zip(latents, conditions, strict=True)))
        pictures = through("vae decoder", lambda z, size: decode(model, z, 2 * size, steps.inside), latents)
        for i, one, picture in zip(frames, conditions, pictures, strict=True):
            out[i] = finish(picture, one, fidelity)[0].to(out)
    return out


def activation_bytes(part: str, height: int, width: int, itemsize: int, tile: int = TILE) -> int:
    """Bytes that one of "vae encoder", "unet", "vae decoder" needs beside its weights for a picture of height x width px.

    itemsize  of the dtype it computes in
    tile      px, see render
    """
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    if part == "unet":
        return min(2 * tile * tile, height * width) * (DENOISING * itemsize + PAIRS * 4)
    area = min(4 * tile * tile, height * width)
    return ((ENCODING if part == "vae encoder" else DECODING) * area + 8 * height * width) * itemsize  # and what tiles are put together to


class _Steps:
    """Counts encodings, UNet passes and decodings; tiles are fractions of a step."""

    def __init__(self, progress, total):
        self.progress, self.done, self.total = progress, 0, total

    def inside(self, share: float = 0.0) -> None:
        if self.progress:
            self.progress(self.done + share, self.total)

    def next(self) -> None:
        self.done += 1
        self.inside()


# --- the condition ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One picture as the networks see it.

    pixels     [1, 3, H, W] -1..1
    disparity  [1, 1, H, W] 0..1
    defocus    [1, 1, H, W] |d - d_f| times k, in px
    size       (height, width) of the result
    """

    pixels: torch.Tensor
    disparity: torch.Tensor
    defocus: torch.Tensor
    size: tuple[int, int]


def condition(image: torch.Tensor, defocus: Defocus, fidelity: Fidelity, span: tuple[float, float]) -> Condition:
    """Picture [1, 3, H, W] and its defocus brought to the network's ranges and sizes. span: the disparities that become 0 and 1."""
    size = tuple(image.shape[-2:])
    image = image.float().clamp(0, 1)
    disparity = fit_disparity(defocus.disparity, 1, *size).to(image.device)
    focus, k = float(defocus.focus[0]), float(defocus.k[0])
    if fidelity.range_per_picture:
        spread, *span = preparation.spread(disparity[0])
        spread = spread[None]
    else:
        spread = ((disparity - span[0]) / ((span[1] - span[0]) or 1.0)).clamp(0, 1)
    scale = (span[1] - span[0]) or 1.0
    signed = (spread - (focus - span[0]) / scale) * k * scale
    if fidelity.far_is_one:
        spread = 1 - spread
    maps = torch.cat([spread, signed])
    if fidelity.stretched:
        pixels, maps = preparation.to_multiples(to_bytes(image[0]), maps)
        pixels = pixels[None].to(image.device)
    else:
        pixels, maps = mirrored(image * 2 - 1), mirrored(maps)
    return Condition(pixels, maps[None, :1], maps[None, 1:].abs(), size)


def mirrored(picture: torch.Tensor, multiple: int = MULTIPLE) -> torch.Tensor:
    """[..., H, W] continued by its mirror image to the right and below, up to the next multiples."""
    for axis in (-2, -1):
        length = picture.shape[axis]
        index = torch.arange(-(-length // multiple) * multiple, device=picture.device) % (2 * length)
        picture = picture.index_select(axis, torch.where(index < length, index, 2 * length - 1 - index))
    return picture


def finish(picture: torch.Tensor, one: Condition, fidelity: Fidelity) -> torch.Tensor:
    """The decoded picture [1, 3, H, W] 0..1 at the size of the input."""
    if fidelity.eight_bit:
        picture = (picture * 255).byte().float() / 255
    if not fidelity.stretched:
        return picture[..., : one.size[0], : one.size[1]]
    if picture.shape[-2:] == one.size:
        return picture
    return from_bytes(lanczos(to_bytes(picture[0]), *one.size))[None]


# --- encode, one step, decode -------------------------------------------------------------------------------------------------------


def encode(model: BokehDiff, pixels: torch.Tensor, tile: int, inside: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Latents [1, 4, h, w] float32 of pixels [1, 3, H, W] -1..1: the mode of the VAE's posterior, scaled. tile: px, see `_tiled`."""
    vae = model.vae
    with _tiled(vae.network, vae.network.encoder, tile, inside):
        return vae.network.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float() * model.scaling


def decode(model: BokehDiff, latents: torch.Tensor, tile: int, inside: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Picture [1, 3, H, W] float32 0..1 of latents [1, 4, h, w]."""
    vae = model.vae
    with _tiled(vae.network, vae.network.decoder, tile, inside):
        picture = vae.network.decode((latents / model.scaling).to(vae.device, vae.dtype)).sample
    return (picture.float() / 2 + 0.5).clamp(0, 1)


class _tiled:
    """The VAE with tiles of at most `tile` px (its own size is the upper limit, as published), telling `inside` before each."""

    def __init__(self, vae, half, tile, inside):
        self.vae, self.half, self.inside = vae, half, inside
        self.side = min(tile, vae.config.sample_size)

    def __enter__(self):
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = self.side, self.side // LATENT
        self.hook = self.half.register_forward_pre_hook(lambda *_: self.inside())

    def __exit__(self, *_):
        self.hook.remove()


def bokeh_latents(
    model: BokehDiff,
    latents: torch.Tensor,
    one: Condition,
    fidelity: Fidelity,
    tile: int = TILE,
    draws: Draws | None = None,
    inside: Callable[[float], None] = lambda share: None,
) -> torch.Tensor:
    """The latents of the photograph with bokeh, from those of the sharp one [1, 4, h, w]."""
    height, width = latents.shape[-2:]
    whole = in_one_piece(height, width, tile // LATENT)
    # Without a fixed spacing the units belong to the piece: 51.2 across whatever is processed at once.
    side = None if fidelity.pisa.spacing else (LATENT * (height * width) ** 0.5 if whole else tile)
    radius = bokehdiff_k(one.defocus, side) / 10
    noise = predict_noise(model, latents, torch.cat([one.disparity, radius], 1), fidelity, tile // LATENT, draws, inside)
    return one_step(latents, noise.to(latents), float(alpha_bar()[TIMESTEP]))


def predict_noise(
    model: BokehDiff,
    latents: torch.Tensor,
    disp_coc: torch.Tensor,
    fidelity: Fidelity,
    side: int = TILE // LATENT,
    draws: Draws | None = None,
    inside: Callable[[float], None] = lambda share: None,
    timestep: int = TIMESTEP,
) -> torch.Tensor:
    """eps [1, 4, h, w] of latents [1, 4, h, w], in one piece or in overlapping tiles of `side` latents (SPEC section 6).

    disp_coc  [1, 2, 8h, 8w] disparity 0..1 and CoC radius in PISA's units
    """
    unet = model.unet
    height, width = latents.shape[-2:]
    whole = in_one_piece(height, width, side)
    rows, columns = ([0], [0]) if whole else (starts(height, side), starts(width, side))
    tall, wide = (height, width) if whole else (min(side, height), min(side, width))
    window = torch.ones(1, 1) if whole else gaussian(tall)[:, None] * gaussian(wide)[None]
    blend = Blend(latents.shape, unet.device)
    text, pooled = (tensor.to(unet.device, unet.dtype) for tensor in (model.text, model.pooled))
    corners = [(top, left) for left in columns for top in rows]
    for number, (top, left) in enumerate(corners):
        inside(number / len(corners))
        piece = disp_coc[..., LATENT * top : LATENT * (top + tall), LATENT * left : LATENT * (left + wide)].to(unet.device)
        blocks = scene_blocks(scene_of(piece, token_grid(tall, wide)), fidelity.pisa, draws)
        ids = size_ids(fidelity, (LATENT * height, LATENT * width), (top, left), (LATENT * tall, LATENT * wide))
        noise = unet.network(
            latents[..., top : top + tall, left : left + wide].to(unet.device, unet.dtype),
            timestep,
            text,
            pooled,
            ids.to(unet.device),  # float32: bfloat16 does not tell pixel 3000 from 3008
            blocks,
            fidelity.pisa,
            draws,
        )
        blend.add(noise, top, left, window.expand(tall, wide))
    return blend.result()


def in_one_piece(height: int, width: int, side: int) -> bool:
    """Latents up to twice a tile's area are not tiled."""
    return height * width <= 2 * side * side


def starts(length: int, side: int) -> list[int]:
    """First latents of the tiles along an axis. Published: neighbours share a quarter or more; identical tiles are left out here."""
    if length <= side:
        return [0]
    count = 1 + (length - side // 4) // (side * 3 // 4)
    return list(dict.fromkeys(torch.linspace(0, length - side, count).int().tolist()))


def gaussian(length: int) -> torch.Tensor:
    """[length] weights of a tile along one axis, exp(-x^2) for x from -2 to 2."""
    return torch.exp(-torch.linspace(-2, 2, length).square())


def size_ids(fidelity: Fidelity, size: tuple[int, int], corner: tuple[int, int], tile: tuple[int, int]) -> torch.Tensor:
    """[1, 6] SDXL's original size, crop corner and target size. size, tile: px; corner: latents (SPEC section 3)."""
    if fidelity.latent_crops:
        return torch.tensor([[*size, *corner, *size]], dtype=torch.float32)
    return torch.tensor([[*size, LATENT * corner[0], LATENT * corner[1], *tile]], dtype=torch.float32)
