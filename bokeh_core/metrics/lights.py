"""What a lens does to a point of light: the shape of its picture, its size, and how both follow the blur strength."""

import math

import torch


def disk_kernel(radius: float, reach: int | None = None, fine: int = 16) -> torch.Tensor:
    """[2 reach + 1, 2 reach + 1] float64, sum 1: the picture of a lit pixel through a round aperture, blur radius in px.

    The disk convolved with the bilinear tent, which is what rays through a bilinear picture see. Summed over a grid of `fine` points a px.
    """
    reach = math.ceil(radius) + 1 if reach is None else reach
    line = (torch.arange(2 * reach * fine, dtype=torch.float64) + 0.5) / fine - reach
    inside = (line[:, None] ** 2 + line[None] ** 2 <= radius**2).double()
    tents = (1 - (line[None] - torch.arange(-reach, reach + 1)[:, None]).abs()).clamp_min(0)
    kernel = tents @ inside @ tents.T
    if not kernel.sum() > 0:  # a disk smaller than the grid
        kernel[reach, reach] = 1.0
    return kernel / kernel.sum()


def highlight_shape_error(picture: torch.Tensor, kernel: torch.Tensor) -> float:
    """L1 distance 0..2 between the picture [H, W] of a light and its exact kernel [H, W], each scaled to sum 1 (target <= 0.01)."""
    a, b = picture.double(), kernel.double()
    return float((a / a.sum() - b / b.sum()).abs().sum())


def measured_radius(picture: torch.Tensor) -> float:
    """Blur radius in px of the picture [H, W] of a lit pixel on black, from its second moment: r^2 / 2, plus 1/3 for the pixel."""
    p = picture.double() / picture.double().sum()
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in p.shape), indexing="ij")
    x, y = x - (p * x).sum(), y - (p * y).sum()
    return math.sqrt(max(2 * (float((p * (x * x + y * y)).sum()) - 1 / 3), 0.0))


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation -1..1 of two vectors [n]; ties share their mean rank; 0 when one of them is constant."""

    def ranks(v):
        v = v.double()
        return (v[:, None] > v[None]).double().sum(1) + 0.5 * ((v[:, None] == v[None]).double().sum(1) - 1)

    a, b = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def monotonicity(asked: torch.Tensor, measured: torch.Tensor) -> tuple[float, float]:
    """How radii follow the blur strength: Spearman correlation (target 1) and relative error of the slope through 0 (target <= 0.02).

    asked, measured [n]: blur radii in px.
    """
    asked, measured = asked.double(), measured.double()
    return spearman(asked, measured), abs(float((asked @ measured) / (asked @ asked)) - 1)


def gradient_energy(image: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Mean squared forward difference of image [C, H, W] over mask [H, W] bool; must fall outside the focus as k grows."""
    dx, dy = image[:, :-1, 1:] - image[:, :-1, :-1], image[:, 1:, :-1] - image[:, :-1, :-1]
    energy = (dx.double() ** 2 + dy.double() ** 2).mean(0)
    if mask is not None:
        energy = energy[mask[:-1, :-1]]
    return float(energy.mean())


def pull_roughness(radii: torch.Tensor) -> float:
    """Largest second difference, px per frame squared, of the measured radii [frames] of a focus pull. A steady pull has 0."""
    return float((radii[2:] - 2 * radii[1:-1] + radii[:-2]).abs().max())
