"""BokehDiff's one fixed prompt, through the two text encoders of an SDXL base model. The encoders are needed for nothing else."""

from pathlib import Path

import torch
from torch import nn

from ...checkpoints.loading import load_strict
from ...checkpoints.reading import read_checkpoint
from ...checkpoints.stable_diffusion import HEAD_WIDTH, Part, read_folder
from ...errors import BokehError

PROMPT = "an excellent photo with a large aperture"
_START, _END, _LENGTH = 49406, 49407, 77
_WORDS = (_START, 550, 4239, 1125, 593, 320, 3638, 13681, 941, _END)  # CLIP's numbers for the prompt (SPEC section 3)
PROMPT_IDS = tuple(torch.tensor([_WORDS + (padding,) * (_LENGTH - len(_WORDS))]) for padding in (_END, 0))  # [1, 77] per encoder

_FIRST, _SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."  # in a single checkpoint file


def read_text_encoders(base: str | Path) -> tuple[Part, Part]:
    """The two text encoders of a diffusers folder or a single SDXL checkpoint file."""
    base = Path(base)
    if base.is_dir():
        return read_folder(base, "text_encoder"), read_folder(base, "text_encoder_2")
    tensors = read_checkpoint(base).tensors
    first = {name.removeprefix(_FIRST): tensor for name, tensor in tensors.items() if name.startswith(_FIRST)}
    second = {name: tensor for name, tensor in tensors.items() if name.startswith(_SECOND)}
    if not first or f"{_SECOND}text_projection" not in second:
        raise BokehError(
            f"{base.name} holds no SDXL text encoders (conditioner.embedders.0 and 1), which BokehDiff needs for its prompt; "
            "choose the full SDXL checkpoint, not the UNet alone."
        )
    second = _from_open_clip(second)
    return Part(first, _config(first, "quick_gelu")), Part(second, _config(second, "gelu"))


def embed_prompt(first: Part, second: Part, ids: tuple[torch.Tensor, torch.Tensor] = PROMPT_IDS) -> tuple[torch.Tensor, torch.Tensor]:
    """(text [1, 77, D1 + D2], pooled [1, P]) float32: penultimate hidden states of both encoders, projected output of the second.

    ids  token numbers [1, 77] for each encoder
    """
    try:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as error:
        raise BokehError("BokehDiff needs the package transformers for its prompt; install it with: pip install transformers") from error

    outputs = []
    for part, kind, numbers in ((first, CLIPTextModel, ids[0]), (second, CLIPTextModelWithProjection, ids[1])):
        network = _build(kind, part)
        with torch.no_grad():
            outputs.append(network(numbers, output_hidden_states=True))
    text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return text, outputs[1].text_embeds


def _build(kind: type, part: Part) -> nn.Module:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig.from_dict(part.config)
    with torch.device("meta"):
        network = kind(config)
    wanted = network.state_dict()
    tensors = {}
    for name, tensor in part.tensors.items():
        short = name.removeprefix("text_model.")  # newer versions of transformers name some layers without it
        tensors[name if name in wanted or short not in wanted else short] = tensor.float()
    load_strict(network, tensors, "A text encoder of the base model", ignore=[name for name in tensors if name.endswith("position_ids")])
    for module in network.modules():
        if hasattr(module, "position_ids"):  # a buffer that no file holds
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    return network


def _from_open_clip(tensors):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    class Shape:  # all that the converter reads of a network
        class config:
            hidden_size = tensors[f"{_SECOND}token_embedding.weight"].shape[1]

    return convert_open_clip_checkpoint(Shape, tensors, prefix=_SECOND)


def _config(tensors, activation: str) -> dict:
    """Keywords of transformers' CLIPTextConfig, from the shapes of its tensors."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    layers = {name.split(".")[3] for name in tensors if name.startswith("text_model.encoder.layers.")}
    projection = tensors.get("text_projection.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "projection_dim": width if projection is None else projection.shape[0],
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": activation,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,  # the value of the published SDXL folders: the end is found as the largest token number
    }
