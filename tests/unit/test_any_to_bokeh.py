"""Any-to-Bokeh: networks against diffusers' and transformers', manifests, files, and the sampler against its plain form."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bokeh_core import cli
from bokeh_core.errors import BokehError
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.optics.published_k import any_to_bokeh_k
from bokeh_core.samplers.any_to_bokeh import checkpoint, image_encoder, mpi, preparation, sampler
from tests.stand_ins import any_to_bokeh as stand_in

MANIFESTS = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "any2bokeh"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp("any_to_bokeh") / "release")


@pytest.fixture(scope="module")
def model(folder):
    return sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(folder)))


@pytest.fixture(scope="module")
def whole_model(folder):
    """With the weights of the visual tokens; the masks are off."""
    return sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(folder, visual=True)))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def clip_of(count, height=64, width=64, seed=0):
    """(pictures, disparities, focus, k) of a clip in which everything changes."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(count, 3, height, width, generator=generator)
    disparities = torch.rand(count, height, width, generator=generator)
    return pictures, disparities, torch.linspace(0.2, 0.8, count), torch.linspace(2.0, 30.0, count)


def frames_of(count, fidelity=sampler.BEST, size=(32, 32)):
    pictures, disparities, focus, k = clip_of(count, *size)
    k = k * size[1] / preparation.PUBLISHED_SIZE[1] if fidelity.fixed_size else k  # K from 2 to 30 in both
    return list(sampler.prepared(pictures, disparities, focus, k, range_=(0, 1), size=size, fidelity=fidelity))


# Networks


@pytest.mark.parametrize("name", ["unet", "vae", "image_encoder"])
def test_manifest_at_full_size(name):
    """Every tensor of the release, and no other: load_strict raises on both."""
    file = MANIFESTS / f"keys_{name}.json"
    if not file.exists():
        pytest.skip(f"NO MANIFEST: {file.name} is not beside the repository")
    kinds = {"float32": torch.float32, "float16": torch.float16}
    tensors = {key: torch.empty(shape, dtype=kinds[kind], device="meta") for key, shape, kind in json.loads(file.read_text())}
    if name == "unet":
        networks = [checkpoint.build_unet(checkpoint.unet_config(tensors), tensors)]
    elif name == "vae":
        config = checkpoint.vae_config(tensors)
        parts = {key.removeprefix("decoder."): tensor for key, tensor in tensors.items() if key.startswith("decoder.")}
        networks = [
            checkpoint.build_encoder(config, {key: tensor for key, tensor in tensors.items() if not key.startswith("decoder.")}),
            checkpoint.build_decoder(config, parts),
        ]
    else:
        networks = [checkpoint.build_image_encoder(checkpoint.encoder_config(tensors), tensors)]
    count = sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert count == {"unet": 1876296074, "vae": 98234367, "image_encoder": 632076800}[name]
    if name == "unet":
        from bokeh_core.samplers.any_to_bokeh.network import drop_unused

        live = sum(parameter.numel() for parameter in drop_unused(networks[0]).parameters())
        assert count - live > 152815040  # those of the reference, and the queries and keys of single-key attention


def test_unet_without_its_additions_is_stable_video_diffusion():
    """Gates closed and K silent: diffusers' own network gives the same."""
    from diffusers import UNetSpatioTemporalConditionModel

    tensors = stand_in.tensors()["unet"]
    for name, tensor in tensors.items():
        if ".alpha_" in name or ".k_encoder." in name:
            tensor.zero_()
    ours = checkpoint.build_unet(stand_in.UNET, tensors)
    theirs = UNetSpatioTemporalConditionModel(**stand_in.UNET).eval()
    theirs.load_state_dict({name: tensor for name, tensor in tensors.items() if ".fuser." not in name and "_mpi" not in name})
    generator = torch.Generator().manual_seed(1)
    sharp, difference = torch.randn(2, 2, 3, 4, 16, 8, generator=generator)
    context = torch.randn(2, 1, 32, generator=generator)
    ids = torch.tensor([[6.0, 127.0, 0.0]]).expand(2, -1)
    (expected,) = theirs(torch.cat([sharp, difference], 2), 1.0, context, ids, return_dict=False)
    clip = context[:, 0].repeat_interleave(3, dim=0)
    assert torch.allclose(ours(sharp, difference, clip, torch.full((2, 3), 7.0)), expected, atol=2e-5)


