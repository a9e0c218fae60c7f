"""Small lora.pkl files: tables, lists and a live network object in the published layout, pickled from classes that are gone afterwards."""

import enum
import sys
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from bokeh_core.samplers.magicbokeh.lora_file import BASE_LAYER, PROCESSORS

ENCODER = ["conv_in", "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1"]
DECODER = ["up_blocks.0.resnets.0.conv1", "conv_out"]
VAE = ["encoder.conv_in", "encoder.conv_in", "quant_conv"]  # the released list names modules more than once
CONTROLNET = ["conv_in.weight", "conv_in.bias", "down_blocks.0.attentions.0.norm.weight", "controlnet_down_blocks.0.weight"]
CONFIG = {"in_channels": 4, "block_out_channels": (8, 16), "act_fn": "silu", "norm_eps": 1e-5, "mid_block_type": None}


@contextmanager
def vanishing_classes():
    """A module `gone.library` with the kinds of classes a network object may hold. It cannot be imported before or after."""
    library = ModuleType("gone.library")

    class Network(nn.Module):
        pass

    class FrozenDict(OrderedDict):
        """As diffusers has it: with attributes beside its items."""

        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            for key, value in self.items():
                setattr(self, key, value)

    class Kind(enum.Enum):
        RGB = "rgb"

    for one in (Network, FrozenDict, Kind):
        one.__module__, one.__qualname__ = library.__name__, one.__name__
        setattr(library, one.__name__, one)
    sys.modules.update({"gone": ModuleType("gone"), "gone.library": library})
    try:
        yield library
    finally:
        del sys.modules["gone"], sys.modules["gone.library"]


def network_object(library, tensors: dict[str, torch.Tensor], config: dict = CONFIG, odd: bool = True) -> nn.Module:
    """A live network of the vanishing class, with `tensors` as parameters and, if `odd`, all sorts of things beside them."""
    root = library.Network()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, library.Network())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(tensor.clone()))
    root._internal_dict = library.FrozenDict(config)
    if not odd:
        return root
    root.order, root.seen, root.counts = library.Kind.RGB, frozenset({"a", "b"}), defaultdict(list, {"x": [1]})
    root.activation = nn.functional.silu  # a function that is mentioned, not called
    root.absent = None
    return root


def lora_content(ranks=(3, 2, 5), encoder=ENCODER, decoder=DECODER, vae=VAE, controlnet=CONTROLNET, seed=3) -> dict:
    """What lora.pkl holds but for the network object, whose tensors are in `controlnet`; all sizes but the ranks are 1 or 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def lora(modules, adapter, rank):
        return {
            f"{module}.lora_{half}.{adapter}.weight": draw(*((rank, 2) if half == "A" else (2, rank)), *tail)
            for module in dict.fromkeys(modules)
            for tail in [(1, 1) if "conv" in module else ()]
            for half in "AB"
        }

    unet, vae_rank, bokeh = ranks
    return {
        "vae_lora_encoder_modules": list(vae),
        "unet_lora_encoder_modules": list(encoder),
        "unet_lora_decoder_modules": list(decoder),
        "unet_lora_others_modules": [],
        "rank_unet": unet,
        "rank_vae": vae_rank,
        "state_dict_attn": bokeh,
        "state_dict_unet": {name: draw(2, 2) for name in BASE_LAYER}
        | lora(encoder, "default_encoder", unet)
        | lora(decoder, "default_decoder", unet),
        "state_dict_vae": lora(vae, "default_encoder", vae_rank),
        "processor_state_dict": {name: draw(*((bokeh, 2) if "lora.0" in name else (2, bokeh))) for name in sorted(PROCESSORS)},
        "controlnet": {name: draw(2) for name in controlnet},
    }


def write_lora(path: Path, content: dict | None = None) -> dict:
    """Write `content` (from `lora_content`) with its ControlNet as a live object. Returns the content."""
    content = content or lora_content()
    with vanishing_classes() as library:
        torch.save(content | {"controlnet": network_object(library, content["controlnet"])}, path)
    return content
