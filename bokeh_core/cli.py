"""The command `bokeh`: depth of field for pictures and clips without ComfyUI.

Heavy imports happen inside the functions, so that `bokeh --help` answers at once.
"""

import argparse
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from . import __version__, batch_cli, depth_cli, models_cli, renderers_cli, train_cli
from .errors import BokehError
from .terminal import bar, say

RENDER_HELP = """
pictures   PNG (8 or 16 bit), JPEG, WebP, TIFF, EXR, .npy ([H, W], [H, W, 3] or [H, W, 4]; always float32 on output)
clips      a folder of pictures in natural order, or a video file (mp4, mov, mkv, m4v; webm and avi can be read)
depth      a picture, or for clips also a folder or video with one map per frame. Grey PNG is scaled to 0..1 by its full
           range (255 or 65535); EXR and .npy values are used as they are, never normalised. Without --depth an installed
           depth model estimates it ('bokeh models' lists them), one range for the whole clip
stopped    a clip that was stopped, or killed, goes on where it was when the same command is given again; until then the finished
           frames lie beside OUT in the hidden folder .OUT.partial

examples
  bokeh render photo.jpg -o out.png
  bokeh render photo.jpg --depth depth.png --focus 812,430 --strength 30 -o out.png
  bokeh render frames/ --depth disparity/ --focus-track "0: 0.9, 48: 0.35 ease" -o out.mp4
  bokeh render photo.jpg --depth metres.exr --depth-unit metres --f-number 1.4 --focal-length 85 --focus-distance 2 -o out.png
  bokeh render photo.jpg --depth depth.png --matte subject.png --blades 7 --cats-eye 0.6 --highlights 4 -o out.png
"""

