"""Base models from the files users have: a diffusers folder and a single file give the same tensors and networks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bokeh_core.checkpoints.loading import load_strict
from bokeh_core.checkpoints.stable_diffusion import read_unet, read_vae
from bokeh_core.errors import BokehError
from tests.stand_ins import bokehdiff as sdxl
from tests.stand_ins.ldm import unet_to_ldm, vae_to_ldm

SD21 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 64, 128, 128],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": [1, 1, 2, 2],
    "cross_attention_dim": 96,
    "use_linear_projection": True,
}
CONFIGS = {"SDXL": sdxl.UNET, "SD 2.1": SD21}
WEIGHTS = "diffusion_pytorch_model"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def models():
    """(unet, vae) tensors under diffusers' names, by kind of base model."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng([]):
        torch.manual_seed(4)
        vae = AutoencoderKL.from_config(sdxl.VAE).state_dict()
        return {name: (UNet2DConditionModel.from_config(config).state_dict(), vae) for name, config in CONFIGS.items()}


def write(folder, config, tensors, file=f"{WEIGHTS}.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Network", **config}))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", CONFIGS)
def test_folder_and_single_file_agree(models, kind, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae = models[kind]
    write(tmp_path / "base" / "unet", CONFIGS[kind], unet)
    write(tmp_path / "base" / "vae", sdxl.VAE, vae)
    single = unet_to_ldm(unet, 2) | vae_to_ldm(vae) | {"conditioner.embedders.0.x": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file({name: tensor.clone() for name, tensor in single.items()}, tmp_path / "base.safetensors")
    for read, wanted, network in ((read_unet, unet, UNet2DConditionModel), (lambda path: read_vae(path, 0.13025), vae, AutoencoderKL)):
        folder, file = read(tmp_path / "base"), read(tmp_path / "base.safetensors")
        assert same(folder.tensors, wanted) and same(file.tensors, wanted)
        outcomes = []
        for part in (folder, file):  # the configuration read from the shapes builds the same network
            with torch.device("meta"):
                built = network.from_config(part.config)
            load_strict(built, part.tensors, kind)
            outcomes.append(run(built, kind))
        assert torch.equal(*outcomes) and outcomes[0].std() > 0


def run(network, kind):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if hasattr(network, "encoder"):
            return network(torch.rand(1, 3, 32, 32, generator=generator)).sample
        more = {"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)} if kind == "SDXL" else None
        text = torch.randn(1, 7, network.config.cross_attention_dim, generator=generator)
        return network(torch.randn(1, 4, 16, 16, generator=generator), 499, text, added_cond_kwargs=more).sample


def test_scaling_factor_comes_from_the_folder_else_from_the_caller(models, tmp_path):
    vae = models["SDXL"][1]
    write(tmp_path / "a" / "vae", {**sdxl.VAE, "scaling_factor": 0.5}, vae)
    save_file({name: tensor.clone() for name, tensor in vae_to_ldm(vae).items()}, tmp_path / "b.safetensors")
    assert read_vae(tmp_path / "a", 0.13025).config["scaling_factor"] == 0.5
    assert read_vae(tmp_path / "b.safetensors", 0.13025).config["scaling_factor"] == 0.13025


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names_of_a_vae(models, tmp_path, convolutions):
    vae, old = models["SDXL"][1], {}
    for name, tensor in models["SDXL"][1].items():
        if ".mid_block.attentions." in name:
            for new, word in OLD_NAMES.items():
                name = name.replace(f".{new}.", f".{word}.")
            tensor = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
        old[name] = tensor
    assert len(old.keys() - vae.keys()) == 16
    write(tmp_path / "vae", sdxl.VAE, old)
    assert same(read_vae(tmp_path, 1.0).tensors, vae)
    save_file({name: tensor.clone() for name, tensor in old.items()}, tmp_path / "vae.safetensors")
    assert same(read_vae(tmp_path / "vae.safetensors", 1.0).tensors, vae)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
def test_vae_files_of_every_prefix(models, tmp_path, prefix):
    vae = models["SDXL"][1]
    tensors = {prefix + name.removeprefix("first_stage_model."): tensor.clone() for name, tensor in vae_to_ldm(vae).items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    assert same(read_vae(tmp_path / "vae.safetensors", 1.0).tensors, vae)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_sharded_folder(models, tmp_path, variant):
    unet = models["SDXL"][0]
    names = sorted(unet)
    shards = {f"{WEIGHTS}{variant}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        write(tmp_path / "unet", sdxl.UNET, {name: unet[name] for name in held}, file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors.index{variant}.json").write_text(json.dumps(index))
    assert same(read_unet(tmp_path).tensors, unet)
    assert same(read_unet(tmp_path / "unet").tensors, unet)  # the subfolder itself
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors.index{variant}.json").write_text(json.dumps(index))
    with pytest.raises(BokehError, match="outside its folder"):
        read_unet(tmp_path)


@pytest.mark.parametrize("file", [f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.fp16.bin"])
def test_other_file_names(models, tmp_path, file):
    write(tmp_path / "unet", sdxl.UNET, models["SDXL"][0], file)
    assert same(read_unet(tmp_path).tensors, models["SDXL"][0])


def test_wrong_files_say_what_was_found(models, tmp_path):
    unet = models["SDXL"][0]
    with pytest.raises(BokehError, match=r"no unet/config\.json"):
        read_unet(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(BokehError, match="damaged"):
        read_unet(tmp_path)
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(BokehError, match="has no weights"):
        read_unet(tmp_path)
    save_file({"alphabet": torch.zeros(1)}, tmp_path / "other.safetensors")
    for read in (read_unet, lambda path: read_vae(path, 1.0)):
        with pytest.raises(BokehError, match=r"found: alphabet.*base checkpoint"):
            read(tmp_path / "other.safetensors")
    flat = {name: tensor.clone() for name, tensor in unet_to_ldm(unet, 2).items() if ".0.op." not in name}
    save_file(flat, tmp_path / "flat.safetensors")
    with pytest.raises(BokehError, match="no downsampling layer"):
        read_unet(tmp_path / "flat.safetensors")
    save_file({name: tensor.clone() for name, tensor in unet_to_ldm(unet, 2).items()}, tmp_path / "no_vae.safetensors")
    with pytest.raises(BokehError, match="holds no Stable Diffusion VAE"):
        read_vae(tmp_path / "no_vae.safetensors", 1.0)
