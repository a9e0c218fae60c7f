"""The command line: exact results through files, and one sentence for every kind of bad input."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bokeh_core import __version__, cli, media
from bokeh_core.media import Picture, read_picture, write_picture
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.render import render, shot_cuts
from bokeh_core.video.clips import open_clip

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 40, 56


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with photo.png, depth.npy (a near square, 0.8, on a far slope, 0.1 to 0.3) and depth.png."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no models"))
    Image.fromarray(array8()).save("photo.png")
    np.save("depth.npy", depth())
    Image.fromarray(np.round(depth() * 65535).astype(np.uint16)).save("depth.png")
    return tmp_path


def array8(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)


def depth():
    d = np.repeat(np.linspace(0.1, 0.3, WIDTH, dtype=np.float32)[None], HEIGHT, 0)
    d[10:30, 20:40] = 0.8
    return d


def bokeh(*words):
    return cli.main([str(word) for word in words])


def expected(pixels, disparity, focus, k, linear=False, lens=None, **extra):
    """The library called directly."""
    d = torch.as_tensor(disparity)[None]
    return render(pixels[None], Defocus(d, torch.tensor([focus]), torch.tensor([k]), lens or Lens(), False), linear=linear, **extra)[0]


def refused(capsys, before, *words):
    """Run, and check: exit code 2, one sentence on stderr, no new files. Returns the sentence."""
    capsys.readouterr()
    assert bokeh(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("bokeh: ") and "Traceback" not in err
    assert sorted(str(p) for p in before.rglob("*")) == before_files(before)
    return err


def before_files(folder, cache={}):  # noqa: B006 - remembered for the length of one test run
    return cache.setdefault(folder, sorted(str(p) for p in folder.rglob("*")))


# The command itself


def run_command(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bokeh_core.cli", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_help_and_version(here):
    start = time.perf_counter()
    result = run_command("--help", cwd=here)
    assert result.returncode == 0 and result.stderr == ""
    assert all(command in result.stdout for command in ("demo", "render", "synthesize", "judge"))
    assert time.perf_counter() - start < 2
    result = run_command("render", "-h", cwd=here)
    for flag in "--focus --focus-mask --focus-disparity --focus-track --focus-each-frame --strength --k --f-number".split():
        assert flag in result.stdout
    for flag in "--focal-length --sensor-width --focus-distance --exif --linear --depth-far-is-bright --depth-unit --overlay".split():
        assert flag in result.stdout
    for flag in "--matte --clean-plate --blades --blade-rotation --cats-eye --aperture-picture --highlights".split():
        assert flag in result.stdout
    for command in ("synthesize", "judge"):
        assert "OUT" in run_command(command, "-h", cwd=here).stdout.upper()
    assert run_command("--version", cwd=here).stdout == f"bokeh {__version__}\n"


def test_command_line_imports_nothing_heavy():
    code = "import sys, bokeh_core.cli; print([m for m in ('torch', 'numpy', 'av', 'PIL', 'kornia', 'tqdm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_process_exit_codes_and_silence(here):
    good = run_command("render", "photo.png", "--depth", "depth.png", "-o", "out.png", cwd=here)
    assert (good.returncode, good.stdout, good.stderr) == (0, "out.png\n", "")
    bad = run_command("render", "photo.png", "--depth", "nowhere.png", "-o", "out.png", cwd=here)
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "bokeh: nowhere.png: no such file or folder; check the name.\n")
    assert run_command(cwd=here).returncode == 2


# Results


def test_k_zero_is_the_input_bit_for_bit(here):
    pixels = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    np.save("photo.npy", (pixels * 3 - 1).permute(1, 2, 0).numpy())
    write_picture("photo16.png", Picture(pixels), 16)
    write_picture("photo.exr", Picture(pixels * 40 - 1), 32)
    for name in ("photo.png", "photo16.png", "photo.npy", "photo.exr"):
        for no_blur in (("--k", 0), ("--strength", 0)):
            assert bokeh("render", name, "--depth", "depth.npy", *no_blur, "-o", "out" + Path(name).suffix) == 0
            before, after = read_picture(name), read_picture("out" + Path(name).suffix)
            assert torch.equal(before.pixels, after.pixels) and before.bits == after.bits
    assert np.array_equal(np.load("out.npy"), np.load("photo.npy"))
    with Image.open("photo.png") as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize("linear", [False, True])
def test_npy_depth_numbers_are_used_as_they_are(here, linear):
    np.save("photo.npy", array8().astype(np.float32) / 255 * 2)
    np.save("wild.npy", depth() * 7 - 3)
    flags = ["--linear"] if linear else []
    assert bokeh("render", "photo.npy", "--depth", "wild.npy", "--k", 1.5, "--focus-disparity", 0.5, "-o", "out.npy", *flags) == 0
    pixels = torch.from_numpy(np.load("photo.npy")).permute(2, 0, 1)
    want = expected(pixels, depth() * 7 - 3, 0.5, 1.5, linear)
    assert np.array_equal(np.load("out.npy"), want.permute(1, 2, 0).numpy()) and float(want.max()) > 1


def test_strength_is_for_the_whole_range_at_1024_px(here):
    np.save("photo.npy", array8().astype(np.float32) / 255)
    np.save("wild.npy", depth() * 50 + 9)
    assert bokeh("render", "photo.npy", "--depth", "wild.npy", "--strength", 60, "--focus-disparity", 20, "-o", "out.npy") == 0
    values = depth() * 50 + 9
    k = torch.tensor(60 * WIDTH / 1024 / float(values.max() - values.min())).item()
    want = expected(read_picture("photo.npy").pixels, values, 20.0, k)
    assert np.abs(np.load("out.npy") - want.permute(1, 2, 0).numpy()).max() < 1e-5


def sharp(name, mask):
    """Mean change of photo.png where the mask is set."""
    return float((read_picture(name).pixels - read_picture("photo.png").pixels).abs()[:, mask].mean())


def inside_and_outside():
    near = torch.from_numpy(depth() > 0.5)
    inside = torch.zeros_like(near)
    inside[14:26, 24:36] = True
    return inside, ~near


@pytest.mark.parametrize(
    ("flags", "near_is_sharp"),
    [
        (["--focus", "30,20"], True),
        (["--focus", "0.5,0.5"], True),
        (["--focus", "1,1"], False),
        (["--focus", "0.1,0.9"], False),
        (["--focus-mask", "mask.png"], True),
        (["--focus-disparity", "0.8"], True),
        (["--focus-disparity", "0.2"], False),
        (["--focus-track", "0: 0.2, 5: 0.8"], False),
        (["--focus-track", "0: (0.5, 0.5)"], True),
        ([], True),
    ],
)
def test_every_way_to_focus(here, flags, near_is_sharp):
    Image.fromarray(((depth() > 0.5) * 255).astype(np.uint8)).save("mask.png")
    assert bokeh("render", "photo.png", "--depth", "depth.png", "--k", 8, "-o", "out.png", *flags) == 0
    inside, outside = inside_and_outside()
    assert (sharp("out.png", inside) < 0.3 * sharp("out.png", outside)) == near_is_sharp


def test_mirrored_depth_is_the_same_picture(here):
    np.save("far.npy", 1 - depth())
    np.save("near.npy", 1 - (1 - depth()))
    assert bokeh("render", "photo.png", "--depth", "near.npy", "--focus", "30,20", "-o", "a.png") == 0
    assert bokeh("render", "photo.png", "--depth", "far.npy", "--depth-far-is-bright", "--focus", "30,20", "-o", "b.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_metric_depth_and_a_real_lens(here):
    np.save("dioptres.npy", depth())
    metres = 1 / depth().astype(np.float64)
    np.save("metres.npy", metres)
    lens = ["--f-number", 1.4, "--focal-length", 85, "--focus-distance", 1.25]
    assert bokeh("render", "photo.png", "--depth", "dioptres.npy", "--depth-unit", "disparity", *lens, "-o", "a.png") == 0
    assert bokeh("render", "photo.png", "--depth", "metres.npy", "--depth-unit", "metres", *lens, "-o", "b.png") == 0
    difference = read_picture("a.png").pixels - read_picture("b.png").pixels
    assert difference.abs().max() <= 1.01 / 255
    # Thin lens: diameter of the blur on the sensor = A f |z - z_f| / (z (z_f - f)), A = f / N, in metres.
    f, n, focus, z = 0.085, 1.4, 1.25, 5.0
    radius_px = f / n * f * abs(z - focus) / (z * (focus - f)) / 2 / 0.036 * WIDTH
    k = radius_px / (1 / focus - 1 / z)
    want = expected(read_picture("photo.png").pixels, depth(), 1 / focus, k)
    assert (read_picture("a.png").pixels - want).abs().max() <= 0.51 / 255


def test_sky_without_distance_is_infinitely_far(here):
    metres = 1 / depth()
    metres[:, :10] = np.inf
    np.save("metres.npy", metres)
    assert bokeh("render", "photo.png", "--depth", "metres.npy", "--depth-unit", "metres", "-o", "out.png") == 0


def test_exif_lens(here):
    exif = Image.Exif()
    exif[0x8769] = {0x829D: 2.0, 0x920A: 50.0, 0xA405: 50}
    Image.fromarray(array8()).save("photo.jpg", exif=exif)
    np.save("metres.npy", 1 / depth())
    words = ["--depth", "metres.npy", "--depth-unit", "metres", "--focus-distance", 2]
    assert bokeh("render", "photo.jpg", *words, "--exif", "-o", "a.png") == 0
    width = str(43.27 / np.hypot(1, HEIGHT / WIDTH))
    assert bokeh("render", "photo.jpg", *words, "--f-number", 2, "--focal-length", 50, "--sensor-width", width, "-o", "b.png") == 0
    assert torch.equal(read_picture("a.png").pixels, read_picture("b.png").pixels)


def test_light_between_formats(here):
    """EXR is linear light, PNG is display-encoded; --linear leaves the numbers alone (IEC 61966-2-1)."""
    grey = np.full((HEIGHT, WIDTH, 3), 0.5, np.float32)
    write_picture("grey.exr", Picture(torch.from_numpy(grey).permute(2, 0, 1)), 32)
    assert bokeh("render", "grey.exr", "--depth", "depth.npy", "-o", "display.png") == 0
    assert abs(float(read_picture("display.png").pixels[0, 20, 20]) - (1.055 * 0.5 ** (1 / 2.4) - 0.055)) < 1e-4
    assert read_picture("display.png").bits == 16
    assert bokeh("render", "grey.exr", "--depth", "depth.npy", "--linear", "-o", "same.png") == 0
    assert abs(float(read_picture("same.png").pixels[0, 20, 20]) - 0.5) < 1e-4
    np.save("grey.npy", grey)
    assert bokeh("render", "grey.npy", "--depth", "depth.npy", "-o", "back.exr") == 0
    assert abs(float(read_picture("back.exr").pixels[0, 20, 20]) - ((0.5 + 0.055) / 1.055) ** 2.4) < 1e-4
    assert bokeh("render", "grey.npy", "--depth", "depth.npy", "--linear", "-o", "linear.exr") == 0
    assert abs(float(read_picture("linear.exr").pixels[0, 20, 20]) - 0.5) < 1e-4


def test_lights_above_one_survive_exr(here):
    pixels = torch.full((3, HEIGHT, WIDTH), 0.1)
    pixels[:, 5, 8] = 900.0
    write_picture("lights.exr", Picture(pixels), 32)
    assert bokeh("render", "lights.exr", "--depth", "depth.npy", "--focus-disparity", 0.8, "--k", 6, "-o", "out.exr") == 0
    out = read_picture("out.exr").pixels
    assert float(out.max()) > 5 and float(out[:, :10, :16].sum() / pixels[:, :10, :16].sum()) == pytest.approx(1, abs=0.06)


def test_alpha_and_bits(here, capsys):
    rgba = np.dstack([array8(), np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 256]).astype(np.uint8)
    Image.fromarray(rgba).save("cut.png")
    assert bokeh("render", "cut.png", "--depth", "depth.npy", "--bits", 16, "-o", "out.png") == 0
    found = read_picture("out.png")
    assert found.bits == 16 and np.array_equal(np.round(found.alpha.numpy() * 255), rgba[..., 3])
    assert bokeh("render", "cut.png", "--depth", "depth.npy", "-o", "out.jpg") == 0
    assert "no transparency" in capsys.readouterr().err


def test_depth_of_another_size_is_resized_with_a_note(here, capsys):
    np.save("half.npy", depth()[::2, ::2])
    assert bokeh("render", "photo.png", "--depth", "half.npy", "-o", "out.png") == 0
    assert capsys.readouterr().err == "note: the depth map is 28 x 20 and was resized to the picture's 56 x 40.\n"


def test_overlay_and_new_folders(here, capsys):
    assert bokeh("render", "photo.png", "--depth", "depth.png", "--overlay", "look/overlay.png", "-o", "new/deep/out.png") == 0
    assert capsys.readouterr().out.split() == ["look/overlay.png", "new/deep/out.png"]
    assert read_picture("look/overlay.png").pixels.shape == (3, HEIGHT, WIDTH) == read_picture("new/deep/out.png").pixels.shape


def test_demo(here, capsys):
    assert bokeh("demo", "-o", "demo", "--width", 96) == 0
    names = [Path(line).name for line in capsys.readouterr().out.split("\n") if line]
    assert {"sharp.png", "depth.png", "overlay.png", "contact_sheet.png"} <= set(names) and len(names) == 8
    sizes = {name: read_picture(Path("demo") / name).pixels.shape for name in names}
    assert all(size == (3, 64, 96) for name, size in sizes.items() if name != "contact_sheet.png")
    assert read_picture("demo/depth.png").bits == 16 and sorted(os.listdir("demo")) == sorted(names)
    changes = [read_picture(f"demo/{name}").pixels - read_picture("demo/sharp.png").pixels for name in names if name.startswith("focus_")]
    assert len(changes) == 4 and all(float(change.abs().mean()) > 0.002 for change in changes)


# Clips


@pytest.fixture
def clip(here):
    """frames/ and disparity/: three frames; the near square brightens the frame number into the picture."""
    for folder in ("frames", "disparity"):
        Path(folder).mkdir()
    for i in range(3):
        Image.fromarray(array8(i)).save(f"frames/f_{i}.png")
        Image.fromarray(np.round(depth() * 65535).astype(np.uint16)).save(f"disparity/d_{i}.png")
    return here


def test_folder_to_folder_equals_single_pictures(clip):
    assert bokeh("render", "frames", "--depth", "disparity", "--k", 6, "--focus-disparity", 0.8, "-o", "out") == 0
    assert sorted(os.listdir("out")) == ["f_0.png", "f_1.png", "f_2.png"]
    for i in range(3):
        assert (
            bokeh("render", f"frames/f_{i}.png", "--depth", f"disparity/d_{i}.png", "--k", 6, "--focus-disparity", 0.8, "-o", "one.png")
            == 0
        )
        assert Path("one.png").read_bytes() == Path(f"out/f_{i}.png").read_bytes()


def test_folder_to_video_to_folder(clip):
    assert bokeh("render", "frames", "--depth", "disparity", "--fps", "30000/1001", "-o", "out.mp4") == 0
    video = open_clip("out.mp4")
    assert len(video) == 3 and video.size == (HEIGHT, WIDTH) and float(video.rate) == pytest.approx(30000 / 1001)
    assert bokeh("render", "out.mp4", "--depth", "depth.png", "-o", "again") == 0
    assert sorted(os.listdir("again")) == ["00000.png", "00001.png", "00002.png"]


def test_focus_is_locked_unless_told(here):
    """The near square goes away after two frames: a locked focus stays where it was, a measured one follows smoothly."""
    for folder in ("frames", "disparity"):
        Path(folder).mkdir()
    for i in range(12):
        Image.fromarray(array8()).save(f"frames/{i}.png")
        np.save(f"disparity/{i}.npy", depth() if i < 2 else np.minimum(depth(), 0.3))
    words = ["render", "frames", "--depth", "disparity", "--focus", "30,20", "--k", 8]
    assert bokeh(*words, "-o", "locked") == 0
    assert bokeh(*words, "--focus-each-frame", "-o", "free") == 0

    def changes(folder):
        return [float((read_picture(f"{folder}/{i}.png").pixels - read_picture("photo.png").pixels).abs().mean()) for i in range(12)]

    locked, free = changes("locked"), changes("free")
    assert free[11] < 0.5 * locked[11] and locked[11] == locked[5]


def test_focus_pull_and_masks(clip):
    words = ["render", "frames", "--depth", "disparity", "--k", 8]
    assert bokeh(*words, "--focus-track", "0: (0.5, 0.5), 2: 0.2", "-o", "pull") == 0
    inside, _ = inside_and_outside()
    change = [(read_picture(f"pull/f_{i}.png").pixels - read_picture(f"frames/f_{i}.png").pixels).abs()[:, inside].mean() for i in range(3)]
    assert change[0] < 0.01 and change[0] < change[1] < change[2]
    Path("masks").mkdir()
    for i in range(3):
        Image.fromarray(((depth() > 0.5) * 255).astype(np.uint8)).save(f"masks/{i}.png")
    assert bokeh(*words, "--focus-mask", "masks", "-o", "masked") == 0
    assert (read_picture("masked/f_2.png").pixels - read_picture("frames/f_2.png").pixels).abs()[:, inside].mean() < 0.01


@pytest.mark.parametrize("output", ["out.mp4", "out", "out.png"])
def test_an_interrupted_run_leaves_nothing_half_written(clip, monkeypatch, capsys, output):
    """Of a clip the finished frames are kept under a hidden name, and said to be; test_cli_resume.py goes on with them."""
    calls = []

    def interrupted(image, *rest, **more):
        calls.append(1)
        if len(calls) == 2 or output == "out.png":
            raise KeyboardInterrupt
        return image

    import bokeh_core.video.streaming as streaming

    monkeypatch.setattr(streaming, "render", interrupted)
    monkeypatch.setattr(streaming, "chunk_length", lambda *_: 1)
    before = sorted(os.listdir())
    image, map_ = ("photo.png", "depth.png") if output == "out.png" else ("frames", "disparity")
    assert bokeh("render", image, "--depth", map_, "-o", output) == 130
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.endswith("bokeh: interrupted; no half-written file is left.\n")
    kept = [] if output == "out.png" else [f".{output}.partial"]
    assert sorted(os.listdir()) == sorted([*before, *kept])
    assert not kept or f"note: 1 of 3 frames are finished and kept in {clip / kept[0]}" in err
    if kept:
        assert len([name for name in os.listdir(kept[0]) if not name.startswith(".")]) == 1


# Matte, clean plate and looks


def near():
    """A soft matte of the near square of depth()."""
    m = np.zeros((HEIGHT, WIDTH), np.float32)
    m[9:31, 19:41] = 0.4
    m[10:30, 20:40] = 1
    return m


def test_matte_and_clean_plate_reach_the_renderer(here):
    np.save("photo.npy", array8().astype(np.float32) / 255)
    np.save("plate.npy", array8(7).astype(np.float32) / 255)
    np.save("matte.npy", near())
    Image.fromarray(np.round(near() * 255).astype(np.uint8)).save("matte.png")
    words = ["render", "photo.npy", "--depth", "depth.npy", "--k", 12, "--focus-disparity", 0.2, "-o", "out.npy"]
    pixels, plate = (torch.from_numpy(np.load(name)).permute(2, 0, 1) for name in ("photo.npy", "plate.npy"))
    matte, plain = torch.from_numpy(near())[None], expected(pixels, depth(), 0.2, 12.0)
    for flags, extra in (
        (["--matte", "matte.npy"], {"matte": matte}),
        (["--matte", "matte.png"], {"matte": (matte * 255).round() / 255}),
        (["--clean-plate", "plate.npy"], {"clean_plate": plate[None]}),
        (["--matte", "matte.npy", "--clean-plate", "plate.npy"], {"matte": matte, "clean_plate": plate[None]}),
    ):
        assert bokeh(*words, *flags) == 0
        want = expected(pixels, depth(), 0.2, 12.0, **extra)
        assert not torch.allclose(want, plain, atol=1e-3)
        assert np.array_equal(np.load("out.npy"), want.permute(1, 2, 0).numpy())


def test_edge_snapping_and_rays_reach_the_renderer(here, capsys):
    words = ["render", "photo.png", "--depth", "depth.npy", "--k", 12, "--focus-disparity", 0.2]
    pixels = read_picture("photo.png").pixels
    d = Defocus(torch.as_tensor(depth())[None], torch.tensor([0.2]), torch.tensor([12.0]), Lens(), False)
    assert bokeh(*words, "--snap-edges", "--bits", 16, "-o", "snapped.png") == 0
    assert torch.allclose(read_picture("snapped.png").pixels, render(pixels[None], d, snap_edges=True)[0], atol=1e-5)
    assert bokeh(*words, "--quality", "reference", "--rays", 48, "--bits", 16, "-o", "rays.png") == 0
    assert torch.allclose(read_picture("rays.png").pixels, render(pixels[None], d, quality="reference", rays=48)[0], atol=1e-5)
    np.save("matte.npy", near())
    for bad in (["--rays", 0], ["--snap-edges", "--matte", "matte.npy"]):
        capsys.readouterr()
        assert bokeh(*words, *bad, "-o", "no.png") == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("no.png").exists()


def test_clean_plate_light(here):
    """An EXR plate is linear light, a PNG plate is not; both are brought to the light of the picture."""
    write_picture("plate.png", Picture(torch.full((3, HEIGHT, WIDTH), 0.75)), 16)
    linear = ((read_picture("plate.png").pixels + 0.055) / 1.055) ** 2.4
    write_picture("plate.exr", Picture(linear), 32)
    for photo in ("photo.png", "photo.exr"):
        write_picture("photo.exr", Picture(((read_picture("photo.png").pixels + 0.055) / 1.055) ** 2.4), 32)
        results = []
        for plate in ("plate.png", "plate.exr"):
            out = f"out_{plate[-3:]}{photo[-4:]}"
            words = ["--matte", "matte.png", "--clean-plate", plate, "--k", 12, "--focus-disparity", 0.2, "-o", out]
            Image.fromarray(np.round(near() * 255).astype(np.uint8)).save("matte.png")
            assert bokeh("render", photo, "--depth", "depth.npy", *words) == 0
            results.append(read_picture(out).pixels)
        assert (results[0] - results[1]).abs().max() < 2 / 255


def test_mattes_and_plates_of_a_clip(clip, monkeypatch):
    """One per frame in order, or one for all; the layers are cut with the mattes of the clip."""
    import bokeh_core.video.streaming as streaming

    for folder in ("mattes", "plates"):
        Path(folder).mkdir()
    for i in range(3):
        Image.fromarray(np.roll(np.round(near() * 255).astype(np.uint8), i, 1)).save(f"mattes/{i}.png")
        Image.fromarray(array8(20 + i)).save(f"plates/{i}.png")
    seen = []
    monkeypatch.setattr(streaming, "shot_cuts", lambda *words: seen.append(words) or shot_cuts(*words))
    words = ["render", "frames", "--depth", "disparity", "--k", 12, "--focus-disparity", 0.2]
    assert bokeh(*words, "--matte", "mattes", "--clean-plate", "plates", "-o", "out") == 0
    (samples, k, mattes), *_ = seen
    assert samples.shape == mattes.shape == (3, HEIGHT, WIDTH) and k == 12
    assert torch.equal(mattes[2] > 0.75, torch.from_numpy(np.roll(near(), 2, 1) > 0.75))
    monkeypatch.setattr(streaming, "chunk_length", lambda *_: 1)
    assert bokeh(*words, "--matte", "mattes", "--clean-plate", "plates", "-o", "slow") == 0
    assert bokeh(*words, "--matte", "mattes/0.png", "--clean-plate", "plates/0.png", "-o", "still") == 0
    cuts = shot_cuts(samples, k, mattes)
    for i in range(3):
        matte, plate = read_picture(f"mattes/{i}.png").pixels[:1], read_picture(f"plates/{i}.png").pixels[None]
        pixels, disparity = read_picture(f"frames/f_{i}.png").pixels, read_picture(f"disparity/d_{i}.png").pixels[0]
        want = expected(pixels, disparity, 0.2, 12.0, matte=matte, clean_plate=plate, cuts=cuts)
        assert (read_picture(f"out/f_{i}.png").pixels - want.clamp(0, 1)).abs().max() <= 0.51 / 255
        assert Path(f"out/f_{i}.png").read_bytes() == Path(f"slow/f_{i}.png").read_bytes()
        assert (Path(f"out/f_{i}.png").read_bytes() == Path(f"still/f_{i}.png").read_bytes()) == (i == 0)


def test_matte_of_another_size_is_resized_with_a_note(here, capsys):
    np.save("half.npy", near()[::2, ::2])
    assert bokeh("render", "photo.png", "--depth", "depth.npy", "--matte", "half.npy", "-o", "out.png") == 0
    assert capsys.readouterr().err == "note: the matte is 28 x 20 and was resized to the picture's 56 x 40.\n"


def test_every_look_has_a_flag():
    assert set(cli.LOOKS) | {"picture"} == {field.name for field in dataclasses.fields(Aperture)}
    assert set(cli.LIGHTS) <= {field.name for field in dataclasses.fields(Lens)}


LOOKS = {
    "--blades": ("blades", 6),
    "--blade-rotation": ("rotation", 15.0),
    "--roundness": ("roundness", 0.25),
    "--anamorphic": ("anamorphic", 1.5),
    "--cats-eye": ("cats_eye", 0.5),
    "--spherical": ("spherical", -0.5),
    "--onion": ("onion", 0.3),
    "--chromatic-longitudinal": ("chromatic_longitudinal", 0.7),
    "--chromatic-lateral": ("chromatic_lateral", -0.2),
}


def lens_of(monkeypatch, *words):
    """The lens that reaches the renderer."""
    import bokeh_core.video.streaming as streaming

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "render", lambda image, defocus, **_: seen.append(defocus.lens) or image)
        assert bokeh("render", "photo.png", "--depth", "depth.npy", *words, "-o", "out.png") == 0
    return seen[0]


def test_looks_reach_the_lens(here, monkeypatch):
    assert lens_of(monkeypatch) == Lens()
    for flag, (name, value) in LOOKS.items():
        assert lens_of(monkeypatch, flag, value) == Lens(aperture=Aperture(**{name: value}))
    everything = [word for flag, (_, value) in LOOKS.items() for word in (flag, value)]
    aperture = Aperture(**dict(LOOKS.values()))
    lights = ["--highlights", 4, "--highlight-threshold", 0.8]
    assert lens_of(monkeypatch, *everything, *lights, "--strength", 9) == Lens(
        strength=9.0, aperture=aperture, highlights=4.0, highlight_threshold=0.8
    )
    real = ["--depth-unit", "disparity", "--f-number", 2, "--focal-length", 50, "--focus-distance", 3]
    assert lens_of(monkeypatch, *everything, *lights, *real) == Lens(
        f_number=2.0, focal_length=50.0, focus_distance=3.0, aperture=aperture, highlights=4.0, highlight_threshold=0.8
    )
    np.save("heart.npy", near())
    found = lens_of(monkeypatch, "--aperture-picture", "heart.npy").aperture
    assert torch.equal(found.picture, torch.from_numpy(near())) and found.blades == 0


def test_exif_lens_keeps_the_looks(here, monkeypatch):
    exif = Image.Exif()
    exif[0x8769] = {0x829D: 2.0, 0x920A: 50.0, 0xA405: 50}
    Image.fromarray(array8()).save("photo.png", exif=exif)
    lens = lens_of(monkeypatch, "--exif", "--depth-unit", "disparity", "--blades", 7, "--highlights", 2)
    assert (lens.f_number, lens.focal_length, lens.aperture, lens.highlights) == (2.0, 50.0, Aperture(blades=7), 2.0)


def test_a_look_changes_the_picture_as_the_library_does(here):
    np.save("photo.npy", array8().astype(np.float32) / 255)
    words = ["render", "photo.npy", "--depth", "depth.npy", "--k", 12, "--focus-disparity", 0.8, "-o", "out.npy"]
    assert bokeh(*words, "--anamorphic", 3, "--highlights", 5) == 0
    pixels = torch.from_numpy(np.load("photo.npy")).permute(2, 0, 1)
    want = expected(pixels, depth(), 0.8, 12.0, lens=Lens(aperture=Aperture(anamorphic=3.0), highlights=5.0))
    assert np.array_equal(np.load("out.npy"), want.permute(1, 2, 0).numpy())
    assert not torch.allclose(want, expected(pixels, depth(), 0.8, 12.0), atol=1e-3)


# Synthesis and judging

SMALL = ["--size", 64, "--rays", 4, "--k", "8"]


def test_synthesize_and_go_on(here, capsys):
    from bokeh_core.synthesis.dataset import read_case

    assert bokeh("synthesize", "cases", "--count", 2, *SMALL, "--seed", 5, "--kinds", "plane,portrait") == 0
    assert capsys.readouterr().out == "cases\n"
    names = ["000000.json", "000000.npz", "000001.json", "000001.npz", "dataset.json"]
    assert sorted(os.listdir("cases")) == names
    case = read_case("cases/000001.npz")
    assert (case["kind"], case["seed"], case["k_px"], case["rays"], case["image_linear"].shape) == ("portrait", 6, 8.0, 4, (64, 64, 3))
    before = {name: Path("cases", name).stat().st_mtime_ns for name in names}
    assert bokeh("synthesize", "cases", "--count", 3, *SMALL, "--seed", 5, "--kinds", "plane,portrait", "--workers", 2) == 0
    assert len(os.listdir("cases")) == 7 and all(Path("cases", name).stat().st_mtime_ns == t for name, t in before.items())


def test_synthesize_uses_photos(here):
    Path("photos").mkdir()
    Image.fromarray(np.full((90, 90, 3), (250, 0, 0), np.uint8)).save("photos/red.png")
    assert bokeh("synthesize", "cases", "--count", 1, *SMALL, "--kinds", "plane", "--photos", "photos") == 0
    with np.load("cases/000000.npz") as file:
        image = file["image_linear"]
    assert np.median(image[..., 0]) > 0.9 and np.median(image[..., 1]) == 0


def test_interrupted_synthesis_goes_on(here, capsys, monkeypatch):
    from bokeh_core.synthesis import dataset

    real, calls = dataset._write_case, []

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*words)

    monkeypatch.setattr(dataset, "_write_case", interrupted)
    words = ["synthesize", "cases", "--count", 2, *SMALL]
    assert bokeh(*words) == 130
    assert "goes on from there" in capsys.readouterr().err and Path("cases/000000.npz").exists()
    assert bokeh(*words) == 0 and len(calls) == 3 and Path("cases/000001.json").exists()


def test_judge_prints_and_writes_the_protocol(here, capsys, monkeypatch):
    from functools import partial

    from bokeh_core import judge

    assert bokeh("synthesize", "cases", "--count", 1, *SMALL, "--kinds", "portrait") == 0
    capsys.readouterr()
    monkeypatch.setattr(judge, "judge_renderer", partial(judge.judge_renderer, clip_frames=2, clip_size=64, clip_rays=4))
    assert bokeh("judge", "cases", "--inputs", "composite,layers", "-o", "report") == 0
    out = capsys.readouterr().out
    assert out.startswith("# Quality fast, cases\n") and "true layers (ceiling)" in out and "+ matte" not in out
    assert set(os.listdir("report")) >= {"judge.json", "judge.md", "radius.svg"}
    report = json.loads(Path("report/judge.json").read_text())
    assert list(report["cases"]) == ["000000"] and set(report["cases"]["000000"]["scores"]) == {"composite", "layers"}


def test_judge_makes_its_own_scenes(here, capsys, monkeypatch):
    from bokeh_core import judge, judge_report

    asked = []
    monkeypatch.setattr(judge, "judge_renderer", lambda renderer, cases, **options: asked.append((list(cases), options)) or {})
    monkeypatch.setattr(judge, "measure_speed", lambda quality: [quality])
    monkeypatch.setattr(judge_report, "markdown", lambda report, title: f"{title} {report}")
    assert bokeh("judge") == bokeh("judge", "--seeds", "7", "--speed") == bokeh("judge", "--full") == 0
    small, seven, full = (names for names, _ in asked)
    assert len(small) == 18 and {name.split(", ")[1] for name in small} == {"seed 1", "seed 2"}
    assert {name.split(", ")[1] for name in seven} == {"seed 7"} and len(full) == 72
    assert {name.split(", ")[2] for name in full} == {"k 8", "k 16", "k 32", "k 64"}
    assert "small seeded scenes {'speed': ['fast']}" in capsys.readouterr().out


# Bad input

PHOTO = ["render", "photo.png", "--depth", "depth.png"]


def make_bad_files():
    Path("empty.png").write_bytes(b"")
    Path("text.png").write_text("not a picture")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:900])
    Path("text.npy").write_text("not an array")
    Path("text.exr").write_text("not a picture")
    Path("text.mp4").write_text("not a video")
    Path("photo.xyz").write_text("?")
    Path("nothing").mkdir()
    np.save("zero.npy", np.zeros((0, 5, 3), np.float32))
    np.save("nan_photo.npy", np.full((HEIGHT, WIDTH, 3), np.nan, np.float32))
    nan = depth()
    nan[3, 4] = np.nan
    np.save("nan.npy", nan)
    infinite = depth()
    infinite[3, 4] = np.inf
    np.save("infinite.npy", infinite)
    np.save("negative.npy", -depth())
    np.save("constant.npy", np.full((HEIGHT, WIDTH), 0.25, np.float32))
    np.save("square.npy", depth()[:, :40])
    Image.fromarray(array8()).save("colour.png")
    for folder, count in (("three", 3), ("two", 2), ("mixed", 2), ("taken", 1)):
        Path(folder).mkdir()
        for i in range(count):
            Image.fromarray(array8()[: HEIGHT - (folder == "mixed") * i]).convert("L").save(f"{folder}/{i}.png")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        # files
        (["render", "nowhere.png", "--depth", "depth.png", "-o", "out.png"], "nowhere.png: no such file"),
        (["render", "photo.png", "--depth", "nowhere.npy", "-o", "out.png"], "nowhere.npy: no such file"),
        (["render", "empty.png", "--depth", "depth.png", "-o", "out.png"], "empty.png: cannot be read as PNG"),
        (["render", "text.png", "--depth", "depth.png", "-o", "out.png"], "text.png: cannot be read as PNG"),
        (["render", "cut.png", "--depth", "depth.png", "-o", "out.png"], "cut.png: cannot be read as PNG"),
        (["render", "text.exr", "--depth", "depth.png", "-o", "out.png"], "text.exr: cannot be read as EXR"),
        (["render", "text.mp4", "--depth", "depth.png", "-o", "out.mp4"], "text.mp4: cannot be read as a video"),
        (["render", "photo.png", "--depth", "text.npy", "-o", "out.png"], "text.npy: cannot be read as NPY"),
        (["render", "photo.xyz", "--depth", "depth.png", "-o", "out.png"], "unknown suffix '.xyz'"),
        (["render", "nothing", "--depth", "depth.png", "-o", "out.mp4"], "no picture files"),
        (["render", "zero.npy", "--depth", "depth.png", "-o", "out.png"], "size zero"),
        (["render", "nan_photo.npy", "--depth", "depth.png", "-o", "out.png"], "NaN or infinite"),
        # depth
        (["render", "photo.png", "--depth", "zero.npy", "-o", "out.png"], "size zero"),
        (["render", "photo.png", "--depth", "nan.npy", "-o", "out.png"], "1 depth values are NaN"),
        (["render", "photo.png", "--depth", "infinite.npy", "-o", "out.png"], "1 depth values are infinite"),
        (["render", "photo.png", "--depth", "negative.npy", "--depth-unit", "metres", "-o", "out.png"], "negative distances"),
        (["render", "photo.png", "--depth", "constant.npy", "-o", "out.png"], "constant (0.25 everywhere)"),
        (["render", "photo.png", "--depth", "square.npy", "-o", "out.png"], "40 x 40 but the picture is 56 x 40"),
        (["render", "photo.png", "--depth", "colour.png", "-o", "out.png"], "in colour"),
        (["render", "photo.png", "--depth", "three", "-o", "out.png"], "3 depth maps for 1 frame"),
        (["render", "three", "--depth", "two", "-o", "out.mp4"], "2 depth maps for 3 frames"),
        (["render", "three", "--depth", "mixed", "-o", "out.mp4"], "1.png is 56 x 39 but 0.png is 56 x 40"),
        (["render", "mixed", "--depth", "two", "-o", "out.mp4"], "1.png is 56 x 39 but 0.png is 56 x 40"),
        ([*PHOTO, "--depth-unit", "metres", "-o", "out.png"], "needs a file of floats"),
        ([*PHOTO, "--depth-unit", "disparity", "--depth-far-is-bright", "-o", "out.png"], "do not go together"),
        # output
        ([*PHOTO, "-o", "photo.png"], "-o photo.png is also IMAGE"),
        ([*PHOTO, "-o", "./nothing/../depth.png"], "is also --depth"),
        ([*PHOTO, "-o", "out.xyz"], "cannot write a picture with the suffix '.xyz'"),
        ([*PHOTO, "-o", "out"], "cannot write a picture with the suffix ''"),
        ([*PHOTO, "-o", "out.mp4"], "cannot write a picture with the suffix '.mp4'"),
        ([*PHOTO, "-o", "nothing"], "cannot write a picture"),
        ([*PHOTO, "-o", "photo.png/out.png"], "output folder cannot be created"),
        ([*PHOTO, "-o", "out.jpg", "--bits", 16], "cannot hold 16 bits"),
        ([*PHOTO, "-o", "out.png", "--overlay", "out.png"], "choose two names"),
        ([*PHOTO, "-o", "out.png", "--overlay", "out.mp4"], "cannot write a picture"),
        (["render", "three", "--depth", "depth.png", "-o", "taken"], "not empty"),
        (["render", "three", "--depth", "depth.png", "-o", "out.png"], "cannot write a clip"),
        (["render", "three", "--depth", "depth.png", "-o", "three"], "is also IMAGE"),
        # options
        (PHOTO, "-o/--output"),
        (["render", "photo.png", "-o", "out.png"], "--depth"),
        ([], "demo | render | depth | models"),
        (["fly"], "fly"),
        ([*PHOTO, "-o", "out.png", "--quality", "best"], "'best' is unknown"),
        ([*PHOTO, "-o", "out.png", "--focus", "3,3", "--focus-disparity", 0.5], "not allowed with"),
        ([*PHOTO, "-o", "out.png", "--k", 3, "--strength", 5], "not allowed with"),
        ([*PHOTO, "-o", "out.png", "--k", 3, "--f-number", 2, "--focal-length", 50], "--k and --f-number both set the blur"),
        ([*PHOTO, "-o", "out.png", "--f-number", 2, "--focal-length", 50], "needs metric depth"),
        ([*PHOTO, "-o", "out.png", "--f-number", 2], "needs both"),
        ([*PHOTO, "-o", "out.png", "--exif"], "needs metric depth"),
        ([*PHOTO, "-o", "out.png", "--focus-distance", 2], "needs metric depth"),
        ([*PHOTO, "-o", "out.png", "--focus-distance", 2, "--focus", "3,3"], "both set the focus"),
        ([*PHOTO, "-o", "out.png", "--focus", "56,3"], "outside the picture"),
        ([*PHOTO, "-o", "out.png", "--focus", "five"], "expected two numbers"),
        ([*PHOTO, "-o", "out.png", "--focus", "0.5,0.5,0.5"], "expected two numbers"),
        ([*PHOTO, "-o", "out.png", "--focus", "nan,nan"], "outside the picture"),
        ([*PHOTO, "-o", "out.png", "--focus-mask", "nowhere.png"], "nowhere.png: no such file"),
        ([*PHOTO, "-o", "out.png", "--focus-mask", "three"], "3 masks for 1 frame"),
        ([*PHOTO, "-o", "out.png", "--focus-track", "soon"], "can not be read"),
        ([*PHOTO, "-o", "out.png", "--focus-disparity", "nan"], "finite"),
        ([*PHOTO, "-o", "out.png", "--focus-disparity", 0.5, "--focus-each-frame"], "do not go together"),
        ([*PHOTO, "-o", "out.png", "--k", "-1"], "--k is -1"),
        ([*PHOTO, "-o", "out.png", "--strength", "inf"], "--strength is inf"),
        ([*PHOTO, "-o", "out.png", "--strength", "much"], "invalid float"),
        ([*PHOTO, "-o", "out.png", "--fps", 24], "--fps is for a video"),
        (["render", "three", "--depth", "depth.png", "-o", "out.mp4", "--fps", "1/0"], "--fps"),
        # matte, plate, looks
        ([*PHOTO, "-o", "out.png", "--matte", "nowhere.png"], "nowhere.png: no such file"),
        ([*PHOTO, "-o", "out.png", "--matte", "three"], "3 mattes for 1 frame"),
        (["render", "three", "--depth", "depth.png", "--matte", "two", "-o", "out.mp4"], "2 mattes for 3 frames"),
        ([*PHOTO, "-o", "out.png", "--matte", "square.npy"], "the matte is 40 x 40 but the picture is 56 x 40"),
        ([*PHOTO, "-o", "out.png", "--matte", "colour.png"], "in colour"),
        ([*PHOTO, "-o", "out.png", "--matte", "nan.npy"], "not from 0"),
        ([*PHOTO, "-o", "out.png", "--matte", "negative.npy"], "not from 0"),
        (["render", "three", "--depth", "depth.png", "--matte", "mixed", "-o", "out.mp4"], "1.png is 56 x 39"),
        ([*PHOTO, "--matte", "colour.png", "-o", "colour.png"], "is also --matte"),
        ([*PHOTO, "-o", "out.png", "--clean-plate", "nowhere.png"], "nowhere.png: no such file"),
        ([*PHOTO, "-o", "out.png", "--clean-plate", "square.npy"], "the clean plate is 40 x 40 but the picture is 56 x 40"),
        ([*PHOTO, "-o", "out.png", "--clean-plate", "three"], "3 clean plates for 1 frame"),
        ([*PHOTO, "-o", "out.png", "--clean-plate", "nan_photo.npy"], "NaN or infinite"),
        ([*PHOTO, "--clean-plate", "colour.png", "-o", "colour.png"], "is also --clean-plate"),
        ([*PHOTO, "-o", "out.png", "--blades", "six"], "--blades"),
        ([*PHOTO, "-o", "out.png", "--blades", "-3"], "-3 blades"),
        ([*PHOTO, "-o", "out.png", "--roundness", 2], "roundness is 2"),
        ([*PHOTO, "-o", "out.png", "--spherical", "nan"], "spherical is nan"),
        ([*PHOTO, "-o", "out.png", "--anamorphic", 0], "anamorphic is 0"),
        ([*PHOTO, "-o", "out.png", "--highlights", "-1"], "highlight boost is -1"),
        ([*PHOTO, "-o", "out.png", "--highlight-threshold", 1], "highlight threshold is 1"),
        ([*PHOTO, "-o", "out.png", "--aperture-picture", "nowhere.png"], "nowhere.png: no such file"),
        ([*PHOTO, "-o", "out.png", "--aperture-picture", "colour.png"], "in colour"),
        ([*PHOTO, "-o", "out.png", "--aperture-picture", "negative.npy"], "aperture picture must hold"),
        # other commands
        (["demo", "--width", 3], "--width is 3"),
        (["synthesize", "cases"], "--count"),
        (["synthesize", "cases", "--count", 0], "no whole number of 1 or more"),
        (["synthesize", "cases", "--count", 1, "--seed", "-1"], "no whole number of 0 or more"),
        (["synthesize", "cases", "--count", 1, "--kinds", "portrait,dog"], "dog"),
        (["synthesize", "cases", "--count", 1, "--k", "8,wide"], "no list of numbers"),
        (["synthesize", "cases", "--count", 1, "--size", 20], "at least 64 px"),
        (["synthesize", "cases", "--count", 1, "--photos", "nowhere"], "--photos nowhere: no such folder"),
        (["synthesize", "cases", "--count", 1, "--photos", "nothing"], "no PNG, JPEG or WebP"),
        (["synthesize", "photo.png", "--count", 1], "photo.png is a file"),
        (["judge", "nowhere"], "nowhere: no such folder"),
        (["judge", "nothing"], "holds no cases"),
        (["judge", "--quality", "best"], "'best' is unknown"),
        (["judge", "--inputs", "guess"], "Unknown inputs ['guess']"),
        (["judge", "--seeds", "1,x"], "no list of whole numbers"),
        (["judge", "nothing", "--full"], "are for scenes made here"),
        (["judge", "-o", "photo.png"], "photo.png is a file"),
        (["demo", "-o", "photo.png"], "expected a folder"),
    ],
)
def test_bad_input_is_one_sentence(here, capsys, words, sentence):
    make_bad_files()
    before_files(here)
    assert sentence in refused(capsys, here, *words)


def test_inputs_are_never_touched(clip):
    before = {path: path.read_bytes() for path in clip.rglob("*") if path.is_file()}
    assert bokeh("render", "frames", "--depth", "disparity", "-o", "out.mp4") == 0
    assert bokeh("render", "photo.png", "--depth", "depth.npy", "-o", "out.png") == 0
    assert all(path.read_bytes() == data for path, data in before.items())
    first = Path("out.png").read_bytes()
    assert bokeh("render", "photo.png", "--depth", "depth.npy", "-o", "out.png") == 0
    assert Path("out.png").read_bytes() == first and not list(clip.rglob("*.partial*"))


def test_a_full_disk_is_a_sentence(here, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "out.png")

    monkeypatch.setattr(media, "_encode", full)
    assert "No space left on device" in refused(capsys, here, *PHOTO, "-o", "out.png")
