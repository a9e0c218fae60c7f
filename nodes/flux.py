"""The adapter on a core FLUX MODEL: attaching it, prompts, and sampling one frame of a stack. The host's own calls are in host.py."""

from collections.abc import Callable

import torch

from ..bokeh_core.errors import BokehError
from ..bokeh_core.samplers.kontext_stack.adapter import BokehAdapter, Corrections, build_corrections, read_adapter
from ..bokeh_core.samplers.kontext_stack.hooks import FluxHooks, flux_shape, rows_for_batch
from ..bokeh_core.samplers.kontext_stack.recipe import TEXT_TOKENS
from . import host

KEY = "bokeh_stack"
OPTION = "bokeh_stack_k"  # in transformer_options: (K of the pictures of a batch, name of the dtype to embed it in)


class Attached:
    """The adapter as a patched MODEL carries it. Hooks come and go with the host's injections; weights of FLUX are never read."""

    def __init__(self, adapter: BokehAdapter, corrections: Corrections, k: list[float]):
        self.adapter, self.corrections = adapter, corrections
        self.default = (list(k), "float32")  # where a run brings no K of its own
        self._hooks: dict[torch.nn.Module, FluxHooks] = {}  # one, or one for each device
        self._latest: tuple = ((), {})

    def inject(self, patcher) -> None:
        network = _network(patcher)
        self._hooks.setdefault(network, FluxHooks(network, self.corrections)).attach()

    def eject(self, patcher) -> None:
        hooks = self._hooks.pop(_network(patcher), None)
        if hooks is not None:
            hooks.detach()

    def run(self, executor, x, *args, **keywords):
        """Wraps every forward pass of FLUX: sets the vectors of this batch's K, and clears them afterwards."""
        options = keywords.get("transformer_options") or next((a for a in args if isinstance(a, dict)), {})
        hooks = self._hooks.get(executor.class_obj)
        if hooks is not None:
            hooks.vectors = rows_for_batch(self._vectors(options.get(OPTION, self.default), x.device), len(x))
            try:
                out = executor(x, *args, **keywords)
            finally:
                hooks.vectors = None
        if hooks is None or not hooks.calls:
            raise BokehError(
                "Something has replaced the attention blocks of FLUX, so the bokeh adapter can not reach them. "
                "Remove the node that does it (compiled engines, fused kernels), or load the model with Load Diffusion Model."
            )
        return out

    def _vectors(self, given, device):
        k, dtype = given
        wanted = (tuple(k), dtype, device)
        if self._latest[0] != wanted:
            self._latest = (wanted, {i: rows.to(device) for i, rows in self.adapter.vectors_of_k(k, getattr(torch, dtype)).items()})
        return self._latest[1]


def attach(model, path: str, k: list[float]):
    """A clone of a core FLUX MODEL with the adapter of a file, set to a list of K: one for all pictures, or one for each of a batch."""
    blocks, width = flux_shape(getattr(model.model, "diffusion_model", None))
    adapter = read_adapter(path, blocks=blocks, width=width)
    corrections = host.casting(lambda ops, tensors: build_corrections(adapter, ops, tensors), adapter.correction_tensors(), _dtype(model))
    attached = Attached(adapter, corrections.network, k)
    return host.patched(model, KEY, attached, attached.inject, attached.eject, attached.run, [corrections.patcher])


def _network(patcher) -> torch.nn.Module:
    """The FLUX network itself, also where it is wrapped for compilation."""
    network = patcher.model.diffusion_model
    return getattr(network, "_orig_mod", network)


def require_attached(model) -> None:
    if not isinstance(model.get_attachment(KEY), Attached):
        raise BokehError("The model has no bokeh adapter; put Bokeh Stack Adapter between the FLUX Kontext model and this node.")


def _dtype(model) -> torch.dtype:
    """What FLUX computes in: its stored dtype unless that is only for storage (fp8, GGUF)."""
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model.get_dtype()
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16


def encode_prompts(clip, prompts: list[str], guidance: float, reference: torch.Tensor) -> list:
    """Conditionings with the guidance and the reference latents.

    Brackets mean emphasis to the host's prompt parser and are escaped; T5 gets as many tokens as in training.
    """
    length = {"t5xxl_min_length": TEXT_TOKENS}
    extra = {"guidance": guidance, "reference_latents": [reference], "reference_latents_method": "offset"}
    plain = [prompt.replace("(", r"\(").replace(")", r"\)") for prompt in prompts]
    return [clip.encode_from_tokens_scheduled(clip.tokenize(prompt, tokenizer_options=length), add_dict=extra) for prompt in plain]


def sample(model, positive, k: float, noise: torch.Tensor, sigmas: torch.Tensor, seed: int, callback, embedding=torch.float32):
    """Latents [1, C, h, w] of one frame: Euler along the given sigmas, without CFG. `embedding`: the dtype K is embedded in."""
    # The K goes in by the options of this run, so that every frame uses the same patched model and nothing is reloaded.
    options = {OPTION: ([k], str(embedding).removeprefix("torch."))}
    return host.sample_euler(model, positive, noise, sigmas, seed, callback, options)


def stack_progress(model, frames: int, steps: int) -> Callable[[int], Callable]:
    """frame -> the callback of its sampling: moves the node's bar, shows the picture so far and raises when the user interrupts."""
    step = host.sampling_progress(model, frames * steps)
    return lambda frame: lambda number, x0, x, total: step(frame * steps + number + 1, x0)
