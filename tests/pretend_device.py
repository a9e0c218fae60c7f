"""A device that is none: tensors that say they are elsewhere and compute here, and refuse to meet tensors that are not with them.

What runs on it and gives what the CPU gives would not mix devices on a GPU either. It is called "meta", because torch guards the others.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; `here` holds its values."""

    @staticmethod
    def __new__(cls, here):
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE, storage_offset=here.storage_offset()
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Needed for tensors that are made on the device from nothing, such as torch.arange(9, device=x.device)."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    name = function.overloadpacket.__name__
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in given if isinstance(t, Elsewhere)]
    asked = kwargs.get("device")
    if there and name not in ("_to_copy", "copy_"):
        strangers = [t for t in given if not isinstance(t, Elsewhere) and t.ndim]
        if strangers:
            raise RuntimeError(f"{name}: tensors of two devices, {[tuple(t.shape) for t in strangers]} is on the CPU")
    on_it = bool(there) if asked is None else torch.device(asked) == DEVICE
    plain = {key: torch.device("cpu") if key == "device" and on_it else value for key, value in kwargs.items()}
    result = function(*_here(args), **_here(plain))
    if "out" in kwargs:
        return kwargs["out"]
    if name.endswith("_"):
        return args[0]
    return tree_map(lambda t: Elsewhere(t) if isinstance(t, torch.Tensor) and on_it else t, result)


def _here(tree):
    return tree_map(lambda t: t.here if isinstance(t, Elsewhere) else t, tree)
