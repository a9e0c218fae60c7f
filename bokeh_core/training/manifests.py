"""The lists BokehDepth is trained from: pictures with camera data (CSV to JSONL), and stacks with depth."""

import csv
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import BokehError
from ..media import atomic, picture_size, read_plane
from ..optics.published_k import BOKEHDEPTH_K, dof_cond, dof_cond_512, dof_cond_512_crop
from ..stack_files import read_entries

DEPTH_NAMES = ("depth", "depth_path", "gt_depth", "target_depth_path")
TRUE_WORDS = ("1", "true", "yes", "y", "t")


def build_record(row: dict[str, str], home: str | Path = ".") -> dict:
    """The training record of one line of a CSV (bokehdepth_stage1 SPEC section 8, published as build_record).

    row   input_image_path; K as dof_cond, or camera data to compute it from: N, fmm (mm), s1 (m), f35mm (blank: fmm), image_width and
          image_height (blank: the file's); optional photo_id, target_image_path, fg_mask_path, depth_map_path, captions parted by |,
          suitable_for_synthetic, task_type, disp_focus, foreground_clear
    home  folder that relative paths count from

    K is px of blur radius per dioptre at the picture's own width. Raises BokehError when the picture or its K is missing.
    """
    home = Path(home)
    row = {name: (value or "").strip() for name, value in row.items() if isinstance(name, str) and not isinstance(value, list)}
    path = row.get("input_image_path", "")
    if not path:
        raise BokehError("The line names no picture; expected a path in the column input_image_path.")
    path = path if os.path.isabs(path) else os.path.abspath(home / path)
    target = _resolved(row.get("target_image_path", ""), home)
    numbers = {name: _number(row.get(name)) for name in ("N", "fmm", "f35mm", "s1")}
    numbers["f35mm"] = numbers["f35mm"] or numbers["fmm"]
    k = _number(row.get("dof_cond"))
    if k is None:
        k = _camera_k(row, numbers, path)
    record = {
        "photo_id": row.get("photo_id") or "sha1-" + hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()[:16],
        "input_image_path": path,
        "fg_mask_path": _resolved(row.get("fg_mask_path", ""), home),
        "depth_map_path": _resolved(row.get("depth_map_path", ""), home),
        "captions": [words.strip() for words in row.get("captions", "").split("|") if words.strip()],
        "camera_anns": {"dof-cond": k} | {name: value for name, value in numbers.items() if value is not None},
        "suitable_for_synthetic": _truth(row.get("suitable_for_synthetic"), not target),
        "task_type": row.get("task_type") or ("add_bokeh" if target else "adjust_bokeh"),
        "disp_focus": _number(row.get("disp_focus")),
        "foreground_clear": _truth(row.get("foreground_clear"), True),
    }
    return record | ({"target_image_path": target} if target else {})


def write_manifest(table: str | Path, out: str | Path, *, strict: bool = False) -> tuple[int, list[str]]:
    """The JSONL file `out` of a CSV `table`: (lines written, what was wrong with those left out). Relative paths: from its folder.

    strict  raise BokehError at the first bad line instead of leaving it out
    """
    table = Path(table)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BokehError(f"{table} cannot be read as a CSV table ({error}); expected UTF-8 text with a line of column names.") from error
    records, skipped = [], []
    for number, row in enumerate(rows, 2):  # line 1 names the columns
        try:
            records.append(build_record(row, table.parent))
        except BokehError as error:
            if strict:
                raise BokehError(f"{table}, line {number}: {error}") from error
            skipped.append(f"line {number}: {error}")
    if not records:
        raise BokehError(f"{table} gives no training record; {skipped[0] if skipped else 'it has no line below the column names.'}")
    with atomic(Path(out)) as temporary:
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return len(records), skipped


@dataclass(frozen=True)
class Photo:
    """One record of a manifest of pictures.

    k       as calibrated, in the unit the network is asked for: px of blur radius on a picture 512 px wide, None: not known. Not clipped
    focus   disparity 0..1 that is sharp, where the record says it
    render  shallow depth of field may be rendered onto the picture: it is sharp, so is its subject, and it has depth (the released
            trainer takes pictures without depth too, and leaves them as they are whatever K says)
    """

    image: Path
    k: float | None
    captions: tuple[str, ...] = ()
    mask: Path | None = None
    depth: Path | None = None
    target: Path | None = None
    focus: float | None = None
    render: bool = True


