"""BokehDepth stage 1: camera settings to K (dof_cond_table_*)."""

import numpy as np

from bokeh_core.optics.lens import crop_factor, sensor_width_from_crop
from bokeh_core.optics.published_k import dof_cond, dof_cond_512, dof_cond_512_crop

from .runner import Case, unit


@unit("dof_cond_table_")
def dof_cond_table(case: Case) -> tuple[float, float]:
    """Largest relative error of the table. A row with an error entry must raise that error and has no line in the table."""
    expected = iter(case.tensors["out.table"].tolist())
    errors = []
    for row in case.meta["rows"]:
        try:
            ours = _columns(*(row[name] for name in case.meta["columns_in"]))
        except Exception as exception:
            if row.get("error") != type(exception).__name__:
                raise
            continue
        if "error" in row:
            raise AssertionError(f"the row {row} should raise {row['error']}")
        for name, value in zip(case.meta["columns_out"], next(expected), strict=True):
            errors.append(abs(ours[name] - value) / max(abs(value), 1e-300))
    if next(expected, None) is not None:
        raise AssertionError("the table has more lines than the rows account for")
    return float(np.max(errors, initial=0.0)), case.meta["tolerance_rel"]  # a NaN wins, and fails


def _columns(f_number, f, f35, focus_distance, width, height):
    k = dof_cond(f_number, f, f35, focus_distance, width, height)
    return {
        "sensor_width_mm": sensor_width_from_crop(f, f35, width, height),
        "crop_factor": crop_factor(f, f35),
        "dof_cond_native": k,
        "paper_ref512": dof_cond_512(k, width),
        "paper_ref512_div_crop": dof_cond_512_crop(k, width, f, f35),
    }
