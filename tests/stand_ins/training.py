"""Tiny runs of the training recipes: stand-in base files written into a folder, and the TOML content that trains on them."""

from collections.abc import Callable
from pathlib import Path

# 4 steps of 4 samples each; checkpoints after 2 and 4.
TRAIN = {"steps": 4, "batch": 4, "accumulate": 1, "precision": "no", "checkpoint_every": 2, "preview_every": 0, "workers": 0, "seed": 7}

_recipes: dict[str, Callable[[Path], dict]] = {}


def tiny(name: str):
    """Register write(folder) -> {"model": ..., "data": ..., "options": ...}, and "train": ... where it differs, of the tiny run `name`.

    name  as in RECIPES below it is called by; several stages of one recipe have names of their own and give "recipe" too
    """

    def register(write):
        _recipes[name] = write
        return write

    return register


def names() -> list[str]:
    """All tiny runs there are."""
    return sorted(_recipes)


def tiny_recipe(name: str, folder: Path) -> dict:
    """The content of a TOML file for a tiny run; its base files are written into `folder`, which exists. Paths are absolute."""
    content = _recipes[name](folder)
    return {"recipe": name, **content, "train": TRAIN | {"steps": 4} | content.get("train", {})}


def tiny_settings(name: str, folder: Path, **train):
    """The same as Settings, with some of [train] replaced."""
    from bokeh_core.training.settings import parse

    content = tiny_recipe(name, folder)
    return parse({**content, "train": content["train"] | train}, folder)


@tiny("kontext_stack")
def kontext_stack(folder: Path) -> dict:
    """Every prompt is encoded beforehand, by numbers drawn from its words."""
    import hashlib

    import torch

    from bokeh_core.training import kontext_stack as stack

    from .kontext_stack import POOLED, TEXT, diffusers_flux, flux

    diffusers_flux(flux()).save_pretrained(folder / "transformer")
    kontext_vae(folder / "vae")
    options = {
        "size": 64, "group": 2, "k_step": 7.25, "optimiser": "adamw", "learning_rate": 2e-3, "weight_decay": 0.0, "warmup": 0,
        "checkpointing": False,
    }  # fmt: skip

    def encode(words):
        seed = int.from_bytes(hashlib.sha1(words.encode()).digest()[:4], "big")
        drawn = torch.randn(9, TEXT, generator=torch.Generator().manual_seed(seed))
        return drawn[None, :8], drawn[8:, :POOLED]

    stack.write_prompts(encode, stack.needed_prompts([], stack.Options(**options)), folder / "prompts.safetensors")
    model = {"transformer": str(folder / "transformer"), "vae": str(folder / "vae"), "dtype": "float32"}
    return {"model": model, "data": {"prompts": str(folder / "prompts.safetensors")}, "options": options}


def kontext_vae(folder: Path) -> None:
    """A tiny VAE of 16 channels, 1/8 of the size, as FLUX has it; written as diffusers does."""
    import torch
    from diffusers import AutoencoderKL

    from bokeh_core.samplers.kontext_stack.recipe import VAE_SCALE, VAE_SHIFT

    from .kontext_stack import LATENT

    with torch.random.fork_rng():
        torch.manual_seed(5)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[8] * 4,
            layers_per_block=1, latent_channels=LATENT, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
            scaling_factor=VAE_SCALE, shift_factor=VAE_SHIFT,
        )  # fmt: skip
    vae.save_pretrained(folder)


def _dsfa(folder: Path, file: str, tensors: dict) -> dict:
    from safetensors.torch import save_file

    save_file(tensors, folder / file)
    # 84 px: the smallest on which scenes can be drawn and UniDepth's rays have a width.
    options = {"size": 84, "k": [10.0, 30.0], "learning_rate": 1e-3, "head_learning_rate": 1e-3, "warmup": 0}
    return {"recipe": "dsfa", "model": {"depth": str(folder / file)}, "options": options, "train": {"batch": 2}}


@tiny("dsfa_depth_anything")
def dsfa_depth_anything(folder: Path) -> dict:
    """New blocks on a plain metric Depth Anything V2."""
    from .depth import depth_anything

    tensors, last = depth_anything(), "depth_head.scratch.output_conv2.2"
    tensors[f"{last}.weight"] *= 0.1  # of 80 m it says about 6, as a trained model might of such a scene, and not all of them
    tensors[f"{last}.bias"] -= 2.5
    return _dsfa(folder, "depth_anything_v2_metric_vkitti_vits.safetensors", tensors)