def read_photos(path: str | Path) -> list[Photo]:
    """The records of a manifest that `write_manifest` makes. Raises BokehError for a missing file or field, and for a missing picture."""
    path = Path(path)
    photos = []
    for number, entry in enumerate(read_entries(path), 1):
        if not isinstance(entry.get("input_image_path"), str):
            raise BokehError(f"{path}, record {number}: no input_image_path; expected a manifest of pictures (made from a CSV).")
        image = path.parent / entry["input_image_path"]
        others = [
            path.parent / entry[name] if entry.get(name) else None for name in ("fg_mask_path", "depth_map_path", "target_image_path")
        ]
        for file in (image, *others):
            if file is not None and not file.is_file():
                raise BokehError(f"{path}, record {number}, names {file}, which is not there; keep the files where the manifest says.")
        render = all(entry.get(name, True) for name in ("suitable_for_synthetic", "foreground_clear")) and bool(entry.get("depth_map_path"))
        captions = tuple(map(str, entry.get("captions") or ()))
        photos.append(Photo(image, _photo_k(entry.get("camera_anns") or {}, image), captions, *others, entry.get("disp_focus"), render))
    return photos


def _photo_k(camera: dict, image: Path) -> float | None:
    """The paper's conventions (SPEC section 7): dof-cond-crop where the record has it, else dof-cond at 512 px, divided by the crop."""
    if camera.get("dof-cond-crop") is not None:
        return float(camera["dof-cond-crop"])
    if camera.get("dof-cond") is None:
        return None
    width = picture_size(image)[1]
    if camera.get("fmm"):
        return dof_cond_512_crop(float(camera["dof-cond"]), width, float(camera["fmm"]), camera.get("f35mm"))
    return dof_cond_512(float(camera["dof-cond"]), width)


def clipped_k(k: float) -> float:
    """K within the axis the network is asked on, 1 to 30."""
    return min(max(k, BOKEHDEPTH_K[0]), BOKEHDEPTH_K[1])


@dataclass(frozen=True)
class StackTruth:
    """Number `entry` of a manifest of stacks (see stack_files.load_stack), its depth map and its mask of valid pixels."""

    manifest: Path
    entry: int
    depth: Path
    mask: Path | None = None


def read_stack_truths(path: str | Path) -> list[StackTruth]:
    """The stacks with depth in a manifest (bokehdepth_stage2). Raises BokehError where one has no depth map, or its file is missing."""
    path = Path(path)
    truths = []
    for number, entry in enumerate(read_entries(path)):
        named = next((entry[name] for name in DEPTH_NAMES if isinstance(entry.get(name), str) and entry[name]), None)
        if named is None:
            raise BokehError(f"{path}, stack {number}: no depth map; training needs one of {', '.join(DEPTH_NAMES)} in every entry.")
        depth, mask = path.parent / named, path.parent / entry["mask"] if entry.get("mask") else None
        for file in (depth, mask):
            if file is not None and not file.is_file():
                raise BokehError(f"{path}, stack {number}, names {file}, which is not there; keep the files where the manifest says.")
        truths.append(StackTruth(path, number, depth, mask))
    return truths


def read_depth(path: str | Path) -> torch.Tensor:
    """[H, W] float32 depth as stored, holes (0, NaN, infinity) too: a picture file, .npy, or .npz with an array `depth` or any."""
    path = Path(path)
    if path.suffix.lower() != ".npz":
        return read_plane(path)[0]
    try:
        with np.load(path, allow_pickle=False) as file:
            name = "depth" if "depth" in file.files else file.files[0]
            depth = np.squeeze(file[name])
    except (OSError, ValueError, IndexError) as error:
        raise BokehError(f"{path} cannot be read as a depth map ({error}); expected an .npz file with an array named depth.") from error
    if depth.ndim != 2:
        raise BokehError(f"{path}: the depth map has shape {list(depth.shape)}; expected [height, width].")
    return torch.from_numpy(depth.astype(np.float32))


def _camera_k(row, numbers, path) -> float:
    missing = [name for name in ("N", "fmm", "s1") if numbers[name] is None]
    if missing:
        raise BokehError(f"{path} has no dof_cond and no {', '.join(missing)} to compute it from; give the one or the other.")
    size = [_number(row.get(name)) for name in ("image_height", "image_width")]
    if not all(size):
        file = picture_size(path)
        size = [given or own for given, own in zip(size, file, strict=True)]
    height, width = (int(side) for side in size)
    try:
        return dof_cond(numbers["N"], numbers["fmm"], numbers["f35mm"], numbers["s1"], width, height)
    except (ArithmeticError, ValueError) as error:
        raise BokehError(f"{path}: the camera data give no K ({error}); check N, fmm, f35mm and s1.") from error


def _number(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _truth(text: str | None, default: bool) -> bool:
    return text.lower() in TRUE_WORDS if text else default


def _resolved(path: str, home: Path) -> str:
    return str((home / path).resolve()) if path else ""
