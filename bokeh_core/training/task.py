"""What a recipe is to the engine: networks, data, losses and files."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Group:
    """Parameters with one optimiser and one schedule.

    parameters    by their full name in the task
    optimiser     "adamw" or "prodigy" (with bias correction and safeguarded warm-up); one kind in a part
    schedule      step (from 0, of this group's own updates) -> factor on the learning rate
    clip          the gradient's norm over the group is cut to this; None: never
    keep_gradients  published quirk of BokehDiff's script: the gradient is never zeroed, each step takes the running sum
    """

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    optimiser: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = None
    keep_gradients: bool = False
    schedule: Callable[[int], float] = field(default=lambda step: 1.0)


class Task(nn.Module, ABC):
    """One published recipe on its networks. Everything random comes from (seed, index of the sample), never from a global state.

    A subclass holds its networks as submodules and builds them in __init__ from the released files that the recipe names. It has the
    class attributes `Model`, `Data` and `Options`: frozen dataclasses that the tables [model], [data] and [options] of the recipe's TOML
    fill; their fields are documented there. `__init__(model, data, options, seed)`. The engine puts the task into training mode for its
    steps and into evaluation mode for previews and measures; trained parameters are float32.
    """

    Model: type
    Data: type
    Options: type

    @abstractmethod
    def groups(self) -> dict[str, list[Group]]:
        """What is trained: groups by the name of the part that updates them. All other parameters are frozen by the engine."""

    def parts(self, step: int) -> list[str]:
        """The parts that update their groups at this step, one after the other, on the same samples."""
        return list(self.groups())

    @abstractmethod
    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Training sample number `index` (0 and up, without end), the same on every call and in every process. Runs in data workers:
        no network here. Same shapes for every index, so that samples stack; `seed` [] int64 is what the losses draw their noise from."""

    @abstractmethod
    def forward(self, part: str, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """The losses of one part by name, weights applied; their sum is minimised. Means over the batch, so that gradients of several
        processes average to those of one. `step` counts from 0."""

    @abstractmethod
    def preview(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, 3, H, W] 0..1: per sample what goes in, what comes out and what should, side by side."""

    def held_out(self, index: int) -> dict[str, torch.Tensor]:
        """A sample that training never shows: numbers from 2^40 on."""
        return self.sample(2**40 + index)

    @abstractmethod
    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """[B] per metric on held-out samples, e.g. {"psnr": ...}; the first is the one that counts."""

    def notes(self) -> list[str]:
        """Sentences on what this run leaves out, such as a loss whose network no file was named for."""
        return []

    def baselines(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """The metrics of `measure` for simple things that a trained network has to beat, by their names: the sharp picture as it is, or
        the physical renderer where the sample has a disparity."""
        return {}

    def renderer(self) -> Callable | None:
        """What is trained as a renderer that `judge` can judge (see there); None where it is none."""
        return None

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the files that our loaders take, as published, into an existing folder."""


def noise(seeds: torch.Tensor, shape: tuple[int, ...], stream: int = 0) -> torch.Tensor:
    """[B, *shape] float32 normal noise on the CPU, one seed [B] int64 per sample: the same however samples are spread over processes.

    stream    another number gives independent noise
    """
    return torch.stack([torch.randn(shape, generator=generator(int(seed), stream)) for seed in seeds])


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """A generator of its own for a sample's seed (below 2^62) and the number of a use."""
    return torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
