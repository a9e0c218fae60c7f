"""Frozen feature networks that losses look through: VGG-16 with the linear weights of LPIPS, and ConvNeXt.

Written out in their few lines under the tensor names of torchvision and timm, so that only the files are needed. Nothing is downloaded.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..checkpoints.loading import load_strict
from ..checkpoints.reading import read_checkpoint
from ..errors import BokehError

VGG_SOURCE = "vgg16-397923af.pth of torchvision (download.pytorch.org/models)"
LINEAR_SOURCE = "lpips/weights/v0.1/vgg.pth of the Python package lpips"
CONVNEXT_SOURCE = "model.safetensors of https://huggingface.co/timm/convnext_base.fb_in22k"

_VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)


class Perceptual(nn.Module):
    """LPIPS on VGG-16, version 0.1 (Zhang et al. 2018): weighted squared differences of unit feature vectors at five depths."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in _VGG:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in (64, 128, 256, 512, 512))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[B] distances, 0 for equal pictures, of a and b [B, 3, H, W] in -1..1 with sides of at least 16."""
        total = a.new_zeros(len(a))
        for linear, x, y in zip(self.linear, self._depths(a), self._depths(b), strict=True):
            total = total + linear((x - y) ** 2).mean((1, 2, 3))
        return total

    def _depths(self, images: torch.Tensor):
        """Unit feature vectors before every pooling and at the end."""
        shift, scale = (images.new_tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x = (images - shift) / scale
        for layer in (*self.features, None):
            if layer is None or isinstance(layer, nn.MaxPool2d):
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
            x = x if layer is None else layer(x)


def perceptual(vgg: str | Path, linear: str | Path | None = None) -> Perceptual:
    """A frozen Perceptual. vgg: torchvision's file; linear: the weights of LPIPS, None: those inside the installed package lpips.

    Raises BokehError for missing or foreign files.
    """
    if linear is None:
        package = importlib.util.find_spec("lpips")
        if package is None:
            raise BokehError(f"The perceptual loss needs the linear weights of LPIPS: install the package lpips or name {LINEAR_SOURCE}.")
        linear = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    tensors = {name: t for name, t in read_checkpoint(vgg).tensors.items() if not name.startswith("classifier.")}
    for name, tensor in read_checkpoint(linear).tensors.items():
        tensors[name.replace("lin", "linear.", 1).replace(".model.1", "")] = tensor
    with torch.device("meta"):
        network = Perceptual()
    what = f"{Path(vgg).name} with {Path(linear).name}, as VGG-16 and LPIPS weights ({VGG_SOURCE}; {LINEAR_SOURCE}),"
    return load_strict(network, tensors, what)


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = self.norm(rearrange(self.conv_dw(x), "b c h w -> b h w c"))
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](y)))
        return x + rearrange(y * self.gamma, "b h w c -> b c h w")


class _Norm(nn.LayerNorm):
    """Over the channels of [B, C, H, W]."""

    def forward(self, x):
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class ConvNeXt(nn.Module):
    """The trunk of ConvNeXt (Liu et al. 2022) under timm's tensor names; what follows it, `head.*`, is left out."""

    def __init__(self, widths: list[int], depths: list[int]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), _Norm(widths[0], eps=1e-6))
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = nn.Module()
            if i:
                before = widths[i - 1]
                stage.downsample = nn.Sequential(_Norm(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2))
            stage.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
            self.stages.append(stage)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, H/32, W/32, C] features of images [B, 3, H, W] as they are: BokehDiff gives 0..1 without further normalisation."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage.blocks(stage.downsample(x) if hasattr(stage, "downsample") else x)
        return rearrange(x, "b c h w -> b h w c")


def convnext(file: str | Path) -> ConvNeXt:
    """A frozen ConvNeXt of any size from timm's file (BokehDiff: convnext_base, 22k classes). Raises BokehError for another file."""
    tensors = {name: tensor for name, tensor in read_checkpoint(file).tensors.items() if not name.startswith("head.")}
    if "stages.0.blocks.0.conv_dw.weight" not in tensors:
        raise BokehError(
            f"{Path(file).name} is no ConvNeXt under timm's names (found: {', '.join(list(tensors)[:3])}); use {CONVNEXT_SOURCE}."
        )
    widths, depths = [], []
    while f"stages.{len(widths)}.blocks.0.gamma" in tensors:
        at, depth = f"stages.{len(widths)}.blocks", 0
        while f"{at}.{depth}.gamma" in tensors:
            depth += 1
        widths.append(len(tensors[f"{at}.0.gamma"]))
        depths.append(depth)
    with torch.device("meta"):
        network = ConvNeXt(widths, depths)
    return load_strict(network, tensors, f"{Path(file).name}, as a ConvNeXt,")
