"""Halving and doubling a grid so that flips and transposition commute, at odd and even sizes alike."""

import torch


def down(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Halve one axis, keeping the sum: the transpose of `up`. Odd lengths keep samples 0, 2, 4, ...; even ones merge pairs with overlap."""
    x = x.movedim(dim, -1)
    n = x.shape[-1]
    if n == 1:
        return x.movedim(-1, dim)
    if n % 2:
        even, odd = x[..., ::2].clone(), x[..., 1::2] / 2
        even[..., :-1] += odd
        even[..., 1:] += odd
        return even.movedim(-1, dim)
    left, right = x[..., ::2], x[..., 1::2]
    out = 0.75 * (left + right)
    out[..., 1:] += 0.25 * right[..., :-1]
    out[..., :-1] += 0.25 * left[..., 1:]
    out[..., 0] += 0.25 * left[..., 0]
    out[..., -1] += 0.25 * right[..., -1]
    return out.movedim(-1, dim)


def up(x: torch.Tensor, dim: int, n: int) -> torch.Tensor:
    """Double one axis to length n by linear interpolation."""
    if n == 1:
        return x
    x = x.movedim(dim, -1)
    out = x.new_empty(*x.shape[:-1], n)
    if n % 2:
        out[..., ::2] = x
        out[..., 1::2] = (x[..., :-1] + x[..., 1:]) / 2
    else:
        before = torch.cat([x[..., :1], x[..., :-1]], -1)
        after = torch.cat([x[..., 1:], x[..., -1:]], -1)
        out[..., ::2] = 0.75 * x + 0.25 * before
        out[..., 1::2] = 0.75 * x + 0.25 * after
    return out.movedim(-1, dim)


def down2(x: torch.Tensor) -> torch.Tensor:
    """Halve the last two axes, keeping the sum."""
    return down(down(x, -1), -2)


def up2(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Double the last two axes to height x width by linear interpolation."""
    return up(up(x, -1, width), -2, height)
