"""Judge a renderer by the whole protocol of RENDERERS.md, section 4: truth, invariants, clips, wrong depth, speed. See docs/judge.md.

A renderer is any function renderer(image, defocus, *, matte=None, clean_plate=None) -> [B, 3, H, W]: image [B, 3, H, W] linear light,
defocus a Defocus of B frames, matte [B, H, W], clean_plate [B, 3, H, W]; the result is linear light.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .errors import BokehError
from .metrics.edges import dilate, edge_band, encode
from .metrics.image import judge as score
from .metrics.lights import disk_kernel, gradient_energy, highlight_shape_error, measured_radius, monotonicity, pull_roughness
from .metrics.video import flicker, relation_metric
from .optics.defocus import Defocus
from .optics.lens import Lens
from .render.rays import trace
from .render.scene import Scene
from .synthesis.dataset import read_case
from .synthesis.scenes import flatten, make_case, make_clip, make_scene

Renderer = Callable[..., torch.Tensor]
Ceiling = Callable[[Scene, float, float], torch.Tensor]
Progress = Callable[[int, int], None] | None

REGIMES = ("subject focus", "foreground defocus", "middle", "both blurred", "single slope")
INPUTS = ("composite", "matte", "plate", "layers")
SCORES = ("all", "edge8", "edge24", "in_focus", "ssim")
SCENES = (
    *(("portrait", 0.8), ("three", 0.9), ("ground", 0.62)),  # subject focus
    *(("portrait", 0.2), ("three", 0.12)),  # foreground defocus
    *(("three", 0.5), ("ground", 0.35)),  # middle
    ("portrait", 0.95),  # both blurred
    ("plane", 0.45),  # single slope
)
MOST_DB = 100.0  # what a perfect score counts as, so that means stay numbers
RADII = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 32.0)  # px, of points of light
EDGE_ERRORS = (-8, -4, -2, 0, 2, 4, 8)  # px
RECORDED = {"all": "all", "edge8": "b8", "in_focus": "foc"}  # our scores and their names in recorded cases


# Cases


def seeded_cases(
    seeds: Sequence[int] = (1, 2), *, ks: Sequence[float] = (16.0, 32.0), size: int = 208, rays: int = 512
) -> dict[str, Callable[[], dict]]:
    """Name -> a function that makes the case (see make_case), each of SCENES with each seed; the blur strengths ks take turns."""
    cases = {}
    for turn, seed in enumerate(seeds):
        for i, (kind, focus) in enumerate(SCENES):
            k = ks[(turn + i) % len(ks)]
            cases[f"{kind} {focus:g}, seed {seed}, k {k:g}"] = partial(make_case, kind, seed, size, focus, k, rays=rays)
    return cases


def stored_cases(folder: str | Path) -> dict[str, Callable[[], dict]]:
    """Name -> a function that reads the case, for all NAME.npz with NAME.json of a folder. Raises BokehError when there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BokehError(f"{folder}: no such folder; expected one with cases, as 'bokeh synthesize' writes them.")
    files = [file for file in sorted(folder.glob("*.npz")) if file.with_suffix(".json").exists()]
    if not files:
        raise BokehError(f"{folder} holds no cases; expected NAME.npz with NAME.json, as 'bokeh synthesize' writes them.")
    return {file.stem: partial(_read, file) for file in files}


def _read(path: Path) -> dict:
    try:
        case = read_case(path)
        if "edge24" not in case:
            case["edge24"] = edge_band(torch.from_numpy(case["disparity"]), case["k_px"], 24).numpy() & case["scored"]
        for name in ("image_linear", "truth_linear", "disparity", "matte", "scored", "edge8", "in_focus", "focus"):
            case[name]
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, OSError) as error:  # zip, JSON and missing entries
        raise BokehError(f"{path}: cannot be read as a case ({error}); write it again with 'bokeh synthesize'.") from error
    return case