def test_vae_without_skips_is_stable_video_diffusions():
    from diffusers import AutoencoderKLTemporalDecoder

    tensors = stand_in.tensors()["vae"]
    stock = {name: tensor for name, tensor in tensors.items() if "skip_conv" not in name}
    kinds = ("DownEncoderBlock2D",) * len(stand_in.VAE["channels"])
    theirs = AutoencoderKLTemporalDecoder(
        down_block_types=kinds, block_out_channels=stand_in.VAE["channels"], layers_per_block=1, latent_channels=4
    ).eval()
    theirs.load_state_dict(stock)
    config = checkpoint.vae_config(tensors)
    encoder = checkpoint.build_encoder(config, {name: tensor for name, tensor in stock.items() if not name.startswith("decoder.")})
    parts = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    decoder = checkpoint.build_decoder(config, parts)
    images = torch.rand(3, 3, 64, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std, residuals = encoder(images)
    posterior = theirs.encode(images).latent_dist
    assert torch.allclose(mean, posterior.mode(), atol=1e-5) and torch.allclose(std, posterior.std, atol=1e-5)
    nothing = [torch.zeros_like(one) for one in [encoder.first_residual(images), *residuals]]
    expected = theirs.decode(mean, num_frames=3).sample
    assert torch.allclose(decoder(mean * preparation.SCALE, nothing), expected, atol=2e-5)


def test_image_encoder_is_transformers():
    transformers = pytest.importorskip("transformers")
    config = stand_in.IMAGE_ENCODER
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=config["hidden"],
            intermediate_size=config["mlp"],
            projection_dim=config["projection"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            image_size=config["size"],
            patch_size=config["patch"],
            hidden_act="gelu",
        )
    ).eval()
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if "position_ids" not in name}
    assert checkpoint.encoder_config(tensors) == config
    ours = checkpoint.build_image_encoder(config, tensors)
    images = torch.rand(2, 3, config["size"], config["size"], generator=torch.Generator().manual_seed(3))
    assert torch.allclose(ours(images), theirs(pixel_values=images).image_embeds, atol=1e-5)


def test_single_key_attention_is_its_constant():
    from diffusers.models.attention_processor import Attention

    from bokeh_core.samplers.any_to_bokeh.network import single_key

    attention = Attention(query_dim=64, cross_attention_dim=32, heads=2, dim_head=32)
    x, context = torch.randn(3, 10, 64), torch.randn(3, 1, 32)
    assert torch.allclose(attention(x, encoder_hidden_states=context), single_key(attention, context[:, 0])[:, None], atol=1e-5)


def test_visual_tokens_matter_only_through_an_open_mask(model, whole_model):
    frames = [model.encode(frame) for frame in frames_of(8)]
    (plain,) = model.denoise(0, [frames])
    (masked,) = whole_model.denoise(0, [frames], masked_out=True)
    assert torch.allclose(plain, masked, atol=1e-5)
    opened = [replace(item, frame=replace(item.frame, region=torch.zeros(32, 32, dtype=torch.uint8))) for item in frames]
    seeing = sampler.AnyToBokeh(
        **{name: getattr(whole_model, name) for name in ("unet", "encoder", "decoder", "image_encoder")}, visual=True
    )
    (seen,) = seeing.denoise(0, [opened])
    assert (seen - plain).abs().max() > 1e-2


# Preparation


def test_k_is_the_published_one_at_the_published_size():
    pictures, disparities, focus, k = clip_of(2, 90, 160)
    exact = replace(sampler.BEST, any_k=True)
    at = {"range_": (0, 1), "size": (576, 1024)}
    for fidelity in (exact, sampler.AS_PUBLISHED):
        frames = sampler.prepared(pictures, disparities, focus, k, fidelity=fidelity, **at)
        assert [frame.k for frame in frames] == pytest.approx(any_to_bokeh_k(k, 160).tolist())
    # Half the working width, half the radius in its pixels; as published the number stays.
    smaller = {"range_": (0, 1), "size": (256, 512)}
    assert [f.k for f in sampler.prepared(pictures, disparities, focus, k, fidelity=exact, **smaller)] == pytest.approx(
        (any_to_bokeh_k(k, 160) / 2).tolist()
    )


