"""Depth networks: files in, maps out. The recorded numbers are in tests/parity."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bokeh_core.checkpoints.loading import LAYERS
from bokeh_core.depth.checkpoint import DepthModel, build, load_depth_model, recognise
from bokeh_core.depth.estimate import activation_bytes, depth_maps
from bokeh_core.depth.preprocessing import network_input, network_size, to_size, video_network_size
from bokeh_core.depth.video_depth_anything import scale_and_shift, windows
from bokeh_core.errors import BokehError
from tests.live_bytes import LiveBytes
from tests.stand_ins import depth as stand_ins

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT.parent / "shared" / "reference"
MANIFESTS = {
    "bokehdepth_stage2/keys_dav2_vits": ("depth_anything_v2_vits.pth", "Depth Anything V2 S, relative"),
    "bokehdepth_stage2/keys_dav2_vitb": ("depth_anything_v2_metric_vkitti_vitb.pth", "Depth Anything V2 B, metric outdoor (80 m)"),
    "bokehdepth_stage2/keys_dav2_vitl": ("depth_anything_v2_metric_hypersim_vitl.pth", "Depth Anything V2 L, metric indoor (20 m)"),
    "bokehdepth_stage2/keys_vda_vits": ("video_depth_anything_vits.pth", "Video Depth Anything S, relative"),
    "bokehdepth_stage2/keys_vda_vitb": ("video_depth_anything_vitb.pth", "Video Depth Anything B, relative"),
    "bokehdepth_stage2/keys_vda_vitl": ("metric_video_depth_anything_vitl.pth", "Video Depth Anything L, metric"),
    "magicbokeh/keys_DAdepth": ("DAdepth.pth", "Depth Anything V2 L, relative (MagicBokeh's depth model)"),
}


def manifest(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a released file, without their numbers."""
    path = REFERENCE / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository")
    return {key: torch.empty(shape, device="meta") for key, shape, *_ in json.loads(path.read_text())}


def shapes(tensors) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def photo_model(name="depth_anything_v2_vits.pth") -> DepthModel:
    return model_of(stand_ins.depth_anything(), name)


def video_model(name="video_depth_anything_vits.pth") -> DepthModel:
    return model_of(stand_ins.video_depth_anything(), name)


def model_of(tensors, name, dtype=torch.float32) -> DepthModel:
    info, tensors = recognise(tensors, name)
    return DepthModel(build(info, {name: tensor.to(dtype) for name, tensor in tensors.items()}), info, torch.device("cpu"), dtype)


def clip_of(count: int, height: int = 30, width: int = 44) -> list[torch.Tensor]:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    disks = [((x - 0.2 - 0.5 * i / count) ** 2 + (y - 0.5) ** 2 < 0.05).float() for i in range(count)]
    return [torch.stack([x, 0.5 + 0.4 * torch.sin(9 * y + 0.1 * i), disk]) for i, disk in enumerate(disks)]


def run(model, frames, **how) -> torch.Tensor:
    how = {"clip": True, "resolution": 28} | how
    return torch.cat(list(depth_maps(model, iter(frames), len(frames), **how)))


# Files


@pytest.mark.parametrize("name", MANIFESTS)
def test_released_files_load_with_nothing_missing_or_left_over(name):
    released = manifest(name)
    file, title = MANIFESTS[name]
    info, tensors = recognise(released, file)
    assert info.title == title and info.video == ("video" in file) and info.metric == ("metric" in file)
    with torch.device("meta"):
        network = build(info, tensors)
    assert shapes(network.state_dict()) == shapes(released)
    assert info.config.vit.taps == ((4, 11, 17, 23) if info.size == "L" else (2, 5, 8, 11))
    assert recognise({f"module.{key}": tensor for key, tensor in released.items()}, file)[0] == info


@pytest.mark.parametrize(("file", "kind", "metric", "max_depth"), [
    ("depth_anything_v2_vits.pth", "auto", False, None),
    ("depth_anything_v2_metric_hypersim_vits_fp16.safetensors", "auto", True, 20.0),
    ("Depth-Anything-V2-Metric-Outdoor-Small-hf/model.safetensors", "auto", True, 80.0),
    ("my_outdoor_shots/depth_anything_v2_vits.pth", "auto", False, None),
    ("depth_anything_v2_metric_vkitti_vits.pth", "relative", False, None),
    ("anything.pth", "metric indoor", True, 20.0),
    ("anything.pth", "metric outdoor", True, 80.0),
])  # fmt: skip
def test_the_kind_is_chosen_or_read_from_the_name(file, kind, metric, max_depth):
    info, _ = recognise(stand_ins.depth_anything(), file, kind)
    assert (info.metric, info.max_depth, info.config.max_depth) == (metric, max_depth, max_depth)
    video, _ = recognise(stand_ins.video_depth_anything(), file, kind)
    assert (video.metric, video.max_depth) == (metric, None)


