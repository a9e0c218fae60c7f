"""The command `bokeh depth`, and depth for `bokeh render` when no depth file is given."""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from .checkpoints.catalogue import CATALOGUE, DEPTH_FOLDERS, Entry, entry, model_files
from .errors import BokehError
from .terminal import bar, say

HELP = """
writes
  PNG, TIFF, WebP, JPEG, video   near is bright, 0 the farthest and 1 the nearest of the photo or clip (PNG and TIFF: 16 bit)
  EXR, .npy                      what the model says: metres for metric models, else disparity of no unit, larger = nearer

A clip becomes a folder of PNG (other files with --frames) or a grey video. While it is worked on, 4 bytes per pixel and frame are
needed on the disk of OUT. All of it works in 'bokeh render --depth'; for EXR and .npy of a metric model add --depth-unit metres.

examples
  bokeh depth photo.jpg -o depth.png
  bokeh depth photo.jpg -o metres.exr --model depth-anything-v2-indoor-small
  bokeh depth clip.mp4 -o depth/ --model video-depth-anything-small
"""
KINDS = ("auto", "relative", "metric indoor", "metric outdoor")  # of depth.checkpoint, which is too heavy to import here
RAW = (".exr", ".npy")
FIRST_CHOICE = {False: "depth-anything-v2-small", True: "depth-anything-v2-indoor-small"}  # by: must it be metric?


