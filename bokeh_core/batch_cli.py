"""The commands `bokeh batch` and `bokeh farm`: many shots, on this machine and on several ComfyUI servers."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from .errors import BokehError
from .terminal import bar

BATCH = """
Every picture, video file and folder of frames in FOLDER is a job. Done ones are skipped when the command is given again: those made with
the same options from inputs that have not changed. A clip that was stopped goes on where it stopped. One that fails does not stop the rest.

examples
  bokeh batch photos/ -o blurred/
  bokeh batch photos/ -o blurred/ --depth maps/ --workers 8 --options "--strength 30 --blades 7"
"""
FARM = """
JOBS are workflows in ComfyUI's API format (Export (API) in its menu), one file for each shot. Every server works on one at a time; what a
server saves comes to OUT/NAME/. The job of a server that is lost goes to another one. All files and models that a workflow names must be
on every server. Shots whose folder is there are skipped.

example
  bokeh farm shots/*.json -o rendered/ --server http://render1:8188 --server http://render2:8188
"""


def add_commands(commands) -> None:
    """Add `batch` and `farm` to the command's sub-parsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("batch", help="render a folder of pictures and clips", epilog=BATCH, formatter_class=raw)
    parser.set_defaults(run=_batch, interrupted="interrupted; what is finished is kept, the same command goes on from there.")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="pictures, video files, and folders of frames")
    add("-o", "--output", required=True, metavar="OUT", help="folder for the results, by the names of the inputs")
    add("--depth", metavar="DIR", help="folder with depth by the same names; without it a depth model estimates it")
    add("--options", default="", metavar="TEXT", help="options of 'bokeh render' for all of them, in one pair of quotes")
    add("--format", default="", metavar="SUFFIX", help="of the pictures that are written, e.g. png (default: as the input)")
    add("--workers", type=int, default=0, metavar="N", help="processes (default: the cores; fewer where memory or a GPU must do for all)")

    parser = commands.add_parser("farm", help="spread shots over several ComfyUI servers", epilog=FARM, formatter_class=raw)
    parser.set_defaults(run=_farm, interrupted="interrupted; what is finished is kept. The servers finish what they have begun.")
    add = parser.add_argument
    add("jobs", nargs="+", metavar="JOB.json", help="workflows in API format")
    add("-o", "--output", required=True, metavar="OUT", help="folder for what the servers save")
    add("--server", action="append", required=True, metavar="URL", help="address of a ComfyUI, e.g. http://render1:8188; several times")


def _summary(total: int, skipped: int, failed: dict[str, str], one: str) -> None:
    """Print it; raise BokehError when something failed."""
    print(f"{total - skipped - len(failed)} done, {skipped} skipped, {len(failed)} failed")
    for name, sentence in failed.items():
        print(f"  {name}: {sentence}", file=sys.stderr)
    if failed:
        raise BokehError(f"{len(failed)} of {total} {one} failed; the same command tries them again.")


def _batch(args: argparse.Namespace) -> None:
    from . import batch

    folder, output = Path(args.folder), Path(args.output)
    if not folder.is_dir():
        raise BokehError(f"{folder}: no such folder; 'bokeh render' takes single pictures and clips.")
    if args.depth and not Path(args.depth).is_dir():
        raise BokehError(f"--depth {args.depth}: no such folder; expected one with depth by the names in {folder}.")
    if output.exists() and not output.is_dir():
        raise BokehError(f"{output} is a file; expected a folder for the results.")
    if output.resolve() == folder.resolve() or (args.depth and output.resolve() == Path(args.depth).resolve()):
        raise BokehError(f"-o {output} is also read; choose another folder, inputs are never overwritten.")
    if args.workers < 0:
        raise BokehError(f"--workers is {args.workers}; expected 1 or more.")
    try:
        options = shlex.split(args.options)
    except ValueError as error:
        raise BokehError(f"--options {args.options}: {error}; check its quotes.") from error
    own = next((word for word in options if word.split("=")[0] in ("-o", "--output", "--depth", "--overlay")), None)
    if own:
        raise BokehError(f"--options holds {own}, which is another one for every input; leave it out.")
    suffix = "." + args.format.lower().lstrip(".") if args.format else ""
    jobs = batch.find_jobs(folder, output, Path(args.depth) if args.depth else None, options, suffix)
    _check(jobs[0].command)
    output.mkdir(parents=True, exist_ok=True)
    record = batch.Record(output)
    todo = [job for job in jobs if not record.holds(job)]
    failed: dict[str, str] = {}
    with bar(len(todo), "rendering", "file") as progress:
        done = 0

        def finished(job: batch.Job, sentence: str) -> None:
            nonlocal done
            done += 1
            if sentence:
                failed[job.name] = sentence
            else:
                record.add(job)
            progress(done, len(todo))

        batch.run(todo, min(args.workers or os.cpu_count() or 1, max(1, len(todo))), finished)
    _summary(len(jobs), len(jobs) - len(todo), failed, "inputs")


def _check(command: tuple[str, ...]) -> None:
    """Bad options fail once, at once."""
    from .cli import build_parser

    build_parser().parse_args(list(command))


def _farm(args: argparse.Namespace) -> None:
    from . import farm

    output, servers = Path(args.output), [server.rstrip("/") for server in args.server]
    if foreign := [server for server in servers if not server.startswith(("http://", "https://"))]:
        raise BokehError(f"--server {foreign[0]} is no address of a ComfyUI; expected one such as http://render1:8188.")
    jobs, skipped = {}, 0
    for path in map(Path, args.jobs):
        try:
            prompt = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BokehError(f"{path} is no JSON; expected a workflow in ComfyUI's API format.") from error
        if not isinstance(prompt, dict) or not all(isinstance(node, dict) and "class_type" in node for node in prompt.values()):
            raise BokehError(f"{path} is no workflow in API format; choose Export (API) in ComfyUI's menu.")
        if path.stem in jobs:
            raise BokehError(f"Two jobs are called {path.stem}; rename one of them.")
        if (output / path.stem).is_dir() and any((output / path.stem).iterdir()):
            skipped += 1
        else:
            jobs[path.stem] = prompt
    silent = [server for server in servers if farm.answering(server) is None]
    if len(silent) == len(servers):
        raise BokehError(f"No ComfyUI answers at {', '.join(silent)}; start them, or check the addresses.")
    failed: dict[str, str] = {}
    with bar(len(jobs), "rendering", "job") as progress:
        done = 0

        def finished(name: str, server: str, sentence: str) -> None:
            nonlocal done
            done += 1
            if sentence:
                failed[name] = f"{sentence} ({server})"
            progress(done, len(jobs))

        farm.run(jobs, servers, output, finished)
    _summary(len(jobs) + skipped, skipped, failed, "jobs")
