"""`bokeh render` of a clip that is stopped or killed: the same command goes on, and the result is that of a run nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bokeh_core import cli, depth_cli, media
from bokeh_core.media import Picture, read_picture, write_picture
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.render import render
from bokeh_core.video import resume, streaming
from bokeh_core.video.clips import open_clip
from tests.stand_ins import depth as stand_ins

ROOT = Path(__file__).resolve().parents[2]
COUNT, HEIGHT, WIDTH = 24, 48, 64
WORDS = ["render", "clip", "--depth", "depth", "--focus-track", "0: 0.2, 23: 0.8", "--k", "9"]


def scene(i, shot=0):
    """(picture, disparity) of a bright square that moves over a slope; another shot has other colours and another depth."""
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    picture = torch.stack([0.5 + 0.4 * torch.sin((9 + 3 * shot) * x + 5 * y), 0.5 + 0.4 * torch.cos(7 * y * (1 + shot)), 0.3 + 0.4 * x])
    disparity = 0.1 + 0.2 * x if shot == 0 else 0.02 + 0.06 * (1 - y)
    left, height = 10 + i % 30, 20 + 15 * shot
    picture[:, 10 : 10 + height, left : left + 20] = torch.tensor([0.9, 0.8 - 0.6 * shot, 0.1 + 0.7 * shot])[:, None, None]
    disparity[10 : 10 + height, left : left + 20] = 0.85 - 0.67 * shot
    return picture, disparity


@pytest.fixture
def here(tmp_path, monkeypatch):
    """clip/ and depth/ of 24 frames."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no models"))
    Path("depth").mkdir()
    for i in range(COUNT):
        picture, disparity = scene(i)
        write_picture(f"clip/{i}.png", Picture(picture), 8)
        np.save(f"depth/{i:03d}.npy", disparity.numpy())
    return tmp_path


def bokeh(*words, output="out"):
    return cli.main([*WORDS, "-o", output, *map(str, words)])


