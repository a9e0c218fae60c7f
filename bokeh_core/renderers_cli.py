"""`bokeh render --renderer NAME`: the three published networks in place of the physical renderer, from local files."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from .checkpoints.catalogue import Entry, entry, model_files, model_roots
from .errors import BokehError

PHYSICAL, BOKEHDIFF, MAGICBOKEH, ANY_TO_BOKEH = NAMES = ("physical", "bokehdiff", "magicbokeh", "any-to-bokeh")
PUBLISHED = "as-published"
PHYSICAL_ONLY = {
    "matte": "--matte",
    "clean_plate": "--clean-plate",
    "snap_edges": "--snap-edges",
    "blades": "--blades",
    "rotation": "--blade-rotation",
    "roundness": "--roundness",
    "anamorphic": "--anamorphic",
    "cats_eye": "--cats-eye",
    "spherical": "--spherical",
    "onion": "--onion",
    "chromatic_longitudinal": "--chromatic-longitudinal",
    "chromatic_lateral": "--chromatic-lateral",
    "highlights": "--highlights",
    "aperture_picture": "--aperture-picture",
}
NETWORKS_ONLY = {  # option -> flag, the renderers that know it
    "base": ("--base", (BOKEHDIFF, MAGICBOKEH)),
    "renderer_model": ("--renderer-model", (BOKEHDIFF, MAGICBOKEH, ANY_TO_BOKEH)),
    "renderer_vae": ("--renderer-vae", (BOKEHDIFF,)),
    "fidelity": ("--fidelity", (BOKEHDIFF, MAGICBOKEH, ANY_TO_BOKEH)),
    "seed": ("--seed", (BOKEHDIFF, MAGICBOKEH, ANY_TO_BOKEH)),
    "mode": ("--mode", (MAGICBOKEH,)),
    "colour_fix": ("--colour-fix", (MAGICBOKEH,)),
    "upscale": ("--upscale", (MAGICBOKEH,)),
    "renderer_resolution": ("--renderer-resolution", (ANY_TO_BOKEH,)),
    "cuts_found": ("--cuts-found", (ANY_TO_BOKEH,)),
}
# The words of samplers.magicbokeh.sampler, which is too heavy to import here.
MODES, COLOUR_FIXES = ("exact", "fast"), ("in-focus parts", "whole picture", "wavelet", "none")
BASES = {  # renderer -> parts needed of a diffusers folder, words that tell its base model, the likeliest first, and how to get it
    BOKEHDIFF: (
        ("unet", "vae", "text_encoder", "text_encoder_2"),
        ("realvis", "xl"),
        "an SDXL model: put RealVisXL V5.0 (https://huggingface.co/SG161222/RealVisXL_V5.0) as one file into models/checkpoints or as a "
        "diffusers folder into models/diffusers",
    ),
    MAGICBOKEH: (
        ("unet", "vae"),
        ("2-1-base", "2-1-512", "21-base"),
        "Stable Diffusion 2.1-base: put the folder stable-diffusion-2-1-base (its unet, vae and scheduler; "
        "https://huggingface.co/Manojb/stable-diffusion-2-1-base) into models/diffusers, or v2-1_512-ema-pruned.safetensors into "
        "models/checkpoints",
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("renderer", "The networks read local files only; 'bokeh models' says where they belong.")
    add = group.add_argument
    add(
        "--renderer",
        choices=NAMES,
        default=PHYSICAL,
        help=f"{PHYSICAL} (default, no model); {BOKEHDIFF}: photos; {MAGICBOKEH}: poor, zoomed photos; {ANY_TO_BOKEH}: clips",
    )
    add(
        "--base", metavar="MODEL", help=f"{BOKEHDIFF}: an SDXL model, {MAGICBOKEH}: SD 2.1-base; file, diffusers folder, or the name of one"
    )
    add(
        "--renderer-model",
        metavar="FILE",
        help=f"{BOKEHDIFF}: pytorch_lora_weights.safetensors; {MAGICBOKEH}: lora.pkl or what 'bokeh models convert' made of it; "
        f"{ANY_TO_BOKEH}: folder of the release, with unet, vae and image_encoder. Path or name (default: as installed)",
    )
    add("--renderer-vae", metavar="FILE", help=f"{BOKEHDIFF}: vae.ckpt, likewise")
    add("--fidelity", choices=("best", PUBLISHED), help="best (default), or with all habits of the authors' programs")
    add("--seed", type=int, metavar="N", help=f"of the noise of --fidelity {PUBLISHED} (default: 0)")
    add("--mode", choices=MODES, help=f"{MAGICBOKEH}: exact (default) or fast, less than half the work")
    add("--colour-fix", choices=COLOUR_FIXES, help=f"{MAGICBOKEH}: how colours come back to the photo's (default: {COLOUR_FIXES[0]})")
    add("--upscale", type=float, metavar="N", help=f"{MAGICBOKEH}, single pictures: enlarge them first, 1 to 4 times (default: 1)")
    add("--renderer-resolution", type=int, metavar="PX", help=f"{ANY_TO_BOKEH}: working width at 16:9 (default: 1024)")
    add("--cuts-found", action="store_true", help=f"{ANY_TO_BOKEH}: find cuts, and never mix frames of different shots")


def check(args: argparse.Namespace) -> None:
    """Raise BokehError for options that the chosen renderer does not have, and for numbers out of range."""

    def given(name: str) -> bool:
        value = getattr(args, name)
        return value is not None and value is not False

    foreign = next((flag for name, (flag, which) in NETWORKS_ONLY.items() if given(name) and args.renderer not in which), None)
    if foreign:
        which = " or ".join(next(which for flag, which in NETWORKS_ONLY.values() if flag == foreign))
        raise BokehError(f"{foreign} is for --renderer {which}; leave it out, or choose that renderer.")
    physical = None if args.renderer == PHYSICAL else next((flag for name, flag in PHYSICAL_ONLY.items() if given(name)), None)
    if physical:
        raise BokehError(f"{physical} is for the physical renderer; --renderer {args.renderer} does not know it, so leave it out.")
    if args.renderer_resolution is not None and not 64 <= args.renderer_resolution <= 4096:
        raise BokehError(f"--renderer-resolution is {args.renderer_resolution}; expected 64 to 4096 px.")
    if args.upscale is not None and not 1 <= args.upscale <= 4:
        raise BokehError(f"--upscale is {args.upscale:g}; expected 1 to 4.")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise BokehError(f"--seed is {args.seed}; expected 0 or more.")


# Files


def find_files(args: argparse.Namespace) -> dict[str, Path]:
    """The chosen renderer's files, by the names its loader has for them. Raises BokehError with where to get what is missing."""
    if args.renderer == BOKEHDIFF:
        return {
            "base": _base(args),
            "lora": _file(args.renderer_model, "--renderer-model", entry("bokehdiff"), args.models),
            "vae_ckpt": _file(args.renderer_vae, "--renderer-vae", entry("bokehdiff-vae"), args.models),
        }
    if args.renderer == MAGICBOKEH:
        own = entry("magicbokeh")
        return {"base": _base(args), "file": _file(args.renderer_model, "--renderer-model", own, args.models, "magicbokeh.safetensors")}
    return {"path": _release(args)} if args.renderer == ANY_TO_BOKEH else {}


