"""Any-to-Bokeh: a clip with disparity, focus and blur strength in; the clip with bokeh out, in order, a few frames in memory.

encode every frame once -> UNet on overlapping segments, one call each -> weighted overlap of latents -> decode in windows
(SPEC sections 0, 6 and 7)
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import BokehError
from ...optics.defocus import Defocus, clip_span
from ...optics.published_k import any_to_bokeh_k
from ...video import segments
from ..arguments import at_once, check_pictures
from . import mpi, preparation
from .preparation import clip_range

ZERO_MASK = 255  # a region map of this value masks every visual token out, which is what the released code does


@dataclass(frozen=True)
class Fidelity:
    """What the released scripts do that is not needed for a good picture, and which numbers E(K) is made of."""

    sampled: bool = False  # latents are drawn from the VAE's posterior, in the release without a seed
    grey_end: bool = False  # a short last segment is filled up with mid grey frames, not with its last frame
    paired: bool = False  # two segments are one batch, in which the temporal cross-attention mixes up their contexts
    fixed_size: bool = False  # every picture is squashed to 1024 x 576, whatever its shape
    any_k: bool = False  # K goes in as it is, also between whole numbers and above 32, where training saw none
    across_cuts: bool = False  # segments run across cuts, and mix frames of different shots
    normalised_clip: bool = False  # CLIP gets mean and deviation taken out, as in training; the released inference does not
    k_table: str = "float16"  # of fuser.FREQUENCIES; the recordings of the reference need "float32"


BEST = Fidelity()
AS_PUBLISHED = Fidelity(sampled=True, grey_end=True, paired=True, fixed_size=True, any_k=True, across_cuts=True)
FIDELITIES = {"best": BEST, "as published": AS_PUBLISHED}

Progress = Callable[[float, int], None] | None
Noise = Callable[[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]]  # (first segment, shape) -> for pictures, for differences


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame at the working size.

    picture     [3, h, w] -1..1
    difference  [h, w] -1..1: V_D * 2 - 1
    k           K, px of blur radius in the working picture per unit of V_D
    region      [h, w] uint8 0..3, only where the masks are on
    """

    picture: torch.Tensor
    difference: torch.Tensor
    k: float
    region: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Encoded:
    """A frame after the encoders.

    frame              what it was made from
    sharp, difference  (mean, std) [4, h/8, w/8] float32 of the unscaled latents
    residuals          what entered the encoder's down blocks but the first, each [C, h_i, w_i], for the decoder
    clip               [D] CLIP embedding
    """

    frame: Frame
    sharp: tuple[torch.Tensor, torch.Tensor]
    difference: tuple[torch.Tensor, torch.Tensor]
    residuals: list[torch.Tensor]
    clip: torch.Tensor


