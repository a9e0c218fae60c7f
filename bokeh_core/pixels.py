"""Pictures in 8 bits, as the published scripts hand them on."""

import numpy as np
import torch


def to_bytes(picture: torch.Tensor) -> np.ndarray:
    """[H, W, 3] uint8 of a picture [3, H, W] 0..1, clipped and rounded."""
    return (picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous().cpu().numpy()


def from_bytes(picture: np.ndarray) -> torch.Tensor:
    """[3, H, W] float32 0..1, on the CPU."""
    return torch.from_numpy(picture).movedim(-1, 0).float() / 255


def lanczos(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] resized as PIL does."""
    if picture.shape[:2] == (height, width):
        return picture
    from PIL import Image

    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
