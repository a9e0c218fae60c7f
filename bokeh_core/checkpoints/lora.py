"""Low-rank adapters (LoRA): finding the pairs in a file and merging them into weights."""

import re

import torch

from ..errors import BokehError

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def lora_pairs(tensors: dict[str, torch.Tensor], prefixes: tuple[str, ...] = ("unet.",)) -> Pairs:
    """module name -> (A, B) from PEFT names MODULE.lora_A[.ADAPTER].weight and MODULE.lora_B[.ADAPTER].weight.

    A is [r, in] or [r, in, kh, kw], B is [out, r] or [out, r, 1, 1]. A leading prefix of `prefixes` is removed from the module.
    Raises BokehError when a half of a pair is missing, the ranks of a pair differ, or a name is neither.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.(?:[^.]+\.)?weight", name)
        if not match:
            raise BokehError(f"'{name}' is not the name of a LoRA tensor; expected MODULE.lora_A.weight and MODULE.lora_B.weight.")
        module, side = match.groups()
        for prefix in prefixes:
            module = module.removeprefix(prefix)
        halves[side][module] = tensor
    down, up = halves["A"], halves["B"]
    lonely = sorted(down.keys() ^ up.keys())
    if lonely:
        raise BokehError(f"{len(lonely)} LoRA modules have only one of their two tensors, for example {lonely[0]}; the file is incomplete.")
    for module in down:
        if down[module].shape[0] != up[module].shape[1] or any(side != 1 for side in up[module].shape[2:]):
            raise BokehError(f"LoRA {module}: A {list(down[module].shape)} and B {list(up[module].shape)} do not fit together.")
    return {module: (down[module], up[module]) for module in down}


def lora_delta(down: torch.Tensor, up: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale B A in float32, in the shape of the weight: [out, in] or [out, in, kh, kw]."""
    delta = up.float().flatten(1) @ down.float().flatten(1)
    return scale * delta.reshape(up.shape[0], *down.shape[1:])


def merge_lora(weights: dict[str, torch.Tensor], pairs: Pairs, scale: float, what: str) -> dict[str, torch.Tensor]:
    """`weights` with scale B A added to the weight of every module in `pairs`; a new table, tensors of the others shared.

    The sum is formed in float32 and stored in the weight's dtype. Raises BokehError when a module is not there, or shapes differ.
    """
    unknown = [module for module in pairs if f"{module}.weight" not in weights]
    if unknown:
        raise BokehError(
            f"{what}: {len(unknown)} of {len(pairs)} adapted modules are not in the network, for example {sorted(unknown)[0]}."
        )
    merged = dict(weights)
    for module, (down, up) in pairs.items():
        weight = weights[f"{module}.weight"]
        delta = lora_delta(down, up, scale)
        if delta.shape != weight.shape:
            raise BokehError(f"{what}: the LoRA of {module} has shape {list(delta.shape)}; the network's weight has {list(weight.shape)}.")
        merged[f"{module}.weight"] = (weight.float() + delta).to(weight.dtype)
    return merged
