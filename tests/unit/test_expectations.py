"""docs/expectations.md says which test proves what; here is that these tests exist, and the cheap proofs that fit nowhere else."""

import ast
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from bokeh_core.synthesis.demo import demo_scene

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SOURCES = [ROOT / "__init__.py", *sorted((ROOT / "nodes").glob("*.py")), *sorted((ROOT / "bokeh_core").rglob("*.py"))]
NOTES = {"Note", "MarkdownNote"}


def rows():
    """[(number, words)] of the table."""
    lines = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8").splitlines()
    return [(int(m[1]), line) for line in lines if (m := re.match(r"\| (\d+) \|", line))]


def test_all_thirty_are_answered():
    assert [number for number, _ in rows()] == list(range(1, 31))
    for number, words in rows():
        assert "::" in words or "not tested" in words, f"point {number} names neither a test nor a reason"


def test_every_named_test_exists():
    text = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:unit|host|browser|parity)/\w+\.py)::(\w+)`", text))
    assert len(named) > 40
    for file, test in sorted(named):
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{file}::{test} is not there"
        )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_a_file_or_graph_is_executed(path):
    """No eval, exec, subprocess, shell or unpickling, and no sudden types that only some devices have."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"{called}, line {node.lineno}"
            assert not re.match(r"(subprocess|pickle|_pickle|dill|joblib|shelve|marshal)\.\w", called), f"{called}, line {node.lineno}"
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and "training" not in path.parts:  # which switches autocast off, where its user had it on
            assert not node.attr.startswith(("float8", "autocast")), f"{node.attr}, line {node.lineno}"


class NewSchema:
    """A schema class that knows every word, as new hosts have it."""

    def __init__(self, node_id, display_name, category, description, inputs, outputs, search_aliases=(), **more):
        vars(self).update(node_id=node_id, display_name=display_name, category=category, description=description)
        vars(self).update(inputs=inputs, outputs=outputs, search_aliases=search_aliases)


@pytest.fixture
def schemas(nodes, monkeypatch):
    monkeypatch.setattr(sys.modules["comfy_api.latest"].io, "Schema", NewSchema)

    def known(make, *args, **keywords):
        return NewSchema(**keywords) if make is NewSchema else original(make, *args, **keywords)

    original = sys.modules[next(iter(nodes.values())).__module__.rsplit(".", 1)[0] + ".schema"].known
    for one in nodes.values():
        monkeypatch.setattr(sys.modules[one.__module__], "known", known)
    return [one.define_schema() for one in nodes.values()]


def test_nodes_are_described_and_found(schemas):
    for one in schemas:
        assert one.node_id.startswith(("Bokeh", "MagicBokeh", "AnyToBokeh")) and one.category.startswith("bokeh/")
        assert one.display_name and len(one.description) > 30 and len(one.search_aliases) >= 3, one.node_id
        assert all(i.tooltip for i in one.inputs) and all(o.keywords.get("tooltip") for o in one.outputs), one.node_id


def test_every_node_has_help_and_an_example(nodes):
    shown = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    for name in nodes:
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith("# ") and len(page) > 400, name
        if "Load" in name and name != "BokehLoadStack":
            assert "licen" in page.lower() and "models/" in page, f"the help of {name} must name licence and folder of the files"
        assert name in shown, f"{name} is in no workflow"


def test_words_of_the_nodes_are_those_of_the_library(nodes):
    """Nodes write them down themselves, because importing the renderers would slow the host's start."""
    from bokeh_core import render
    from bokeh_core.metrics import compare
    from bokeh_core.samplers.any_to_bokeh import sampler as any_to_bokeh
    from bokeh_core.samplers.bokehdiff import sampler as bokehdiff
    from bokeh_core.samplers.kontext_stack import adapter
    from bokeh_core.samplers.kontext_stack import sampler as kontext_stack
    from bokeh_core.samplers.magicbokeh import sampler as magicbokeh

    def module(node):
        return sys.modules[nodes[node].__module__]

    fidelity = module("BokehDiffRender").FIDELITY
    assert all(tuple(one.FIDELITIES) == fidelity for one in (any_to_bokeh, bokehdiff, magicbokeh))
    assert module("BokehRender").QUALITIES == render.QUALITIES
    assert module("BokehMeasure").EDGE_BAND == compare.EDGE_BAND
    assert (module("MagicBokehRender").MODES, module("MagicBokehRender").COLOUR_FIXES) == (magicbokeh.MODES, magicbokeh.COLOUR_FIXES)
    assert (module("BokehGenerateStack").COLOURS, module("BokehStackAdapter").FILE) == (kontext_stack.COLOURS, adapter.FILE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_complete(nodes, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert workflow["version"] == 0.4
    by_id = {node["id"]: node for node in workflow["nodes"]}
    assert len(by_id) == len(workflow["nodes"]) and workflow["last_node_id"] >= max(by_id), "two nodes have one number"
    for number, source, output, target, entrance, kind in workflow["links"]:
        assert number in by_id[source]["outputs"][output]["links"] and by_id[source]["outputs"][output]["type"] == kind
        assert by_id[target]["inputs"][entrance]["link"] == number
    assert any(node["type"] in NOTES for node in workflow["nodes"])
    needs_files = False
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        about = node["properties"]
        assert about["cnr_id"] == ("bokeh-nodes" if node["type"] in nodes else "comfy-core"), "foreign nodes need another pack"
        assert about["ver"] and about["Node name for S&R"] == node["type"]
        loads = node["type"].startswith("BokehLoad") or node["type"].endswith(("VAELoader", "UNETLoader"))
        needs_files |= loads and node["type"] != "BokehLoadStack"
        for model in about.get("models", []):
            assert model["url"].startswith("https://") and model["name"] and model["directory"]
    if not needs_files:  # the others get their thumbnails from real weights
        assert path.with_suffix(".jpg").exists(), "a thumbnail is missing"


def test_every_published_habit_is_in_the_docs():
    """docs/fidelity.md names each switch of each system, and no switch that is not there."""
    from bokeh_core.depth import unidepth
    from bokeh_core.samplers.any_to_bokeh import sampler as any_to_bokeh
    from bokeh_core.samplers.bokehdiff import pisa
    from bokeh_core.samplers.bokehdiff import sampler as bokehdiff
    from bokeh_core.samplers.kontext_stack import recipe
    from bokeh_core.samplers.magicbokeh import sampler as magicbokeh

    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    parts = {part.splitlines()[0].split()[0]: part for part in text.split("\n## ")[1:]}
    for part, kinds in {
        "BokehDiff": (bokehdiff.Fidelity, pisa.Pisa),
        "MagicBokeh": (magicbokeh.Fidelity,),
        "Any-to-Bokeh": (any_to_bokeh.Fidelity,),
        "Bokeh": (recipe.Fidelity,),
        "Depth": (unidepth.Quirks,),
    }.items():
        switches = {one.name for kind in kinds for one in fields(kind)}
        assert switches <= set(re.findall(r"`(\w+)`", parts[part])), part
        assert set(re.findall(r"\| `(\w+)` \|", parts[part])) <= switches, part


def test_untouched_widgets_give_a_good_picture(nodes):
    """Load image, depth, Set Focus and Blur, Render Bokeh, and not one widget changed: the subject is sharp, the rest is not."""
    scene = demo_scene(0, 240, 160)
    image, depth = scene["image"].movedim(0, -1)[None], scene["disparity"][None]

    def defaults(name):
        return {i.id: i.default for i in nodes[name].define_schema().inputs if i.default is not None}

    # The stand-in host keeps defaults of True and False and numbers as the real one does.
    defocus, _, in_focus = nodes["BokehDefocus"].execute(image=image, depth=depth, **defaults("BokehDefocus")).args
    (result,) = nodes["BokehRender"].execute(image=image, defocus=defocus, **defaults("BokehRender")).args
    assert result.shape == image.shape and 0.02 < float((in_focus > 0.5).float().mean()) < 0.6
    moved = (result - image).abs().mean(-1)
    sharp, soft = in_focus > 0.99, defocus.signed_radius().abs() > 3
    assert float(moved[sharp].mean()) < 0.02 < 0.03 < float(moved[soft].mean())


def test_same_inputs_same_picture(nodes):
    """Twice the same, bit for bit, and nothing that went in has changed."""
    generator = torch.Generator().manual_seed(0)
    image, depth = torch.rand(2, 30, 41, 4, generator=generator), torch.rand(1, 30, 41, generator=generator)
    kept = image.clone(), depth.clone()
    widgets = {i.id: i.default for i in nodes["BokehDefocus"].define_schema().inputs if i.default is not None}
    results = []
    for _ in range(2):
        defocus = nodes["BokehDefocus"].execute(image=image, depth=depth, **widgets).args[0]
        results.append(nodes["BokehRender"].execute(image=image, defocus=defocus).args[0])
    assert torch.equal(*results) and torch.equal(image, kept[0]) and torch.equal(depth, kept[1])
