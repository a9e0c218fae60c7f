"""Scores of one picture against another. Images are [..., 3, H, W], 0..1 unless said otherwise."""

import math

import torch
import torch.nn.functional as F

from .edges import encode


def psnr(image: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Peak signal to noise ratio in dB, peak 1, of the squared error pooled over everything given (all frames of a clip at once).

    image, truth [..., H, W]; mask [H, W] or broadcastable bool: only these pixels count. inf when equal, nan when the mask is empty.
    """
    error = (image.double() - truth.double()) ** 2
    if mask is not None:
        error = error[mask.expand_as(error)]
        if not error.numel():
            return math.nan
    mean = float(error.mean())
    return math.inf if mean == 0 else -10 * math.log10(mean)


def ssim(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Structural similarity, at most 1 (Wang et al. 2004), with the defaults of torchmetrics: Gaussian window 11 x 11, sigma 1.5, reflect
    padding, K1 0.01, K2 0.03, data range 1, biased (co)variances. Mean over frames, channels and the full map.

    image, truth [..., H, W] with H, W >= 6.
    """
    a, b = (x.double().reshape(-1, 1, *x.shape[-2:]) for x in (image, truth))
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def smooth(x):
        x = F.pad(x, (5, 5, 5, 5), mode="reflect")
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, cov = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(score.mean())


def judge(result: torch.Tensor, case: dict) -> dict[str, float]:
    """Scores of one rendered case, by the protocol of RENDERERS.md section 4.

    result  [3, H, W] linear light, rendered from a case of synthesis.scenes.make_case or a recorded one (same keys)

    Returns PSNR in dB over clip(x, 0, 1)^(1/2.2): all (scored pixels), edge8, edge24 (bands around depth edges), in_focus; and ssim of the
    scored part. nan where a case has no such pixels.
    """
    ours = encode(result.float().cpu())
    truth = encode(torch.as_tensor(case["truth_linear"]).float().permute(2, 0, 1))
    scores = {"all": psnr(ours, truth, torch.as_tensor(case["scored"]))}
    for name in ("edge8", "edge24", "in_focus"):
        scores[name] = psnr(ours, truth, torch.as_tensor(case[name]) & torch.as_tensor(case["scored"]))
    rows, columns = (torch.as_tensor(case["scored"]).any(axis).nonzero().flatten() for axis in (1, 0))
    inner = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    return scores | {"ssim": ssim(ours[inner], truth[inner])}
