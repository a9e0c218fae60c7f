"""A tiny Any-to-Bokeh with random weights, in the folders and under the tensor names of the release."""

import json
from pathlib import Path

import torch

WIDTH = 64  # of the UNet: one head, as wide as the real ones

UNET = {
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": [WIDTH, WIDTH],
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
    "num_attention_heads": [1, 1],
    "num_frames": 25,
    "sample_size": 96,
}
VAE = {"channels": (32, 32, 32, 32), "layers": 1}
IMAGE_ENCODER = {"hidden": 80, "mlp": 160, "layers": 2, "heads": 1, "patch": 56, "size": 224, "projection": 32}


def tensors(seed: int = 0, vae: dict = VAE) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the files unet, vae and image_encoder. Gates are open and factors uneven, so that everything has an effect.

    vae  keywords of its halves
    """
    from bokeh_core.samplers.any_to_bokeh.image_encoder import ImageEncoder
    from bokeh_core.samplers.any_to_bokeh.network import AnyToBokehUNet
    from bokeh_core.samplers.any_to_bokeh.vae import LatentEncoder, SkipDecoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = AnyToBokehUNet(**UNET).state_dict()
        decoder = {f"decoder.{name}": tensor for name, tensor in SkipDecoder(**vae).state_dict().items()}
        vae = LatentEncoder(**vae).state_dict() | decoder
        image_encoder = ImageEncoder(**IMAGE_ENCODER).state_dict()
        for table in (unet, vae, image_encoder):
            for name, tensor in table.items():
                if name.endswith((".alpha_attn", ".alpha_dense", "mix_factor", "class_embedding")):
                    tensor.normal_()
    return {"unet": unet, "vae": vae, "image_encoder": image_encoder}


def write(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, vae: dict = VAE) -> Path:
    """Write the release's folder: unet/unet, vae and image_encoder with config.json and safetensors. Returns it."""
    from safetensors.torch import save_file

    configs = {
        "unet/unet": UNET | {"_class_name": "UNetSpatioTemporalConditionModel"},
        "vae": {"block_out_channels": vae["channels"], "layers_per_block": vae["layers"], "scaling_factor": 0.18215},
        "image_encoder": {"num_attention_heads": IMAGE_ENCODER["heads"], "hidden_size": IMAGE_ENCODER["hidden"]},
    }
    weights = tensors(seed, vae)
    for name, config in configs.items():
        part = folder / name
        part.mkdir(parents=True, exist_ok=True)
        (part / "config.json").write_text(json.dumps(config))
        table = {key: tensor.to(dtype).contiguous() for key, tensor in weights[name.split("/")[0]].items()}
        save_file(table, part / ("model.safetensors" if name == "image_encoder" else "diffusion_pytorch_model.safetensors"))
    return folder