@pytest.mark.parametrize("k", [0.2, 0.6, 1.0, 7.4, 31.7, 45.0])
def test_k_becomes_one_that_training_saw_with_the_same_radius(k):
    difference = torch.linspace(0, 0.6, 7)
    seen, changed = preparation.trained_k(k, difference)
    assert seen in range(1, 33) and torch.allclose(changed * seen, (difference * k).clamp(max=seen), atol=1e-5)


def test_metric_disparity_keeps_its_radius():
    pictures, disparities, focus, k = clip_of(2)
    exact = replace(sampler.BEST, any_k=True)
    plain = sampler.prepared(pictures, disparities, focus, k, range_=(0, 1), size=(64, 64), fidelity=exact)
    scaled = sampler.prepared(pictures, disparities * 5 + 1, focus * 5 + 1, k / 5, range_=(1, 6), size=(64, 64), fidelity=exact)
    for a, b in zip(plain, scaled, strict=True):
        assert a.k == pytest.approx(b.k) and torch.allclose(a.difference, b.difference, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1080, 1920), (576, 1024)), ((1920, 1080), (1024, 576)), ((1000, 1000), (768, 768)), ((480, 640), (576, 768))],
)
def test_working_size_keeps_the_shape(size, expected):
    assert preparation.working_size(*size) == expected


def test_working_sizes_are_near_the_shape():
    for height, width in [(720, 1280), (683, 1024), (2160, 4096), (333, 777), (50, 40), (1200, 500)]:
        for resolution in (256, 512, 1024, 1536):
            h, w = preparation.working_size(height, width, resolution)
            assert h % 64 == w % 64 == 0 and h * w <= 1.05 * resolution**2 * 9 / 16
            if resolution >= 1024:
                assert abs((w / h) / (width / height) - 1) < 0.08, (height, width, h, w)


def test_regions_and_masks():
    disparity = torch.tensor([[[0.5, 0.6, 0.8, 1.0, 0.0]]])
    region = mpi.regions(disparity, torch.tensor([1.0]), mpi.PAPER)  # focus 1: borders at a quarter, a half, three quarters
    assert region[0, 0].tolist() == [1, 1, 0, 0, 3]
    assert mpi.masks(region, 1)[0, 0].tolist() == [1, 1, 1, 1, 0]
    assert (mpi.regions(disparity, torch.tensor([0.0]))[disparity > 1e-6] == 3).all()
    assert [mpi.level_of_stage("down", i) for i in range(3)] == [0, 1, 2] and mpi.level_of_stage("up", 1) == 2


# A shot


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 12, 13, 25, 100])
def test_stream_is_the_whole_clip(model, count):
    frames = frames_of(count)
    streamed = torch.cat([piece.frames for piece in sampler.stream_shot(model, iter(frames), count)])
    assert streamed.shape == (count, 3, 32, 32)
    assert torch.allclose(streamed, sampler.whole_shot(model, frames), atol=1e-5)


@pytest.mark.parametrize("count", [3, 9, 13])
def test_stream_is_the_published_schedule(model, whole_model, count):
    """Sampled latents, grey filling, pairs, and visual tokens behind their zero mask."""
    frames = frames_of(count, sampler.AS_PUBLISHED)
    noise = sampler.seeded(5)
    streamed = torch.cat([p.frames for p in sampler.stream_shot(model, iter(frames), count, sampler.AS_PUBLISHED, noise=noise)])
    published = sampler.whole_shot(whole_model, frames, sampler.AS_PUBLISHED, noise=noise, visual_tokens=True)
    assert torch.allclose(streamed, published, atol=1e-5)


