"""The commands `bokeh models`, `bokeh models check`, `get` and `convert`: what is installed, what it is, fetching it, making it safe."""

import sys
from pathlib import Path

from .checkpoints.catalogue import CATALOGUE, DEPTH_FOLDERS, Entry, Report, entry, model_files, model_roots, user_folder
from .errors import BokehError
from .terminal import bar

HELP = f"""
Searched are, in this order: every --models DIR, $COMFYUI_PATH/models with the places that $COMFYUI_PATH/extra_model_paths.yaml
names, and this user's own folder ({user_folder()}).
A model found in any of them serves ComfyUI's folder of that name: models/depthanything/depth_anything_v2_vits.pth and so on.
"""


def families() -> list:
    """What tells checkpoints apart: functions report(tensors, path) -> Report, or None for a file of another family.

    tensors  name -> tensor as read_checkpoint gives them; empty for a file that holds live Python objects and for a folder,
             which a family may look into by its own means
    A new family adds its function here.
    """
    from .depth.report import report as depth
    from .salient.ldf import report as salient
    from .samplers.any_to_bokeh.checkpoint import report as any_to_bokeh
    from .samplers.bokehdiff.checkpoint import report as bokehdiff
    from .samplers.kontext_stack.adapter import report as kontext_adapter
    from .samplers.magicbokeh.report import report as magicbokeh

    return [depth, kontext_adapter, salient, magicbokeh, any_to_bokeh, bokehdiff]


def identify(path: str | Path, name: str = "") -> Report:
    """What the file at `path` is; `name` stands for its file name, which may tell variants apart. Raises BokehError when unreadable."""
    from .checkpoints.reading import read_checkpoint

    path = Path(path)
    refused, checkpoint = None, None
    if not path.is_dir():
        try:
            checkpoint = read_checkpoint(path)
        except BokehError as error:
            refused = error
    tensors = checkpoint.tensors if checkpoint else {}
    shown = path.with_name(name) if name else path
    found = next(filter(None, (family(tensors, shown) for family in families())), None)
    if found is None and refused:
        raise refused
    if found is None:
        some = ", ".join(list(tensors)[:3]) or "none"
        found = Report("nothing this library knows", problems=(f"The names of its tensors are unknown ({some}, ...).",))
    if checkpoint is None:
        return found
    return Report(found.title, (*found.facts, *_general(checkpoint)), found.problems, found.licence)


def _general(checkpoint) -> list[tuple[str, str]]:
    """What can be said of every file of tensors."""
    tensors = checkpoint.tensors
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    numbers = sum(tensor.numel() for tensor in tensors.values())
    prefix = next(iter(tensors)).split(".")[0] + "."
    shared = prefix if len(tensors) > 1 and all(name.startswith(prefix) for name in tensors) else "none"
    facts = [
        ("container", f"entry '{checkpoint.container}' of the file" if checkpoint.container else "bare table of tensors"),
        ("tensors", f"{len(tensors)} with {numbers / 1e6:.2f} million numbers"),
        ("dtype", ", ".join(kinds)),
        ("prefix of all names", shared),
    ]
    facts += [(f"header: {key}", value) for key, value in sorted(checkpoint.metadata.items()) if len(value) <= 200]
    return facts


