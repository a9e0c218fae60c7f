"""A clip and its depth that exist one frame at a time: for runs of any length in no memory."""

from pathlib import Path

import torch

from bokeh_core.media import Picture


class Clip:
    def __init__(self, frames, size):
        self.frames, self.size, self.path, self.rate, self.is_picture = frames, size, Path("endless"), None, False

    def __len__(self):
        return self.frames

    def __iter__(self):
        height, width = self.size
        ground = torch.linspace(0, 1, height * width).view(1, height, width).repeat(3, 1, 1)
        return (Picture(ground.roll(i % width, -1)) for i in range(self.frames))


class Depth:
    metric = False

    def __init__(self, frames, size):
        self.frames, self.size = frames, size
        self.samples = torch.stack([self._frame(0)])

    def _frame(self, index):
        height, width = self.size
        disparity = torch.full((height, width), 0.2)
        disparity[height // 3 : -height // 3, width // 3 : -width // 3] = 0.9
        return disparity.roll(index % width, -1)

    def __iter__(self):
        return (self._frame(i) for i in range(self.frames))
