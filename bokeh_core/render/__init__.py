"""The physical renderer: no weights, any torch device, linear light."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import BokehError
from ..filters import ROWS_PIXELS, box_max, box_min
from ..optics.defocus import Defocus
from ..optics.lens import Aperture, Lens
from .aperture import colour_groups, kernel, magnify
from .layering import SNAP_WINDOW, bands, believed_band, build_scene, harden_edges, regrow, snap_to_colors, thresholds
from .light import recover_highlights, to_display, to_linear
from .rays import trace
from .scatter import reached, scatter, scatter_moments
from .scene import Layer, Scene, View, whole
from .windows import SETTLED, Overview, Rim, Window, margin, plan, step, thin

QUALITIES = ("fast", "reference")

Progress = Callable[[float, int], None]
Report = Callable[[float], None]  # the finished share of one frame, 0..1; may raise to interrupt


def _slope(signed: torch.Tensor) -> torch.Tensor:
    """Gradient of the blur radius |s| for scatter: [H, W] signed defocus px -> [2, H, W].

    The smaller one-sided difference, so that steps give 0.
    """

    def along(dim: int) -> torch.Tensor:
        step = signed.diff(dim=dim)
        ahead = torch.cat([step, step.narrow(dim, step.shape[dim] - 1, 1)], dim) if step.shape[dim] else torch.zeros_like(signed)
        back = torch.cat([step.narrow(dim, 0, 1), step], dim) if step.shape[dim] else torch.zeros_like(signed)
        return torch.where(ahead * back > 0, torch.where(ahead.abs() < back.abs(), ahead, back), 0)

    return torch.stack([along(1), along(0)]).clamp(-0.5, 0.5) * signed.sign()


def composite(
    scene: Scene, k: float, focus: float, report: Report | None = None, aperture: Aperture | None = None, view: View | None = None
) -> torch.Tensor:
    """FAST: scatter each layer by its own defocus, then compose back to front with "over" (RENDERERS.md, section 1).

    Each layer is divided by the scatter of a plane of ones of the same layer, so uneven radii neither brighten nor darken it.
    Colours that the aperture parts (chromatic_*) are rendered each with its own radii. `view` is the part of the frame that the scene is;
    None = all of it. Returns [3, H, W] linear light.
    """
    aperture = aperture or Aperture()
    axis = (view or whole(*scene.layers[0].alpha.shape)).axis
    groups = colour_groups(aperture)
    parts = []
    for n, (channels, axial, magnification) in enumerate(groups):

        def share(done: float, n: int = n) -> None:
            if report is not None:
                report((n + done) / len(groups))

        parts.append(magnify(_composite(scene, channels, k, focus, axial, aperture, share, view), magnification, axis))
    return torch.cat(parts)


def _composite(
    scene: Scene, channels: slice, k: float, focus: float, axial: float, aperture: Aperture, report: Report, view: View | None
) -> torch.Tensor:
    """The channels [C, H, W] of `composite` whose radii are 1 + axial times larger in front of focus, 1 - axial times behind."""

    def defocus(layer: Layer) -> torch.Tensor:
        signed = (layer.disparity - focus).mul_(k)
        return signed.mul_(1 + axial * signed.sign()) if axial else signed

    wanted = _correlated(scene, defocus)
    spread = sum(kernel(aperture).variance) / 2  # E[a_x^2] over the aperture
    out = sharp = moments = None  # mean over the aperture, the picture in focus, and E[(v - out) a] of what lies behind the next layer
    for n, layer in enumerate(scene.layers):

        def check(n: int = n) -> None:
            report(n / len(scene.layers))

        signed, color, alpha = defocus(layer), layer.color[channels], layer.alpha[None]
        if n == 0:  # the farthest layer covers everything
            alpha = torch.ones_like(alpha)
        elif scene.estimated:
            # A guessed rim in focus shows the background through itself. Believe that only as far as blurring that background matters.
            change = (out.clamp_min(0).sqrt() - sharp.clamp_min(0).sqrt()).square().mean(0)
            doubt = torch.where(signed.abs() < 1, RIM_DOUBT**2 / (change + RIM_DOUBT**2), 0)
            opaque = alpha + (1 - alpha) * doubt * (alpha >= 0.5)
            color = color + (opaque - alpha) / opaque.clamp_min(1e-3) * (sharp - color)
            alpha = opaque
            del change, doubt, opaque
        color = color * alpha
        sharp = color if n == 0 else (1 - alpha).mul(sharp).add_(color)

        planes = torch.cat([color, alpha, torch.ones_like(alpha)]) if n else torch.cat([color, alpha])
        lit = alpha[0] > 0 if n else None
        del color, alpha
        mean = scatter(planes, signed, _slope(signed), check, aperture=aperture, lit=lit, view=view)
        mass = mean[-1:].clamp_min(1e-6)
        mean = mean[:-1].div_(mass)
        last = n > 0 and n + 1 == len(scene.layers)  # nothing in front: only what it covers matters
        own = None
        if wanted[n] is not None:
            planes = planes[-2:].clone() if last else planes
            own = scatter_moments(planes, signed, wanted[n], check, aperture=aperture, view=view)
            across = own[:, -1:].clone()
            own = own[:, :-1].addcmul_(mean[-1:] if last else mean, across, value=-1).div_(mass)
            del across
        del planes, signed, lit, mass
        if n == 0:
            out, moments = mean, own
            continue
        light, cover = mean[:-1], mean[-1:]
        visible = out * (1 - cover)
        if own is not None and moments is not None:
            # Where the aperture looks past the front layer it sees another part of what lies behind than on average.
            visible -= (own[:, -1:] * moments).sum(0).div_(spread)
        if own is not None:
            visible.clamp_min_(0)
        moments = None if moments is None or last else moments * (1 - cover)
        if own is not None and not last:
            moments = (0 if moments is None else moments) - own[:, -1:] * out + own[:, :-1]
        out = visible.add_(light)
        del mean, light, cover, visible, own  # pictures are large, and memory is what users run out of
    return out


def _correlated(scene: Scene, defocus: Callable[[Layer], torch.Tensor]) -> list[torch.Tensor | None]:
    """For each layer the blocks where its own edge, or that of a layer in front of it, is blurred: where moments matter. None = nowhere."""
    wanted: list[torch.Tensor | None] = []
    blocks = None
    for n in range(len(scene.layers) - 1, -1, -1):
        if n > 0:
            alpha = scene.layers[n].alpha
            edge = (box_max(alpha, 1) - alpha > 0.01) | (alpha - box_min(alpha, 1) > 0.01)
            radius = defocus(scene.layers[n])
            edge &= radius.abs() > BLURRED
            if bool(edge.any()):
                here = reached(edge, radius)
                blocks = here if blocks is None else blocks | here
        wanted.insert(0, blocks)
    return wanted


BLURRED = 0.75  # px; below this a layer's edge blocks no part of the aperture that matters
UNTOUCHED = 1e-5  # linear light; at black a thirtieth of an 8-bit step
BRIGHTEST, WIDEST = 1e12, 1e9  # linear light, px of blur radius: what arithmetic in float32 bears
RIM_DOUBT = 0.3  # square-root light; below this change a guessed rim stays as it was


def shot_cuts(disparity: torch.Tensor, k: float, matte: torch.Tensor | None = None) -> list[float]:
    """Layer thresholds for a whole shot: measured on frames of it, [S, H, W] (matte likewise), with its largest k.

    Pass them to `render` chunk by chunk, so that no layer appears or vanishes within the shot.
    """
    if k == 0:
        return []
    return _shot_cuts([harden_edges(d, k) for d in disparity], k, matte)


def _shot_cuts(hardened: list[torch.Tensor], k: float, matte: torch.Tensor | None) -> list[float]:
    frames = []
    for i, d in enumerate(hardened):
        if matte is not None:
            m = matte[i if len(matte) > 1 else 0]
            d = _regrown(d, m)
        frames.append(d)
    return thresholds(torch.stack(frames), k)


def _regrown(disparity: torch.Tensor, matte: torch.Tensor) -> torch.Tensor:
    """[H, W] disparity as `regrow` leaves it on either side of a matte, large pictures window by window."""
    height, width = matte.shape
    every = step(height, width)
    if every == 1:
        return torch.where(matte > 0.5, *regrow(disparity, matte))
    reaches = bands(matte, believed_band(width))
    overview = Overview(Scene(()), every, _grown_small(thin(disparity, every), thin(matte, every), reaches, every))
    out = torch.empty_like(disparity)
    for window in plan(height, width, 2 * believed_band(width) + SETTLED):
        subject = window.of(matte)
        grown = torch.where(subject > 0.5, *regrow(window.of(disparity), subject, reaches, Rim(overview, window, out.device)))
        out[window.core] = grown[window.within]
    return out


def _grown_small(disparity: torch.Tensor, matte: torch.Tensor, reaches: tuple[int, int], every: int) -> torch.Tensor:
    """[2, h, w] from `regrow` for the small copy; `reaches` are the picture's."""
    return torch.stack(regrow(disparity, matte, _thinner(reaches, every)))


