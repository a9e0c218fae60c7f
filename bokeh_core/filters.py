"""Filters of pictures that several parts share."""

import torch
import torch.nn.functional as F


def box_mean(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Mean over a (2 radius + 1)^2 window of [C, H, W] or [B, C, H, W]; the border repeats."""
    x = F.pad(x, (radius,) * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(x, (2 * radius + 1, 1), 1), (1, 2 * radius + 1), 1)
