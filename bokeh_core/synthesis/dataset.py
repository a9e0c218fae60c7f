"""A folder of synthetic cases with exact truth: written in parallel, resumable, read back one at a time."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from ..errors import BokehError
from ..render.scene import Layer, Scene
from .scenes import FOCUS, KINDS, make_case

PICTURES = ("image_linear", "truth_linear", "background_linear", "matte")  # kept in float16: lamps reach 8, steps are below 1/2000


def plan_case(index: int, settings: dict) -> dict:
    """What case number `index` of a data set is: keyword arguments for make_case. Depends on nothing but these two."""
    kind = settings["kinds"][index % len(settings["kinds"])]
    rng = np.random.default_rng([settings["seed"], index])
    return {
        "kind": kind,
        "seed": settings["seed"] + index,
        "size": settings["size"],
        "focus": float(rng.choice(FOCUS[kind])),
        "k": float(rng.choice(settings["k"])),
        "rays": settings["rays"],
        "photos": settings["photos"],
    }


def write_dataset(
    out: str | Path,
    count: int,
    *,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    size: int = 416,
    k: Sequence[float] = (16.0, 32.0, 40.0),
    rays: int = 1024,
    photos: str | Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes `count` cases into the folder `out` and returns their .npz files.

    NNNNNN.npz holds what make_case returns (pictures in float16) and the layers, far to near: layer_color [L,H,W,3], layer_alpha [L,H,W],
    layer_plane [L,3]. NNNNNN.json holds kind, seed, focus, k_px, margin, rays. dataset.json holds the settings. Files appear whole or not
    at all; cases that are there already are kept, so a stopped run goes on where it stopped, and a larger count adds to it.

    kinds, size, rays, photos: see make_case; k: blur strengths in px to choose from; workers: processes, one thread each.
    Errors: BokehError for unknown kinds, a count below 1, or a folder that holds a data set with other settings.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise BokehError(f"Unknown kinds of scene {unknown}. Use some of: {', '.join(KINDS)}.")
    if count < 1 or workers < 1:
        raise BokehError(f"{count} cases by {workers} workers were asked for; give at least 1 of each.")
    out = Path(out)
    settings = {"seed": seed, "kinds": list(kinds), "size": size, "k": [float(v) for v in k], "rays": rays}
    settings["photos"] = None if photos is None else str(photos)
    out.mkdir(parents=True, exist_ok=True)
    note = out / "dataset.json"
    if note.exists():
        there = json.loads(note.read_text(encoding="utf-8"))
        if there != settings:
            other = ", ".join(
                f"{name} {there.get(name)} instead of {value}" for name, value in settings.items() if there.get(name) != value
            )
            raise BokehError(
                f"The folder {out} holds a data set with other settings ({other}). Choose another folder or the same settings."
            )
    else:
        _write(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))

    stems = [out / f"{index:06d}" for index in range(count)]
    missing = [index for index, stem in enumerate(stems) if not (stem.with_suffix(".npz").exists() and stem.with_suffix(".json").exists())]
    done = count - len(missing)

    def tick() -> None:
        if progress is not None:
            progress(done, count)

    tick()
    if workers == 1 or len(missing) <= 1:
        for index in missing:
            _write_case(str(stems[index]), plan_case(index, settings))
            done += 1
            tick()
    else:
        # Fresh processes: a forked one may inherit locks of torch's thread pool.
        pool = ProcessPoolExecutor(
            min(workers, len(missing)), mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            for future in as_completed([pool.submit(_write_case, str(stems[index]), plan_case(index, settings)) for index in missing]):
                future.result()
                done += 1
                tick()
        finally:
            pool.shutdown(cancel_futures=True)
    return [stem.with_suffix(".npz") for stem in stems]


def _write_case(stem: str, plan: dict) -> None:
    case = make_case(**plan)
    scene = case.pop("layers")
    meta = {name: value for name, value in case.items() if not isinstance(value, np.ndarray)}
    arrays = {
        name: value.astype(np.float16) if name in PICTURES else value for name, value in case.items() if isinstance(value, np.ndarray)
    }
    arrays["layer_color"] = torch.stack([layer.color for layer in scene.layers]).permute(0, 2, 3, 1).numpy().astype(np.float16)
    arrays["layer_alpha"] = torch.stack([layer.alpha for layer in scene.layers]).numpy().astype(np.float16)
    arrays["layer_plane"] = np.array([layer.plane for layer in scene.layers])
    _write(Path(stem + ".npz"), lambda file: np.savez_compressed(file, **arrays))
    # Last: the case counts as written once this file is there.
    _write(Path(stem + ".json"), lambda file: file.write(json.dumps(meta, indent=1).encode()))


def _write(path: Path, fill: Callable) -> None:
    """Writes a file under another name first, so that it is never seen half written."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        fill(file)
    os.replace(part, path)


def read_case(path: str | Path) -> dict:
    """A case from its .npz and .json: what make_case returns. `layers` is left out for files that hold none (the recorded cases)."""
    path = Path(path)
    with np.load(path) as file:
        case = {name: file[name] for name in file.files}
    case |= json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    case |= {name: case[name].astype(np.float32) for name in PICTURES if name in case}
    if "layer_color" in case:
        colors, alphas, planes = (case.pop(f"layer_{name}") for name in ("color", "alpha", "plane"))
        y, x = np.mgrid[: alphas.shape[1], : alphas.shape[2]].astype(np.float32)
        case["layers"] = Scene(
            tuple(
                Layer(
                    torch.from_numpy(color.astype(np.float32)).permute(2, 0, 1).contiguous(),
                    torch.from_numpy(alpha.astype(np.float32)),
                    torch.from_numpy((plane[0] + plane[1] * x + plane[2] * y).astype(np.float32)),
                    tuple(plane.tolist()),
                )
                for color, alpha, plane in zip(colors, alphas, planes, strict=True)
            )
        )
    return case