class AnyToBokeh:
    """The four networks and what they do.

    unet, encoder, decoder, image_encoder  objects with network, device, dtype (see checkpoint.load)
    visual  the UNet has kept its visual tokens and uses them, with the masks that seem intended. An experiment
    """

    def __init__(self, unet, encoder, decoder, image_encoder, visual: bool = False):
        self.unet, self.encoder, self.decoder, self.image_encoder, self.visual = unet, encoder, decoder, image_encoder, visual

    def encode(self, frame: Frame, fidelity: Fidelity = BEST) -> Encoded:
        """Everything that depends on one frame alone; in float32, as the encoder computes."""
        from .image_encoder import prepare

        encoder = self.encoder
        difference = frame.difference.expand(3, -1, -1)
        images = [one[None].to(encoder.device, encoder.dtype).contiguous() for one in (frame.picture, difference)]
        mean, std, residuals = encoder.network(images[0])
        mean_d, std_d, _ = encoder.network(images[1])
        looked_at = self.image_encoder
        prepared = prepare(images[0], looked_at.network.size, fidelity.normalised_clip)
        return Encoded(
            frame,
            (mean[0].float(), std[0].float()),
            (mean_d[0].float(), std_d[0].float()),
            [one[0].to(self.decoder.dtype) for one in residuals],
            looked_at.network(prepared.to(looked_at.device, looked_at.dtype))[0],
        )

    def denoise(
        self,
        first: int,
        parts: list[list[Encoded]],
        fidelity: Fidelity = BEST,
        noise: Noise | None = None,
        *,
        masked_out: bool = False,
    ) -> list[torch.Tensor]:
        """The scaled latents with bokeh [frames, 4, h/8, w/8] float32 of each segment; `first` is the number of the first one.

        masked_out  visual tokens take part behind a mask of zeros, as in the release; the result is the same without them
        """

        def latents(name):
            pairs = [[getattr(item, name) for item in part] for part in parts]
            return tuple(torch.stack([torch.stack([item[i] for item in part]) for part in pairs]) for i in (0, 1))

        (sharp, sharp_std), (difference, difference_std) = latents("sharp"), latents("difference")
        if noise is not None:
            drawn, drawn_d = noise(first, tuple(sharp.shape))
            sharp, difference = sharp + sharp_std * drawn.to(sharp), difference + difference_std * drawn_d.to(sharp)
        unet = self.unet
        k = torch.tensor([[item.frame.k for item in part] for part in parts], device=unet.device)
        clip = torch.stack([torch.stack([item.clip for item in part]) for part in parts])
        region = None
        if masked_out:
            region = torch.full((len(parts), len(parts[0]), *parts[0][0].frame.difference.shape), ZERO_MASK, device=unet.device)
        elif self.visual:
            region = torch.stack([torch.stack([item.frame.region for item in part]) for part in parts]).to(unet.device)

        def predict(which: slice):
            return unet.network(
                (sharp[which] * preparation.SCALE).to(unet.device, unet.dtype),
                (difference[which] * preparation.SCALE).to(unet.device, unet.dtype),
                clip[which].flatten(0, 1).to(unet.device),
                k[which],
                region=None if region is None else region[which],
                k_table=fidelity.k_table,
                released_order=fidelity.paired,
            ).float()

        batches = [slice(0, len(parts))] if fidelity.paired else [slice(i, i + 1) for i in range(len(parts))]
        return [one for which in batches for one in predict(which)]

    def decode(self, window: segments.Window, chunk: int) -> torch.Tensor:
        """[kept, 3, h, w] float32 in about -1..1. chunk: frames decoded together; fewer than the window holds change the picture a
        little, because neighbours across the border are missed.
        """
        decoder, places = self.decoder, range(len(window.items))[window.keep]
        decoded = []
        for start in range(0, len(window.items), chunk):
            here = range(start, min(start + chunk, len(window.items)))
            if here.stop <= places.start or here.start >= places.stop:
                continue
            items = window.items[start : here.stop]
            residuals = [torch.stack([self._first_residual(item) for item in items])]
            residuals += [torch.stack(level) for level in zip(*(item.residuals for item in items), strict=True)]
            frames = decoder.network(window.latents[start : here.stop].to(decoder.device, decoder.dtype), residuals).float()
            decoded.append(frames[max(places.start - start, 0) : places.stop - start])
        return torch.cat(decoded)

    def _first_residual(self, item: Encoded) -> torch.Tensor:
        picture = item.frame.picture[None].to(self.encoder.device, self.encoder.dtype).contiguous()
        return self.encoder.network.first_residual(picture)[0].to(self.decoder.dtype)

    def activation_bytes(self, height: int, width: int) -> int:
        """Bytes to work in at this working size, beside the weights: the decoder with a whole window, which needs the most, and what is
        kept of the frames of three halves. In numbers per pixel and frame, counted; a test holds them to it.
        """
        decoding, kept = 2 * segments.HALF * 1350, 3 * segments.HALF * 65
        return (decoding + kept) * height * width * self.decoder.dtype.itemsize


