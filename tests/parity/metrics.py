"""Any-to-Bokeh's metrics (metric_*)."""

import numpy as np

from bokeh_core.metrics.image import psnr, ssim
from bokeh_core.metrics.video import edge_magnitude, frechet_distance, relation_metric, vepi

from .runner import Case, unit, worst


@unit("metric_vepi_")
def metric_vepi(case: Case) -> tuple[float, float]:
    t, tolerance = case.tensors, case.meta["tolerance"]
    clip, sharp = (t[name].flip(-1).permute(0, 3, 1, 2).double() / 255 for name in ("in.bokeh_bgr_u8", "in.reference_bgr_u8"))
    scores, smoothness = vepi(clip, sharp, t["in.mask_u8"].double() / 255)
    pairs = [
        (float((scores - t["out.epi_fg"]).abs().max()), tolerance),
        (abs(smoothness - float(t["out.smoothness"])), tolerance),
    ]
    if sharp.shape == clip.shape:
        pairs.append((float((edge_magnitude(sharp[:1])[0] - t["mid.edge_map_ref0"]).abs().max()), tolerance))
    return worst(pairs)


@unit("metric_video_")
def metric_video(case: Case) -> tuple[float, float]:
    """The tolerances are given as prose; these are its numbers."""
    t = case.tensors
    videos = [(a.transpose(0, 1), b.transpose(0, 1)) for a, b in zip(t["in.pred"], t["in.gt"], strict=True)]  # [F, 3, H, W]
    ours = {
        "ssim": (np.mean([ssim(a, b) for a, b in videos]), 1e-4),
        "psnr": (np.mean([psnr(a, b) for a, b in videos]), 1e-4),
        "relation_as_released": (np.mean([relation_metric(a, b, pairs=2) for a, b in videos]), 1e-6),
        "relation_all_pairs": (np.mean([relation_metric(a, b) for a, b in videos]), 1e-6),
        "frechet": (frechet_distance(t["in.feat_a"], t["in.feat_b"]), 1e-4),
    }
    return worst([(abs(value - float(t[f"out.{name}"])), tolerance) for name, (value, tolerance) in ours.items()])
