"""Measuring, for all benchmarks alike: two forms of one thing in turns, in one process.

A machine is never quite idle, so what counts are ratios: ours and its baseline take turns, the medians of both are divided, and the CPU
time of the process stands beside the wall clock. What the machine allows is measured in the same process (`Floors`).
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.live_bytes import LiveBytes


@dataclass(frozen=True)
class Pair:
    """Two forms of one thing.

    ours, baseline  functions without arguments that return the result, a tensor or None; no baseline = only measured
    against   what the baseline is
    target    how many times faster ours should be, or 0
    share     part of the whole work that `baseline` does (its figures are divided by it)
    equal     whether both return the same, so that their difference is worth printing
    rounds    how often each runs; 0 = as the caller likes
    """

    name: str
    ours: Callable
    baseline: Callable | None = None
    against: str = ""
    target: float = 0.0
    share: float = 1.0
    equal: bool = True
    rounds: int = 0


@dataclass(frozen=True)
class Counted:
    """Operations of full-size networks, counted on the meta device (multiply and add are 2), where nothing is computed."""

    name: str
    ours: float
    baseline: float
    against: str
    target: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """How time and memory grow."""

    name: str
    rows: list[dict] = field(default_factory=list)


class Traffic(LiveBytes):
    """Counts what operations do on the way: bytes that are alive at most, bytes read and written, elements written by arithmetic."""

    VIEWS = ("view", "slice", "select", "expand", "transpose", "permute", "unsqueeze", "squeeze", "as_strided", "detach", "alias", "unbind")

    def __init__(self):
        super().__init__(())
        self.moved = self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for t in given:
            self.keep(t, 0)  # inputs and weights
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function.overloadpacket.__name__.strip("_") not in self.VIEWS and "empty" not in function.__name__:
            made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in (*made, *given))
            self.elements += sum(t.numel() for t in made if t.is_floating_point())
        return result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(work: Callable, device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds of a run."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def cost(work: Callable, device: torch.device) -> tuple[dict, torch.Tensor | None]:
    """What one run takes, and its result. On a CPU every tensor is counted; a run on one thread, since modes belong to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FlopCounterMode(display=False) as products, Traffic() as traffic:
            result = work()
    finally:
        torch.set_num_threads(threads)
    found = {"peak_mib": traffic.peak / 2**20, "moved_gib": traffic.moved / 2**30}
    found["gflop"] = (products.get_total_flops() + traffic.elements) / 1e9
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found, result


@torch.no_grad()
def compare(pair: Pair, device: torch.device, rounds: int) -> dict:
    """The row of a pair: medians, ratios, cost."""
    rounds = pair.rounds or rounds
    forms = {"ours": pair.ours} | ({"baseline": pair.baseline} if pair.baseline else {})
    row = {"name": pair.name, "against": pair.against, "target": pair.target}
    results = {}
    for name, work in forms.items():  # counting also warms up
        row[name], results[name] = cost(work, device)
    times = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            times[name].append(once(work, device))
    for name, measured in times.items():
        whole = pair.share if name == "baseline" else 1.0
        row[name] = {key: value / (1 if key == "peak_mib" else whole) for key, value in row[name].items()}
        for key, values in zip(("wall_s", "cpu_s"), zip(*measured, strict=True), strict=True):
            row[name][key] = statistics.median(values) / whole
    if pair.baseline:
        row["times_faster"] = {key: row["baseline"][key] / max(row["ours"][key], 1e-9) for key in ("wall_s", "cpu_s")}
        ratios = [b[1] / pair.share / max(a[1], 1e-9) for a, b in zip(times["ours"], times["baseline"], strict=True)]
        row["spread"] = [min(ratios), max(ratios)]
        row["memory"] = row["ours"]["peak_mib"] / max(row["baseline"]["peak_mib"], 1e-9)
        if pair.equal and all(isinstance(r, torch.Tensor) for r in results.values()):
            a, b = results["ours"].double(), results["baseline"].double()
            row["difference"] = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return row


def floors(device: torch.device) -> dict:
    """What the machine does at best: GiB/s of a large copy (read and written), GFLOP/s of a large product, float32."""
    large, matrix = (64 << 20, 4096) if device.type == "cuda" else (16 << 20, 1024)
    source = torch.ones(large, device=device)
    to = torch.empty_like(source)
    a = torch.ones(matrix, matrix, device=device)
    copy, product = (lambda: to.copy_(source)), (lambda: a @ a)
    for work in (copy, product):
        work()
    # On a busy CPU the wall clock says little: there, the CPU time of each thread.
    threads = torch.get_num_threads()
    best = []
    for work in (copy, product):
        times = [once(work, device) for _ in range(7)]
        best.append(min(cpu / threads if device.type == "cpu" else wall for wall, cpu in times))
    return {"gib_per_s": 2 * source.nbytes / 2**30 / best[0], "gflop_per_s": 2 * matrix**3 / 1e9 / best[1]}


def floors_of(found: dict, limits: dict) -> dict:
    """Seconds that the operations, and the bytes, of a run take at best on this machine."""
    return {"operations_s": found["gflop"] / limits["gflop_per_s"], "bytes_s": found["moved_gib"] / limits["gib_per_s"]}


def begin_peak() -> None:
    """From here on `resident_peak` counts anew (Linux), from what is held now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def resident_peak() -> float:
    """MiB that this process has held at most."""
    try:  # Linux; getrusage there counts the parent process too
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def random_weights(network: torch.nn.Module) -> torch.nn.Module:
    """Seeded weights of a sensible size; ready to run."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5 + 0.1 * noise)
    return network.eval().requires_grad_(False)


def flops(work: Callable) -> float:
    """TFLOP of a call, for the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12