def grey(last: Encoded, model: AnyToBokeh, fidelity: Fidelity) -> Encoded:
    """The published filling: a frame of zeros with K 0."""
    frame = last.frame
    region = None if frame.region is None else torch.zeros_like(frame.region)
    return model.encode(Frame(torch.zeros_like(frame.picture), torch.zeros_like(frame.difference), 0.0, region), fidelity)


def seeded(seed: int, shot: int = 0) -> Noise:
    """Standard normal draws for a pair of segments: for the pictures, then for the differences. The same for the same seed and pair."""

    def draw(first: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + shot * 1009 + first) % 2**63)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    return draw


# A shot, in two forms


def whole_shot(
    model: AnyToBokeh,
    frames: list[Frame],
    fidelity: Fidelity = BEST,
    *,
    noise: Noise | None = None,
    half: int = segments.HALF,
    visual_tokens: bool = False,
) -> torch.Tensor:
    """[frames, 3, h, w] in about -1..1: the published schedule, as it reads, with everything in memory. The judge of `stream_shot`.

    Every segment encodes its own frames. visual_tokens: they take part, behind a mask of zeros, as in the release (needs a UNet that
    has kept them).
    """
    places, predicted, known = segments.segment_frames(len(frames), half), [], {}
    for first in range(0, len(places), segments.PAIR):
        parts = []
        for row in places[first : first + segments.PAIR].tolist():
            part = [model.encode(frames[place], fidelity) for place in row if place >= 0]
            known |= {place: item for place, item in zip(row, part, strict=False)}
            filler = (grey(part[-1], model, fidelity) if fidelity.grey_end else part[-1]) if len(part) < 2 * half else None
            parts.append(part + [filler] * (2 * half - len(part)))
        predicted += model.denoise(first, parts, fidelity, noise, masked_out=visual_tokens)
        last = parts[-1]
    predicted = torch.stack(predicted)
    blended = segments.blend(predicted, len(frames))
    pictures = []
    for start, keep, mixed in segments.decode_windows(len(frames), half):
        if mixed:
            missing = max(start + 2 * half - len(frames), 0)
            latents = torch.cat([blended[start : start + 2 * half], predicted[-1][2 * half - missing :]])
            items = [known[place] for place in range(start, start + 2 * half - missing)] + last[2 * half - missing :]
        else:
            latents, items = predicted[-1], last
        pictures.append(model.decode(segments.Window(items, latents, keep), 2 * half))
    return torch.cat(pictures)


@dataclass(frozen=True, eq=False)
class Piece:
    """Finished frames, in order.

    frames     [n, 3, H, W]
    done       frames finished with these, of the clip
    resumable  a later run can go on after these, given `done` and `carry`
    carry      what it goes on from; None at the end of a shot
    """

    frames: torch.Tensor
    done: int
    resumable: bool = False
    carry: torch.Tensor | None = None


def stream_shot(
    model: AnyToBokeh,
    frames: Iterable[Frame],
    count: int,
    fidelity: Fidelity = BEST,
    *,
    noise: Noise | None = None,
    half: int = segments.HALF,
    start: int = 0,
    carry: torch.Tensor | None = None,
    step: Callable[[float], None] = lambda amount: None,
    shrinking: Callable = at_once,
    on_prediction: Callable[[list[torch.Tensor]], Any] = lambda latents: None,
) -> Iterator[Piece]:
    """The same as `whole_shot` with every frame encoded once and the frames of three halves in memory; -1..1.

    frames         from frame `start` on
    start, carry   go on after a resumable piece
    step           step(amount) after each piece of work; amounts sum to the number of frames
    shrinking      shrinking(work, size): work(size), with a smaller size when memory runs out; size is frames decoded together
    on_prediction  is shown the UNet's latents of each pair
    """
    share = count / segments.segment_count(count, half)

    def encoded() -> Iterator[Encoded]:
        for frame in frames:
            item = model.encode(frame, fidelity)
            step(0.35)
            yield item

    def denoise(first: int, parts: list[list[Encoded]]) -> list[torch.Tensor]:
        latents = model.denoise(first, parts, fidelity, noise)
        step(0.35 * share * len(parts))
        on_prediction(latents)
        return latents

    fill = (lambda last: grey(last, model, fidelity)) if fidelity.grey_end else (lambda last: last)
    chunk, done = 2 * half, start
    for window in segments.stream(encoded(), count, denoise, fill=fill, half=half, start=start, carry=carry):

        def decode(size: int, window: segments.Window = window) -> torch.Tensor:
            nonlocal chunk
            chunk = size  # what fits once is tried first the next time
            return model.decode(window, size)

        pictures = shrinking(decode, chunk)
        done += len(pictures)
        step(0.3 * len(pictures))
        yield Piece(pictures, done, window.carry is not None or done == count, window.carry)


