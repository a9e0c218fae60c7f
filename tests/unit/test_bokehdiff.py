"""BokehDiff's files and its sampler, with tiny stand-ins and with the shapes of the real files on the meta device."""

import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bokeh_core.checkpoints.lora import lora_pairs
from bokeh_core.checkpoints.stable_diffusion import unet_config
from bokeh_core.errors import BokehError
from bokeh_core.optics.defocus import Defocus, make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.bokehdiff import checkpoint, sampler
from bokeh_core.samplers.bokehdiff.checkpoint import LORA_FILE, VAE_FILE, load_bokehdiff, read_bokehdiff
from bokeh_core.samplers.bokehdiff.network import build_unet, token_grid
from bokeh_core.samplers.bokehdiff.sampler import AS_PUBLISHED, BEST, render
from tests.stand_ins import bokehdiff as stand_in

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "bokehdiff"
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """folder, single, lora, vae: paths of the stand-in's files."""
    root = tmp_path_factory.mktemp("models")
    stand_in.write_all(root / "checkpoints", root / "diffusers", root / "loras", root / "vae")
    return SimpleNamespace(
        folder=root / "diffusers" / "tiny_sdxl",
        single=root / "checkpoints" / "tiny_sdxl.safetensors",
        lora=root / "loras" / LORA_FILE,
        vae=root / "vae" / VAE_FILE,
    )


@pytest.fixture(scope="module")
def model(files):
    return load_bokehdiff(files.folder, files.lora, files.vae)


