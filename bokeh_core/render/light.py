"""Display-encoded sRGB to linear light and back, and the light that clipping lost. Values above 1 and below 0 pass through."""

import torch

from ..optics.lens import Lens


def to_linear(image: torch.Tensor) -> torch.Tensor:
    """Display-encoded sRGB [..., 3, H, W] to linear light (IEC 61966-2-1)."""
    from kornia.color import rgb_to_linear_rgb  # imported late: it costs more than the rest of the library together

    return rgb_to_linear_rgb(image)


def to_display(image: torch.Tensor) -> torch.Tensor:
    """Linear light [..., 3, H, W] to display-encoded sRGB (IEC 61966-2-1)."""
    from kornia.color import linear_rgb_to_rgb

    return linear_rgb_to_rgb(image)


SHARP = 2.0  # px of blur radius from which highlights are fully recovered; in focus there is nothing to gain and whites to lose


def recover_highlights(image: torch.Tensor, lens: Lens, radius: torch.Tensor) -> torch.Tensor:
    """Brighten what an 8-bit picture clipped, so that blurred lights become bright balls instead of grey ones.

    image   [3, H, W] linear light
    lens    its `highlights` b and `highlight_threshold` t, display-encoded
    radius  [H, W] defocus in px, of either sign: the boost grows from 0 in focus to full at SHARP px

    I (1 + b clip((max - t) / (1 - t))^2), max the brightest channel and t in linear light (RENDERERS.md, section 1). All channels grow
    alike, so hues stay; nothing is clamped; b = 0 returns the image itself.
    """
    if lens.highlights == 0:
        return image
    threshold = float(to_linear(torch.full((3, 1, 1), lens.highlight_threshold))[0])
    excess = ((image.amax(0) - threshold) / (1 - threshold)).clamp(0, 1)
    return image * (1 + lens.highlights * (radius.abs() / SHARP).clamp(max=1) * excess.square())