def contents(path):
    """The bytes of a file, or {name: bytes} of a folder."""
    path = Path(path)
    return path.read_bytes() if path.is_file() else {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def state(output="out"):
    return json.loads(Path(f".{output}.partial/.run.json").read_text())


def killed_after(frames, *words, output):
    """A run of its own, killed with SIGKILL as soon as so many frames are finished. Returns how many were."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    slowed = (
        "import bokeh_core.video.streaming as s; s.chunk_length = lambda *_: 3; from bokeh_core import cli; raise SystemExit(cli.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", slowed, *WORDS, "-o", output, *words], env=environment, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (Path(f".{output}.partial/.run.json").exists() and state(output)["done"] >= frames):
            assert process.poll() is None and time.monotonic() < until, "the run ended, or did not begin"
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    return state(output)["done"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("output", "words"), [("out.mp4", []), ("out", ["--bits", "16"])])
def test_a_run_killed_twice_ends_with_the_bytes_of_an_undisturbed_one(here, monkeypatch, capsys, output, words):
    monkeypatch.setattr(streaming, "chunk_length", lambda *_: 3)
    whole = "whole" + output[3:]
    assert bokeh(*words, output=whole) == 0
    first = killed_after(1, *words, output=output)
    second = killed_after(first + 1, *words, output=output)
    assert 0 < first < second < COUNT and not Path(output).exists()

    rendered = []
    monkeypatch.setattr(streaming, "render", lambda image, *rest, **more: rendered.append(len(image)) or render(image, *rest, **more))
    assert bokeh(*words, output=output) == 0
    assert f"going on after {second} of {COUNT} frames" in capsys.readouterr().err
    assert sum(rendered) == COUNT - second
    assert contents(output) == contents(whole)
    assert not list(here.glob(".*")), "nothing is left"


def stop_after(monkeypatch, frames, error=KeyboardInterrupt):
    """The next run raises when this many frames are finished."""
    mark = resume.PartialClip.mark

    def stopping(self, carry=None):
        mark(self, carry)
        if self.done >= frames:
            raise error

    monkeypatch.setattr(resume.PartialClip, "mark", stopping)


def test_what_was_being_written_when_it_was_killed_is_cleared_away(here, monkeypatch):
    assert bokeh(output="whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        assert bokeh() == 130
    folder = here / ".out.partial"
    (folder / ".16.77.partial.png").write_bytes(b"half a picture")
    (folder / "17.png").write_bytes(b"written, but not yet counted")
    (folder / ".run.88.partial.json").write_text("{")
    assert bokeh() == 0 and contents("out") == contents("whole") and not list(here.glob(".*"))


def test_other_settings_inputs_and_folders_are_refused_or_thrown_away(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        assert bokeh() == 130
    kept = contents(".out.partial")
    for words, named in ((["--blades", 5], "--blades"), (["--quality", "reference"], "--quality"), (["--bits", 16], "--bits")):
        assert bokeh(*words) == 2
        assert f"16 finished frames of a stopped run with other settings ({named})" in capsys.readouterr().err
    disparity = np.load("depth/005.npy")
    np.save("depth/005.npy", disparity / 2)
    assert bokeh() == 2 and "(--depth)" in capsys.readouterr().err and contents(".out.partial") == kept
    assert bokeh("--anew") == 0 and "going on" not in capsys.readouterr().err and not list(here.glob(".*"))

    Path(".other.partial").mkdir()
    Path(".other.partial/letters.txt").write_text("mine")
    for words in ([], ["--anew"]):
        assert bokeh(*words, output="other") == 2 and "not what a stopped run leaves behind" in capsys.readouterr().err
    assert Path(".other.partial/letters.txt").read_text() == "mine"


def test_an_error_keeps_what_is_finished_and_nothing_else(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 16, OSError(28, "No space left on device"))
        assert bokeh() == 2
    err = capsys.readouterr().err
    assert f"note: 16 of {COUNT} frames are finished and kept in {here / '.out.partial'}" in err and "No space left" in err
    assert bokeh() == 0
    assert bokeh("--focus-track", "0: (0.5", output="bad") == 2 and bokeh("--aperture-picture", "nowhere.png", output="bad") == 2
    write_picture("clip/20.png", Picture(torch.rand(3, 8, 8)), 8)
    assert bokeh(output="bad") == 2 and not list(here.glob(".*"))


def test_frames_without_numbers_are_refused(here, capsys):
    pixels = torch.rand(3, HEIGHT, WIDTH)
    write_picture("light/0.exr", Picture(pixels))
    pixels[0, 3, 3] = float("nan")
    write_picture("light/1.exr", Picture(pixels))
    assert cli.main(["render", "light", "--depth", "depth/000.npy", "-o", "out"]) == 2
    assert "1 pixels are NaN or infinite" in capsys.readouterr().err and not list(here.glob("*out*"))


def test_formats_and_alpha_survive_a_stop(here, monkeypatch):
    """Frames are kept as they will be: floats above 1, alpha, their names."""
    for i in range(20):
        picture, _ = scene(i)
        write_picture(f"floats/shot.{i}.exr", Picture(picture * 3, torch.linspace(0, 1, WIDTH).expand(HEIGHT, -1)), 32)
    words = ["render", "floats", "--depth", "depth/000.npy", "--k", "4", "--focus-disparity", "0.8"]
    assert cli.main([*words, "-o", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        assert cli.main([*words, "-o", "out"]) == 130
    assert cli.main([*words, "-o", "out"]) == 0 and contents("out") == contents("whole")
    assert float(read_picture("out/shot.3.exr").pixels.max()) > 2 and read_picture("out/shot.3.exr").alpha is not None


def test_the_depth_of_a_clip_is_estimated_once(here, monkeypatch, capsys):
    Path("models/depthanything").mkdir(parents=True)
    torch.save(stand_ins.depth_anything(), "models/depthanything/depth_anything_v2_vits.pth")
    words = ["render", "clip", "--models", "models", "--resolution", "140", "--k", "4", "--focus-disparity", "0.5", "--device", "cpu"]
    assert cli.main([*words, "-o", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        assert cli.main([*words, "-o", "out"]) == 130
    assert cli.main([*words, "-o", "out", "--resolution", "280"]) == 2 and "(--resolution)" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(depth_cli, "_load", None)  # the model is not even loaded
        assert cli.main([*words, "-o", "out"]) == 0
    assert contents("out") == contents("whole") and not list(here.glob(".*"))

    stand_ins_of_another_seed = stand_ins.depth_anything(5)
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        assert cli.main([*words, "-o", "again"]) == 130
    torch.save(stand_ins_of_another_seed, "models/depthanything/depth_anything_v2_vits.pth")
    assert cli.main([*words, "-o", "again"]) == 2 and "(file of depth_model)" in capsys.readouterr().err


# Shots


def cut_clip(lengths):
    """shots/ and shots_depth/: stretches of two different scenes, and all of it as tensors."""
    pictures, maps = [], []
    Path("shots_depth").mkdir()
    for shot, length in enumerate(lengths):
        for i in range(length):
            picture, disparity = scene(i, shot % 2)
            write_picture(f"shots/{len(pictures):02d}.png", Picture(picture), 8)
            np.save(f"shots_depth/{len(pictures):02d}.npy", disparity.numpy())
            pictures.append(read_picture(f"shots/{len(pictures):02d}.png").pixels)
            maps.append(disparity)
    return torch.stack(pictures), torch.stack(maps)


@pytest.mark.parametrize("chunk", [16, 3])
def test_every_shot_has_layers_of_its_own(here, monkeypatch, chunk):
    """As in the node: thresholds are measured shot by shot, and no chunk runs over a cut."""
    lengths = (7, 9, 5)
    pictures, maps = cut_clip(lengths)
    count = sum(lengths)
    monkeypatch.setattr(streaming, "chunk_length", lambda *_: chunk)
    seen = []

    def watched(image, *rest, **more):
        seen.append((len(image), tuple(more["cuts"])))
        return render(image, *rest, **more)

    monkeypatch.setattr(streaming, "render", watched)
    words = ["render", "shots", "--depth", "shots_depth", "--k", "14", "--focus-disparity", "0.2", "--bits", "16", "-o", "out"]
    assert cli.main(words) == 0
    defocus = Defocus(maps, torch.full((count,), 0.2), torch.full((count,), 14.0), Lens(), False)
    want = render(pictures, defocus, shots=[0, 7, 16])
    found = torch.stack([picture.pixels for picture in open_clip("out")])
    assert (found - want.clamp(0, 1)).abs().max() <= 0.51 / 65535 + 1e-6
    assert not torch.allclose(want, render(pictures, defocus), atol=1e-3), "the scenes are such that it matters"
    assert sum(length for length, _ in seen) == count
    cuts = [cut for length, cut in seen for _ in range(length)]
    assert len(set(cuts[:7])) == len(set(cuts[7:16])) == 1 and cuts[0] == cuts[-1] != cuts[7], "the first and third shot are alike"

    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        assert cli.main([*words[:-1], "again"]) == 130
    assert cli.main([*words[:-1], "again"]) == 0 and contents("again") == contents("out")


def test_thresholds_of_shots_keep_eight_maps_in_memory(here):
    cut_clip((30, 2))
    depth = streaming.DepthClip(Path("shots_depth"), 32, (HEIGHT, WIDTH))
    k = torch.linspace(4, 12, 32)
    asked = []

    def counting(samples, strongest, matte):
        asked.append((len(samples), strongest))
        return [0.5]

    real, streaming.shot_cuts = streaming.shot_cuts, counting
    try:
        assert streaming.shot_thresholds(depth, k, None, [0, 30]) == [[0.5], [0.5]]
    finally:
        streaming.shot_cuts = real
    assert asked == [(8, float(k[29])), (2, 12.0)]


def test_media_temporaries_are_hidden():
    """What `PartialClip` clears away after a kill is told by these names."""
    with media.atomic("frame.png") as temporary:
        assert temporary.name.startswith(".") and ".partial" in temporary.name
        temporary.write_bytes(b"")
    Path("frame.png").unlink()
