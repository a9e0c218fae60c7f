"""What the nodes do between the graph and the library, on a stand-in for ComfyUI; tests/host checks the same pack in a real one."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bokeh_core.optics.lens import Lens

ROOT = Path(__file__).resolve().parents[2]
NAME = "a_pack_with_any_name"


class Recorder:
    """Stands for every input, output, schema and result class: keeps what it was given."""

    def __init__(self, *args, **keywords):
        self.args, self.keywords = args, keywords


class OldSchema:
    """A schema class that knows few words, as old hosts have them."""

    def __init__(self, node_id, display_name, category, description, inputs, outputs):
        self.node_id, self.inputs = node_id, inputs


class Io(SimpleNamespace):
    def __getattr__(self, name):
        return SimpleNamespace(Input=Recorder, Output=Recorder)


@pytest.fixture
def nodes(monkeypatch):
    """The pack's node classes by name, loaded as a package of another name."""
    cpu = torch.device("cpu")
    fakes = {
        "comfy": {},
        "comfy.model_management": {
            "get_torch_device": lambda: cpu,
            "intermediate_device": lambda: cpu,
            "free_memory": lambda size, device: None,
            "throw_exception_if_processing_interrupted": lambda: None,
        },
        "comfy.utils": {"ProgressBar": lambda total: SimpleNamespace(update_absolute=lambda done, total: None)},
        "comfy_api": {},
        "comfy_api.latest": {
            "ComfyExtension": object,
            "io": Io(
                ComfyNode=object,
                Schema=OldSchema,
                NodeOutput=Recorder,
                Custom=lambda name: SimpleNamespace(Input=Recorder, Output=Recorder),
            ),
            "ui": SimpleNamespace(PreviewImage=Recorder),
        },
    }
    for name, members in fakes.items():
        module = ModuleType(name)
        vars(module).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, pack)
    spec.loader.exec_module(pack)
    classes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    yield {one.__name__: one for one in classes}
    for name in [name for name in sys.modules if name.startswith(NAME + ".")]:
        del sys.modules[name]


WIDGETS = {"strength": 24.0, "focus": "auto", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.5}
WIDGETS |= {"depth_values": "near is bright", "follow": False}


@pytest.fixture
def scene():
    """(image [2,40,60,3], depth [1,40,60,3]): a near square before a far wall."""
    depth = torch.full((1, 40, 60, 3), 0.25)
    depth[:, 10:30, 20:40] = 0.75
    return torch.rand(2, 40, 60, 3, generator=torch.Generator().manual_seed(0)), depth


def defocus(nodes, image, depth, **inputs):
    return nodes["BokehDefocus"].execute(image=image, depth=depth, **{**WIDGETS, **inputs}).args


def test_newer_words_are_dropped_for_an_older_host(nodes):
    assert {one.define_schema().node_id for one in nodes.values()} == {"BokehLens", "BokehFocusTrack", "BokehDefocus", "BokehRender"}


def test_every_kind_of_depth_reaches_the_same_blur(nodes, scene):
    """One scene as distance, as 1/distance and as geometry, through one real lens."""
    image, depth = scene
    (lens,) = nodes["BokehLens"].execute("real lens", 24.0, 1.8, 50.0, "full frame", False, 36.0, 0.0).args
    ways = [
        (depth, {"depth_values": "1 / metres"}),
        (depth[..., 0], {"depth_values": "1 / metres"}),
        (1 / depth, {"depth_values": "metres"}),
        ({"depth": 1 / depth[..., 0], "image": image[:1]}, {}),
    ]
    radii = [defocus(nodes, image, kind, lens=lens, focus="point", **more)[0].signed_radius() for kind, more in ways]
    for radius in radii:
        assert torch.allclose(radius, radii[0], atol=1e-4)
    # Thin lens by hand: f = 50 mm, n = 1.8, focused on 4/3 m, wall at 4 m, 36 mm sensor across 60 px.
    on_sensor = 0.05**2 * (4 / 3) / (2 * 1.8 * (4 / 3 - 0.05)) * (0.25 - 0.75)
    assert radii[0][0, 0, 0] == pytest.approx(on_sensor / 0.036 * 60, rel=1e-4)


