"""The commands `bokeh train` and `bokeh evaluate`."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from .errors import BokehError
from .terminal import bar, say

HELP = """
A recipe is a small TOML file: copy one that --list shows next to your models and change its paths.
Several GPUs, machines:  accelerate launch -m bokeh_core.cli train RECIPE.toml -o DIR
Losses and pictures:     tensorboard --logdir DIR/tensorboard, DIR/losses.jsonl, DIR/previews

examples
  bokeh train --list
  bokeh train mine.toml --sheet samples.png
  bokeh train mine.toml -o runs/mine
  bokeh train mine.toml -o runs/mine --resume
  bokeh evaluate runs/mine
"""


def add_commands(commands) -> None:
    """Add `train` and `evaluate` to the command's sub-parsers."""
    parser = commands.add_parser(
        "train",
        help="train what the published systems train, by their recipes",
        description="Train by a recipe. Every checkpoint holds, in its folder files, what the loaders of the nodes take.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE.toml", help="what to train from what")
    add("-o", "--output", metavar="DIR", help="folder of the run (default: the recipe's name without .toml)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in DIR, if there is one")
    add("--steps", type=int, metavar="N", help="in place of [train] steps")
    add("--list", action="store_true", help="show the recipes that come with the library")
    add("--sheet", metavar="FILE.png", help="do not train: draw the first samples, one a row, as the recipe makes them")
    add("--rows", type=int, default=8, metavar="N", help="samples on the sheet (default: 8)")
    add("--manifest", nargs=2, metavar=("TABLE.csv", "OUT.jsonl"), help="do not train: make the manifest of a photo collection")

    parser = commands.add_parser(
        "evaluate",
        help="measure what was trained",
        description="Measure a checkpoint on held-out samples, against its untrained start and against simple alternatives.",
    )
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of a run (its newest checkpoint), of a checkpoint, or of its files")
    add("--samples", type=int, default=16, metavar="N", help="held-out samples (default: 16)")
    add("--judge", type=int, default=0, metavar="SEEDS", help="also so many seeds of the scenes of 'bokeh judge' (default: 0)")
    add("-o", "--output", metavar="DIR", help="also write evaluation.json and evaluation.md there")


def _train(args: argparse.Namespace) -> None:
    from .training import settings as recipes

    if args.list:
        for name, path in recipes.shipped().items():
            words = path.read_text(encoding="utf-8").split("\nrecipe", 1)[0]
            print(f"{name}\n  {path}\n  " + " ".join(line.lstrip("# ").strip() for line in words.splitlines() if line.startswith("#")))
        return
    if args.manifest:
        from .training.manifests import write_manifest

        count, left_out = write_manifest(*args.manifest)
        for reason in left_out:
            say(reason)
        print(f"{args.manifest[1]}: {count} photos")
        return
    if not args.recipe:
        raise BokehError("A recipe is missing; 'bokeh train --list' shows those that come with the library.")
    settings = recipes.read(args.recipe)
    if args.steps is not None:
        settings = replace(settings, train=replace(settings.train, steps=args.steps))
    if args.sheet:
        _sheet(settings, args)
        return

    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes on this machine
    task = settings.build()
    for note in task.notes() if first else ():
        say(note)
    from .training.engine import fit

    out = Path(args.output or Path(args.recipe).stem)
    try:
        if first:
            with bar(settings.train.steps, "training", "step") as progress:
                outcome = fit(task, settings, out, resume=args.resume, progress=progress)
        else:
            outcome = fit(task, settings, out, resume=args.resume)
    except KeyboardInterrupt as error:
        args.interrupted = str(error) or "interrupted; --resume goes on from the last checkpoint."
        raise
    if first:
        for name, value in outcome.after.items():
            before = f" (before: {outcome.before[name]:.4g})" if name in outcome.before else ""
            say(f"held out, {name}: {value:.4g}{before}")
        print(outcome.checkpoint)


def _sheet(settings, args: argparse.Namespace) -> None:
    from .media import Picture, check_writable, write_picture
    from .training.sheet import sample_sheet

    check_writable(Path(args.sheet))
    if args.rows < 1:
        raise BokehError(f"--rows is {args.rows}; expected 1 or more.")
    task = settings.build()
    with bar(args.rows, "drawing", "sample") as progress:
        write_picture(args.sheet, Picture(sample_sheet(task, args.rows, progress=progress)))
    print(args.sheet)


def _evaluate(args: argparse.Namespace) -> None:
    import torch

    from .training.evaluate import evaluate, markdown

    if args.samples < 1 or args.judge < 0:
        raise BokehError(f"--samples is {args.samples} and --judge {args.judge}; expected at least 1 and 0.")
    with bar(args.samples, "measuring", "sample") as progress:
        report = evaluate(args.checkpoint, args.samples, args.judge, "cuda" if torch.cuda.is_available() else "cpu", progress)
    text = markdown(report)
    print(text, end="")
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "evaluation.md").write_text(text, encoding="utf-8")
