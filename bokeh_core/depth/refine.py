"""Better depth from a bokeh stack: pictures to features, features and K to depth. Re-using features makes other K cheap."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import BokehError
from ..optics.stack import BokehStack
from . import estimate, unidepth
from .checkpoint import DepthModel, DepthModelInfo
from .dsfa import fuse
from .preprocessing import RESOLUTION, network_input, network_size, to_size
from .unidepth import BEST, Fit, Quirks, UniDepthConfig

Progress = Callable[[float, int], None]
GIVEN, NONE = "as given", "none"
K_MODES = (GIVEN, NONE)


@dataclass(frozen=True, eq=False)
class Features:
    """What the transformer says of a stack. It does not depend on K.

    taps   of the reference, [1, 1 + P, D] each
    stack  by tap, [1, N, P, D] patches of the blurred pictures; only at the taps that DSFA rewrites
    size   (H, W) of the reference
    fit    UniDepthV2: how pictures were brought to the network's size; else None
    """

    taps: list[torch.Tensor]
    stack: dict[int, torch.Tensor]
    size: tuple[int, int]
    network: tuple[int, int]
    fit: Fit | None
    quirks: Quirks

    def to(self, device: torch.device) -> "Features":
        """The same elsewhere."""
        taps, stack = [tap.to(device) for tap in self.taps], {tap: some.to(device) for tap, some in self.stack.items()}
        return Features(taps, stack, self.size, self.network, self.fit, self.quirks)


@dataclass(frozen=True, eq=False)
class Refined:
    """Depth of the reference picture; the rest only from UniDepthV2.

    depth       [H, W] metres along the optical axis
    error       [H, W]; its logarithm was trained to be the absolute error of the depth: more is worse
    intrinsics  [3, 3] px of the camera that was used: the given one, else the estimated one
    estimated   [3, 3] px of the estimated camera, which the published code returns even where one was given
    radius      [H, W] metres along the ray
    rays        [3, H, W] unit directions
    """

    depth: torch.Tensor
    error: torch.Tensor | None = None
    intrinsics: torch.Tensor | None = None
    estimated: torch.Tensor | None = None
    radius: torch.Tensor | None = None
    rays: torch.Tensor | None = None

    @property
    def confidence(self) -> torch.Tensor:
        """[H, W] 0..1, 1 = sure: e to the minus expected error; 1 everywhere where the model says nothing."""
        return torch.ones_like(self.depth) if self.error is None else self.error.reciprocal().clamp(0, 1)


def require_dsfa(info: DepthModelInfo) -> None:
    """Raises BokehError for a model that cannot use a stack."""
    if getattr(info.config, "dsfa", None) is None:
        raise BokehError(
            f"{info.title} cannot use a bokeh stack; expected a model with DSFA (DAV2_dsfa_release.pth or UDv2_dsfa_release.pth). "
            "For plain depth use Estimate Depth."
        )


def refine(
    model: DepthModel,
    stack: BokehStack,
    *,
    k: str = GIVEN,
    camera: torch.Tensor | None = None,
    resolution: int = RESOLUTION,
    quirks: Quirks = BEST,
    upsample: estimate.Upsample | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Metric depth of a stack's reference, refined by its frames.

    k           GIVEN: the stack's values, raw, as in the published pipeline. NONE: zeros. With raw values of 10 and more the frames
                hardly count (SPEC section 3.1), and UniDepthV2's release was probably trained with zeros (5.6)
    camera      [3, 3] px of the reference picture; None = estimated (UniDepthV2; Depth Anything needs none)
    resolution  px of the network's shorter side; UniDepthV2: its bounds of 200 000 to 600 000 px grow with the square of it
    quirks      of UniDepthV2
    upsample    of the depth, as for `estimate.depth_maps`; None = bilinear, as published
    Raises BokehError for a model without DSFA.
    """
    require_dsfa(model.info)
    stack = stack.fitted(*stack.reference.shape[-2:])
    features = encode(model, stack.reference, stack.frames, resolution=resolution, quirks=quirks, progress=progress)
    return decode(model, features, strengths(stack, k), camera=camera, upsample=upsample, image=stack.reference, progress=progress)


def strengths(stack: BokehStack, k: str = GIVEN) -> torch.Tensor:
    """[N] float32 what the network is told of the strengths. Raises BokehError for an unknown word."""
    if k not in K_MODES:
        raise BokehError(f"K is '{k}'; expected one of {', '.join(K_MODES)}.")
    return stack.k.float() if k == GIVEN else torch.zeros(len(stack.k))


def digest(stack: BokehStack, *settings) -> str:
    """A word for the pictures of a stack and whatever else `encode` is given: equal words, equal features."""
    word = hashlib.blake2b(repr((settings, stack.reference.shape, stack.frames.shape)).encode(), digest_size=16)
    for pictures in (stack.reference, stack.frames):
        word.update(pictures.detach().float().cpu().contiguous().numpy())
    return word.hexdigest()