def test_every_frame_is_encoded_once(model):
    frames = frames_of(21)
    seen = []

    class Counting:
        def __init__(self, loaded):
            self.network, self.device, self.dtype, self.visual = self, loaded.device, loaded.dtype, False
            self.inner, self.size = loaded.network, getattr(loaded.network, "size", 0)

        def __call__(self, images):
            seen.append(len(images))
            return self.inner(images)

        def first_residual(self, images):
            return self.inner.first_residual(images)

    counting = sampler.AnyToBokeh(model.unet, Counting(model.encoder), model.decoder, Counting(model.image_encoder))
    list(sampler.stream_shot(counting, iter(frames), 21))
    assert sum(seen) == 3 * 21  # picture and difference by the VAE, picture by CLIP


def test_the_pair_changes_the_published_numbers_only(model):
    frames = [model.encode(frame) for frame in frames_of(16)]
    parts = [frames[:8], frames[8:]]
    alone = [model.denoise(i, [part])[0] for i, part in enumerate(parts)]
    together = model.denoise(0, parts)
    published = model.denoise(0, parts, replace(sampler.BEST, paired=True))
    for a, b, c in zip(alone, together, published, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and (a - c).abs().max() > 1e-4


# A clip


def run(model, clip, **more):
    pictures, disparities, focus, k = clip
    pieces = list(sampler.render_clip(model, pictures, disparities, focus, k, size=tuple(pictures.shape[-2:]), resolution=64, **more))
    return pieces, torch.cat([piece.frames for piece in pieces])


def test_a_run_goes_on_where_it_stopped(model):
    clip = clip_of(21, 48, 80)
    for fidelity in (sampler.BEST, sampler.AS_PUBLISHED):
        fidelity = replace(fidelity, fixed_size=False)
        pieces, whole = run(model, clip, fidelity=fidelity, shots=(0, 13), seed=4)
        stops = [piece for piece in pieces[:-1] if piece.resumable]
        assert len(stops) >= 1 and whole.shape == clip[0].shape
        for piece in stops:
            _, rest = run(model, clip, fidelity=fidelity, shots=(0, 13), seed=4, start=piece.done, carry=piece.carry)
            assert torch.allclose(rest, whole[piece.done :], atol=1e-5)


def test_cuts_part_the_clip(model):
    clip = clip_of(14, 48, 80)
    _, whole = run(model, clip, shots=(0, 5, 6))
    parts = [run(model, [one[a:b] for one in clip])[1] for a, b in ((0, 5), (5, 6), (6, 14))]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    _, across = run(model, clip)
    assert (across - whole).abs().max() > 1e-3
    with pytest.raises(BokehError, match="begins at frame 14"):
        run(model, clip, shots=(0, 14))


def test_focus_and_k_of_every_frame_count(model):
    pictures, disparities, focus, k = clip_of(4, 48, 80)
    _, plain = run(model, (pictures, disparities, focus, k))
    for changed in ((focus + 0.1 * (torch.arange(4) == 2), k), (focus, k + 3 * (torch.arange(4) == 2))):
        _, other = run(model, (pictures, disparities, *changed))
        assert (other - plain).abs().flatten(1).amax(1)[2] > 1e-4


def test_no_blur_is_the_input(model):
    pictures, disparities, focus, k = clip_of(3, 47, 81)
    pieces, result = run(model, (pictures, disparities, focus, k * 0))
    assert torch.equal(result, pictures) and all(piece.resumable for piece in pieces)


def test_progress_and_interruption(model):
    told = []
    run(model, clip_of(9, 48, 80), shots=(0, 4), progress=lambda done, total: told.append((done, total)))
    done = [one for one, _ in told]
    assert done == sorted(done) and done[-1] == pytest.approx(9) and {total for _, total in told} == {9} and len(told) > 9

    class Stop(Exception):
        pass

    def interrupt(done, total):
        if done > 2:
            raise Stop

    with pytest.raises(Stop):
        run(model, clip_of(9, 48, 80), progress=interrupt)


def test_when_memory_runs_out_the_decoder_takes_fewer_frames(model):
    sizes = []

    def shrinking(work, size):
        while size > 3:  # as if more did not fit
            size //= 2
        sizes.append(size)
        return work(size)

    clip = clip_of(13, 48, 80)
    _, small = run(model, clip, shrinking=shrinking)
    _, whole = run(model, clip)
    assert sizes == [2, 2] and small.shape == whole.shape
    assert (small - whole).abs().max() > 1e-4  # the temporal layers miss the neighbours across the border, as documented


@pytest.fixture
def defocus():
    _, disparity, focus, k = clip_of(3, 47, 81)
    return Defocus(disparity, focus, k, Lens(strength=16), False)


def test_render_keeps_size_and_inputs(model, defocus):
    image = torch.rand(3, 3, 47, 81, generator=torch.Generator().manual_seed(1))
    before = image.clone(), defocus.disparity.clone()
    result = sampler.render(model, image, defocus, resolution=64)
    assert result.shape == image.shape and result.min() >= 0 and result.max() <= 1
    assert torch.equal(image, before[0]) and torch.equal(defocus.disparity, before[1])
    assert torch.equal(result, sampler.render(model, image, defocus, resolution=64))
    still = sampler.render(model, image[:1], defocus, resolution=64)
    assert torch.equal(still, sampler.render(model, image[:1].expand(3, -1, -1, -1), defocus, resolution=64))


def test_a_k_beyond_float16_is_explained():
    pictures, disparities, focus, k = clip_of(1)
    with pytest.raises(BokehError, match="makes K 800, more than the 655"):
        list(sampler.prepared(pictures, disparities, focus, k * 0 + 50, range_=(0, 1), size=(64, 64), fidelity=sampler.AS_PUBLISHED))


def test_render_explains_what_does_not_fit(model, defocus):
    with pytest.raises(BokehError, match="2 frames and the defocus 3"):
        sampler.render(model, torch.rand(2, 3, 47, 81), defocus)
    with pytest.raises(BokehError, match="81x47 px but the clip is 80x47"):
        sampler.render(model, torch.rand(3, 3, 47, 80), defocus)
    with pytest.raises(BokehError, match="not numbers"):
        sampler.render(model, torch.full((3, 3, 47, 81), torch.nan), defocus, resolution=64)
    with pytest.raises(BokehError, match=r"\[frames, 3"):
        sampler.render(model, torch.rand(3, 4, 47, 81), defocus)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_nearly_the_same(model, folder, dtype):
    half = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(folder), dtype=dtype))
    assert half.encoder.dtype == torch.float32 and half.unet.dtype == half.decoder.dtype == half.image_encoder.dtype == dtype
    _, result = run(half, clip_of(1, 48, 80))
    _, exact = run(model, clip_of(1, 48, 80))
    assert result.dtype == torch.float32 and (result - exact).abs().mean() < (0.005 if dtype == torch.float16 else 0.03)