@pytest.mark.parametrize(("tensors", "file", "words"), [
    ({"unet.down.lora_A.weight": 0}, "a.safetensors", "is a LoRA"),
    ({"model.diffusion_model.input_blocks.0.0.weight": 0}, "sd.ckpt", "Stable Diffusion"),
    ({"points_head.blocks.0.weight": 0}, "moge.pt", "MoGe"),
    ({"model.backbone.pretrained.cls_token": 0}, "da3.safetensors", "Depth Anything 3"),
    ({"pixel_encoder.backbone.cls_token": 0}, "UDv2_dsfa_release.pth", "is a UniDepth, but not V2"),
    ({"weight": 0}, "x.pth", r"other tensors \(found: weight\); expected a Depth Anything V2"),
    (stand_ins.depth_anything(), "depth_anything_vitl14.pth", "Depth Anything V1"),
    (stand_ins.depth_anything(), "depth_anything_v2_metric_vits.pth", "choose the kind"),
])  # fmt: skip
def test_other_files_are_refused_with_what_they_are(tensors, file, words):
    with pytest.raises(BokehError, match=words):
        recognise(tensors, file)


def test_an_incomplete_file_is_refused():
    tensors = stand_ins.depth_anything()
    del tensors["pretrained.blocks.3.attn.qkv.bias"]
    info, tensors = recognise(tensors, "depth_anything_v2_vits.pth")
    with pytest.raises(BokehError, match=r"1 tensors missing: pretrained\.blocks\.3\.attn\.qkv\.bias"):
        build(info, tensors)
    with pytest.raises(BokehError, match="kind of a depth model"):
        recognise(tensors, "x.pth", "metric")


def test_files_load_in_any_container(tmp_path):
    from safetensors.torch import save_file

    tensors = stand_ins.depth_anything()
    torch.save({"model": {f"module.{key}": tensor for key, tensor in tensors.items()}, "epoch": 3}, tmp_path / "DAdepth.pth")
    save_file(tensors, tmp_path / "depth_anything_v2_vits.safetensors")
    frames = clip_of(1)
    a, b = (run(load_depth_model(tmp_path / name), frames) for name in ("DAdepth.pth", "depth_anything_v2_vits.safetensors"))
    assert torch.equal(a, b) and a.std() > 0.01
    half = load_depth_model(tmp_path / "DAdepth.pth", dtype=torch.bfloat16)
    assert half.network.pretrained.pos_embed.dtype == torch.bfloat16
    assert half.network.depth_head.scratch.output_conv2[0].weight.dtype == torch.float32


def theirs(size: str):
    transformers = pytest.importorskip("transformers")
    width, depth, taps, features, channels = {
        "S": (384, 12, (2, 5, 8, 11), 64, (48, 96, 192, 384)),
        "B": (768, 12, (2, 5, 8, 11), 128, (96, 192, 384, 768)),
        "L": (1024, 24, (4, 11, 17, 23), 256, (256, 512, 1024, 1024)),
        "tiny": (128, 4, (0, 1, 2, 3), 64, (16, 32, 64, 64)),
    }[size]
    backbone = transformers.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        image_size=70 if size == "tiny" else 518,
        patch_size=14,
        out_indices=[t + 1 for t in taps],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=width,
        neck_hidden_sizes=list(channels),
        fusion_hidden_size=features,
        patch_size=14,
    )
    return transformers.DepthAnythingForDepthEstimation(config).eval()


def older_names(tensors):
    """transformers before 5."""
    renamed = {}
    for key, tensor in tensors.items():
        key = re.sub(
            r"attention\.([qkv])_proj",
            lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]],
            key,
        )
        renamed[key.replace("attention.o_proj", "attention.output.dense")] = tensor
    return renamed


@pytest.mark.parametrize("size", ["S", "B", "L"])
def test_names_of_transformers_are_all_translated(size):
    pytest.importorskip("transformers")
    released = manifest(f"bokehdepth_stage2/keys_dav2_vit{size.lower()}")
    with torch.device("meta"):
        tensors = theirs(size).state_dict()
    for names in (tensors, older_names(tensors)):
        info, translated = recognise(names, "model.safetensors")
        assert info.size == size and shapes(translated) == shapes(released)


