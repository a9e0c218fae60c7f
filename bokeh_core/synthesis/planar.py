"""The published ray tracers over planar layers that made the training data of BokehDiff and Any-to-Bokeh, to the digit.

Both shoot rays through a square grid of aperture points clipped to a disk, drop rays that leave the frame and stop at alpha 0.99.
For new data use render.rays, which has none of these limits. Disparity of a plane: (1 - a x - b y) / c, x and y in pixels.
"""

import numpy as np
import torch


def aperture_grid(line: torch.Tensor) -> torch.Tensor:
    """[n, 2] float32 points u, v of the square grid line x line with u^2 + v^2 <= 1 (tested in line's precision), u slow.

    The two systems space `line` with torch and with numpy. These round differently, which decides whether points on the rim count.
    """
    u, v = torch.meshgrid(line, line, indexing="ij")
    keep = u * u + v * v <= 1
    return torch.stack([u[keep], v[keep]], 1).float()


def _pixels(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32), indexing="ij")
    return x, y


def _lookup(premultiplied: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear values [4, H, W] of premultiplied [4, H, W] at x, y, and whether that is inside 0 <= x < W, 0 <= y < H.

    The neighbour beyond the last row or column repeats the edge.
    """
    _, height, width = premultiplied.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = torch.where(inside, x, 0), torch.where(inside, y, 0)
    x0, y0 = x.floor().long(), y.floor().long()
    x1, y1 = (x0 + 1).clamp(max=width - 1), (y0 + 1).clamp(max=height - 1)
    fx, fy = x - x0, y - y0
    value = premultiplied[:, y0, x0] * ((1 - fx) * (1 - fy)) + premultiplied[:, y0, x1] * (fx * (1 - fy))
    value = value + premultiplied[:, y1, x0] * ((1 - fx) * fy) + premultiplied[:, y1, x1] * (fx * fy)
    return value, inside


def _march(out: torch.Tensor, layers, hits, counted, last_counts: bool) -> None:
    """One aperture point for all pixels, near to far, added to out [5, H, W] in place: premultiplied colour, alpha and weight.

    Sums are float32 in the published order (each layer joins at once), or the last digits would differ.
    """
    left = torch.ones_like(out[0])
    going = counted
    for index, (layer, (x, y)) in enumerate(zip(layers, hits, strict=True)):
        value, inside = _lookup(layer, x, y)
        inside = inside & going
        alpha = value[3]
        seen = inside & (alpha >= 0.01)
        share = torch.where(seen, left, 0)
        out[:4] += value * share
        out[4] += alpha * share
        if last_counts and index == len(layers) - 1:
            out[4] += torch.where(inside & ~seen, left, 0)
        going = going & ~(seen & (alpha > 0.99))
        left = torch.where(seen, left * (1 - alpha), left)


def _premultiplied(images: torch.Tensor, alphas: torch.Tensor) -> list[torch.Tensor]:
    return [torch.cat([image * alpha, alpha]) for image, alpha in zip(images.float(), alphas.float(), strict=True)]


def trace_bokehdiff(
    images: torch.Tensor,
    alphas: torch.Tensor,
    planes: torch.Tensor,
    radius: torch.Tensor,
    focus_depth: torch.Tensor,
    samples: int,
    eta: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BokehDiff's tracer (its classical_renderer/mpi_multi_reverse).

    images [B, L, 3, H, W] linear light, alphas [B, L, 1, H, W], planes [B, L, 3] = (a, b, c), near to far; radius [B] px per unit of
    disparity; focus_depth [B] = 1 / focus disparity; samples: aperture points per side; eta: vignetting, shift of the second circle per px.

    Returns sums over aperture points: premultiplied colour and alpha [B, 4, H, W], and weight [B, 1, H, W]; see `resolve`.
    """
    batch, _, _, height, width = images.shape
    x, y = _pixels(height, width)
    grid = aperture_grid(torch.linspace(-1, 1, samples))
    result = torch.zeros(batch, 5, height, width)
    for i in range(batch):
        layers = _premultiplied(images[i], alphas[i])
        focus = 1 / focus_depth[i].float()
        for u, v in grid:
            # Float64 where the published C source computes in double: the vignetting and the guarded division.
            counted = (u.double() + eta * (x.double() - (width - 1) / 2)) ** 2 + (
                v.double() + eta * (y.double() - (height - 1) / 2)
            ) ** 2 <= 1.1
            hits = []
            for a, b, c in planes[i].float():
                slope = (a * u + b * v + c / radius[i].float()).double() + 1e-5
                t = ((1 - a * x - b * y - c * focus).double() / slope).float()
                hits.append((x + t * u, y + t * v))
            _march(result[i], layers, hits, counted, last_counts=True)
    return result[:, :4], result[:, 4:]


def resolve(sums: torch.Tensor, weight: torch.Tensor, gamma: float = 2.2) -> torch.Tensor:
    """Display values [B, 3, H, W] 0..1 of BokehDiff's sums [B, 4, H, W] and weight [B, 1, H, W]."""
    return (sums.clamp_min(0) / weight.clamp_min(1e-5))[:, :3].pow(1 / gamma).clamp(0, 1)


def trace_any_to_bokeh(
    images: torch.Tensor, alphas: torch.Tensor, planes: torch.Tensor, k: torch.Tensor, focus_depth: torch.Tensor, samples: int = 101
) -> torch.Tensor:
    """Any-to-Bokeh's tracer, which is MPIB's (its bokeh_generator). No gamma: values of images [B, L, 3, H, W] are averaged as they are.

    alphas [B, L, 1, H, W], planes [B, L, 3] = (a, b, c), near to far; k [B] px per unit of disparity; focus_depth [B]; samples: aperture
    points per side. Returns [B, 3, H, W].
    """
    batch, _, _, height, width = images.shape
    x, y = _pixels(height, width)
    result = torch.zeros(batch, 5, height, width)
    grid = aperture_grid(torch.from_numpy(np.linspace(-1, 1, samples)))
    everywhere = torch.ones(height, width, dtype=torch.bool)
    for i in range(batch):
        layers = _premultiplied(images[i], alphas[i])
        z_f = focus_depth[i].float()
        for u, v in grid * k[i].float():
            hits = []
            for a, b, c in planes[i].float():
                # The ray from (u, v, 0) to the pixel's point in the focus plane, met with the plane of the layer.
                dx, dy = z_f * x - u, z_f * y - v
                t = ((a * u + b * v + c).double() / ((z_f - a * dx - b * dy).double() + 1e-5)).float()
                depth = (t * z_f).double() + 1e-5
                hits.append((((t * dx + u).double() / depth).float(), ((t * dy + v).double() / depth).float()))
            _march(result[i], layers, hits, everywhere, last_counts=False)
    return result[:, :3] / result[:, 4:]


def flatten_planes(images: torch.Tensor, alphas: torch.Tensor, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Any-to-Bokeh's all-in-focus picture [B, 3, H, W] (soft alpha, far to near) and disparity [B, 1, H, W] (nearest with alpha > 0.5)."""
    batch, count, _, height, width = images.shape
    x, y = _pixels(height, width)
    picture, disparity = torch.zeros(batch, 3, height, width), torch.zeros(batch, 1, height, width)
    for i in range(count - 1, -1, -1):
        a, b, c = (planes[:, i, j, None, None, None].float() for j in range(3))
        alpha = alphas[:, i].float()
        picture = picture * (1 - alpha) + images[:, i].float() * alpha
        disparity = torch.where(alpha > 0.5, (1 - a * x - b * y) / c, disparity)
    return picture, disparity