# A clip


def prepared(
    pictures: Iterable[torch.Tensor],
    disparities: Iterable[torch.Tensor],
    focus: torch.Tensor,
    k: torch.Tensor,
    *,
    range_: tuple[float, float],
    size: tuple[int, int],
    fidelity: Fidelity = BEST,
    regions: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Frame]:
    """Frames at the working size (SPEC section 2.2), from pictures [3, H, W] 0..1 and disparities [H, W] in one unit.

    focus, k  [frames] disparity in focus, and px of radius in the picture per unit of disparity
    range_    disparities that become 0 and 1
    regions   make the region maps too
    Raises BokehError for a picture with NaN or infinite values.
    """
    (low, high), width = range_, size[1]
    for picture, disparity, f, strength in zip(pictures, disparities, focus.tolist(), k.tolist(), strict=True):
        if not bool(picture.isfinite().all()):
            raise BokehError("A frame of the clip holds values that are not numbers (NaN or infinite); repair it before rendering.")
        published = any_to_bokeh_k(strength, picture.shape[-1]) * (high - low)
        if not fidelity.fixed_size:
            published *= width / preparation.PUBLISHED_SIZE[1]  # radius in px of the picture the network works on
        scaled = ((disparity.to(device).float() - low) / (high - low))[None]
        at = torch.tensor([(f - low) / (high - low)])
        difference = preparation.disparity_difference(scaled, at)[0]
        if not fidelity.any_k:
            published, difference = preparation.trained_k(published, difference)
        elif published > preparation.LARGEST_K:
            raise BokehError(
                f"The blur strength makes K {published:.0f}, more than the {preparation.LARGEST_K} the network can be told "
                "(it learnt up to 32); lower the strength."
            )
        region = preparation.resize_regions(mpi.regions(scaled, at)[0], size) if regions else None
        image = preparation.resize(picture.to(device).float().clamp(0.0, 1.0), size)
        yield Frame(image * 2 - 1, preparation.resize(difference, size) * 2 - 1, published, region)


