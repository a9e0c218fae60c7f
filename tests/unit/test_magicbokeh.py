"""MagicBokeh: focus-aware attention, patches, colours, the manifests of the real files, and the whole path on a tiny model."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bokeh_core.checkpoints.stable_diffusion import Part
from bokeh_core.errors import BokehError
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.renderers_cli import _shrinking
from bokeh_core.samplers.colour_fix import adain, mean_fix, wavelet_fix, wavelet_parts
from bokeh_core.samplers.magicbokeh import sampler
from bokeh_core.samplers.magicbokeh.checkpoint import DROPPED, MagicBokeh, Placed, blueprints, load_magicbokeh, read_blueprints
from bokeh_core.samplers.magicbokeh.focus_aware_attention import dense_masked_attention, part, split_masked_attention, token_mask
from bokeh_core.samplers.magicbokeh.lora_file import MagicBokehFile
from bokeh_core.samplers.magicbokeh.patches import PATCH, box_window, grid, reflected, tiles, window
from bokeh_core.tiling import Blend
from tests.stand_ins import magicbokeh as stand_ins

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "magicbokeh"
DATA = REFERENCE.parents[1] / "data" / "magicbokeh_test"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders with the stand-in base and MagicBokeh file."""
    folder = tmp_path_factory.mktemp("magicbokeh")
    return stand_ins.write_base(folder / "base"), stand_ins.write_converted(folder / "magicbokeh.safetensors")


@pytest.fixture(scope="module")
def model(files):
    return load_magicbokeh(*files)


class Pooled(torch.nn.Module):
    """In place of the encoder: the mean colour of each cell, three of four channels, with a posterior of deviation 1."""

    def forward(self, picture):
        mean = F.pad(F.avg_pool2d(picture, 8), (0, 0, 0, 0, 0, 1))
        return mean, torch.zeros_like(mean)


class Given(torch.nn.Module):
    """In place of the ControlNet: the condition at the latent's size, in place of all corrections."""

    def forward(self, latent, condition):
        return [F.avg_pool2d(condition[:, :1], 8)]


class Shifted(torch.nn.Module):
    """In place of the UNet: the eps that makes x0 = z + 0.1 (2 D - 1) in every channel."""

    def forward(self, latent, corrections, regions):
        a = sampler.alphas_cumprod()[999]
        return (latent - a.sqrt() * (latent + 0.1 * corrections[0])) / (1 - a).sqrt()


class Enlarged(torch.nn.Module):
    """In place of the decoder."""

    def forward(self, latent):
        return F.interpolate(latent[:, :3], scale_factor=8, mode="nearest")


@pytest.fixture
def plain():
    """A model whose result is known: the photo in cells of 8 px, plus D."""
    parts = [Placed(part(), torch.device("cpu"), torch.float32) for part in (Pooled, Given, Shifted, Enlarged)]
    return MagicBokeh(*parts)


def known_result(photo, defocus):
    """What `plain` makes of a photo [1, 3, H, W] with sides in whole cells, before the colour fix."""
    d = F.avg_pool2d(defocus.signed_radius().abs()[:, None] / 32, 8)
    cells = (F.avg_pool2d(photo, 8) * 2 - 1 + 0.1 / 0.18215 * (2 * d - 1)).clamp(-1, 1) * 0.5 + 0.5
    return F.interpolate(cells, scale_factor=8, mode="nearest")


@pytest.fixture
def photo():
    """[1, 3, 96, 128], smooth colours."""
    small = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(3))
    return F.interpolate(small, size=(96, 128), mode="bicubic").clamp(0, 1)


def ramp(height, width, k=24.0, focus=0.3, frames=1):
    disparity = torch.linspace(0, 1, width).expand(frames, height, width).contiguous()
    return Defocus(disparity, torch.full((frames,), focus), torch.full((frames,), k), Lens(), False)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


# attention


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_the_regions_by_themselves_equal_the_dense_definition(share):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 60, 16, generator=generator) * 2 for _ in range(3))
    mask = (torch.rand(3, 60, generator=generator) < share).float()
    mask[1] = 1  # one picture of the batch is all in focus
    found = split_masked_attention(q, k, v, part(mask))
    assert torch.allclose(found, dense_masked_attention(q, k, v, mask), atol=1e-5)


