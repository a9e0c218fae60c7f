"""BokehDepth stage 1 away from ComfyUI: the adapter's file, its arithmetic, the recipe, and a whole stack on tiny networks."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from bokeh_core.errors import BokehError
from bokeh_core.samplers.kontext_stack import recipe
from bokeh_core.samplers.kontext_stack.adapter import RELEASED, build_adapter, build_corrections, read_adapter, report
from bokeh_core.samplers.kontext_stack.colour import color_transfer, lab_to_rgb, rgb_to_lab
from bokeh_core.samplers.kontext_stack.hooks import FluxHooks, flux_shape, rows_for_batch
from bokeh_core.samplers.kontext_stack.sampler import generate_stack
from bokeh_core.samplers.kontext_stack.transformer import attach

from ..stand_ins import kontext_stack as stand_ins

MANIFEST = Path(__file__).resolve().parents[3] / "shared" / "reference" / "bokehdepth_stage1" / "keys_bokeh_lora.json"
WIDTH, BLOCKS = 32, 3


@pytest.fixture
def tensors():
    return stand_ins.adapter(WIDTH, BLOCKS)


@pytest.fixture
def adapter(tensors):
    return build_adapter(tensors, "file")


def write(tmp_path, tensors, name="bokeh_lora.bin"):
    path = tmp_path / name
    save_file(tensors, path) if name.endswith(".safetensors") else torch.save(tensors, path)
    return path


def test_released_names_at_full_size():
    if not MANIFEST.exists():
        pytest.skip(f"the key manifest {MANIFEST.name} is not beside the repository")
    listed = json.loads(MANIFEST.read_text())
    listed = listed if isinstance(listed, list) else listed["keys"]
    tensors = {name: torch.empty(shape, device="meta") for name, shape, *_ in listed}
    assert len(tensors) == 460 and sum(tensor.numel() for tensor in tensors.values()) == 145_736_576
    adapter = build_adapter(tensors, "manifest")
    assert adapter.config == RELEASED
    assert {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    corrections = build_corrections(adapter)
    assert sum(parameter.numel() for parameter in corrections.parameters()) == 57 * 4 * 128 * 3072


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("old", "new"), [("", ""), ("adapter_modules.", ""), ("", "module."), ("", "a.b.module.")])
@pytest.mark.parametrize("name", ["bokeh_lora.bin", "bokeh_lora.safetensors"])
def test_every_spelling_of_the_file_gives_the_same(tmp_path, tensors, adapter, dtype, old, new, name):
    spelled = {new + key.replace(old, ""): tensor.to(dtype) for key, tensor in tensors.items()}
    read = read_adapter(write(tmp_path, spelled, name), blocks=BLOCKS, width=WIDTH)
    rounded = build_adapter({key: tensor.to(dtype) for key, tensor in tensors.items()}, "file")
    for i, rows in rounded.vectors_of_k([10.0, 30.0]).items():
        assert torch.equal(rows, read.vectors_of_k([10.0, 30.0])[i]) and rows.dtype == torch.float32
        assert torch.allclose(rows, adapter.vectors_of_k([10.0, 30.0])[i], atol=0.05)


def test_folder_prefers_safetensors(tmp_path, tensors):
    with pytest.raises(BokehError, match="holds neither"):
        read_adapter(tmp_path, blocks=BLOCKS, width=WIDTH)
    write(tmp_path, {}, "pytorch_model.bin")
    write(tmp_path, tensors, "model.safetensors")
    assert read_adapter(tmp_path, blocks=BLOCKS, width=WIDTH).config.rank == 128


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: without(t, "to_k_adp"), "6 tensors missing"),
        (lambda t: without(t, "adapter_modules.1.to_v_dof.up"), "1 tensors missing: adapter_modules.1.to_v_dof.up.weight"),
        (lambda t: without(t, "adapter_modules.1."), "adapts 2 of the 3 attention blocks"),
        (lambda t: without(t, "adapter_modules.2."), "adapts 2 of the 3 attention blocks"),
        (lambda t: without(t, "embedding_layer"), "lacks the K embedding"),
        (lambda t: {**t, "embedding_layer.0.weight": torch.zeros(64, 2)}, "embeds 2 numbers"),
        (lambda t: {**t, "adapter_modules.0.to_q_adp.up.weight": torch.zeros(WIDTH, 64)}, "of another shape"),
        (lambda t: {**t, "lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, "1 of its 29 tensors have other names"),
        (lambda t: {**t, "module.embedding_layer.0.bias": torch.zeros(64)}, "holds embedding_layer.0.bias twice"),
        (lambda t: stand_ins.adapter(WIDTH, BLOCKS, rank=64), "has rank 64; expected 128"),
        (lambda t: stand_ins.adapter(2 * WIDTH, BLOCKS), "made for a network 64 wide, but this FLUX is 32 wide"),
        (lambda t: stand_ins.adapter(WIDTH, BLOCKS + 1), "adapts 4 of the 3"),
        (lambda t: stand_ins.flux(), "is not the stage 1 adapter"),
    ],
)
def test_wrong_and_partial_files_are_refused(tmp_path, tensors, change, words):
    with pytest.raises(BokehError, match=words):
        read_adapter(write(tmp_path, change(tensors)), blocks=BLOCKS, width=WIDTH)


def test_k_is_clamped_and_embedded_in_float32(adapter):
    low, high = adapter.vectors_of_k([0, 1, -5])[0], adapter.vectors_of_k([30, 31, 1000])[0]
    assert torch.equal(low, low[:1].expand(3, -1)) and torch.equal(high, high[:1].expand(3, -1)) and not torch.equal(low, high)
    near = adapter.vectors_of_k([20.0, 20.01])[1]
    coarse = adapter.vectors_of_k([20.0, 20.01], torch.bfloat16)[1]
    assert not torch.equal(*near) and torch.equal(*coarse)  # 16 bit does not tell them apart


def test_vector_is_the_published_attention_to_one_token(adapter):
    """softmax over one key: to_k_dof has no say, every token gets the value."""
    condition = torch.tensor([[0.4], [0.9]])
    pairs = adapter.adapter_modules["1"]
    token = adapter.embed(condition)[:, None]
    query = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        heads = [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (query, pairs["to_k_dof"](token), pairs["to_v_dof"](token))]
    out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert torch.allclose(out, adapter.vectors(condition)[1][:, None].expand_as(out), atol=1e-5)


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_attn, self.txt_attn = (nn.Module() for _ in range(2))
        for stream in (self.img_attn, self.txt_attn):
            stream.qkv, stream.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(WIDTH, 7 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)


class FluxLike(nn.Module):
    """The layers the hooks look for, and nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.double_blocks, self.single_blocks = nn.ModuleList([Double()]), nn.ModuleList([Single(), Single()])
        self.vector_in, self.hidden_size = nn.Linear(1, 1), WIDTH
        self.requires_grad_(False)

    def layers(self):
        a, b = self.double_blocks[0], self.single_blocks[1]
        return [a.img_attn.qkv, a.img_attn.proj, a.txt_attn.qkv, a.txt_attn.proj, b.linear1, b.linear2]