def render_clip(
    model: AnyToBokeh,
    pictures: Iterable[torch.Tensor],
    disparities: Iterable[torch.Tensor],
    focus: torch.Tensor,
    k: torch.Tensor,
    *,
    size: tuple[int, int],
    span: tuple[float, float] = (0.0, 1.0),
    fidelity: Fidelity = BEST,
    resolution: int = preparation.PUBLISHED_SIZE[1],
    seed: int = 0,
    shots: tuple[int, ...] = (0,),
    start: int = 0,
    carry: torch.Tensor | None = None,
    progress: Progress = None,
    shrinking: Callable = at_once,
) -> Iterator[Piece]:
    """Depth of field for a clip of any length; at most three half segments (12 frames) are held.

    pictures     [3, H, W] display-encoded 0..1, one for each frame of the whole clip
    disparities  [H, W] larger = nearer, one for each frame
    focus, k     [frames] disparity in focus, and px of radius per unit of disparity; k 0 in every frame gives the pictures back
    size         (H, W) of the pictures; results have the same
    span         (farthest, nearest) disparity of the whole clip, see optics.defocus.clip_span
    resolution   width in px, at 16:9, of what the network works on; it was trained at 1024
    seed         of the sampled latents, where the fidelity samples
    shots        numbers of the frames that begin a new shot; segments never run across
    start, carry go on after a resumable Piece of an earlier run with the same arguments
    progress     progress(frames done, frames), with fractions; may raise to interrupt
    shrinking    see stream_shot
    Raises BokehError when there are fewer pictures than focus values, or shots make no sense.
    """
    count = len(focus)
    shots = (0,) if fidelity.across_cuts else tuple(sorted({0, *shots}))
    if shots[-1] >= count or shots[0] < 0:
        raise BokehError(f"A shot begins at frame {shots[-1]} of a clip of {count} frames; count frames from 0.")
    if not bool((k != 0).any()):
        for done, picture in enumerate(itertools.islice(pictures, start, count), start=start + 1):
            if progress:
                progress(done, count)
            yield Piece(picture[None], done, True)
        return
    working = preparation.PUBLISHED_SIZE if fidelity.fixed_size else preparation.working_size(*size, resolution)
    frames = prepared(
        itertools.islice(pictures, start, None),
        itertools.islice(disparities, start, None),
        focus[start:],
        k[start:],
        range_=clip_range(span, focus),
        size=working,
        fidelity=fidelity,
        regions=model.visual,
        device=model.encoder.device,
    )
    worked = float(start)

    def step(amount: float) -> None:
        nonlocal worked
        worked = min(worked + amount, count)
        if progress:
            progress(worked, count)

    for first, end in itertools.pairwise((*shots, count)):
        if end <= start:
            continue
        within = max(start - first, 0)
        pieces = stream_shot(
            model,
            itertools.islice(frames, end - first - within),
            end - first,
            fidelity,
            noise=seeded(seed, first) if fidelity.sampled else None,
            start=within,
            carry=carry if within else None,
            step=step,
            shrinking=shrinking,
        )
        for piece in pieces:
            finished = preparation.restore((piece.frames / 2 + 0.5).clamp(0.0, 1.0), size)
            yield Piece(finished, first + piece.done, piece.resumable, piece.carry)


def render(
    model: AnyToBokeh,
    image: torch.Tensor,
    defocus: Defocus,
    *,
    fidelity: Fidelity = BEST,
    resolution: int = preparation.PUBLISHED_SIZE[1],
    seed: int = 0,
    shots: tuple[int, ...] = (0,),
    progress: Progress = None,
    shrinking: Callable = at_once,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A batch of frames in memory: image [B, 3, H, W] 0..1 and its Defocus; one picture serves a Defocus of many frames and the reverse.

    out  [frames, 3, H, W] to write to; default: a new tensor on the image's device. Other arguments as in render_clip.
    Raises BokehError for shapes that do not match.
    """
    check_pictures(image, defocus, "clip")
    (given, _, *size), maps = image.shape, len(defocus.focus)
    if given != maps and 1 not in (given, maps):
        raise BokehError(f"The clip has {given} frames and the defocus {maps}; the counts must be equal, or one of them 1.")
    count = max(given, maps)
    if out is None:
        out = image.new_empty(count, 3, *size)
    pieces = render_clip(
        model,
        image.expand(count, -1, -1, -1),
        defocus.disparity.expand(count, -1, -1),
        defocus.focus.expand(count),
        defocus.k.expand(count),
        size=tuple(size),
        span=clip_span(defocus.disparity),
        fidelity=fidelity,
        resolution=resolution,
        seed=seed,
        shots=shots,
        progress=progress,
        shrinking=shrinking,
    )
    for piece in pieces:
        out[piece.done - len(piece.frames) : piece.done] = piece.frames
    return out