def test_regions_do_not_see_each_other_and_batches_keep_their_masks():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, 40, 8, generator=generator) for _ in range(3))
    mask = torch.zeros(2, 40)
    mask[0, :10], mask[1, 30:] = 1, 1
    found = split_masked_attention(q, k, v, part(mask))
    other = v.clone()
    other[0, :, :10] += 5  # what is in focus in the first picture
    changed = (split_masked_attention(q, k, other, part(mask)) - found).abs().amax((1, 3))
    assert (changed[0, :10] > 1).all() and (changed[0, 10:] == 0).all() and (changed[1] == 0).all()


def test_the_focus_mask_takes_the_top_left_pixel_of_each_cell():
    mask = (torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    assert torch.equal(token_mask(mask, 8, 12), mask[:, ::8, ::8].flatten(1))
    assert torch.equal(token_mask(mask, 4, 6), mask[:, ::16, ::16].flatten(1))


def test_thresholding_is_done_in_float32():
    """Disparity levels and K whose product is 0.1 in exact arithmetic (SPEC section 5): the last bit of float32 decides, as published."""
    for k, level in ((4, 204), (8, 102), (16, 51), (17, 48), (34, 24), (51, 16)):
        disparity = torch.zeros(1, 4, 4)
        disparity[:, 2:] = level / 255 + 1e-4
        conditions = sampler.Conditions(
            Defocus(disparity, torch.zeros(1), torch.tensor([float(k)]), Lens(), False), None, sampler.AS_PUBLISHED
        )
        d = conditions.frame(0)
        expected = (torch.tensor(level / 255, dtype=torch.float32) - torch.tensor(0.0)).abs() * (k / 32)
        assert float(d[3, 3]) == float(expected)
        assert float(sampler.in_focus(d)[3, 3]) == float(expected <= torch.tensor(0.1))


# patches


@pytest.mark.parametrize("size", [(512, 512), (512, 513), (600, 700), (1024, 1562), (1080, 1920), (513, 1500)])
def test_patches_cover_everything_and_blend_to_what_they_show(size):
    height, width = size
    picture = torch.rand(1, height, width, generator=torch.Generator().manual_seed(4))
    blend = Blend((1, height, width))
    for row, column in grid(height, width):
        blend.add(picture[:, row : row + PATCH, column : column + PATCH], row, column, window(row, column, height, width))
    assert float(blend.weight.min()) > 0
    assert torch.allclose(blend.result(), picture, atol=1e-5)


def test_the_published_number_of_patches():
    assert [len(grid(*size)) for size in ((1024, 1562), (1080, 1920), (3024, 4032), (512, 512))] == [18, 28, 165, 1]


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (129, 300)])
@pytest.mark.parametrize("side", [32, 64, 128])
def test_large_tiles_blend_to_what_they_show(size, side):
    picture = torch.rand(1, *size, generator=torch.Generator().manual_seed(5))
    blend = Blend((1, *size))
    for _, box in tiles(*size, side, 16):
        blend.add(picture[(slice(None), *box)], box[0].start, box[1].start, box_window(box, *size, 16))
    assert float(blend.weight.min()) > 0
    assert torch.allclose(blend.result(), picture, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 100, 300, 511])
def test_small_sides_are_mirrored(size):
    indices, start = reflected(size, 512)
    assert len(indices) == 512 and indices[start : start + size].tolist() == list(range(size))
    if size > 200:  # one mirror is enough: torch's own
        expected = F.pad(torch.arange(size, dtype=torch.float32)[None], (start, 512 - size - start), mode="reflect")[0]
        assert torch.equal(indices.float(), expected)
    assert int(indices.min()) >= 0 and int(indices.max()) == size - 1
    assert (indices.diff().abs() <= 1).all()


def test_one_step_against_diffusers():
    from diffusers import DDPMScheduler

    z, eps = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (6, 7))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    theirs = scheduler.step(eps, 999, z).pred_original_sample
    assert torch.allclose(sampler.one_step(z, eps), theirs, atol=1e-4)
    half = sampler.one_step(z.half(), eps.half())
    assert half.dtype == torch.float32 and torch.equal(half, sampler.one_step(z.half().float(), eps.half().float()))


# colours


