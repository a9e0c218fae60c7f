"""What the registry, ComfyUI-Manager and pip look at."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
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


def archive(root: Path = ROOT) -> list[Path]:
    """What `comfy node pack` takes: the files git knows, less those .comfyignore names, all of which stand at the root."""
    lines = (root / ".comfyignore").read_text().splitlines()
    ignored = [line.removeprefix("/") for line in lines if line and not line.startswith("#")]
    known = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(name) for name in known if Path(name).parts[0] not in ignored and (root / name).exists()]


def test_the_release_archive_is_small_and_holds_no_tests():
    files = archive()
    folders = {file.parts[0] for file in files if len(file.parts) > 1}
    assert folders == {"bokeh_core", "nodes", "web", "locales", "workflows", "docs"}
    assert {str(file) for file in files if len(file.parts) == 1} == {
        *("__init__.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE", ".comfyignore", ".gitignore"),
    }
    assert sum((ROOT / file).stat().st_size for file in files) < 10_000_000
    assert not [file for file in files if (ROOT / file).stat().st_size > 1_000_000]
    kinds = {".py", ".toml", ".txt", ".md", ".json", ".js", ".jpg", ".png", ".svg", ".mp4", ""}
    assert {file.suffix for file in files} <= kinds, "no weights, archives or programs"
    assert max(len(str(file)) for file in files) < 100, "Windows allows 260 characters in all"


def test_the_release_archive_holds_what_runs():
    """Every module, page, word and workflow that is in the tree, except what git ignores."""
    files = {str(file) for file in archive()}
    for pattern in ("nodes/*.py", "bokeh_core/**/*.py", "bokeh_core/**/*.toml", "web/**/*.js", "web/docs/*.md", "workflows/*.json"):
        here = {file.relative_to(ROOT).as_posix() for file in ROOT.glob(pattern)}
        untracked = subprocess.run(["git", "ls-files", "-o"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        assert here - set(untracked) and here - set(untracked) <= files


@pytest.mark.skipif(shutil.which("comfy") is None, reason="comfy-cli is not installed")
def test_comfy_cli_accepts_the_pack(tmp_path):
    """`comfy node validate` and `comfy node pack` work without a network; tried with comfy-cli 1.23."""
    subprocess.run(["git", "clone", "-q", "--depth", "1", ROOT.as_uri(), tmp_path / "pack"], check=True)
    for words, sentence in ((["validate"], "checks passed"), (["pack"], "node.zip")):
        command = ["comfy", "--skip-prompt", "--no-enable-telemetry", "node", *words]
        environment = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path / "pack", env=environment, capture_output=True, text=True, timeout=120)
        said = done.stdout + done.stderr
        assert done.returncode == 0 and sentence in said, said
    with zipfile.ZipFile(tmp_path / "pack" / "node.zip") as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == {file.as_posix() for file in archive(tmp_path / "pack")}


def test_icon_is_square_and_small():
    from PIL import Image

    name = PROJECT["tool"]["comfy"]["Icon"].rpartition("/main/")[2]
    with Image.open(ROOT / name) as icon:
        assert icon.size[0] == icon.size[1] <= 400


def test_security_rules_are_part_of_the_style_check():
    """bandit's rules on everything that ships; each exception is one rule in one file, with its reason beside it."""
    lint = PROJECT["tool"]["ruff"]["lint"]
    assert "S" in lint["select"] and not any(rule.startswith("S") for rule in lint["ignore"])
    shipped = {files: rules for files, rules in lint["per-file-ignores"].items() if not files.startswith("{tests")}
    assert all(rules == ["S310"] for rules in shipped.values()) and len(shipped) <= 2
    for name in ("bokeh_core", "nodes"):
        for file in (ROOT / name).rglob("*.py"):
            assert "noqa: S" not in file.read_text(encoding="utf-8"), file