def add_command(commands) -> None:
    """Add `depth` to the command's sub-parsers."""
    parser = commands.add_parser(
        "depth",
        help="estimate depth of a picture or clip",
        description="Estimate the depth of a picture or clip with a depth model that is installed on this machine.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_depth)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="picture, folder of pictures or video file")
    add("-o", "--output", required=True, metavar="OUT", help="picture for a picture; video file or folder (no suffix) for a clip")
    add_model_options(parser)
    add("--kind", choices=KINDS, default="auto", help="what a file of Depth Anything V2 gives, if its name does not say (default: auto)")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--cuts", action="store_true", help="the clip has cuts: find them, and give each shot its own range")
    frames.add_argument("--per-image", action="store_true", help="the frames are separate photos, each with its own range")
    add("--plain-edges", action="store_true", help="bilinear enlargement as published, instead of edges that follow the colours")
    add("--steady", type=float, default=0.0, metavar="0..1", help="smooth a clip's flicker along its motion; for photo models (default: 0)")
    add("--linear", action="store_true", help="the input is linear light (EXR always is)")
    add("--frames", choices=("png", "tif", "exr", "npy"), help="OUT is a folder: format of its files (default: png)")


def add_model_options(parser) -> None:
    """--model, --models, --resolution and --device, for `depth` and `render`."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="depth model: a file, or a name of 'bokeh models' (default: the best one installed)")
    add("--models", action="append", default=[], metavar="DIR", help="a folder with models, see 'bokeh models -h' (may be repeated)")
    add(
        "--resolution",
        type=int,
        metavar="PX",
        help="short side of the picture inside the depth model, made a multiple of 14 (default: 518); more shows finer parts",
    )
    add("--device", metavar="NAME", help="where the depth model runs, e.g. cpu or cuda (default: the graphics card if there is one)")


class EstimatedDepth:
    """Depth maps of a clip in a temporary file, which a DepthClip reads like a folder of floats.

    raw     [frames, H, W] tensor over the file, see estimate_clip
    starts  first frames of the stretches that share one range
    metric  raw is metres
    """

    is_picture = False
    rate = None

    def __init__(self, path: Path, raw, starts: list[int], metric: bool):
        self.path, self.raw, self.starts, self.metric = path, raw, starts, metric
        self.size = tuple(raw.shape[1:])

    def __len__(self) -> int:
        return len(self.raw)

    def holds_floats(self) -> bool:
        return True

    def planes(self, what: str = ""):
        """[H, W] one per frame: metres of a metric model, else near-bright 0..1."""
        return iter(self.raw) if self.metric else self.near_bright()

    def near_bright(self):
        """[H, W] one per frame: 0 the farthest and 1 the nearest of each stretch."""
        from .depth.clip import near_bright_maps

        return near_bright_maps(self.raw, self.starts, self.metric)


@contextlib.contextmanager
def estimated(clip, args: argparse.Namespace, *, metric: bool = False, beside: Path, path: Path | None = None, kept: Path | None = None):
    """Yield the EstimatedDepth of an open clip. Its file lies on the disk of `beside` and goes away by itself.

    metric  the maps must be in metres
    path    of the model; None = what `args` says, or the best one installed
    kept    where the maps lie instead, for a later run to find them finished; the caller removes them
    """
    resolution = _resolution(args)
    path = path or chosen_model(clip, args, metric=metric)
    import numpy as np
    import torch

    shape = (len(clip), *clip.size)
    facts = kept and kept.with_suffix(".json")
    if facts and facts.exists():
        found = json.loads(facts.read_text(encoding="utf-8"))
        yield EstimatedDepth(clip.path, torch.from_numpy(np.memmap(kept, np.float32, "r+", shape=shape)), **found)
        return
    from .depth import clip as clips
    from .media import atomic

    device = _device(args.device)
    known = _entry_of(path)
    model = _load(path, getattr(args, "kind", "auto"), device, metric)
    if not args.model:
        say(f"depth by {model.info.title}, {path}{f'; licence: {known.licence}' if known else ''}.")
    frames = clips.PHOTOS if getattr(args, "per_image", False) else clips.WITH_CUTS if getattr(args, "cuts", False) else clips.ONE_CLIP
    folder = next(one for one in beside.resolve().parents if one.is_dir())
    need, free = 4 * shape[0] * shape[1] * shape[2], shutil.disk_usage(folder).free
    if need > free:
        raise BokehError(f"{folder} has {free / 1e9:.1f} GB free and the depth of this clip needs {need / 1e9:.1f} GB for a while.")
    with contextlib.ExitStack() as stack:
        file = kept or stack.enter_context(tempfile.TemporaryFile(dir=folder, prefix=".bokeh-"))
        progress = stack.enter_context(bar(shape[0], "estimating depth"))
        raw = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
        try:
            starts = clips.estimate_clip(
                model,
                _Display(clip, args.linear),
                raw,
                frames_are=frames,
                resolution=resolution,
                guided=not getattr(args, "plain_edges", False),
                steady=getattr(args, "steady", 0.0),
                progress=progress,
            )
        except torch.OutOfMemoryError as error:
            raise BokehError("The device ran out of memory; use a smaller --resolution or model, or --device cpu.") from error
        found = {"starts": starts, "metric": model.info.metric}
        del model  # what is rendered next needs the room
        if facts:
            with atomic(facts) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        yield EstimatedDepth(clip.path, raw, **found)


def chosen_model(clip, args: argparse.Namespace, *, metric: bool) -> Path:
    """The file of the depth model for this clip. Raises BokehError that says how to get one."""
    return find_model(args.model, args.models, metric=metric, video=not clip.is_picture and not getattr(args, "per_image", False))


class _Display:
    """The frames of a clip as a depth model takes them: [3, H, W] display-encoded 0..1. Can be read more than once."""

    def __init__(self, clip, linear: bool):
        self.clip, self.linear = clip, linear

    def __iter__(self):
        from .render.light import to_display

        for index, picture in enumerate(self.clip):
            if tuple(picture.pixels.shape[1:]) != self.clip.size:
                raise BokehError(f"{self.clip.path}: frame {index} has another size than the first; expected one size for the clip.")
            yield (to_display(picture.pixels) if self.linear or picture.linear else picture.pixels).clamp(0, 1)


def _resolution(args: argparse.Namespace) -> int:
    if args.resolution is None:
        return 518
    if not 14 <= args.resolution <= 4096:
        raise BokehError(f"--resolution is {args.resolution}; expected 14 to 4096 px.")
    return args.resolution


def find_model(wanted: str | None, given: list[str], *, metric: bool, video: bool) -> Path:
    """The file of a depth model: `wanted` (a path, a catalogue name, or a file name), or the best one installed.

    metric  only one that gives metres will do
    video   it is for a clip
    Raises BokehError that says how to get one.
    """
    files = [path for folder in DEPTH_FOLDERS for path in model_files(folder, given)]
    if wanted:
        if Path(wanted).is_file():
            return Path(wanted)
        known = next((one for one in CATALOGUE if one.name == wanted.lower() and one.folder in DEPTH_FOLDERS), None)
        name = known.file if known else Path(wanted).name
        found = next((path for path in files if path.name == name), None)
        if found:
            return found
        if known:
            raise BokehError(f"{known.title} is not installed: {known.how_to_get}.")
        here = ", ".join(sorted(path.name for path in files)) or "none"
        raise BokehError(f"There is no depth model '{wanted}' (installed: {here}); 'bokeh models' lists the names.")
    best = min(_usable(files), key=lambda one: _rank(*one, metric=metric, video=video), default=None)
    if best is None or (metric and not best[1].metric):
        need = "A real lens needs depth in metres; there is no --depth, and no model for it" if metric else "There is no depth model"
        raise BokehError(f"{need} on this machine: {entry(FIRST_CHOICE[metric]).how_to_get}. Or give a depth map with --depth.")
    return best[0]


def _usable(files: list[Path]) -> list:
    """(path, DepthModelInfo) of the files that hold a depth model."""
    from .checkpoints.reading import read_checkpoint
    from .depth.checkpoint import recognise

    found = []
    for path in files:
        with contextlib.suppress(BokehError):  # a foreign or damaged file in the folder; 'bokeh models' names it
            found.append((path, recognise(read_checkpoint(path).tensors, str(path))[0]))
    return found


def _rank(path: Path, info, *, metric: bool, video: bool) -> tuple:
    """Small is good: the wanted unit, made for the task, large, published by its authors."""
    known = _entry_of(path)
    order = CATALOGUE.index(known) if known else len(CATALOGUE)
    return info.metric != metric, info.video != video, "LBS".find(info.size[0]) % 4, order, str(path)


def _entry_of(path: Path) -> Entry | None:
    return next((one for one in CATALOGUE if one.file == path.name and one.folder in DEPTH_FOLDERS), None)


def _device(name: str | None):
    import torch

    accelerator = getattr(torch, "accelerator", None)  # torch below 2.6 has none; name the device there
    try:
        # A torch built for CUDA names it as its accelerator on machines without a graphics card too.
        found = accelerator.current_accelerator() if accelerator and accelerator.is_available() else None
        device = torch.device(name or found or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BokehError(f"--device {name}: this machine has no such device; use cpu.") from error
    return device


def _load(path: Path, kind: str, device, metric: bool):
    import torch

    from .depth.checkpoint import load_depth_model

    model = load_depth_model(path, kind, device, torch.float16 if device.type == "cuda" else torch.float32)
    if metric and not model.info.metric:
        raise BokehError(f"A real lens needs depth in metres, and {model.info.title} gives relative depth; choose a metric model.")
    return model


def _depth(args: argparse.Namespace) -> None:
    from . import media
    from .media import Picture
    from .video.clips import check_clip_target, frame_names, open_clip, write_clip

    output = Path(args.output)
    if os.path.realpath(output) == os.path.realpath(args.image):  # Path.resolve raises at links that lead in a circle
        raise BokehError(f"-o {output} is also IMAGE; choose another name, inputs are never overwritten.")
    if not 0 <= args.steady <= 1:
        raise BokehError(f"--steady is {args.steady:g}; expected 0 (off) to 1.")
    clip = open_clip(args.image)
    if clip.is_picture:
        media.check_writable(output)
        suffix, to_video = output.suffix.lower(), False
    else:
        to_video = check_clip_target(output)
        suffix = "" if to_video else f".{args.frames or 'png'}"
        if not to_video:
            frame_names(clip, suffix)
    if args.frames and (clip.is_picture or to_video):
        raise BokehError("--frames is for a folder of frames; the suffix of OUT says the format here, so leave it out.")
    if clip.is_picture and (args.cuts or args.per_image or args.steady):
        raise BokehError("--cuts, --per-image and --steady are for clips and folders; leave them out for a single picture.")

    with estimated(clip, args, beside=output) as depth:
        raw = suffix in RAW
        maps = iter(depth.raw) if raw else depth.near_bright()
        if raw:
            say("the values are metres." if depth.metric else "the values have no unit; larger is nearer.")
        bits = 16 if suffix in (".png", ".tif", ".tiff") else None
        pictures = (Picture(one[None].expand(3, -1, -1), time=source) for one, source in zip(maps, _times(clip), strict=True))
        if clip.is_picture:
            media.write_picture(output, next(pictures), bits)
        else:
            with bar(len(clip), "writing") as progress, write_clip(output, clip, bits=bits, suffix=suffix) as write:
                for done, picture in enumerate(pictures, start=1):
                    write(picture)
                    progress(done, len(clip))
    print(output)


def _times(clip):
    """When each frame of a video is shown, so that the depth video runs beside it; None for pictures."""
    if clip.rate is None:
        return [None] * len(clip)
    return (picture.time for picture in clip)
