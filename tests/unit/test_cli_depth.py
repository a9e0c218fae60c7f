"""`bokeh depth`, `bokeh models check` and `bokeh render` without a depth file, with tiny checkpoints."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from bokeh_core import cli, depth_cli, media
from bokeh_core.depth.checkpoint import load_depth_model
from bokeh_core.depth.clip import NEAREST, PHOTOS, WITH_CUTS, estimate_clip, near_bright
from bokeh_core.media import Picture, read_plane, write_picture
from bokeh_core.video.clips import open_clip, write_clip
from tests.stand_ins import depth as stand_ins

SIZE = (57, 83)
RELATIVE, METRIC, VIDEO = "depth_anything_v2_vits.pth", "depth_anything_v2_metric_hypersim_vits.pth", "video_depth_anything_vits.pth"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with photo.png, clip/ and clip.mp4 of four frames, and models/ like ComfyUI's; nothing else is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(noise, (SIZE[0], SIZE[1] + 4), mode="bilinear")[0]
    frames = [large[:, :, i : i + SIZE[1]] for i in range(4)]
    write_picture("photo.png", Picture(frames[0]), 8)
    for i, frame in enumerate(frames):
        write_picture(f"clip/frame_{i}.jpg", Picture(frame))
    source = open_clip("clip")
    with write_clip("clip.mp4", source) as write:
        for frame in source:
            write(frame)
    folder = tmp_path / "models" / "depthanything"
    folder.mkdir(parents=True)
    torch.save(stand_ins.depth_anything(), folder / RELATIVE)
    torch.save({"model": stand_ins.depth_anything(1)}, folder / METRIC)
    torch.save(stand_ins.video_depth_anything(), folder / VIDEO)
    return tmp_path


def bokeh(*words):
    return cli.main([str(word) for word in words])


def depth(*words, expected=0):
    assert bokeh("depth", *words, "--models", "models", "--resolution", 140) == expected


def library(name, source, **more):
    """(raw, near-bright) [B, H, W] by the library."""
    model = load_depth_model(f"models/depthanything/{name}")
    clip = open_clip(source)
    raw = torch.empty(len(clip), *clip.size)
    starts = estimate_clip(model, [picture.pixels for picture in clip], raw, resolution=140, **more)
    return raw, near_bright(raw, starts, model.info.metric)


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_photo_becomes_a_16_bit_png(here, capsys):
    before = files_of(here)
    depth("photo.png", "-o", "depth.png")
    out, err = capsys.readouterr()
    assert out == "depth.png\n" and "depth by Depth Anything V2" in err and RELATIVE in err and "Apache-2.0" in err
    assert files_of(here) == sorted([*before, "depth.png"]), "nothing else may stay"
    picture = media.read_picture("depth.png")
    assert picture.bits == 16
    assert (picture.pixels[0] - library(RELATIVE, "photo.png")[1][0]).abs().max() < 1 / 65535
    assert (float(picture.pixels.min()), float(picture.pixels.max())) == (0.0, 1.0)


@pytest.mark.parametrize("suffix", [".npy", ".exr"])
@pytest.mark.parametrize(("name", "words"), [(RELATIVE, "no unit"), (METRIC, "metres")])
def test_raw_values(here, capsys, suffix, name, words):
    depth("photo.png", "-o", f"raw{suffix}", "--model", f"models/depthanything/{name}")
    assert words in capsys.readouterr().err
    assert torch.allclose(read_plane(f"raw{suffix}")[0], library(name, "photo.png")[0][0], rtol=1e-5)


def test_options_reach_the_estimate(here):
    depth("photo.png", "-o", "a.npy", "--plain-edges")
    assert torch.allclose(read_plane("a.npy")[0], library(RELATIVE, "photo.png", guided=False)[0][0], rtol=1e-5)
    shutil.copy(f"models/depthanything/{RELATIVE}", "mine.pth")
    depth("photo.png", "-o", "b.npy", "--model", "mine.pth", "--kind", "metric outdoor")
    depth("photo.png", "-o", "c.npy", "--model", "mine.pth", "--kind", "metric indoor")
    outdoor, indoor = read_plane("b.npy")[0], read_plane("c.npy")[0]
    assert torch.allclose(outdoor, 4 * indoor, rtol=1e-4)
    linear = media.read_picture("photo.png").pixels ** 2.2
    np.save("linear.npy", linear.permute(1, 2, 0).numpy())
    depth("linear.npy", "-o", "d.npy", "--linear")
    depth("linear.npy", "-o", "e.npy")
    a, d, e = (read_plane(f"{name}.npy")[0] for name in "ade")
    library_a = library(RELATIVE, "photo.png")[0][0]
    assert (d - library_a).abs().mean() < 0.3 * (e - library_a).abs().mean() and a.shape == SIZE


def test_a_clip_becomes_a_folder_with_one_range(here, capsys):
    depth("clip", "-o", "depth")
    assert VIDEO in capsys.readouterr().err, "for a clip the video model is the best one"
    raw, grey = library(VIDEO, "clip")
    assert files_of(here / "depth") == [f"frame_{i}.png" for i in range(4)]
    found = torch.stack([read_plane(f"depth/frame_{i}.png")[0] for i in range(4)])
    assert (found - grey).abs().max() < 1 / 65535 and (found.min(), found.max()) == (0, 1)
    assert sum(float(one.min()) == 0 for one in found) == 1, "one range for all"
    depth("clip", "-o", "raw", "--frames", "exr")
    assert torch.allclose(torch.stack([read_plane(f"raw/frame_{i}.exr")[0] for i in range(4)]), raw, rtol=1e-4, atol=1e-5)


def test_a_video_becomes_a_grey_video_or_numbered_files(here):
    depth("clip.mp4", "-o", "depth.mp4", "--model", RELATIVE)
    grey = library(RELATIVE, "clip.mp4")[1]
    found = torch.stack(list(open_clip("depth.mp4").planes("depth")))
    assert found.shape == grey.shape and (found - grey).abs().mean() < 0.02
    depth("clip.mp4", "-o", "files", "--model", METRIC, "--frames", "npy")
    assert files_of(here / "files") == [f"{i:05d}.npy" for i in range(4)]


def test_separate_photos(here):
    depth("clip", "-o", "depth", "--per-image")
    grey = library(RELATIVE, "clip", frames_are=PHOTOS)[1]
    found = torch.stack([read_plane(f"depth/frame_{i}.png")[0] for i in range(4)])
    assert (found - grey).abs().max() < 1 / 65535 and all(float(one.min()) == 0 and float(one.max()) == 1 for one in found)


def test_cuts_and_steadiness(here):
    frames = list(open_clip("clip"))
    for i, frame in enumerate([*frames, *(Picture(one.pixels.flip(1, 2)) for one in frames)]):
        write_picture(f"cut/{i}.png", frame)
    depth("cut", "-o", "depth", "--cuts", "--steady", 0.5, "--model", RELATIVE)
    found = torch.stack([read_plane(f"depth/{i}.png")[0] for i in range(8)])
    assert (found - library(RELATIVE, "cut", frames_are=WITH_CUTS, steady=0.5)[1]).abs().max() < 1 / 65535
    assert all((float(shot.min()), float(shot.max())) == (0, 1) for shot in (found[:4], found[4:]))
    assert (found - library(RELATIVE, "cut", frames_are=WITH_CUTS)[1]).abs().max() > 1e-3


def test_what_touches_the_lens_is_near_not_far(here):
    model = load_depth_model(f"models/depthanything/{METRIC}")
    model.network.forward = lambda pixels: torch.zeros(len(pixels), *pixels.shape[2:])
    raw = torch.ones(1, 30, 40)
    estimate_clip(model, [torch.rand(3, 30, 40)], raw, guided=False)
    assert (raw == NEAREST).all()


def test_near_bright_of_metres_is_their_inverse():
    raw = torch.tensor([[[0.5, 1.0, 2.0, 20.0]], [[1.0, 4.0, 5.0, 20.0]]])
    both = near_bright(raw, [0], True)
    inverse = 1 / raw
    assert torch.allclose(both, (inverse - 0.05) / (inverse.max() - 0.05)) and both[0, 0, 0] == 1
    each = near_bright(raw, [0, 1], True)
    assert torch.equal(each[0], both[0]) and float(each[1].max()) == 1
    assert torch.equal(near_bright(torch.ones(2, 1, 3), [0], False), torch.zeros(2, 1, 3)), "a flat wall is no error here"
    kept = raw.clone()
    near_bright(raw, [0], False, keep=True)
    assert torch.equal(raw, kept) and near_bright(raw, [0], False, keep=False) is raw


# bokeh render without --depth


def render(*words):
    return bokeh("render", *words, "--models", "models", "--resolution", 140)


def test_render_finds_a_model_and_gives_what_its_depth_file_gives(here, capsys):
    assert render("photo.png", "-o", "a.png", "--strength", 40) == 0
    assert RELATIVE in capsys.readouterr().err
    depth("photo.png", "-o", "depth.npy")
    near = library(RELATIVE, "photo.png")[1][0]
    np.save("depth.npy", near.numpy())
    assert bokeh("render", "photo.png", "--depth", "depth.npy", "-o", "b.png", "--strength", 40) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    assert render("clip", "-o", "out", "--strength", 40) == 0 and len(files_of(here / "out")) == 4


def test_a_real_lens_takes_a_metric_model(here, capsys):
    lens = ("--f-number", 1.4, "--focal-length", 85)
    assert render("photo.png", "-o", "a.png", *lens) == 0
    assert METRIC in capsys.readouterr().err
    np.save("metres.npy", library(METRIC, "photo.png")[0][0].numpy())
    assert bokeh("render", "photo.png", "--depth", "metres.npy", "--depth-unit", "metres", "-o", "b.png", *lens) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    assert render("photo.png", "-o", "c.png", *lens, "--model", RELATIVE) == 2
    assert "gives relative depth; choose a metric model" in capsys.readouterr().err


def test_the_best_model_is_chosen():
    from types import SimpleNamespace as Info

    def best(*models, metric=False, video=False):
        return min(models, key=lambda one: depth_cli._rank(*one, metric=metric, video=video))

    def model(name, **more):
        from pathlib import Path

        return Path(name), Info(**{"metric": False, "video": False, "size": "S", **more})

    small, large = model("depth_anything_v2_vits.pth"), model("depth_anything_v2_vitl.pth", size="L")
    bad, clip, metres = model("DAdepth.pth", size="L"), model("v.pth", video=True), model("m.pth", metric=True, size="B")
    unknown = model("a.pth", size="custom")
    everything = (unknown, small, bad, large, clip, metres)
    assert best(*everything) == large and best(*everything, video=True) == clip and best(*everything, metric=True) == metres
    assert best(unknown, small) == small and best(bad, small) == bad and best(clip) == clip


# Mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("depth", "photo.png", "-o", "photo.png"), "also IMAGE"),
        (("depth", "gone.png", "-o", "a.png"), "no such file"),
        (("depth", "photo.png", "-o", "a.xyz"), "suffix '.xyz'"),
        (("depth", "clip", "-o", "a.png"), "cannot write a clip with the suffix '.png'"),
        (("depth", "photo.png", "-o", "a.png", "--model", "nonsense"), r"no depth model 'nonsense' .installed: .*depth_anything_v2_vits"),
        (
            ("depth", "photo.png", "-o", "a.png", "--model", "video-depth-anything-large"),
            "run 'bokeh models get video-depth-anything-large'",
        ),
        (("depth", "photo.png", "-o", "a.png", "--steady", "2"), "expected 0 .off. to 1"),
        (("depth", "photo.png", "-o", "a.png", "--per-image"), "for clips and folders"),
        (("depth", "photo.png", "-o", "a.png", "--frames", "exr"), "leave it out"),
        (("depth", "photo.png", "-o", "a.png", "--device", "nonsense"), "no such device"),
        (("depth", "clip", "-o", "a", "--cuts", "--per-image"), "not allowed with"),
        (("depth", "photo.png", "-o", "a.png", "--resolution", "5"), "expected 14 to 4096"),
        (("depth", "photo.png", "-o", "a.png", "--models", "nowhere"), "nowhere is no folder"),
        (("render", "photo.png", "--depth", "photo.png", "--model", "x", "-o", "a.png"), "--depth and --model do not go together"),
        (("render", "photo.png", "--depth-unit", "metres", "-o", "a.png"), "give it, or leave them out"),
    ],
)
def test_mistakes_are_one_sentence(here, capsys, words, expected):
    before = files_of(here)
    models = () if "--models" in words or "--depth" in words else ("--models", "models")
    assert bokeh(*words, *models) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(expected, err), err
    assert files_of(here) == before


def test_without_any_model_one_sentence_says_how_to_get_one(here, capsys):
    for words, name in (((), "depth-anything-v2-small"), (("--f-number", "2", "--focal-length", "50"), "depth-anything-v2-indoor-small")):
        assert bokeh("render", "photo.png", "-o", "a.png", *words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and f"run 'bokeh models get {name}'" in err and "models/depthanything" in err


def test_a_full_disk_is_found_before_the_work(here, capsys, monkeypatch):
    monkeypatch.setattr(depth_cli.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    depth("clip", "-o", "depth", expected=2)
    assert "GB free" in capsys.readouterr().err and not (here / "depth").exists()


def test_an_interruption_leaves_nothing(here, capsys, monkeypatch):
    def stop(*given, **more):
        raise KeyboardInterrupt

    before = files_of(here)
    monkeypatch.setattr("bokeh_core.depth.clip.estimate_clip", stop)
    depth("clip", "-o", "depth", expected=130)
    assert files_of(here) == before and "no half-written file" in capsys.readouterr().err


# bokeh models, with depth models


def test_models_lists_what_is_installed(here, capsys):
    torch.save({"a": torch.zeros(1)}, "models/depthanything/foreign.pth")
    (here / "models" / "depthanything" / "cut.pth").write_bytes(b"PK\3\4 cut")
    assert bokeh("models", "--models", "models") == 0
    installed, missing = capsys.readouterr().out.split("\nnot installed")
    for words in (
        RELATIVE,
        "Video Depth Anything custom",
        "metric indoor",
        "Apache-2.0",
        "nothing this library knows; NOT USABLE",
        "it may be cut",
    ):
        assert words in installed, words
    assert RELATIVE not in missing and "depth_anything_v2_vitl.pth" in missing


def test_check(here, capsys):
    assert bokeh("models", "check", f"models/depthanything/{METRIC}") == 0
    out = capsys.readouterr().out
    for words in (
        "Depth Anything V2 custom, metric indoor (20 m)",
        "entry 'model'",
        "metres, at most 20",
        "float32",
        "original",
        "128 wide, 4 blocks, 2 heads, taps 0 1 2 3",
    ):
        assert words in out, words
    tensors = stand_ins.video_depth_anything()
    del tensors["pretrained.norm.bias"]
    torch.save({f"module.{name}": tensor.half() for name, tensor in tensors.items()} | {"module.extra": torch.zeros(1)}, "bad.pth")
    assert bokeh("models", "check", "bad.pth") == 2
    out = capsys.readouterr().out
    for words in ("PROBLEM:", "1 tensors missing: pretrained.norm.bias", "1 tensors unexpected: extra", "module.", "float16, float32"):
        assert words in out, words
