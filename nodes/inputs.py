"""What arrives at a node's sockets, checked: other nodes may hand on anything, and a sentence helps more than a traceback."""

import torch

from ..bokeh_core.errors import BokehError
from ..bokeh_core.optics.defocus import Defocus


def require(value, kind, name, source):
    """`value` as it is. Raises BokehError when it is not a `kind`; `source` says where one comes from."""
    if type(value).__name__ != kind.__name__:  # by name: a host that reloads the pack keeps results whose classes are the old ones
        raise BokehError(f"The input '{name}' got {_words(value)}; expected what {source} hands on.")
    return value


def image(value, name="image", channels=(3, 4)):
    """IMAGE [B, H, W, C] as it is, of floating point, with no empty side."""
    wanted = " or ".join(map(str, channels))
    if not isinstance(value, torch.Tensor) or value.ndim != 4 or value.shape[-1] not in channels or value.numel() == 0:
        channels = f", {value.shape[-1]} channels" if isinstance(value, torch.Tensor) and value.ndim == 4 else ""
        raise BokehError(f"The input '{name}' got {_words(value)}{channels}; expected pictures [frames, height, width, {wanted} channels].")
    if not value.is_floating_point():
        raise BokehError(f"The input '{name}' holds {_dtype(value)} numbers; expected floating point, 0 to 1.")
    return value


def one(value, name="image"):
    """[3, H, W] of an IMAGE that holds one picture."""
    if len(image(value, name)) != 1:
        raise BokehError(f"The {name} has {len(value)} pictures; a bokeh stack belongs to one. Connect a single photo.")
    return value[0, ..., :3].movedim(-1, 0).float()


def scene(pictures, defocus):
    """How many frames an IMAGE and the Defocus of it make together: as many as either has, where the other may have one."""
    image(pictures)
    require(defocus, Defocus, "defocus", "Set Focus and Blur")
    frames, steps = len(pictures), len(defocus.focus)
    if frames != steps and 1 not in (frames, steps):
        raise BokehError(
            f"The image has {frames} frames and the defocus {steps}; the counts must be equal, or one of them 1. "
            "Connect the same frames to both nodes."
        )
    return max(frames, steps)


def mask(value, name="mask"):
    """[B, H, W] of a MASK [B, H, W], [H, W] or [B, 1, H, W], of floating point or true and false; the numbers as they are."""
    shaped = isinstance(value, torch.Tensor) and (value.ndim in (2, 3) or (value.ndim == 4 and value.shape[1] == 1))
    if not shaped or value.numel() == 0:
        raise BokehError(f"The input '{name}' got {_words(value)}; expected masks [frames, height, width].")
    if not (value.is_floating_point() or value.dtype == torch.bool):
        raise BokehError(f"The input '{name}' holds {_dtype(value)} numbers; expected floating point, 0 to 1.")
    value = value.reshape(-1, *value.shape[-2:])
    return value.float() if value.dtype == torch.bool else value


def depth(value, name="depth"):
    """IMAGE of 1, 3 or 4 channels, MASK [B, H, W] or geometry dict."""
    if isinstance(value, dict):
        return value
    if isinstance(value, torch.Tensor) and value.ndim in (2, 3):
        return mask(value, name)
    return image(value, name, (1, 3, 4))


def _words(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _dtype(value):
    return str(value.dtype).removeprefix("torch.")
