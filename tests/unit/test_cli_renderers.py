"""`bokeh render --renderer bokehdiff | magicbokeh`: the library's picture through files, and model files found by path and by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bokeh_core import cli, renderers_cli
from bokeh_core.media import Picture, read_picture, write_picture
from bokeh_core.optics.defocus import Defocus, make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.bokehdiff import checkpoint as bokehdiff
from bokeh_core.samplers.bokehdiff import sampler as bokehdiff_sampler
from bokeh_core.samplers.magicbokeh import checkpoint as magicbokeh
from bokeh_core.samplers.magicbokeh import sampler as magicbokeh_sampler
from bokeh_core.video.clips import open_clip
from tests.stand_ins import bokehdiff as bokehdiff_files
from tests.stand_ins import magicbokeh as magicbokeh_files

HEIGHT, WIDTH = 48, 72
EIGHT_BIT = 0.5 / 255 + 1e-4


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder laid out like ComfyUI's models."""
    models = tmp_path_factory.mktemp("models")
    bokehdiff_files.write_all(models / "checkpoints", models / "diffusers", models / "loras" / "bokehdiff", models / "vae")
    magicbokeh_files.write_base(models / "diffusers" / "stable-diffusion-2-1-base")
    magicbokeh_files.write_converted(models / "loras" / "magicbokeh.safetensors")
    return models