@tiny("dsfa_unidepth")
def dsfa_unidepth(folder: Path) -> dict:
    """New blocks on a plain UniDepthV2."""
    from .dsfa import unidepth

    return _dsfa(folder, "unidepth_v2.safetensors", unidepth())


def train_alone(content: dict, out: Path, stall_after: int) -> None:
    """In a process of its own: a run that waits for its end once so many steps are done."""
    import time

    import torch

    from bokeh_core.training import engine, settings

    torch.set_num_threads(1)  # as in the tests: sums of other numbers of threads have other last digits

    def progress(done, total):
        if done == stall_after:
            time.sleep(600)

    plan = settings.parse(content, out)
    engine.fit(plan.build(), plan, out, progress=progress)


def train_among(rank: int, processes: int, port: int, contents: dict[str, dict], outs: dict[str, Path]) -> None:
    """In one of several processes: runs, one after the other, as `accelerate launch --cpu` would start them."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    import torch

    from bokeh_core.training import engine, settings

    torch.set_num_threads(1)
    for name, content in contents.items():
        plan = settings.parse(content, outs[name])
        engine.fit(plan.build(), plan, outs[name])


@tiny("bokehdiff")
def _bokehdiff(folder: Path) -> dict:
    from . import bokehdiff

    parts = bokehdiff.base_parts()
    parts["unet"] = parts["unet"] | {name: 0.3 * parts["unet"][name] for name in ("conv_out.weight", "conv_out.bias")}  # less noise
    base = bokehdiff.write_folder(folder / "tiny_sdxl", parts | {"vae": pooling_vae({**bokehdiff.VAE, **POOLING})}, vae=POOLING)
    return {
        "model": {"base": str(base)},
        "data": {"size": 80, "crop": 64, "k0": 2, "rays": 64},
        "options": {"rate": 1e-2, "encoder_share": 0.1, "warmup": 0, "schedule_steps": 40, "edge": 0.1, "hardness": 1e5},
    }


POOLING = {"norm_num_groups": 8}  # what a config of 32 channels needs for `pooling_vae`


def pooling_vae(config: dict) -> dict:
    """Weights of a diffusers AutoencoderKL of 32 channels throughout that make it a real, if poor, autoencoder without training: latents
    are means of 8 x 8 px, pictures their blocks. So a tiny network has something to gain.

    In each group of four channels x, -x, c, -c group normalisation keeps x as it is up to a factor, and silu(x) - silu(-x) = x.
    """
    import torch
    from diffusers import AutoencoderKL

    loud, scale = 10.0, config["scaling_factor"]
    vae = AutoencoderKL.from_config(config)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if name.endswith(("conv2.weight", "conv2.bias", "to_out.0.weight", "to_out.0.bias")):
                p.mul_(0.02)  # residual branches almost out of the way
            elif name.split(".")[1] in ("conv_in", "conv_out"):
                p.zero_()
            elif name.endswith((".conv.weight", ".conv.bias")):  # samplers: every channel as it is
                p.zero_()
                if p.ndim == 4:
                    taps = p[:, :, :2, :2] if "downsamplers" in name else p[:, :, 1:2, 1:2]
                    taps.copy_(torch.eye(32)[..., None, None].expand_as(taps) / taps[0, 0].numel())
            elif name.startswith(("quant_conv", "post_quant_conv")):
                p.copy_(torch.eye(len(p))[..., None, None] if p.ndim == 4 else 0 * p)
        for half, gain in ((vae.encoder, 1.0), (vae.decoder, scale)):
            for i in range(3):
                half.conv_in.weight[4 * i, i, 1, 1], half.conv_in.weight[4 * i + 1, i, 1, 1] = gain, -gain
                out = loud / 2**0.5 * (1 / scale if half is vae.encoder else 1.0)
                half.conv_out.weight[i, 4 * i, 1, 1], half.conv_out.weight[i, 4 * i + 1, 1, 1] = out, -out
            half.conv_in.bias[2::4], half.conv_in.bias[3::4] = loud, -loud
    return {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}


def any_to_bokeh_list(folder: Path, clips: int = 3, frames: int = 8) -> Path:
    """Tiny rendered clips with one object, 32 x 32 px, as a list on disk."""
    from bokeh_core.training.any_to_bokeh_clips import Cutouts, Shots, write_list

    shots = Shots(pulls=0.3, ramps=0.3, published=True, samples=9)
    return write_list(folder, clips, Cutouts(None, None, 64), size=(32, 32), objects=1, shots=shots, frames=frames)


def _any_to_bokeh(folder: Path, stage: int, data: dict) -> dict:
    from . import any_to_bokeh

    vae = any_to_bokeh.VAE | {"layers": 2}  # with one, the attention in the decoder's middle has no place
    model = {"unet": str(any_to_bokeh.write(folder / "any_to_bokeh", vae=vae))}
    options = {"stage": stage, "frames": 2, "learning_rate": 1e-3}
    return {"recipe": "any_to_bokeh", "model": model, "data": {"height": 32, "width": 32} | data, "options": options, "train": {"batch": 2}}


@tiny("any_to_bokeh_1")
def any_to_bokeh_1(folder: Path) -> dict:
    """The whole UNet, on clips made on the fly."""
    return _any_to_bokeh(folder, 1, {"objects": 1, "synthetic": 64, "shots": {"published": True, "samples": 9}})


@tiny("any_to_bokeh_2")
def any_to_bokeh_2(folder: Path) -> dict:
    """Temporal layers on disturbed disparity, from clips on disk."""
    return _any_to_bokeh(folder, 2, {"clips": str(any_to_bokeh_list(folder / "clips"))})


@tiny("any_to_bokeh_3")
def any_to_bokeh_3(folder: Path) -> dict:
    """The VAE's decoder."""
    return _any_to_bokeh(folder, 3, {"clips": str(any_to_bokeh_list(folder / "clips"))})