def test_sampling_is_seeded(model):
    clip, fidelity = clip_of(2, 48, 80), replace(sampler.AS_PUBLISHED, fixed_size=False)
    first, again, other = (run(model, clip, fidelity=fidelity, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(run(model, clip, seed=1)[1], run(model, clip, seed=2)[1])


# Files


def copied(folder, target):
    return Path(shutil.copytree(folder, target))


def same(a: checkpoint.Files, b: checkpoint.Files) -> bool:
    pairs = zip((a.unet, a.encoder, a.decoder, a.image_encoder), (b.unet, b.encoder, b.decoder, b.image_encoder), strict=True)
    return all(one.tensors.keys() == two.tensors.keys() and one.config == two.config for one, two in pairs)


def test_single_folder_single_files_and_bin(folder, tmp_path):
    reference = checkpoint.read_files(folder)
    flat = copied(folder, tmp_path / "flat")
    for file in (flat / "unet" / "unet").iterdir():
        file.rename(flat / "unet" / file.name)
    (flat / "unet" / "unet").rmdir()
    assert same(checkpoint.read_files(flat), reference)

    weights = flat / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert same(checkpoint.read_files(flat), reference)

    names = ("unet/unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model")
    single = checkpoint.read_files(*(folder / f"{name}.safetensors" for name in names))
    assert same(single, reference)  # the shapes say the same as config.json


def test_half_precision_and_position_ids(folder, tmp_path):
    half = stand_in.write(tmp_path / "half", dtype=torch.float16)
    file = half / "image_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, file)
    files = checkpoint.read_files(half)
    assert same(files, checkpoint.read_files(folder)) and files.unet.tensors["conv_in.weight"].dtype == torch.float16
    model = sampler.AnyToBokeh(**checkpoint.load(files))
    assert model.unet.dtype == torch.float32 and run(model, clip_of(1, 48, 80))[1].isfinite().all()


def test_wrong_files_are_explained(folder, tmp_path):
    broken = copied(folder, tmp_path / "broken")
    file = broken / "unet" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)

    def refused(changed, words, place=file, **more):
        save_file(changed, place)
        with pytest.raises(BokehError, match=words):
            checkpoint.read_files(broken, **more)

    plain = {name: tensor for name, tensor in tensors.items() if ".fuser." not in name and "_mpi" not in name}
    refused(plain, "plain Stable Video Diffusion UNet")
    refused({"a": torch.zeros(2)}, "no video UNet")
    refused({name: tensor for name, tensor in tensors.items() if not name.endswith("alpha_attn")}, "tensors missing")
    refused(tensors | {"extra": torch.zeros(2)}, "1 tensors unexpected: extra")
    refused(tensors | {"conv_out.weight": torch.zeros(4, 7, 3, 3)}, "of another shape: conv_out.weight")
    save_file(tensors, file)

    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    vae = load_file(file)
    refused({name: tensor for name, tensor in vae.items() if "skip_conv" not in name}, "without skip connections", file)
    refused({"a": torch.zeros(2)}, "no video VAE", file)
    save_file(vae, file)
    refused({"a": torch.zeros(2)}, "no CLIP vision model", broken / "image_encoder" / "model.safetensors")
    shutil.rmtree(broken / "image_encoder")
    with pytest.raises(BokehError, match=r"no image_encoder for Any-to-Bokeh.*huggingface\.co"):
        checkpoint.read_files(broken)
    with pytest.raises(BokehError, match="no vae for Any-to-Bokeh"):
        checkpoint.read_files(folder / "unet" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BokehError, match=r"unet/config\.json"):
        checkpoint.read_files(tmp_path)


def test_were_the_visual_tokens_trained():
    base = {"conv_in.weight": torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))}
    copy = {"conv_in_mpi.weight": base["conv_in.weight"][:, :4] * 0.995}
    answer, factor, rest = checkpoint.visual_tokens_trained(copy, base)
    assert not answer and factor == pytest.approx(0.995, abs=1e-6) and rest < 1e-6
    moved = {"conv_in_mpi.weight": copy["conv_in_mpi.weight"] + 0.1 * torch.randn(16, 4, 3, 3)}
    assert checkpoint.visual_tokens_trained(moved, base)[0]


