"""LDF, the salient-object network MagicBokeh finds its subject with (magicbokeh SPEC section 12): a photo becomes a soft mask.

A ResNet-50 gives features at strides 4 to 32. Two decoders, `b` for the body of the object and `d` for its detail, run twice; before
the second pass an encoder turns what both found into a hint for every level.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..checkpoints.catalogue import UNSTATED, Report
from ..checkpoints.loading import load_strict
from ..checkpoints.reading import read_checkpoint, strip_prefix
from ..errors import BokehError
from ..pixels import from_bytes, to_bytes

SIDE = 352  # the network's input is a square of this size
MARKS = {"bkbone.conv1.weight", "decoderb.conv0.weight"}  # no other network has both
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    """Sizes, read off the tensors. The released file has the defaults.

    stem    channels of the first layer; the four stages have 4, 8, 16 and 32 times as many
    width   channels of decoders and encoder
    depths  blocks of the four stages
    folded  batch norms are folded into the convolutions before them: the form that is run. False is the form of the file
    """

    stem: int = 64
    width: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 3)
    folded: bool = False


class _Layers:
    """Makes convolutions and the batch norms behind them, or convolutions alone that stand for both."""

    def __init__(self, ops, folded: bool):
        self.ops, self.folded = ops, folded

    def conv(self, channels_in: int, channels_out: int, size: int = 3, stride: int = 1, bias: bool = True) -> nn.Module:
        return self.ops.Conv2d(channels_in, channels_out, size, stride, size // 2, bias=bias or self.folded)

    def norm(self, channels: int) -> nn.Module:
        return nn.Identity() if self.folded else nn.BatchNorm2d(channels)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, added to the input."""

    def __init__(self, make: _Layers, channels_in: int, middle: int, stride: int, project: bool):
        super().__init__()
        self.conv1, self.bn1 = make.conv(channels_in, middle, 1, bias=False), make.norm(middle)
        self.conv2, self.bn2 = make.conv(middle, middle, 3, stride, bias=False), make.norm(middle)
        self.conv3, self.bn3 = make.conv(middle, 4 * middle, 1, bias=False), make.norm(4 * middle)
        shortcut = [make.conv(channels_in, 4 * middle, 1, stride, bias=False), make.norm(4 * middle)] if project else []
        self.downsample = nn.Sequential(*shortcut)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class Backbone(nn.Module):
    """ResNet-50 without its head: [B,3,H,W] -> features at strides 4, 8, 16 and 32."""

    def __init__(self, make: _Layers, stem: int, depths: tuple[int, ...]):
        super().__init__()
        self.conv1, self.bn1 = make.conv(3, stem, 7, 2, bias=False), make.norm(stem)
        channels = stem
        for stage, depth in enumerate(depths):
            middle, blocks = stem << stage, []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(make, channels, middle, stride, project=block == 0))
                channels = 4 * middle
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x) -> list[torch.Tensor]:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """Four levels, deepest first, to one map of the finest."""

    def __init__(self, make: _Layers, width: int):
        super().__init__()
        for level in range(4):
            self.add_module(f"conv{level}", make.conv(width, width))
            self.add_module(f"bn{level}", make.norm(width))

    def forward(self, levels, hints):
        x = None
        for index, (level, hint) in enumerate(zip(levels, hints, strict=True)):
            x = level + hint if x is None else _resize(x, level.shape[-2:]) + level + hint
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x)).relu()
        return x


class Encoder(nn.Module):
    """What both decoders found -> hints for each of them, deepest first."""

    def __init__(self, make: _Layers, width: int):
        super().__init__()
        for level in (1, 2, 3, 4):
            self.add_module(f"conv{level}", make.conv(2 * width if level == 1 else width, width))
            self.add_module(f"bn{level}", make.norm(width))
            for which in "bd":
                self.add_module(f"conv{level}{which}", make.conv(width, width))
                self.add_module(f"bn{level}{which}", make.norm(width))

    def _block(self, name: str, x):
        return getattr(self, f"bn{name}")(getattr(self, f"conv{name}")(x)).relu()

    def forward(self, x) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        levels = []
        for level in (1, 2, 3, 4):
            x = self._block(str(level), x if level == 1 else F.max_pool2d(x, 2, 2))
            levels.append(x)
        deepest_first = list(enumerate(levels, 1))[::-1]
        return tuple([self._block(f"{level}{which}", x) for level, x in deepest_first] for which in "bd")


class LDF(nn.Module):
    """The network. linearb and lineard, heads for training, are kept because the file has them."""

    def __init__(self, config: Config, ops=nn):
        super().__init__()
        make, width = _Layers(ops, config.folded), config.width
        self.bkbone = Backbone(make, config.stem, config.depths)
        for which in "bd":
            for level in (5, 4, 3, 2):
                features = 4 * config.stem << (level - 2)
                branch = [make.conv(features, width, 1), make.conv(width, width), make.norm(width), nn.ReLU()]
                self.add_module(f"conv{level}{which}", nn.Sequential(*branch))
        self.encoder = Encoder(make, width)
        self.decoderb, self.decoderd = Decoder(make, width), Decoder(make, width)
        self.linearb, self.lineard = make.conv(width, 1), make.conv(width, 1)
        self.linear = nn.Sequential(make.conv(2 * width, width), make.norm(width), nn.ReLU(), make.conv(width, 1))

    def passes(self, image) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(b, d) of the first and the second pass, [B,width,H/4,W/4] each."""
        features = list(zip((5, 4, 3, 2), reversed(self.bkbone(image)), strict=True))
        b, d = ([getattr(self, f"conv{level}{which}")(feature) for level, feature in features] for which in "bd")
        first = self.decoderb(b, [0] * 4), self.decoderd(d, [0] * 4)
        hints_b, hints_d = self.encoder(torch.cat(first, 1))
        return [first, (self.decoderb(b, hints_b), self.decoderd(d, hints_d))]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image [B,3,352,352] from `prepare` -> logits [B,1,88,88]."""
        return self.linear(torch.cat(self.passes(image)[-1], 1))