def test_numbers_are_those_of_transformers():
    torch.manual_seed(0)
    model = theirs("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * 0.5)
        pixels = torch.randn(2, 3, 70, 70)
        expected = model(pixels).predicted_depth
        for names in (model.state_dict(), older_names(model.state_dict())):
            ours = model_of(names, "model.safetensors").network(pixels)
            assert expected.std() > 0.1 * expected.mean() > 0
            assert (ours - expected).abs().max() < 1e-5 * expected.max()


# Pictures


def test_sizes():
    assert network_size(3024, 4032) == (518, 686) and network_size(1024, 1562) == (518, 784)
    assert network_size(480, 640, 500) == (504, 672)
    assert video_network_size(1080, 1920) == (518, 924) and video_network_size(400, 4000)[1] < 2000
    with pytest.raises(BokehError, match="at least 14"):
        network_size(100, 100, 8)


def test_positions_step_through_the_table_as_published():
    """Rows are 5 / (n + 0.1) cells apart, under the cubic kernel with a = -0.75."""

    def kernel(t, a=-0.75):
        t = np.abs(t)
        return np.where(t <= 1, (a + 2) * t**3 - (a + 3) * t**2 + 1, np.where(t < 2, a * (t**3 - 5 * t**2 + 8 * t - 4), 0))

    vit = photo_model().network.pretrained
    vit.pos_embed[0, 1:] = torch.tensor([1.0, 5.0, 2.0, 8.0, 3.0]).repeat_interleave(5)[:, None]
    for rows, columns in ((12, 7), (5, 6)):
        at = (np.arange(rows) + 0.5) * 5 / (rows + 0.1) - 0.5
        cells = np.arange(-3, 8)
        expected = kernel(at[:, None] - cells) @ np.array([1.0, 5.0, 2.0, 8.0, 3.0])[cells.clip(0, 4)]
        resized = vit.positions(rows, columns, torch.empty(0))[0, 1:].view(rows, columns, -1)
        assert np.abs(resized[:, columns // 2, 0].numpy() - expected).max() < 1e-5
    assert torch.equal(vit.positions(5, 5, torch.empty(0)), vit.pos_embed)


def test_input_is_clipped_and_kept():
    image = torch.rand(1, 3, 20, 20) * 3 - 1
    before = image.clone()
    assert torch.equal(network_input(image, (28, 28)), network_input(image.clamp(0, 1), (28, 28))) and torch.equal(image, before)


@pytest.mark.parametrize("model", [photo_model, video_model])
def test_photos_stand_alone_whatever_the_chunk(model):
    model, frames = model(), clip_of(7)
    together = run(model, frames, clip=False, chunk=4)
    alone = torch.cat([run(model, [frame], clip=False, chunk=1) for frame in frames])
    assert together.shape == (7, 30, 44) and together.dtype == torch.float32
    assert (together - alone).abs().max() < 1e-5 * alone.max() and alone.std() > 0.01
    assert torch.equal(together, run(model, frames, clip=False, chunk=4))


def test_metric_depth_stays_in_its_range():
    near = run(photo_model("a_metric_hypersim.pth"), clip_of(2))
    far = run(photo_model("a_metric_vkitti.pth"), clip_of(2))
    assert 0 < near.min() < near.max() < 20 and near.std() > 0.01
    assert torch.allclose(far, 4 * near, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    for tensors, name in ((stand_ins.depth_anything(), "a.pth"), (stand_ins.video_depth_anything(), "b.pth")):
        frames = clip_of(3)
        exact, rough = run(model_of(tensors, name), frames), run(model_of(tensors, name, dtype), frames)
        assert rough.dtype == torch.float32 and rough.unique().numel() > 2000  # not quantised
        assert (rough - exact).abs().max() < (0.02 if dtype == torch.float16 else 0.1) * exact.max()


def casting(layer):
    """The layer class with weights of any dtype, cast where they are used, as a host does that streams weights."""

    class Cast(layer):
        def forward(self, x):
            assert x.dtype == torch.float32
            if self.weight.dtype == x.dtype:
                return super().forward(x)
            return torch.func.functional_call(self, {name: weight.to(x) for name, weight in self.named_parameters()}, x)

    return Cast


@pytest.mark.parametrize("tensors", [stand_ins.depth_anything, stand_ins.video_depth_anything])
def test_weights_are_cast_where_they_are_used(tensors):
    """float64 storage computes in float32: every layer comes from `ops`, every raw parameter is fetched with a cast."""
    info, tensors = recognise(tensors(), "a.pth")
    ops = SimpleNamespace(**{name: casting(getattr(torch.nn, name)) for name in LAYERS})
    network = build(info, {name: tensor.double() for name, tensor in tensors.items()}, ops)
    layers = [m for m in network.modules() if any(True for _ in m.parameters(recurse=False))]
    assert {type(m).__name__ for m in layers} == {"Cast", "ViT", "LayerScale"}
    model = DepthModel(network, info, torch.device("cpu"), torch.float32)
    expected = run(model_of(tensors, "a.pth"), clip_of(3))
    assert (run(model, clip_of(3)) - expected).abs().max() < 1e-5 * expected.max()


# Clips


def straightforward(model, frames, resolution=28) -> torch.Tensor:
    """The published scheme word for word (bokehdepth_stage2 SPEC section 8.2): every window whole through the network, in numpy after."""
    count, size = len(frames), tuple(frames[0].shape[-2:])
    pixels = torch.cat([network_input(f[None], video_network_size(*size, resolution)) for f in frames])
    keyframes = [0, 12, *range(24, 32)]
    pixels = torch.cat([pixels, pixels[-1:].expand((22 - count % 22) % 22 + 10, -1, -1, -1)])
    done, previous, references = [], None, None
    for start in range(0, count, 22):
        window = pixels[start : start + 32].clone()
        if previous is not None:
            window[:10] = previous[keyframes]
        previous = window
        with torch.no_grad():
            depth = to_size(model.network(window[None])[0], size).double().numpy()
        if references is None:
            done = list(depth)
            references = [depth[0], depth[12]]
            continue
        if not model.info.metric:
            x, y = np.stack(depth[:2]).ravel(), np.stack(references).ravel()
            (scale, shift), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
            depth = np.maximum(depth * scale + shift, 0)
        for i in range(8):
            done[i - 8] = done[i - 8] * (1 - i / 7) + depth[2 + i] * (i / 7)
        done += list(depth[10:])
        references[1] = depth[12]
    return torch.tensor(np.stack(done[:count]))


@pytest.mark.parametrize("name", ["video_depth_anything_vits.pth", "metric_video_depth_anything_vits.pth"])
@pytest.mark.parametrize("count", [1, 22, 23, 32, 54, 75])
def test_clips_as_published_with_every_frame_encoded_once(name, count):
    model, frames = video_model(name), clip_of(count)
    encoded = []
    hook = model.network.pretrained.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    ours = run(model, frames, chunk=3)
    hook.remove()
    assert sum(encoded) == count and max(encoded) <= 3
    expected = straightforward(model, frames)
    assert ours.shape == expected.shape and (ours - expected).abs().max() < 2e-5 * expected.max()


def test_windows_show_the_first_frame_and_the_keyframes():
    slots = list(windows(60))
    assert [w[0] for w in slots] == [0, 0, 0] and slots[1][1] == 12 and slots[2][1:10] == [34, *range(46, 54)]
    assert max(map(max, slots)) == 59 and list(windows(1)) == [[0] * 32]


def test_positions_do_not_see_each_other_in_time(monkeypatch):
    """The temporal modules in small parts, as large pictures need them, are the same as in one."""
    model, frames = video_model(), clip_of(40)
    whole = run(model, frames)
    monkeypatch.setattr("bokeh_core.depth.video_depth_anything.ELEMENTS_AT_ONCE", 40_000)
    assert (run(model, frames) - whole).abs().max() < 1e-5 * whole.max()


def test_a_cut_starts_anew():
    model, frames = video_model(), clip_of(40)
    apart = torch.cat([run(model, frames[:5]), run(model, frames[5:30]), run(model, frames[30:])])
    assert torch.equal(run(model, frames, shots=[0, 5, 30]), apart)
    assert torch.equal(run(model, frames, shots=[5, 30]), apart)
    assert (run(model, frames) - apart).abs().max() > 1e-3 * apart.max()


def test_streaming_gives_every_frame_at_once():
    model, frames = video_model(), clip_of(20)
    taken = []
    maps = depth_maps(model, (taken.append(i) or f for i, f in enumerate(frames)), 20, clip=True, resolution=28, streaming=True, shots=[15])
    first = next(maps)
    assert len(taken) == 1 and torch.allclose(first, run(model, frames[:1], clip=False), rtol=1e-5)
    rest = torch.cat([first, *maps])
    assert torch.equal(rest[15:], run(model, frames[15:], streaming=True))
    assert (rest[1:15] - run(model, frames[1:15], clip=False)).abs().max() > 1e-3 * rest.max()


def test_frames_are_taken_lazily_and_let_go():
    model, alive = video_model(), weakref.WeakSet()

    def frames():
        for frame in clip_of(120):
            frame = frame.clone()
            alive.add(frame)
            yield frame

    seen = emitted = 0
    for maps in depth_maps(model, frames(), 120, clip=True, resolution=28, upsample=lambda low, image: to_size(low, image.shape[-2:])):
        emitted += len(maps)
        seen = max(seen, len(alive))
    assert emitted == 120 and seen <= 32 + 8


def test_upsampling_gets_the_picture_of_each_map():
    model, frames = video_model("metric_video_depth_anything_vits.pth"), clip_of(60)
    got = run(model, frames, upsample=lambda low, image: image[:, 1])
    assert torch.allclose(got, torch.stack([f[1] for f in frames]), atol=1e-6)
    photos = run(photo_model(), frames, upsample=lambda low, image: image[:, 2])
    assert torch.equal(photos, torch.stack([f[2] for f in frames]))


class Stop(Exception):
    pass


@pytest.mark.parametrize("model", [photo_model, video_model])
@pytest.mark.parametrize("at", [1, 5, 12])
def test_stopping_stops_within_a_chunk(model, at):
    calls, taken = [], []

    def progress(done, total):
        calls.append(done / total)
        if len(calls) == at:
            raise Stop

    frames = (taken.append(i) or f for i, f in enumerate(clip_of(60)))
    with pytest.raises(Stop):
        list(depth_maps(model(), frames, 60, clip=True, resolution=28, chunk=4, progress=progress))
    assert len(calls) == at and len(taken) <= 4 * at


@pytest.mark.parametrize("model", [photo_model, video_model])
def test_progress_moves_forward_to_the_end(model):
    done = []
    run(model(), clip_of(40), progress=lambda d, total: done.append((d, total)))
    assert done == sorted(done) and done[-1] == (40, 40) and {total for _, total in done} == {40}


def test_wrong_clips_are_refused():
    frames = clip_of(3)
    with pytest.raises(BokehError, match="ended after 3 frames; expected 5"):
        list(depth_maps(photo_model(), frames, 5, clip=True, resolution=28))
    with pytest.raises(BokehError, match="Frame 1 has the shape"):
        run(photo_model(), [frames[0], torch.rand(3, 8, 8)])
    with pytest.raises(BokehError, match="shots start at"):
        depth_maps(photo_model(), frames, 3, clip=True, shots=[0, 3])


def test_alignment_holds_for_flat_maps_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    x = 500 + 0.3 * torch.randn(2, 180, 320, generator=generator)
    scale, shift = scale_and_shift(x, 2.5 * x.double() - 7)
    assert abs(scale - 2.5) < 1e-9 and abs(shift + 7) < 1e-6
    assert scale_and_shift(torch.full((4,), 0.1), x[0, 0, :4]) == (1.0, 0.0)


# Memory


def peak(model, frames, count, **how) -> int:
    with LiveBytes(model.network.state_dict().values()) as live:
        for _ in depth_maps(model, frames, count, **({"clip": True, "resolution": 28} | how)):
            pass
    return live.peak


@pytest.mark.parametrize("model", [photo_model, video_model])
def test_long_clips_need_no_more_memory(model):
    model = model()
    frame = torch.rand(3, 28, 28)
    short, long = (peak(model, (frame for _ in range(n)), n) for n in (60, 200))
    assert long <= 1.01 * short


@pytest.mark.parametrize(("size", "video"), [("S", False), ("L", False), ("S", True), ("L", True)])
def test_the_estimate_of_memory_is_above_the_truth_and_near_it(size, video, monkeypatch):
    """Full size on the meta device, where attention would otherwise be counted unfused."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **more: torch.empty_like(q))
    info, tensors = recognise(manifest(f"bokehdepth_stage2/keys_{'vda' if video else 'dav2'}_vit{size.lower()}"), "a.pth")
    with torch.device("meta"):
        network = build(info, tensors)
    height, width = 518, 924
    with torch.no_grad(), LiveBytes(network.state_dict().values()) as live:
        if video:
            pixels = torch.empty(4, 3, height, width, device="meta")
            window = [level.new_empty((32, *level.shape[1:])) for level in network.encode(pixels)]
            depth = network.decode(window, 32)
        else:
            depth = network(torch.empty(4, 3, height, width, device="meta"))
        assert depth.shape[-2:] == (height, width)
    assert live.peak < activation_bytes(info, height, width, 4, video) < 1.6 * live.peak


def test_importing_stays_light():
    code = (
        "import sys, torch; before = set(sys.modules); import bokeh_core.depth.estimate, bokeh_core.depth.checkpoint; "
        "heavy = {m.split('.')[0] for m in set(sys.modules) - before} & {'diffusers', 'transformers', 'kornia', 'av', 'PIL', 'einops'}; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
