"""Whole pipelines (pipeline_*): two systems use the prefix; what a case holds tells which one it is."""

from .runner import Case, unit


@unit("pipeline_")
def pipeline(case: Case) -> tuple[float, float]:
    if "in.salient_mask" in case.tensors:
        from . import magicbokeh

        return magicbokeh.pipeline(case)
    from . import any_to_bokeh

    return any_to_bokeh.pipeline(case)
