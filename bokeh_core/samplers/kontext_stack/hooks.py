"""The adapter on a FLUX network in its original layout, the one ComfyUI runs (SPEC sections 10.1 and 10.3).

It acts on the inputs and outputs of five kinds of Linear layers and never reads a weight of FLUX, so that weights in fp8, GGUF or on
another device stay exactly what they are:

    double_blocks.i.img_attn.qkv                output: q and k of the image tokens are corrected
    double_blocks.i.{img_attn,txt_attn}.proj    input: the vector of K is added
    single_blocks.j.linear1                     output: q and k are corrected
    single_blocks.j.linear2                     input: the vector of K is added to the attention's channels, not to the MLP's
"""

import torch
from torch import nn

from ...checkpoints.loading import cast
from ...errors import BokehError
from .adapter import Corrections

Vectors = dict[int, torch.Tensor]


def flux_shape(network: nn.Module) -> tuple[int, int]:
    """(number of attention blocks, width) of a FLUX.1 network. Raises BokehError for anything else."""
    double, single = getattr(network, "double_blocks", None), getattr(network, "single_blocks", None)
    try:
        layers = [layer for block in double for layer in (block.img_attn.qkv, block.img_attn.proj, block.txt_attn.proj)]
        layers += [layer for block in single for layer in (block.linear1, block.linear2)]
        flux = bool(layers) and network.vector_in is not None and all(isinstance(layer, nn.Module) for layer in layers)
    except (AttributeError, TypeError):
        flux = False
    if not flux:
        raise BokehError(
            f"The model is a {type(network).__name__}, not FLUX.1 as ComfyUI itself runs it, so the bokeh adapter can not be attached. "
            "Load flux1-kontext-dev with Load Diffusion Model; compiled engines (TensorRT) and kernels of their own (Nunchaku) do not work."
        )
    return len(double) + len(single), network.hidden_size


class FluxHooks:
    """The adapter attached to one network, from `attach` to `detach`; both may be called again.

    vectors  {block: [B, width]} of the pictures of the coming forward pass; None: corrections only
    calls    how often a hook has run since it was attached
    """

    def __init__(self, network: nn.Module, corrections: Corrections):
        self.network, self.corrections = network, corrections
        self.vectors: Vectors | None = None
        self.calls = 0
        self._handles: list = []

    def attach(self) -> None:
        if self._handles:
            return
        self.calls = 0
        for i, block in enumerate([*self.network.double_blocks, *self.network.single_blocks]):
            if str(i) not in self.corrections:
                continue
            if hasattr(block, "img_attn"):
                self._handles.append(block.img_attn.qkv.register_forward_hook(self._correct(i)))
                for stream in (block.img_attn, block.txt_attn):
                    self._handles.append(stream.proj.register_forward_pre_hook(self._add(i)))
            else:
                self._handles.append(block.linear1.register_forward_hook(self._correct(i)))
                self._handles.append(block.linear2.register_forward_pre_hook(self._add_to_attention(i)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.vectors = [], None

    def _correct(self, i: int):
        pair = self.corrections[str(i)]
        low_q, low_k = pair["to_q_adp"], pair["to_k_adp"]

        def hook(layer, given, out):
            self.calls += 1
            width = self.network.hidden_size
            q, k = out[..., :width], out[..., width : 2 * width]
            q += low_q(q)  # in place: the layer's output is nobody else's yet
            k += low_k(k)
            return out

        return hook

    def _add(self, i: int):
        def hook(layer, given):
            if self.vectors is None:
                return None
            return (given[0] + cast(self.vectors[i], given[0])[:, None], *given[1:])

        return hook

    def _add_to_attention(self, i: int):
        def hook(layer, given):
            if self.vectors is not None:
                # In place: the block has just joined attention and MLP for this layer alone, and the sum of all would be copied.
                given[0][..., : self.network.hidden_size] += cast(self.vectors[i], given[0])[:, None]

        return hook


def rows_for_batch(vectors: Vectors, batch: int) -> Vectors:
    """Vectors of n values of K for a batch: one K serves all, else sample i of each condition gets value i (conditions outermost)."""
    count = len(next(iter(vectors.values())))
    if batch % count:
        raise BokehError(f"The bokeh adapter has {count} values of K for a batch of {batch} pictures; give one K, or one for each picture.")
    return {i: rows.repeat(batch // count, 1) for i, rows in vectors.items()}