def _thinner(reaches: tuple[int, int], every: int) -> tuple[int, int]:
    return tuple(math.ceil(reach / every) for reach in reaches)


def render(
    image: torch.Tensor,
    defocus: Defocus,
    *,
    linear: bool = False,
    quality: str = "fast",
    rays: int = 1024,
    matte: torch.Tensor | None = None,
    clean_plate: torch.Tensor | None = None,
    snap_edges: bool = False,
    cuts: list[float] | None = None,
    shots: list[int] | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Render depth of field into a batch of pictures.

    image     [B, 3, H, W] float, display-encoded sRGB, or linear light when `linear`; values above 1 are light and survive
    defocus   disparity [B, H, W], focus [B], k [B] (a Defocus of one frame serves a batch, one picture serves a Defocus of many frames)
    quality   "fast": disks scattered over depth layers; "reference": rays through the aperture, across the same layers
    rays      per pixel, for "reference"
    matte     [B or 1, H, W] 0..1, 1 = the subject: its edge is believed more than the depth's
    clean_plate  [B or 1, 3, H, W] in the image's light: the scene without the subject (with a matte), or the farthest surroundings alone
    snap_edges  move depth edges that are off by a few pixels to where the colours change (without a matte)
    cuts      layer thresholds shared by a whole shot (see shot_cuts); measured on this batch when not given
    shots     numbers of the frames at which shots begin (see video.stabilisation.find_shots), when the batch has several: the
              thresholds are then measured for each
    progress  called as progress(frames done, frames), with fractions of a frame, after each tile of work; may raise to interrupt
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
    for name, extra, wanted in (("matte", matte, (height, width)), ("clean plate", clean_plate, (3, height, width))):
        if extra is not None and (tuple(extra.shape[1:]) != wanted or extra.shape[0] not in (1, pictures)):
            raise BokehError(
                f"The {name} has shape {list(extra.shape)}; expected {[pictures, *wanted]} like the picture, or one for all frames."
            )
    maps = defocus.disparity.shape[0]
    if pictures != maps and 1 not in (pictures, maps):
        raise BokehError(f"{pictures} pictures but {maps} depth maps. Give one depth map, or one for each picture.")

    frames = max(pictures, maps)
    device = torch.device(device) if device is not None else image.device
    focus, k = ([float(v) for v in t] for t in (defocus.focus, defocus.k))
    lens, aperture = defocus.lens, defocus.lens.aperture
    every = step(height, width)  # above 1 the picture is rendered window by window, and a small copy of it is cut first

    def frame(batch: torch.Tensor, i: int) -> torch.Tensor:
        return batch[i if len(batch) > 1 else 0]

    def here(picture: torch.Tensor) -> torch.Tensor:
        return picture.to(device, torch.float32)

    def light(picture: torch.Tensor, i: int, name: str) -> torch.Tensor:
        """A picture, or a part of it, as linear light on the device."""
        picture = here(picture) if linear else to_linear(here(picture))
        if not bool((picture.abs() <= BRIGHTEST).all()):
            raise BokehError(f"{name} {i} holds values that are not numbers (NaN, infinite) or no light. Repair it before rendering.")
        return picture

    def small_light(batch: torch.Tensor, i: int, name: str) -> torch.Tensor:
        """The small copy of picture i as linear light; all of the picture is checked on the way."""
        rows = every * max(1, ROWS_PIXELS // (every * width))
        parts = (light(part, i, name) for part in frame(batch, i).split(rows, dim=1))
        return torch.cat([F.avg_pool2d(part, every) for part in parts if part.shape[1] >= every], 1)

    def cover(picture: torch.Tensor, i: int) -> torch.Tensor:
        one = here(picture).clamp(0, 1)
        if bool(one.isnan().any()):
            raise BokehError(f"Matte {i} holds values that are not numbers (NaN). Repair it before rendering.")
        return one

    def measured(start: int, end: int) -> list[float]:
        """Layer thresholds of the frames from start to before end."""
        sample = sorted({start + round(n * (end - start - 1) / 7) for n in range(8)})
        mattes = None if matte is None else torch.stack([cover(frame(matte, i), i) for i in sample])
        strongest = max(abs(v) for v in (k[start:end] if maps > 1 else k))
        if strongest == 0:
            return []
        depths = [harden_edges(here(frame(defocus.disparity, i)), strongest) for i in sample]
        if len(sample) == 1:
            hardened[start] = depths[0]
        return _shot_cuts(depths, strongest, mattes)

    def cut_small(i: int, strength: float, sharp: float, disparity: torch.Tensor) -> Overview:
        """The small copy of frame i, cut into layers."""
        radius = strength * (here(thin(frame(defocus.disparity, i), every)) - sharp)
        source = recover_highlights(small_light(image, i, "Picture"), lens, radius)
        plate = None if clean_plate is None else small_light(clean_plate, i, "Clean plate")
        disparity = thin(disparity, every)
        if matte is None:
            if snap_edges:
                disparity = snap_to_colors(source, disparity, cuts, strength / every)
            return Overview(build_scene(source, disparity, cuts, strength / every, None, plate), every)
        subject = cover(frame(matte, i), i)
        reaches = bands(subject, believed_band(width))
        subject = thin(subject, every)
        scene = build_scene(source, disparity, cuts, strength / every, subject, plate, reaches=_thinner(reaches, every))
        return Overview(scene, every, _grown_small(disparity, subject, reaches, every), reaches)

    def develop(
        i: int, strength: float, sharp: float, hard: torch.Tensor, window: Window, overview: Overview | None, report: Report
    ) -> torch.Tensor:
        """The core of a window of frame i, as the input is encoded."""
        original = here(window.of(frame(image, i)))
        picture = light(window.of(frame(image, i)), i, "Picture")
        disparity = window.of(hard)
        source = recover_highlights(picture, lens, strength * (here(window.of(frame(defocus.disparity, i))) - sharp))
        subject = None if matte is None else cover(window.of(frame(matte, i)), i)
        plate = None if clean_plate is None else light(window.of(frame(clean_plate, i)), i, "Clean plate")
        if snap_edges and matte is None:
            disparity = snap_to_colors(source, disparity, cuts, strength, width)
        rim, reaches, view = None, None, None
        if overview is not None:
            rim, reaches = Rim(overview, window, device), overview.reaches
            view = View(height, width, window.rows.start, window.columns.start, window.within)
        scene = build_scene(source, disparity, cuts, strength, subject, plate, lambda: report(0.1), reaches, rim)
        del source, disparity, plate, subject
        report(0.2)
        if quality == "reference":
            result = trace(
                scene, strength, sharp, rays=rays, aperture=aperture, progress=lambda n, of: report(0.2 + 0.8 * n / of), view=view
            )
        else:
            result = composite(scene, strength, sharp, lambda done: report(0.2 + 0.8 * done), aperture, view)
        del scene
        original, picture, result = (part[(slice(None), *window.within)] for part in (original, picture, result))
        # What no blur reaches is the input itself, not the input decoded and encoded again.
        untouched = ((result - picture).abs_() < UNTOUCHED).all(0)
        return torch.where(untouched, original, result if linear else to_display(result))

    hardened: dict[int, torch.Tensor] = {}  # of a shot of one frame: needed again at once
    starts = sorted({0, *(shots or ())})
    ends = dict(zip(starts, [*starts[1:], frames], strict=True)) if cuts is None else {}
    if out is None:
        out = image.new_empty(frames, 3, height, width)
    for i in range(frames):
        if i in ends:
            cuts = measured(i, ends[i])
        j = i if maps > 1 else 0
        if k[j] == 0:
            out[i] = frame(image, i)
        else:
            widest = _widest(frame(defocus.disparity, i).aminmax(), k[j], focus[j])
            if not widest <= WIDEST:
                raise BokehError(
                    f"The blur radius comes to {widest:.3g} px; check the blur strength, and that depth in metres is in metres."
                )
            windows = plan(height, width, _margin(height, width, widest, defocus.lens, matte is not None, snap_edges))
            if progress is not None:
                progress(i, frames)
            hard = hardened.pop(i) if i in hardened else harden_edges(here(frame(defocus.disparity, i)), k[j])
            overview = cut_small(i, k[j], focus[j], hard) if every > 1 else None
            for n, window in enumerate(windows):

                def report(done: float, i: int = i, n: int = n, count: int = len(windows)) -> None:
                    if progress is not None:
                        progress(i + (n + done) / count, frames)

                report(0)
                out[i][(slice(None), *window.core)] = develop(i, k[j], focus[j], hard, window, overview, report)
        if progress:
            progress(i + 1, frames)
    return out


def _widest(span: tuple[torch.Tensor, torch.Tensor], k: float, focus: float) -> float:
    """px of the largest blur radius, of disparities from span[0] to span[1]."""
    low, high = (float(v) for v in span)
    return abs(k) * max(abs(low - focus), abs(high - focus))


def _margin(height: int, width: int, widest: float, lens: Lens, matte: bool, snap_edges: bool) -> int:
    mended = math.ceil(width / 300)
    if matte:
        mended += 2 * believed_band(width)
    elif snap_edges:
        mended += math.ceil(width / 256) + SNAP_WINDOW
    return margin((height, width), widest, lens.aperture, mended)


def piece_pixels(height: int, width: int, defocus: Defocus, *, matte: bool = False, snap_edges: bool = False) -> int:
    """Pixels that `render` works on at once: those of the picture, or of the largest window of a large one."""
    span = defocus.disparity.aminmax()
    widest = max(_widest(span, strength, sharp) for strength, sharp in zip(defocus.k.tolist(), defocus.focus.tolist(), strict=True))
    return max(window.pixels for window in plan(height, width, _margin(height, width, widest, defocus.lens, matte, snap_edges)))


def activation_bytes(height: int, width: int, defocus: Defocus, *, matte: bool = False, snap_edges: bool = False) -> int:
    """Bytes that `render` needs for one frame, of any look: about 290 a pixel and 100 MB for shaped apertures were counted.

    Of a large picture one window is worked on at a time, beside a few planes of the whole.
    """
    piece = piece_pixels(height, width, defocus, matte=matte, snap_edges=snap_edges)
    return 450 * piece + (24 * height * width if piece < height * width else 0) + (128 << 20)