def read_ldf(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of the published file (`model-40`), as they are. Raises BokehError for another file."""
    tensors = strip_prefix(read_checkpoint(path).tensors, "module.")
    if not MARKS <= tensors.keys():
        raise BokehError(
            f"{Path(path).name} is not the LDF salient-object network (found tensors such as {sorted(tensors)[0]}); "
            "expected the file 'model-40' of the LDF authors."
        )
    return tensors


def folded_tensors(tensors: dict[str, torch.Tensor], what: str = "The file") -> dict[str, torch.Tensor]:
    """The tensors with every batch norm folded into the convolution before it (in float64), as float32: what `build` takes.

    Raises BokehError when a tensor is missing, unexpected or has another shape. The counters num_batches_tracked may be missing.
    """
    config = recognise(tensors)
    with torch.device("meta"):
        plain = LDF(config)
    counters = {name: torch.zeros((), dtype=torch.int64) for name in plain.state_dict() if name.endswith("num_batches_tracked")}
    load_strict(plain, counters | tensors, what)
    norms = {name: module for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)}
    folded = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[0] not in norms}
    for name, norm in norms.items():
        head, _, last = name.rpartition(".")
        conv = f"{head}.{int(last) - 1 if last.isdigit() else last.replace('bn', 'conv')}"
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = tensors[f"{conv}.bias"].double() if f"{conv}.bias" in tensors else 0.0
        folded[f"{conv}.weight"] = (tensors[f"{conv}.weight"].double() * scale[:, None, None, None]).float()
        folded[f"{conv}.bias"] = ((bias - norm.running_mean.double()) * scale + norm.bias.double()).float()
    return folded


def recognise(tensors: dict[str, torch.Tensor]) -> Config:
    """Sizes of the network the tensors belong to, by their names and shapes."""
    depths = tuple(len({name.split(".")[2] for name in tensors if name.startswith(f"bkbone.layer{stage}.")}) for stage in range(1, 5))
    sizes = [tensors[name].shape[0] for name in ("bkbone.conv1.weight", "decoderb.conv0.weight") if tensors[name].ndim == 4]
    if len(sizes) < 2 or not all(depths):
        raise BokehError("These tensors are not those of the LDF salient-object network.")
    return Config(*sizes, depths)


def build(ops, folded: dict[str, torch.Tensor]) -> LDF:
    """The network that is run, from `folded_tensors`; its layers come from the namespace `ops`."""
    with torch.device("meta"):
        network = LDF(replace(recognise(folded), folded=True), ops)
    return load_strict(network, folded, "The salient-object network")


def load_ldf(path: str | Path, device: torch.device | str = "cpu") -> LDF:
    """The network of a file, ready for `salient_masks`, for use without a host."""
    return build(nn, folded_tensors(read_ldf(path), Path(path).name)).to(device)


def prepare(image: torch.Tensor) -> torch.Tensor:
    """image [3,H,W] display-encoded 0..1 -> [3,352,352] as published: 8 bits, squeezed to a square by Pillow, ImageNet's mean and std."""
    import numpy as np
    from PIL import Image

    levels = to_bytes(image.detach().float().nan_to_num())
    small = Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    square = from_bytes(np.array(small))
    return (square - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def logits(network: nn.Module, inputs: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """inputs [B,3,352,352] from `prepare` -> [B,H,W] at `size`, before the sigmoid."""
    return _resize(network(inputs), size)[:, 0]


@torch.no_grad()
def salient_masks(network: nn.Module, images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """images [B,3,H,W] -> [B,H,W] on `device`: how much each pixel belongs to the subject, in 1/255 steps from 0 to 1 as published.

    So a pixel with no trace of the subject is exactly 0, as MagicBokeh's rule "any nonzero pixel counts" needs it.
    """
    inputs = torch.stack([prepare(image) for image in images]).to(device)
    return (logits(network, inputs, images.shape[-2:]).sigmoid() * 255).round() / 255


def activation_bytes(height: int, width: int, chunk: int) -> int:
    """What `salient_masks` needs beside the weights: the network's largest maps, and a few masks of the picture's size."""
    return chunk * ((64 << 20) + 16 * height * width)


def _resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def report(tensors: dict[str, torch.Tensor], path: str | Path) -> Report | None:
    """What `bokeh models check` says of an LDF file, complete or not; None for anything else. Licence: magicbokeh SPEC section 17."""
    tensors = strip_prefix(tensors, "module.")
    if not MARKS <= tensors.keys():
        return None
    problems = ()
    try:
        folded_tensors(tensors)
    except BokehError as error:
        problems = (str(error),)
    counted = any(name.endswith("num_batches_tracked") for name in tensors)
    facts = (("architecture", "LDF, ResNet-50"), ("batch counters", "present" if counted else "absent, not needed"))
    return Report("LDF, salient-object network", facts, problems, UNSTATED)