def _file(wanted: str | None, flag: str, known: Entry, given: list[str], better: str = "") -> Path:
    """A path, or a file of ComfyUI's folder by its name in the catalogue or its own. better: a name preferred to the published one."""
    if wanted and Path(wanted).is_file():
        return Path(wanted)
    published = not wanted or wanted.lower() == known.name
    names = [better, known.file] if published else [Path(wanted).name]
    found = [path for path in model_files(known.folder, given) if path.name in names]
    if found:  # several programs publish files of these names
        return min(found, key=lambda path: (names.index(path.name), known.name.partition("-")[0] not in str(path).lower()))
    missing = f"{known.title} is not installed" if published else f"{flag} {wanted}: no such file, nor a name that 'bokeh models' knows"
    raise BokehError(f"{missing}: {known.how_to_get}, or name the file with {flag}.")


def _base(args: argparse.Namespace) -> Path:
    parts, likely, get = BASES[args.renderer]
    if args.base and Path(args.base).exists():
        return Path(args.base)
    folders = [file.parents[1] for root in model_roots(args.models) for file in sorted((root / "diffusers").glob("**/unet/config.json"))]
    whole = [folder for folder in folders if all((folder / part / "config.json").is_file() for part in parts)]
    found = [*whole, *model_files("checkpoints", args.models)]
    if args.base:
        named = [path for path in found if args.base in (path.name, path.stem)]
        problem = f"--base {args.base}: no such file or folder, nor a model of that name"
    else:

        def rank(path: Path) -> int:
            name = path.name.lower().replace(".", "-").replace("_", "-")
            return next((i for i, word in enumerate(likely) if word in name), len(likely))

        named = sorted((path for path in found if rank(path) < len(likely)), key=rank)
        problem = f"--renderer {args.renderer} needs its base model"
    if named:
        return named[0]
    raise BokehError(f"{problem}. It is {get}, or name it with --base.")


def _release(args: argparse.Namespace) -> Path:
    from .samplers.any_to_bokeh.checkpoint import ENCODER_SOURCE, SOURCE

    if args.renderer_model and Path(args.renderer_model).exists():
        return Path(args.renderer_model)
    places = [root / "diffusers" / (args.renderer_model or "any_to_bokeh") for root in model_roots(args.models)]
    found = next((place for place in places if (place / "unet").is_dir()), None)
    if found is not None:
        return found
    if args.renderer_model:
        raise BokehError(f"--renderer-model {args.renderer_model}: no such folder; check the name.")
    raise BokehError(
        f"--renderer {ANY_TO_BOKEH} needs its weights: unpack {SOURCE} into {places[0]} and put {ENCODER_SOURCE} beside unet and vae, or "
        "name the folder with --renderer-model."
    )


