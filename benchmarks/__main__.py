"""Where the seconds and bytes go, as ratios measured in turns in one process.

    python -m benchmarks                               every part: a table in Markdown; ten and a half minutes on two cores
    python -m benchmarks --only physical,depth --quick  some parts, on small sizes
    python -m benchmarks --device cuda --json F --markdown F --history DIR

`--history DIR` adds a line of JSON to DIR/MACHINE.jsonl, MACHINE being the name of the CPU or GPU, and prints what changed since the last.
"""

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

PARTS = ("physical", "depth", "bokehdiff", "magicbokeh", "any_to_bokeh", "kontext_stack", "dsfa", "scale")
MORE = ("large", "precision", "sweep")  # only when named: long, or not a matter of speed


def machine(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} threads"


def run_part(name: str, device: str, quick: bool, rounds: int) -> dict:
    """All figures of a part, in this process."""
    import torch

    from .measure import Counted, Curve, Pair, compare, floors, floors_of

    place = torch.device(device)
    limits = floors(place)
    found = {"limits": limits, "rows": [], "counted": [], "curves": []}
    for one in importlib.import_module(f"benchmarks.{name}").measure(quick, device):
        if isinstance(one, Pair):
            row = compare(one, place, rounds)
            row["floors"] = floors_of(row["ours"], limits)
            found["rows"].append(row)
        elif isinstance(one, Counted):
            found["counted"].append(asdict(one))
        elif isinstance(one, Curve):
            found["curves"].append(asdict(one))
    again = floors(place)  # the machine may have been busier then
    found["limits"] = {key: max(limits[key], again[key]) for key in limits}
    return found


def verdict(times: float, target: float) -> str:
    return "" if not target else f"≥ {target:g}: {'met' if times >= target else 'MISSED'}"


def markdown(report: dict) -> str:
    lines = [
        f"{report['machine']}; torch {report['torch']}, {report['threads']} thread(s); load {report['load'][0]:.1f} before, "
        f"{report['load'][1]:.1f} after; {report['seconds']:.0f} s in all. `{report['command']}`",
        "",
        "| | s | CPU s | GFLOP | GiB moved | peak MiB | floor: operations s | gap | floor: bytes s "
        "| baseline | baseline s | times faster (CPU) | memory | difference | target |",
        "|" + "---|" * 15,
    ]
    for part in report["parts"].values():
        for row in part["rows"]:
            ours, cells = row["ours"], [row["name"]]
            cells += [f"{ours['wall_s']:.3g}", f"{ours['cpu_s']:.3g}", f"{ours['gflop']:.3g}", f"{ours['moved_gib']:.3g}"]
            cells += [f"{ours['peak_mib']:.0f}", f"{row['floors']['operations_s']:.2g}"]
            cells += [f"{ours['cpu_s'] / max(row['floors']['operations_s'], 1e-9):.1f}x", f"{row['floors']['bytes_s']:.2g}"]
            if "baseline" in row:
                times = row["times_faster"]
                cells += [row["against"], f"{row['baseline']['wall_s']:.3g}"]
                cells += [f"**{times['wall_s']:.2f}x** ({times['cpu_s']:.2f}x, {row['spread'][0]:.2f} to {row['spread'][1]:.2f})"]
                cells += [f"{row['memory']:.2f}", f"{row['difference']:.0e}" if "difference" in row else ""]
                cells += [verdict(times["cpu_s"] if report["device"] == "cpu" else times["wall_s"], row["target"])]
            else:
                cells += [""] * 6
            lines.append("| " + " | ".join(cells) + " |")
    counted = [row for part in report["parts"].values() for row in part["counted"]]
    if counted:
        lines += ["", "| counted, full-size networks | TFLOP | baseline | TFLOP | times fewer | target | |", "|" + "---|" * 7]
        for row in counted:
            times = row["baseline"] / row["ours"]
            cells = [row["name"], f"{row['ours']:.2f}", row["against"], f"{row['baseline']:.2f}", f"**{times:.2f}x**"]
            lines.append("| " + " | ".join([*cells, verdict(times, row["target"]), row["note"]]) + " |")
    for part in report["parts"].values():
        for curve in part["curves"]:
            if curve["rows"]:
                names = list(curve["rows"][0])
                lines += ["", f"{curve['name']}:", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
                lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in curve["rows"]]
    limits = [part["limits"] for part in report["parts"].values()]
    best = {key: max(one[key] for one in limits) for key in limits[0]}
    lines += [
        "",
        f"Floors: a large float32 product does {best['gflop_per_s']:.0f} GFLOP/s here, a large copy moves {best['gib_per_s']:.1f} GiB/s. "
        "They are what the counted operations, and all bytes that operations read and write, take at these rates, measured in each part's "
        "process; *gap* is CPU time over the floor of the operations. Tiles stay in the caches: their bytes take less than their floor.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def remember(folder: Path, report: dict) -> str:
    """Add the report to the machine's history; says what changed since the last one like it."""
    file = folder / (re.sub(r"[^\w.-]+", "_", report["machine"]) + ".jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    times = {row["name"]: row["ours"]["cpu_s"] for part in report["parts"].values() for row in part["rows"]}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    before = next((old for old in map(json.loads, reversed(lines)) if old["quick"] == report["quick"]), None)
    with file.open("a", encoding="utf-8") as out:
        keys = ("date", "quick", "device", "torch", "threads", "load")
        out.write(json.dumps({key: report[key] for key in keys} | {"cpu_s": times}) + "\n")
    changed = [
        f"{name}: {times[name] / old:.2f} of the CPU time of {before['date']}"
        for name, old in (before["cpu_s"] if before else {}).items()
        if name in times and not 0.8 < times[name] / max(old, 1e-9) < 1.25
    ]
    return "\n".join([f"history: {file}", *changed])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), metavar="A,B", help=f"parts: {', '.join(PARTS + MORE)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: to try the benchmarks, or for a first idea")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="how often the quick pairs run (default: 3); slow ones run once")
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--markdown", type=Path, metavar="F")
    parser.add_argument("--history", type=Path, metavar="DIR")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(run_part(args.part, args.device, args.quick, args.rounds)))
        return 0
    names = args.only.split(",")
    unknown = [name for name in names if name not in PARTS + MORE]
    if unknown:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(PARTS + MORE)}")

    import torch

    start, load = time.perf_counter(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    parts, failed = {}, []
    for name in names:
        began = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks", "--part", name, "--device", args.device, "--rounds", str(args.rounds)]
        done = subprocess.run([*command, *(["--quick"] if args.quick else [])], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
            continue
        parts[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    report = {
        "machine": machine(args.device),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "quick": args.quick,
        "command": " ".join(
            ["python -m benchmarks", *(["--quick"] if args.quick else []), f"--only {','.join(names)} --rounds {args.rounds}"]
        ),
        "load": [load, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0],
        "seconds": time.perf_counter() - start,
        "parts": parts,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if parts:
        table = markdown(report)
        print(table)
        if args.markdown:
            args.markdown.write_text(table, encoding="utf-8")
        if args.history:
            print(remember(args.history, report), file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
