"""From a picture's depth and the mask of its subject to the defocus that the training targets of BokehDepth are rendered with.

bokehdepth_stage1 SPEC section 9. The K axis of the released weights is defined here: blur radius in px, on a picture 512 px wide, per
unit of disparity, where disparity is the picture's own, brought to 0..1.
"""

from dataclasses import dataclass

import numpy as np

EPSILON = 1e-8  # added to spans, and the least span of inverse depth that counts as depth
NEAREST = 1e-6  # m; depth below is no depth
FARTHEST_SHARE = 96  # percentile of the subject's depth; what lies beyond is taken for leaks of its mask
FLAT = 10.0  # span of the subject's depth up to which it is flattened into the focus plane


@dataclass(frozen=True)
class Quirks:
    """What the released trainer does and we do better."""

    own_span: bool = False  # the focus of a flattened subject is measured on the subject's own 0..1: it lands at the far end of the picture


BEST, AS_PUBLISHED = Quirks(), Quirks(own_span=True)


@dataclass(frozen=True, eq=False)
class FocusedDisparity:
    """disparity [H, W] float32 0..1, near = 1, with a flat subject moved into the focus plane; focus: its value that is sharp."""

    disparity: np.ndarray
    focus: float
    flat: bool

    def defocus(self, k: float) -> np.ndarray:
        """[H, W] float32 signed blur radius in px of a picture 512 px wide; positive in front of the focus."""
        return np.float32(k) * (self.disparity - np.float32(self.focus))


def focused_disparity(depth: np.ndarray, subject: np.ndarray | None = None, quirks: Quirks = BEST) -> FocusedDisparity:
    """Disparity and focus of a training picture, in float32 as published.

    depth    [H, W], any unit, far = large; pixels that are not finite or not above 1e-6 are holes and get the median disparity. Without
             any depth, or with constant depth, the disparity is 0.5 everywhere: nothing will be blurred
    subject  [H, W] bool, what shall be sharp; None or empty: the focus is the median disparity of the picture

    The focus is the median of the nearer half of the subject, without the farthest 4 % of it. A subject whose depth spans 10 or less is
    moved into the focus plane as a whole, at the farthest depth it keeps.
    """
    depth = np.asarray(depth, np.float32)
    valid = np.isfinite(depth) & (depth > NEAREST)
    inverse = np.float32(1) / np.where(valid, depth, np.float32(1))
    low, high = (inverse[valid].min(), inverse[valid].max()) if valid.any() else (np.float32(0), np.float32(0))
    if high - low < EPSILON:
        disparity = np.full(depth.shape, 0.5, np.float32)
    else:
        disparity = _placed(inverse, low, high)
        disparity[~valid] = np.median(disparity[valid])
    subject = valid & subject if subject is not None else np.zeros_like(valid)
    if not subject.any():
        return FocusedDisparity(disparity, float(np.median(disparity)), False)
    farthest = np.float32(np.percentile(depth[subject], FARTHEST_SHARE))
    core = subject & (depth <= farthest)
    kept = disparity[core]
    nearer = kept[kept > np.median(kept)]
    focus = np.median(nearer if len(nearer) else kept)
    flat = bool(depth[core].max() - depth[core].min() <= FLAT)
    if flat:
        if quirks.own_span:
            low, high = inverse[subject].min(), inverse[subject].max()
        if quirks.own_span or high - low >= EPSILON:
            focus = np.clip(_placed(np.float32(1) / farthest, low, high), 0, 1)
        disparity[core] = focus
    return FocusedDisparity(disparity, float(focus), flat)


def _placed(inverse, low, high):
    return (inverse - low) / (high - low + np.float32(EPSILON))
