"""Losses of the recipes, and the learning rate's cosine. Pictures are [..., 3, H, W] in -1..1; every loss is a scalar unless said."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

REAL, FAKE = 0.8, 0.0  # targets of BokehDiff's discriminator; the generator aims at REAL (SPEC 8.3)


def _sobel(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) gradients of every channel of images [..., H, W], unscaled Sobel kernels, zeros around the picture."""
    kernel = images.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    kernels = torch.stack([kernel, kernel.T])[:, None]
    both = F.conv2d(images.reshape(-1, 1, *images.shape[-2:]), kernels, padding=1)
    return tuple(both[:, i].reshape(images.shape) for i in (0, 1))


def _forward_differences(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


# BokehDiff


@dataclass(frozen=True)
class EdgeForm:
    """Where the paper's multi-scale edge loss and the released script differ (BokehDiff SPEC sections 8.3 and 11)."""

    sobel: bool  # Sobel gradients, else forward differences
    power: int  # of the scale that divides its term
    base: float  # added to the weight max(|gradient of the bokeh|, |gradient of the sharp picture|)


EDGE_PAPER = EdgeForm(sobel=True, power=2, base=0.0)
EDGE_SCRIPT = EdgeForm(sobel=False, power=1, base=1.0)


def edge_loss(pred: torch.Tensor, bokeh: torch.Tensor, aif: torch.Tensor, scales: int = 3, form: EdgeForm = EDGE_SCRIPT) -> torch.Tensor:
    """Weighted difference of gradients over pictures reduced to 1/1 ... 1/scales by area (BokehDiff SPEC section 8.3).

    pred, bokeh, aif  [B, 3, H, W]: the prediction clamped to -1..1, the truth, the all-in-focus picture
    """
    gradients = _sobel if form.sobel else _forward_differences
    total = pred.new_zeros(())
    for scale in range(1, scales + 1):
        size = (pred.shape[-2] // scale, pred.shape[-1] // scale)
        reduced = (F.interpolate(images, size=size, mode="area") if scale > 1 else images for images in (pred, bokeh, aif))
        for ours, truth, sharp in zip(*map(gradients, reduced), strict=True):
            weight = form.base + torch.maximum(truth.abs(), sharp.abs())
            total = total + ((ours - truth).abs() * weight).mean() / scale**form.power
    return total


class GanHead(nn.Module):
    """BokehDiff's discriminator on frozen features: two spectrally normalised linear layers at every position (SPEC section 8.3).

    seed  of the first weights. The spectral norm is torch's older one: in training state each call does one power iteration first.
    """

    def __init__(self, channels: int = 1024, hidden: int = 256, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = nn.Sequential(nn.utils.spectral_norm(nn.Linear(channels, hidden)), nn.LeakyReLU(0.2))
            self.out = nn.utils.spectral_norm(nn.Linear(hidden, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [B, h, w, 1] of features [B, h, w, C]."""
        return self.out(self.decoder(features))


def gan_loss(logits: torch.Tensor, target: float) -> torch.Tensor:
    """[B] binary cross-entropy of logits [B, ...] against one target (REAL or FAKE), averaged over positions.

    The released script sums it over the batch.
    """
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="none").flatten(1).mean(1)


# Any-to-Bokeh


def sobel_magnitude(images: torch.Tensor) -> torch.Tensor:
    """[..., 3, H, W] sqrt(gx^2 + gy^2 + 1e-6) of images of that shape (Any-to-Bokeh SPEC section 9)."""
    x, y = _sobel(images)
    return (x**2 + y**2 + 1e-6).sqrt()


def texture_loss(pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean |difference of Sobel magnitudes|, as the released script has it (Any-to-Bokeh SPEC sections 8 and 9)."""
    return (sobel_magnitude(pred) - sobel_magnitude(truth)).abs().mean()


def texture_loss_paper(pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean squared length of the difference of Sobel gradients: the paper's equation 4 (Any-to-Bokeh SPEC section 8)."""
    return sum((ours - theirs).square().mean() for ours, theirs in zip(_sobel(pred), _sobel(truth), strict=True))


# Schedules


def cosine(step: int, warmup: int, total: int, floor: float = 2e-7) -> float:
    """Factor on the learning rate: up a line for `warmup` steps, then down half a cosine that is not cut off, so that it rises
    again beyond `total` (BokehDiff SPEC section 8.4)."""
    if step < warmup:
        return step / warmup
    return max(floor, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))))
