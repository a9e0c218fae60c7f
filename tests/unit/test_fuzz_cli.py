"""The command line under fire: damaged files and odd arguments end in a picture or in one sentence and exit code 2.

Anything else is a defect: a traceback, another exit code, more than one sentence, a half-written or overwritten file, work without end.
The quick run checks CASES of each target; more with

    BOKEH_FUZZ=1000:2000 python -m pytest tests/unit/test_fuzz_cli.py -k ends

(first seed and number of cases for each target). A failure names the seed that shows it.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bokeh_core import cli
from bokeh_core.media import Picture, read_picture, write_picture
from bokeh_core.video.clips import open_clip

from .test_fuzz_nodes import TEXTS, time_limit

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 20  # s
CASES = 40
HEIGHT, WIDTH = 14, 18
PHOTOS = ("photo.png", "deep.png", "photo.jpg", "photo.webp", "photo.tif", "deep.tif", "photo.exr", "half.exr", "photo.npy", "alpha.png")
DEPTHS = ("depth.png", "depth.npy", "depth.exr", "depth.jpg")
CLIPS, DEPTH_CLIPS = ("clip.mp4", "clip.mkv", "frames"), ("depth.mp4", "depths", "depth.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of small sound files of every kind."""
    folder = tmp_path_factory.mktemp("files")
    here = os.getcwd()
    os.chdir(folder)
    try:
        noise = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
        near = torch.linspace(0.1, 0.4, WIDTH).expand(3, HEIGHT, WIDTH).clone()
        near[:, 4:10, 5:12] = 0.9
        for name in PHOTOS:
            alpha = torch.full((HEIGHT, WIDTH), 0.5) if name == "alpha.png" else None
            write_picture(name, Picture(noise, alpha), 16 if name in ("deep.png", "deep.tif", "half.exr") else None)
        write_picture("depth.png", Picture(near), 16)
        write_picture("depth.exr", Picture(near))
        write_picture("depth.jpg", Picture(near))
        np.save("depth.npy", near[0].numpy())
        Image.fromarray(((near[0] > 0.5) * 255).to(torch.uint8).numpy()).save("mask.png")
        for i in range(3):
            write_picture(f"frames/{i}.png", Picture(noise.roll(i, -1)))
            write_picture(f"depths/{i}.png", Picture(near), 16)
        for out in ("clip.mp4", "clip.mkv"):
            assert cli.main(["render", "frames", "--depth", "depths", "--k", "0", "-o", out]) == 0
        assert cli.main(["render", "depths", "--depth", "depths", "--k", "0", "-o", "depth.mp4"]) == 0
    finally:
        os.chdir(here)
    return folder


def damage(r, path):
    """Spoil a file, or a file of a folder, in one of many ways."""
    if path.is_dir():
        inner = sorted(path.iterdir())
        if r.random() < 0.2:
            return r.choice(inner).unlink()
        if r.random() < 0.1:
            return shutil.rmtree(path)
        return damage(r, r.choice(inner))
    data = bytearray(path.read_bytes())
    way = r.choice(
        ("cut", "cut", "flip", "flip", "flip", "zero", "number", "number", "grow", "swap", "suffix", "empty", "folder", "link", "loop")
    )
    at = r.choice((r.randrange(len(data)), r.randrange(min(len(data), 200))))
    if way == "cut":
        data = data[:at]
    elif way == "flip":
        for _ in range(r.choice((1, 1, 3, 40))):
            data[r.choice((r.randrange(len(data)), r.randrange(min(len(data), 200))))] = r.randrange(256)
    elif way == "zero":
        data[at : at + r.choice((4, 64, 5000))] = bytes(len(data[at : at + r.choice((4, 64, 5000))]))
    elif way == "number":  # sizes and offsets of headers
        data[at : at + 4] = r.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\xff\xff", b"9999"))
    elif way == "grow":
        data[at:at] = r.randbytes(r.choice((1, 100)))
    elif way == "empty":
        data = b""
    elif way == "swap":
        other = r.choice([p for p in path.parent.iterdir() if p.is_file()])
        data = other.read_bytes()
    if way == "suffix":
        return path.rename(path.with_suffix(r.choice((".png", ".jpg", ".exr", ".npy", ".mp4", ".tif", ".xyz", "", ".PNG"))))
    if way in ("folder", "link", "loop"):
        path.unlink()
        if way == "folder":
            path.mkdir()
        else:
            path.symlink_to("nowhere" if way == "link" else path.name)
        return None
    return path.write_bytes(data)