def test_flipped_map(nodes, scene):
    image, depth = scene
    usual, flipped = defocus(nodes, image, depth)[0], defocus(nodes, image, 1 - depth, depth_values="far is bright")[0]
    assert torch.allclose(usual.disparity, flipped.disparity) and torch.allclose(usual.focus, flipped.focus)


def test_auto_takes_track_then_mask_then_lens_then_subject(nodes, scene):
    image, depth = scene
    (track,) = nodes["BokehFocusTrack"].execute("0: 0.1, 1: 0.2").args
    corner = torch.zeros(1, 40, 60)
    corner[:, :5, :5] = 1
    lens = Lens(f_number=2.0, focal_length=50.0, focus_distance=5.0)
    metric = {"depth_values": "1 / metres"}
    everything = {"focus_track": track, "mask": corner, "lens": lens, **metric}
    assert defocus(nodes, image, depth, **everything)[0].focus.tolist() == pytest.approx([0.1, 0.2])
    del everything["focus_track"]
    assert defocus(nodes, image, depth, **everything)[0].focus.tolist() == pytest.approx([0.25, 0.25])
    assert defocus(nodes, image, depth, lens=lens, **metric)[0].focus.tolist() == pytest.approx([0.2, 0.2])
    assert defocus(nodes, image, depth)[0].focus.tolist() == pytest.approx([0.75, 0.75])
    # A chosen way wins over what is connected, and moves the lens with it.
    chosen = defocus(nodes, image, depth, focus="point", lens=lens, mask=corner, **metric)[0]
    assert chosen.focus.tolist() == pytest.approx([0.75, 0.75]) and chosen.lens.focus_distance is None


def test_focus_holds_or_follows(nodes, scene):
    image, depth = scene
    image, depth = image[:1].repeat(12, 1, 1, 1), depth.repeat(12, 1, 1, 1)
    depth = depth * torch.linspace(1, 0.5, 12)[:, None, None, None]
    held = defocus(nodes, image, depth, focus="point")[0].focus
    followed = defocus(nodes, image, depth, focus="point", follow=True)[0].focus
    assert (held == 0.75).all()
    assert followed[0] > 0.7 and followed[-1] < 0.45 and (followed.diff() < 1e-6).all()
    masks = torch.zeros(12, 40, 60)
    masks[:, 15:25, 25:35] = 1
    assert torch.allclose(defocus(nodes, image, depth, mask=masks)[0].focus, followed, atol=0.02)


def test_a_still_with_a_track_becomes_a_clip(nodes, scene):
    image, depth = scene
    (track,) = nodes["BokehFocusTrack"].execute("0: 0.75, 4: 0.25").args
    plan, overlay, in_focus = defocus(nodes, image[:1], depth, focus_track=track)
    assert plan.focus.shape == (5,) and overlay.shape == (5, 40, 60, 3) and in_focus.shape == (5, 40, 60)
    (clip,) = nodes["BokehRender"].execute(image[:1], plan).args
    assert clip.shape == (5, 40, 60, 3) and not torch.equal(clip[0], clip[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strength_zero_is_the_input_and_alpha_stays(nodes, scene, dtype):
    image, depth = scene
    image = torch.cat([image, image[..., :1] * 0.5], -1).to(dtype)
    before = image.clone(), depth.clone()
    none, _, _ = defocus(nodes, image, depth, strength=0.0)
    assert torch.equal(nodes["BokehRender"].execute(image, none).args[0], image)
    some, _, _ = defocus(nodes, image, depth)
    (result,) = nodes["BokehRender"].execute(image, some).args
    assert result.dtype == dtype and torch.equal(result[..., 3], image[..., 3]) and not torch.equal(result, image)
    assert torch.equal(image, before[0]) and torch.equal(depth, before[1]), "inputs must stay as they were"


def test_real_sensors(nodes):
    def width(sensor, upright):
        return nodes["BokehLens"].execute("real lens", 24.0, 1.8, 50.0, sensor, upright, 7.0, 0.0).args[0].sensor_width

    assert (width("full frame", False), width("full frame", True), width("custom", True)) == (36.0, 24.0, 7.0)
