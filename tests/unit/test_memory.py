"""The memory that nodes and samplers ask the host for, against what their tensors take: never less, and not much more.

Measured at full size on the meta device, where networks of any size cost nothing: the bytes of all tensors that are alive at once, with
fused attention, as every device has it that runs these networks. What kernels borrow for themselves is not in it; hosts keep a reserve.
`test_the_meta_device_counts_like_the_cpu` ties the two.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bokeh_core.depth.sweep import activation_bytes as sweep_bytes
from bokeh_core.depth.sweep import depth_from_sweep
from bokeh_core.depth.upsampling import guided_upsample
from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Aperture, Lens
from bokeh_core.optics.stack import BokehStack
from bokeh_core.render import activation_bytes, aperture, render
from bokeh_core.salient import ldf
from bokeh_core.samplers.any_to_bokeh import checkpoint as any_to_bokeh_files
from bokeh_core.samplers.any_to_bokeh import sampler as any_to_bokeh
from bokeh_core.samplers.any_to_bokeh.network import drop_unused
from bokeh_core.samplers.arguments import Placed
from bokeh_core.samplers.bokehdiff import checkpoint as bokehdiff_files
from bokeh_core.samplers.bokehdiff import network as bokehdiff_networks
from bokeh_core.samplers.bokehdiff import sampler as bokehdiff
from bokeh_core.samplers.magicbokeh import checkpoint as magicbokeh_files
from bokeh_core.samplers.magicbokeh import network as magicbokeh_networks
from bokeh_core.samplers.magicbokeh import sampler as magicbokeh
from bokeh_core.synthesis.demo import demo_scene
from bokeh_core.video import segments
from tests.live_bytes import LiveBytes
from tests.stand_ins import bokehdiff as bokehdiff_stand_in

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
META = torch.device("meta")
HALF, FULL = torch.float16, torch.float32
SDXL = {  # the real one's widths
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "projection_class_embeddings_input_dim": 2816,
}
VAE_WIDTHS = [128, 256, 512, 512]  # of SDXL, SD 2.1 and SVD


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """On the meta device attention would be counted with all its scores."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: q.new_empty(*q.shape[:-1], v.shape[-1]))


def peak(networks, work) -> int:
    known = [tensor for network in networks for tensor in network.state_dict().values()]
    with torch.no_grad(), LiveBytes(known) as live:
        work()
    return live.peak


def between(promised, measured, most=3.0, least=1.0):
    assert least * measured <= promised <= most * measured, f"promised {promised / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB"
    return promised / measured


def cast(tensors, dtype):
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def weights_of(network):
    with META:
        return network().state_dict()


def manifest(name):
    path = REFERENCE / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the repository")
    kinds = {kind: getattr(torch, kind) for kind in ("float16", "float32", "int64")}
    return {key: torch.empty(shape, dtype=kinds[dtype], device=META) for key, shape, dtype in json.loads(path.read_text())}


# BokehDiff


def sdxl_vae(dtype, side=1024):
    from diffusers import AutoencoderKL

    config = {**bokehdiff_stand_in.VAE, "block_out_channels": VAE_WIDTHS}
    vae = bokehdiff_networks.build_vae(config, cast(weights_of(lambda: AutoencoderKL.from_config(config)), dtype))
    return bokehdiff_files.BokehDiff(None, Placed(vae, META, dtype), None, None)