# Looks of the lens and their words for the help: fields of optics.lens.Aperture, and of Lens.
LOOKS = {
    "blades": (int, "N", "blades of the aperture, 3 or more; 0 = round (default)"),
    "rotation": (float, "DEG", "turns the blades or the tall side, degrees counter-clockwise"),
    "roundness": (float, "0..1", "0 = straight blades (default), 1 = a full circle"),
    "anamorphic": (float, "RATIO", "height / width of the bokeh balls, e.g. 2 = tall ovals"),
    "cats_eye": (float, "0..1", "balls are clipped towards the corners"),
    "spherical": (float, "-1..1", "above 0 soap bubbles behind the focus, below 0 creamy; the reverse in front of it"),
    "onion": (float, "0..1", "rings inside the balls"),
    "chromatic_longitudinal": (float, "-1..1", "red and blue fringes that differ before and behind the focus"),
    "chromatic_lateral": (float, "-1..1", "red and blue fringes that grow towards the corners"),
}
LIGHTS = {
    "highlights": (float, "B", "how much brighter clipped lights really were, e.g. 4; only where they are blurred (default: 0)"),
    "highlight_threshold": (float, "0..1", "display value from which light counts as clipped (default: 0.9)"),
}
INTERRUPTED = "interrupted; no half-written file is left."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BokehError(f"{message}; '{self.prog} -h' shows all options.")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bokeh", description="Real depth of field for pictures and video.")
    parser.add_argument("--version", action="version", version=f"bokeh {__version__}")
    names = "demo | render | depth | models | synthesize | judge | train | evaluate | batch | farm"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names, parser_class=_Parser)

    demo = commands.add_parser("demo", help="render a built-in scene, to see what the renderer does")
    demo.add_argument("-o", "--output", default="bokeh-demo", metavar="DIR", help="folder for the pictures (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="another number gives another look of the scene (default: 0)")
    demo.add_argument("--width", type=int, default=960, metavar="PX", help="width of the pictures in px (default: 960)")
    demo.set_defaults(run=_demo)

    command = commands.add_parser(
        "render",
        help="blur a picture or clip by its depth",
        description="Blur a picture or clip by its depth.",
        epilog=RENDER_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_render)
    add = command.add_argument
    add("image", metavar="IMAGE", help="picture, folder of frames or video file")
    add(
        "--depth",
        metavar="FILE",
        help="depth of IMAGE: picture, folder or video; large = near unless told otherwise. Without it a depth model estimates it",
    )
    add("-o", "--output", required=True, metavar="OUT", help="picture for a picture; video file or folder (no suffix) for a clip")

    depth = command.add_argument_group("depth")
    depth.add_argument(
        "--depth-far-is-bright",
        action="store_true",
        help="relative depth with large = far: mirror it (v becomes 1 - v; outside 0..1 min + max - v)",
    )
    depth.add_argument(
        "--depth-unit",
        choices=("relative", "metres", "disparity"),
        default="relative",
        help="what the numbers are: relative disparity (default), distance in metres, or disparity in 1/m; the last two need EXR or .npy",
    )

    depth_cli.add_model_options(command.add_argument_group("depth model, for want of --depth"))

    renderers_cli.add_options(command)

    group = command.add_argument_group("better edges and hidden parts")
    group.add_argument(
        "--matte",
        metavar="FILE",
        help="white = the subject, grey = part of a pixel; its edge is believed more than the depth's. A folder or video: one per frame",
    )
    group.add_argument(
        "--clean-plate",
        metavar="FILE",
        help="IMAGE without the subject, same size and light: what a blurred subject lets through. A folder or video: one per frame",
    )
    group.add_argument(
        "--snap-edges", action="store_true", help="move depth edges that are off by a few pixels to where the colours change (no matte)"
    )

    group = command.add_argument_group("focus (default: found automatically)")
    focus = group.add_mutually_exclusive_group()
    focus.add_argument(
        "--focus",
        metavar="X,Y",
        help="the point to be sharp: pixels from the top left corner, or fractions when both are 0..1 with a dot (0.5,0.4)",
    )
    focus.add_argument("--focus-mask", metavar="FILE", help="white marks the subject; a folder holds one mask per frame")
    focus.add_argument(
        "--focus-disparity",
        type=float,
        metavar="V",
        help="the depth value to be sharp, as in the depth file (metres: 1/m), after mirroring",
    )
    focus.add_argument(
        "--focus-track", metavar="TEXT", help='keyframes for a clip: "frame: value [easing], ...", value or point (x, y) in fractions'
    )
    group.add_argument(
        "--focus-each-frame", action="store_true", help="clips: measure focus in every frame and smooth it, instead of once in the first"
    )

    group = command.add_argument_group("blur")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument(
        "--strength",
        type=float,
        metavar="R",
        help="blur radius in px, at 1024 px image width, that the whole depth range gets (default: 24)",
    )
    amount.add_argument("--k", type=float, metavar="PX", help="blur radius in px of this image per unit of depth difference")
    amount.add_argument("--exif", action="store_true", help="the lens the photo was taken with; needs metric depth")
    group.add_argument("--f-number", type=float, metavar="N", help="a real lens: aperture, e.g. 1.8; needs --focal-length and metric depth")
    group.add_argument("--focal-length", type=float, metavar="MM", help="focal length in mm")
    group.add_argument("--sensor-width", type=float, metavar="MM", help="sensor side along the image's width in mm (default: 36)")
    group.add_argument(
        "--focus-distance", type=float, metavar="M", help="distance in focus in metres; takes the place of the focus options"
    )

    group = command.add_argument_group("lens looks")
    for name, (kind, metavar, words) in (LOOKS | LIGHTS).items():
        group.add_argument("--blade-rotation" if name == "rotation" else _flag(name), dest=name, type=kind, metavar=metavar, help=words)
    group.add_argument("--aperture-picture", metavar="FILE", help="grey picture of the aperture's shape, white lets light through")

    group = command.add_argument_group("result")
    group.add_argument(
        "--linear", action="store_true", help="the input is linear light and the output stays linear (EXR always is; video files never are)"
    )
    group.add_argument(
        "--bits", type=int, choices=(8, 16), help="PNG and TIFF: bits per channel (default: as the input); EXR: 16 = half float"
    )
    group.add_argument(
        "--fps", type=_rate, metavar="N", help="frames per second of a video made from a folder, e.g. 24 or 30000/1001 (default: 24)"
    )
    group.add_argument(
        "--anew", action="store_true", help="clips: throw away what a stopped run has kept for OUT, instead of going on from there"
    )
    group.add_argument("--quality", default="fast", metavar="NAME", help="fast (default), or reference: aperture rays, slow")
    group.add_argument("--rays", type=int, default=1024, metavar="N", help="quality reference: rays per pixel (default: 1024)")
    group.add_argument("--overlay", metavar="FILE", help="also write a picture that shows what is in focus (of the first frame)")

    depth_cli.add_command(commands)
    models_cli.add_commands(commands)

    command = commands.add_parser(
        "synthesize",
        help="write test scenes with exact truth",
        description="Write seeded scenes with exact disparity, layers, matte and ray-traced truth. A stopped run goes on where it stopped.",
    )
    command.set_defaults(run=_synthesize, interrupted="interrupted; finished cases are kept, the same command goes on from there.")
    add = command.add_argument
    add("output", metavar="OUT", help="folder for the cases: NNNNNN.npz and NNNNNN.json")
    add("--count", type=_whole(1), required=True, metavar="N", help="how many cases")
    add("--seed", type=_whole(0), default=0, metavar="N", help="another number gives other scenes (default: 0)")
    add("--kinds", type=_words, metavar="A,B", help="portrait, three, ground, plane (default: all)")
    add("--size", type=_whole(1), default=416, metavar="PX", help="width and height (default: 416)")
    add("--k", type=_list_of(float, 0), default=[16.0, 32.0, 40.0], metavar="K,K", help="blur strengths to choose from (default: 16,32,40)")
    add("--rays", type=_whole(1), default=1024, metavar="N", help="aperture rays per pixel of the truth (default: 1024)")
    add("--photos", metavar="DIR", help="folder of pictures to use as surfaces instead of drawn ones")
    add("--workers", type=_whole(1), default=1, metavar="N", help="processes (default: 1)")

    command = commands.add_parser(
        "judge",
        help="score the renderer against ray-traced truth",
        description="Score the renderer: truth by rays, points of light, invariants, clips, wrong depth. Prints a Markdown report.",
    )
    command.set_defaults(run=_judge)
    add = command.add_argument
    add("cases", nargs="?", metavar="CASES_DIR", help="cases of 'bokeh synthesize' (default: small ones made here, about 2 minutes)")
    add("-o", "--output", metavar="DIR", help="also write judge.json, judge.md and plots there")
    add("--quality", default="fast", metavar="NAME", help="of the renderer: fast (default) or reference")
    add("--inputs", type=_words, metavar="A,B", help="what it is given: composite, matte, plate, layers (default: all that the cases hold)")
    add("--seeds", type=_list_of(int, 0), metavar="N,N", help="seeds of the scenes made here (default: 1,2; --full: 1 to 8)")
    add("--full", action="store_true", help="scenes made here of full size, 1024 rays, k 8 to 64, more of wrong depth: about an hour")
    add("--speed", action="store_true", help="also time and memory at 512, 1024 and 2048 px")

    train_cli.add_commands(commands)
    batch_cli.add_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    args = argparse.Namespace()
    try:
        build_parser().parse_args(argv, args)
        args.run(args)
    except BokehError as error:
        print(f"bokeh: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # disk full, no permission
        print(f"bokeh: {error.filename or 'file'}: {error.strerror or error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bokeh: {getattr(args, 'interrupted', INTERRUPTED)}", file=sys.stderr)
        return 130
    return 0


# bokeh demo

DEMO_STRENGTH = 24.0


def _demo(args: argparse.Namespace) -> None:
    import torch

    from .media import Picture, write_picture
    from .optics.defocus import make_defocus
    from .optics.focus import from_point
    from .optics.lens import Lens
    from .render import render
    from .synthesis.demo import demo_scene

    if not 64 <= args.width <= 8192:
        raise BokehError(f"--width is {args.width}; expected 64 to 8192 px.")
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise BokehError(f"{folder} is a file; expected a folder for the pictures.")
    scene = demo_scene(args.seed, args.width, round(args.width * 2 / 3))
    image, disparity, points = scene["image"][None], scene["disparity"][None], scene["focus_points"]

    def save(name: str, pixels: torch.Tensor, bits: int = 8) -> torch.Tensor:
        write_picture(folder / name, Picture(pixels), bits)
        print(folder / name)
        return pixels

    def defocus(point: str, strength: float):
        return make_defocus(disparity, Lens(strength=strength), from_point(disparity, *points[point]), width=args.width)

    save("depth.png", disparity.expand(3, -1, -1), 16)
    sheet = {
        "sharp": save("sharp.png", image[0]),
        "what is in focus": save("overlay.png", defocus("middle", DEMO_STRENGTH).overlay(image.clamp(0, 1))[0]),
    }
    results = [("near", 1), ("middle", 1), ("far", 1), ("middle", 2)]
    with bar(len(results), "rendering") as progress:
        for done, (point, times) in enumerate(results, start=1):
            pixels = render(image, defocus(point, times * DEMO_STRENGTH))[0]
            sheet[f"focus {point}, strength {times * DEMO_STRENGTH:g}"] = save(
                f"focus_{point}_strength_{times * DEMO_STRENGTH:g}.png", pixels
            )
            progress(done, len(results))
    save("contact_sheet.png", _contact_sheet(sheet, columns=3))


def _contact_sheet(pictures: dict, columns: int):
    """Named pictures [3, H, W] in one, side by side and row by row, each with its name below."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    from .media import quantised

    _, height, width = next(iter(pictures.values())).shape
    caption = max(12, width // 30)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + 2 * caption)), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for index, (name, pixels) in enumerate(pictures.items()):
        x, y = index % columns * width, index // columns * (height + 2 * caption)
        sheet.paste(Image.fromarray(quantised(pixels.permute(1, 2, 0).numpy(), 8)), (x, y))
        draw.text((x + width / 2, y + height + caption), name, fill=(230, 230, 230), font=ImageFont.load_default(caption), anchor="mm")
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255).permute(2, 0, 1)


# bokeh render


def _render(args: argparse.Namespace) -> None:
    _check_options(args)
    from . import media
    from .render import QUALITIES
    from .video.clips import open_clip
    from .video.streaming import MatteClip, PlateClip

    if args.quality not in QUALITIES:
        raise BokehError(f"The quality '{args.quality}' is unknown; use one of {', '.join(QUALITIES)}.")
    output = Path(args.output)
    _check_output(output, args)
    clip = open_clip(args.image)
    to_video = _check_kind(output, clip, args)
    linear = args.linear or clip.linear
    files = renderers_cli.find_files(args)

    with _kept(args, clip, output, files) as kept, _depth_of(args, clip, output, files, kept) as depth:
        matte = plate = None
        if args.matte:
            with bar(len(clip), "reading matte") as progress:
                matte = MatteClip(args.matte, len(clip), clip.size, progress)
        if args.clean_plate:
            plate = PlateClip(args.clean_plate, len(clip), clip.size, lambda p: _in_light(p, args.linear or p.linear, linear))
        for note in (depth.note, matte.note if matte else ""):
            if note:
                say(note)
        lens = _lens(args)
        focus = _focus(args, clip, depth, lens, linear)
        k = _k(args, lens, focus, depth, clip.size[1])

        if args.overlay:
            _write_overlay(args.overlay, clip, depth, focus, k, lens, linear)
        made_linear = linear and args.renderer == renderers_cli.PHYSICAL  # the networks work on display-encoded pictures
        exr_out = output.suffix.lower() == ".exr" if clip.is_picture else clip.linear
        wanted = (args.linear or exr_out) and not to_video
        for finished in _rendered(args, files, clip, depth, focus, k, lens, matte, plate, linear, kept):
            pictures = [_in_light(picture, made_linear, wanted) for picture in finished.pictures]
            if kept is None:
                (picture,) = pictures
                if picture.alpha is not None and output.suffix.lower() in (".jpg", ".jpeg"):
                    say("JPEG holds no transparency; the alpha channel was left out.")
                media.write_picture(output, picture, args.bits)
                continue
            kept.add(pictures)
            if finished.resumable:
                kept.mark(finished.carry)
        if kept is not None:
            kept.finish(args.fps)
    print(output)


def _rendered(args, files, clip, depth, focus, k, lens, matte, plate, linear, kept):
    """The frames that are not finished yet, some at a time: resume.Finished."""
    from .video.resume import Finished
    from .video.stabilisation import find_shots
    from .video.streaming import render_frames

    frames = len(clip)
    start, carry = (kept.done, kept.carry) if kept is not None else (0, None)
    if start == frames:
        return
    physical = args.renderer == renderers_cli.PHYSICAL
    display = (_in_light(picture, linear, False) for picture in clip)
    shots = [0]
    if frames > 1 and (physical or (args.cuts_found and args.fidelity != renderers_cli.PUBLISHED)):
        with bar(frames, "finding cuts") as progress:
            shots = find_shots(_watched((picture.pixels for picture in display), frames, progress))
    with bar(frames, "rendering") as progress:
        if not physical:
            in_light = partial(_in_light, linear=linear, wanted=False)
            yield from renderers_cli.render_frames(
                args, files, clip, depth, focus, k, in_light=in_light, shots=shots, start=start, carry=carry, progress=progress
            )
            return
        chunks = render_frames(
            clip,
            depth,
            focus,
            k,
            lens,
            linear=linear,
            quality=args.quality,
            rays=args.rays,
            matte=matte,
            plate=plate,
            snap_edges=args.snap_edges,
            shots=shots,
            start=start,
            progress=progress,
        )
        yield from map(Finished, chunks)


def _watched(items, total: int, progress):
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, total)


@contextmanager
def _kept(args: argparse.Namespace, clip, output: Path, files: dict[str, Path]):
    """Yield the PartialClip that an interrupted run of the same command has left, or a new one; None for a single picture.

    `files` gets the depth model's, if one is needed, so that another model is not taken for the same.
    """
    if not args.depth:
        files["depth_model"] = depth_cli.chosen_model(clip, args, metric=_needs_metres(args))
    if clip.is_picture:
        yield None
        return
    from .video.resume import PartialClip, discard, fingerprint

    if args.anew:
        discard(output)
    read = ("image", "depth", "focus_mask", "matte", "clean_plate", "aperture_picture")
    unlike = ("command", "run", "output", "overlay", "fps", "models", "anew", *read)
    settings = {_flag(name): value for name, value in vars(args).items() if name not in unlike}
    settings |= {"IMAGE" if name == "image" else _flag(name): fingerprint(path) for name in read if (path := getattr(args, name))}
    settings |= {f"file of {name}": fingerprint(path) for name, path in files.items()}
    kept = PartialClip(output, clip, {"version": __version__, **settings}, bits=args.bits)
    if kept.done:
        say(f"going on after {kept.done} of {len(clip)} frames, kept in {kept.folder}.")
    try:
        kept.begin()
        yield kept
    except BaseException:
        if kept.holds_work:
            say(f"{kept.done} of {len(clip)} frames are finished and kept in {kept.folder}; the same command goes on from there.")
        else:
            kept.remove()
        raise


def _needs_metres(args: argparse.Namespace) -> bool:
    return bool(args.exif or args.f_number is not None or args.focus_distance is not None)


@contextmanager
def _depth_of(args: argparse.Namespace, clip, output: Path, files: dict[str, Path], kept):
    """Yield the DepthClip of `clip`: the depth file, or maps by an installed depth model, kept with the frames of a clip."""
    from .video.streaming import DepthClip

    def opened(source, unit):
        with bar(len(clip), "reading depth") as progress:
            return DepthClip(source, len(clip), clip.size, unit, args.depth_far_is_bright, progress)

    if args.depth:
        yield opened(args.depth, args.depth_unit)
        return
    place = kept.depth_file if kept is not None else None
    with depth_cli.estimated(clip, args, metric=_needs_metres(args), beside=output, path=files["depth_model"], kept=place) as maps:
        yield opened(maps, "metres" if maps.metric else "relative")


def _check_options(args: argparse.Namespace) -> None:
    renderers_cli.check(args)
    chosen = {name: getattr(args, name) for name in ("focus", "focus_mask", "focus_disparity", "focus_track")}
    focus = next((_flag(name) for name, value in chosen.items() if value is not None), None)
    amount = "--strength" if args.strength is not None else "--k" if args.k is not None else "--exif" if args.exif else None
    lens = [name for name in ("f_number", "focal_length", "sensor_width") if getattr(args, name) is not None]
    if amount and lens:
        raise BokehError(f"{amount} and {_flag(lens[0])} both set the blur; give only one of them.")
    if lens and (args.f_number is None or args.focal_length is None):
        raise BokehError("A real lens needs both --f-number and --focal-length; or use --strength alone.")
    if args.focus_distance is not None and focus:
        raise BokehError(f"{focus} and --focus-distance both set the focus; give only one of them.")
    if args.focus_distance is not None and not args.focus_distance > 0:
        raise BokehError(f"--focus-distance is {args.focus_distance:g} m; expected more than 0.")
    if args.depth is None and (args.depth_unit != "relative" or args.depth_far_is_bright):
        raise BokehError("--depth-unit and --depth-far-is-bright say what the numbers of --depth are; give it, or leave them out.")
    of_depth_model = ("model", "resolution") + (("models", "device") if args.renderer == renderers_cli.PHYSICAL else ())
    model = next((name for name in of_depth_model if getattr(args, name)), None)
    if args.depth is not None and model:
        raise BokehError(f"--depth and {_flag(model)} do not go together: a depth model estimates depth where no file gives it.")
    metric = args.depth is None or args.depth_unit != "relative"
    if args.focus_distance is not None and not metric:
        raise BokehError("--focus-distance needs metric depth; say --depth-unit metres or disparity, or set the focus another way.")
    if (lens or args.exif) and not metric:
        raise BokehError("A real lens needs metric depth; say --depth-unit metres or disparity if the file is, or use --strength.")
    if args.depth_far_is_bright and args.depth_unit != "relative":
        raise BokehError(f"--depth-far-is-bright and --depth-unit {args.depth_unit} do not go together; the unit says what is near.")
    if args.focus_each_frame and (args.focus_distance is not None or focus in ("--focus-disparity", "--focus-track")):
        raise BokehError(f"--focus-each-frame and {focus or '--focus-distance'} do not go together; the focus is already given.")
    if args.snap_edges and args.matte:
        raise BokehError("--snap-edges and --matte both say where the edges are; a matte knows better, so leave --snap-edges out.")
    if args.rays < 1:
        raise BokehError(f"--rays is {args.rays}; expected 1 or more.")
    for name in ("strength", "k"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise BokehError(f"{_flag(name)} is {value:g}; expected 0 or more.")


def _check_output(output: Path, args: argparse.Namespace) -> None:
    """No file that is read may be written, and no two outputs may be one."""
    read = {"IMAGE": args.image, "--depth": args.depth, "--focus-mask": args.focus_mask, "--matte": args.matte}
    read |= {"--clean-plate": args.clean_plate, "--aperture-picture": args.aperture_picture}
    real = os.path.realpath  # Path.resolve raises at links that lead in a circle
    inputs = {real(name): flag for flag, name in read.items() if name}
    for flag, target in (("-o", output), ("--overlay", args.overlay)):
        if target and real(target) in inputs:
            raise BokehError(f"{flag} {target} is also {inputs[real(target)]}; choose another name, inputs are never overwritten.")
    if args.overlay and real(args.overlay) == real(output):
        raise BokehError(f"-o and --overlay are both {output}; choose two names.")


def _check_kind(output: Path, clip, args: argparse.Namespace) -> bool:
    """Whether OUT fits what is rendered, found before work starts. Returns True when OUT is a video file."""
    from . import media
    from .video.clips import check_clip_target, frame_names

    if args.overlay:
        media.check_writable(args.overlay)
    if clip.is_picture:
        media.check_writable(output, args.bits)
        to_video = False
    else:
        to_video = check_clip_target(output)
        if not to_video:
            frame_names(clip)
    if args.fps is not None and not (to_video and clip.rate is None):
        raise BokehError("--fps is for a video made from a folder of frames; a video keeps its own rate, so leave --fps out.")
    if args.upscale is not None and args.upscale != 1 and not clip.is_picture:
        raise BokehError("--upscale is for single pictures; a clip keeps its size, so leave it out.")
    if args.linear and clip.rate is not None:
        raise BokehError("--linear is for pictures; a video file is never linear light, so leave it out.")
    return to_video


def _lens(args: argparse.Namespace):
    from .media import read_plane
    from .optics.lens import Aperture, Lens

    def given(names) -> dict:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    picture = read_plane(args.aperture_picture, "aperture picture")[0] if args.aperture_picture else None
    aperture, lights = Aperture(**given(LOOKS), picture=picture), given(LIGHTS)
    if args.exif:
        lens = Lens.from_exif(args.image, aperture=aperture)
        return replace(lens, focus_distance=args.focus_distance or lens.focus_distance, **lights)
    setting = given(("strength", "f_number", "focal_length", "sensor_width"))
    if args.f_number is not None:
        setting["focus_distance"] = args.focus_distance
    return Lens(**setting, aperture=aperture, **lights)


def _focus(args: argparse.Namespace, clip, depth, lens, linear: bool):
    """[frames] focus disparities for the whole clip, known before the first frame is rendered."""
    import torch

    from .media import read_plane
    from .optics import focus as focusing
    from .video.clips import open_clip

    frames = len(clip)
    each = args.focus_each_frame
    pictures = masks = None
    if args.focus_disparity is not None:
        return focusing.from_value(args.focus_disparity, frames)
    if args.focus_track is not None:
        return _track(args.focus_track, depth)
    if args.focus is not None:
        x, y = _point(args.focus, clip.size)
    elif args.focus_mask is not None:
        masks = open_clip(args.focus_mask)
        if masks.is_picture:
            mask = read_plane(args.focus_mask, "focus mask")[0]
            masks = [mask] * frames
        elif len(masks) != frames:
            raise BokehError(
                f"{args.focus_mask} has {len(masks)} masks for {frames} frame{'s' * (frames > 1)}; "
                "expected one for each, or a single picture."
            )
        else:
            each = True
            masks = masks.planes("focus mask")
    elif args.focus_distance is not None or (lens.focus_distance is not None and depth.metric):
        return focusing.from_value(1 / (args.focus_distance or lens.focus_distance), frames)
    else:
        pictures = clip

    found = []
    with bar(frames if each else 1, "finding focus") as progress:
        beside = masks if masks is not None else pictures if pictures is not None else [None] * frames
        for disparity, other in zip(depth, beside, strict=False):
            if args.focus is not None:
                found.append(focusing.from_point(disparity[None], x, y))
            elif masks is not None:
                found.append(focusing.from_mask(disparity[None], other))
            else:
                found.append(focusing.auto(disparity[None], _in_light(other, linear, False).pixels[None].clamp(0, 1)))
            if not each:
                break
            progress(len(found), frames)
    measured = torch.cat(found)
    return focusing.smooth(measured) if each else measured.expand(frames)


def _track(text: str, depth):
    """A focus track as one value per frame; its points are looked up in their own frames, read one after the other."""
    from .optics import focus as focusing

    track = focusing.FocusTrack.parse(text)
    points = {min(key.frame, len(depth) - 1) for key in track.keys if isinstance(key.value, tuple)}
    seen = {}
    if points:
        for index, disparity in enumerate(depth):
            if index in points:
                seen[index] = disparity[None]
            if index == max(points):
                break

    def number(key):
        if not isinstance(key.value, tuple):
            return key
        disparity = seen[min(key.frame, len(depth) - 1)]
        return replace(key, value=float(focusing.from_point(disparity, *key.value)[0]))

    return focusing.FocusTrack(tuple(number(key) for key in track.keys)).values(len(depth))


def _point(text: str, size: tuple[int, int]) -> tuple[float, float]:
    """X,Y in pixels, or in fractions when both are 0..1 and written with a dot, as fractions of width and height."""
    height, width = size
    pieces = [piece.strip() for piece in text.split(",")]
    try:
        x, y = (float(piece) for piece in pieces)
    except ValueError as error:
        raise BokehError(f"--focus is '{text}'; expected two numbers X,Y such as 812,430 (pixels) or 0.5,0.4 (fractions).") from error
    if all("." in piece for piece in pieces) and 0 <= x <= 1 and 0 <= y <= 1:
        return x, y
    if not (0 <= x < width and 0 <= y < height):
        raise BokehError(f"--focus {text} lies outside the picture; expected 0,0 to {width - 1},{height - 1}, or fractions 0.0 to 1.0.")
    return (int(x) + 0.5) / width, (int(y) + 0.5) / height


def _k(args: argparse.Namespace, lens, focus, depth, width: int):
    import torch

    if args.k is not None:
        return torch.full_like(focus, args.k)
    return lens.k(width, focus, metric=depth.metric, disparity_range=depth.span[1] - depth.span[0])


def _write_overlay(target: str, clip, depth, focus, k, lens, linear: bool) -> None:
    from .media import Picture, write_picture
    from .optics.defocus import Defocus

    picture = _in_light(next(iter(clip)), linear, False)
    defocus = Defocus(next(iter(depth))[None], focus[:1], k[:1], lens, depth.metric)
    overlay = Picture(defocus.overlay(picture.pixels[None].clamp(0, 1))[0])
    write_picture(target, _in_light(overlay, False, Path(target).suffix.lower() == ".exr"))
    print(target)


def _in_light(picture, linear: bool, wanted: bool):
    """The picture in linear light (`wanted`) or display-encoded; `linear` says which it is in now."""
    from .render.light import to_display, to_linear

    if linear == wanted:
        return picture
    return replace(picture, pixels=(to_linear if wanted else to_display)(picture.pixels))


# bokeh synthesize, bokeh judge


def _synthesize(args: argparse.Namespace) -> None:
    from .synthesis.dataset import write_dataset
    from .synthesis.scenes import KINDS, make_scene

    if args.photos is not None and not Path(args.photos).is_dir():
        raise BokehError(f"--photos {args.photos}: no such folder; expected one with PNG, JPEG or WebP pictures.")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise BokehError(f"{args.output} is a file; expected a folder for the cases.")
    kinds = KINDS if args.kinds is None else args.kinds
    make_scene(kinds[0], args.seed, args.size, photos=args.photos)  # tried first, so that bad settings leave no trace
    with bar(args.count, "tracing", "case") as progress:
        write_dataset(
            args.output,
            args.count,
            seed=args.seed,
            kinds=kinds,
            size=args.size,
            k=args.k,
            rays=args.rays,
            photos=args.photos,
            workers=args.workers,
            progress=progress,
        )
    print(args.output)


def _judge(args: argparse.Namespace) -> None:
    from functools import partial

    from .judge import INPUTS, judge_renderer, measure_speed, seeded_cases, stored_cases
    from .judge_report import markdown, write_report
    from .render import QUALITIES, composite, render
    from .render.rays import trace

    if args.quality not in QUALITIES:
        raise BokehError(f"The quality '{args.quality}' is unknown; use one of {', '.join(QUALITIES)}.")
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise BokehError(f"{args.output} is a file; expected a folder for the report.")
    if args.cases:
        if args.seeds or args.full:
            raise BokehError("--seeds and --full are for scenes made here; leave them out, or leave CASES_DIR out.")
        cases = stored_cases(args.cases)
    elif args.full:
        cases = seeded_cases(args.seeds or range(1, 9), ks=(8.0, 16.0, 32.0, 64.0), size=416, rays=1024)
    else:
        cases = seeded_cases(args.seeds or (1, 2))
    ceiling = composite if args.quality == "fast" else partial(trace, rays=1000)  # other rays than the truth's
    with bar(len(cases), "judging", "part") as progress:
        report = judge_renderer(
            partial(render, linear=True, quality=args.quality),
            cases,
            inputs=args.inputs or INPUTS,
            ceiling=ceiling,
            robust=8 if args.full else 2,
            progress=progress,
        )
    if args.speed:
        report["speed"] = measure_speed(args.quality)
    source = Path(args.cases).resolve().name if args.cases else "full seeded scenes" if args.full else "small seeded scenes"
    title = f"Quality {args.quality}, {source}"
    print(markdown(report, title))
    if args.output:
        for path in write_report(args.output, report, title):
            print(path, file=sys.stderr)


# Options


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _list_of(kind: type, low: float):
    def parse(text: str) -> list:
        try:
            numbers = [kind(word) for word in text.split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(low <= n < float("inf") for n in numbers):
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"'{text}' is no list of {whole}numbers of {low} or more; expected them such as 16,32")
        return numbers

    return parse


def _whole(low: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of {low} or more")
        return int(text)

    return parse


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is no frame rate; expected a number above 0 such as 24 or 30000/1001")
    return rate


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