def regime(case: dict) -> str:
    """Which of REGIMES a case belongs to, from its disparity (0..1), the matte of its nearest layer, and its focus."""
    matte = case["matte"]
    if not matte.size:
        return "single slope"
    subject = float(np.median(case["disparity"][matte > 0.5])) if (matte > 0.5).any() else float(case["disparity"].max())
    if abs(subject - case["focus"]) <= 0.05:
        return "subject focus"
    if case["focus"] > subject:
        return "both blurred"
    behind = (case["disparity"] < case["focus"] - 0.1).mean()
    return "middle" if behind > 0.1 else "foreground defocus"


# The protocol


def judge_renderer(
    renderer: Renderer,
    cases: Mapping[str, Callable[[], dict]],
    *,
    inputs: Sequence[str] = INPUTS,
    ceiling: Ceiling | None = None,
    robust: int = 2,
    seed: int = 1,
    clip_frames: int = 6,
    clip_size: int = 144,
    clip_rays: int = 256,
    progress: Progress = None,
) -> dict:
    """Everything the protocol measures, as a dictionary that JSON can hold (nan is None, a perfect PSNR is 100).

    renderer   see the top of this file
    cases      seeded_cases() or stored_cases(folder); made one at a time
    inputs     of INPUTS, what the renderer is given beside picture and disparity: "matte" the nearest layer's coverage, "plate" the matte
               and the picture without that layer; "layers" is `ceiling` with the true layers. Cases that lack an input are left out there
    ceiling    ceiling(scene, k, focus) -> [3, H, W]: the renderer's own compositing of given layers
    robust     so many portraits each of "subject focus" and "foreground defocus" are rendered with wrong disparity too (where a matte of
               the nearest layer is all the help there can be)
    seed, clip_frames, clip_size (px), clip_rays   of the moving clip
    progress   called as progress(done, total) after each case and part; may raise to interrupt

    Keys: cases (name -> regime, k_px, focus, scores per input), regimes (mean scores), known_methods (where the cases record them),
    lights, invariants (name -> value, target), monotonicity, temporal, robustness. Units: PSNR dB over clip(x, 0, 1)^(1/2.2); px; RM 0..1.
    Errors: BokehError for unknown inputs, or inputs that no case holds.
    """
    unknown = [name for name in inputs if name not in INPUTS]
    if unknown or not inputs:
        raise BokehError(f"Unknown inputs {unknown}; use some of {', '.join(INPUTS)}.")
    total = len(cases) + 3
    report = {"cases": {}}
    curves: dict = {}
    for done, (name, make) in enumerate(cases.items(), start=1):
        case = make()
        kind = regime(case)
        scores = {given: _scores(_result(renderer, ceiling, case, given), case) for given in inputs if _holds(case, given, ceiling)}
        report["cases"][name] = {"regime": kind, "k_px": case["k_px"], "focus": case["focus"], "scores": scores}
        if "reference_psnr_db" in case:
            report["cases"][name]["reference_psnr_db"] = _clean(case["reference_psnr_db"])
        curve = curves.setdefault(kind, [])
        if kind in REGIMES[:2] and "portrait" in case.get("kind", "portrait") and len(curve) < robust:
            curve.append(_wrong_depth(renderer, case, [given for given in inputs[:2] if given in ("composite", "matte")]))
        if progress:
            progress(done, total)
    missing = [given for given in inputs if not any(given in case["scores"] for case in report["cases"].values())]
    if len(missing) == len(inputs):
        raise BokehError(f"No case holds the input {missing[0]}; leave it out of the inputs, or use cases made by 'bokeh synthesize'.")
    report["regimes"] = _regime_means(report["cases"], inputs)
    known = _against_known(report["cases"])
    if known:
        report["known_methods"] = known
    points = _lights(renderer)
    report["lights"] = points
    if progress:
        progress(total - 2, total)
    report["invariants"] = _invariants(renderer, points)
    report["monotonicity"] = _monotonicity(renderer, points)
    if progress:
        progress(total - 1, total)
    report["temporal"] = _temporal(renderer, ceiling, inputs, seed, clip_frames, clip_size, clip_rays)
    report["robustness"] = {kind: _quartiles(found) for kind, found in curves.items() if found}
    if progress:
        progress(total, total)
    return _clean(report)


