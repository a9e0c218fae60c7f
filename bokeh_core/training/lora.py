"""Low-rank adapters in training: W + alpha / rank B A on layers of any network, and their tensors for a file."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize


class _LowRank(nn.Module):
    def __init__(self, weight: torch.Tensor, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.scale = alpha / rank
        # Gaussian A with std 1 / rank and B = 0: training starts from the base model exactly.
        self.A = nn.Parameter(torch.randn(rank, *weight.shape[1:], generator=generator) / rank)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2)))
        self.to(weight.device)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        delta = (self.B.flatten(1) @ self.A.flatten(1)).reshape(weight.shape)
        return weight + (self.scale * delta).to(weight.dtype)


def add_lora(network: nn.Module, modules: Iterable[str], rank: int, alpha: float, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Put adapters on the weights of named Linear and Conv2d layers; returns name -> parameter, names as `network` has them now."""
    for name in modules:
        layer = network.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", _LowRank(layer.weight, rank, alpha, generator))
    return lora_parameters(network)


def lora_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in `network`."""
    return {name: p for name, p in network.named_parameters() if re.search(r"\.parametrizations\.weight\.\d+\.[AB]$", name)}


def lora_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """MODULE.lora_A.weight and MODULE.lora_B.weight (PEFT's names), float32 on the CPU: what `checkpoints.lora.lora_pairs` reads."""
    return {
        re.sub(r"\.parametrizations\.weight\.\d+\.([AB])$", r".lora_\1.weight", name): parameter.detach().float().cpu().contiguous()
        for name, parameter in lora_parameters(network).items()
    }
