"""`bokeh render --renderer any-to-bokeh`: the library's frames through files, and runs that stop and go on."""

import json

import numpy as np
import pytest
import torch

from bokeh_core import cli
from bokeh_core.media import Picture, read_picture, write_picture
from bokeh_core.samplers.any_to_bokeh import checkpoint, sampler
from bokeh_core.video import clips, resume
from bokeh_core.video.clips import open_clip
from tests.stand_ins import any_to_bokeh as stand_in

COUNT, HEIGHT, WIDTH = 13, 40, 72
BASE = ["--renderer", "any-to-bokeh", "--renderer-model", "release", "--renderer-resolution", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp("any_to_bokeh") / "release")


@pytest.fixture
def here(tmp_path, monkeypatch, release):
    """clip/ of 13 frames, depth/ with a map for each, release: the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no models"))
    (tmp_path / "release").symlink_to(release)
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "depth").mkdir()
    for i in range(COUNT):
        write_picture(f"clip/frame_{i}.png", Picture(torch.rand(3, HEIGHT, WIDTH, generator=generator)), 8)
        np.save(f"depth/{i:03d}.npy", torch.rand(HEIGHT, WIDTH, generator=generator).numpy())
    return tmp_path


def bokeh(*words, output="out"):
    track = ["--focus-track", "0: 0.2, 12: 0.8", "--k", 1.5]
    return cli.main([str(word) for word in ["render", "clip", "--depth", "depth", *track, "-o", output, *BASE, *words]])


def by_the_library(release, **more):
    clip, planes = open_clip("clip"), list(open_clip("depth").planes("depth map"))
    model = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(release)))
    with torch.no_grad():
        pieces = sampler.render_clip(
            model,
            [picture.pixels for picture in clip],
            planes,
            torch.linspace(0.2, 0.8, COUNT),
            torch.full((COUNT,), 1.5),
            size=clip.size,
            resolution=64,
            **more,
        )
        return torch.cat([piece.frames for piece in pieces])


def written(folder="out"):
    return torch.stack([picture.pixels for picture in open_clip(folder)])


def test_frames_are_the_library_s(here, release):
    assert bokeh() == 0
    assert (written() - by_the_library(release)).abs().max() < 0.5 / 255 + 1e-4
    assert [file.name for file in sorted((here / "out").iterdir())][:2] == ["frame_0.png", "frame_1.png"]
    assert not (here / ".out.partial").exists()


def test_a_video_keeps_its_frames_and_size(here):
    assert bokeh("--fps", 12, output="out.mp4") == 0
    video = open_clip("out.mp4")
    assert len(video) == COUNT and video.size == (HEIGHT, WIDTH) and video.rate == 12 and not (here / ".out.mp4.partial").exists()


def stop_after_the_first_pair(monkeypatch):
    mark = resume.PartialClip.mark

    def stopping(self, carry=None):
        mark(self, carry)
        raise KeyboardInterrupt

    monkeypatch.setattr(resume.PartialClip, "mark", stopping)


@pytest.mark.parametrize("words", [[], ["--fidelity", "as-published", "--seed", "3"]])
def test_a_stopped_run_goes_on(here, monkeypatch, capsys, words):
    if words:
        monkeypatch.setattr(sampler.preparation, "PUBLISHED_SIZE", (64, 64))  # the published one takes minutes
    assert bokeh(*words, output="whole") == 0
    with monkeypatch.context() as patch:
        stop_after_the_first_pair(patch)
        assert bokeh(*words) == 130
    assert f"8 of 13 frames are finished and kept in {here / '.out.partial'}" in capsys.readouterr().err and not (here / "out").exists()
    state = json.loads((here / ".out.partial" / ".run.json").read_text())
    assert state["done"] == 8 and len(list((here / ".out.partial").glob("*.png"))) == 8

    encoded = []
    encode = sampler.AnyToBokeh.encode
    monkeypatch.setattr(sampler.AnyToBokeh, "encode", lambda self, *given: encoded.append(1) or encode(self, *given))
    assert bokeh(*words) == 0
    assert "going on after 8 of 13 frames" in capsys.readouterr().err
    assert len(encoded) == COUNT - 8 + bool(words)  # as published one grey frame more
    assert torch.equal(written(), written("whole")) and not (here / ".out.partial").exists()


def test_a_run_stopped_while_writing_keeps_its_frames(here, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clips._Encoder, "write", stop)
        assert bokeh(output="out.mp4") == 130
    assert len(list((here / ".out.mp4.partial").glob("*.png"))) == COUNT
    monkeypatch.setattr(sampler.AnyToBokeh, "encode", None)  # nothing is left to compute
    assert bokeh(output="out.mp4") == 0 and len(open_clip("out.mp4")) == COUNT and not (here / ".out.mp4.partial").exists()


def test_other_settings_do_not_mix(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after_the_first_pair(patch)
        assert bokeh() == 130
    assert bokeh("--fidelity", "as-published") == 2
    assert "8 finished frames of a stopped run with other settings (--fidelity)" in capsys.readouterr().err
    picture = read_picture("clip/frame_3.png")
    write_picture("clip/frame_3.png", Picture(1 - picture.pixels), 8)
    assert bokeh() == 2 and "other settings (IMAGE)" in capsys.readouterr().err
    assert json.loads((here / ".out.partial" / ".run.json").read_text())["done"] == 8
    (here / ".out.partial" / ".run.json").write_text("{")
    assert bokeh() == 2 and "not what a stopped run leaves behind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--matte", "clip"], "--matte is for the physical renderer"),
        (["--blades", "5"], "--blades is for the physical renderer"),
        (["--renderer", "physical"], "--renderer-model is for --renderer bokehdiff or magicbokeh or any-to-bokeh"),
        (["--renderer-model", "nowhere"], "no such folder"),
        (["--renderer-model", "depth"], "unet/config.json"),
        (["--renderer-resolution", "10"], "expected 64 to 4096"),
    ],
)
def test_mistakes_cost_one_sentence(here, capsys, words, sentence):
    assert bokeh(*words) == 2
    assert sentence in capsys.readouterr().err and not (here / "out").exists()


def test_without_weights_it_says_where_they_are(here, capsys):
    command = ["render", "clip", "--depth", "depth", "-o", "out", "--renderer", "any-to-bokeh", "--device", "cpu"]
    assert cli.main(command) == 2
    message = capsys.readouterr().err
    assert "github.com/vivoCameraResearch/any-to-bokeh" in message and "diffusers/any_to_bokeh" in message
    place = here / "models" / "diffusers"
    place.mkdir(parents=True)
    (place / "any_to_bokeh").symlink_to(here / "release")
    assert cli.main([*command, "--models", "models", "--renderer-resolution", "64", "--k", "0"]) == 0
    assert torch.equal(written(), written("clip"))  # no blur: the input
