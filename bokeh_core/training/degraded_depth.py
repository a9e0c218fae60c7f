"""Degradation-aware depth: a Depth Anything V2 sees in a poor picture what its teacher sees in the good one (magicbokeh SPEC section 13).

The teacher is frozen. Encoder features are distilled, and the output is supervised by the teacher's pseudo labels. The paper gives no forms
and weights; these are those of Depth Anything V2 (Yang et al. 2024, section 4) and of its predecessor's feature alignment.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..depth import checkpoint
from ..depth.depth_anything import DepthAnythingConfig
from ..depth.preprocessing import PATCH, RESOLUTION, normalised
from ..errors import BokehError
from .composites import Pictures
from .degradation import REAL_ESRGAN, degrade
from .depth_losses import feature_distance, gradient_matching, scale_shift_invariant
from .task import Group, Task

FILE = "DAdepth.safetensors"  # of the name that the loader tells this model by


@dataclass(frozen=True)
class Model:
    """teacher: a relative Depth Anything V2 of any size (the paper's is L). student: the file it starts from, of any size; None: the
    teacher's."""

    teacher: Path
    student: Path | None = None


@dataclass(frozen=True)
class Data:
    """pictures: a folder of sharp photos (the paper's are 200 000 of SA-1B); none: synthetic scenes. size: px of samples, a multiple of 14.
    scale: the degraded picture is this many times smaller before it is enlarged back."""

    pictures: Path | None = None
    size: int = RESOLUTION
    scale: int = REAL_ESRGAN.scale


@dataclass(frozen=True)
class Options:
    """encoder_rate, head_rate: learning rates, Depth Anything V2's. features: weight of the distance of the encoder's features.
    output, gradient, trim: weights of the scale- and shift-invariant and of the gradient loss, and the share of largest errors left out."""

    encoder_rate: float = 5e-6
    head_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    features: float = 1.0
    output: float = 1.0
    gradient: float = 2.0
    trim: float = 0.1


class DegradedDepth(Task):
    """One part, "student"."""

    Model, Data, Options = Model, Data, Options

    def __init__(self, model: Model, data: Data, options: Options, seed: int):
        super().__init__()
        if data.size % PATCH:
            raise BokehError(f"[data] size is {data.size}; expected a multiple of {PATCH}.")
        self.options, self.seed = options, seed
        self.pictures = Pictures(data.pictures, data.size)
        self.degradation = replace(REAL_ESRGAN, scale=data.scale)
        self.teacher, self.student = _network(model.teacher), _network(model.student or model.teacher)
        widths = [network.config.vit.width for network in (self.student, self.teacher)]
        # Features of other widths are compared through a layer that only training needs.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            same = widths[0] == widths[1]
            self.bridges = nn.ModuleList(nn.Identity() if same else nn.Linear(*widths) for _ in self.student.config.vit.taps)

    def groups(self) -> dict[str, list[Group]]:
        options, encoder, head = self.options, {}, {}
        for name, parameter in self.named_parameters():
            if name.startswith("student.pretrained."):
                encoder[name] = parameter
            elif not name.startswith("teacher."):
                head[name] = parameter
        common = {"betas": options.betas, "weight_decay": options.weight_decay}
        return {"student": [Group(encoder, options.encoder_rate, **common), Group(head, options.head_rate, **common)]}

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """degraded, sharp [3, size, size] 0..1."""
        rng = np.random.default_rng([self.seed, index])
        seed = torch.tensor(int(rng.integers(2**62)))
        sharp = self.pictures.draw(rng)
        return {"degraded": degrade(sharp, rng, self.degradation), "sharp": sharp, "seed": seed}

    def forward(self, part: str, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            labels, wanted = _see(self.teacher, batch["sharp"])
        found, features = _see(self.student, batch["degraded"])
        options = self.options
        return {
            "features": options.features * self._distance(features, wanted).mean(),
            "output": options.output * scale_shift_invariant(found, labels, trim=options.trim).mean(),
            "gradient": options.gradient * gradient_matching(found, labels).mean(),
        }

    def _distance(self, features: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
        """[B] of the student's tapped tokens from the teacher's, mean over the taps."""
        pairs = zip(self.bridges, features, wanted, strict=True)
        return torch.stack([feature_distance(bridge(ours), theirs) for bridge, ours, theirs in pairs]).mean(0)

    @torch.no_grad()
    def preview(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from einops import repeat

        maps = [_see(network, batch[name])[0] for network, name in ((self.student, "degraded"), (self.teacher, "sharp"))]
        maps = [repeat(_spread(one), "b h w -> b c h w", c=3) for one in maps]
        return torch.cat([batch["degraded"], *maps], -1)

    @torch.no_grad()
    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """agreement in dB: -20 lg of the student's scale- and shift-invariant error against the teacher on the sharp picture."""
        labels, wanted = _see(self.teacher, batch["sharp"])
        found, features = _see(self.student, batch["degraded"])
        return {"agreement": _agreement(found, labels), "features": self._distance(features, wanted)}

    @torch.no_grad()
    def baselines(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        labels, degraded = (_see(self.teacher, batch[name])[0] for name in ("sharp", "degraded"))
        return {"the teacher on the degraded picture": {"agreement": _agreement(degraded, labels)}}

    def save(self, folder: Path) -> list[Path]:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.student.state_dict().items()}
        save_file(tensors, str(folder / FILE))
        return [folder / FILE]


def _network(path: Path) -> nn.Module:
    info, tensors = checkpoint.recognise(checkpoint.read_depth_file(path), str(path))
    if not isinstance(info.config, DepthAnythingConfig) or info.metric:
        raise BokehError(f"{Path(path).name} is a {info.title}; expected a relative Depth Anything V2.")
    return checkpoint.build(info, {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()})


def _see(network: nn.Module, pictures: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Disparity [B, H, W] and the encoder's tapped tokens, of pictures [B, 3, H, W] 0..1."""
    taps = network.pretrained(normalised(pictures))
    with torch.autocast(pictures.device.type, enabled=False):  # half precision would step the depth
        return network.depth([tap.float() for tap in taps], pictures.shape[-2:]), taps


def _agreement(found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -20 * scale_shift_invariant(found, labels).clamp_min(1e-6).log10()


def _spread(maps: torch.Tensor) -> torch.Tensor:
    """Each map [B, H, W] over 0..1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-6)
