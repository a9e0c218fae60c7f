"""Memory of tensors, counted: also on the meta device, where full-size networks cost nothing."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while they are alive; `known` ones do not count."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.known = [tensor.untyped_storage() for tensor in known]
        self.sizes = {storage._cdata: 0 for storage in self.known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.keep(tensor, tensor.untyped_storage().nbytes())
        return result

    def keep(self, tensor, size):
        """Count `size` bytes for a tensor's storage, unless it is counted already, until it is gone."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key):
        self.now -= self.sizes.pop(key, 0)