@tiny("magicbokeh_1")
def magicbokeh_restoration(folder: Path) -> dict:
    """From a base model whose colours are off."""
    from . import linear_sd

    base = linear_sd.write_base(folder / "base", flaw=0.02)
    options = {"learning_rate": 5e-5}
    return {"recipe": "magicbokeh", "model": {"base": str(base)}, "data": {"size": 96}, "options": options, "train": {"batch": 2}}


@tiny("magicbokeh_2")
def magicbokeh_bokeh(folder: Path) -> dict:
    """From a file of restoration that has learned nothing yet, on a base model whose colours are off."""
    from bokeh_core.training import magicbokeh

    from . import linear_sd

    base = linear_sd.write_base(folder / "base", flaw=0.02)
    magicbokeh.MagicBokehTraining(magicbokeh.Model(base), magicbokeh.Data(size=96), magicbokeh.Options(rank_bokeh=8), 0).save(folder)
    return {
        "recipe": "magicbokeh",
        "model": {"base": str(base), "start": str(folder / magicbokeh.FILE)},
        "data": {"size": 96, "rays": 64},
        "options": {"stage": "bokeh", "learning_rate": 2e-4, "restoration_rate": 2e-5},
        "train": {"batch": 2},
    }


@tiny("degraded_depth")
def degraded_depth(folder: Path) -> dict:
    """A teacher, and a student that starts from other weights."""
    from safetensors.torch import save_file

    from .depth import depth_anything

    files = {"teacher": folder / "depth_anything_v2_teacher.safetensors", "student": folder / "depth_anything_v2_student.safetensors"}
    for seed, file in enumerate(files.values()):
        save_file(depth_anything(seed), file)
    return {
        "model": {name: str(file) for name, file in files.items()},
        "data": {"size": 98},
        "options": {"encoder_rate": 3e-4, "head_rate": 3e-4},
    }


def write_toml(content: dict, path: Path) -> Path:
    """A recipe file with this content: text, numbers, lists and tables of these."""
    import json

    def value(one):
        if isinstance(one, dict):
            return "{" + ", ".join(f"{key} = {value(part)}" for key, part in one.items()) + "}"
        if isinstance(one, list | tuple):
            return "[" + ", ".join(map(value, one)) + "]"
        return json.dumps(one)  # what JSON writes for the rest, TOML reads

    tables = {key: part for key, part in content.items() if isinstance(part, dict)}
    lines = [f"{key} = {value(part)}" for key, part in content.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {value(part)}" for key, part in table.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