def _clean(x):
    """Ready for JSON: nan becomes None, infinity MOST_DB."""
    if isinstance(x, Mapping):
        return {key: _clean(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_clean(value) for value in x]
    if isinstance(x, float):
        return None if math.isnan(x) else min(x, MOST_DB) if math.isinf(x) else x
    return x


def _chw(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(picture, -1, 0)))[None]


def _run(renderer: Renderer, image: torch.Tensor, disparity: torch.Tensor, focus, k, **extra) -> torch.Tensor:
    """[B, 3, H, W] of image [3, H, W] or [B, 3, H, W] and disparity [H, W] or [B, H, W]; focus and k a number or [B]."""
    disparity = disparity if disparity.ndim == 3 else disparity[None]
    frames = len(disparity)
    image = image if image.ndim == 4 else image.expand(frames, -1, -1, -1)
    focus, k = (torch.as_tensor(v, dtype=torch.float32).expand(frames) for v in (focus, k))
    return renderer(image, Defocus(disparity, focus, k, Lens(), False), **extra)


def _holds(case: dict, given: str, ceiling: Ceiling | None) -> bool:
    if given == "layers":
        return ceiling is not None and "layers" in case
    return given == "composite" or (case["matte"].size > 0 and (given == "matte" or "background_linear" in case))


def _extra(case: dict, given: str) -> dict:
    extra = {} if given == "composite" else {"matte": torch.from_numpy(case["matte"])[None]}
    return extra | {"clean_plate": _chw(case["background_linear"])} if given == "plate" else extra


def _result(renderer: Renderer, ceiling: Ceiling | None, case: dict, given: str) -> torch.Tensor:
    if given == "layers":
        return ceiling(case["layers"], case["k_px"], case["focus"])
    image, disparity = _chw(case["image_linear"]), torch.from_numpy(case["disparity"])
    return _run(renderer, image, disparity, case["focus"], case["k_px"], **_extra(case, given))[0]


def _scores(result: torch.Tensor, case: dict) -> dict[str, float]:
    return {name: min(value, MOST_DB) for name, value in score(result, case).items()}