def test_adain_weighted_by_a_part_is_adain_of_that_part():
    generator = torch.Generator().manual_seed(8)
    picture, photo = torch.rand(3, 20, 30, generator=generator), torch.rand(3, 20, 30, generator=generator) * 0.5
    weight = torch.zeros(20, 30)
    weight[:, :12] = 1
    assert torch.allclose(adain(picture, photo, weight)[..., :12], adain(picture[..., :12], photo[..., :12]), atol=1e-5)


def test_wavelet_parts_make_the_picture_and_the_fix_takes_the_photos_colours():
    picture = torch.rand(1, 3, 80, 90, generator=torch.Generator().manual_seed(9))
    high, low = wavelet_parts(picture)
    assert torch.allclose(high + low, picture, atol=1e-6)
    shifted = picture * 0.8 + 0.1
    assert (wavelet_fix(shifted, picture).mean() - picture.mean()).abs() < 1e-3
    assert torch.allclose(mean_fix(shifted, picture).mean((-2, -1)), picture.mean((-2, -1)), atol=1e-6)


def test_judging_colours_by_what_is_sharp_leaves_blur_soft():
    """A render that is the photo where it is in focus and a smooth blur of it elsewhere, with a colour cast over all."""
    photo = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(10))
    soft = F.avg_pool2d(photo[None], 31, 1, 15, count_include_pad=False)[0]
    d = torch.zeros(128, 128)
    d[:, 64:] = 0.7
    truth = torch.where(d > 0.1, soft, photo)
    cast = truth * 0.9 + 0.06
    error = {fix: float((sampler.match_colours(cast, photo, d, fix, sampler.BEST) - truth).abs().mean()) for fix in sampler.COLOUR_FIXES}
    assert error["in-focus parts"] < 0.002
    assert error["in-focus parts"] < 0.1 * min(error["whole picture"], error["none"])
    everywhere = sampler.match_colours(cast, photo, torch.full_like(d, 0.7), "in-focus parts", sampler.BEST)
    assert torch.allclose(everywhere.mean((-2, -1)), photo.mean((-2, -1)), atol=5e-3)  # nothing sharp: means alone


@pytest.mark.skipif(not DATA.is_dir(), reason="NO REFERENCE DATA: ../shared/data/magicbokeh_test is not beside the repository")
def test_colour_statistics_of_the_published_example():
    """README of the data: std of output and input within 6e-4, means 0.0014 to 0.0020 lower (AdaIN, truncated). Any render will do."""
    import numpy as np
    from PIL import Image

    def read(name):
        return torch.from_numpy(np.asarray(Image.open(DATA / name).convert("RGB")).copy()).movedim(-1, 0).float() / 255

    photo, theirs = read("inputs/EBB_LR_1321.png"), read("output/EBB_LR_1321.png")
    render = F.avg_pool2d(photo[None], 15, 1, 7, count_include_pad=False)[0] * 0.8 + 0.15
    ours = sampler.match_colours(render, photo, torch.zeros(photo.shape[1:]), "in-focus parts", sampler.AS_PUBLISHED)
    assert theirs.shape == ours.shape == photo.shape
    for result in (ours, theirs):
        assert torch.equal((result * 255).round() / 255, result)
        lower = photo.mean((1, 2)) - result.mean((1, 2))
        assert (lower > 0.0013).all() and (lower < 0.0021).all(), lower
        assert ((result.std((1, 2)) - photo.std((1, 2))).abs() < 7e-4).all()


# files


def manifest(name, **ranks):
    path = REFERENCE / f"keys_{name}.json"
    if not path.is_file():
        if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
            pytest.fail(f"THE MANIFESTS ARE MISSING: no {path}")
        pytest.skip(f"NO MANIFESTS: no {path.name} beside the repository")
    return {
        key: torch.empty([ranks.get(size, size) for size in shape], dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in json.loads(path.read_text())
    }


SD21 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 64,
}
SD21_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def real_size(unet_rank, vae_rank, bokeh_rank):
    """All files of the manifests, without memory."""
    ranks = {"rank_unet": unet_rank, "rank_vae": vae_rank, "rank_bokeh": bokeh_rank}
    kept, dropped = manifest("sd21base_unet_kept"), manifest("sd21base_unet_dropped")
    tables = [manifest(f"lora_pkl_{name}", **ranks) for name in ("state_dict_unet", "state_dict_vae", "processor_state_dict", "controlnet")]
    own = MagicBokehFile(unet_rank, vae_rank, bokeh_rank, *tables, {}, [], [])
    return kept, dropped, manifest("sd21base_vae"), own


