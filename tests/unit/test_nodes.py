"""What the nodes do between the graph and the library, on a stand-in for ComfyUI; tests/host checks the same pack in a real one."""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from bokeh_core.metrics.image import psnr
from bokeh_core.metrics.video import flicker, relation_metric
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import render

ROOT = Path(__file__).resolve().parents[2]
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
    assert {one.define_schema().node_id for one in nodes.values()} == set(SAVED_WIDGETS)


# The values of a saved graph's widgets are told apart by their places alone, so this list may only grow at its ends.
SAVED_WIDGETS = {
    "BokehLens": [
        *("mode", "strength", "f_number", "focal_length", "sensor", "upright", "sensor_width", "focus_distance"),
        *("blades", "cats_eye", "highlights", "blade_rotation", "roundness", "anamorphic", "spherical", "onion"),
        *("chromatic_longitudinal", "chromatic_lateral", "highlight_threshold"),
    ],
    "BokehLoadDepthModel": ["kind", "attention"],  # and first of all `model`, a list that is empty here
    "BokehEstimateDepth": ["frames", "resolution", "edges", "steadiness"],
    "BokehRefineDepth": ["k", "resolution", "edges", "fidelity"],
    "BokehDepthFromSweep": ["side", "focus_distance", "as_measured", "edges"],
    "BokehFocusTrack": ["keyframes"],
    "BokehDefocus": ["strength", "focus", "focus_x", "focus_y", "focus_value", "depth_values", "follow"],
    "BokehRender": ["quality", "linear", "rays", "snap_edges"],
    "BokehMeasure": [],
    "BokehLoadSalientModel": [],  # a list that is empty here
    "BokehSalientMask": ["threshold"],
    "BokehLoadAnyToBokeh": ["vae", "image_encoder", "mpi_masks"],  # and first of all `model`, a list that is empty here
    "AnyToBokehRender": ["fidelity", "resolution", "cuts", "frame_rate", "random_seed"],
    "BokehMPIMasks": ["level", "rule"],
    "BokehStackAdapter": ["k_values"],  # and a list that is empty here
    "BokehGenerateStack": ["k_values", "steps", "guidance", "seed", "resolution", "fidelity", "colours", "prompt"],
    "BokehStackRendered": ["k_values", "k_per"],
    "BokehStackFromImages": ["k_from", "k_values", "f_numbers", "photos", "focus_distance"],
    "BokehSaveStack": ["folder"],
    "BokehLoadStack": ["manifest", "entry"],
    "BokehLoadBokehDiff": [],  # three lists that are empty here
    "BokehDiffRender": ["fidelity", "random_seed"],
    "BokehLoadMagicBokeh": [],  # two lists that are empty here
    "MagicBokehRender": ["fidelity", "mode", "colour_fix", "upscale", "random_seed"],
}


