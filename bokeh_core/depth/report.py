"""What `bokeh models check` says of depth checkpoints."""

from pathlib import Path

import torch

from ..checkpoints.catalogue import APACHE, NON_COMMERCIAL, UNSTATED, Report
from ..errors import BokehError

ANY_DEPTH_MODEL = ("pretrained.blocks.0.", "backbone.encoder.layer.0.", "pixel_encoder.")
DSFA_LICENCE = f"{NON_COMMERCIAL}, of what it was trained from; its own is not known"


def report(tensors: dict, path: Path) -> Report | None:
    """A depth file this library knows, complete or not; None for anything else. Of a training run's file `tensors` is empty.

    Licences: bokehdepth_stage2 SPEC section 15. The kind of depth is not in the tensors: relative and metric files have the same
    names, so it is taken from the file name.
    """
    from .checkpoint import build, read_depth_file, recognise

    if not tensors and path.is_file():
        try:
            tensors = read_depth_file(path)
        except BokehError:
            return None
    if not any(mark in name for name in tensors for mark in ANY_DEPTH_MODEL):
        return None
    try:
        info, renamed = recognise(tensors, str(path))
    except BokehError as error:
        return Report("a depth model", problems=(str(error),))
    problems = []
    try:
        build(info, renamed)
    except BokehError as error:
        problems.append(str(error))
    vit, dsfa = info.config.vit, getattr(info.config, "dsfa", None)
    facts = [
        ("architecture", f"{info.family}, size {info.size}"),
        (
            "transformer",
            f"{vit.width} wide, {vit.depth} blocks, {vit.heads} heads, taps {_list(vit.taps)}, positions {vit.grid} x {vit.grid}",
        ),
        ("head", _head(info.config)),
        ("made for", "video" if info.video else "single pictures"),
        ("depth", _depth(info)),
        ("names", "of the transformers library" if any(name.startswith("neck.") for name in tensors) else "original"),
    ]
    if dsfa:
        facts += [("DSFA", f"taps {_list(dsfa.taps)}, {dsfa.heads} heads"), ("attention", _attention(info))]
        return Report(info.title, tuple(facts), tuple(problems), DSFA_LICENCE)
    if not info.align_corners:
        return Report(info.title, tuple(facts), tuple(problems), NON_COMMERCIAL)
    licence = {"S": APACHE, "B": NON_COMMERCIAL, "L": NON_COMMERCIAL}.get(info.size, UNSTATED)
    return Report(info.title, tuple(facts), tuple(problems), licence)


def compare_attention(dsfa: dict, plain: dict, pictures: list[torch.Tensor], resolution: int = 518) -> dict[str, float]:
    """How alike the depth without a stack is to that of the plain model it was trained from, by the scaling of attention.

    dsfa, plain  tensors of DAV2_dsfa_release.pth and of depth_anything_v2_metric_vkitti_vitl.pth
    pictures     [3, H, W] display-encoded 0..1
    returns      mean correlation of the logarithms of depth, for "single" and "double"; the released weights need the higher one
    """
    from .checkpoint import DOUBLE, SINGLE, DepthModel, build, recognise
    from .estimate import depth_maps

    def depths(tensors, name, **how):
        info, tensors = recognise(tensors, name, **how)
        model = DepthModel(build(info, tensors), info, torch.device("cpu"), torch.float32)
        return [next(depth_maps(model, [picture], 1, clip=False, resolution=resolution)).log().flatten() for picture in pictures]

    expected = depths(plain, "depth_anything_v2_metric_vkitti_vitl.pth")
    found = {}
    for scale in (SINGLE, DOUBLE):
        ours = depths(dsfa, "DAV2_dsfa_release.pth", attention=scale)
        found[scale] = sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(ours, expected, strict=True)) / len(pictures)
    return found


def against(path: str | Path, plain: str | Path) -> str:
    """A sentence: which scaling of attention a DAV2_dsfa_release.pth needs, found by the plain metric model on two made-up scenes."""
    from ..render.light import to_display
    from ..synthesis.scenes import flatten, make_scene
    from .checkpoint import read_depth_file

    pictures = [to_display(flatten(make_scene(kind, 1))[0].clamp(0, 1)) for kind in ("portrait", "ground")]
    found = compare_attention(read_depth_file(path), read_depth_file(plain), pictures)
    numbers = ", ".join(f"{scale} {number:.3f}" for scale, number in found.items())
    return f"attention: correlation with the plain model without a stack: {numbers}; use '{max(found, key=found.get)}'."


def _list(numbers) -> str:
    return " ".join(map(str, numbers))


def _head(config) -> str:
    if hasattr(config, "head"):
        return f"{config.head.features} features, channels {_list(config.head.out_channels)}"
    return f"{config.hidden} wide, {config.heads} heads, {_list(config.depths)} residual units"


def _attention(info) -> str:
    if not info.align_corners:
        return "spatial step 1/head width, focus step and transformer 1/sqrt (the release's configuration)"
    return "single or double is not known; 'bokeh models check FILE --against depth_anything_v2_metric_vkitti_vitl.pth' tells"


def _depth(info) -> str:
    if not info.metric:
        return "relative (from the file name; metric files have the same tensors)"
    return f"metres, at most {info.max_depth:g}" if info.max_depth else "metres"
