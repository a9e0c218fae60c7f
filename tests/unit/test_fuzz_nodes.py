"""Any input, however odd, ends in a good result or in one sentence: seeded cases through the node classes.

Four outcomes are defects: another exception than BokehError, a result of another size or not finite, an input that was written to, and
work that takes longer than LIMIT. The quick run checks CASES of each target; more with

    BOKEH_FUZZ=20000:500 python -m pytest tests/unit/test_fuzz_nodes.py -k every_case

(first seed and number of cases for each target). A failure names the seed that shows it.
"""

import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bokeh_core.optics.stack import BokehStack
from bokeh_core.stack_files import save_stack
from tests.stand_ins.depth import depth_anything, video_depth_anything

LIMIT = 20  # s
CASES = 15
FLOATS = (torch.float32,) * 7 + (torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.uint8, torch.bool, torch.int32)
STRANGE = (None, "a text", 3, 0.5, [], {}, {"samples": torch.zeros(1, 4, 8, 8)}, object(), np.zeros((1, 8, 8, 3)), torch.zeros(()))
NUMBERS = (0.0, -1.0, 1e-30, 1e30, -1e30, math.nan, math.inf, -math.inf, 65504.0)


class Cases(random.Random):
    """A random source of inputs: mostly sound ones, each part of them odd now and then."""

    def rarely(self, chance=0.08):
        return self.random() < chance

    def side(self):
        return self.choice((1, 2, 3, 5, 6, 7, 8, 11, 16, 23, 24, 33, 47, 70))

    def batch(self, frames):
        return self.choice((0, 1, 2, 3)) if self.rarely() else self.choice((1, frames))

    def numbers(self, *shape):
        """A tensor of `shape` with odd contents, dtype or memory layout."""
        generator = torch.Generator().manual_seed(self.getrandbits(31))
        values = torch.rand(shape, generator=generator)
        if self.random() < 0.3:  # a step, as depth has
            values = (values.roll(1, -1) > 0.5) * 0.5 + 0.25
        if self.rarely(0.05):
            values = torch.full(shape, self.choice((0.0, 0.5, 1.0)))
        if self.rarely(0.07):
            values = values * self.choice((-1.0, 4.0, 1000.0, 1e30, 1e-30)) + self.choice((0.0, -0.5, 100.0))
        if self.rarely(0.04) and values.numel():
            at = torch.randint(values.numel(), (max(1, values.numel() // self.choice((1, 2, 50))),), generator=generator)
            values.view(-1)[at] = self.choice((math.nan, math.inf, -math.inf))
        dtype = self.choice(OTHERS if self.rarely(0.04) else FLOATS)
        if not dtype.is_floating_point:
            values = (values.nan_to_num().clamp(-1e4, 1e4) * (1 if dtype == torch.bool else 255)).clamp(0, 255)
        return self.layout(values.to(dtype))

    def layout(self, values):
        """The same numbers, stored another way."""
        kind = self.choice(("plain", "plain", "plain", "channels first", "padded", "flipped", "expanded"))
        if kind == "channels first" and values.ndim == 4:
            return values.movedim(-1, 1).contiguous().movedim(1, -1)
        if kind == "padded" and values.ndim > 1 and 0 not in values.shape:
            wide = torch.cat([values, values], -2)
            return wide.narrow(-2, 0, values.shape[-2])
        if kind == "flipped" and values.ndim > 1:
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "expanded" and values.shape[0] > 1:
            return values[:1].expand_as(values)
        return values

    def image(self, frames, height, width):
        if self.rarely(0.02):
            return self.choice(STRANGE)
        if self.rarely(0.02):
            return self.numbers(*self.choice(((8, 8), (8, 8, 3), (1, 1, 8, 8, 3), (0,), (1, 0, 8, 3), (1, 8, 0, 3), (1, 8, 8, 0))))
        channels = self.choice((1, 2, 5)) if self.rarely(0.05) else self.choice((3, 3, 4))
        return self.numbers(self.batch(frames), height, width, channels)

    def mask(self, frames, height, width):
        if self.rarely(0.03):
            return self.choice(STRANGE)
        if self.rarely():
            height, width = self.side(), self.side()
        if self.rarely(0.15):
            return self.numbers(height, width)
        if self.rarely(0.04):
            return self.numbers(*self.choice(((0,), (1, 0, 4), (1, 1, height, width), (1, height, width, 1))))
        return self.numbers(self.batch(frames), height, width)

    def geometry(self, frames, height, width):
        found = {self.choice(("depth", "depth", "disparity")): self.mask(frames, height, width)}
        for name, chance in (("mask", 0.5), ("sky", 0.3), ("normal", 0.3), ("metric", 0.5), ("points", 0.2), ("image", 0.2), ("深度", 0.1)):
            if self.random() < chance:
                found[name] = self.random() < 0.5 if name == "metric" else self.mask(frames, height, width)
        if self.rarely():
            found.pop(next(iter(found)))
        return found

    def depth(self, frames, height, width):
        if self.rarely(0.2):
            height, width = self.side(), self.side()
        return self.choice((self.image, self.image, self.mask, self.geometry))(frames, height, width)

    def number(self, low, high):
        """A number from a widget, or past its limits, as a link can bring it."""
        if self.rarely(0.06):
            return self.choice(NUMBERS)
        return self.choice((low, high, self.uniform(low, high), self.uniform(low, high)))

    def word(self, *words):
        return words[0] if self.random() < 0.3 else self.choice(words)

    def keyframes(self):
        if self.rarely(0.3):
            return self.choice(TEXTS)
        easing = ("", " ease", " linear", " hold", " ease-in", " ease-out", " EASE", " bounce")
        keys = [
            f"{self.choice((0, 1, 2, 5, 23))}: {self.choice((0.5, -1, 1e9, '(0.5, 0.4)', '(1.0,0)', '(2, 0)'))}{self.choice(easing)}"
            for _ in range(self.choice((1, 1, 2, 3)))
        ]
        return self.choice((", ", "\n", ";")).join(keys)


TEXTS = (
    *(
        "",
        " ",
        "0",
        ":",
        "0:",
        "0: x",
        "-1: 0.5",
        "1e9: 0.5",
        "0: nan",
        "0: inf",
        "0: (nan, 0)",
        "0: 1e999",
        "0: (0.5)",
        "0: ()",
        "((((",
        "-",
    ),
    *("[]", "[", "[1]", "[[0]]", "[[0, 1]]", "[[0.5, 1]]", '[{"frame": 0}]', '[{"frame": 1e400, "value": 1}]', "[[0, NaN]]", "[[0, true]]"),
    *('[[0, "a"]]', "[null]", '[{"frame": "0", "value": 1}]', "[[0, [1, 2, 3]]]", '[[0, 1, "ease"], [0, 2]]', "[" * 5000, "[[-1, 0.5]]"),
    *("999999999999999999999: 0.5", "4000000000: 0.5", "３: ０.５", "0: 0.5\r\n5: 0.7 ease\r\n", "0: 0.5, " * 200, "[[NaN, 1]]"),
    *(
        "0: 0.5 ease ease",
        "0 : 0.5,, ,",
        "{}",
        '{"frame": 0, "value": 1}',
        "null",
        "0: 0.5 " + "e" * 100,
        "[{}]",
        '[[0, {"x": 1}]]',
        "\0",
    ),
)


def lens_inputs(r):
    inputs = {
        "mode": r.word("strength", "real lens"),
        "strength": r.number(0, 500),
        "f_number": r.number(0.5, 64),
        "focal_length": r.number(1, 2000),
        "sensor": r.word("full frame", "custom", "1 inch"),
        "upright": r.random() < 0.5,
        "sensor_width": r.number(0.5, 500),
        "focus_distance": r.number(0, 20),
    }
    looks = {
        "blades": r.choice((0, 1, 2, 3, 7, 24, -1, 100)),
        "cats_eye": r.number(0, 1),
        "highlights": r.number(0, 100),
        "blade_rotation": r.number(-360, 360),
        "roundness": r.number(0, 1),
        "anamorphic": r.number(0.25, 4),
        "spherical": r.number(-1, 1),
        "onion": r.number(0, 1),
        "chromatic_longitudinal": r.number(-1, 1),
        "chromatic_lateral": r.number(-1, 1),
        "highlight_threshold": r.number(0, 0.99),
    }
    inputs |= {name: value for name, value in looks.items() if r.rarely(0.2)}
    if r.rarely(0.15):
        inputs["aperture_picture"] = r.mask(1, r.side(), r.side())
    return inputs


def defocus_inputs(r, nodes, frames, height, width):
    inputs = {
        "image": r.image(frames, height, width),
        "depth": r.depth(frames, height, width),
        "strength": r.number(0, 100),
        "focus": r.word("auto", "point", "mask", "value"),
        "focus_x": r.number(0, 1),
        "focus_y": r.number(0, 1),
        "focus_value": r.number(-2, 2),
        "depth_values": r.word("near is bright", "far is bright", "metres", "1 / metres"),
        "follow": r.random() < 0.5,
    }
    if r.random() < 0.4:
        inputs["mask"] = r.mask(frames, height, width)
    if r.random() < 0.4:
        inputs["lens"] = made(nodes, "BokehLens", lens_inputs(r))
    if r.random() < 0.3:
        inputs["focus_track"] = made(nodes, "BokehFocusTrack", {"keyframes": r.keyframes()})
    return inputs


def lens_case(r, nodes, world):
    return "BokehLens", lens_inputs(r)


def track_case(r, nodes, world):
    return "BokehFocusTrack", {"keyframes": r.keyframes()}


def defocus_case(r, nodes, world):
    return "BokehDefocus", defocus_inputs(r, nodes, r.choice((1, 2, 3)), r.side(), r.side())


def a_defocus(r, nodes, frames, height, width):
    """A Defocus of sound depth, or whatever else may be connected."""
    if r.rarely(0.03):
        return r.choice(STRANGE)
    batch = r.choice((1, frames))
    depth = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(r.getrandbits(31)))
    depth = ((depth > 0.5) * 0.5 + 0.25 + 0.1 * depth).clamp(0, 1)
    inputs = defocus_inputs(r, nodes, batch, height, width)
    for wild in ("mask", "focus_track"):
        inputs.pop(wild, None)
    inputs |= {"image": torch.zeros(batch, height, width, 3), "depth": depth, "strength": r.number(0, 60)}
    inputs["focus"] = r.choice(("auto", "value"))
    found = made(nodes, "BokehDefocus", inputs)
    if found is not None and r.rarely():  # of a clip of another length
        found = replace(found, disparity=found.disparity[:1].expand(2, -1, -1), focus=found.focus[:1].expand(2), k=found.k[:1].expand(2))
    return found


def render_case(r, nodes, world):
    frames, height, width = r.choice((1, 1, 2, 3)), r.side(), r.side()
    inputs = {
        "image": r.image(frames, height, width),
        "defocus": a_defocus(r, nodes, frames, *((r.side(), r.side()) if r.rarely(0.05) else (height, width))),
        "quality": r.choice(("fast",) * 9 + ("reference",)),
        "linear": r.random() < 0.3,
        "rays": r.choice((1, 64)),
        "snap_edges": r.random() < 0.2,
    }
    if r.random() < 0.25:
        inputs["matte"] = r.mask(frames, height, width)
    if r.random() < 0.2:
        inputs["clean_plate"] = r.image(frames, height, width)
    return "BokehRender", inputs


def measure_case(r, nodes, world):
    frames, height, width = r.choice((1, 2, 3)), r.side(), r.side()
    inputs = {"result": r.image(frames, height, width), "truth": r.image(frames, height, width)}
    if r.random() < 0.4:
        inputs["mask"] = r.mask(frames, height, width)
    if r.random() < 0.5:
        inputs["defocus"] = a_defocus(r, nodes, frames, height, width)
    return "BokehMeasure", inputs


def depth_case(r, nodes, world):
    frames, height, width = r.choice((1, 2, 3)), r.side(), r.side()
    return (
        "BokehEstimateDepth",
        {
            "image": r.image(frames, height, width),
            "depth_model": r.choice(STRANGE[:8]) if r.rarely(0.02) else world.model(r.choice(("relative", "metric", "video"))),
            "frames": r.word("one clip", "clip with cuts", "separate photos"),
            "resolution": r.choice((14, 70, 140, 0, -14)) if r.rarely(0.1) else r.choice((28, 42)),
            "edges": r.word("follow the picture", "plain"),
            "steadiness": r.number(0, 1) if r.rarely(0.3) else 0.0,
        },
    )


def rendered_stack_case(r, nodes, world):
    height, width = r.side(), r.side()
    defocus = a_defocus(r, nodes, r.choice((1, 1, 1, 2)), *((r.side(), r.side()) if r.rarely(0.05) else (height, width)))
    inputs = {"image": r.image(1, height, width), "defocus": defocus, "k_values": k_text(r)}
    inputs["k_per"] = r.word("whole depth range", "dioptre (1/m)")
    return "BokehStackRendered", inputs


def photos_stack_case(r, nodes, world):
    frames, height, width = r.choice((1, 2, 3)), r.side(), r.side()
    inputs = {
        "reference": r.image(1, height, width),
        "frames": r.image(frames, height, width),
        "k_from": r.word("typed", "f-numbers", "EXIF"),
        "k_values": k_text(r, frames),
        "f_numbers": k_text(r, frames),
        "photos": r.choice(("", "a.jpg", "../../etc/passwd\n/etc/passwd", "a\0b", "x" * 5000, ".")),
        "focus_distance": r.number(0, 20),
    }
    if r.random() < 0.6:
        inputs["lens"] = made(nodes, "BokehLens", lens_inputs(r))
    return "BokehStackFromImages", inputs


def stored_stack_case(r, nodes, world):
    """A stack on disk with one file spoiled: the bytes of any, or what the JSON says."""
    folder = world.folder / "stack"
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(world.stack, folder)
    manifest, index = folder / "manifest.jsonl", folder / "defocus_stack" / "stack_index.json"
    if r.random() < 0.3:
        path = r.choice((manifest, index, folder / "ref.png", folder / "defocus_stack" / "0.png"))
        data = bytearray(path.read_bytes())
        at = r.randrange(len(data))
        path.write_bytes(r.choice((data[:at], data[:at] + r.randbytes(3) + data[at + 3 :], b"", b"[" * 5000, b"\xff\xfe{", b"null")))
    else:
        path = r.choice((manifest, index))
        about = json.loads(path.read_text())
        for _ in range(r.choice((1, 1, 2, 4))):
            key = r.choice((*about, "image", "stack_dir", "k_per_dioptre"))
            about[key] = r.choice(
                (None, True, -1, 1e400, "", "a\0b", "/", "..", [], [1], ["ref.png"], [None] * 2, {}, {"0": "x"}, "9" * 400)
            )
            if r.rarely(0.4):
                del about[key]
        path.write_text(json.dumps(about) + "\n")
    names = (
        "stack",
        "stack/manifest.jsonl",
        "stack/defocus_stack/stack_index.json",
        "stack/ref.png",
        "nowhere",
        "",
        "..",
        "a\0b",
        "x" * 300,
    )
    return "BokehLoadStack", {"manifest": r.choice(names[:2] * 8 + names), "entry": r.choice((0,) * 12 + (1, -1, 10**9))}


def k_text(r, count=None):
    if r.rarely(0.2):
        return r.choice((*TEXTS, "10, 20, 30", "1e308", "-3", "0", "10;20", "1, 2,", "1e400", "0x10", "1_0", "١٠"))
    return ", ".join(str(r.choice((1, 8, 10.5, 30))) for _ in range(count or r.choice((1, 2, 3))))


TARGETS = {
    "lens": lens_case,
    "track": track_case,
    "defocus": defocus_case,
    "render": render_case,
    "measure": measure_case,
    "depth": depth_case,
    "rendered stack": rendered_stack_case,
    "photos stack": photos_stack_case,
    "stored stack": stored_stack_case,
}


def made(nodes, name, inputs):
    """What the node hands on; None when it refuses, as a cut link would leave it."""
    try:
        return nodes[name].execute(**inputs).args[0]
    except Exception:
        return None


@pytest.fixture
def world(nodes, tmp_path, monkeypatch):
    """model(kind): tiny depth models under the stand-in host; folder: the host's inputs and outputs; stack: a sound stack on disk."""
    monkeypatch.setattr(sys.modules["folder_paths"], "get_input_directory", lambda: str(tmp_path), raising=False)
    monkeypatch.setattr(sys.modules["folder_paths"], "get_output_directory", lambda: str(tmp_path), raising=False)
    stack = tmp_path / "sound"
    save_stack(stack, BokehStack(torch.rand(3, 6, 7), torch.rand(2, 3, 6, 7), [10.0, 20.0]))
    module = sys.modules[nodes["BokehEstimateDepth"].__module__]
    checkpoint = importlib.import_module(module.BokehError.__module__.replace(".errors", ".depth.checkpoint"))

    @cache
    def model(kind):
        name = "small_metric_hypersim.safetensors" if kind == "metric" else "small.safetensors"
        info, tensors = checkpoint.recognise((video_depth_anything if kind == "video" else depth_anything)(), name, "auto")
        managed = module.host.managed(lambda ops, some: checkpoint.build(info, some, ops), tensors, (torch.float32,))
        return module.LoadedDepthModel(managed, info)

    return SimpleNamespace(model=model, folder=tmp_path, stack=stack)


def tensors_in(value):
    """Every tensor of an input, by where it is."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    if isinstance(value, dict):
        return {f"[{key}]{inner}": t for key, item in value.items() for inner, t in tensors_in(item).items()}
    if isinstance(value, (list, tuple)):
        return {f"[{i}]{inner}": t for i, item in enumerate(value) for inner, t in tensors_in(item).items()}
    names = ("disparity", "focus", "k", "aperture", "picture", "lens", "reference", "frames")
    return {f".{name}{inner}": t for name in names if hasattr(value, name) for inner, t in tensors_in(getattr(value, name)).items()}


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def time_limit(seconds):
    def late(*_):
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(nodes, name, inputs):
    """What a node makes of its inputs: its results, or the sentence it refuses them with. Everything else is an AssertionError."""
    before = {at: t.clone() for at, t in tensors_in(inputs).items()}
    try:
        with time_limit(LIMIT):
            found = nodes[name].execute(**inputs).args
    except Exception as error:
        if type(error).__name__ != "BokehError":
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(last.filename)}:{last.lineno}"
            raise AssertionError(f"{name}: {type(error).__name__} at {place}: {error}") from error
        text = str(error)
        assert len(text) > 20 and text[0] == text[0].upper() and text.rstrip().endswith((".", ")")), f"no sentence: {text!r}"
        found = text
    after = tensors_in(inputs)
    changed = [at for at in before if not same(before[at], after[at])]
    assert not changed, f"{name} wrote to its inputs {changed}"
    if not isinstance(found, str):
        JUDGES.get(name, lambda inputs, found: None)(inputs, found)
    return found


def finite(t):
    return bool(t.isfinite().all())


def judge_defocus(inputs, found):
    defocus, overlay, in_focus = found
    image = inputs["image"]
    frames = len(image)
    if inputs.get("focus_track") is not None and inputs["focus"] == "auto" and frames == 1:
        frames = inputs["focus_track"].keys[-1].frame + 1
    assert overlay.shape == (frames, *image.shape[1:3], 3) and in_focus.shape == (frames, *image.shape[1:3])
    assert defocus.disparity.shape == in_focus.shape
    assert finite(defocus.disparity) and finite(defocus.focus) and finite(defocus.k) and finite(in_focus)
    assert 0 <= float(in_focus.min()) and float(in_focus.max()) <= 1
    if finite(image[..., :3]):
        assert finite(overlay)


def judge_render(inputs, found):
    image, defocus = inputs["image"], inputs["defocus"]
    (result,) = found
    frames = max(len(image), len(defocus.k))
    assert result.shape == (frames, *image.shape[1:])
    assert same(result[..., 3:], image[..., 3:].expand(frames, -1, -1, -1))
    if bool((defocus.k == 0).all()):
        assert same(result, image.expand(frames, -1, -1, -1))
    elif bool((defocus.k != 0).all()):
        assert finite(result[..., :3])
        plain = inputs["defocus"].lens.highlights == 0 and inputs.get("clean_plate") is None and image.dtype == torch.float32
        if plain and not inputs.get("linear") and float(image[..., :3].min()) >= 0:
            # Light is spread, not made; but unmixing the colours of edges in noise errs by some.
            assert float(result[..., :3].max()) <= max(1e-4, float(image[..., :3].max())) * 1.3


def judge_measure(inputs, found):
    *scores, table = found
    assert all(isinstance(score, float) for score in scores) and table.startswith("| score")
    if finite(inputs["result"]) and finite(inputs["truth"]):
        assert not math.isnan(scores[1])


def judge_depth(inputs, found):
    depth, geometry = found
    image = inputs["image"]
    assert depth.shape == (*image.shape[:3], 3) and finite(depth)
    assert 0 <= float(depth.min()) and float(depth.max()) <= 1
    raw = geometry["depth" if geometry["metric"] else "disparity"]
    assert raw.shape == image.shape[:3] and not bool(raw.isnan().any())


def judge_rendered_stack(inputs, found):
    stack, frames, reference = found
    image = inputs["image"]
    assert frames.shape == (len(stack.k), *image.shape[1:3], 3) and reference.shape == (1, *image.shape[1:3], 3)
    assert finite(frames)


def judge_photos_stack(inputs, found):
    stack, frames, _ = found
    assert frames.shape[:3] == inputs["frames"].shape[:3] and len(stack.k) == len(frames)


JUDGES = {
    "BokehDefocus": judge_defocus,
    "BokehRender": judge_render,
    "BokehMeasure": judge_measure,
    "BokehEstimateDepth": judge_depth,
    "BokehStackRendered": judge_rendered_stack,
    "BokehStackFromImages": judge_photos_stack,
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_ends_well(nodes, world, target):
    first, count = map(int, os.environ.get("BOKEH_FUZZ", f"0:{CASES}").split(":"))
    failures, refused = {}, Counter()
    for seed in range(first, first + count):
        r = Cases(f"{target} {seed}")
        name, inputs = TARGETS[target](r, nodes, world)
        try:
            sentence = outcome(nodes, name, inputs)
            if isinstance(sentence, str):
                refused[re.sub(r"[-\d.x]+", "#", sentence)[:90]] += 1
        except AssertionError as error:
            failures.setdefault(str(error)[:300], []).append(seed)
    print(f"{target}: {count} cases from seed {first}, {refused.total()} refused with a sentence")
    for sentence, times in refused.most_common(40):
        print(f"{times:8} {sentence}")
    assert not failures, "\n".join(f"{len(seeds)} x, seed {seeds[0]}: {words}" for words, seeds in failures.items())
    assert refused.total() < count


# Everything the cases above have found, one by one.

NAN, INF = math.nan, math.inf
PICTURE, DEPTH = torch.rand(1, 8, 9, 3), torch.linspace(0, 1, 72).view(1, 8, 9)
WIDGETS = {"strength": 24.0, "focus": "auto", "focus_x": 0.5, "focus_y": 0.5, "focus_value": 0.5}
WIDGETS |= {"depth_values": "near is bright", "follow": False}
LENS = {"mode": "strength", "strength": 24.0, "f_number": 1.8, "focal_length": 50.0, "sensor": "full frame", "upright": False}
LENS |= {"sensor_width": 36.0, "focus_distance": 0.0}
SOUND = {
    "BokehLens": lambda nodes, world: dict(LENS),
    "BokehFocusTrack": lambda nodes, world: {},
    "BokehDefocus": lambda nodes, world: {"image": PICTURE, "depth": DEPTH, **WIDGETS},
    "BokehRender": lambda nodes, world: {"image": PICTURE, "defocus": made(nodes, "BokehDefocus", SOUND["BokehDefocus"](nodes, world))},
    "BokehMeasure": lambda nodes, world: {"result": PICTURE, "truth": PICTURE},
    "BokehEstimateDepth": lambda nodes, world: {
        **{"image": PICTURE, "depth_model": world.model("relative"), "frames": "one clip", "resolution": 28, "edges": "plain"}
    },
    "BokehStackRendered": lambda nodes, world: {**SOUND["BokehRender"](nodes, world), "k_values": "10"},
    "BokehStackFromImages": lambda nodes, world: {"reference": PICTURE, "frames": PICTURE, "k_values": "10"},
}


def geometry(**more):
    return {"depth": {"depth": 1 / (DEPTH + 0.1), **more}}


FOUND = [
    ("BokehLens", {"aperture_picture": object()}, "'aperture_picture' got a object"),
    ("BokehLens", {"anamorphic": 1e30}, "anamorphic is 1e+30"),  # made a picture of NaN
    ("BokehFocusTrack", {"keyframes": "[[Infinity, 1]]"}, "can not be read"),
    ("BokehFocusTrack", {"keyframes": "[" * 100_000}, "starts like JSON"),
    ("BokehDefocus", {"image": None}, "'image' got nothing"),
    ("BokehDefocus", {"image": PICTURE[..., :1]}, "'image' got a tensor of shape"),
    ("BokehDefocus", {"image": PICTURE[:0]}, "'image' got a tensor of shape [0, 8, 9, 3]"),
    ("BokehDefocus", {"image": (PICTURE * 255).byte()}, "'image' holds uint8"),
    ("BokehDefocus", {"depth": "depth.png"}, "'depth' got a str"),
    ("BokehDefocus", {"depth": DEPTH[None, None]}, "'depth' got a tensor of shape [1, 1, 1, 8, 9]"),
    ("BokehDefocus", {"depth": DEPTH[..., :0]}, "'depth' got a tensor of shape [1, 8, 0]"),
    ("BokehDefocus", {"depth": torch.zeros(1, 8, 9, 0), "depth_values": "metres"}, "'depth' got a tensor"),
    ("BokehDefocus", {"depth": {"depth": "x"}}, "depth has the type str"),
    ("BokehDefocus", {"depth": {"disparity": DEPTH[0]}}, "disparity has shape [8, 9]"),
    ("BokehDefocus", geometry(mask=DEPTH[:, :4]), "mask has shape [1, 4, 9]; expected [1, 8, 9]"),
    ("BokehDefocus", geometry(sky=DEPTH.expand(2, -1, -1)), "sky has shape [2, 8, 9]"),
    ("BokehDefocus", {"focus": "mask", "mask": torch.zeros(1, 0, 4)}, "'mask' got a tensor of shape [1, 0, 4]"),
    ("BokehDefocus", {"mask": {}}, "'mask' got a dict"),
    ("BokehDefocus", {"lens": 1.8}, "'lens' got a float; expected what Choose Lens hands on"),
    ("BokehDefocus", {"focus_track": "0: 1"}, "'focus_track' got a str"),
    ("BokehDefocus", {"strength": 1e37, "depth": 1e-8 * DEPTH, "depth_values": "1 / metres"}, "too large for this depth map"),
    ("BokehRender", {"defocus": None}, "'defocus' got nothing; expected what Set Focus and Blur hands on"),
    ("BokehRender", {"image": PICTURE[0]}, "'image' got a tensor of shape [8, 9, 3]"),
    ("BokehRender", {"image": PICTURE > 0.5}, "'image' holds bool"),
    ("BokehRender", {"image": PICTURE * 1e30}, "no light"),  # 1e30 to the power of 2.4 made a picture of NaN
    ("BokehRender", {"matte": []}, "'matte' got a list"),
    ("BokehRender", {"matte": DEPTH / 0 * 0}, "Matte 0 holds values that are not numbers"),  # made a picture of NaN
    ("BokehRender", {"clean_plate": PICTURE[..., :2]}, "'clean_plate' got a tensor"),
    ("BokehMeasure", {"truth": PICTURE[0]}, "'truth' got a tensor of shape [8, 9, 3]"),
    ("BokehMeasure", {"result": PICTURE[..., :1]}, "'result' got a tensor of shape"),
    ("BokehMeasure", {"mask": torch.zeros(1, 0, 4)}, "'mask' got a tensor"),
    ("BokehMeasure", {"defocus": DEPTH}, "'defocus' got a tensor"),
    ("BokehEstimateDepth", {"image": PICTURE[:, :0]}, "'image' got a tensor of shape [1, 0, 9, 3]"),
    ("BokehEstimateDepth", {"image": PICTURE * NAN}, "Frame 0 of the image holds values that are not numbers"),
    ("BokehEstimateDepth", {"depth_model": {}}, "'depth_model' got a dict; expected what Load Depth Model (Bokeh) hands on"),
    ("BokehStackRendered", {"image": 0.5}, "'image' got a float"),
    ("BokehStackRendered", {"defocus": None}, "'defocus' got nothing"),
    ("BokehStackRendered", {"k_values": "1e308"}, "too large"),
    ("BokehStackFromImages", {"frames": None}, "'frames' got nothing"),
    ("BokehStackFromImages", {"k_from": "EXIF", "photos": "a\0b"}, "input folder"),
]


def test_what_was_found_is_a_sentence(nodes, world):
    for name, odd, words in FOUND:
        found = outcome(nodes, name, {**SOUND[name](nodes, world), **odd})
        assert isinstance(found, str) and words in found, (name, odd, found)


def test_odd_manifests_are_sentences(nodes, world):
    manifest = world.folder / "stack.json"
    name = "9" * 400  # longer than names may be
    for text in ("[" * 100_000, json.dumps({"ref": name, "stack": [name], "k": [1]}), json.dumps({"ref": "a\0b", "stack_index": name})):
        manifest.write_text(text)
        assert "stack.json" in outcome(nodes, "BokehLoadStack", {"manifest": "stack.json"})


def test_a_blur_beyond_all_numbers_is_a_sentence(nodes, world):
    """A radius of 1e30 px made the renderer halve the picture for ever."""
    inputs = SOUND["BokehRender"](nodes, world)
    for k in (1e10, 1e30):
        inputs["defocus"] = replace(inputs["defocus"], k=torch.tensor([k]))
        assert "The blur radius comes to" in outcome(nodes, "BokehRender", inputs)
    inputs["defocus"] = replace(inputs["defocus"], k=torch.tensor([1e8]))  # absurd, but a picture
    assert not isinstance(outcome(nodes, "BokehRender", inputs), str)


def test_a_still_does_not_become_a_clip_without_end(nodes, world):
    inputs = SOUND["BokehDefocus"](nodes, world)
    track = nodes["BokehFocusTrack"].execute(keyframes="0: 0.5, 4000000000: 0.7").args[0]
    assert "at most 10000 frames" in outcome(nodes, "BokehDefocus", {**inputs, "focus_track": track})
    track = nodes["BokehFocusTrack"].execute(keyframes="0: 0.5, 5: 0.7").args[0]
    assert len(outcome(nodes, "BokehDefocus", {**inputs, "focus_track": track})[1]) == 6


def test_masks_come_in_every_usual_form(nodes, world):
    inputs = SOUND["BokehDefocus"](nodes, world) | {"focus": "mask"}
    subject = DEPTH > 0.7
    results = [outcome(nodes, "BokehDefocus", {**inputs, "mask": m}) for m in (subject, subject.float(), subject[0], subject[None].half())]
    assert len({float(found[0].focus[0]) for found in results}) == 1
