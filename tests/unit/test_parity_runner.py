"""The parity runner itself: what it prints and when it fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CASE = ROOT / "tests" / "parity" / "cases" / "dof_cond_table_a"


def run(folder):
    done = subprocess.run([sys.executable, "-m", "tests.parity", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def copy_case(folder, name, change=lambda meta: None, table=None):
    from safetensors.torch import load_file, save_file

    meta, tensors = json.loads(CASE.with_suffix(".json").read_text()), load_file(CASE.with_suffix(".safetensors"))
    change(meta)
    if table is not None:
        tensors["out.table"] = table(tensors["out.table"])
    (folder / f"{name}.json").write_text(json.dumps(meta))
    save_file(tensors, folder / f"{name}.safetensors")


def test_unseen_case_unknown_unit_and_json_only(tmp_path):
    copy_case(tmp_path, "dof_cond_table_never_seen")
    (tmp_path / "unheard_of_a.json").write_text("{}")
    code, lines = run(tmp_path)
    assert code == 0
    verdict, name, error, tolerance = lines[0].split()
    assert (verdict, name) == ("PASS", "dof_cond_table_never_seen") and float(error) <= float(tolerance) == 1e-9
    assert lines[1].startswith("SKIP unheard_of_a")
    assert lines[2] == "1 passed, 0 failed, 1 skipped"


def test_wrong_numbers_and_unexpected_errors_fail(tmp_path):
    def no_error_expected(meta):
        for row in meta["rows"]:
            row.pop("error", None)

    def error_expected(meta):
        meta["rows"][0]["error"] = "ZeroDivisionError"

    def off_by_a_little(table):
        changed = table.clone()
        changed[3, 2] *= 1 + 1e-8
        return changed

    copy_case(tmp_path, "dof_cond_table_1", table=off_by_a_little)
    copy_case(tmp_path, "dof_cond_table_2", change=no_error_expected)
    copy_case(tmp_path, "dof_cond_table_3", change=error_expected)
    copy_case(tmp_path, "dof_cond_table_4", table=lambda table: torch.cat([table, table]))
    copy_case(tmp_path, "dof_cond_table_5", table=lambda table: table * float("nan"))
    shutil.copy(CASE.with_suffix(".safetensors"), tmp_path / "dof_cond_table_6.safetensors")  # without its JSON
    code, lines = run(tmp_path)
    assert code == 1
    assert [line.split()[0] for line in lines[:-1]] == ["FAIL"] * 6
    assert lines[-1] == "0 passed, 6 failed, 0 skipped"


@pytest.mark.parametrize("empty", [True, False])
def test_no_case_is_a_failure(tmp_path, empty):
    code, lines = run(tmp_path if empty else tmp_path / "missing")
    assert code == 1 and ("holds no case" if empty else "no folder") in lines[0]
