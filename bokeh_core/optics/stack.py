"""BokehStack: one scene, sharp and with several strengths of blur. What depth from defocus starts from."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..errors import BokehError
from .defocus import Defocus, clip_span
from .lens import Lens

STACK_WIDTH = 512  # px; the K of a stack is quoted at this image width (BokehDepth)


@dataclass(frozen=True, eq=False)
class BokehStack:
    """A sharp picture and the same picture with growing blur.

    reference    [3, H, W] float, 0..1, display-encoded: the sharp picture (K = 0); it is not among the frames
    frames       [N, 3, h, w] float, 0..1, in the order of k. The published generator leaves them a little smaller than its reference
    k            [N] float64, > 0: blur radius in px, on a picture 512 px wide, of the whole depth range, as asked for (not clamped)
    per_dioptre  k is instead the radius per 1/m of disparity difference: a real lens (thin-lens K)
    source       where it comes from: "kontext", "rendered", "photos"; "" unknown
    settings     what a generator wants remembered in the saved files (plain JSON values)
    """

    reference: torch.Tensor
    frames: torch.Tensor
    k: torch.Tensor
    per_dioptre: bool = False
    source: str = ""
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "k", torch.as_tensor(self.k, dtype=torch.float64).reshape(-1).cpu())
        if self.reference.ndim != 3 or self.reference.shape[0] != 3 or self.frames.ndim != 4 or self.frames.shape[1] != 3:
            raise BokehError(
                f"A bokeh stack needs a reference [3, H, W] and frames [N, 3, H, W]; got {list(self.reference.shape)} "
                f"and {list(self.frames.shape)}."
            )
        if len(self.frames) != len(self.k) or not len(self.k):
            raise BokehError(f"The bokeh stack has {len(self.frames)} frames and {len(self.k)} values of K; expected one K for each frame.")
        for value in self.k.tolist():
            if not (math.isfinite(value) and value > 0):
                raise BokehError(f"The bokeh stack has a frame with K = {value:g}; expected numbers above 0 (the sharp picture is apart).")

    def fitted(self, height: int, width: int) -> "BokehStack":
        """The same stack with all pictures [.., height, width], resampled bicubically (with antialias) where they differ."""

        def fit(pictures):
            if pictures.shape[-2:] == (height, width):
                return pictures
            out = F.interpolate(pictures.float(), size=(height, width), mode="bicubic", align_corners=False, antialias=True)
            return out.clamp(0, 1)

        return BokehStack(fit(self.reference[None])[0], fit(self.frames), self.k, self.per_dioptre, self.source, self.settings)


def thin_lens_k(lens: Lens, focus_distance: float) -> float:
    """K per dioptre of a real lens: px of radius, on a picture 512 px wide, per 1/m.

    focus_distance  m, 0 for infinity; the lens's own goes before it
    """
    dioptres = 1 / focus_distance if focus_distance else 0.0
    return float(lens.k(STACK_WIDTH, torch.tensor([dioptres]), metric=True))


def stack_radius(k: float, defocus: Defocus, *, per_dioptre: bool) -> float:
    """Defocus.k (px of this image per unit of its disparity) that gives the blur of a stack's K.

    K counts px on a 512 px wide picture: for the whole depth range (1 for a relative map, else nearest minus farthest), or per 1/m.
    Raises BokehError where K per dioptre is asked for without metric disparity, and for a constant depth map.
    """
    px = k * defocus.disparity.shape[-1] / STACK_WIDTH
    if per_dioptre:
        if not defocus.metric:
            raise BokehError("K per dioptre needs depth in metres, but this depth is relative; use K of the whole depth range instead.")
        return _sane(px, k)
    low, high = (float(d) for d in (defocus.disparity.aminmax() if defocus.metric else clip_span(defocus.disparity)))
    if high <= low:
        raise BokehError("The depth map is constant, so K of the whole depth range has no meaning; check the depth.")
    return _sane(px / (high - low), k)


def _sane(px, k):
    if not px <= 1e9:
        raise BokehError(f"K = {k:g} is too large for this depth map; the usual K are 1 to 30.")
    return px
