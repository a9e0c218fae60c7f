"""Where to score: bands around depth edges, and what a lens leaves sharp (RENDERERS.md, section 4)."""

import torch
import torch.nn.functional as F

JUMP = 1.5  # px of signed defocus between neighbours: a depth edge


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """[H, W] bool: within `radius` px (Euclidean) of a set pixel of mask [H, W]."""
    padded = F.pad(mask.float(), (0, 0, radius, radius))
    height = mask.shape[0]
    out = torch.zeros_like(mask)
    for dy in range(-radius, radius + 1):
        half = int((radius * radius - dy * dy) ** 0.5)
        rows = padded[radius + dy : radius + dy + height]
        out |= F.max_pool1d(rows[None], 2 * half + 1, 1, half)[0] > 0
    return out


def depth_edges(disparity: torch.Tensor, k: float) -> torch.Tensor:
    """[H, W] bool: both pixels of every neighbour pair of disparity [H, W] whose defocus differs by more than JUMP px at strength k."""
    edges = torch.zeros_like(disparity, dtype=torch.bool)
    x = (disparity[:, 1:] - disparity[:, :-1]).abs() * abs(k) > JUMP
    y = (disparity[1:] - disparity[:-1]).abs() * abs(k) > JUMP
    edges[:, 1:] |= x
    edges[:, :-1] |= x
    edges[1:] |= y
    edges[:-1] |= y
    return edges


def edge_band(disparity: torch.Tensor, k: float, radius: int) -> torch.Tensor:
    """[H, W] bool: within `radius` px of a depth edge."""
    return dilate(depth_edges(disparity, k), radius)


def in_focus_region(image: torch.Tensor, truth: torch.Tensor, disparity: torch.Tensor, k: float, focus: float) -> torch.Tensor:
    """[H, W] bool: defocus at most half a pixel, and truth equal to the sharp image within 2/255.

    image, truth [3, H, W] linear light (compared as clip(x, 0, 1)^(1/2.2)); disparity [H, W], focus in its unit; k in px per unit.
    """
    difference = (encode(truth) - encode(image)).abs().amax(0)
    return (difference < 2 / 255) & ((k * (disparity - focus)).abs() <= 0.5)


def encode(linear: torch.Tensor) -> torch.Tensor:
    """clip(x, 0, 1)^(1/2.2), the encoding pictures are scored in."""
    return linear.clamp(0, 1) ** (1 / 2.2)
