"""The tensor names of single-file Stable Diffusion checkpoints, made from diffusers' names by rules written down here on their own."""

import re

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}


def unet_to_ldm(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """layers: resnets of each down block."""
    return {"model.diffusion_model." + _unet_name(name, layers, tensors): tensor for name, tensor in tensors.items()}


def _unet_name(name, layers, tensors):
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    if name.startswith("mid_block."):
        kind, number, rest = re.fullmatch(r"mid_block\.(\w+)\.(\d)\.(.+)", name).groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}." + (rest if kind == "attentions" else _resnet(rest))
    side, block, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    block, number = int(block), int(number)
    if side == "down":
        first, folder = 1 + block * (layers + 1), "input_blocks"
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op." + rest.removeprefix("conv.")
    else:
        first, folder = block * (layers + 1), "output_blocks"
        if kind == "upsamplers":
            attended = f"up_blocks.{block}.attentions.0.norm.weight" in tensors
            return f"output_blocks.{first + layers}.{2 if attended else 1}.{rest}"
    return f"{folder}.{first + number}." + (f"1.{rest}" if kind == "attentions" else f"0.{_resnet(rest)}")


def _resnet(rest):
    layer, _, end = rest.partition(".")
    return f"{RESNET[layer]}.{end}"


def vae_to_ldm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    words = {
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "conv_shortcut": "nin_shortcut",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if "attentions.0.to_" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda found: f"decoder.up.{count - 1 - int(found[1])}", name)
        name = re.sub(r"(down|up)\.(\d)\.resnets\.", r"\1.\2.block.", name)
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        renamed["first_stage_model." + name] = tensor.contiguous()
    return renamed


def text_to_open_clip(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A transformers CLIP text encoder (with projection) as OpenCLIP stores it."""
    words = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers.": "transformer.resblocks.",
        "text_model.final_layer_norm": "ln_final",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            renamed[f"{prefix}text_projection"] = tensor.T.contiguous()
            continue
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        if "self_attn.q_proj" in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"])
        name = name.replace("q_proj.", "in_proj_")
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        renamed[prefix + name] = tensor
    return renamed