@pytest.fixture
def here(tmp_path, monkeypatch, installed):
    """photo.png, depth.npy and models/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no models"))
    Path("models").symlink_to(installed)
    pixels = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    write_picture("photo.png", Picture(pixels), 8)
    depth = np.repeat(np.linspace(0.1, 0.3, WIDTH, dtype=np.float32)[None], HEIGHT, 0)
    depth[10:30, 20:40] = 0.8
    np.save("depth.npy", depth)
    return tmp_path


def bokeh(renderer, *words, image="photo.png", depth="depth.npy", output="out.png"):
    common = ["--depth", depth, "--models", "models", "--device", "cpu", "-o", output]
    return cli.main([str(word) for word in ["render", image, *common, "--renderer", renderer, *words]])


def image():
    return read_picture("photo.png").pixels[None]


def defocus(focus=0.8, k=12.0):
    return Defocus(torch.from_numpy(np.load("depth.npy"))[None], torch.tensor([focus]), torch.tensor([k]), Lens(), False)


def of_bokehdiff(**more):
    base, lora, vae = "models/diffusers/tiny_sdxl", "models/loras/bokehdiff/pytorch_lora_weights.safetensors", "models/vae/vae.ckpt"
    return lambda scene: bokehdiff_sampler.render(bokehdiff.load_bokehdiff(base, lora, vae), image(), scene, **more)[0]


def of_magicbokeh(**more):
    base, own = "models/diffusers/stable-diffusion-2-1-base", "models/loras/magicbokeh.safetensors"
    return lambda scene: magicbokeh_sampler.render(magicbokeh.load_magicbokeh(base, own), image(), scene, **more)[0]


PUBLISHED = ["--fidelity", "as-published", "--seed", "3"]
CASES = {
    "bokehdiff": ("bokehdiff", [], of_bokehdiff()),
    "bokehdiff as published": ("bokehdiff", PUBLISHED, of_bokehdiff(fidelity=bokehdiff_sampler.AS_PUBLISHED, seed=3)),
    "magicbokeh": ("magicbokeh", [], of_magicbokeh()),
    "magicbokeh as published": ("magicbokeh", PUBLISHED, of_magicbokeh(fidelity=magicbokeh_sampler.AS_PUBLISHED, seed=3)),
    "magicbokeh fast": ("magicbokeh", ["--mode", "fast", "--colour-fix", "none"], of_magicbokeh(mode="fast", colour_fix="none")),
    "magicbokeh larger": ("magicbokeh", ["--upscale", "1.5"], of_magicbokeh(upscale=1.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_the_library_s(here, case):
    renderer, words, library = CASES[case]
    assert bokeh(renderer, "--k", 12, "--focus-disparity", 0.8, "--bits", 16, *words) == 0
    want, found = library(defocus()).clamp(0, 1), read_picture("out.png").pixels
    assert found.shape == want.shape and (found - want).abs().max() <= 0.51 / 65535 + 1e-5
    assert found.shape[1:] == ((72, 108) if "larger" in case else (HEIGHT, WIDTH))


def test_strength_and_focus_mean_what_they_mean_elsewhere(here):
    assert bokeh("bokehdiff", "--strength", 40, "--focus", "30,20") == 0
    disparity = torch.from_numpy(np.load("depth.npy"))[None]
    scene = make_defocus(disparity, Lens(strength=40.0), torch.tensor([0.8]), width=WIDTH)
    want = of_bokehdiff()(scene)
    assert (read_picture("out.png").pixels - want.clamp(0, 1)).abs().max() <= EIGHT_BIT


def test_depth_of_any_unit_gives_one_result(here):
    """A range other than 0..1, and distances: the network is told the same defocus."""
    depth = np.load("depth.npy")
    np.save("wide.npy", depth * 8 - 2)
    np.save("metres.npy", 1 / depth)
    assert bokeh("bokehdiff", "--k", 12 / 8, "--focus-disparity", 0.8 * 8 - 2, depth="wide.npy", output="wide.png") == 0
    metric = ["--k", 12, "--focus-disparity", 0.8, "--depth-unit", "metres"]
    assert bokeh("bokehdiff", *metric, depth="metres.npy", output="metres.png") == 0
    wide, metres = read_picture("wide.png").pixels, read_picture("metres.png").pixels
    assert (wide - metres).abs().max() <= 3.1 / 255
    clear = defocus()
    spread = Defocus((clear.disparity - 0.1) / 0.7, (clear.focus - 0.1) / 0.7, clear.k * 0.7, Lens(), False)
    assert (wide - of_bokehdiff()(spread).clamp(0, 1)).abs().max() <= 3.1 / 255


def test_no_blur_is_the_input_for_bokehdiff(here):
    assert bokeh("bokehdiff", "--k", 0) == 0
    assert torch.equal(read_picture("out.png").pixels, image()[0])


def test_a_clip_goes_frame_by_frame_and_resumes(here, monkeypatch):
    from bokeh_core.video import resume

    for i in range(3):
        write_picture(f"clip/{i}.png", Picture(image()[0].roll(i, -1)), 8)
    words = ["--k", 12, "--focus-disparity", 0.8]
    assert bokeh("bokehdiff", *words, image="clip", output="whole") == 0
    mark = resume.PartialClip.mark

    def stopping(self, carry=None):
        mark(self, carry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.PartialClip, "mark", stopping)
        assert bokeh("bokehdiff", *words, image="clip", output="out") == 130
    assert [file.name for file in Path(".out.partial").glob("*.png")] == ["0.png"]
    drawn, draw = [], bokehdiff_sampler.render
    monkeypatch.setattr(bokehdiff_sampler, "render", lambda *given, **more: drawn.append(1) or draw(*given, **more))
    assert bokeh("bokehdiff", *words, image="clip", output="out") == 0 and len(drawn) == 2
    for i in range(3):
        assert Path(f"out/{i}.png").read_bytes() == Path(f"whole/{i}.png").read_bytes()
    assert (open_clip("out").size, len(open_clip("out"))) == ((HEIGHT, WIDTH), 3) and not list(here.glob(".out*"))
    assert bokeh("bokehdiff", *words, image="clip/1.png") == 0
    assert Path("out.png").read_bytes() == Path("out/1.png").read_bytes()


def test_alpha_and_linear_light(here):
    """Alpha stays, enlarged with the picture; EXR in, EXR out, by way of the display-encoded picture the networks know."""
    alpha = torch.linspace(0, 1, WIDTH).expand(HEIGHT, -1)
    write_picture("cut.png", Picture(image()[0], alpha), 16)
    assert bokeh("magicbokeh", "--k", 4, "--upscale", 2, image="cut.png") == 0
    found = read_picture("out.png").alpha
    assert found.shape == (2 * HEIGHT, 2 * WIDTH) and (found[:, 1:] >= found[:, :-1]).all() and float(found.max()) > 0.98
    write_picture("light.exr", Picture(((image()[0] + 0.055) / 1.055) ** 2.4), 32)
    assert bokeh("bokehdiff", "--k", 0, image="light.exr", output="out.exr") == 0
    assert torch.allclose(read_picture("out.exr").pixels, read_picture("light.exr").pixels, atol=1e-5)


# Files


class Chosen:
    base = renderer_model = renderer_vae = None
    models = ("models",)

    def __init__(self, **given):
        self.__dict__.update(given)


def found(**given):
    return {name: str(path) for name, path in renderers_cli.find_files(Chosen(**given)).items()}


def test_models_are_found_installed_by_name_and_by_path(here):
    lora, vae = "models/loras/bokehdiff/pytorch_lora_weights.safetensors", "models/vae/vae.ckpt"
    folder, single = "models/diffusers/tiny_sdxl", "models/checkpoints/tiny_sdxl.safetensors"
    assert found(renderer="bokehdiff") == {"base": folder, "lora": lora, "vae_ckpt": vae}
    assert found(renderer="bokehdiff", base="tiny_sdxl.safetensors")["base"] == single
    assert found(renderer="bokehdiff", base=single, renderer_model="bokehdiff", renderer_vae="vae.ckpt") == {
        "base": single,
        "lora": lora,
        "vae_ckpt": vae,
    }
    own = {"base": "models/diffusers/stable-diffusion-2-1-base", "file": "models/loras/magicbokeh.safetensors"}
    assert found(renderer="magicbokeh") == found(renderer="magicbokeh", renderer_model="magicbokeh") == own
    Path("mine.safetensors").write_bytes(b"")
    assert found(renderer="magicbokeh", renderer_model="mine.safetensors")["file"] == "mine.safetensors"
    assert found(renderer="physical") == {}


def test_the_released_pickle_will_do(here, installed):
    place = here / "other"
    magicbokeh_files.write_pickle(place / "loras" / "lora.pkl")
    (place / "diffusers").symlink_to(installed / "diffusers")
    Path("models").unlink()
    Path("models").symlink_to(place)
    assert bokeh("magicbokeh", "--k", 4) == 0


@pytest.mark.parametrize(
    ("renderer", "missing", "words"),
    [
        ("bokehdiff", "base", ["SDXL", "huggingface.co/SG161222/RealVisXL_V5.0", "models/checkpoints", "--base"]),
        (
            "bokehdiff",
            "loras",
            ["pytorch_lora_weights.safetensors", "zcx65535/bokehdiff", "models/loras", "--renderer-model"],
        ),
        ("bokehdiff", "vae", ["vae.ckpt", "huggingface.co/zcx65535/bokehdiff", "models/vae", "--renderer-vae"]),
        ("magicbokeh", "base", ["2.1-base", "huggingface.co/Manojb/stable-diffusion-2-1-base", "models/diffusers", "--base"]),
        ("magicbokeh", "loras", ["lora.pkl", "huggingface.co/LinxiaoShi/Magicbokeh", "models/loras", "--renderer-model"]),
    ],
)
def test_a_missing_model_is_explained(here, installed, capsys, renderer, missing, words):
    Path("models").unlink()
    Path("models").mkdir()
    for folder in ("checkpoints", "diffusers", "loras", "vae"):
        if folder != missing and not (missing == "base" and folder in ("checkpoints", "diffusers")):
            Path("models", folder).symlink_to(installed / folder)
    assert bokeh(renderer) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    ("renderer", "words", "sentence"),
    [
        ("bokehdiff", ["--mode", "fast"], "--mode is for --renderer magicbokeh"),
        ("physical", ["--fidelity", "best"], "--fidelity is for --renderer bokehdiff or magicbokeh or any-to-bokeh"),
        ("physical", ["--seed", "0"], "--seed is for"),
        ("magicbokeh", ["--renderer-vae", "vae.ckpt"], "--renderer-vae is for --renderer bokehdiff"),
        ("magicbokeh", ["--blades", "5"], "--blades is for the physical renderer; --renderer magicbokeh"),
        ("magicbokeh", ["--upscale", "9"], "expected 1 to 4"),
        ("bokehdiff", ["--seed", "-1"], "--seed is -1"),
        ("bokehdiff", ["--cuts-found"], "--cuts-found is for --renderer any-to-bokeh"),
        ("bokehdiff", ["--base", "nowhere"], "--base nowhere: no such file or folder"),
        ("bokehdiff", ["--renderer-model", "nowhere.safetensors"], "--renderer-model nowhere.safetensors: no such file"),
        ("bokehdiff", ["--renderer-model", "models/vae/vae.ckpt"], "is not BokehDiff's LoRA"),
        ("bokehdiff", ["--base", "models/diffusers/stable-diffusion-2-1-base"], "is not BokehDiff's LoRA for this base model"),
        ("magicbokeh", ["--base", "models/diffusers/tiny_sdxl"], "is not Stable Diffusion 2.1-base"),
        ("magicbokeh", ["--renderer-model", "models/vae/vae.ckpt"], "vae.ckpt"),
        ("magicbokeh", ["--colour-fix", "sepia"], "invalid choice"),
        ("sd3", [], "invalid choice"),
    ],
)
def test_mistakes_cost_one_sentence(here, capsys, renderer, words, sentence):
    assert bokeh(renderer, *words) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and not Path("out.png").exists()


def test_a_clip_is_not_enlarged(here, capsys):
    write_picture("clip/0.png", Picture(image()[0]), 8)
    assert bokeh("magicbokeh", "--upscale", 2, image="clip", output="out") == 2
    assert "--upscale is for single pictures" in capsys.readouterr().err


def test_running_out_of_memory_is_a_sentence_after_smaller_tiles(here, capsys, monkeypatch):
    sizes = []

    def full(model, pixels, tile, *rest):
        sizes.append(tile)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bokehdiff_sampler, "encode", full)
    assert bokeh("bokehdiff", "--k", 4) == 2
    assert "ran out of memory" in capsys.readouterr().err and sizes == [1024, 512, 256]


def test_the_words_of_the_options_are_the_sampler_s():
    assert renderers_cli.MODES == magicbokeh_sampler.MODES and renderers_cli.COLOUR_FIXES == magicbokeh_sampler.COLOUR_FIXES
    options = {action.dest for action in cli.build_parser()._subparsers._group_actions[0].choices["render"]._actions}
    assert set(renderers_cli.NETWORKS_ONLY) | set(renderers_cli.PHYSICAL_ONLY) <= options
