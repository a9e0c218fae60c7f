"""The classical scatter renderer of BokehMe, as it is found in BokehDiff: a baseline to compare with, never used for pictures."""

import torch


def scatter_bokehme(image: torch.Tensor, defocus: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised scatter with a soft disk, weight (1 + tanh 4 (r - distance)) / 2 / (r^2 + 0.2), no depth order.

    image [B, C, H, W] (raise it to a gamma before if wanted), defocus [B, 1, H, W] signed blur radius in px

    Returns bokeh [B, C, H, W], its numerator [B, C, H, W] and weight [B, 1, H, W], and the dilated defocus [B, 1, H, W]: the largest whole
    signed defocus of all disks that reach a pixel.
    """
    height, width = image.shape[-2:]
    radius, whole = defocus.abs(), defocus.trunc()
    reach = radius.floor() + 1  # the window of a source
    total, weight, dilated = torch.zeros_like(image), torch.zeros_like(defocus), whole.clone()
    limit = int(reach.max())
    for dy in range(-min(limit, height - 1), min(limit, height - 1) + 1):
        for dx in range(-min(limit, width - 1), min(limit, width - 1) + 1):
            source = (..., slice(max(-dy, 0), height - max(dy, 0)), slice(max(-dx, 0), width - max(dx, 0)))
            target = (..., slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0)))
            distance = (dx * dx + dy * dy) ** 0.5
            r = radius[source]
            w = (0.5 + 0.5 * torch.tanh(4 * (r - distance))) / (r * r + 0.2)
            w = torch.where(reach[source] >= max(abs(dx), abs(dy)), w, 0)
            weight[target] += w
            total[target] += w * image[source]
            near = torch.where(r >= distance, whole[source], -torch.inf)
            dilated[target] = torch.maximum(dilated[target], near)
    return total / weight, total, weight, dilated
