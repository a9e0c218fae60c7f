"""Scores of clips. Frames are [F, 3, H, W] RGB, display-encoded, 0..1."""

import math

import torch
import torch.nn.functional as F


def relation_metric(clip: torch.Tensor, truth: torch.Tensor, pairs: int | None = None) -> float:
    """RM: mean |change of the clip - change of the truth| between neighbouring frames, in units of 0..1 (Any-to-Bokeh, metrics).

    pairs: only the first so many pairs; the released function looks at 2, whatever the length of the clip.
    """
    difference = (clip.double() - truth.double()).diff(dim=0).abs()
    return float(difference[:pairs].mean())


def flicker(clip: torch.Tensor, truth: torch.Tensor | None = None, still: float = 1 / 255) -> float:
    """Mean change between neighbouring frames where nothing should change, 0..1; 0 is steady.

    truth: a clip that tells where that is, its changes being at most `still`; None = the scene stands still. nan if it never does.
    """
    change = clip.double().diff(dim=0).abs()
    if truth is None:
        return float(change.mean())
    steady = (truth.diff(dim=0).abs().amax(1, keepdim=True) <= still).expand_as(change)
    return float(change[steady].mean()) if bool(steady.any()) else math.nan


def edge_magnitude(frames: torch.Tensor) -> torch.Tensor:
    """[F, H, W] float64 Sobel magnitude (3 x 3, mirrored border) of the 8-bit grey of frames; grey as OpenCV rounds it."""
    r, g, b = (frames.double() * 255).round().long().clamp(0, 255).unbind(1)
    grey = ((9798 * r + 19235 * g + 3735 * b + (1 << 14)) >> 15).double()
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="reflect")
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)
    x, y = F.conv2d(padded, torch.stack([slope, slope.T])[:, None]).unbind(1)
    return (x * x + y * y).sqrt()


def vepi(clip: torch.Tensor, sharp: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, float]:
    """VEPI: does the subject keep its edges? (Any-to-Bokeh, metrics/edge_batch)

    clip [F, 3, H, W], sharp [F, 3, h, w] (scaled to the clip's size), mask [F, h, w] 0..1 of the subject, widened by 2 px

    Returns the correlation -1..1 of the Sobel magnitudes inside the mask per frame [F] float64 (0 for an empty or flat one), and the
    smoothness 0..1 over time: 1 - standard deviation of its changes from frame to frame, 0 for a single frame.
    """
    size = clip.shape[-2:]
    if sharp.shape[-2:] != size:
        sharp = F.interpolate(sharp.float(), size=size, mode="bilinear", align_corners=False)
    mask = mask[:, None].float()
    if mask.shape[-2:] != size:
        mask = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
    inside = F.max_pool2d(mask, 5, 1, 2)[:, 0] * 255 > 127
    a, b = edge_magnitude(sharp), edge_magnitude(clip)
    scores = torch.stack([_pearson(x[m], y[m]) for x, y, m in zip(a, b, inside, strict=True)])
    smoothness = max(0.0, 1 - float(scores.diff().std(correction=0))) if len(scores) > 1 else 0.0
    return scores, smoothness


def _pearson(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not a.numel():
        return torch.zeros((), dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return a @ b / scale if scale > 0 else torch.zeros_like(scale)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of features [n, D], [m, D]: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), unbiased covariances."""
    a, b = a.double(), b.double()
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    # tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(s1)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + torch.trace(s1) + torch.trace(s2) - 2 * shared)