def add_commands(commands) -> None:
    """Add `models` to the command's sub-parsers."""
    import argparse

    parser = commands.add_parser(
        "models",
        help="list, check and download model files",
        description="List the model files that are installed and those that could be.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _folders(parser)
    parser.set_defaults(run=_list)
    actions = parser.add_subparsers(dest="action", metavar="check | get | convert")
    check = actions.add_parser("check", help="say what a file is and whether it is complete")
    check.add_argument("file", metavar="FILE", help="a checkpoint file, or a folder of a diffusers model")
    check.add_argument(
        "--against",
        metavar="FILE",
        help="what it was trained from. Any-to-Bokeh's UNet: the public SVD-xt UNet, to see what training changed. DAV2_dsfa_release.pth: "
        "depth_anything_v2_metric_vkitti_vitl.pth, to find its attention scaling",
    )
    check.set_defaults(run=_check)
    get = actions.add_parser(
        "get",
        help="download a model by its name",
        description="Download one model of the list, verify it, and put it where it belongs. A broken download goes on where it stopped.",
    )
    get.add_argument("name", metavar="NAME", help="as 'bokeh models' lists them")
    _folders(get)
    change = actions.add_parser(
        "convert",
        help="turn lora.pkl into a safetensors file",
        description="Write MagicBokeh's lora.pkl, which holds live Python objects, as plain tensors. Nothing in it is run.",
    )
    change.add_argument("source", metavar="lora.pkl", help="as the authors published it")
    change.add_argument("target", metavar="magicbokeh.safetensors", help="the file to write; it must not exist")
    change.set_defaults(run=_convert)
    get.set_defaults(run=_get, interrupted="interrupted; what has arrived is kept, the same command goes on from there.")


def _folders(parser) -> None:
    parser.add_argument(
        "--models", action="append", default=[], metavar="DIR", help="a folder like ComfyUI's models, or a flat one (may be repeated)"
    )


def _list(args) -> None:
    installed, seen = [], set()
    for folder in dict.fromkeys([*DEPTH_FOLDERS, *(one.folder for one in CATALOGUE)]):
        for path in model_files(folder, args.models):
            known = _entry_of(path, folder)
            if path.resolve() in seen or not (known or folder in DEPTH_FOLDERS):
                continue  # users keep hundreds of files of others in folders such as loras
            seen.add(path.resolve())
            installed.append((path, known))
    print("installed" if installed else "No model is installed.")
    for path, known in installed:
        try:
            report = identify(path)
            words, licence = report.title, known.licence if known else report.licence
            if report.problems:
                words += "; NOT USABLE: " + " ".join(report.problems)
        except BokehError as error:
            words, licence = f"NOT USABLE: {error}", known.licence if known else ""
        print(f"  {path}\n      {words}{f'; licence: {licence}' if licence and 'NOT USABLE' not in words else ''}")
    missing = [one for one in CATALOGUE if one not in [known for _, known in installed]]
    if missing:
        print("\nnot installed (get one with 'bokeh models get NAME')")
    width = max((len(one.name) for one in missing), default=0)
    for one in missing:
        size = f"{one.size / 1e6:.0f} MB" if one.size else "size unknown"
        print(f"  {one.name.ljust(width)}  {one.title}; {size}; licence: {one.licence}")
        print(f"  {'':{width}}  belongs in models/{one.folder} as {one.file}{'' if one.url else f'; by hand from {one.page}'}")


def _entry_of(path: Path, folder: str) -> Entry | None:
    return next((one for one in CATALOGUE if one.file == path.name and one.folder == folder), None)


def _check(args) -> None:
    report = identify(args.file)
    print(report.title)
    facts = [*report.facts, ("licence", report.licence)]
    width = max(len(what) for what, _ in facts)
    for what, value in facts:
        print(f"  {what.ljust(width)}  {value}")
    if args.against:
        if "DSFA" in report.title:
            from .depth.report import against
        else:
            from .samplers.any_to_bokeh.checkpoint import against

        print(f"  {against(args.file, args.against)}")
    for problem in report.problems:
        print(f"  PROBLEM: {problem}")
    if report.problems:
        raise BokehError(f"{args.file} cannot be used as it is.")


def _convert(args) -> None:
    from .samplers.magicbokeh.lora_file import convert

    content = convert(args.source, args.target)
    print(f"{args.target}: ranks {content.rank_unet} (UNet), {content.rank_vae} (VAE), {content.rank_bokeh} (bokeh)")


def _get(args) -> None:
    from .checkpoints.download import download

    wanted = entry(args.name)
    if not wanted.url:
        raise BokehError(f"{wanted.title} cannot be fetched by this command: {wanted.how_to_get}.")
    already = [path for path in model_files(wanted.folder, args.models) if path.name == wanted.file]
    if already:
        raise BokehError(f"{wanted.title} is already there: {already[0]}.")
    target = model_roots(args.models)[0] / wanted.folder / wanted.file
    print(f"{wanted.title}; licence: {wanted.licence}; {wanted.page}", file=sys.stderr)

    def check(part: Path) -> None:
        report = identify(part, wanted.file)
        if report.problems and wanted.folder in DEPTH_FOLDERS:
            raise BokehError(f"{wanted.file} arrived whole but is not what was expected: {' '.join(report.problems)} It was deleted.")

    with bar(round((wanted.size or 0) / 1e6), "downloading", "megabyte") as progress:
        download(
            wanted.url,
            target,
            size=wanted.size,
            sha256=wanted.sha256,
            check=check,
            progress=lambda done, total: progress(done / 1e6, round(total / 1e6)),
        )
    print(target)
