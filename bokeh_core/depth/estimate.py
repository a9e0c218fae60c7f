"""Frames in, depth maps out, in order and in bounded memory."""

from collections.abc import Callable, Iterable, Iterator

import torch

from ..errors import BokehError
from . import unidepth
from .checkpoint import DepthModel, DepthModelInfo
from .preprocessing import RESOLUTION, network_input, network_size, to_size, video_network_size
from .video_depth_anything import ELEMENTS_AT_ONCE, KEYFRAMES, OVERLAP, WINDOW, StreamMemory, parts, stitch, windows

Upsample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Progress = Callable[[float, int], None]


def depth_maps(
    model: DepthModel,
    frames: Iterable[torch.Tensor],
    count: int,
    *,
    clip: bool,
    resolution: int = RESOLUTION,
    shots: list[int] | None = None,
    chunk: int = 4,
    upsample: Upsample | None = None,
    progress: Progress | None = None,
    streaming: bool = False,
) -> Iterator[torch.Tensor]:
    """The depth of `count` frames in order, some [n, H, W] float32 on the CPU at a time, each map of its frame's size.

    frames      [3, H, W] display-encoded sRGB 0..1, all of one size; taken lazily, in order, once
    clip        the frames follow each other in time: Video Depth Anything then uses its windows; the photo models take no notice
    resolution  px of the network's shorter side (multiples of 14 are used); more shows finer things, and is not always better
    shots       numbers of the frames at which a new shot starts (0 may be left out): nothing is carried over a cut
    chunk       frames in the network at once; less needs less memory
    upsample    (low [n, h, w], image [n, 3, H, W]) -> [n, H, W], on the model's device; None = bilinear, as published
    progress    (done, count), after every chunk; may raise to stop
    streaming   Video Depth Anything frame by frame, without looking ahead; its authors say it is less steady than the windows

    Values: metres of a metric model (near = small), else inverse depth of unknown scale and shift (near = large).
    Raises BokehError when there are fewer frames than `count`, or of different sizes.
    """
    if count < 1 or chunk < 1:
        raise BokehError(f"Depth of {count} frames, {chunk} at once, was asked for; expected at least 1 of each.")
    cuts = sorted({0, *(shots or [])})
    if cuts[0] < 0 or cuts[-1] >= count:
        raise BokehError(f"The shots start at the frames {cuts}; expected numbers from 0 to {count - 1}.")
    return _depth_maps(model, _Source(iter(frames), count), clip, resolution, cuts, chunk, upsample, progress, streaming)


@torch.no_grad()
def _depth_maps(model, source, clip, resolution, cuts, chunk, upsample, progress, streaming):
    run = _Run(model, source, resolution, chunk, upsample, progress or (lambda done, total: None))
    if not (clip and model.info.video):
        yield from run.photos()
        return
    for first, end in zip(cuts, [*cuts[1:], source.count], strict=True):
        yield from (run.stream if streaming else run.shot)(end - first)


class _Source:
    """Frames taken from an iterator, checked."""

    def __init__(self, frames: Iterator[torch.Tensor], count: int):
        self.frames, self.count = frames, count
        self.taken, self.size = 0, None

    def take(self, n: int) -> list[torch.Tensor]:
        """The next n frames, each [3, H, W]."""
        taken = []
        for frame in (next(self.frames, None) for _ in range(n)):
            if frame is None:
                raise BokehError(f"The clip ended after {self.taken} frames; expected {self.count}.")
            self.size = self.size or tuple(frame.shape[-2:])
            if frame.shape != (3, *self.size):
                raise BokehError(f"Frame {self.taken} has the shape {list(frame.shape)}; expected {[3, *self.size]} like the first one.")
            taken.append(frame)
            self.taken += 1
        return taken


