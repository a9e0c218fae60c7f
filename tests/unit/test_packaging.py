"""What the registry, ComfyUI-Manager and pip look at."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bokeh_core

ROOT = Path(__file__).resolve().parents[2]
if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
else:
    PROJECT = None
pytestmark = pytest.mark.skipif(PROJECT is None, reason="tomllib needs Python 3.11")


def test_requirements_equal_the_dependencies():
    assert (ROOT / "requirements.txt").read_text().split() == PROJECT["project"]["dependencies"]


def test_dependencies_pin_nothing_from_above():
    for line in PROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[A-Za-z0-9_-]+(>=[\d.]+)?", line), line


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    assert version == bokeh_core.__version__
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_registry_finds_what_it_needs():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,98}", project["name"]) and "comfyui" not in project["name"]
    assert project["license"] and project["urls"]["Repository"] and project["requires-python"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] and "web" not in comfy
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert not (ROOT / "install.py").exists() and not (ROOT / "prestartup_script.py").exists()


def test_importing_the_library_stays_light():
    """Neither diffusers nor transformers, kornia, av or PIL is imported before it is needed, and CUDA is not started."""
    code = (
        "import sys, torch; before = set(sys.modules); import bokeh_core.render, bokeh_core.optics.defocus, bokeh_core.video.streaming, "
        "bokeh_core.judge, bokeh_core.cli; new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "heavy = new & {'diffusers', 'transformers', 'kornia', 'av', 'PIL', 'einops'}; "
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_release_archive_is_small_and_holds_no_tests():
    ignored = [line.strip("/ ") for line in (ROOT / ".comfyignore").read_text().splitlines() if not line.startswith("#")]
    assert {"tests", "benchmarks", ".ci"} <= set(ignored)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    kept = [ROOT / f for f in files if f and f.split("/")[0] not in ignored]
    assert sum(f.stat().st_size for f in kept if f.exists()) < 10_000_000