@pytest.fixture(scope="module")
def full_size():
    """The real UNet's tensors, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**stand_in.UNET, **SDXL})
    tensors = unet.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == 2_567_463_684
    return tensors


def manifest(name):
    path = REFERENCE / f"keys_{name}.json"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the repository")
    listed = json.loads(path.read_text())
    listed = listed.get("keys", listed.get("tensors")) if isinstance(listed, dict) else listed
    return {name: torch.empty(shape, dtype=getattr(torch, kind.removeprefix("torch.")), device="meta") for name, shape, kind in listed}


def photo(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(batch, 4, 6, 6, generator=generator)
    maps = F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)
    return maps[:, :3], maps[:, 3]


def blurry(disparity, strength=300.0, focus=0.4):
    return make_defocus(disparity, Lens(strength=strength), focus, width=disparity.shape[-1], disparity_range=1.0)


# --- files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [("pytorch_lora_weights", 788), ("pytorch_lora_weights_alt_no_up_blocks", 378)])
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_released_lora_fits_the_real_unet(full_size, name, layers, prefix):
    listed = manifest(name)
    pairs = lora_pairs(listed)
    assert len(pairs) == layers == len(listed) // 2
    covered = {one for one in checkpoint.lora_targets(full_size) if layers == 788 or not one.startswith("up_blocks")}
    assert pairs.keys() == covered
    merged = checkpoint.merge(full_size, {prefix + key: tensor for key, tensor in listed.items()}, "file")
    changed = {key for key in full_size if merged[key] is not full_size[key]}
    assert changed == {f"{one}.weight" for one in pairs}
    build_unet({**stand_in.UNET, **SDXL}, merged)
    assert unet_config(merged)["transformer_layers_per_block"] == [1, 2, 10]


def test_vae_ckpt_fits_the_real_vae():
    from diffusers import AutoencoderKL

    config = {**stand_in.VAE, "block_out_channels": [128, 256, 512, 512]}
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config).state_dict()
    listed = manifest("vae_ckpt")
    assert len(listed) == 30 and len(vae) == 248
    for trained in (listed, vae):
        replaced = checkpoint.replace_encoder(vae, trained, "vae.ckpt")
        assert replaced.keys() == vae.keys() and all(replaced[name].shape == vae[name].shape for name in vae)
    assert {name for name in vae if name.startswith(checkpoint.TRAINED_VAE)} == listed.keys()


def test_folder_and_single_file_give_the_same_weights(files):
    folder, single = (read_bokehdiff(base, files.lora, files.vae) for base in (files.folder, files.single))
    for a, b in ((folder.unet, single.unet), (folder.vae, single.vae)):
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        assert all(a.config.get(key) == value for key, value in b.config.items())
    assert torch.equal(folder.text, single.text) and torch.equal(folder.pooled, single.pooled)
    assert folder.text.shape == (1, 77, 128) and folder.pooled.shape == (1, 64)


def test_merged_convolution_is_the_adapted_one(files):
    """The definition of a convolutional LoRA, run as two convolutions beside the base, against the merged kernel."""
    base = load_file(files.folder / "unet" / "diffusion_pytorch_model.safetensors")
    pairs, merged = lora_pairs(load_file(files.lora)), read_bokehdiff(files.folder, files.lora, files.vae).unet.tensors
    for module, stride in (("down_blocks.1.resnets.0.conv1", 1), ("down_blocks.0.downsamplers.0.conv", 2)):
        down, up = pairs[module]
        x = torch.randn(1, down.shape[1], 8, 8)
        plain = F.conv2d(x, base[f"{module}.weight"], stride=stride, padding=1)
        adapted = plain + F.conv2d(F.conv2d(x, down, stride=stride, padding=1), up)
        assert torch.allclose(F.conv2d(x, merged[f"{module}.weight"], stride=stride, padding=1), adapted, atol=1e-4)
    assert torch.equal(base["conv_in.weight"], merged["conv_in.weight"])


def test_half_precision_base_keeps_the_trained_encoder_exact(files, tmp_path):
    tensors = {name: tensor.half() for name, tensor in load_file(files.single).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    weights = read_bokehdiff(tmp_path / "half.safetensors", files.lora, files.vae)
    trained = torch.load(files.vae, weights_only=True)
    assert all(torch.equal(weights.vae.tensors[name], tensor) for name, tensor in trained.items())
    assert {tensor.dtype for tensor in weights.vae.tensors.values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights.unet.tensors.values()} == {torch.float16}


def spoiled(tensors, how):
    names = sorted(tensors)
    if how == "half a pair":
        return {name: tensors[name] for name in names[1:]}
    if how == "a layer missing":
        return {name: tensors[name] for name in names if "down_blocks.1.resnets.0.conv1" not in name}
    if how == "attention only":
        return {name: tensors[name] for name in names if ".attn" in name}
    if how == "up blocks only":
        return {name: tensors[name] for name in names if name.startswith("up_blocks")}
    if how == "a foreign layer":
        return tensors | {f"conv_in.lora_{side}.weight": torch.zeros(8, 8) for side in "AB"}
    return {f"lora_unet_{name.replace('.', '_')}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("how", ["half a pair", "a layer missing", "attention only", "up blocks only", "a foreign layer", "kohya"])
def test_wrong_lora_is_refused(files, how):
    unet = load_file(files.folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BokehError, match=r"mine\.safetensors is not BokehDiff's LoRA.*Get pytorch_lora_weights.*models/loras"):
        checkpoint.merge(unet, spoiled(load_file(files.lora), how), "mine.safetensors")


def test_wrong_files_are_refused(files, tmp_path):
    vae = load_file(files.folder / "vae" / "diffusion_pytorch_model.safetensors")
    trained = torch.load(files.vae, weights_only=True)
    for wrong in (trained | {"extra": torch.zeros(1)}, dict(list(trained.items())[1:]), load_file(files.lora)):
        with pytest.raises(BokehError, match=r"is not BokehDiff's vae\.ckpt.*models/vae"):
            checkpoint.replace_encoder(vae, wrong, "other.ckpt")
    with pytest.raises(BokehError, match="holds no Stable Diffusion UNet"):
        read_bokehdiff(files.lora, files.lora, files.vae)
    alone = {name: tensor for name, tensor in load_file(files.single).items() if name.startswith(("model.diff", "first_stage"))}
    save_file(alone, tmp_path / "unet_only.safetensors")
    with pytest.raises(BokehError, match=r"no SDXL text encoders.*full SDXL checkpoint"):
        read_bokehdiff(tmp_path / "unet_only.safetensors", files.lora, files.vae)


def test_report_says_which_variant_a_file_is(files):
    lora, trained = load_file(files.lora), torch.load(files.vae, weights_only=True)
    found = checkpoint.report(lora, files.lora)
    assert found.title == "BokehDiff's LoRA" and not found.problems
    assert dict(found.facts)["rank"] == "8" and dict(found.facts)["names"] == "without the prefix unet."
    assert "the whole UNet" in dict(checkpoint.report(manifest("pytorch_lora_weights"), files.lora).facts)["adapted layers"]
    assert checkpoint.report(spoiled(lora, "attention only"), files.lora).problems
    assert checkpoint.report(trained, files.vae).title == "BokehDiff's VAE encoder"
    assert checkpoint.report({"some.weight": torch.zeros(1)}, files.vae) is None


# --- sampler ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(97, 131), (8, 260), (64, 64), (33, 5)])
@pytest.mark.parametrize("fidelity", [BEST, AS_PUBLISHED], ids=["best", "as published"])
def test_size_is_kept(model, height, width, fidelity):
    image, disparity = photo(height, width)
    before = image.clone(), disparity.clone()
    result = render(model, image, blurry(disparity), fidelity=fidelity)
    assert result.shape == image.shape and result.isfinite().all() and 0 <= result.min() and result.max() <= 1
    assert torch.equal(image, before[0]) and torch.equal(disparity, before[1])


def test_frames_follow_their_own_focus_and_k(model):
    image, disparity = photo(64, 96, batch=3)
    k, focus = torch.tensor([200.0, 0.0, 200.0]), torch.tensor([0.1, 0.5, 0.9])
    defocus = Defocus(disparity, focus, k, Lens(), metric=False)
    result = render(model, image, defocus)
    assert torch.equal(result[1], image[1])  # bit for bit
    for i in (0, 2):
        assert torch.equal(result[i], render(model, image[i : i + 1], defocus.frame(i))[0])
    one = render(model, image[:1], defocus)
    assert one.shape[0] == 3 and not torch.equal(one[0], one[2])
    with pytest.raises(BokehError, match="3 pictures and 2 frames"):
        render(model, image, Defocus(disparity[:2], focus[:2], k[:2], Lens(), False))


def test_noise_is_seeded_and_only_as_published(model):
    image, disparity = photo(64, 64)
    runs = [render(model, image, blurry(disparity), fidelity=AS_PUBLISHED, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal((runs[0] * 255).round() / 255, runs[0])  # 8 bits
    assert torch.equal(*(render(model, image, blurry(disparity), seed=seed) for seed in (1, 2)))


def test_blur_strength_reaches_the_network(model):
    image, disparity = photo(128, 128)
    results = [render(model, image, blurry(disparity, strength)) for strength in (40, 800, 4000)]
    assert len({float(result.sum()) for result in results}) == 3


def test_condition_is_in_pixels_whatever_the_size():
    image, disparity = photo(100, 200)
    defocus = blurry(disparity, strength=60)
    one = sampler.condition(image, defocus, BEST, (0.0, 1.0))
    assert one.pixels.shape[-2:] == (128, 224)
    assert torch.allclose(one.defocus[0, 0, :100, :200], defocus.signed_radius()[0].abs(), atol=1e-4)
    assert torch.equal(one.disparity[0, 0, 100:, :200], one.disparity[0, 0, :100, :200].flip(0)[:28])
    metric = Defocus(disparity * 3 + 1, defocus.focus * 3 + 1, defocus.k / 3, Lens(), metric=True)
    again = sampler.condition(image, metric, BEST, (float(metric.disparity.min()), float(metric.disparity.max())))
    assert torch.allclose(again.defocus, one.defocus, atol=1e-4)
    published = sampler.condition(image, defocus, AS_PUBLISHED, (0.0, 1.0))
    assert published.pixels.shape[-2:] == (104, 200)
    turned = sampler.condition(image, defocus, replace(AS_PUBLISHED, far_is_one=False), (0.0, 1.0))
    assert torch.allclose(turned.disparity, 1 - published.disparity, atol=1e-6) and torch.equal(turned.defocus, published.defocus)


@pytest.mark.parametrize(("whole_side", "expected"), [((512, 512), 1.0), ((256, 256), 2.0), ((1024, 1024), 1.0), ((512, 1024), 2**-0.5)])
def test_published_units_stretch_with_what_is_processed_at_once(monkeypatch, whole_side, expected):
    """A picture below two tiles goes in one piece, where 51.2 units span its side: K must follow to keep the same blur."""
    height, width = whole_side
    seen = []
    unet = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    fake = SimpleNamespace(unet=unet, text=torch.zeros(1), pooled=torch.zeros(1))
    unet.network = lambda latents, *_: latents
    monkeypatch.setattr(sampler, "scene_blocks", lambda scene, *_: seen.append(scene.radius.max()))
    one = sampler.Condition(None, torch.zeros(1, 1, height, width), torch.full((1, 1, height, width), 30.0), whole_side)
    for fidelity, factor in ((AS_PUBLISHED, expected), (BEST, 1.0)):
        seen.clear()
        sampler.bokeh_latents(fake, torch.zeros(1, 4, height // 8, width // 8), one, fidelity)
        assert float(seen[0]) == pytest.approx(3.0 * factor, rel=1e-5)


def test_tiles_cover_everything_and_agree_with_the_whole():
    for side in (16, 32, 64):
        for length in (*range(1, 200, 7), 64, 65, 111, 112, 113):
            first = sampler.starts(length, side)
            assert first[0] == 0 and first[-1] + min(side, length) == length
            assert all(b - a <= side * 3 // 4 for a, b in pairwise(first))
    assert sampler.starts(64, 64) == [0]
    assert sampler.starts(192, 64) == [0, 42, 85, 128] and sampler.starts(128, 64) == [0, 32, 64]

    class Local(torch.nn.Module):
        def forward(self, latents, *_):
            return 0.3 * latents + 1

    unet = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, network=Local())
    fake = SimpleNamespace(unet=unet, text=torch.zeros(1), pooled=torch.zeros(1))
    latents = torch.randn(1, 4, 40, 75)
    noise = sampler.predict_noise(fake, latents, torch.zeros(1, 2, 320, 600), BEST, side=16)
    assert torch.allclose(noise, 0.3 * latents + 1, atol=1e-6)


def test_token_grid_is_that_of_the_unet(model):
    """Odd latents, where the published code breaks."""
    seen = []
    block = model.unet.network.unet.down_blocks[1].attentions[0]
    hook = block.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    try:
        for size in ((104, 72), (64, 64), (72, 136)):
            image, disparity = photo(*size)
            render(model, image, blurry(disparity), fidelity=AS_PUBLISHED)
            assert seen.pop() == token_grid(size[0] // 8, size[1] // 8)
    finally:
        hook.remove()


def test_progress_moves_at_every_tile_and_may_interrupt(model):
    image, disparity = photo(128, 192, batch=2)
    told = []
    render(model, image, blurry(disparity), tile=64, progress=lambda done, total: told.append((done, total)))
    shares = [done / total for done, total in told]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and {total for _, total in told} == {6}
    assert len(told) > 20

    class Stop(Exception):
        pass

    for limit in (1, 5, len(told) - 2):
        calls = []

        def stop(done, total, calls=calls, limit=limit):
            calls.append(done)
            if len(calls) >= limit:
                raise Stop

        with pytest.raises(Stop):
            render(model, image, blurry(disparity), tile=64, progress=stop)
        assert len(calls) == limit
    for half in (model.vae.network.encoder, model.vae.network.decoder):
        assert not half._forward_pre_hooks
    assert model.unet.network.processor.blocks == []


def test_memory_runs_out_once(model):
    """After a failure the smaller size is kept for the frames that follow."""
    image, disparity = photo(128, 128, batch=3)
    sizes, loaded = [], []

    def shrinking(work, size, smallest):
        assert smallest <= 128
        sizes.append(size)
        if size > 64:
            sizes.append(size // 2)
            return work(size // 2)
        return work(size)

    result = render(
        model, image, blurry(disparity), tile=128, shrinking=shrinking, load=lambda networks, size: loaded.append((*networks, size))
    )
    assert sizes == [128, 64, 64, 64, 128, 64, 64, 64, 64, 64, 64]
    assert torch.equal(result, render(model, image, blurry(disparity), tile=64))
    assert [placed for placed, _ in loaded] == [model.vae, model.unet, model.vae] and all(size > 0 for _, size in loaded)


def test_bfloat16_stays_near(files, model):
    half = load_bokehdiff(files.folder, files.lora, files.vae, dtype=torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16
    image, disparity = photo(64, 96)
    a, b = (render(one, image, blurry(disparity)) for one in (model, half))
    assert (a - b).abs().mean() < 0.1 * a.std()
    assert load_bokehdiff(files.folder, files.lora, files.vae, dtype=torch.float16).vae.dtype == torch.float32


# --- nodes, on a stand-in host ---------------------------------------------------------------------------------------------------------


def test_nodes_load_and_render(nodes, files, tmp_path, loads, bar):
    models = tmp_path / "models"
    shutil.copytree(files.single.parents[1], models)
    for folder in ("checkpoints", "vae"):  # every ComfyUI has them
        sys.modules["folder_paths"].add_model_folder_path(folder, str(models / folder))
    load, blur = nodes["BokehLoadBokehDiff"], nodes["BokehDiffRender"]
    (model,) = load.execute("tiny_sdxl.safetensors", LORA_FILE, VAE_FILE).args
    (again,) = load.execute("tiny_sdxl", LORA_FILE, VAE_FILE).args
    unet, vae = (model.networks[name].patcher for name in ("unet", "vae"))
    assert model.patcher is unet and model.get_models() == [unet, vae]
    pixels, disparity = photo(70, 90, batch=2)
    image = torch.cat([pixels, disparity[:, None]], 1).movedim(1, -1)
    defocus = blurry(disparity)
    (result,) = blur.execute(image, model, defocus, "best").args
    assert result.shape == image.shape and torch.equal(result[..., 3], image[..., 3])
    assert loads == [[vae], [unet], [vae]] and bar[-1][0] == bar[-1][1]
    assert torch.allclose(blur.execute(image, again, defocus, "best").args[0], result, atol=1e-4)
    with pytest.raises(Exception, match="2 frames and the defocus 3"):
        blur.execute(image, model, blurry(disparity[:1].repeat(3, 1, 1)), "best")
    with pytest.raises(Exception, match="5 channels"):
        blur.execute(image[..., :1].repeat(1, 1, 1, 5), model, defocus, "best")
    for given, words in ((("gone", LORA_FILE, VAE_FILE), "no base model 'gone'"), ((), "No base model is installed.*models/checkpoints")):
        with pytest.raises(Exception, match=words):
            load.execute(*given)
    with pytest.raises(Exception, match=f"No BokehDiff encoder is installed: put {VAE_FILE} from https://huggingface.co"):
        load.execute("tiny_sdxl", LORA_FILE, None)
