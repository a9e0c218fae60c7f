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
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return result

    def gone(self, key):
        self.now -= self.sizes.pop(key, 0)
