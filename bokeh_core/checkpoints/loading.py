"""Puts tensors into networks: strictly, without copies, and with the layer classes the host asks for."""

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import BokehError

# Leaf layers with weights that `adopt` exchanges. ComfyUI's namespaces have a class of each of these names.
LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "GroupNorm", "LayerNorm", "Embedding")


def load_strict(network: nn.Module, tensors: dict[str, torch.Tensor], what: str, ignore: Iterable[str] = ()) -> nn.Module:
    """Make `tensors` the weights of `network` (built on the meta device), by reference, and freeze it. Returns the network.

    what    words for messages: the file and what it was taken for
    ignore  names in `tensors` that the network does not need
    Raises BokehError, before anything is changed, when a name is missing, unexpected or has another shape.
    """
    wanted = network.state_dict()
    found = {name: tensor for name, tensor in tensors.items() if name not in set(ignore)}
    problems = [
        _list("missing", sorted(wanted.keys() - found.keys())),
        _list("unexpected", sorted(found.keys() - wanted.keys())),
        _list(
            "of another shape",
            [
                f"{name} (found {list(found[name].shape)}, expected {list(wanted[name].shape)})"
                for name in sorted(wanted.keys() & found.keys())
                if found[name].shape != wanted[name].shape
            ],
        ),
    ]
    if any(problems):
        raise BokehError(f"{what} does not fit: {'; '.join(filter(None, problems))}.")
    network.load_state_dict(found, strict=True, assign=True)
    return network.train(False).requires_grad_(False)


def _list(what: str, names: list[str], most: int = 4) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensors {what}: {', '.join(names[:most])}{more}"


def adopt(network: nn.Module, ops) -> nn.Module:
    """Give the leaf layers of a network from another library (diffusers) the classes of the namespace `ops`. Returns the network.

    For networks built on the meta device and loaded afterwards. Layers of classes that `ops` lacks stay as they are.
    """
    if ops is nn:
        return network
    for module in network.modules():
        name = type(module).__name__
        if name in LAYERS and type(module) is getattr(nn, name) and hasattr(ops, name):
            module.__class__ = getattr(ops, name)
    return network


def cast(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A raw parameter (one that no leaf layer owns) in the dtype and on the device of `like`, for use in a forward pass.

    A host that streams weights moves leaf layers only; raw parameters must be fetched where they are used.
    """
    return parameter.to(device=like.device, dtype=like.dtype)