@pytest.mark.parametrize("ranks", [(4, 4, 128), (8, 16, 64)])
def test_manifests_fit_at_full_size(ranks):
    kept, dropped, vae, own = real_size(*ranks)
    assert len(kept) == 535 and len(dropped) == 151
    assert all(DROPPED.match(name) for name in dropped) and not any(DROPPED.match(name) for name in kept)
    parts = blueprints(Part(kept | dropped, SD21), Part(vae, SD21_VAE), own)
    count = {}
    for name, blueprint in parts.items():
        network = blueprint.build(torch.nn, blueprint.tensors)  # strict: missing, unexpected and other shapes raise
        assert network.state_dict().keys() == blueprint.tensors.keys()
        count[name] = sum(p.numel() for p in network.parameters())
    assert count["unet"] == 723_742_084 + 53_760 * ranks[2]
    assert count["controlnet"] == 247_105_040
    assert count["encoder"] + count["decoder"] == 83_653_863


@pytest.mark.parametrize("table", ["unet", "vae", "processors", "controlnet", "base"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_tensor_too_few_too_many_or_of_another_shape_is_refused(table, change):
    kept, dropped, vae, own = real_size(4, 4, 8)
    tables = {"unet": own.unet, "vae": own.vae, "processors": own.processors, "controlnet": own.controlnet, "base": kept}
    names = tables[table]
    name = sorted(names)[-1]
    if change == "missing":
        del names[name]
    elif change == "unexpected":
        names["up_blocks.9.lora_A.default.weight" if table in ("unet", "vae") else "one.more.weight"] = names[name]
    else:
        names[name] = torch.empty(*names[name].shape[:-1], names[name].shape[-1] + 1, device="meta")
    with pytest.raises(BokehError):
        parts = blueprints(Part(kept | dropped, SD21), Part(vae, SD21_VAE), own)
        for blueprint in parts.values():
            blueprint.build(torch.nn, blueprint.tensors)


def test_other_base_models_are_refused(files, tmp_path):
    kept, dropped, vae, own = real_size(4, 4, 8)
    for config in ({**SD21, "use_linear_projection": False}, {**SD21, "addition_embed_type": "text_time"}):
        with pytest.raises(BokehError, match=r"2\.1-base"):
            blueprints(Part(kept | dropped, config), Part(vae, SD21_VAE), own, "other.safetensors")
    (tmp_path / "v").symlink_to(files[0])
    folder = tmp_path / "768"
    folder.mkdir()
    for name in ("unet", "vae"):
        (folder / name).symlink_to(files[0] / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(BokehError, match="v_prediction"):
        read_blueprints(folder, files[1])
    with pytest.raises(BokehError, match=r"is not MagicBokeh's file"):
        read_blueprints(files[0], files[0] / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_single_checkpoint_file_serves_as_base(tmp_path):
    wide = {**stand_ins.VAE, "block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32}
    own = stand_ins.write_converted(tmp_path / "own.safetensors", stand_ins.own(vae=wide))
    path = stand_ins.write_single_base(tmp_path / "v2-1_512-ema-pruned.safetensors", wide)
    model = load_magicbokeh(path, own)
    unet, vae = stand_ins.base(vae=wide)
    assert torch.equal(model.decoder.network.decoder.conv_out.weight, vae["decoder.conv_out.weight"])
    norm = "up_blocks.3.attentions.2.transformer_blocks.0.norm3.weight"
    assert torch.equal(model.unet.network.state_dict()[norm], unet[norm])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(15))
    assert float(sampler.predict(model, latents, torch.zeros(1, 64, 64)).std()) > 0.1
    assert model.scaling_factor == 0.18215


def test_released_and_converted_file_are_the_same(files, model, tmp_path):
    base, _ = files
    other = load_magicbokeh(base, stand_ins.write_pickle(tmp_path / "lora.pkl"))
    for name in ("encoder", "controlnet", "unet", "decoder"):
        ours, theirs = getattr(model, name).network.state_dict(), getattr(other, name).network.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# the whole path


@pytest.mark.parametrize("mode", sampler.MODES)
@pytest.mark.parametrize("size", [(512, 512), (520, 776), (640, 1600), (96, 128), (1160, 560)])
def test_patches_and_tiles_come_together_where_they_belong(plain, mode, size):
    """Encode, patch, blend, decode and crop against the same arithmetic on the whole photo."""
    photo = 0.5 + 0.1 * torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(20))
    defocus = ramp(*size, k=20.0)
    found = sampler.render(plain, photo, defocus, mode=mode, colour_fix="none")
    assert torch.allclose(found, known_result(photo, defocus), atol=2e-5)


@pytest.mark.parametrize("mode", sampler.MODES)
def test_any_size_comes_out_the_same_size_and_nothing_is_modified(plain, photo, mode):
    before, told = photo.clone(), []
    result = sampler.render(plain, photo, ramp(96, 128), mode=mode, progress=lambda done, total: told.append((done, total)))
    assert result.shape == photo.shape and torch.equal(photo, before)
    assert float(result.min()) >= 0 and float(result.max()) <= 1 and bool(result.isfinite().all())
    assert told[-1] == (1, 1) and told == sorted(told)
    again = sampler.render(plain, photo, ramp(96, 128), mode=mode, seed=5)
    assert torch.equal(result, again)  # deterministic, and the seed is not used


def test_defocus_focus_and_strength_matter_and_k_0_restores(model, photo):
    def run(defocus, **more):
        return sampler.render(model, photo, defocus, colour_fix="none", **more)

    blurred, other_focus, restored = run(ramp(96, 128)), run(ramp(96, 128, focus=0.9)), run(None)
    assert (blurred - other_focus).abs().max() > 1e-3 and (blurred - restored).abs().max() > 1e-3
    assert torch.equal(run(ramp(96, 128, k=0)), restored)
    assert (restored - photo).abs().mean() > 1e-3  # not the input: it was restored
    subject = torch.zeros(1, 96, 128)
    subject[:, :, -13:-8] = 1  # its disparity is about 0.9
    assert (run(ramp(96, 128), subject=subject) - other_focus).abs().max() < 0.05 * (blurred - other_focus).abs().max()


def test_one_patch_is_the_same_in_both_modes(model):
    small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(11))
    photo = F.interpolate(small, size=(512, 512), mode="bicubic").clamp(0, 1)
    defocus = ramp(512, 512)
    exact, fast = (sampler.render(model, photo, defocus, mode=mode) for mode in sampler.MODES)
    assert torch.allclose(exact, fast, atol=1e-4)


def test_as_published_is_seeded_8_bits_and_has_the_photos_statistics(plain, photo):
    photo = ((0.4 + 0.2 * photo) * 255).round() / 255  # far from black and white, where clamping moves the mean

    def run(seed):
        return sampler.render(plain, photo, ramp(96, 128), fidelity=sampler.AS_PUBLISHED, seed=seed)

    result = run(1)
    assert torch.equal(result, run(1)) and not torch.equal(result, run(2))
    assert torch.equal((result * 255).round() / 255, result)
    assert (result.mean((2, 3)) - photo.mean((2, 3)) < 0).all()


def test_a_batch_is_its_frames(plain, photo):
    frames = torch.cat([photo, photo.flip(-1)])
    defocus = Defocus(ramp(96, 128).disparity, torch.tensor([0.3]), torch.tensor([24.0]), Lens(), False)
    both = sampler.render(plain, frames, defocus)
    assert torch.equal(both[1:], sampler.render(plain, frames[1:], defocus))
    pull = Defocus(defocus.disparity.expand(2, -1, -1), torch.tensor([0.3, 0.8]), torch.tensor([24.0, 24.0]), Lens(), False)
    pulled = sampler.render(plain, photo, pull)
    assert len(pulled) == 2 and torch.equal(pulled[1:], sampler.render(plain, photo, pull.frame(1)))


def test_upscaling_scales_picture_and_blur(plain, photo):
    defocus = ramp(96, 128, k=16.0)
    large = sampler.render(plain, photo, defocus, upscale=1.5)
    assert large.shape == (1, 3, 144, 192)
    d = sampler.Conditions(defocus, None, sampler.BEST, (144, 192)).frame(0)
    assert float(d.max()) == pytest.approx(16 * 1.5 / 32 * 0.7, rel=0.01)
    with pytest.raises(BokehError, match="upscale"):
        sampler.render(plain, photo, defocus, upscale=0.5)


def test_out_of_memory_halves_the_patches_and_finishes(plain, monkeypatch):
    """Two patches at once do not fit; the result is that of one by one."""
    photo = torch.rand(1, 3, 512, 700, generator=torch.Generator().manual_seed(12))
    wanted = sampler.render(plain, photo, ramp(512, 700))
    predict, sizes = sampler.predict, []

    def tight(model, latents, maps):
        sizes.append(len(latents))
        if len(latents) > 1:
            raise torch.OutOfMemoryError("no room")
        return predict(model, latents, maps)

    monkeypatch.setattr(sampler, "predict", tight)
    loads = []
    found = sampler.render(plain, photo, ramp(512, 700), shrinking=_shrinking, load=lambda parts, size: loads.append((len(parts), size)))
    assert sizes == [2, 1, 1]
    assert torch.allclose(found, wanted, atol=1e-4)
    assert [count for count, _ in loads] == [1, 2, 2, 1] and loads[1][1] == 2 * loads[2][1]


def test_interruption_stops_between_patches(plain):
    photo = torch.rand(1, 3, 512, 700, generator=torch.Generator().manual_seed(13))
    told = []

    def stop(done, total):
        told.append(done)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.render(plain, photo, ramp(512, 700), progress=stop)
    assert len(told) == 3 and told[-1] < 0.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": torch.zeros(1, 4, 96, 128)}, "shape"),
        ({"image": torch.full((1, 3, 96, 128), math.nan)}, "not numbers"),
        ({"defocus": ramp(96, 120)}, "make the defocus from this picture"),
        ({"image": torch.zeros(2, 3, 96, 128), "defocus": ramp(96, 128, frames=3)}, "2 pictures but 3 depth maps"),
        ({"subject": torch.zeros(2, 96, 128)}, "subject's mask"),
        ({"mode": "quick"}, "Unknown mode"),
        ({"colour_fix": "magic"}, "colour fix"),
    ],
)
def test_mistakes_are_explained(plain, photo, change, words):
    given = {"image": photo, "defocus": ramp(96, 128)} | change
    with pytest.raises(BokehError, match=words):
        sampler.render(plain, given.pop("image"), given.pop("defocus"), **given)


