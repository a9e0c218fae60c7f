"""The depth nodes on a stand-in for ComfyUI, with tiny checkpoints; tests/host checks them in a real one."""

import json
import re
from pathlib import Path

import pytest
import torch

from bokeh_core.depth import clip as clips
from bokeh_core.depth.checkpoint import KINDS, load_depth_model
from bokeh_core.depth.estimate import depth_maps
from bokeh_core.optics.lens import Lens
from tests.stand_ins import depth as stand_ins

ROOT = Path(__file__).resolve().parents[2]
RELATIVE, METRIC, VIDEO = "depth_anything_v2_vits.pth", "sub/depth_anything_v2_metric_hypersim_vits.pth", "video_depth_anything_vits.pth"
DEFAULTS = {"frames": "one clip", "resolution": 140, "edges": "plain"}


@pytest.fixture
def folder(tmp_path):
    """models/depthanything of the stand-in host, with a checkpoint of each kind and a foreign file."""
    folder = tmp_path / "models" / "depthanything"
    (folder / "sub").mkdir(parents=True)
    torch.save(stand_ins.depth_anything(), folder / RELATIVE)
    torch.save(stand_ins.depth_anything(1), folder / METRIC)
    torch.save(stand_ins.video_depth_anything(), folder / VIDEO)
    torch.save({"something.lora_A.weight": torch.zeros(2, 2)}, folder / "foreign.pth")
    return folder


@pytest.fixture
def clip():
    """[5, 61, 83, 3]: coarse blobs that move."""
    noise = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(noise, (61, 90), mode="bilinear")[0]
    return torch.stack([large[:, :, i : i + 83].movedim(0, -1) for i in range(5)]).contiguous()


def load(nodes, name, kind="auto"):
    return nodes["BokehLoadDepthModel"].execute(name, kind).args[0]


def estimate(nodes, image, model, **inputs):
    return nodes["BokehEstimateDepth"].execute(image, model, **{**DEFAULTS, **inputs}).args


def plain(path, image, **more):
    """[B, H, W] by the library alone."""
    frames = [frame[..., :3].movedim(-1, 0) for frame in image]
    return torch.cat(list(depth_maps(load_depth_model(path), frames, len(frames), resolution=140, **{"clip": True, **more})))


def span(values):
    low, high = values.aminmax()
    return (values - low) / (high - low)


def test_words_are_those_of_the_library(nodes):
    import sys

    module = sys.modules[nodes["BokehEstimateDepth"].__module__]
    assert module.FRAMES == (clips.ONE_CLIP, clips.WITH_CUTS, clips.PHOTOS) and tuple(module.KINDS.values()) == KINDS


def test_relative_depth_is_near_bright_over_the_clip(nodes, folder, clip, bar, loads):
    before = clip.clone()
    model = load(nodes, RELATIVE)
    depth, geometry = estimate(nodes, clip, model)
    expected = span(plain(folder / RELATIVE, clip))
    assert depth.shape == clip.shape and torch.allclose(depth, expected[..., None].expand_as(depth), atol=1e-5)
    assert not geometry["metric"] and torch.equal(geometry["disparity"], depth[..., 0]) and geometry["image"] is clip
    assert loads == [[model.patcher]] and bar[-1] == (500, 500) and torch.equal(clip, before)


def test_separate_photos_have_their_own_ranges(nodes, folder, clip):
    depth, _ = estimate(nodes, clip, load(nodes, RELATIVE), frames="separate photos")
    assert torch.allclose(depth[..., 0], torch.stack([span(one) for one in plain(folder / RELATIVE, clip)]), atol=1e-5)
    # A video model looks at each alone, too.
    depth, _ = estimate(nodes, clip, load(nodes, VIDEO), frames="separate photos")
    assert torch.allclose(depth[..., 0], torch.stack([span(one) for one in plain(folder / VIDEO, clip, clip=False)]), atol=1e-4)


def test_image_and_geometry_reach_the_same_defocus(nodes, folder, clip):
    widgets = {"strength": 24.0, "focus": "value", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.4, "follow": False}
    for name in (RELATIVE, VIDEO):
        outputs = estimate(nodes, clip, load(nodes, name))
        image, geometry = (nodes["BokehDefocus"].execute(clip, one, depth_values="near is bright", **widgets).args[0] for one in outputs)
        assert torch.allclose(image.signed_radius(), geometry.signed_radius(), atol=1e-4) and not geometry.metric


def test_each_shot_has_its_own_range(nodes, folder, clip):
    both = torch.cat([clip, clip.flip(1, 2)])
    model = load(nodes, VIDEO)
    whole, _ = estimate(nodes, both, model)
    cuts, _ = estimate(nodes, both, model, frames="clip with cuts")
    apart = [estimate(nodes, one, model)[0] for one in (clip, clip.flip(1, 2))]
    assert torch.allclose(cuts, torch.cat(apart), atol=1e-5) and not torch.allclose(cuts, whole, atol=1e-2)


def test_steadiness(nodes, folder, clip):
    model = load(nodes, RELATIVE)
    still = clip[:1].repeat(8, 1, 1, 1) + 0.03 * torch.randn(8, 61, 83, 3, generator=torch.Generator().manual_seed(2))
    rough, steady = (estimate(nodes, still.clamp(0, 1), model, steadiness=strength)[0][..., 0] for strength in (0.0, 1.0))
    flicker = rough.diff(dim=0).abs().mean(), steady.diff(dim=0).abs().mean()
    assert flicker[1] < 0.7 * flicker[0] and (steady.mean(0) - rough.mean(0)).abs().mean() < 0.05
    alone = estimate(nodes, still[:1].clamp(0, 1), model, steadiness=1.0)[0]
    assert torch.equal(alone, estimate(nodes, still[:1].clamp(0, 1), model)[0]), "one frame has no past"


