"""Losses of depth networks. Maps [B, H, W]; masks [B, H, W] bool, None = everywhere; each loss is a number per sample, [B].

A sample whose mask is empty counts 0. Reduce by `.mean()`: gradients of several processes then average to those of one.
"""

import torch
import torch.nn.functional as F


def silog(prediction: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor | None = None, variance_focus: float = 0.5) -> torch.Tensor:
    """sqrt(mean g^2 - v (mean g)^2), g = ln prediction - ln truth: the scale-invariant logarithmic error (Eigen et al. 2014).

    prediction, truth  positive where the mask is set, metres or any unit
    variance_focus     v: 1 forgives a wrong scale fully; 0.5 as Depth Anything V2's metric models, 0.85 as AdaBins and BTS
    """
    mask = _mask(prediction, mask)
    g = torch.where(mask, prediction.clamp_min(1e-6), 1.0).float().log() - torch.where(mask, truth.clamp_min(1e-6), 1.0).float().log()
    # Clamped: the root has no gradient at 0.
    return (_mean(g * g, mask) - variance_focus * _mean(g, mask) ** 2).clamp_min(1e-12).sqrt()


def aligned(maps: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(d - t) / s with t = median and s = mean |d - t| under the mask: depth without scale and shift (MiDaS, eq. 6)."""
    mask = _mask(maps, mask)
    maps = maps.float()
    centre = torch.where(mask, maps, torch.nan).flatten(1).nanmedian(1).values.nan_to_num()[:, None, None]
    spread = _mean((maps - centre).abs(), mask)[:, None, None]
    return (maps - centre) / spread.clamp_min(1e-6)


def scale_shift_invariant(
    prediction: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor | None = None, trim: float = 0.0
) -> torch.Tensor:
    """Mean |aligned prediction - aligned truth|: the affine-invariant loss of MiDaS and Depth Anything.

    trim  share of a sample's pixels with the largest errors that do not count: 0.1 for pseudo labels in Depth Anything V2
    """
    mask = _mask(prediction, mask)
    error = (aligned(prediction, mask) - aligned(truth, mask)).abs()
    if trim:
        limit = torch.where(mask, error.detach(), torch.nan).flatten(1).nanquantile(1 - trim, 1).nan_to_num()
        mask = mask & (error.detach() <= limit[:, None, None])
    return _mean(error, mask)


def gradient_matching(prediction: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor | None = None, scales: int = 4) -> torch.Tensor:
    """Sum over scales of mean |dx R| + |dy R|, R = aligned prediction - aligned truth: sharp edges in the right places (MiDaS, eq. 11).

    Every scale takes each second row and column of the one before.
    """
    mask = _mask(prediction, mask)
    difference = aligned(prediction, mask) - aligned(truth, mask)
    total = difference.new_zeros(len(difference))
    for scale in range(scales):
        r, m = (x[:, :: 2**scale, :: 2**scale] for x in (difference, mask))
        total = total + _mean((r[:, :, 1:] - r[:, :, :-1]).abs(), m[:, :, 1:] & m[:, :, :-1])
        total = total + _mean((r[:, 1:] - r[:, :-1]).abs(), m[:, 1:] & m[:, :-1])
    return total


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of tokens [B, N, C] against the teacher's, mean over tokens: Depth Anything's feature alignment without its margin."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean(1)


def _mask(like: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def _mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Per sample, under the mask."""
    return torch.where(mask, x, 0.0).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)
