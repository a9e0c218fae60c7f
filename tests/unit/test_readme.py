"""README.md and docs: links lead somewhere, commands are understood, tables are complete."""

import re
import shlex
from pathlib import Path

import pytest

from bokeh_core import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "web" / "docs").glob("*.md"))]


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{page.name} links to {target}"


def commands():
    """Every line of a shell block, in all pages, that calls bokeh."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("bokeh "):
                    yield pytest.param(line, id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_understood(line):
    """The parser takes it; what it names need not exist."""
    words = shlex.split(line, comments=True)[1:]
    args = cli.build_parser().parse_args(words)
    assert callable(args.run)
    if words[0] == "render":
        cli._check_options(args)


def test_it_names_every_workflow_and_node():
    workflows = {file.stem for file in (ROOT / "workflows").glob("*.json")}
    named = set(re.findall(r"`([a-z0-9_]+)`", README[README.index("| workflow |") : README.index("## Which renderer")]))
    assert named == workflows
    table = README[README.index("## Nodes") : README.index("## Command line")]
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "nodes").glob("*.py"))
    nodes = re.findall(r'node_id="\w+",\s+display_name="([^"]+)"', sources)
    assert len(nodes) == sources.count("node_id=") > 20
    for name in nodes:
        shown = name.removesuffix(" (Bokeh)").replace("Render with MagicBokeh", "… MagicBokeh")
        assert f"**{shown.replace('Render with Any-to-Bokeh', '… Any-to-Bokeh')}**" in table, name


def test_the_test_command_is_where_ci_looks_for_it():
    block = re.search(r"<!-- test command -->\n```sh\n(.+)\n```\n", README)
    assert block and "pytest" in block[1] and "\n" not in block[1]


def test_the_table_of_f_stops_is_what_the_lens_gives():
    """docs/optics.md: blur of infinity with the subject at 2 m, at 1024 px width."""
    import torch

    from bokeh_core.optics.lens import Lens

    text = (ROOT / "docs" / "optics.md").read_text(encoding="utf-8")
    rows = [row for row in text[text.index("## Strength in f-stops") :].splitlines() if row.startswith("| ") and " mm" in row]
    stops = [1.4, 1.8, 2.8, 4, 5.6, 8]
    assert len(rows) == 6
    for row in rows:
        name, *values = [cell.strip() for cell in row.strip("|").split("|")]
        focal_length, *sensor = (float(number) for number in re.findall(r"([\d.]+) mm", name))
        for stop, value in zip(stops, values, strict=True):
            lens = Lens(f_number=stop, focal_length=focal_length, sensor_width=sensor[0] if sensor else 36.0, focus_distance=2.0)
            k = lens.k(1024, torch.tensor([0.5]), metric=True, disparity_range=1.0)
            assert float(k) * 0.5 == pytest.approx(float(value), abs=0.051), (name, stop)


def test_pictures_are_small():
    for picture in (ROOT / "docs").rglob("*.jpg"):
        assert picture.stat().st_size < 150_000, picture
