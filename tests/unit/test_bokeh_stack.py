"""Bokeh stacks from the renderer, from photos and from disk."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from bokeh_core.errors import BokehError
from bokeh_core.media import Picture, write_picture
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.optics.stack import BokehStack, stack_radius
from bokeh_core.render import render
from bokeh_core.render.stack import render_stack
from bokeh_core.stack_files import load_stack, save_stack


def pictures(count, height=24, width=32, seed=0):
    """[count, 3, H, W] random 8-bit pictures."""
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


@pytest.fixture
def stack():
    return BokehStack(pictures(1)[0], pictures(3, seed=1), [10, 20.1, 30], source="kontext", settings={"guidance_scale": 7.0})


@pytest.fixture
def scene():
    """(image [3,64,128], defocus): a wall that slants from near to far, sharp at the near end."""
    disparity = torch.linspace(1, 0, 128).expand(1, 64, 128).contiguous()
    return pictures(1, 64, 128)[0], make_defocus(disparity, Lens(strength=5), 1.0, width=128)


@pytest.mark.parametrize(
    ("reference", "frames", "k", "words"),
    [
        ((3, 8, 8), (2, 3, 8, 8), [1], "2 frames and 1 values of K"),
        ((3, 8, 8), (0, 3, 8, 8), [], "0 frames"),
        ((8, 8, 3), (2, 3, 8, 8), [1, 2], r"got \[8, 8, 3\]"),
        ((3, 8, 8), (3, 8, 8), [1, 2, 3], "needs a reference"),
        ((3, 8, 8), (2, 3, 8, 8), [0, 1], "K = 0"),
        ((3, 8, 8), (1, 3, 8, 8), [float("nan")], "K = nan"),
    ],
)
def test_impossible_stacks_are_refused(reference, frames, k, words):
    with pytest.raises(BokehError, match=words):
        BokehStack(torch.zeros(reference), torch.zeros(frames), k)


def test_fitted(stack):
    smaller = BokehStack(stack.reference, stack.frames[..., :16, :24], stack.k)
    fitted = smaller.fitted(24, 32)
    assert fitted.frames.shape == (3, 3, 24, 32) and torch.equal(fitted.reference, stack.reference) and torch.equal(fitted.k, stack.k)
    assert fitted.frames.min() >= 0 and fitted.frames.max() <= 1


def test_rendered_radius_is_k_on_512_px(scene):
    image, defocus = scene
    stack = render_stack(image, defocus, [8, 16])
    for k, frame in zip((8, 16), stack.frames, strict=True):
        px = k * 128 / 512  # the far end, a disparity of 1 away
        assert torch.equal(frame, render(image[None], replace(defocus, k=torch.tensor([px])))[0].clamp(0, 1))
    assert torch.equal(stack.reference, image) and not stack.per_dioptre and stack.source == "rendered"


def test_k_counts_the_range_or_the_dioptre(scene):
    _, relative = scene
    half = replace(relative, disparity=relative.disparity * 0.5)
    assert stack_radius(8, relative, per_dioptre=False) == stack_radius(8, half, per_dioptre=False) == 2  # 0..1 is the whole range
    metric = replace(half, metric=True)
    assert stack_radius(8, metric, per_dioptre=False) == pytest.approx(4)  # from 0 to 0.5 dioptres
    assert stack_radius(8, metric, per_dioptre=True) == 2
    # A real lens: the same K as its own k at 512 px.
    lens = Lens(f_number=2.0, focal_length=50.0, focus_distance=2.0)
    k = float(lens.k(512, torch.tensor([0.5]), metric=True))
    assert stack_radius(k, metric, per_dioptre=True) == pytest.approx(float(lens.k(128, torch.tensor([0.5]), metric=True)))
    with pytest.raises(BokehError, match="needs depth in metres"):
        stack_radius(8, relative, per_dioptre=True)


def test_rendering_reports_and_stops(scene):
    image, defocus = scene
    told = []
    render_stack(image, defocus, [4, 8], progress=lambda *done: told.append(done))
    assert told[-1] == (2, 2) and told == sorted(told)

    class Stop(BaseException):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        render_stack(image, defocus, [4], progress=stop)
    with pytest.raises(BokehError, match="defocus has 2 frames"):
        render_stack(image, make_defocus(defocus.disparity.repeat(2, 1, 1), Lens(), 1.0, width=128), [4])


def test_files_come_back(tmp_path, stack):
    manifest = save_stack(tmp_path / "run", stack, original_size=(640, 480))
    assert not list((tmp_path / "run").rglob("*.partial*"))
    for path in (manifest, manifest.parent):
        again = load_stack(path)
        assert torch.equal(again.reference, stack.reference) and torch.equal(again.frames, stack.frames)
        assert again.k.tolist() == [10, 20.1, 30] and again.source == "kontext" and not again.per_dioptre
        assert again.settings["guidance_scale"] == 7.0 and again.settings["original_size"] == [640, 480]
    lens = replace(stack, per_dioptre=True, source="photos")
    again = load_stack(save_stack(tmp_path / "lens", lens))
    assert again.per_dioptre and again.source == "photos"


def test_moved_folders_are_found(tmp_path, stack):
    save_stack(tmp_path / "run", stack)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert torch.equal(load_stack(tmp_path / "elsewhere").frames, stack.frames)


def test_the_published_spellings(tmp_path, stack):
    """Relative paths, lists, ids with K, folders named in four ways (SPEC section 6)."""
    save_stack(tmp_path, stack)
    ids = {"ids": ["0", "1"], "k_values": {"0": 10.0, "1": 20.1}}
    forms = [
        {"ref": "ref.png", "stack": ["defocus_stack/0.png", "defocus_stack/1.png"], "k": [10, 20.1]},
        {"source_rgb": "ref.png", **ids, "stack_dir": "defocus_stack"},
        {"image": "ref.png", **ids, "defocus_stack_dir": "defocus_stack"},
        {"image_path": "ref.png", **ids, "stack_index": "defocus_stack/stack_index.json"},
        {"input_image_path": "ref.png", **ids},
    ]
    (tmp_path / "list.json").write_text(json.dumps(forms))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, forms)))
    for name in ("list.json", "lines.jsonl"):
        for i in range(len(forms)):
            read = load_stack(tmp_path / name, i)
            assert torch.equal(read.frames, stack.frames[:2]) and read.k.tolist() == [10, 20.1]
    (tmp_path / "one.json").write_text(json.dumps({"ref": "ref.png", "stack_index": "defocus_stack/stack_index.json"}))
    assert load_stack(tmp_path / "one.json").k.tolist() == [10, 20.1, 30]  # ids and K from the index itself
    with pytest.raises(BokehError, match="has 5 stacks; there is no number 5"):
        load_stack(tmp_path / "list.json", 5)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"stack": ["a.png"], "k": [1]}, "names no sharp picture"),
        ({"ref": "ref.png"}, "lists no frames"),
        ({"ref": "ref.png", "stack": ["a.png"], "k": [1, 2]}, "1 frames and 2 values"),
        ({"ref": "ref.png", "stack": ["a.png"], "k": ["x"]}, "K that is no number"),
        ({"ref": "ref.png", "stack": ["a.png"], "k": [1]}, "picture a.png, which is not there|names the picture a.png"),
        ({"ref": "ref.png", "ids": ["0", "1"], "k_values": {"0": 1}}, "no K for the frame 1"),
        ([], "holds no stack"),
    ],
)
def test_bad_manifests_are_explained(tmp_path, about, words):
    write_picture(tmp_path / "ref.png", Picture(pictures(1)[0]))
    (tmp_path / "m.json").write_text(json.dumps(about))
    with pytest.raises(BokehError, match=words):
        load_stack(tmp_path / "m.json")


def test_unreadable_manifests_are_explained(tmp_path):
    with pytest.raises(BokehError, match="cannot be read as a stack's manifest"):
        load_stack(tmp_path)
    (tmp_path / "m.jsonl").write_text("{")
    with pytest.raises(BokehError, match="not valid JSON"):
        load_stack(tmp_path / "m.jsonl")


def test_a_failed_save_leaves_no_manifest(tmp_path, stack, monkeypatch):
    import bokeh_core.stack_files as files

    def fail(path, *rest):
        if path.name == "1.png":
            raise KeyboardInterrupt
        write_picture(path, *rest)

    monkeypatch.setattr(files, "write_picture", fail)
    with pytest.raises(KeyboardInterrupt):
        save_stack(tmp_path, stack)
    assert not (tmp_path / "manifest.jsonl").exists() and not (tmp_path / "defocus_stack/stack_index.json").exists()


def test_nodes(nodes, scene, bar, tmp_path):
    image, defocus = scene
    photo = image.movedim(0, -1)[None]
    stack, frames, reference = nodes["BokehStackRendered"].execute(photo, defocus, "8, 16").args
    assert stack.k.tolist() == [8, 16] and frames.shape == (2, 64, 128, 3) and torch.equal(reference, photo) and bar
    with pytest.raises(ValueError, match="The image has 2 pictures"):
        nodes["BokehStackRendered"].execute(photo.repeat(2, 1, 1, 1), defocus, "8")
    with pytest.raises(ValueError, match="64x64 px and its defocus 128x64 px"):
        nodes["BokehStackRendered"].execute(photo[:, :, :64], defocus, "8")

    make = nodes["BokehStackFromImages"].execute
    (stack, *_) = make(photo, frames, k_values="3, 4").args
    assert stack.k.tolist() == [3, 4] and not stack.per_dioptre and torch.equal(stack.frames, frames.movedim(-1, 1))
    (lens,) = nodes["BokehLens"].execute("real lens", 24.0, 1.8, 50.0, "full frame", False, 36.0, 2.0).args
    (stack, *_) = make(photo, frames, k_from="f-numbers", f_numbers="4, 2", lens=lens).args
    assert stack.per_dioptre and stack.k[1] == pytest.approx(2 * stack.k[0])
    assert float(stack.k[1]) == pytest.approx(50**2 / (2 * 2 * (1 - 0.05 / 2)) / 1000 * 512 / 36, rel=1e-5)
    with pytest.raises(ValueError, match="needs a real lens"):
        make(photo, frames, k_from="f-numbers", f_numbers="4, 2")
    with pytest.raises(ValueError, match="No photo is named"):
        make(photo, frames, k_from="EXIF")

    with pytest.raises(ValueError, match=r"No adapter file is installed: put bokeh_lora.bin"):
        nodes["BokehStackAdapter"].execute(None)


def test_k_from_exif(nodes, scene, tmp_path, monkeypatch):
    import sys

    from PIL import Image

    image, _ = scene
    photo = image.movedim(0, -1)[None]
    for i, number in enumerate((4.0, 2.0)):
        picture = Image.new("RGB", (96, 64))
        exif = picture.getexif()
        exif.get_ifd(0x8769).update({0x829D: number, 0x920A: 50.0, 0xA405: 50})  # FNumber, FocalLength, FocalLengthIn35mmFilm
        picture.save(tmp_path / f"{i}.jpg", exif=exif)
    monkeypatch.setattr(sys.modules["folder_paths"], "get_input_directory", lambda: str(tmp_path), raising=False)
    make = nodes["BokehStackFromImages"].execute
    (stack, *_) = make(photo, photo.repeat(2, 1, 1, 1), k_from="EXIF", photos="0.jpg\n1.jpg\n", focus_distance=2.0).args
    sensor = 43.27 / (1 + (64 / 96) ** 2) ** 0.5
    expected = [50**2 / (2 * n * (1 - 0.05 / 2)) / 1000 * 512 / sensor for n in (4, 2)]
    assert stack.k.tolist() == pytest.approx(expected, rel=1e-4)
    for name in ("../secret.jpg", "/etc/hostname", "no.jpg", "."):
        with pytest.raises(ValueError, match="There is no"):
            make(photo, photo, k_from="EXIF", photos=name)


def test_blocks_that_were_replaced_are_noticed(nodes):
    """A model whose blocks never run their layers, as engines and fused kernels leave it."""
    import importlib
    import sys
    from types import SimpleNamespace

    from ..stand_ins import kontext_stack as stand_ins
    from .test_kontext_stack import BLOCKS, WIDTH, FluxLike

    flux = importlib.import_module(nodes["BokehStackAdapter"].__module__.replace(".stack", ".flux"))
    core = sys.modules[flux.build_corrections.__module__]
    adapter = core.build_adapter(stand_ins.adapter(WIDTH, BLOCKS), "file")
    attached = flux.Attached(adapter, core.build_corrections(adapter), [10.0])
    network = FluxLike()
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=network))
    x = torch.ones(2, 16, 4, 4)

    class Executor:
        class_obj = network

        def __init__(self, forward):
            self.forward = forward

        def __call__(self, *args, **keywords):
            return self.forward()

    def forward():
        hooks = attached._hooks[network]
        assert hooks.vectors[0].shape == (2, WIDTH)
        return network.double_blocks[0].img_attn.qkv(torch.ones(2, 3, WIDTH))

    with pytest.raises(ValueError, match="replaced the attention blocks"):
        attached.run(Executor(lambda: 0), x)  # never injected
    attached.inject(patcher)
    with pytest.raises(ValueError, match="replaced the attention blocks"):
        attached.run(Executor(lambda: 0), x, {})
    attached.run(Executor(forward), x, 1.0, {flux.OPTION: ([5.0, 10.0], "float32")})
    attached.run(Executor(forward), x, transformer_options={})
    assert attached._hooks[network].vectors is None
    attached.run(Executor(lambda: 0), x)  # a cache may skip all blocks later on
    attached.eject(patcher)
    attached.eject(patcher)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
