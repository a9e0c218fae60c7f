"""How good a trained checkpoint is: on held-out samples, against where it started and against simple things it has to beat."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import default_collate

from ..errors import BokehError
from ..judge import seeded_cases
from ..metrics.image import judge as score
from ..optics.defocus import Defocus
from ..optics.lens import Lens
from . import engine
from .settings import parse

Progress = Callable[[int, int], None] | None
TRAINED, START, PHYSICAL = "trained", "untrained start", "the physical renderer"
JUDGED = 1000  # seeds of the judge's scenes from here on: no recipe trains on them


def find(path: str | Path) -> Path:
    """The checkpoint that a path means: a run's folder (its newest), a checkpoint, or the files in one. Raises BokehError."""
    path = Path(path)
    for folder in (path, path.parent):
        if (folder / engine.TRAINED).is_file():
            return folder
    newest = engine.newest_checkpoint(path) if path.is_dir() else None
    if newest is None:
        raise BokehError(f"{path} is neither a run of 'bokeh train' nor one of its checkpoints (folders named steps-N).")
    return newest


def evaluate(path: str | Path, samples: int = 16, judged: int = 0, device: str | torch.device = "cpu", progress: Progress = None) -> dict:
    """Measure a checkpoint.

    path      see `find`
    samples   held-out samples
    judged    seeds of scenes that the judge of the physical renderer scores too; for recipes that render pictures
    progress  called as progress(done, total); may raise to stop

    Returns what JSON can hold: recipe, step, checkpoint, samples; held_out: name -> metric -> mean; and judge: name -> score -> mean dB.
    """
    checkpoint = find(path)
    settings = parse(json.loads((checkpoint / engine.RECIPE).read_text(encoding="utf-8")), checkpoint)
    task = settings.build().to(device).train(False)
    cases = seeded_cases(range(JUDGED, JUDGED + judged)) if judged else {}
    if cases and task.renderer() is None:
        raise BokehError(f"The recipe {settings.recipe} trains no renderer, so there is nothing to judge; leave --judge out.")
    total = 2 * (samples + len(cases))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    held_out: dict[str, list[dict]] = {}
    judge: dict[str, list[dict]] = {}

    def look(name: str) -> None:
        for i in range(samples):
            batch = {key: value.to(device) for key, value in default_collate([task.held_out(i)]).items()}
            with torch.no_grad():
                found = {name: task.measure(batch)} | (task.baselines(batch) if name == START else {})
            for row, metrics in found.items():
                held_out.setdefault(row, []).append({key: float(value) for key, value in metrics.items()})
            step()
        for make in cases.values():
            case = make()
            for row, renderer in {name: task.renderer()}.items() | ({PHYSICAL: _physical}.items() if name == START else set()):
                judge.setdefault(row, []).append(_judged(renderer, case))
            step()

    look(START)
    engine.load_trained(task, checkpoint)
    look(TRAINED)
    report = {
        "recipe": settings.recipe,
        "step": json.loads((checkpoint / engine.PROGRESS).read_text(encoding="utf-8"))["step"],
        "checkpoint": str(checkpoint),
        "samples": samples,
        "held_out": _means(held_out),
    }
    return report | ({"judge": _means(judge)} if judge else {})


def markdown(report: dict) -> str:
    """The report as Markdown tables."""
    parts = [f"# {report['recipe']}, step {report['step']}", f"Means over {report['samples']} held-out samples."]
    parts.append(_table(report["held_out"]))
    if "judge" in report:
        parts += [
            "Scenes of 'bokeh judge', dB over clip(x, 0, 1)^(1/2.2), given picture and true disparity.",
            _table(report["judge"]),
        ]
    return "\n\n".join(parts) + "\n"


def _judged(renderer: Callable, case: dict) -> dict[str, float]:
    image = torch.as_tensor(case["image_linear"]).float().movedim(-1, 0)[None]
    disparity = torch.as_tensor(case["disparity"]).float()[None]
    defocus = Defocus(disparity, torch.tensor([float(case["focus"])]), torch.tensor([float(case["k_px"])]), Lens(), False)
    return score(renderer(image, defocus)[0], case)


def _physical(image: torch.Tensor, defocus: Defocus) -> torch.Tensor:
    from ..render import render

    return render(image, defocus, linear=True)


def _means(rows: dict[str, list[dict]]) -> dict[str, dict[str, float | None]]:
    """Means of the values that are numbers; None where there is none."""
    means: dict[str, dict] = {}
    for name, found in rows.items():
        means[name] = {}
        for key in found[0]:
            values = [one[key] for one in found if math.isfinite(one[key])]
            means[name][key] = math.fsum(values) / len(values) if values else None
    return means


def _table(rows: dict[str, dict]) -> str:
    names = sorted(rows, key=lambda name: (name != TRAINED, name != START))
    metrics = list(rows[names[0]])
    lines = [["", *metrics], ["---"] + ["---:"] * len(metrics)]
    lines += [[name, *("-" if rows[name].get(m) is None else f"{rows[name][m]:.4g}" for m in metrics)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
