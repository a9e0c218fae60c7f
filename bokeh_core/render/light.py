"""Display-encoded sRGB to linear light and back. Values above 1 pass through both ways, negative ones stay negative."""

import torch


def to_linear(image: torch.Tensor) -> torch.Tensor:
    """Display-encoded sRGB [..., 3, H, W] to linear light (IEC 61966-2-1)."""
    from kornia.color import rgb_to_linear_rgb  # imported late: it costs more than the rest of the library together

    return rgb_to_linear_rgb(image)


def to_display(image: torch.Tensor) -> torch.Tensor:
    """Linear light [..., 3, H, W] to display-encoded sRGB (IEC 61966-2-1)."""
    from kornia.color import linear_rgb_to_rgb

    return linear_rgb_to_rgb(image)
