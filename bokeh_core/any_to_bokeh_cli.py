"""`bokeh render --renderer any-to-bokeh`: video bokeh by a network; a stopped run goes on where it stopped."""

import argparse
from dataclasses import replace
from pathlib import Path

from . import __version__
from .errors import BokehError
from .terminal import say

NAME = "any-to-bokeh"
NOT_WITH = {  # options of the physical renderer
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


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("renderer")
    group.add_argument(
        "--renderer",
        choices=("physical", NAME),
        default="physical",
        help=f"physical (default), or {NAME}: a video network, for clips; a stopped run goes on where it stopped",
    )
    group.add_argument(
        "--renderer-model",
        metavar="DIR",
        help=f"{NAME}: folder of the release, with unet, vae and image_encoder (default: diffusers/any_to_bokeh in a folder with models)",
    )
    group.add_argument("--renderer-resolution", type=int, metavar="PX", help=f"{NAME}: working width at 16:9 (default: 1024)")
    group.add_argument("--as-published", action="store_true", help=f"{NAME}: the released scripts with all their habits")
    group.add_argument("--seed", type=int, default=0, metavar="N", help=f"{NAME} --as-published: another number, other noise (default: 0)")
    group.add_argument("--cuts-found", action="store_true", help=f"{NAME}: find cuts, and never mix frames of different shots")


def check(args: argparse.Namespace) -> None:
    """Raise BokehError for options that the chosen renderer does not have."""
    if args.renderer != NAME:
        given = next((flag for name, flag in _OWN.items() if getattr(args, name)), None)
        if given:
            raise BokehError(f"{given} is for --renderer {NAME}; leave it out, or choose that renderer.")
        return
    given = next((flag for name, flag in NOT_WITH.items() if getattr(args, name)), None)
    if given:
        raise BokehError(f"{given} is for the physical renderer; --renderer {NAME} does not know it, so leave it out.")
    if args.renderer_resolution is not None and not 64 <= args.renderer_resolution <= 4096:
        raise BokehError(f"--renderer-resolution is {args.renderer_resolution}; expected 64 to 4096 px.")


_OWN = {
    "renderer_model": "--renderer-model",
    "renderer_resolution": "--renderer-resolution",
    "as_published": "--as-published",
    "seed": "--seed",
    "cuts_found": "--cuts-found",
}


def find_model(args: argparse.Namespace) -> Path:
    """The release's folder. Raises BokehError with where to get it."""
    from .checkpoints.catalogue import model_roots
    from .samplers.any_to_bokeh.checkpoint import ENCODER_SOURCE, SOURCE

    if args.renderer_model:
        if not Path(args.renderer_model).exists():
            raise BokehError(f"--renderer-model {args.renderer_model}: no such folder; check the name.")
        return Path(args.renderer_model)
    places = [root / "diffusers" / "any_to_bokeh" for root in model_roots(args.models)]
    found = next((place for place in places if (place / "unet").is_dir()), None)
    if found is None:
        raise BokehError(
            f"--renderer {NAME} needs its weights: unpack {SOURCE} into {places[0]} and put {ENCODER_SOURCE} beside unet and vae, or name "
            "the folder with --renderer-model."
        )
    return found


def render_frames(args: argparse.Namespace, clip, depth, focus, k, in_light, output: Path, progress):
    """(the frames of `clip` with bokeh, display-encoded, each with what its file says; what to call when the output is written).

    in_light  in_light(picture) -> the picture display-encoded
    The frames are made first and kept in OUTPUT.partial; a stopped run goes on there.
    """
    import torch

    from .depth_cli import _device
    from .samplers.any_to_bokeh import checkpoint, sampler
    from .samplers.any_to_bokeh.preparation import PUBLISHED_SIZE
    from .video.resume import PartialClip, digest, fingerprint

    folder = find_model(args)
    device = _device(args.device)
    fidelity = sampler.AS_PUBLISHED if args.as_published else sampler.BEST
    resolution = args.renderer_resolution or PUBLISHED_SIZE[1]
    shots = (0,)
    if args.cuts_found and not fidelity.across_cuts:
        from .video.stabilisation import find_shots

        shots = tuple(find_shots(in_light(picture).pixels for picture in clip))
    settings = {
        "version": __version__,
        "clip": fingerprint(clip.path),
        "depth": fingerprint(args.depth) if args.depth else "estimated",
        "focus": digest(focus),
        "blur": digest(k),
        "range of depth": list(depth.span),
        "weights": fingerprint(folder),
        "as published": args.as_published,
        "seed": args.seed,
        "resolution": resolution,
        "shots": list(shots),
    }
    args.interrupted = f"interrupted; finished frames are kept in {output}.partial, the same command goes on from there."
    partial = PartialClip(output, settings, deep=args.bits == 16 or next(iter(clip)).bits > 8)
    if partial.done < len(clip):
        if partial.done:
            say(f"going on after {partial.done} finished frames in {partial.folder}")
        model = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(folder), device))
        with torch.no_grad():
            pieces = sampler.render_clip(
                model,
                (in_light(picture).pixels for picture in clip),
                depth,
                focus,
                k,
                size=clip.size,
                span=depth.span,
                fidelity=fidelity,
                resolution=resolution,
                seed=args.seed,
                shots=shots,
                start=partial.done,
                carry=partial.carry,
                progress=progress,
                shrinking=_shrinking,
            )
            for piece in pieces:
                partial.add(piece.frames, piece.done - len(piece.frames))
                if piece.resumable:
                    partial.mark(piece.done, piece.carry)
    frames = (replace(picture, pixels=pixels, linear=False) for picture, pixels in zip(clip, partial.frames(), strict=True))
    return frames, partial.remove


def _shrinking(work, size: int):
    """work(size), again with half the size whenever the device runs out of memory."""
    import torch

    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
        torch.cuda.empty_cache()
        size //= 2