def word(r):
    """A value for any option."""
    return r.choice(
        (
            *(
                "0",
                "-1",
                "1",
                "0.5",
                "2",
                "nan",
                "inf",
                "-inf",
                "1e400",
                "1e30",
                "1e-30",
                "",
                " ",
                "x",
                "0x10",
                "1_0",
                "٣",
                "1/0",
                "9" * 30,
            ),
            *(
                "5,5",
                "0.5,0.5",
                "5",
                "5,5,5",
                "-1,3",
                "nan,nan",
                "1e30,0",
                "0:1",
                "photo.png",
                "mask.png",
                "frames",
                "nowhere",
                "/dev/null",
            ),
            *("--", "-o", "--k", "\u202e", "a" * 300, "%d", "metres", "disparity", "fast", "reference", "8", "16"),
            r.choice(TEXTS).replace("\0", ""),
        )
    )


OPTIONS = (
    *("--strength", "--k", "--f-number", "--focal-length", "--sensor-width", "--focus-distance", "--focus", "--focus-mask"),
    *("--focus-disparity", "--focus-track", "--depth-unit", "--matte", "--clean-plate", "--aperture-picture", "--bits", "--fps", "--rays"),
    *("--quality", "--blades", "--blade-rotation", "--roundness", "--anamorphic", "--cats-eye", "--spherical", "--onion"),
    *("--chromatic-longitudinal", "--chromatic-lateral", "--highlights", "--highlight-threshold", "--overlay"),
)
SOUND = {
    **dict.fromkeys(("--strength", "--k", "--f-number", "--focal-length", "--rays", "--highlights", "--anamorphic"), ("2", "8")),
    **dict.fromkeys(("--roundness", "--cats-eye", "--onion", "--spherical", "--chromatic-lateral", "--focus-disparity"), ("0.5", "0")),
    **{"--focus": ("5,5", "0.5,0.5"), "--focus-mask": ("mask.png",), "--matte": ("mask.png",), "--clean-plate": ("photo.png",)},
    **{"--focus-track": ("0: 0.9, 2: 0.3 ease", "1: (0.5, 0.5)"), "--aperture-picture": ("mask.png",), "--bits": ("8", "16")},
    **{"--quality": ("fast",), "--blades": ("6",), "--overlay": ("over.png",), "--fps": ("24",), "--depth-unit": ("relative", "metres")},
}
FLAGS = ("--linear", "--snap-edges", "--focus-each-frame", "--depth-far-is-bright", "--exif")


def files_case(r):
    """Sound arguments, one or two damaged files."""
    clip = r.random() < 0.35
    photo, depth = r.choice(CLIPS if clip else PHOTOS), r.choice(DEPTH_CLIPS if clip else DEPTHS)
    words = ["render", photo, "--depth", depth, "--k", "3", "-o", r.choice(("out.mp4", "out", "out.mkv") if clip else OUTPUTS)]
    read = [photo, depth]
    if r.random() < 0.3:
        option = r.choice(("--matte", "--clean-plate", "--focus-mask", "--aperture-picture"))
        other = "photo.png" if option == "--clean-plate" else "mask.png"
        words += [option, other]
        read.append(other)
    return words, r.sample(read, 1 if r.random() < 0.8 else 2)


OUTPUTS = ("out.png", "out.jpg", "out.webp", "out.tif", "out.exr", "out.npy")


def arguments_case(r):
    """Sound files, odd arguments."""
    clip = r.random() < 0.3
    photo, depth = r.choice(CLIPS if clip else PHOTOS), r.choice(DEPTH_CLIPS if clip else DEPTHS)
    output = r.choice(("out.mp4", "out") if clip else OUTPUTS)
    if r.random() < 0.1:
        output = r.choice(
            ("out.xyz", "", ".", "..", "/", "photo.png", "frames", "new/deep/out.png", "photo.png/x.png", "out.", "a" * 300 + ".png")
        )
    words = ["render", photo, "--depth", depth, "-o", output]
    for _ in range(r.choice((0, 1, 1, 2, 3))):
        if r.random() < 0.2:
            words.append(r.choice(FLAGS))
        else:
            option = r.choice(OPTIONS)
            words += [option, r.choice(SOUND[option]) if option in SOUND and r.random() < 0.5 else word(r)]
    if r.random() < 0.1:
        words.insert(r.randrange(len(words) + 1), word(r))
    if r.random() < 0.1:
        del words[r.randrange(len(words))]
    return words, ()


def commands_case(r):
    """The other commands, with arguments that let none of them work for long."""
    command = r.choice(("demo", "synthesize", "judge", "models", "depth", "fly", "", "-h", "--version"))
    words = [command]
    options = ("-o", "--seed", "--width", "--count", "--size", "--kinds", "--k", "--rays", "--photos", "--inputs", "--seeds", "--model")
    for _ in range(r.choice((0, 1, 2, 3))):
        words += [r.choice(options)] * (r.random() < 0.8) + [word(r)]
    if command in ("demo", "synthesize", "judge", ""):  # the last word is refused
        words += ["--width", "3"] if command == "demo" else ["--size", "20"] if command == "synthesize" else ["--quality", "best"]
    return words, ()


