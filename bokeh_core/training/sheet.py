"""Pictures of what a recipe trains on."""

from collections.abc import Callable

import numpy as np
import torch

from .task import Task

ROOM = 18  # px above a row, for its names


def sample_sheet(task: Task, count: int, side: int = 160, progress: Callable[[int, int], None] | None = None) -> torch.Tensor:
    """[3, H, W] 0..1: the first `count` training samples, one a row, with everything in them that is a picture.

    Maps of one channel are spread over grey; pictures with values below 0 are taken as -1..1; of clips the first and last frame are shown.
    side  px of the longer side of each picture
    """
    rows = []
    for index in range(count):
        tiles = [tile for name, value in task.sample(index).items() for tile in _tiles(name, value, side)]
        rows.append(torch.cat(tiles, 2))
        if progress is not None:
            progress(index + 1, count)
    width = max(row.shape[2] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[2], 0, 4), value=1) for row in rows], 1)


def _tiles(name: str, value: torch.Tensor, side: int) -> list[torch.Tensor]:
    """The pictures of one entry of a sample, [3, ROOM + h, w] each."""
    if value.ndim < 2 or min(value.shape[-2:]) < 8 or (value.ndim > 2 and value.shape[-3] not in (1, 3, 4)):
        return []
    value = value.float()
    low, high = float(value.min()), float(value.max())
    if value.ndim == 2 or value.shape[-3] == 1:
        value = (value - low) / ((high - low) or 1.0)
        value = value[None] if value.ndim == 2 else value
    elif low < 0:
        value = value / 2 + 0.5
    frames = value.flatten(0, -4) if value.ndim > 3 else value[None]
    shown = {"": 0} if len(frames) == 1 else {" first": 0, " last": len(frames) - 1}
    return [_labelled(frames[i, :3].expand(3, -1, -1), f"{name}{which} {low:.2g}..{high:.2g}", side) for which, i in shown.items()]


def _labelled(picture: torch.Tensor, words: str, side: int) -> torch.Tensor:
    from PIL import Image, ImageDraw

    scale = side / max(picture.shape[-2:])
    size = [max(1, round(length * scale)) for length in picture.shape[-2:]]
    picture = torch.nn.functional.interpolate(picture[None].clamp(0, 1), size=size, mode="area" if scale < 1 else "nearest")[0]
    label = Image.new("RGB", (size[1], ROOM), "white")
    ImageDraw.Draw(label).text((2, 3), words, fill="black")
    label = torch.from_numpy(np.array(label)).movedim(-1, 0).float() / 255
    return torch.cat([label, picture], 1)
