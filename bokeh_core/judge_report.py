"""Write down what judge.judge_renderer found: Markdown tables, JSON, and curves as SVG."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .judge import EDGE_ERRORS, INPUTS, RECORDED
from .media import atomic

HEADS = {"all": "whole", "edge8": "edge 8 px", "edge24": "edge 24 px", "in_focus": "in focus", "ssim": "SSIM"}
GIVEN = {
    "composite": "picture + disparity",
    "matte": "+ matte",
    "plate": "+ matte + clean plate",
    "layers": "true layers (ceiling)",
}


def write_report(folder: str | Path, report: dict, title: str) -> list[Path]:
    """Write judge.json, judge.md and the curves robustness.svg and radius.svg into `folder`; returns their paths."""
    folder = Path(folder)
    files = {"judge.json": json.dumps(report, indent=1, allow_nan=False) + "\n"} | plots(report)
    pictures = "".join(f"\n![{name.removesuffix('.svg')}]({name})\n" for name in files if name.endswith(".svg"))
    files["judge.md"] = markdown(report, title) + pictures
    for name, text in files.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def markdown(report: dict, title: str) -> str:
    """The whole report as Markdown."""
    parts = [f"# {title}"]
    rows = [
        [kind, GIVEN[given], str(means["cases"]), *(_number(means[name], 4 if name == "ssim" else 2) for name in HEADS)]
        for kind, by_input in report["regimes"].items()
        for given, means in by_input.items()
    ]
    parts += ["## Truth by rays", "PSNR in dB over clip(x, 0, 1)^(1/2.2), means over the cases of each regime; 100 = equal."]
    parts += [_table(["regime", "given", "cases", *HEADS.values()], rows)]
    if "known_methods" in report:
        parts += _known(report["known_methods"])

    lights, steady = report["lights"], report["monotonicity"]
    parts += [
        "## Points of light",
        "A lit pixel on black: L1 of its picture against the exact disk (target 1 %), measured radius, light kept.",
    ]
    columns = (lights[name] for name in ("radius_px", "measured_px", "shape_error", "mass"))
    rows = [[f"{r:g}", _number(m, 3), f"{100 * e:.2f} %", _number(light, 5)] for r, m, e, light in zip(*columns, strict=True)]
    parts += [_table(["radius asked, px", "measured, px", "shape error", "light kept"], rows)]

    parts += ["## Invariants", "Largest difference in linear light."]
    rows = [
        [name, f"{row['value']:.1e}", f"{row['target']:g}", "yes" if row["value"] <= row["target"] else "NO"]
        for name, row in report["invariants"].items()
    ]
    parts += [_table(["", "found", "allowed", "holds"], rows)]

    parts += ["## Blur strength"]
    rows = [
        ["Spearman correlation of radius and k", _number(steady["spearman"], 4), "1"],
        ["slope error", f"{100 * steady['slope_error']:.2f} %", "2 %"],
        [
            "detail outside focus at k = " + ", ".join(f"{k:g}" for k in steady["k"]),
            ", ".join(f"{e:.1e}" for e in steady["gradient_energy"]) + (" (falls)" if steady["detail_falls"] else " (DOES NOT FALL)"),
            "falls",
        ],
        ["focus pull: largest second difference of the radius, px", _number(steady["pull_roughness_px"], 3), "0"],
    ]
    parts += [_table(["", "found", "target"], rows)]

    clips = report["temporal"]
    parts += ["## Clips", f"RM x 1000 against the truth. The truth's own noise (other rays): {1000 * clips['truth_noise']:.2f}."]
    rows = [["static scene", "", f"{1000 * clips['static']:.2f}"]]
    for row, name in (("moving", "moving layers, foreground defocus"), ("jittered", "the same, depth edges jittering by 3 px")):
        rows += [[name, GIVEN[given], f"{1000 * value:.2f}"] for given, value in clips[row].items()]
    parts += [_table(["clip", "given", "RM x 1000"], rows)]

    if report["robustness"]:
        parts += ["## Wrong depth", "PSNR in dB of the whole picture, median over the cases (quartiles)."]
        columns = [(kind, given) for kind, by_input in report["robustness"].items() for given in by_input]
        errors = next(iter(next(iter(report["robustness"].values())).values()))

        def cell(kind: str, given: str, error: str) -> str:
            q = report["robustness"][kind][given][error]
            return f"{q['median']:.1f} ({q['q1']:.1f}, {q['q3']:.1f})"

        rows = [[error, *(cell(*column, error) for column in columns)] for error in errors]
        parts += [_table(["error", *(f"{kind}, {GIVEN[given]}" for kind, given in columns)], rows)]
    if "speed" in report:
        parts += ["## Speed and memory", "One picture on the processor; peak memory above the inputs, also as float32 planes of its size."]
        rows = [
            [f"{row['size']} x {row['size']}", f"{row['radius']:g}", str(row["threads"]), _number(row["seconds"], 2),
             _number(row["peak_mib"], 0), _number(row["planes"], 1)]
            for row in report["speed"]
        ]  # fmt: skip
        parts += [_table(["size, px", "largest radius, px", "threads", "s", "MiB", "planes"], rows)]

    parts += ["## Cases"]
    rows = [
        [name, case["regime"], f"{case['k_px']:g}", GIVEN[given], *(_number(s[n], 4 if n == "ssim" else 2) for n in HEADS)]
        for name, case in report["cases"].items()
        for given, s in case["scores"].items()
    ]
    parts += [_table(["case", "regime", "k", "given", *HEADS.values()], rows)]
    return "\n\n".join(parts) + "\n"


def _known(known: dict) -> list[str]:
    columns = [HEADS[name] for name in RECORDED]
    rows = [[method, *(_number(row[name]) for name in RECORDED)] for method, row in known["means"].items()]
    parts = ["## Against known methods", "From picture + disparity alone (oracle: with the true layers). Means over the cases, dB."]
    parts += [_table(["method", *columns], rows)]
    rows = [
        [case, *(f"{row[n]['ours']:.2f} ({row[n]['difference']:+.2f} to {row[n]['method']})" if n in row else "–" for n in RECORDED)]
        for case, row in known["best"].items()
    ]
    rows += [["**mean difference**", *(_number(known["mean_difference"][name], signed=True) for name in RECORDED)]]
    return [*parts, "Each case against its best method without true layers:", _table(["case", *columns], rows)]


def _number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Curves

COLOURS = ("#1f6fb4", "#c8501e", "#2f8f4e", "#8a4fb0", "#777777")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 400, 60, 280, 40, 50  # px; names stand in the right margin


def plots(report: dict) -> dict[str, str]:
    """File name -> SVG."""
    lights, steady = report["lights"], report["monotonicity"]
    found = {"still": (lights["radius_px"], lights["measured_px"]), "focus pull": (steady["pull_asked_px"], steady["pull_measured_px"])}
    errors = {name: [(r, *(3 * [m - r])) for r, m in zip(*pair, strict=True) if m is not None] for name, pair in found.items()}
    files = {"radius.svg": chart("Error of the radius of a point of light", "asked, px", "measured - asked, px", errors)}
    curves = {
        f"{kind}, {GIVEN[given]}": [
            (n, *(by_error[f"edge {n:+d} px"][q] for q in ("median", "q1", "q3"))) for n in EDGE_ERRORS if f"edge {n:+d} px" in by_error
        ]
        for kind, by_input in report["robustness"].items()
        for given, by_error in sorted(by_input.items(), key=lambda item: INPUTS.index(item[0]))
    }
    if curves:
        files["robustness.svg"] = chart("Depth edges off by some pixels", "near parts grown (+) or eaten (-), px", "PSNR, dB", curves)
    return files


def chart(title: str, x_name: str, y_name: str, series: dict[str, list[tuple[float, float, float, float]]]) -> str:
    """A line chart as SVG. series: name -> points (x, y, low, high); the band from low to high is shaded."""
    xs = [p[0] for points in series.values() for p in points]
    ys = [v for points in series.values() for p in points for v in p[1:]]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        u = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        v = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + u * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM), 1)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{escape(words)}</text>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text((LEFT + WIDTH - RIGHT) / 2, 22, title, 'text-anchor="middle" font-size="15"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, 'text-anchor="middle"'),
        text(16, HEIGHT / 2, y_name, f'text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})"'),
    ]
    for x in x_ticks:
        px, bottom = at(x, y_ticks[0])
        out += [f'<path d="M{px} {TOP}V{bottom}" stroke="#ddd"/>', text(px, bottom + 17, f"{x:g}", 'text-anchor="middle"')]
    for y in y_ticks:
        left, py = at(x_ticks[0], y)
        out += [f'<path d="M{left} {py}H{WIDTH - RIGHT}" stroke="#ddd"/>', text(left - 6, py + 4, f"{y:g}", 'text-anchor="end"')]
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        if any(low != high for _, _, low, high in points):
            band = [at(x, high) for x, _, _, high in points] + [at(x, low) for x, _, low, _ in reversed(points)]
            out.append(f'<polygon points="{_path(band)}" fill="{colour}" opacity="0.15"/>')
        line = [at(x, y) for x, y, _, _ in points]
        out.append(f'<polyline points="{_path(line)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in line]
        top = TOP + 16 + 17 * i
        out += [f'<path d="M{WIDTH - RIGHT + 14} {top - 4}h18" stroke="{colour}" stroke-width="2"/>', text(WIDTH - RIGHT + 38, top, name)]
    return "\n".join([*out, "</svg>"]) + "\n"


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below low to at or above high, about six of them."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / 5))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, max(last, first + 1) + 1)]