def _mean(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return statistics.fmean(known) if known else math.nan


def _regime_means(cases: dict, inputs: Sequence[str]) -> dict:
    means: dict = {}
    for kind in REGIMES:
        for given in inputs:
            found = [case["scores"][given] for case in cases.values() if case["regime"] == kind and given in case["scores"]]
            if found:
                means.setdefault(kind, {})[given] = {"cases": len(found)} | {name: _mean(s[name] for s in found) for name in SCORES}
    return means


def _against_known(cases: dict) -> dict | None:
    """Means of the recorded methods over the cases that record them, and per case the best that had no true layers and did blur."""
    cases = {name: case for name, case in cases.items() if "reference_psnr_db" in case and "composite" in case["scores"]}
    if not cases:
        return None

    def of(case: dict, ours: str) -> dict[str, float]:
        rows = {method: row.get(RECORDED[ours]) for method, row in case["reference_psnr_db"].items()}
        return {method: min(v, MOST_DB) for method, v in rows.items() if v is not None}

    methods = dict.fromkeys(method for case in cases.values() for method in case["reference_psnr_db"])
    means = {method: {ours: _mean(of(case, ours).get(method) for case in cases.values()) for ours in RECORDED} for method in methods}
    means["this renderer"] = {ours: _mean(case["scores"]["composite"][ours] for case in cases.values()) for ours in RECORDED}
    best: dict = {}
    for name, case in cases.items():
        for ours in RECORDED:
            fair = {method: v for method, v in of(case, ours).items() if not method.startswith(("oracle", "no blur"))}
            mine = case["scores"]["composite"][ours]
            if fair and not math.isnan(mine):
                method = max(fair, key=fair.get)
                row = {"method": method, "best": fair[method], "ours": mine, "difference": mine - fair[method]}
                best.setdefault(name, {})[ours] = row
    gain = {ours: _mean(row[ours]["difference"] for row in best.values() if ours in row) for ours in RECORDED}
    return {"means": means, "best": best, "mean_difference": gain}


def _lights(renderer: Renderer) -> dict:
    """A lit pixel on black, both sides of the focus: L1 of its picture against the exact kernel, measured radius, light kept."""
    rows = {"radius_px": list(RADII), "measured_px": [], "shape_error": [], "mass": []}
    for radius in RADII:
        reach = 2 * math.ceil(radius) + 4  # whatever the light reaches lies farther from the border than the radius
        image = torch.zeros(3, 2 * reach + 1, 2 * reach + 1)
        image[:, reach, reach] = 1
        kernel = disk_kernel(radius, reach)
        pictures = []
        for near, focus in ((0.75, 0.25), (0.25, 0.75)):
            pictures.append(_run(renderer, image, torch.full(image.shape[1:], near), focus, 2 * radius)[0].double().mean(0))
        rows["shape_error"].append(max(highlight_shape_error(p, kernel) for p in pictures))
        rows["measured_px"].append(_mean(measured_radius(p) for p in pictures))
        rows["mass"].append(max((float(p.sum()) for p in pictures), key=lambda m: abs(m - 1)))
    return rows


def _monotonicity(renderer: Renderer, points: dict) -> dict:
    """How radii and detail follow the blur strength, and how steadily a radius follows a focus pull."""
    asked, measured = (torch.tensor(points[name], dtype=torch.float64) for name in ("radius_px", "measured_px"))
    spearman, slope = monotonicity(asked, measured)
    image, disparity = flatten(make_scene("portrait", 1, 128))
    outside = ~dilate((disparity - 0.8).abs() < 0.1, 2)
    ks = [0.0, 4.0, 8.0, 16.0, 32.0]
    energy = [gradient_energy(encode(_run(renderer, image, disparity, 0.8, k)[0]), outside) for k in ks]
    radii = torch.linspace(2, 20, 19)
    light = torch.zeros(3, 89, 89)
    light[:, 44, 44] = 1
    pull = _run(renderer, light, torch.full((len(radii), 89, 89), 0.8), 0.8 - radii / 40, 40.0)
    pull = [measured_radius(p.mean(0)) for p in pull]
    return {
        "spearman": spearman,
        "slope_error": slope,
        "k": ks,
        "gradient_energy": energy,
        "detail_falls": all(b < a for a, b in pairwise(energy)),
        "pull_asked_px": radii.tolist(),
        "pull_measured_px": pull,
        "pull_roughness_px": pull_roughness(torch.tensor(pull, dtype=torch.float64)),
    }


def _invariants(renderer: Renderer, points: dict) -> dict:
    """Largest differences in linear light where there must be none: name -> value, target."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, 72, 88, generator=generator)
    image[:, 40, 12] = 6
    disparity = torch.linspace(0.1, 0.3, 88).expand(72, 88).clone()
    disparity[20:50, 30:66] = 0.8
    run = partial(_run, renderer)
    base = run(image, disparity, 0.3, 20.0)[0]

    def same(result: torch.Tensor, wanted: torch.Tensor = base) -> float:
        return float((result - wanted).abs().max())

    # Whole-pixel shifts: everything lies inside a black frame, so that nothing enters or leaves. The hidden parts are filled through
    # pyramids, which move in steps of their own: hence a target of a quarter of an 8-bit step.
    inner, inner_d = torch.zeros(3, 136, 136), torch.full((136, 136), 0.2)
    inner[:, 48:88, 48:88] = torch.rand(3, 40, 40, generator=generator)
    inner_d[56:80, 56:80] = 0.8
    shift = partial(torch.roll, shifts=(5, -3), dims=(-2, -1))
    shifts = [same(run(shift(inner), shift(inner_d), 0.5, k)[0], shift(run(inner, inner_d, 0.5, k)[0])) for k in (20.0, 80.0)]
    flat = torch.full_like(image, 0.5)
    found = {
        "k = 0 returns the picture": (same(run(image, disparity, 0.3, 0.0)[0], image), 0.0),
        "a constant picture stays constant": (same(run(flat, disparity, 0.3, 20.0)[0], flat), 1e-4),
        "light of inner points is kept (out / in - 1)": (max(abs(m - 1) for m in points["mass"]), 1e-3),
        "the same again": (same(run(image, disparity, 0.3, 20.0)[0]), 0.0),
        "colours in another order": (same(run(image.flip(0), disparity, 0.3, 20.0)[0].flip(0)), 1e-5),
        "mirrored left to right": (same(run(image.flip(2), disparity.flip(1), 0.3, 20.0)[0].flip(2)), 1e-4),
        "mirrored top to bottom": (same(run(image.flip(1), disparity.flip(0), 0.3, 20.0)[0].flip(1)), 1e-4),
        "transposed": (same(run(image.mT, disparity.mT, 0.3, 20.0)[0].mT), 1e-4),
        "shifted by whole pixels, radius 6": (shifts[0], 1e-3),
        "shifted by whole pixels, radius 24": (shifts[1], 1e-3),
        "disparity and focus + 0.25": (same(run(image, disparity + 0.25, 0.55, 20.0)[0]), 1e-3),
        "k x 2, disparity and focus / 2": (same(run(image, disparity / 2, 0.15, 40.0)[0]), 1e-3),
    }
    return {name: {"value": value, "target": target} for name, (value, target) in found.items()}


def _temporal(renderer: Renderer, ceiling: Ceiling | None, inputs: Sequence[str], seed: int, count: int, size: int, rays: int) -> dict:
    """RM of a clip with moving layers in foreground defocus, against the truth's own noise: the truth with other rays."""
    clip = list(make_clip("portrait", seed, count, size, 0.2, 24.0, rays=rays))
    inner = (..., *(2 * [slice(clip[0]["margin"], size - clip[0]["margin"])]))

    def frames(pictures: Iterable[torch.Tensor]) -> torch.Tensor:
        return encode(torch.stack(list(pictures)))[inner]

    truth = frames(_chw(case["truth_linear"])[0] for case in clip)
    again = frames(trace(case["layers"], case["k_px"], case["focus"], rays=rays - 1) for case in clip)
    image = torch.cat([_chw(case["image_linear"]) for case in clip])
    disparity = torch.from_numpy(np.stack([case["disparity"] for case in clip]))
    jitter = np.random.default_rng(seed).integers(-3, 4, len(clip)).tolist()
    jittered = torch.stack([grown(d, n) for d, n in zip(disparity, jitter, strict=True)])
    found: dict = {"truth_noise": relation_metric(again, truth), "moving": {}, "jittered": {}}
    for given in inputs:
        if given == "layers":
            if ceiling is not None:
                result = frames(ceiling(case["layers"], case["k_px"], case["focus"]) for case in clip)
                found["moving"]["layers"] = relation_metric(result, truth)
            continue
        extra = [_extra(case, given) for case in clip]
        extra = {name: torch.cat([e[name] for e in extra]) for name in extra[0]}
        for row, d in (("moving", disparity), ("jittered", jittered)):
            found[row][given] = relation_metric(frames(_run(renderer, image, d, 0.2, 24.0, **extra)), truth)
    still = _run(renderer, image[:1].expand(3, -1, -1, -1), disparity[:1].expand(3, -1, -1), 0.2, 24.0)
    return {"static": flicker(encode(still))} | found


def grown(disparity: torch.Tensor, pixels: int) -> torch.Tensor:
    """[H, W] disparity whose near parts reach `pixels` px further (negative: are eaten away), as wrong depth edges do."""
    if not pixels:
        return disparity
    sign, width = (1 if pixels > 0 else -1), 2 * abs(pixels) + 1
    return sign * F.max_pool2d(sign * disparity[None], width, 1, abs(pixels))[0]


def _blurred(disparity: torch.Tensor, sigma: float) -> torch.Tensor:
    from kornia.filters import gaussian_blur2d

    size = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur2d(disparity[None, None], size, (sigma, sigma), border_type="replicate")[0, 0]


def _depth_errors(disparity: torch.Tensor, focus: float) -> dict[str, torch.Tensor]:
    """Name -> wrong disparity; the focus stays the true one. A gain about the focus is a wrong blur strength."""
    wrong = {f"edge {n:+d} px": grown(disparity, n) for n in EDGE_ERRORS}
    wrong |= {f"blur sigma {n} px": _blurred(disparity, float(n)) for n in (1, 2, 4)}
    wrong |= {"8 bit": (disparity * 255).round() / 255}
    wrong |= {f"gain {g:g}": focus + g * (disparity - focus) for g in (0.9, 1.1)}
    return wrong | {f"offset {o:+g}": disparity + o for o in (-0.02, 0.02)}


def _wrong_depth(renderer: Renderer, case: dict, inputs: Sequence[str]) -> dict:
    image, disparity, focus = _chw(case["image_linear"]), torch.from_numpy(case["disparity"]), case["focus"]
    return {
        given: {
            name: _scores(_run(renderer, image, wrong, focus, case["k_px"], **_extra(case, given))[0], case)["all"]
            for name, wrong in _depth_errors(disparity, focus).items()
        }
        for given in inputs
        if _holds(case, given, None)
    }


def _quartiles(found: list[dict]) -> dict:
    """Input -> error -> quartiles over the cases, PSNR of the whole picture."""
    out: dict = {}
    for given in dict.fromkeys(g for one in found for g in one):
        rows = [one[given] for one in found if given in one]
        for name in rows[0]:
            q1, median, q3 = np.quantile([row[name] for row in rows], (0.25, 0.5, 0.75)).tolist()
            out.setdefault(given, {})[name] = {"q1": q1, "median": median, "q3": q3, "cases": len(rows)}
    return out


# Speed


def measure_speed(quality: str = "fast", sizes: Sequence[int] = (512, 1024, 2048), radii: Sequence[float] = (16.0, 64.0)) -> list[dict]:
    """Seconds and peak memory of one square picture each, on the processor, each in a fresh process (the peak is the process's own).

    Returns rows: size px, radius (largest, px), seconds (second run), peak_mib above what inputs and tables take (None where the system
    does not tell), planes (the same in float32 pictures of one channel).
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    rows = []
    for size in sizes:
        for radius in radii:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(_speed, quality, size, radius, torch.get_num_threads()).result())
    return rows


def _speed(quality: str, size: int, radius: float, threads: int) -> dict:
    from .render import render

    def peak() -> float | None:
        try:
            import resource
        except ImportError:
            return None
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, size, size, generator=generator)
    y, x = torch.meshgrid(*(2 * [torch.linspace(-1, 1, size)]), indexing="ij")
    disparity = torch.where(x * x + y * y < 0.2, 0.9, 0.3 + 0.2 * y)[None]  # a near disk before a slope from 0.1 to 0.5

    def run(n: int) -> float:
        start = time.perf_counter()
        defocus = Defocus(disparity[:, :n, :n], torch.tensor([0.9]), torch.tensor([radius / 0.8]), Lens(), False)
        render(image[..., :n, :n], defocus, linear=True, quality=quality)
        return time.perf_counter() - start

    run(64)
    before = peak()
    seconds = min(run(size) for _ in range(2))
    used = None if before is None else peak() - before
    planes = None if used is None else used * 2**20 / (4 * size * size)
    return {"size": size, "radius": radius, "threads": threads, "seconds": seconds, "peak_mib": used, "planes": planes}