def test_half_precision_stays_close(files):
    full, half = load_magicbokeh(*files), load_magicbokeh(*files, dtype=torch.float16)
    assert half.unet.dtype == half.controlnet.dtype == torch.float16 and half.encoder.dtype == half.decoder.dtype == torch.float32
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(14))
    maps = ramp(128, 128, frames=2).signed_radius().abs() / 32
    one, other = (sampler.predict(model, latents, maps) for model in (full, half))
    assert other.dtype == torch.float32
    assert (one - other).abs().max() < 0.01 * one.abs().max()


def test_what_a_file_is(files, tmp_path):
    from bokeh_core.models_cli import identify

    pickled = stand_ins.write_pickle(tmp_path / "lora.pkl")
    for path in (files[1], pickled):
        found = identify(path)
        facts = dict(found.facts)
        assert found.title == "MagicBokeh" and facts["rank"].startswith("4 (UNet), 4 (VAE), 8 (bokeh)")
        assert facts["controlnet"].startswith("250 tensors") and "366" in facts["unet"]
        assert any("64 wide; Stable Diffusion 2.1 has 320" in problem for problem in found.problems)
    other = identify(files[0] / "vae" / "diffusion_pytorch_model.safetensors")
    assert other.title != "MagicBokeh"


def test_the_stand_ins_have_the_names_of_the_real_files():
    content, (unet, vae) = stand_ins.own(), stand_ins.base()
    assert unet.keys() == (manifest("sd21base_unet_kept") | manifest("sd21base_unet_dropped")).keys()
    assert vae.keys() == manifest("sd21base_vae").keys()
    for entry in ("state_dict_unet", "state_dict_vae", "processor_state_dict", "controlnet"):
        assert content[entry].keys() == manifest(f"lora_pkl_{entry}", rank_unet=4, rank_vae=4, rank_bokeh=8).keys(), entry