def test_metric_depth_is_metres_and_its_image_their_inverse(nodes, folder, clip):
    depth, geometry = estimate(nodes, clip, load(nodes, METRIC))
    metres = plain(folder / METRIC, clip)
    assert (
        geometry["metric"] and torch.allclose(geometry["depth"], metres, rtol=1e-5) and 0 < float(metres.min()) < float(metres.max()) < 20
    )
    assert torch.allclose(depth[..., 1], span(1 / metres), atol=1e-5)


def test_a_metric_model_and_a_real_lens_blur_as_physics_says(nodes, folder, clip):
    _, geometry = estimate(nodes, clip[:1], load(nodes, METRIC))
    lens = Lens(f_number=2.0, focal_length=50.0, focus_distance=4.0)
    widgets = {"strength": 24.0, "focus": "auto", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.5, "follow": False}
    defocus = nodes["BokehDefocus"].execute(clip[:1], geometry, depth_values="near is bright", lens=lens, **widgets).args[0]
    metres, f, focus = geometry["depth"].double(), 0.05, 4.0
    # Thin lens: diameter of the disk of confusion on the sensor, then px of a picture that the 36 mm wide sensor fills.
    disk = (f / 2.0) * (f / (focus - f)) * (metres - focus).abs() / metres
    radius = disk / 2 / 0.036 * clip.shape[2]
    assert torch.allclose(defocus.signed_radius().abs().double(), radius, rtol=2e-4, atol=1e-4)
    assert ((defocus.signed_radius() > 0) == (metres < focus)).all()


def test_guided_edges_and_odd_sizes_alpha_and_half_floats(nodes, folder, clip):
    model = load(nodes, RELATIVE)
    guided, _ = estimate(nodes, clip[:1], model, edges="follow the picture", resolution=28)
    smooth, _ = estimate(nodes, clip[:1], model, resolution=28)
    assert guided.shape == smooth.shape == (1, 61, 83, 3) and not torch.allclose(guided, smooth, atol=1e-2)
    alpha = torch.cat([clip[:1], clip[:1, ..., :1]], -1).half()
    depth, _ = estimate(nodes, alpha, model, resolution=28)
    assert depth.shape == (1, 61, 83, 3) and depth.dtype == torch.float32 and torch.allclose(depth, smooth, atol=0.02)


def test_out_of_memory_means_fewer_frames_at_once(nodes, folder, clip, monkeypatch):
    expected, _ = estimate(nodes, clip, load(nodes, RELATIVE))
    model, sizes = load(nodes, RELATIVE), []
    network = model.managed.network
    forward = network.forward

    def small(pixels, *more):
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("full")
        return forward(pixels, *more)

    monkeypatch.setattr(network, "forward", small)
    depth, _ = estimate(nodes, clip, model)
    assert sizes == [4, 2, 1, 1, 1, 1, 1] and torch.allclose(depth, expected, atol=1e-5)


def test_an_interruption_passes_through(nodes, folder, clip, monkeypatch):
    class Interrupted(BaseException):
        pass

    def stop():
        raise Interrupted

    model = load(nodes, RELATIVE)
    monkeypatch.setattr("comfy.model_management.throw_exception_if_processing_interrupted", stop)
    with pytest.raises(Interrupted):
        estimate(nodes, clip, model)


@pytest.mark.parametrize("name", [RELATIVE, METRIC, VIDEO])
def test_models_are_listed_with_subfolders(nodes, folder, name):
    (combo, *_) = nodes["BokehLoadDepthModel"].define_schema().inputs
    assert combo.optional and combo.default == min(RELATIVE, METRIC, VIDEO)
    assert load(nodes, name).info.video == (name == VIDEO)


def test_kind_of_a_renamed_file(nodes, folder, clip):
    (folder / METRIC).rename(folder / "my.pth")
    outdoor = load(nodes, "my.pth", "metric outdoor (80 m)").info
    assert (load(nodes, "my.pth").info.metric, outdoor.metric, outdoor.max_depth) == (False, True, 80.0)


def test_wrong_and_missing_files_are_explained(nodes, folder, tmp_path):
    with pytest.raises(Exception, match=r"foreign\.pth is a LoRA"):
        load(nodes, "foreign.pth")
    (folder / RELATIVE).write_bytes((folder / RELATIVE).read_bytes()[:5000])
    with pytest.raises(Exception, match=r"depth_anything_v2_vits\.pth .*download it again"):
        load(nodes, RELATIVE)
    for gone in ("gone.pth", "../../secret.pth"):
        with pytest.raises(Exception, match=rf"no depth model '{re.escape(gone)}': put .*huggingface.co/.* into models/depthanything"):
            load(nodes, gone)
    for file in folder.rglob("*.pth"):
        file.unlink()
    with pytest.raises(Exception, match=r"No depth model is installed: put depth_anything_v2_vits\.pth from https://huggingface"):
        nodes["BokehLoadDepthModel"].execute()
    assert nodes["BokehLoadDepthModel"].define_schema().inputs[0].default is None


@pytest.mark.parametrize("name", ["photo_depth_physical", "video_depth_physical"])
def test_workflows_name_their_models(name):
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    (loader,) = [node for node in graph["nodes"] if node["type"] == "BokehLoadDepthModel"]
    (model,) = loader["properties"]["models"]
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert model["name"] == loader["widgets_values"][0] and model["directory"] == "depthanything"
    assert (
        model["url"].startswith("https://huggingface.co/")
        and model["url"].endswith("/" + model["name"])
        and model["url"] in note["widgets_values"][0]
    )