def test_widgets_keep_their_places_and_inputs_are_optional_at_the_end(nodes):
    for name, one in nodes.items():
        inputs = one.define_schema().inputs
        widgets = [i.id for i in inputs if i.default is not None]
        assert widgets == SAVED_WIDGETS[name], name
        optional = [i.optional for i in inputs]
        assert optional == sorted(optional), name


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_every_word_is_translated(nodes, language):
    folder = ROOT / "locales" / language
    translated = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(translated) == set(nodes)
    for name, one in nodes.items():
        schema, words = one.define_schema(), translated[name]
        assert set(words["inputs"]) == {i.id for i in schema.inputs}, name
        assert list(words["outputs"]) == [str(n) for n in range(len(schema.outputs))], name
        assert all(i.tooltip for i in schema.inputs), name
        for text in (words, *words["inputs"].values(), *words["outputs"].values()):
            parts = [part for part in text.values() if isinstance(part, str)]
            assert len(parts) == 2 and all(parts), f"{name}: {text}"
            assert not any(sign in part for part in parts for sign in "{}@|"), f"signs the front end would interpret: {text}"
    categories = json.loads((folder / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    assert set(categories) >= {"bokeh", "depth", "optics", "render", "inspect"}


def test_every_kind_of_depth_reaches_the_same_blur(nodes, scene):
    """One scene as distance, as 1/distance and as geometry, through one real lens."""
    image, depth = scene
    (lens,) = nodes["BokehLens"].execute("real lens", 24.0, 1.8, 50.0, "full frame", False, 36.0, 0.0).args
    ways = [
        (depth, {"depth_values": "1 / metres"}),
        (depth[..., 0], {"depth_values": "1 / metres"}),
        (1 / depth, {"depth_values": "metres"}),
        ({"depth": 1 / depth[..., 0], "image": image[:1], "normal": image[:1]}, {}),
        ({"depth": 1 / depth[..., 0], "image": image[:1], "metric": True}, {}),
        ({"depth": 1 / depth[..., 0], "image": image[:1], "mode": "mono"}, {"depth_values": "metres"}),
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


def lens(nodes, mode="strength", **looks):
    return nodes["BokehLens"].execute(mode, 24.0, 1.8, 50.0, "full frame", False, 36.0, 0.0, **looks).args[0]


def test_an_untouched_lens_is_a_clean_disk(nodes):
    assert asdict(lens(nodes)) == asdict(Lens(strength=24.0))
    inputs = nodes["BokehLens"].define_schema().inputs
    widgets = {i.id: i.default for i in inputs if i.optional and i.default is not None}
    assert asdict(lens(nodes, **widgets)) == asdict(Lens(strength=24.0))
    named = {"rotation" if name == "blade_rotation" else name for name in widgets} - {"highlights", "highlight_threshold"}
    assert named == {field.name for field in fields(Aperture)} - {"picture"}


def test_looks_reach_either_kind_of_lens(nodes):
    looks = {"blades": 7, "roundness": 0.3, "cats_eye": 0.5, "spherical": -0.4, "onion": 0.2, "anamorphic": 1.5}
    looks |= {"chromatic_longitudinal": 0.1, "chromatic_lateral": -0.2}
    for mode in ("strength", "real lens"):
        made = lens(nodes, mode, blade_rotation=15.0, highlights=4.0, highlight_threshold=0.8, **looks)
        assert (made.highlights, made.highlight_threshold, made.is_physical) == (4.0, 0.8, mode == "real lens")
        assert asdict(made.aperture) == asdict(Aperture(rotation=15.0, **looks))


def test_an_aperture_picture_is_one_mask(nodes):
    heart = torch.eye(8)
    for mask in (heart, heart[None]):
        assert torch.equal(lens(nodes, aperture_picture=mask).aperture.picture, heart)
    with pytest.raises(Exception, match="expected one picture"):
        lens(nodes, aperture_picture=heart.expand(2, 8, 8))
    with pytest.raises(Exception, match="light somewhere"):
        lens(nodes, aperture_picture=torch.zeros(1, 64, 64))


def test_matte_and_plate_reach_the_renderer(nodes, scene):
    image, depth = scene
    plan = defocus(nodes, image, depth, focus="value", focus_value=0.25, strength=200.0)[0]
    small = torch.zeros(1, 20, 30)
    small[:, 4:16, 9:21] = 1
    matte = torch.nn.functional.interpolate(small[None], (40, 60), mode="bilinear")[0]
    plate = torch.full((2, 40, 60, 3), 0.5)
    before = [t.clone() for t in (small, plate)]
    (result,) = nodes["BokehRender"].execute(image, plan, matte=small, clean_plate=plate).args
    expected = render(image.movedim(-1, 1), plan, matte=matte, clean_plate=plate.movedim(-1, 1)).movedim(1, -1)
    assert torch.allclose(result, expected, atol=1e-6)
    for less in ({"matte": small}, {"clean_plate": plate}, {}):
        assert not torch.allclose(nodes["BokehRender"].execute(image, plan, **less).args[0], result, atol=1e-3)
    assert torch.equal(small, before[0]) and torch.equal(plate, before[1]), "inputs must stay as they were"
    # The channels beyond RGB of a plate mean nothing, and one plate serves all frames.
    alpha = torch.cat([plate[:1], torch.rand(1, 40, 60, 1)], -1)
    assert torch.equal(nodes["BokehRender"].execute(image, plan, matte=small[0], clean_plate=alpha).args[0], result)


def test_each_shot_of_a_clip_has_its_own_layers(nodes):
    """Two photos joined, four depths each: rendered together they must be what each is alone."""
    y, x = torch.arange(48.0)[:, None], torch.arange(72.0)[None]
    bands = torch.tensor([0.0, 0.1, 0.2, 0.3])
    one, two = bands[(x // 18).long()] + 0 * y, bands[(y // 12).long()] + 0 * x
    light, other = 0.2 + 0.2 * torch.sin(x / 2) * torch.sin(y / 3), 0.6 + 0.3 * torch.sin(0.4 * x + 0.9 * y)
    image = torch.stack([one + light] * 3 + [other - two] * 3)[..., None].repeat(1, 1, 1, 3)
    depth = torch.stack([one] * 3 + [two + 0.6] * 3)[..., None]
    plan = defocus(nodes, image, depth, focus="value", focus_value=0.3, strength=400.0)[0]
    (result,) = nodes["BokehRender"].execute(image, plan).args
    for shot in (slice(0, 3), slice(3, 6)):
        alone = defocus(nodes, image[shot], depth[shot], focus="value", focus_value=0.3, strength=400.0)[0]
        assert torch.equal(nodes["BokehRender"].execute(image[shot], alone).args[0], result[shot])
    together = render(image.movedim(-1, 1), plan).movedim(1, -1)
    assert not torch.equal(together, result), "one set of layers for both would be another picture"


def test_snapping_reaches_the_renderer(nodes, scene):
    image = torch.where(scene[1] > 0.5, 0.9, 0.1) + 0 * scene[0]
    plan = defocus(nodes, image, scene[1].roll(3, 2), strength=200.0)[0]
    (result,) = nodes["BokehRender"].execute(image, plan, snap_edges=True).args
    expected = render(image.movedim(-1, 1), plan, snap_edges=True).movedim(1, -1)
    assert torch.allclose(result, expected, atol=1e-6)
    assert not torch.allclose(result, nodes["BokehRender"].execute(image, plan).args[0], atol=1e-2)


def test_an_empty_matte_is_no_matte(nodes, scene):
    """Load Image hands out an empty mask of 64 x 64 for pictures without alpha."""
    image, depth = scene
    plan = defocus(nodes, image, depth)[0]
    without = nodes["BokehRender"].execute(image, plan).args[0]
    assert torch.allclose(nodes["BokehRender"].execute(image, plan, matte=torch.zeros(1, 64, 64)).args[0], without, atol=0.02)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"matte": torch.ones(3, 40, 60)}, "matte has 3 frames and the image 2"),
        ({"clean_plate": torch.ones(3, 40, 60, 3)}, "clean plate has 3 frames and the image 2"),
        ({"clean_plate": torch.ones(1, 40, 50, 3)}, "clean plate is 50x40 px and the image 60x40 px"),
    ],
)
def test_wrong_mattes_and_plates_are_explained(nodes, scene, inputs, words):
    image, depth = scene
    plan = defocus(nodes, image, depth)[0]
    with pytest.raises(Exception, match=words):
        nodes["BokehRender"].execute(image, plan, **inputs)


def test_reference_uses_the_rays_and_tells_how_far_it_is(nodes, scene, bar):
    image, depth = scene
    plan = defocus(nodes, image, depth, strength=60.0)[0]
    fast = nodes["BokehRender"].execute(image, plan).args[0]
    bar.clear()
    rough, fine = (nodes["BokehRender"].execute(image, plan, "reference", rays=rays).args[0] for rays in (64, 512))
    assert 0 < float((rough - fine).abs().mean()) < float((fast - image).abs().mean()) / 4
    assert float((fast - fine).abs().mean()) < float((fast - image).abs().mean()) / 4
    assert all(isinstance(done, int) and total == 200 for done, total in bar)
    assert bar[-1] == (200, 200) and any(0 < done % 100 for done, _ in bar), "it must move within a frame"


def measure(nodes, *inputs, **more):
    return nodes["BokehMeasure"].execute(*inputs, **more).args


def test_measure_against_the_definitions(nodes, scene):
    truth = scene[0].clamp(0.2, 0.8)
    assert measure(nodes, truth, truth)[:2] == (math.inf, pytest.approx(1.0))
    db, likeness, edges, sharp, change, _, table = measure(nodes, truth + 0.1, truth)
    assert db == pytest.approx(20.0, abs=1e-4) and likeness < 1 and change == pytest.approx(0, abs=1e-6)
    assert math.isnan(edges) and math.isnan(sharp), "no defocus, no edges"
    assert "| PSNR " in table and "20.00 dB" in table and "edges" not in table and "| RM " in table
    # Values beyond 0..1 count as the display shows them; one truth serves all frames.
    assert measure(nodes, torch.full((2, 40, 60, 3), 1.5), torch.full((1, 40, 60, 3), 0.9))[0] == pytest.approx(20.0, abs=1e-4)


def test_measure_pools_frames_and_regions(nodes, scene):
    image, depth = scene
    depth = depth.repeat(2, 1, 1, 1)
    depth[1] = depth[1].roll(7, 1)
    plan = defocus(nodes, image, depth, focus="value", focus_value=0.75, strength=200.0)[0]
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 0.3])[:, None, None, None]
    result = (image + noise).clamp(0, 1)
    mask = torch.zeros(1, 40, 60)
    mask[:, :, :35] = 1
    db, _, edges, sharp, change, restless, table = measure(nodes, result, image, mask=mask, defocus=plan)

    a, b = result.movedim(-1, 1), image.movedim(-1, 1)
    assert db == pytest.approx(psnr(a, b, mask[:, None] > 0.5), abs=1e-3)
    near = depth[..., 0] == 0.75
    assert sharp == pytest.approx(psnr(a, b, (near & (mask > 0.5))[:, None]), abs=1e-3)
    # By hand: pixels no farther than 8 px from one that has a neighbour of the other depth.
    across = torch.zeros_like(near)
    for axis in (1, 2):
        for step in (-1, 1):
            moved = near.roll(step, axis)  # the square stays clear of the border
            across |= moved != near
    y, x = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    band = torch.stack([((y[..., None] - i) ** 2 + (x[..., None] - j) ** 2 <= 64).any(-1) for i, j in (e.nonzero().T for e in across)])
    assert edges == pytest.approx(psnr(a, b, (band & (mask > 0.5))[:, None]), abs=1e-3)
    assert change == pytest.approx(relation_metric(a, b), rel=1e-4) and math.isnan(restless)
    assert "frames" in table and "around edges" in table and "flicker" not in table
    still = image[:1].repeat(3, 1, 1, 1)
    restless = measure(nodes, still + torch.tensor([0, 0.05, 0])[:, None, None, None] * (still < 0.5), still)[5]
    expected = flicker((still + torch.tensor([0, 0.05, 0])[:, None, None, None] * (still < 0.5)).movedim(-1, 1), still.movedim(-1, 1))
    assert restless == pytest.approx(expected, rel=1e-4) and restless > 0.01


@pytest.mark.parametrize(
    ("shape", "more", "words"),
    [
        ((2, 40, 61, 3), {}, "truth is 61x40 px and the result 60x40 px"),
        ((3, 40, 60, 3), {}, "truth has 3 frames and the result 2"),
        ((2, 40, 60, 3), {"mask": torch.ones(1, 64, 64)}, "mask is 64x64 px"),
    ],
)
def test_measure_explains_what_does_not_fit(nodes, scene, shape, more, words):
    with pytest.raises(Exception, match=words):
        measure(nodes, scene[0], torch.zeros(shape), **more)