@pytest.mark.parametrize(
    ("dtype", "tile", "height", "width"),
    [(torch.bfloat16, 512, 512, 512), (FULL, 512, 1024, 1024), (FULL, 256, 1024, 1536)],
)
def test_bokehdiff_s_vae(dtype, tile, height, width):
    model = sdxl_vae(dtype)
    pixels, latents = torch.empty(1, 3, height, width, device=META), torch.empty(1, 4, height // 8, width // 8, device=META)
    for part, work in (
        ("vae encoder", lambda: bokehdiff.encode(model, pixels, 2 * tile)),
        ("vae decoder", lambda: bokehdiff.decode(model, latents, 2 * tile)),
    ):
        between(bokehdiff.activation_bytes(part, height, width, dtype.itemsize, tile), peak([model.vae.network], work))


@pytest.fixture(scope="module")
def sdxl():
    from diffusers import UNet2DConditionModel

    return weights_of(lambda: UNet2DConditionModel.from_config({**bokehdiff_stand_in.UNET, **SDXL}))


@pytest.mark.parametrize(
    ("dtype", "tile", "height", "width", "radius"),
    [(HALF, 512, 512, 512, 9.0), (HALF, 512, 704, 736, 80.0), (FULL, 256, 384, 352, 0.5)],
)
def test_bokehdiff_s_unet(sdxl, monkeypatch, dtype, tile, height, width, radius):
    """radius: the largest CoC in PISA's units of 10 px; it learnt up to 9. At 80 every token reaches every other."""
    config = {**bokehdiff_stand_in.UNET, **SDXL}
    unet = bokehdiff_networks.build_unet(config, cast(sdxl, dtype))
    model = bokehdiff_files.BokehDiff(Placed(unet, META, dtype), None, torch.empty(1, 77, 2048), torch.empty(1, 1280))
    disparity = F.interpolate(torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)), size=(height, width), mode="bilinear")
    maps = torch.cat([disparity, radius * (disparity - 0.4).abs() / 0.6], 1)
    scene_of, scene_blocks = bokehdiff.scene_of, bokehdiff.scene_blocks

    def blocks(*given):
        """Who reaches whom depends on values, so it is found on the CPU."""
        found = scene_blocks(*given)
        return [replace(one, mask=one.mask.to(META), passed=None if one.passed is None else one.passed.to(META)) for one in found]

    monkeypatch.setattr(bokehdiff, "scene_of", lambda piece, grid: scene_of(maps[..., : piece.shape[-2], : piece.shape[-1]], grid))
    monkeypatch.setattr(bokehdiff, "scene_blocks", blocks)
    latents = torch.empty(1, 4, height // 8, width // 8, device=META)
    measured = peak([unet], lambda: bokehdiff.predict_noise(model, latents, maps, bokehdiff.BEST, tile // 8))
    between(bokehdiff.activation_bytes("unet", height, width, dtype.itemsize, tile), measured)


# MagicBokeh


@pytest.fixture(scope="module")
def magic_parts():
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "sample_size": 64,
    }
    vae = {**bokehdiff_stand_in.VAE, "block_out_channels": VAE_WIDTHS}
    with META:
        return {
            "unet": magicbokeh_networks.PrunedUNet(magicbokeh_networks.pruned_unet(config), 128),
            "controlnet": magicbokeh_networks.ControlNet(magicbokeh_networks.pruned_unet(config), [16, 32, 96, 256]),
            "encoder": magicbokeh_networks.Encoder(AutoencoderKL.from_config(vae)),
            "decoder": magicbokeh_networks.Decoder(AutoencoderKL.from_config(vae)),
        }


def magic(parts, dtype):
    half = {name: dtype if name in ("unet", "controlnet") else FULL for name in parts}
    return magicbokeh_files.MagicBokeh(**{name: Placed(part.to(half[name]), META, half[name]) for name, part in parts.items()})


@pytest.mark.parametrize(("dtype", "count", "parted"), [(HALF, 1, True), (HALF, 4, True), (FULL, 2, False)])
def test_magicbokeh_s_unet_and_controlnet(magic_parts, monkeypatch, dtype, count, parted):
    model = magic(magic_parts, dtype)
    regions = magicbokeh.focus_regions
    to_meta = lambda found: {n: [r and tuple(t.to(META) for t in r) for r in some] for n, some in found.items()}  # noqa: E731
    monkeypatch.setattr(magicbokeh, "focus_regions", lambda mask, device: to_meta(regions(mask, "cpu")))
    mask = (torch.arange(512) < (200 if parted else 512)).float().expand(count, 512, 512)
    latents, condition = torch.empty(count, 4, 64, 64, device=META), torch.empty(count, 512, 512, device=META)
    measured = peak([model.unet.network, model.controlnet.network], lambda: magicbokeh.predict_eps(model, latents, condition, mask))
    between(magicbokeh._room(model.unet, count * 64 * 64 * magicbokeh.DENOISING), measured)


@pytest.mark.parametrize("side", [256, 1024])
def test_magicbokeh_s_vae(magic_parts, side):
    model = magic(magic_parts, FULL)
    encoding = peak([model.encoder.network], lambda: magicbokeh.posterior(model, torch.empty(1, 3, side, side, device=META)))
    decoding = peak([model.decoder.network], lambda: magicbokeh.decoded(model, torch.empty(1, 4, side // 8, side // 8, device=META)))
    between(magicbokeh._room(model.encoder, side**2 * magicbokeh.ENCODING), encoding)
    between(magicbokeh._room(model.decoder, side**2 * magicbokeh.DECODING), decoding)


# Any-to-Bokeh


@pytest.fixture(scope="module", params=[HALF, FULL])
def any_model(request):
    dtype, tables = request.param, {name: manifest(f"any2bokeh/keys_{name}") for name in ("unet", "vae", "image_encoder")}
    unet, vae, looks = cast(tables["unet"], dtype), cast(tables["vae"], FULL), cast(tables["image_encoder"], dtype)
    config = any_to_bokeh_files.vae_config(vae)
    decoder = {name.removeprefix("decoder."): tensor for name, tensor in vae.items() if name.startswith("decoder.")}
    networks = (
        drop_unused(any_to_bokeh_files.build_unet(any_to_bokeh_files.unet_config(unet), unet)),
        any_to_bokeh_files.build_encoder(config, {name: tensor for name, tensor in vae.items() if not name.startswith("decoder.")}),
        any_to_bokeh_files.build_decoder(config, cast(decoder, dtype)),
        any_to_bokeh_files.build_image_encoder(any_to_bokeh_files.encoder_config(looks), looks),
    )
    dtypes = (dtype, FULL, dtype, dtype)
    return any_to_bokeh.AnyToBokeh(*(Placed(network, META, kind) for network, kind in zip(networks, dtypes, strict=True)))


@pytest.mark.parametrize("size", [(576, 1024), (256, 320)])
def test_any_to_bokeh(any_model, size):
    """A segment through the UNet, or a window through the decoder, beside what is kept of twelve frames."""
    model = any_model
    networks = [model.unet.network, model.encoder.network, model.decoder.network, model.image_encoder.network]

    def work():
        items = [
            model.encode(any_to_bokeh.Frame(torch.empty(3, *size, device=META), torch.empty(size, device=META), 20.0)) for _ in range(12)
        ]
        model.denoise(0, [items[:8]])
        latents = torch.empty(8, 4, size[0] // 8, size[1] // 8, device=META)
        model.decode(segments.Window(items[:8], latents, slice(0, 4)), 8)

    between(model.activation_bytes(*size), peak(networks, work), most=1.5)


# Without a diffusion network


@pytest.mark.parametrize(("height", "width", "chunk"), [(352, 352, 1), (1080, 1920, 1), (1080, 1920, 4), (3000, 4500, 1)])
def test_salient_objects(height, width, chunk):
    network = ldf.build(nn, ldf.folded_tensors(weights_of(lambda: ldf.LDF(ldf.Config()))))

    def work():
        inputs = torch.empty(chunk, 3, 352, 352, device=META)
        return (ldf.logits(network, inputs, (height, width)).sigmoid() * 255).round() / 255

    between(ldf.activation_bytes(height, width, chunk), peak([network], work))


@pytest.mark.parametrize(("height", "width", "frames"), [(300, 400, 3), (300, 400, 6), (600, 800, 3)])
def test_depth_from_a_sweep(height, width, frames):
    generator = torch.Generator().manual_seed(0)
    reference, blurred = torch.rand(3, height, width, generator=generator), torch.rand(frames, 3, height, width, generator=generator)
    stack = BokehStack(reference, blurred, torch.linspace(10, 30, frames), source="test")
    with LiveBytes([reference, blurred]) as live:
        depth_from_sweep(stack, upsample=lambda low, image: guided_upsample(low, image, align_corners=False))
    between(sweep_bytes(height, width, frames), live.peak)


@pytest.mark.parametrize(
    ("width", "lens", "more", "most"),
    [
        (840, Lens(strength=30.0), (), 3.0),
        (240, Lens(strength=120.0), ("matte", "clean_plate"), 20.0),  # what is asked for shaped apertures weighs more in small pictures
        (240, Lens(strength=30.0, aperture=Aperture(blades=6), highlights=4.0), (), 3.0),
    ],
)
def test_the_physical_renderer(width, lens, more, most):
    scene = demo_scene(0, width, width * 2 // 3)
    image, disparity = scene["image"][None], scene["disparity"][None]
    options = {"matte": (disparity > disparity.median()).float(), "clean_plate": image * 0.5}
    defocus = make_defocus(disparity, lens, width=width)
    aperture._general.cache_clear()  # other tests may have made this aperture's table already, which takes most of the memory here
    with LiveBytes([image, disparity, *options.values()]) as live:
        render(image, defocus, **{name: options[name] for name in more})
    promised = activation_bytes(width * 2 // 3, width, defocus, matte=bool(more))
    between(promised, live.peak, most)


# The measure itself


def test_the_meta_device_counts_like_the_cpu():
    """The same small VAE on both: every tensor of a forward pass is counted alike."""
    from diffusers import AutoencoderKL

    config, found = {**bokehdiff_stand_in.VAE, "block_out_channels": [32, 64, 64, 64]}, []
    for device in ("cpu", "meta"):
        with torch.device(device):
            network = AutoencoderKL.from_config(config).eval()
            pixels = torch.zeros(1, 3, 128, 192)
        found.append(
            peak([network], lambda network=network, pixels=pixels: network.decode(network.encode(pixels).latent_dist.mode()).sample)
        )
    assert found[0] == pytest.approx(found[1], rel=0.02)
