"""Colour transfer from the reference to a frame: 8-bit CIE LAB statistics as published (BokehDepth stage 1, SPEC section 5).

The published run uses OpenCV's 8-bit LAB, an integer approximation of its own. It is written here from its definition (fixed point with
12 and 14 bits, tables for the curves), so that results are equal bit for bit without OpenCV.
"""

import functools

import numpy as np
import torch

from ...pixels import from_bytes, to_bytes

# sRGB (D65) to XYZ and back; the white point divides out.
_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_FROM_XYZ = np.array([[3.240479, -1.53715, -0.498535], [-0.969256, 1.875991, 0.041556], [0.055648, -0.204043, 1.057311]])
_WHITE = np.array([0.950456, 1.0, 1.088754])
_BITS, _GAMMA_BITS, _INVERSE_BITS, _BASE = 12, 3, 12, 1 << 14


def color_transfer(frame: torch.Tensor, reference: torch.Tensor, *, match_contrast: bool) -> torch.Tensor:
    """[3, H, W]: a frame [3, H, W] 0..1 with the mean colour of the reference [3, h, w], in 8-bit steps.

    match_contrast  also match the spread, as the published run does; this raises the contrast of strongly blurred frames
    """
    return from_bytes(color_transfer_lab(to_bytes(reference), to_bytes(frame), match_contrast)).to(frame.device)


def color_transfer_lab(source: np.ndarray, target: np.ndarray, adjust_std: bool) -> np.ndarray:
    """[H, W, 3] uint8: `target` with the LAB mean (and population spread) of `source`; both RGB uint8. Published under this name."""
    source, target = (rgb_to_lab(picture).astype(np.float64) for picture in (source, target))
    for channel in range(3):
        ours, theirs = target[..., channel], source[..., channel]
        mean, spread = ours.mean(), ours.std()
        moved = ours - mean
        if adjust_std and spread > 1e-6:
            moved = moved * (theirs.std() / spread)
        target[..., channel] = moved + theirs.mean()
    return lab_to_rgb(np.clip(target, 0, 255).astype(np.uint8))  # cut off, not rounded


def rgb_to_lab(picture: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 sRGB to 8-bit LAB: L scaled to 0..255, a and b offset by 128."""
    linear, root, *_ = _tables()
    weights = np.rint((1 << _BITS) * _TO_XYZ / _WHITE[:, None]).astype(np.int64)
    x, y, z = (root[index] for index in np.moveaxis(_descale(linear[picture] @ weights.T, _BITS), -1, 0))
    bits = _BITS + _GAMMA_BITS
    half = 128 << bits
    lightness = 296 * y - ((16 * 255 * (1 << bits) + 50) // 100)
    planes = [lightness, 500 * (x - y) + half, 200 * (y - z) + half]
    return np.clip(np.stack([_descale(plane, bits) for plane in planes], -1), 0, 255).astype(np.uint8)


def lab_to_rgb(picture: np.ndarray) -> np.ndarray:
    """The way back."""
    *_, luminance, root, cube, lowest, display = _tables()
    lightness, a, b = np.moveaxis(picture.astype(np.int64), -1, 0)
    y, f = luminance[lightness], root[lightness]
    across_a = ((5 * a * 53687 + (1 << 7)) >> 13) - 128 * _BASE // 500
    across_b = ((b * 41943 + (1 << 4)) >> 9) - 128 * _BASE // 200 + 1
    x, z = cube[f + across_a - lowest], cube[f - across_b - lowest]
    weights = np.rint((1 << _BITS) * _FROM_XYZ * _WHITE).astype(np.int64)
    linear = _descale(np.stack([x, y, z], -1) @ weights.T, _BITS + 14 - _INVERSE_BITS)
    return display[np.clip(linear, 0, (1 << _INVERSE_BITS) - 1)]


def _descale(x, bits):
    return (x + (1 << (bits - 1))) >> bits


@functools.lru_cache(maxsize=1)
def _tables():
    """8-bit sRGB to linear; linear to its cube root; L to Y and to f(Y); f to X or Z and its lowest index; linear to 8-bit sRGB."""
    v = np.arange(256) / 255
    linear = np.rint(255 * (1 << _GAMMA_BITS) * np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)).astype(np.int64)
    x = (np.arange(256 * 3 // 2 * (1 << _GAMMA_BITS)) / (255 * (1 << _GAMMA_BITS))).astype(np.float32)  # OpenCV rounds in float32 here
    root = np.where(x < 216 / 24389, x * np.float32(841 / 108) + np.float32(16 / 116), np.cbrt(x))
    root = np.rint((1 << (_BITS + _GAMMA_BITS)) * root.astype(np.float64)).astype(np.int64)

    lightness = np.arange(256)
    dark = lightness <= 20  # L* of 8 and below
    f = np.where(dark, 16 / 116 + lightness * 5 / (3 * 17 * 29), (lightness * 100 / 255 + 16) / 116)
    y = np.rint(_BASE * np.where(dark, 20 * 9 * lightness / (17 * 29**3), f**3)).astype(np.int64)
    f = np.rint(_BASE * f).astype(np.int64)
    lowest = -8145
    i = np.arange(lowest, lowest + _BASE * 9 // 4)
    cube = np.where(i <= 3390, np.fix(i * 108 / 841).astype(np.int64) - _BASE * 16 // 116 * 108 // 841, i * i // _BASE * i // _BASE)
    v = np.arange(1 << _INVERSE_BITS) / (1 << _INVERSE_BITS)
    display = np.rint(255 * np.where(v <= 0.0031308, v * 12.92, 1.055 * v ** (1 / 2.4) - 0.055)).astype(np.uint8)
    return linear, root, y, f, cube, lowest, display