def test_models_check(folder, tmp_path, capsys):
    unet, vae = (folder / name / "diffusion_pytorch_model.safetensors" for name in ("unet/unet", "vae"))
    for path, title in ((unet, "UNet"), (vae, "VAE"), (folder, "folder with UNet, VAE")):
        assert cli.main(["models", "check", str(path)]) == 0
        shown = capsys.readouterr().out
        assert f"Any-to-Bokeh: {title}" in shown and "non-commercial" in shown
    tensors = load_file(unet)
    save_file(
        {"conv_in.weight": torch.cat([tensors["conv_in_mpi.weight"] / 0.995, torch.zeros(64, 4, 3, 3)], 1)}, tmp_path / "base.safetensors"
    )
    assert cli.main(["models", "check", str(unet), "--against", str(tmp_path / "base.safetensors")]) == 0
    assert "0.995000 times the base's conv_in" in (shown := capsys.readouterr().out) and "leave the loader's switch for them off" in shown
    save_file({name: tensor for name, tensor in tensors.items() if "k_encoder" not in name}, tmp_path / "cut.safetensors")
    assert cli.main(["models", "check", str(tmp_path / "cut.safetensors")]) == 2
    assert "PROBLEM" in capsys.readouterr().out
    assert checkpoint.report({"a": torch.zeros(1)}, tmp_path) is None and checkpoint.report({}, tmp_path) is None


def test_clip_preparation_is_sharp_where_nothing_shrinks():
    image = torch.rand(1, 3, 224, 224) * 2 - 1
    assert torch.allclose(image_encoder.prepare(image), image / 2 + 0.5, atol=1e-5)
