"""MagicBokeh: photo and defocus to photo with bokeh, restored on the way, in one step (SPEC section 0).

encode patches -> ControlNet reads the defocus, UNet predicts eps -> x0 in closed form -> decode, blend -> colours of the photo
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...errors import BokehError
from ...optics import focus as focusing
from ...optics.defocus import Defocus, clip_span, fit_disparity
from ...optics.published_k import magicbokeh_defocus
from ...tiling import Blend
from ..arguments import at_once, check_pictures
from ..colour_fix import adain, mean_fix, wavelet_fix
from ..one_step import alphas_cumprod
from ..one_step import one_step as one_step_from
from .checkpoint import MagicBokeh
from .network import LATENT_CELL, TIMESTEP, focus_regions
from .patches import PATCH, box_window, grid, reflected, tiles, window

FAST_STRIDE = 384  # px, of the UNet's patches in fast mode
FAST_TILE, FAST_OVERLAP = 1024, 128  # px, of the VAE's tiles in fast mode
SMALLEST_TILE = 256  # px
AT_ONCE = 4  # patches the UNet sees together
IN_FOCUS = 0.1  # largest D that counts as in focus for the attention and the colours
FEWEST = 0.005  # share of the picture that must be in focus for its colours to be judged by
# Peak memory in numbers per pixel, as ComfyUI estimates it for this VAE, and per latent pixel of the UNet (1.5 times what was counted).
ENCODING, DECODING, DENOISING = 1767, 2178, 15_000

MODES = ("exact", "fast")
COLOUR_FIXES = ("in-focus parts", "whole picture", "wavelet", "none")


@dataclass(frozen=True)
class Fidelity:
    """What the released script does that is not needed for a good picture."""

    eight_bit_disparity: bool  # the script stores disparity as 8 bits, cut off: steps of K / (32 * 255)
    nonzero_mask: bool  # any nonzero pixel of a soft mask counts as subject, and an empty mask focuses on the far plane
    sampled: bool  # the VAE posterior is sampled; the script never seeds it
    truncated: bool  # the picture is cut to 8 bits before and after the colour fix, which darkens it by half a level each
    whole_picture_colours: bool  # contrast of the whole picture is restored, which works against blur


BEST = Fidelity(False, False, False, False, False)
AS_PUBLISHED = Fidelity(True, True, True, True, True)
FIDELITIES = {"best": BEST, "as published": AS_PUBLISHED}

Progress = Callable[[float, int], None]


def _nothing(*_) -> None:
    pass


def render(
    model: MagicBokeh,
    image: torch.Tensor,
    defocus: Defocus | None = None,
    *,
    subject: torch.Tensor | None = None,
    fidelity: Fidelity = BEST,
    mode: str = "exact",
    colour_fix: str = "in-focus parts",
    upscale: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
    load: Callable[[list, int], None] = _nothing,
    shrinking: Callable = at_once,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Restore a batch of pictures and render depth of field into them.

    image      [B, 3, H, W] display-encoded 0..1, any size
    defocus    of the image's size; one serves a batch, and one picture serves a Defocus of many frames. None, or k = 0 everywhere:
               restoration alone (not the input unchanged). The network knows blur radii up to 32 px
    subject    [B or 1, H, W] 0..1: focus on this instead of the Defocus's focus
    mode       "exact": patches as published; "fast": VAE on large tiles, fewer patches for the UNet, blended as latents
    colour_fix one of COLOUR_FIXES; fidelity "as published" always fixes the whole picture
    upscale    the photo is made this many times larger first (bicubic), the blur with it
    seed       of the sampled posterior; unused by BEST
    progress   called as progress(frames done, frames), with fractions; may raise to interrupt
    load       load(parts of the model, bytes to work in), called before each phase
    shrinking  shrinking(work, size, smallest): work(size), with smaller sizes when memory runs out
    out        [frames, 3, *size] tensor to write to, size = enlarged_size(H, W, upscale)

    Returns `out`, or a new tensor on the image's device. Raises BokehError for shapes that do not match and unknown modes.
    """
    if mode not in MODES or colour_fix not in COLOUR_FIXES:
        raise BokehError(f"Unknown mode '{mode}' or colour fix '{colour_fix}'; use {', '.join(MODES)} and {', '.join(COLOUR_FIXES)}.")
    check_pictures(image, defocus)
    pictures, _, height, width = image.shape
    maps = len(defocus.disparity) if defocus is not None else pictures
    if pictures != maps and 1 not in (pictures, maps):
        raise BokehError(f"There are {pictures} pictures but {maps} depth maps; give one depth map, or one for each picture.")
    frames = max(pictures, maps)
    size = enlarged_size(height, width, upscale)
    if out is None:
        out = image.new_empty(frames, 3, *size)
    conditions = None if defocus is None else Conditions(defocus, subject, fidelity, size)

    restoring, coded = None, None
    for i in range(frames):

        def report(done: float, i: int = i) -> None:
            if progress is not None:
                progress(i + done, frames)

        report(0)
        if restoring is None or pictures > 1:
            photo = image[i if pictures > 1 else 0].to(model.encoder.device, torch.float32)
            if not bool(photo.isfinite().all()):
                raise BokehError(f"Picture {i} holds values that are not numbers (NaN or infinite); repair it before rendering.")
            photo = photo.clamp(0, 1)
            if size != (height, width):
                photo = F.interpolate(photo[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)
            restoring = Exact(model, photo, load, shrinking) if mode == "exact" else Fast(model, photo, load, shrinking)
            coded = restoring.encode(_noise(seed) if fidelity.sampled else None, lambda done: report(0.25 * done))
        d = torch.zeros(size) if conditions is None else conditions.frame(i if maps > 1 else 0)
        picture = restoring.bokeh(coded, d.to(photo.device), lambda done: report(0.25 + 0.75 * done))
        out[i] = match_colours(picture, photo, d.to(photo.device), colour_fix, fidelity)
        if progress is not None:
            progress(i + 1, frames)
    return out


def enlarged_size(height: int, width: int, upscale: float) -> tuple[int, int]:
    """Height and width of the result."""
    if not upscale >= 1:
        raise BokehError(f"The upscale factor is {upscale}; expected 1 or more.")
    return round(height * upscale), round(width * upscale)


class Conditions:
    """Defocus maps D = |d - f| K / 32 for the network, one per frame."""

    def __init__(self, defocus: Defocus, subject: torch.Tensor | None, fidelity: Fidelity, size: tuple[int, int] | None = None):
        """subject [B or 1, H, W]: its disparity is the focus, instead of the Defocus's. size: of the maps, None = the Defocus's."""
        frames, height, width = defocus.disparity.shape
        if subject is not None and (len(subject) not in (1, frames) or tuple(subject.shape[1:]) != (height, width)):
            raise BokehError(
                f"The subject's mask has shape {list(subject.shape)}; expected {[frames, height, width]} like the depth, or one for all."
            )
        self.size = size or (height, width)
        self.disparity, self.k = defocus.disparity, (defocus.k * (self.size[1] / width)).tolist()
        self.fidelity, self.subject, self.given = fidelity, subject, defocus.focus
        self.low, self.span = 0.0, 1.0
        if fidelity.eight_bit_disparity:
            low, high = clip_span(defocus.disparity)
            self.low, self.span = low, (high - low) or 1.0

    def focus(self, i: int) -> torch.Tensor:
        """The focus of frame i in the disparity `frame` works with, a float32 number."""
        if self.subject is None:
            return self._prepared(self.given[i])
        subject = self.subject[i if len(self.subject) > 1 else 0]
        disparity = self._prepared(self.disparity[i])
        if not self.fidelity.nonzero_mask:
            return focusing.from_mask(disparity[None], subject)[0]
        # The 8-bit mask is compared with 0.5 there: every level from 1 up counts. median() is the lower one, as published.
        inside = disparity[(subject.to(disparity.device) * 255).round() > 0.5]
        return inside.median() if len(inside) else disparity.new_zeros(())

    def frame(self, i: int) -> torch.Tensor:
        """[height, width] float32 D of frame i: 0 in focus, 1 at a blur radius of 32 px."""
        # In this order, in float32: thresholding decides by the last bit where 8-bit disparities land on 0.1 (SPEC section 5).
        disparity = fit_disparity(self.disparity[i : i + 1], 1, *self.size)[0]
        difference = (self._prepared(disparity) - self.focus(i)).abs()
        return difference * magicbokeh_defocus(self.k[i] * self.span)

    def _prepared(self, disparity: torch.Tensor) -> torch.Tensor:
        if not self.fidelity.eight_bit_disparity:
            return disparity.float()
        return (255 * ((disparity.float() - self.low) / self.span).clamp(0, 1)).floor() / 255


def in_focus(d: torch.Tensor) -> torch.Tensor:
    """The mask of the focus-aware attention, 1 where D <= 0.1, of the shape of d."""
    return (d <= torch.tensor(IN_FOCUS, dtype=torch.float32)).float()


def posterior(model: MagicBokeh, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance [B, 4, h, w] float32 of pictures [B, 3, 8h, 8w] in -1..1."""
    mean, log_variance = model.encoder.network(picture.to(model.encoder.device, model.encoder.dtype))
    return mean.float(), log_variance.float()


def latent_of(model: MagicBokeh, mean: torch.Tensor, log_variance: torch.Tensor, noise: Callable | None) -> torch.Tensor:
    """The scaled latent: the posterior's mean, or a sample of it. noise(shape) -> standard normal numbers."""
    if noise is not None:
        mean = mean + (0.5 * log_variance).exp() * noise(tuple(mean.shape)).to(mean)
    return mean * model.scaling_factor


def predict(model: MagicBokeh, latents: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """x0 [B, 4, h, w] float32 from scaled latents [B, 4, h, w] and defocus maps D [B, 8h, 8w]."""
    return one_step(latents, predict_eps(model, latents, 2 * maps - 1, in_focus(maps)))


def predict_eps(model: MagicBokeh, latents: torch.Tensor, condition: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """eps [B, 4, h, w] on the latents' device. condition = 2 D - 1 and mask (1 = in focus), [B, 8h, 8w] each."""
    from einops import repeat

    controlnet, unet = model.controlnet, model.unet
    condition = repeat(condition, "b h w -> b c h w", c=3).to(controlnet.device, controlnet.dtype)
    corrections = controlnet.network(latents.to(controlnet.device, controlnet.dtype), condition)
    corrections = [correction.to(unet.device, unet.dtype) for correction in corrections]
    return unet.network(latents.to(unet.device, unet.dtype), corrections, focus_regions(mask, unet.device)).to(latents.device)


def one_step(latent: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """x0 [B, 4, h, w] float32 from the noisiest latent there is, t = 999. An error of eps grows 14.6 times here."""
    return one_step_from(latent, eps, alphas_cumprod()[TIMESTEP])


def decoded(model: MagicBokeh, x0: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 8h, 8w] float32, -1..1, of scaled latents [B, 4, h, w]."""
    latent = x0.to(model.decoder.device) / model.scaling_factor
    return model.decoder.network(latent.to(model.decoder.dtype)).float().clamp(-1, 1)


def match_colours(picture: torch.Tensor, photo: torch.Tensor, d: torch.Tensor, colour_fix: str, fidelity: Fidelity) -> torch.Tensor:
    """The finished picture [3, H, W] 0..1: the colours of the photo, by one of COLOUR_FIXES; d [H, W] tells what is in focus."""
    if fidelity.truncated:
        picture, photo = _eight_bits(picture), (photo * 255).round() / 255
    if fidelity.whole_picture_colours or colour_fix == "whole picture":
        picture = adain(picture, photo)
    elif colour_fix == "wavelet":
        picture = wavelet_fix(picture[None], photo[None])[0]
    elif colour_fix == "in-focus parts":
        weight = (2 - d / IN_FOCUS).clamp(0, 1)  # all of it while in focus for the network, none at twice that blur
        enough = float(weight.mean()) >= FEWEST and float(weight.sum()) >= 16
        picture = adain(picture, photo, weight) if enough else mean_fix(picture, photo)
    picture = picture.clamp(0, 1)
    return _eight_bits(picture) if fidelity.truncated else picture


def _eight_bits(picture: torch.Tensor) -> torch.Tensor:
    return (picture.clamp(0, 1) * 255).floor() / 255


def _noise(seed: int) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def _room(part, numbers: int) -> int:
    """Bytes of so many numbers in the dtype a part computes in."""
    return numbers * part.dtype.itemsize


class _Path:
    """One photo on its way through the networks. The modes differ in how they cut it."""

    def __init__(self, model: MagicBokeh, photo: torch.Tensor, load: Callable = _nothing, shrinking: Callable = at_once):
        """photo [3, H, W] 0..1 on the VAE's device. Sides below a patch are mirrored outwards."""
        self.model, self.load, self.shrinking = model, load, shrinking
        self.size = photo.shape[-2:]
        self.rows, self.top = reflected(self.size[0], self.padded(self.size[0]))
        self.columns, self.left = reflected(self.size[1], self.padded(self.size[1]))
        self.photo = self.pad(photo) * 2 - 1

    def padded(self, side: int) -> int:
        return max(side, PATCH)

    def pad(self, plane: torch.Tensor) -> torch.Tensor:
        return plane[..., self.rows.to(plane.device)[:, None], self.columns.to(plane.device)]

    def crop(self, plane: torch.Tensor) -> torch.Tensor:
        return plane[..., self.top : self.top + self.size[0], self.left : self.left + self.size[1]]

    def denoise(self, patches: list[tuple[torch.Tensor, torch.Tensor]], report: Callable) -> list[torch.Tensor]:
        """x0 [4, 64, 64] float32 of every patch. patches: scaled latent [4, 64, 64] and D [512, 512]."""
        controlnet, unet = self.model.controlnet, self.model.unet

        def work(count: int) -> list[torch.Tensor]:
            self.load([unet, controlnet], _room(unet, count * (PATCH // LATENT_CELL) ** 2 * DENOISING))
            found = []
            for first in range(0, len(patches), count):
                report(first / len(patches))
                latents, maps = (torch.stack(items) for items in zip(*patches[first : first + count], strict=True))
                found += predict(self.model, latents, maps)
            return found

        return self.shrinking(work, min(AT_ONCE, len(patches)), 1)


class Exact(_Path):
    """Every patch of 512 px by itself from end to end, the pictures blended: as published."""

    def encode(self, noise: Callable | None = None, report: Callable = _nothing) -> list[torch.Tensor]:
        """The scaled latents [4, 64, 64] of the patches."""
        self.load([self.model.encoder], _room(self.model.encoder, PATCH**2 * ENCODING))
        places = grid(*self.photo.shape[-2:])
        latents = []
        for n, (row, column) in enumerate(places):
            report(n / len(places))
            mean, log_variance = posterior(self.model, self.photo[None, :, row : row + PATCH, column : column + PATCH])
            latents.append(latent_of(self.model, mean, log_variance, noise)[0])
        return latents

    def bokeh(self, coded: list[torch.Tensor], d: torch.Tensor, report: Callable = _nothing) -> torch.Tensor:
        """[3, H, W] 0..1 before the colour fix. d [H, W]."""
        height, width = self.photo.shape[-2:]
        places, d = grid(height, width), self.pad(d)
        maps = [d[row : row + PATCH, column : column + PATCH] for row, column in places]
        found = self.denoise(list(zip(coded, maps, strict=True)), lambda done: report(0.3 * done))
        self.load([self.model.decoder], _room(self.model.decoder, PATCH**2 * DECODING))
        blend = Blend((3, height, width), device=self.photo.device)
        for n, ((row, column), x0) in enumerate(zip(places, found, strict=True)):
            report(0.3 + 0.7 * n / len(places))
            blend.add(decoded(self.model, x0[None])[0], row, column, window(row, column, height, width))
        return self.crop(blend.result() * 0.5 + 0.5)


class Fast(_Path):
    """The VAE on large tiles with little overlap; the UNet on patches of 512 px that overlap less, blended as latents."""

    def padded(self, side: int) -> int:
        return max(-(-side // LATENT_CELL) * LATENT_CELL, PATCH)

    def encode(self, noise: Callable | None = None, report: Callable = _nothing) -> torch.Tensor:
        """The scaled latent [4, h, w] of the whole photo."""
        height, width = (side // LATENT_CELL for side in self.photo.shape[-2:])

        def work(side: int) -> torch.Tensor:
            self.load([self.model.encoder], _room(self.model.encoder, side**2 * ENCODING))
            blend = Blend((8, height, width), device=self.photo.device)
            for done, cells in tiles(height, width, side // LATENT_CELL, FAST_OVERLAP // LATENT_CELL):
                report(done)
                moments = torch.cat(posterior(self.model, self.photo[(None, slice(None), *_in_pixels(cells))]), 1)[0]
                blend.add(moments, cells[0].start, cells[1].start, box_window(cells, height, width, FAST_OVERLAP // LATENT_CELL))
            return latent_of(self.model, *blend.result().chunk(2), noise)

        return self.shrinking(work, FAST_TILE, SMALLEST_TILE)

    def bokeh(self, coded: torch.Tensor, d: torch.Tensor, report: Callable = _nothing) -> torch.Tensor:
        """[3, H, W] 0..1 before the colour fix. d [H, W]."""
        height, width = coded.shape[-2:]
        side, stride = PATCH // LATENT_CELL, FAST_STRIDE // LATENT_CELL
        places, d = grid(height, width, side, stride), self.pad(d)
        patches = []
        for row, column in places:
            top, left = row * LATENT_CELL, column * LATENT_CELL
            patches.append((coded[:, row : row + side, column : column + side], d[top : top + PATCH, left : left + PATCH]))
        blend = Blend((4, height, width), device=self.photo.device)
        for (row, column), x0 in zip(places, self.denoise(patches, lambda done: report(0.3 * done)), strict=True):
            blend.add(x0, row, column, window(row, column, height, width, side, side - stride))
        x0 = blend.result()

        def work(side: int) -> torch.Tensor:
            self.load([self.model.decoder], _room(self.model.decoder, side**2 * DECODING))
            picture = Blend((3, height * LATENT_CELL, width * LATENT_CELL), device=self.photo.device)
            for done, cells in tiles(height, width, side // LATENT_CELL, FAST_OVERLAP // LATENT_CELL):
                report(0.3 + 0.7 * done)
                pixels = _in_pixels(cells)
                weight = box_window(pixels, height * LATENT_CELL, width * LATENT_CELL, FAST_OVERLAP)
                picture.add(decoded(self.model, x0[(None, slice(None), *cells)])[0], pixels[0].start, pixels[1].start, weight)
            return picture.result()

        return self.crop(self.shrinking(work, FAST_TILE, SMALLEST_TILE) * 0.5 + 0.5)


def _in_pixels(cells: tuple[slice, slice]) -> tuple[slice, slice]:
    return tuple(slice(s.start * LATENT_CELL, s.stop * LATENT_CELL) for s in cells)