def test_hooks_correct_q_and_k_and_add_the_vector(adapter):
    network = FluxLike()
    assert flux_shape(network) == (3, WIDTH)
    corrections = build_corrections(adapter)
    hooks = FluxHooks(network, corrections)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 5, layer.in_features, generator=generator) for layer in network.layers()]
    kept = [x.clone() for x in inputs]
    plain = [layer(x) for layer, x in zip(network.layers(), inputs, strict=True)]
    hooks.attach()
    hooks.attach()
    hooks.vectors = adapter.vectors_of_k([5.0, 25.0])
    outs = [layer(x.clone()) for layer, x in zip(network.layers(), inputs, strict=True)]

    for index, block in ((0, "0"), (4, "2")):
        q, k, rest = plain[index].tensor_split([WIDTH, 2 * WIDTH], -1)
        expected = torch.cat([q + corrections[block]["to_q_adp"](q), k + corrections[block]["to_k_adp"](k), rest], -1)
        assert torch.allclose(outs[index], expected, atol=1e-5)
    for index in (1, 3):
        layer, shifted = network.layers()[index], inputs[index] + hooks.vectors[0][:, None]
        assert torch.allclose(outs[index], F.linear(shifted, layer.weight, layer.bias), atol=1e-5)
    shifted = inputs[5].clone()
    shifted[..., :WIDTH] += hooks.vectors[2][:, None]
    assert torch.allclose(outs[5], F.linear(shifted, network.layers()[5].weight, network.layers()[5].bias), atol=1e-5)
    assert torch.equal(outs[2], plain[2])  # q, k and v of the text are never touched

    hooks.detach()
    assert all(torch.equal(layer(x), out) for layer, x, out in zip(network.layers(), kept, plain, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("change", ["none", "lacking", "chroma"])
def test_other_models_are_named(change):
    network = FluxLike()
    if change == "none":
        network = nn.Linear(1, 1)
    elif change == "lacking":
        del network.single_blocks[0].linear2
    else:
        network.vector_in = None
    with pytest.raises(BokehError, match=f"The model is a {type(network).__name__}, not FLUX.1"):
        flux_shape(network)


def test_k_of_a_batch():
    vectors = {0: torch.arange(3.0)[:, None]}
    assert rows_for_batch(vectors, 6)[0].flatten().tolist() == [0, 1, 2, 0, 1, 2]  # conditions outermost
    assert rows_for_batch({0: torch.ones(1, 4)}, 5)[0].shape == (5, 4)
    with pytest.raises(BokehError, match="3 values of K for a batch of 4"):
        rows_for_batch(vectors, 4)


def test_diffusers_transformer_of_another_size_is_refused(adapter):
    with pytest.raises(BokehError, match="made for blocks up to 2 of width 32; this FLUX has 3 blocks of width 128"):
        attach(stand_ins.diffusers_flux(stand_ins.flux()), adapter)


@pytest.mark.parametrize(("width", "height", "steps"), [(512, 512, 10), (768, 512, 28), (1024, 1024, 1), (64, 48, 4)])
def test_schedule_is_the_scheduler_of_diffusers(width, height, steps):
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    tokens = width * height // 256
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.5 + 0.65 * (tokens - 256) / 3840)
    assert torch.equal(recipe.schedule(width, height, steps), scheduler.sigmas)


def test_sizes():
    assert recipe.working_size(1024, 684, 512, recipe.BEST) == (768, 512)
    assert recipe.working_size(684, 1024, 512, recipe.BEST) == (512, 768)
    assert recipe.working_size(1920, 1080, 512, recipe.AS_PUBLISHED) == (512, 512)
    for width, height in ((333, 777), (1920, 1080), (100, 5000)):
        size = recipe.working_size(width, height, 512, recipe.BEST)
        assert all(side % 16 == 0 for side in size) and abs(math.log(size[0] / size[1] * height / width)) < 0.03


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("10, x", "'10, x'"), ("0, 10", "holds 0"), ("-3", "holds -3"), ("nan", "holds nan")]
)
def test_k_lists(text, words):
    assert recipe.parse_k_list("10, 20.5;30\n 4") == [10, 20.5, 30, 4]
    with pytest.raises(BokehError, match=words):
        recipe.parse_k_list(text)


