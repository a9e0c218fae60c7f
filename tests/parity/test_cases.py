"""Runs the cases in this repository, and the full set beside it where that is present (on CI it must be)."""

import os
from pathlib import Path

import pytest

from .runner import find_cases, find_check, run_case

CASES = Path(__file__).parent / "cases"
REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
FULL_SET = [stem for folder in sorted(REFERENCE.glob("*/goldens")) for stem in find_cases(folder) if find_check(stem.name)]


@pytest.mark.parametrize("stem", find_cases(CASES), ids=lambda stem: stem.name)
def test_case_of_this_repository(stem):
    outcome = run_case(stem)
    assert outcome.verdict == "PASS", outcome


def test_cases_stay_small():
    sizes = {path.name: path.stat().st_size for path in CASES.iterdir()}
    assert sizes and max(sizes.values()) <= 300_000, sizes
    assert sum(sizes.values()) <= 6_000_000


def test_full_set_is_present():
    if FULL_SET:
        return
    message = f"THE FULL SET OF PARITY CASES IS MISSING: no {REFERENCE.parent.name}/{REFERENCE.name}/*/goldens beside the repository"
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("stem", FULL_SET, ids=lambda stem: f"{stem.parent.parent.name}/{stem.name}")
def test_case_of_the_full_set(stem):
    outcome = run_case(stem)
    assert outcome.verdict == "PASS", outcome
