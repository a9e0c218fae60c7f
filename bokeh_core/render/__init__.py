"""The physical renderer: no weights, any torch device, linear light."""

from collections.abc import Callable

import torch

from ..errors import BokehError
from ..optics.defocus import Defocus
from .layering import build_scene, harden_edges, thresholds
from .light import to_display, to_linear
from .scatter import scatter
from .scene import Scene

QUALITIES = ("fast",)

Progress = Callable[[int, int], None]


def _slope(signed: torch.Tensor) -> torch.Tensor:
    """Gradient of the blur radius |s| for scatter: [H, W] signed defocus px -> [2, H, W]. The smaller one-sided difference, so that steps give 0."""

    def along(dim: int) -> torch.Tensor:
        step = signed.diff(dim=dim)
        ahead = torch.cat([step, step.narrow(dim, step.shape[dim] - 1, 1)], dim) if step.shape[dim] else torch.zeros_like(signed)
        back = torch.cat([step.narrow(dim, 0, 1), step], dim) if step.shape[dim] else torch.zeros_like(signed)
        return torch.where(ahead * back > 0, torch.where(ahead.abs() < back.abs(), ahead, back), 0)

    return torch.stack([along(1), along(0)]).clamp(-0.5, 0.5) * signed.sign()


def composite(scene: Scene, k: float, focus: float, check: Callable[[], None] | None = None) -> torch.Tensor:
    """FAST: scatter each layer by its own defocus, then compose back to front with "over" (RENDERERS.md, section 1).

    Each layer is divided by the scatter of a plane of ones of the same layer, so uneven radii neither brighten nor darken it.
    Returns [3, H, W] linear light.
    """
    out = sharp = None
    for layer in scene.layers:
        signed = k * (layer.disparity - focus)
        radius, slope = signed.abs(), _slope(signed)
        if out is None:  # the farthest layer covers everything
            blurred = scatter(torch.cat([layer.color, torch.ones_like(radius)[None]]), radius, slope, check)
            out, sharp = blurred[:3] / blurred[3:].clamp_min(1e-6), layer.color
            continue
        color, alpha = layer.color * layer.alpha, layer.alpha
        if scene.estimated:
            # A guessed rim in focus shows the background through itself. Believe that only as far as blurring that background matters.
            change = (out.clamp_min(0).sqrt() - sharp.clamp_min(0).sqrt()).square().mean(0)
            doubt = torch.where(radius < 1, RIM_DOUBT**2 / (change + RIM_DOUBT**2), 0)
            opaque = alpha + (1 - alpha) * doubt * (alpha >= 0.5)
            color = color + (opaque - alpha) * sharp
            alpha = opaque
        sharp = color + (1 - alpha) * sharp
        blurred = scatter(torch.cat([color, alpha[None], torch.ones_like(alpha)[None]]), radius, slope, check)
        blurred = blurred[:4] / blurred[4:].clamp_min(1e-6)
        out = out * (1 - blurred[3:]) + blurred[:3]
    return out


RIM_DOUBT = 0.3  # square-root light; below this change a guessed rim stays as it was


def shot_cuts(disparity: torch.Tensor, k: float) -> list[float]:
    """Layer thresholds for a whole shot: measured on frames of it, [S, H, W], with its largest k. Pass them to `render` chunk by chunk."""
    if k == 0:
        return []
    return thresholds(torch.stack([harden_edges(d, k) for d in disparity]), k)


def render(
    image: torch.Tensor,
    defocus: Defocus,
    *,
    linear: bool = False,
    quality: str = "fast",
    cuts: list[float] | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Render depth of field into a batch of pictures.

    image     [B, 3, H, W] float, display-encoded sRGB, or linear light when `linear`; values above 1 are light and survive
    defocus   disparity [B, H, W], focus [B], k [B] (a Defocus of one frame serves a batch, one picture serves a Defocus of many frames)
    quality   one of QUALITIES
    cuts      layer thresholds shared by a whole shot (see shot_cuts); measured on this batch when not given
    progress  called as progress(done, total) after each tile of work; may raise to interrupt
    device    where to compute, one frame at a time; None = where the image is
    out       [B, 3, H, W] tensor to write the result to; None = a new one like the image

    Returns `out`. A frame with k = 0 is returned bit for bit. The image is never modified.
    Errors: BokehError for an unknown quality, shapes that do not match, values that are not numbers.
    """
    if quality not in QUALITIES:
        raise BokehError(f"Unknown quality '{quality}'. Use one of: {', '.join(QUALITIES)}.")
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise BokehError(f"The picture has shape {list(image.shape)}; expected [frames, 3, height, width] with no zero size.")
    pictures, _, height, width = image.shape
    if tuple(defocus.disparity.shape[1:]) != (height, width):
        size = "x".join(str(n) for n in defocus.disparity.shape[:0:-1])
        raise BokehError(f"The defocus is {size} px but the picture is {width}x{height} px. Make the defocus from this picture.")
    maps = defocus.disparity.shape[0]
    if pictures != maps and 1 not in (pictures, maps):
        raise BokehError(f"{pictures} pictures but {maps} depth maps. Give one depth map, or one for each picture.")

    frames = max(pictures, maps)
    device = torch.device(device) if device is not None else image.device
    focus, k = ([float(v) for v in t] for t in (defocus.focus, defocus.k))
    if cuts is None:
        sample = torch.linspace(0, maps - 1, min(maps, 8)).long().unique()
        cuts = shot_cuts(defocus.disparity[sample].to(device, torch.float32), max(abs(v) for v in k))
    if out is None:
        out = image.new_empty(frames, 3, height, width)
    for i in range(frames):
        picture, j = image[i if pictures > 1 else 0], i if maps > 1 else 0
        if k[j] == 0:
            out[i] = picture
        else:
            light = picture.to(device, torch.float32)
            light = light if linear else to_linear(light)
            if not bool(light.isfinite().all()):
                raise BokehError(f"Picture {i} holds values that are not numbers (NaN or infinite). Repair it before rendering.")
            check = (lambda: progress(i, frames)) if progress else None  # noqa: B023 - called within this turn of the loop
            disparity = harden_edges(defocus.disparity[j].to(device, torch.float32), k[j])
            result = composite(build_scene(light, disparity, cuts, k[j]), k[j], focus[j], check)
            out[i] = result if linear else to_display(result)
        if progress:
            progress(i + 1, frames)
    return out
