"""All scores of a clip against its truth, frame by frame, so that long clips need little memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..optics.defocus import Defocus
from .edges import edge_band
from .image import psnr, ssim
from .video import flicker, relation_metric

EDGE_BAND = 8  # px on either side of a depth edge
IN_FOCUS = 0.5  # px of blur radius


@dataclass(frozen=True)
class Scores:
    """psnr, edges, in_focus in dB over all frames together; ssim, rm, flicker as means of frames and pairs. nan = could not be measured."""

    psnr: float
    ssim: float
    edges: float
    in_focus: float
    rm: float
    flicker: float


def compare(
    result: torch.Tensor,
    truth: torch.Tensor,
    mask: torch.Tensor | None = None,
    defocus: Defocus | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores of a result.

    result    [F, 3, H, W] 0..1 (values beyond are cut), H and W of 6 or more
    truth     [F or 1, 3, H, W]
    mask      [F or 1, H, W]: pixels above 0.5 count for the PSNR scores; None = all
    defocus   of F or 1 frames: says where depth edges are (EDGE_BAND px around them) and what is in focus (IN_FOCUS px); None = nan there
    progress  called as progress(done, total); may raise to interrupt
    """
    frames, (height, width) = len(result), result.shape[2:]

    def of(batch: torch.Tensor, i: int) -> torch.Tensor:
        return batch[i if len(batch) > 1 else 0].float().cpu()

    everywhere, edges, sharp, likeness, changes, restless = [], [], [], [], [], []
    before = None
    for i in range(frames):
        pair = of(result, i).clamp(0, 1), of(truth, i).clamp(0, 1)
        counted = torch.ones(height, width, dtype=torch.bool) if mask is None else of(mask, i) > 0.5
        everywhere.append((psnr(*pair, counted), int(counted.sum())))
        likeness.append(ssim(*pair))
        if defocus is not None:
            plan = defocus.frame(i if len(defocus.disparity) > 1 else 0)
            band = counted & edge_band(plan.disparity[0].cpu(), float(plan.k[0]), EDGE_BAND)
            calm = counted & (plan.signed_radius()[0].abs().cpu() <= IN_FOCUS)
            edges.append((psnr(*pair, band), int(band.sum())))
            sharp.append((psnr(*pair, calm), int(calm.sum())))
        if before is not None:
            clip, true_clip = (torch.stack(two) for two in zip(before, pair, strict=True))
            changes.append(relation_metric(clip, true_clip))
            restless.append(flicker(clip, true_clip))
        before = pair
        if progress is not None:
            progress(i + 1, frames)
    return Scores(_pooled(everywhere), _mean(likeness), _pooled(edges), _pooled(sharp), _mean(changes), _mean(restless))


def _pooled(scores: list[tuple[float, int]]) -> float:
    """dB of the squared error of all pixels together, from (dB, pixels) of each frame; nan where no pixel counts."""
    scores = [(db, pixels) for db, pixels in scores if pixels]
    if not scores:
        return math.nan
    error = sum(pixels * 10 ** (-db / 10) for db, pixels in scores) / sum(pixels for _, pixels in scores)
    return -10 * math.log10(error) if error else math.inf


def _mean(values: list[float]) -> float:
    """Mean of the values that are numbers; nan where there is none."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan
