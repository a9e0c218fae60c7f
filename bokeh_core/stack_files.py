"""Bokeh stacks on disk, in the published form (BokehDepth stage 1, SPEC section 6).

FOLDER/ref.png                            the sharp picture
FOLDER/defocus_stack/0.png, 1.png ...     the frames, in the order of K
FOLDER/defocus_stack/stack_index.json     ids, K values, sizes, settings of the generator
FOLDER/manifest.jsonl                     one line: paths and K
"""

import json
import os
import time
from pathlib import Path

import torch

from .errors import BokehError
from .media import Picture, atomic, read_picture, write_picture
from .optics.stack import BokehStack

METHOD = "bokeh_diffusion_i2i_pipeline"
REFERENCE_NAMES = ("ref", "source_rgb", "image", "image_path", "input_image_path")
FOLDER_NAMES = ("stack_dir", "defocus_stack_dir")
SETTINGS = ("guidance_scale", "num_inference_steps", "prompt_template", "method")  # of a generator, in stack_index.json


def save_stack(folder: str | Path, stack: BokehStack, *, source_size: tuple[int, int] | None = None, original_size=None) -> Path:
    """Write a stack into a folder (made if needed) and return its manifest. Every file appears complete or not at all, the manifest last.

    source_size    (width, height) of the picture before its short side was brought to the working size; default: the reference's
    original_size  (width, height) of the picture the user gave; default: source_size
    """
    folder = Path(folder).resolve()
    frames = folder / "defocus_stack"
    size = [stack.reference.shape[-1], stack.reference.shape[-2]]
    source_size = list(source_size or stack.settings.get("source_size") or size)
    original_size = list(original_size or stack.settings.get("original_size") or source_size)
    reference, index = folder / "ref.png", frames / "stack_index.json"
    ids = [str(i) for i in range(len(stack.k))]
    k = [float(value) for value in stack.k]
    write_picture(reference, Picture(stack.reference.detach().float().cpu()), 8)
    for name, frame in zip(ids, stack.frames, strict=True):
        write_picture(frames / f"{name}.png", Picture(frame.detach().float().cpu()), 8)
    settings = {"method": METHOD if stack.source in ("", "kontext") else stack.source}
    settings |= {name: stack.settings[name] for name in SETTINGS if name in stack.settings}
    about = {
        "ids": ids,
        "k_values": dict(zip(ids, k, strict=True)),
        "ref_image": str(reference),
        "source_rgb": str(reference),
        "size": size,
        "source_size": source_size,
        "original_size": original_size,
        **settings,
    }
    line = {
        "dataset": "bokehdepth",
        "timestamp": time.strftime("%Y%m%d_%H%M%S"),
        "ref": str(reference),
        "stack": [str(frames / f"{name}.png") for name in ids],
        "k": k,
        "stack_index": str(index),
        "size": size,
        "source_size": source_size,
    }
    if stack.per_dioptre:  # ours; readers of the published form pass over it
        about["k_per_dioptre"] = line["k_per_dioptre"] = True
    _write(index, json.dumps(about, indent=2, ensure_ascii=False))
    manifest = folder / "manifest.jsonl"
    _write(manifest, json.dumps(line, ensure_ascii=False) + "\n")
    return manifest


def load_stack(path: str | Path, entry: int = 0) -> BokehStack:
    """The stack a manifest describes: a .jsonl (one object a line), a .json (object or list), or the folder that holds manifest.jsonl.

    entry  which of the manifest's objects, from 0. Relative paths count from the manifest's folder.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.jsonl"
    entries = read_entries(path)
    if not 0 <= entry < len(entries):
        raise BokehError(f"{path} has {len(entries)} stacks; there is no number {entry} (they count from 0).")
    about = entries[entry]
    home = path.parent
    named = next((about[name] for name in REFERENCE_NAMES if isinstance(about.get(name), str) and about[name]), None)
    if named is None:
        raise BokehError(f"{path} names no sharp picture; expected one of {', '.join(REFERENCE_NAMES)}.")
    index = _index_of(about, home)
    if isinstance(about.get("stack"), list) and isinstance(about.get("k"), list):
        names, k = about["stack"], about["k"]
    else:
        if "ids" not in about or "k_values" not in about:
            about = {**about, **index}
        ids, values = about.get("ids"), about.get("k_values")
        if not isinstance(ids, list) or not isinstance(values, dict):
            raise BokehError(f"{path} lists no frames; expected 'stack' with 'k', or 'ids' with 'k_values'.")
        missing = [one for one in ids if str(one) not in values]
        if missing:
            raise BokehError(f"{path} has no K for the frame {missing[0]}.")
        folder = next((about[name] for name in FOLDER_NAMES if isinstance(about.get(name), str)), None)
        if folder is None:
            folder = str(Path(about["stack_index"]).parent) if isinstance(about.get("stack_index"), str) else "defocus_stack"
        names, k = [str(Path(folder) / f"{one}.png") for one in ids], [values[str(one)] for one in ids]
    if len(names) != len(k):
        raise BokehError(f"{path} lists {len(names)} frames and {len(k)} values of K; expected one K for each frame.")
    try:
        k = [float(value) for value in k]
    except (TypeError, ValueError):
        raise BokehError(f"{path} has a K that is no number ({k}); expected numbers.") from None
    pictures = [_inside(home, name, path) for name in names]
    frames = [read_picture(picture).pixels for picture in pictures]
    if not frames or any(frame.shape != frames[0].shape for frame in frames):
        raise BokehError(f"{path} has frames of different sizes, or none; expected frames of one size.")
    settings = {name: index[name] for name in (*SETTINGS, "source_size", "original_size") if name in index}
    source = {METHOD: "kontext"}.get(settings.get("method"), settings.get("method", ""))
    reference = read_picture(_inside(home, named, path)).pixels
    return BokehStack(reference, torch.stack(frames), k, bool(about.get("k_per_dioptre")), source, settings)


def read_entries(path: Path) -> list[dict]:
    """The objects in a manifest, .jsonl (one a line) or .json (one, or a list). Raises BokehError when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BokehError(
            f"{path} cannot be read as a stack's manifest ({error}); give its manifest.jsonl or the folder that holds it."
        ) from error
    try:
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
            entries = entries if isinstance(entries, list) else [entries]
    except (ValueError, RecursionError) as error:
        raise BokehError(f"{path} is not valid JSON ({error}).") from error
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BokehError(f"{path} holds no stack; expected one JSON object a line.")
    return entries


def _index_of(about: dict, home: Path) -> dict:
    """The object in the stack_index.json the manifest names; {} when there is none."""
    if not isinstance(about.get("stack_index"), str):
        return {}
    file = home / about["stack_index"]
    return read_entries(file)[0] if os.path.isfile(file) else {}  # of a name too long Path.is_file raises


def _inside(home: Path, name: str, manifest: Path) -> Path:
    """A picture named by a manifest; one that has moved with its folder is found by the end of its path."""
    path = home / str(name)
    if os.path.isfile(path):
        return path
    for parts in (2, 1):
        moved = home.joinpath(*Path(str(name)).parts[-parts:])
        if os.path.isfile(moved):
            return moved
    raise BokehError(f"{manifest} names the picture {name}, which is not there; keep the stack's files together.")


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