def test_colours_follow_without_raising_contrast():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(3, 32, 48, generator=generator) * 0.5
    frame = F.avg_pool2d(reference[None], 9, 1, 4)[0] + 0.2
    mean = color_transfer(frame, reference, match_contrast=False)
    both = color_transfer(frame, reference, match_contrast=True)
    assert abs(float(mean.mean() - reference.mean())) < 0.04 < 0.15 < abs(float(frame.mean() - reference.mean()))
    assert float(mean.std()) == pytest.approx(float(frame.std()), rel=0.1)
    assert float(both.std()) > 2 * float(frame.std())
    flat = color_transfer(torch.full((3, 8, 8), 0.5), reference, match_contrast=True)
    assert torch.isfinite(flat).all() and flat.std(dim=(1, 2)).max() == 0


def test_lab_is_close_to_the_floating_point_definition():
    from kornia.color import rgb_to_lab as float_lab

    picture = torch.randint(0, 256, (60, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    lab = float_lab(torch.from_numpy(picture).movedim(-1, 0)[None] / 255)[0].movedim(0, -1).numpy()
    scaled = lab * [255 / 100, 1, 1] + [0, 128, 128]
    assert abs(rgb_to_lab(picture) - scaled).max() < 2  # OpenCV's constants and rounding are its own
    assert abs(lab_to_rgb(rgb_to_lab(picture)).astype(int) - picture).mean() < 1.5


@pytest.fixture
def networks():
    """Everything generate_stack takes, tiny and random."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    depth = 4
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * depth, up_block_types=["UpDecoderBlock2D"] * depth, block_out_channels=[8] * depth,
        layers_per_block=1, latent_channels=stand_ins.LATENT, norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    transformer = stand_ins.diffusers_flux(stand_ins.flux())
    adapter = build_adapter(stand_ins.adapter(128, 3), "file")
    attach(transformer, adapter)

    def encode_text(prompt):
        prompts.append(prompt)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, 9, stand_ins.TEXT, generator=generator), torch.randn(1, stand_ins.POOLED, generator=generator)

    prompts = []
    made = {"transformer": transformer, "vae": vae, "adapter": adapter, "encode_text": encode_text}
    return SimpleNamespace(prompts=prompts, made=made)


def test_whole_stack(networks):
    image = torch.rand(3, 50, 75, generator=torch.Generator().manual_seed(3))
    kept, told = image.clone(), []
    stack = generate_stack(image, [10, 30], **networks.made, resolution=64, steps=2, progress=lambda *done: told.append(done))
    assert torch.equal(image, kept)
    assert stack.frames.shape == (2, 3, 64, 96) and stack.reference.shape == (3, 64, 96) and stack.k.tolist() == [10, 30]
    assert networks.prompts == [recipe.prompt_for(recipe.PROMPT, k) for k in (10, 30)]
    assert told[-1] == (2, 2) and told == sorted(told)
    assert (stack.frames[0] - stack.frames[1]).abs().max() > 0  # K reaches the pictures
    # One at a time is the same: each frame depends on its own K and prompt alone, and all share their noise.
    alone = generate_stack(image, [30], **networks.made, resolution=64, steps=2)
    assert torch.equal(alone.frames[0], stack.frames[1])
    other = generate_stack(image, [30], **networks.made, resolution=64, steps=2, seed=1)
    assert not torch.equal(other.frames, alone.frames)
    published = generate_stack(image, [30], **networks.made, resolution=64, steps=2, fidelity=recipe.AS_PUBLISHED)
    assert published.frames.shape == (1, 3, 64, 64)


def test_half_precision(networks):
    """As the published pipeline runs: everything in bfloat16."""
    made = {**networks.made, "transformer": networks.made["transformer"].to(torch.bfloat16), "vae": networks.made["vae"].to(torch.bfloat16)}
    image = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(3))
    stacks = [
        generate_stack(image, [20], **made, resolution=48, steps=2, colour="off", fidelity=f) for f in (recipe.BEST, recipe.AS_PUBLISHED)
    ]
    assert all(stack.frames.dtype == torch.float32 and torch.isfinite(stack.frames).all() for stack in stacks)
    assert 0 < (stacks[0].frames - stacks[1].frames).abs().mean() < 0.1


def test_interruption_passes_through(networks):
    class Stop(BaseException):
        pass

    def stop(done, total):
        if done > 0.5:
            raise Stop

    with pytest.raises(Stop):
        generate_stack(torch.rand(3, 48, 48), [10, 30], **networks.made, resolution=48, steps=3, progress=stop)


def test_bad_requests_are_explained(networks):
    image = torch.rand(3, 48, 48)
    with pytest.raises(BokehError, match="holds 0"):
        generate_stack(image, [0], **networks.made)
    with pytest.raises(BokehError, match="There are 0 steps"):
        generate_stack(image, [10], **networks.made, resolution=48, steps=0)
    with pytest.raises(BokehError, match="colour transfer is 'x'"):
        generate_stack(image, [10], **networks.made, colour="x")


def test_report(tensors):
    assert report({"conv.weight": torch.zeros(1)}, "x.pth") is None
    found = report(tensors, "bokeh_lora.bin")
    assert "stage 1 adapter" in found.title and "non-commercial" in found.licence
    assert dict(found.facts)["bokeh keys that are zero, as training leaves them"] == "0 of 3"
    assert len(found.problems) == 2 and "The list of blocks is 0-2; the released adapter has 0-56." in found.problems
    assert "missing" in report(without(tensors, "to_k_adp"), "x.bin").problems[0]