@torch.no_grad()
def encode(
    model: DepthModel,
    reference: torch.Tensor,  # [3, H, W] display-encoded 0..1
    frames: Sequence[torch.Tensor] | torch.Tensor,  # N of the same shape; none = plain depth
    *,
    resolution: int = RESOLUTION,
    quirks: Quirks = BEST,
    pixels: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Features:
    """The features of a reference and its blurred pictures, one picture after another. Of N pictures only what DSFA needs is kept.

    pixels  UniDepthV2: bounds of the number of pixels, instead of the resolution
    Raises BokehError when the pictures differ in size.
    """
    size = tuple(reference.shape[-2:])
    if any(frame.shape != reference.shape for frame in frames):
        found = sorted({tuple(frame.shape[-2:]) for frame in frames})
        raise BokehError(f"The reference is {size[1]}x{size[0]} px and its frames (height, width) {found}; expected one size.")
    config, fit = model.info.config, None
    if isinstance(config, UniDepthConfig):
        fit = unidepth.fit(*size, config, quirks, pixels or unidepth.bounds(config, resolution))
        network = fit.network

        def prepare(image):
            return unidepth.network_input(image, fit, quirks)
    else:
        network = network_size(*size, resolution)

        def prepare(image):
            return network_input(image, network)

    blocks, taps, kept = model.network.blocks, None, {}
    for i, picture in enumerate([reference, *frames]):
        found = model.network.encode(prepare(picture[None].to(model.device)).to(model.dtype))
        if taps is None:
            taps = found
        for tap in blocks if i else ():
            if tap not in kept:
                kept[tap] = found[tap].new_empty(1, len(frames), *found[tap][0, 1:].shape)
            kept[tap][:, i - 1] = found[tap][:, 1:]
        del found  # before the next picture needs the room
        if progress:
            progress(i + 1, len(frames) + 2)
    return Features(taps, kept, size, network, fit, quirks)


@torch.no_grad()
def decode(
    model: DepthModel,
    features: Features,
    k: torch.Tensor | None = None,
    *,
    camera: torch.Tensor | None = None,
    upsample: estimate.Upsample | None = None,
    image: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Depth from features.

    k       [N] raw strengths; None as published: Depth Anything then leaves the stack out, UniDepthV2 takes zeros
    camera  [3, 3] px of the reference picture, for UniDepthV2; None = the estimated one (or what the quirks say)
    upsample, image  bring the depth to the size of the reference picture `image` [3, H, W]; None = bilinear, as published
    """
    network, features = model.network, features.to(model.device)
    uni, count = features.fit is not None, max((some.shape[1] for some in features.stack.values()), default=0)
    if k is not None and len(k) != count:
        raise BokehError(f"There are {count} blurred pictures and {len(k)} values of K; expected one K for each picture.")
    taps = list(features.taps)
    if count and (uni or k is not None):

        def tick(done):
            if progress:
                progress(count + 1 + done / (len(network.blocks) + 1), count + 2)

        taps = fuse(network.blocks, taps, features.stack, None if k is None else k[None], tick)
    if uni:
        low, refined = _decode_unidepth(network, taps, features, camera)
    else:
        low = network.depth(taps, features.network)
        refined = Refined(to_size(low, features.size)[0])
    if upsample:
        refined = replace(refined, depth=upsample(low, image[None].to(low.device))[0])
    if progress:
        progress(count + 2, count + 2)
    return refined


def _decode_unidepth(network, taps, features: Features, camera) -> tuple[torch.Tensor, Refined]:
    """The picture's part of the network's own map [1, h, w], and everything at the picture's size."""
    fit, quirks = features.fit, features.quirks
    if camera is None and quirks.made_up_camera:
        camera = unidepth.made_up_camera(*features.size)
    inside = None if camera is None else unidepth.network_camera(camera.to(taps[0].device), fit, quirks)
    low = network.decode(taps, fit.network, inside, quirks)
    found = unidepth.to_picture(low, fit, quirks)
    used = found.intrinsics if camera is None else camera.reshape(-1, 3, 3).float().to(found.intrinsics)
    return fit.inside(low.depth), Refined(found.depth[0], found.error[0], used[0], found.intrinsics[0], found.radius[0], found.rays[0])


def activation_bytes(info: DepthModelInfo, height: int, width: int, frames: int, resolution: int = RESOLUTION, itemsize: int = 4) -> int:
    """Bytes that `refine` needs beside the weights, at most, for a stack of `frames` pictures of height x width px.

    What one picture needs, or DSFA's focus step over all of them: six times their tokens; beside the features that are kept.
    """
    config = info.config
    patch, taps, rewritten = config.vit.patch, len(config.vit.taps), len(config.dsfa.taps)
    if isinstance(config, UniDepthConfig):
        network = unidepth.fit(height, width, config, pixels=unidepth.bounds(config, resolution)).network
        alone = unidepth.activation_bytes(config, network[0] // patch * (network[1] // patch), 1, itemsize)
    else:
        network = network_size(height, width, resolution)
        alone = estimate.activation_bytes(info, height, width, 1, False, resolution, itemsize)
    tokens = itemsize * config.vit.width * (network[0] // patch) * (network[1] // patch)
    fusion = (taps + 6 * (frames + 1) + 2) * tokens
    return max(alone, fusion) + (frames + 1) * rewritten * tokens + 4 * 24 * height * width
