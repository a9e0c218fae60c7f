"""Finds the cases of a folder, picks the check for each and tells how it went. How to add a check: see the package docstring."""

import importlib
import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Case:
    """One recorded case: its name, the JSON (`meta`), the tensors by name (empty when it has none), and the folder of its neighbours."""

    name: str
    meta: dict
    tensors: dict[str, torch.Tensor]
    folder: Path = Path()


@dataclass(frozen=True)
class Outcome:
    """PASS, FAIL or SKIP of one case, as one line."""

    verdict: str
    name: str
    error: float = math.nan
    tolerance: float = math.nan
    why: str = ""

    def __str__(self):
        if self.verdict == "SKIP":
            return f"SKIP {self.name} - -"
        return f"{self.verdict} {self.name} {self.error:.3g} {self.tolerance:.3g}" + (f"  # {self.why}" if self.why else "")


Check = Callable[[Case], tuple[float, float]]
_checks: dict[str, Check] = {}


def unit(prefix: str) -> Callable[[Check], Check]:
    """Register a check for the cases whose name starts with `prefix`."""

    def register(check: Check) -> Check:
        if prefix in _checks:
            raise ValueError(f"Two checks claim the prefix {prefix}.")
        _checks[prefix] = check
        return check

    return register


def worst(pairs) -> tuple[float, float]:
    """Of several (error, tolerance) the one nearest to failing, or failing most."""

    def strain(pair):
        error, tolerance = pair
        if tolerance > 0 and not math.isnan(error):
            return error / tolerance
        return 0.0 if error <= tolerance else math.inf

    return max(pairs, key=strain)


def find_check(name: str) -> Check | None:
    """The check whose prefix fits `name` best, None when there is none."""
    _load_units()
    fitting = [prefix for prefix in _checks if name.startswith(prefix)]
    return _checks[max(fitting, key=len)] if fitting else None


def find_cases(folder: Path) -> list[Path]:
    """Stems (path without suffix) of the cases in a folder, by name."""
    return sorted({path.with_suffix("") for path in folder.iterdir() if path.suffix in (".json", ".safetensors")})


def load_case(stem: Path) -> Case:
    from safetensors.torch import load_file

    tensors = stem.parent / (stem.name + ".safetensors")
    meta = json.loads((stem.parent / (stem.name + ".json")).read_text(encoding="utf-8"))
    return Case(stem.name, meta, load_file(tensors) if tensors.exists() else {}, stem.parent)


def run_case(stem: Path) -> Outcome:
    """Run the check of one case. A check that raises has failed."""
    check = find_check(stem.name)
    if check is None:
        return Outcome("SKIP", stem.name)
    try:
        error, tolerance = check(load_case(stem))
    except Exception as exception:
        return Outcome("FAIL", stem.name, why=f"{type(exception).__name__}: {exception}".replace("\n", " "))
    return Outcome("PASS" if error <= tolerance else "FAIL", stem.name, error, tolerance)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tests.parity DIR")
        return 1
    folder = Path(arguments[0])
    if not folder.is_dir():
        print(f"There is no folder {folder}; give the folder that holds the cases (NAME.json and NAME.safetensors).")
        return 1
    stems = find_cases(folder)
    if not stems:
        print(f"The folder {folder} holds no case; expected NAME.json with NAME.safetensors.")
        return 1
    count = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    for stem in stems:
        outcome = run_case(stem)
        count[outcome.verdict] += 1
        print(outcome, flush=True)
    print(f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped")
    return 1 if count["FAIL"] else 0


def _load_units():
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in ("__main__", "runner") and not module.name.startswith("test_"):
            importlib.import_module(f"{package}.{module.name}")