# Frames


def render_frames(args: argparse.Namespace, files: dict[str, Path], clip, depth, focus, k, *, in_light, shots, start, carry, progress):
    """The frames of `clip` from `start` on with bokeh, display-encoded, each with what its file says: an iterator of resume.Finished.

    files        see find_files
    in_light     in_light(picture) -> the picture display-encoded
    shots        numbers of the frames at which shots begin
    start, carry go on after what an earlier run has finished
    """
    import torch

    from .depth_cli import _device

    make = _of_a_clip if args.renderer == ANY_TO_BOKEH else _one_by_one
    try:
        with torch.no_grad():
            yield from make(args, files, _device(args.device), clip, depth, focus, k, in_light, shots, start, carry, progress)
    except torch.OutOfMemoryError as error:
        raise BokehError("The device ran out of memory; render a smaller picture, or use --device cpu.") from error


def _one_by_one(args, files, device, clip, depth, focus, k, in_light, shots, start, carry, progress) -> Iterator:
    """BokehDiff and MagicBokeh: every frame by itself."""
    from .optics.defocus import Defocus, fit_disparity
    from .optics.lens import Lens
    from .video.resume import Finished

    draw = (_bokehdiff if args.renderer == BOKEHDIFF else _magicbokeh)(args, files, device)
    low, high = depth.span  # one range for the whole clip, whatever a frame's own is
    for number, (picture, disparity) in enumerate(islice(zip(clip, depth, strict=True), start, None), start=start):
        if tuple(picture.pixels.shape[1:]) != clip.size:
            raise BokehError(f"{clip.path}: frame {number} has another size than the first; expected one size for the clip.")
        here = slice(number, number + 1)
        defocus = Defocus((disparity[None] - low) / (high - low), (focus[here] - low) / (high - low), k[here] * (high - low), Lens(), False)
        pixels = draw(
            in_light(picture).pixels[None], defocus, lambda done, total, number=number: progress(number + done / total, len(clip))
        )[0]
        alpha = None if picture.alpha is None else fit_disparity(picture.alpha[None], 1, *pixels.shape[1:])[0]
        yield Finished([replace(picture, pixels=pixels, alpha=alpha, linear=False)])
        progress(number + 1, len(clip))


def _bokehdiff(args, files, device) -> Callable:
    """draw(image [1, 3, H, W], defocus, progress) -> the same with bokeh."""
    import torch

    from .samplers.bokehdiff import checkpoint, sampler

    model = checkpoint.load_bokehdiff(**files, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
    fidelity = sampler.AS_PUBLISHED if args.fidelity == PUBLISHED else sampler.BEST
    return lambda image, defocus, progress: sampler.render(
        model, image, defocus, fidelity=fidelity, seed=args.seed or 0, progress=progress, shrinking=_shrinking
    )


def _magicbokeh(args, files, device) -> Callable:
    import torch

    from .samplers.magicbokeh import checkpoint, sampler

    model = checkpoint.load_magicbokeh(**files, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
    fidelity = sampler.AS_PUBLISHED if args.fidelity == PUBLISHED else sampler.BEST
    return lambda image, defocus, progress: sampler.render(
        model,
        image,
        defocus,
        fidelity=fidelity,
        mode=args.mode or MODES[0],
        colour_fix=args.colour_fix or COLOUR_FIXES[0],
        upscale=args.upscale or 1.0,
        seed=args.seed or 0,
        progress=progress,
        shrinking=_shrinking,
    )


def _of_a_clip(args, files, device, clip, depth, focus, k, in_light, shots, start, carry, progress) -> Iterator:
    """Any-to-Bokeh: frames look at their neighbours."""
    from .samplers.any_to_bokeh import checkpoint, sampler
    from .samplers.any_to_bokeh.preparation import PUBLISHED_SIZE
    from .video.resume import Finished

    model = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(files["path"]), device))
    pieces = sampler.render_clip(
        model,
        (in_light(picture).pixels for picture in clip),
        depth,
        focus,
        k,
        size=clip.size,
        span=depth.span,
        fidelity=sampler.AS_PUBLISHED if args.fidelity == PUBLISHED else sampler.BEST,
        resolution=args.renderer_resolution or PUBLISHED_SIZE[1],
        seed=args.seed or 0,
        shots=tuple(shots),
        start=start,
        carry=carry,
        progress=progress,
        shrinking=_shrinking,
    )
    pictures = islice(clip, start, None)
    for piece in pieces:
        made = [replace(next(pictures), pixels=pixels.float().cpu(), linear=False) for pixels in piece.frames]
        yield Finished(made, piece.resumable, piece.carry)


def _shrinking(work: Callable, size: int, smallest: int = 1):
    """work(size), again with half the size whenever the device runs out of memory, down to `smallest`."""
    import torch

    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size <= smallest:
                raise
        torch.cuda.empty_cache()
        size = max(smallest, size // 2)