class _Run:
    """One call of `depth_maps`."""

    def __init__(self, model, source, resolution, chunk, upsample, progress):
        self.network, self.model, self.source, self.resolution, self.chunk = model.network, model, source, resolution, chunk
        self.upsample, self.progress = upsample, progress
        self.encoded = self.done = 0  # frames

    def pixels(self, images: list[torch.Tensor]) -> torch.Tensor:
        if self.model.info.align_corners:
            size = _network_size(self.model.info, *self.source.size, self.resolution)
            pixels = torch.cat([network_input(image[None], size) for image in images])
        else:
            fit = _fit(self.model.info, *self.source.size, self.resolution)
            pixels = torch.cat([unidepth.network_input(image[None], fit) for image in images])
        return pixels.to(self.model.device, self.model.dtype)

    def tick(self) -> None:
        self.progress((self.encoded + self.done) / 2, self.source.count)

    def plain(self, low: torch.Tensor) -> torch.Tensor:
        return to_size(low, self.source.size, self.model.info.align_corners)

    def full(self, low: torch.Tensor, images: list[torch.Tensor]) -> torch.Tensor:
        if not self.upsample:
            return self.plain(low)
        return torch.cat([self.upsample(one[None], image[None].to(one.device)) for one, image in zip(low, images, strict=True)])

    def alone(self, count: int, estimate: Callable[[torch.Tensor], torch.Tensor], chunk: int) -> Iterator[torch.Tensor]:
        """The next `count` frames; estimate(pixels [n, 3, h, w]) -> [n, h, w] needs no later ones."""
        for part in parts(count, chunk):
            images = self.source.take(part.stop - part.start)
            maps = self.full(estimate(self.pixels(images)), images).float().cpu()
            self.done += len(maps)
            self.encoded = self.done
            self.tick()
            yield maps

    def photos(self) -> Iterator[torch.Tensor]:
        """Each frame for itself."""

        def estimate(pixels):
            if self.model.info.video:
                return self.network(pixels[:, None])[:, 0]
            if self.model.info.align_corners:
                return self.network(pixels)
            return _fit(self.model.info, *self.source.size, self.resolution).inside(self.network(pixels).depth)

        return self.alone(self.source.count, estimate, self.chunk)

    def stream(self, count: int) -> Iterator[torch.Tensor]:
        """A shot of a clip, frame by frame."""
        memory = [(StreamMemory(), StreamMemory()) for _ in self.network.head.motion_modules]
        return self.alone(count, lambda pixels: self.network.decode(self.network.encode(pixels), 1, memory=memory), chunk=1)

    def shot(self, count: int) -> Iterator[torch.Tensor]:
        """A shot of a clip by the published windows."""
        start = self.done
        waiting = {}  # frames whose maps are still to come, where upsampling needs them

        def full(low, first):
            return self.full(low, [waiting[i] for i in range(first, first + len(low))] if self.upsample else [])

        predictions = self.predictions(count, waiting)
        for maps in stitch(predictions, count, not self.model.info.metric, self.plain, full, self.chunk):
            for i in range(self.done - start, self.done - start + len(maps)):
                waiting.pop(i, None)
            self.done += len(maps)
            self.tick()
            yield maps.float().cpu()

    def predictions(self, count: int, waiting: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
        """[32, h, w] per window of a shot. Every frame goes through the ViT once: a window keeps its maps for the next one."""
        window, seen = [], -1
        for slots in windows(count):
            shared, fresh = OVERLAP if window else 0, slots[-1] - seen
            for level in window:
                level[:OVERLAP] = level[list(KEYFRAMES)]
            for part in parts(fresh, self.chunk):
                images = self.source.take(part.stop - part.start)
                if self.upsample:
                    waiting.update(enumerate(images, start=seen + 1 + part.start))
                maps = self.network.encode(self.pixels(images))
                window = window or [level.new_empty((WINDOW, *level.shape[1:])) for level in maps]
                for level, new in zip(window, maps, strict=True):
                    level[shared:][part] = new
                self.encoded += len(images)
                self.tick()
            seen = slots[-1]
            for level in window:
                level[shared + fresh :] = level[shared + fresh - 1]
            # Of the slots that show the last frame the first is enough; metric windows need no alignment by the first two.
            begin = 2 if shared and self.model.info.metric else 0
            end = slots.index(count - 1) + 1 if seen == count - 1 else WINDOW
            low = self.network.decode(window, WINDOW, wanted=slice(begin, end), chunk=self.chunk, tick=self.tick)
            yield torch.nn.functional.pad(low, (0, 0, 0, 0, begin, WINDOW - end))


def _fit(info: DepthModelInfo, height: int, width: int, resolution: int) -> unidepth.Fit:
    return unidepth.fit(height, width, info.config, pixels=unidepth.bounds(info.config, resolution))


def _network_size(info: DepthModelInfo, height: int, width: int, resolution: int) -> tuple[int, int]:
    if isinstance(info.config, unidepth.UniDepthConfig):
        return _fit(info, height, width, resolution).network
    return (video_network_size if info.video else network_size)(height, width, resolution)


def activation_bytes(
    info: DepthModelInfo,
    height: int,
    width: int,
    chunk: int,
    clip: bool,
    resolution: int = RESOLUTION,
    itemsize: int = 4,
) -> int:
    """Bytes that `depth_maps` needs on the model's device beside the weights, at most, for frames of height x width px.

    itemsize  of the dtype to compute in. All numbers are per patch of the network's input, counted in the code and checked by a test:

    - ViT, per frame: 14 times the width of a token (the MLP is the widest place), or the four taps while the head runs
    - head, per frame, float32: features/2 channels at full size beside the 32 of the last convolution or what they were resized from
    - a clip adds the kept maps of the window's 32 frames and their predictions, and needs four times the finest maps of the temporal
      modules, or those maps while the rest of the head runs
    """
    rows, columns = (side // info.config.vit.patch for side in _network_size(info, height, width, resolution))
    patches, area = rows * columns, info.config.vit.patch**2
    if isinstance(info.config, unidepth.UniDepthConfig):
        return unidepth.activation_bytes(info.config, patches, chunk, itemsize) + (2 * chunk + 12) * 4 * height * width
    token, features, channels = info.config.vit.width, info.config.head.features, info.config.head.out_channels
    vit = itemsize * 14 * token
    head = itemsize * (4 * token + 6 * features + sum(channels[:2])) + 4 * (features // 2 * area + max(34 * area, 32 * features))
    work = chunk * max(vit, head)
    if clip and info.video:
        temporal = WINDOW * itemsize * (16 * features + channels[2]) + 3 * itemsize * ELEMENTS_AT_ONCE // patches
        kept = itemsize * (sum(channels[:3]) + channels[3] // 2) + 3 * 4 * area
        work = max(work + WINDOW * itemsize * 4 * features, temporal) + WINDOW * kept
    return work * patches + (2 * chunk + 12) * 4 * height * width  # maps at full size, and room for a better upsampling
