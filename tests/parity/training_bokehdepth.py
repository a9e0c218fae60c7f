"""BokehDepth's training data: records of a CSV, and the defocus of the training targets."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from bokeh_core.errors import BokehError
from bokeh_core.training.manifests import build_record
from bokeh_core.training.train_defocus import AS_PUBLISHED, focused_disparity

from .runner import Case, unit, worst


@unit("manifest_rows_")
def manifest_rows(case: Case) -> tuple[float, float]:
    """The largest relative error of a number. Anything else that differs fails at once."""
    errors = [0.0]
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (320, 200)).save(Path(folder) / "has.png")
        for row in case.meta["rows"]:
            given = {name: value.replace("$TMP", folder) if isinstance(value, str) else value for name, value in row["csv_row"].items()}
            try:
                record, outcome = build_record(given), "ok"
            except BokehError as error:
                record, outcome = None, next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            if outcome != row["strict_outcome"]:
                raise AssertionError(f"{row['csv_row']}: {outcome}, expected {row['strict_outcome']}")
            if record is not None and str(row["record"].get("photo_id")).startswith("sha1-<"):
                # The scratch folder's name is in the path, so the case can only say how the id is made.
                row["record"]["photo_id"] = "sha1-" + hashlib.sha1(record["input_image_path"].encode()).hexdigest()[:16]
            errors += _errors(record, row["record"], folder)
    return max(errors), case.meta["tolerance_rel"]


def _errors(ours, theirs, folder) -> list[float]:
    if isinstance(theirs, dict) and isinstance(ours, dict) and ours.keys() == theirs.keys():
        return [error for name in theirs for error in _errors(ours[name], theirs[name], folder)]
    if isinstance(theirs, float) and isinstance(ours, float):
        return [abs(ours - theirs) / max(abs(theirs), 1e-300)]
    if ours != (theirs.replace("$TMP", folder) if isinstance(theirs, str) else theirs):
        raise AssertionError(f"{ours}, expected {theirs}")
    return []


@unit("train_defocus_")
def train_defocus(case: Case) -> tuple[float, float]:
    """BokehMe is given the radius over its scale and multiplies again."""
    t, errors = case.tensors, []
    for i, row in enumerate(case.meta["cases"]):
        found = focused_disparity(t[f"in.{i}.depth"].numpy(), t[f"in.{i}.fg_mask"].numpy() > 127, AS_PUBLISHED)
        if found.flat != row["flat_fg"]:
            raise AssertionError(f"case {i}: flat {found.flat}, expected {row['flat_fg']}")
        ours = found.defocus(row["K"]) / np.float32(row["pipeline_kwargs"]["defocus_scale"])
        errors.append((float(np.abs(ours - t[f"out.{i}.defocus"].numpy()).max()), case.meta["tolerance_max_abs"]))
    return worst(errors)
