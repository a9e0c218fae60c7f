"""Published ray tracers and scatter renderers (raytrace_*, scatter_*) and the data recipes built on them (synthesis_*, synth_*)."""

import torch

from bokeh_core.synthesis.any_to_bokeh_clip import make_clip
from bokeh_core.synthesis.bokehdiff_pair import PairRecipe, make_pair
from bokeh_core.synthesis.bokehme import scatter_bokehme
from bokeh_core.synthesis.planar import flatten_planes, resolve, trace_any_to_bokeh, trace_bokehdiff

from .runner import Case, unit, worst


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        raise AssertionError(f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    return float((ours.double() - theirs.double()).abs().max())


@unit("raytrace_")
def raytrace(case: Case) -> tuple[float, float]:
    """BokehDiff's tracer has plane coefficients `in.coffs`, Any-to-Bokeh's `in.planes`."""
    return _bokehdiff(case) if "in.coffs" in case.tensors else _any_to_bokeh(case)


def _bokehdiff(case: Case) -> tuple[float, float]:
    t, config = case.tensors, case.meta["config"]
    sums, weight = trace_bokehdiff(
        t["in.images_linear"], t["in.alphas"], t["in.coffs"], t["in.K"], t["in.depth_focus"], config["samples_per_side"], config["eta"]
    )
    tolerance = case.meta["tolerance"]
    # Sums are held relative to the number of samples.
    count = config["n_samples"]
    return worst(
        [
            (_largest(sums, t["out.bokeh_cum"]) / count, tolerance),
            (_largest(weight, t["out.weight_cum"]) / count, tolerance),
            (_largest(resolve(sums, weight, config["gamma"]), t["out.bokeh_srgb"]), tolerance),
        ]
    )


def _any_to_bokeh(case: Case) -> tuple[float, float]:
    t = case.tensors
    planes = t["in.planes"]
    ours = trace_any_to_bokeh(
        t["in.images"], t["in.alphas"], planes, t["in.K"], t["in.focus_depth"], case.meta["config"]["samples_per_side"]
    )
    picture, disparity = flatten_planes(t["in.images"], t["in.alphas"], planes)
    # 2e-4 on more than 99.5 % of the values: a sample on a pixel or threshold border may flip.
    error = float((ours - t["out.bokeh"]).abs().flatten().quantile(0.995))
    return worst([(error, 2e-4), (_largest(picture, t["out.aif"]), 2e-6), (_largest(disparity, t["out.disparity"]), 2e-6)])


@unit("scatter_")
def scatter(case: Case) -> tuple[float, float]:
    t, tolerance = case.tensors, case.meta["tolerance"]
    bokeh, total, weight, dilated = scatter_bokehme(t["in.image"], t["in.defocus"])
    names = {"bokeh": bokeh, "bokeh_cum": total, "weight_cum": weight, "defocus_dilate": dilated}
    return worst([(_largest(ours, t[f"out.{name}"]), tolerance) for name, ours in names.items()])


class _Recorded:
    """Hands out recorded draws in their order, for PairDraws and ClipDraws alike."""

    def __init__(self, draws: list):
        self.left = list(draws)

    def _next(self, *_):
        value = self.left.pop(0)[-1]
        return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list) else value

    uniform = integer = permutation = choice = _next

    def integers(self, low, high, count):
        value = self._next()
        return value if isinstance(value, list) else [value]

    def rand(self, *shape):
        return torch.tensor(self._next()).view(shape)


@unit("synthesis_")
def synthesis(case: Case) -> tuple[float, float]:
    """Tolerances as the case's note words them: 2e-4 from the layers on; sums 1e-6 of the largest weight inside the margin of 2 K0."""
    t, config = case.tensors, case.meta["config"]
    recipe = PairRecipe(config["W"], config["K"], config["size"], config["gamma"])
    draws = _Recorded(case.meta["random_draws_in_order"])
    ours = make_pair(t["in.fg_rgba_u8"].numpy(), t["in.bg_rgb_u8"].numpy(), draws, case.meta["crop_top_left"], recipe)
    if draws.left:
        raise AssertionError(f"{len(draws.left)} recorded draws were not used")
    inner = (..., slice(2 * config["K"], -2 * config["K"]), slice(2 * config["K"], -2 * config["K"]))
    largest = float(t["mid.weight_cum"].max())
    sums = [(ours["sums"].clamp_min(0), t["mid.bokeh_cum_clamped"]), (ours["weight"], t["mid.weight_cum"])]
    names = {
        "images_linear": "mid.images_linear", "alphas": "mid.alphas", "target": "out.pixel_values", "aif": "out.aif",
        "disparity": "out.disparity", "defocus_strength": "out.defocus_strength", "disp_focus": "out.disp_focus", "k": "out.K",
    }  # fmt: skip
    scalars = {"planes": "mid.coffs", "radius": "mid.K_adapt", "focus_depth": "mid.depth_focus"}
    return worst(
        [(_largest(ours[a], t[b]), 2e-4) for a, b in names.items()]
        + [(float(((ours[a] - t[b]).abs() / t[b].abs().clamp_min(1)).max()), 2e-6) for a, b in scalars.items()]
        + [(_largest(a[inner], b[inner]) / largest, 1e-6) for a, b in sums]
    )


@unit("synth_")
def synth(case: Case) -> tuple[float, float]:
    """Tolerances as the case's text words them, on the 0..255 scale: masks exact, aif and disp 0.05, bokeh 0.5 on 99 % of the pixels."""
    t, meta = case.tensors, case.meta
    config, flags = meta["config"], meta["config"]["flags"]
    mode = "focus" if flags["change_focus"] else "test" if flags["gen_test"] else "fixed"
    chosen = config["fg_choice"][0]
    foregrounds, mattes = ([[frame.numpy() for frame in t[name][i]] for i in chosen] for name in ("in.foregrounds_u8", "in.mattes_u8"))
    draws = _Recorded(meta["draws"])
    files = make_clip(
        foregrounds, mattes, t["in.background_u8"].numpy(), draws,
        width=config["res_w"], height=config["res_h"], mode=mode, samples=config["samples_per_side"],
    )  # fmt: skip
    if draws.left:
        raise AssertionError(f"{len(draws.left)} recorded draws were not used")
    if list(files) != meta["image_names"]:
        raise AssertionError(f"files {list(files)}, expected {meta['image_names']}")
    pairs = []
    for i, (name, array) in enumerate(files.items()):
        theirs = t[f"out.image.{i}"]
        ours = torch.from_numpy(array)
        ours = ours.flip(-1) if ours.ndim == 3 else ours  # the recorded pictures are BGR
        if name.startswith("bokeh/"):
            pairs.append((float((ours - theirs).abs().flatten().quantile(0.99)), 0.5))
        else:
            pairs.append((_largest(ours, theirs), 0.0 if name.startswith("mask/") else 0.05))
    return worst(pairs)