TARGETS = {"files": files_case, "arguments": arguments_case, "commands": commands_case}


def contents(folder):
    """{path: bytes of a file, or what else lies there}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
    return found


def run(words, capsys):
    """(exit code, stderr) of the command; an exception it lets out is an AssertionError."""
    capsys.readouterr()
    try:
        with time_limit(LIMIT):
            code = cli.main(words)
    except SystemExit as error:
        code = error.code or 0  # -h and --version
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise AssertionError(f"{type(error).__name__} at {os.path.basename(last.filename)}:{last.lineno}: {error}") from error
    return code, capsys.readouterr().err


def judge(words, code, err, before, after):
    changed = {name for name in before if after.get(name) != before[name]}
    new = {name for name in after if name not in before}
    assert "Traceback" not in err
    if code == 2:
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1 and lines[0].startswith("bokeh: "), f"not one sentence: {err!r}"
        left = {name for name in new if after[name] != "folder" and name != "over.png"}
        assert not changed and not left, f"failed, yet wrote {sorted(changed | left)}"
        return
    assert code == 0, f"exit code {code}: {err}"
    assert all(words.count(name) == 1 and words[words.index(name) - 1] in ("-o", "--overlay") for name in changed), sorted(changed)
    assert not any("partial" in name for name in new), sorted(new)
    if words[0] == "render" and "-o" in words and "-h" not in words and "--help" not in words:
        output = Path(words[len(words) - 1 - words[::-1].index("-o") + 1])
        clip = open_clip(output)
        assert len(clip) >= 1 and min(clip.size) >= HEIGHT and bool(next(iter(clip)).pixels.isfinite().all())


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_ends_well(files, tmp_path, monkeypatch, capsys, target):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no models"))
    first, count = map(int, os.environ.get("BOKEH_FUZZ", f"0:{CASES}").split(":"))
    failures, codes = {}, Counter()
    for seed in range(first, first + count):
        r = random.Random(f"{target} {seed}")
        words, damaged = TARGETS[target](r)
        place = tmp_path / str(seed)
        shutil.copytree(files, place)
        monkeypatch.chdir(place)
        for name in damaged:
            damage(r, place / name)
        before = contents(place)
        try:
            code, err = run(words, capsys)
            judge(words, code, err, before, contents(place))
            codes[code] += 1
        except AssertionError as error:
            failures.setdefault(str(error)[:300], []).append(seed)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(place)
    with capsys.disabled():
        print(f"\n{target}: {count} cases from seed {first}, exit codes {dict(codes)}")
    assert not failures, "\n".join(f"{len(seeds)} x, seed {seeds[0]}: {words}" for words, seeds in failures.items())
    assert codes[2] and (codes[0] or target == "commands")


@pytest.mark.parametrize("output", ["out.mp4", "out"])
def test_a_killed_run_leaves_nothing_under_the_name_and_can_be_repeated(tmp_path, monkeypatch, output):
    """kill -9 in the middle of a clip: no cleaning up is possible, so nothing may be there before it is whole."""
    monkeypatch.chdir(tmp_path)
    frames = 120  # the encoder writes nothing before it has seen some 50
    depth = torch.linspace(0.1, 0.9, 64).expand(3, 48, 64)
    for i in range(frames):
        write_picture(f"frames/{i}.png", Picture(torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(i))))
    write_picture("depth.png", Picture(depth), 16)
    words = ["render", "frames", "--depth", "depth.png", "--strength", "100", "-o", output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "bokeh_core.cli", *words], env=environment)
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob(".out*partial*")):
            assert process.poll() is None and time.monotonic() < until, "the clip was not begun"
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL and not Path(output).exists()
    assert cli.main(words) == 0
    assert len(open_clip(output)) == frames
    assert not list(tmp_path.glob(".out*")), "what the killed run has left is gone with the second"


def test_links_that_lead_in_a_circle(tmp_path, monkeypatch, capsys):
    """Found by the cases above: Path.resolve raised RuntimeError."""
    monkeypatch.chdir(tmp_path)
    write_picture("photo.png", Picture(torch.linspace(0, 1, 8).expand(3, 8, 8)))
    for name in ("a.png", "o.png"):
        Path(name).symlink_to(name)
    for words in (["a.png", "--depth", "photo.png", "-o", "out.png"], ["photo.png", "--depth", "a.png", "-o", "out.png"]):
        assert run(["render", *words], capsys) == (2, "bokeh: a.png: no such file or folder; check the name.\n")
    assert run(["depth", "a.png", "-o", "out.png"], capsys)[0] == 2
    assert run(["render", "photo.png", "--depth", "photo.png", "--k", "0", "-o", "o.png"], capsys)[0] == 0  # a link is replaced
    assert torch.equal(read_picture("o.png").pixels, read_picture("photo.png").pixels)
