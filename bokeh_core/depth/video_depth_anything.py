"""Video Depth Anything: a clip to steady depth maps (bokehdepth_stage2 SPEC section 8).

`VideoDepthAnything` is the network on one window of frames. `windows` and `stitch` are the published scheme for clips of any length;
`StreamMemory` is what its authors' experimental one-frame-at-a-time variant keeps.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoints.loading import cast
from .dpt import DPTConfig, DPTHead
from .vit import ViT, ViTConfig

WINDOW = 32  # slots the network sees together
OVERLAP = 10  # slots of a window that repeat frames of the one before
STEP = WINDOW - OVERLAP
KEYFRAMES = (0, 12, 24, 25, 26, 27, 28, 29, 30, 31)  # slots of a window that become the first slots of the next
BLENDED = 8  # of them, the last that many frames are blended; the first two serve for alignment
HEADS = 8  # of the temporal attention
ELEMENTS_AT_ONCE = 2**25  # of the widest intermediate of a temporal module; more only costs memory


@dataclass(frozen=True)
class VideoDepthAnythingConfig:
    """frames: length of the temporal position tables, the most frames a window can have."""

    vit: ViTConfig
    head: DPTConfig
    frames: int = WINDOW


class VideoDepthAnything(nn.Module):
    """Depth Anything V2 with four temporal modules in its head. Output: inverse depth (near = large), or metres of a metric file."""

    def __init__(self, config: VideoDepthAnythingConfig, ops=nn):
        super().__init__()
        self.config = config
        self.pretrained = ViT(config.vit, ops)
        self.head = VideoHead(config, ops)

    def forward(
        self,
        clip: torch.Tensor,  # [B, T, 3, H, W] normalised, H and W multiples of 14, T at most config.frames
    ) -> torch.Tensor:
        """[B, T, H, W] float32."""
        depth = self.decode(self.encode(clip.flatten(0, 1)), frames=clip.shape[1])
        return depth.unflatten(0, clip.shape[:2])

    def encode(
        self,
        pixels: torch.Tensor,  # [N, 3, H, W]
    ) -> list[torch.Tensor]:
        """All that the head needs of each frame for itself: four maps [N, channels, h, w], the coarsest half as large.

        Half the size of the taps they are made of, so a window of them is cheap to keep.
        """
        rows = pixels.shape[-2] // self.config.vit.patch
        maps = [self.head.project(tap, i, rows) for i, tap in enumerate(self.pretrained(pixels))]
        maps[3] = self.head.resize_layers[3](maps[3])
        return maps

    def decode(
        self,
        maps: list[torch.Tensor],  # as `encode` makes them; B windows of T frames, [B T, ...]
        frames: int,  # T
        *,
        wanted: slice = slice(None),  # of the B T frames; the others are only looked at
        chunk: int = 4,  # frames in the tail of the head at once
        tick: Callable[[], None] = lambda: None,  # called between the parts of the work
        memory: "list[tuple[StreamMemory, StreamMemory]] | None" = None,  # of the streaming variant, one pair per temporal module
    ) -> torch.Tensor:
        """[wanted, H, W] float32."""
        patch = self.config.vit.patch
        size = (maps[0].shape[-2] * patch, maps[0].shape[-1] * patch)
        path = self.head.fuse(maps[2], maps[3], frames, chunk, tick, memory)[wanted]
        fine, middle = maps[0][wanted], maps[1][wanted]
        depth = torch.empty((len(path), *size), device=path.device, dtype=torch.float32)
        for part in parts(len(path), chunk):
            depth[part] = F.relu(self.head.finish(path[part], (fine[part], middle[part]), size))
            tick()
        return depth


class VideoHead(DPTHead):
    """The DPT head with temporal modules on the two coarsest levels and on the first two fusions."""

    def __init__(self, config: VideoDepthAnythingConfig, ops):
        super().__init__(config.head, ops)
        channels = (*config.head.out_channels[2:], config.head.features, config.head.features)
        self.motion_modules = nn.ModuleList(TemporalModule(c, config.frames, ops) for c in channels)

    def fuse(self, third, fourth, frames, chunk, tick, memory) -> torch.Tensor:
        """[B T, features, 2 h, 2 w] of the projected maps of the levels 2 [B T, c, h, w] and 3 [B T, c, h/2, w/2]."""
        rows, columns = third.shape[-2:]

        def over_time(i, x):
            x = self.motion_modules[i](x, frames, memory and memory[i])
            tick()
            return x

        def frame_by_frame(step, *maps):
            return torch.cat([step(*(x[part] for x in maps)) for part in parts(len(third), chunk)])

        third, fourth = over_time(0, third), over_time(1, fourth)
        path = frame_by_frame(lambda x: self.scratch.refinenet4(self.level(x, 3), size=(rows, columns)), fourth)
        path = over_time(2, path)
        path = frame_by_frame(lambda x, y: self.scratch.refinenet3(x, self.level(y, 2), size=(2 * rows, 2 * columns)), path, third)
        return over_time(3, path)


class TemporalModule(nn.Module):
    """Attention along time at every position of a map, added to the map."""

    def __init__(self, channels: int, frames: int, ops=nn):
        super().__init__()
        self.temporal_transformer = t = nn.Module()
        t.norm = ops.GroupNorm(32, channels, eps=1e-6)
        t.proj_in = ops.Linear(channels, channels)
        t.transformer_blocks = nn.ModuleList([TemporalBlock(channels, frames, ops)])
        t.proj_out = ops.Linear(channels, channels)

    def forward(
        self,
        x: torch.Tensor,  # [B T, C, h, w]
        frames: int,  # T
        memory: "tuple[StreamMemory, StreamMemory] | None" = None,  # then T = 1
    ) -> torch.Tensor:
        """[B T, C, h, w]."""
        from einops import rearrange

        t = self.temporal_transformer
        tokens = rearrange(t.norm(x), "(b t) c h w -> (b h w) t c", t=frames).contiguous()
        # Positions do not see each other from here on; a memory wants all of them together.
        step = len(tokens) if memory else max(1, ELEMENTS_AT_ONCE // (frames * 8 * x.shape[1]))
        for part in parts(len(tokens), step):
            tokens[part] = t.proj_out(t.transformer_blocks[0](t.proj_in(tokens[part]), memory))
        return x + rearrange(tokens, "(b h w) t c -> (b t) c h w", h=x.shape[2], w=x.shape[3])


class TemporalBlock(nn.Module):
    """Twice x += attention(norm x), then x += feed_forward(norm x), on [positions, T, C]."""

    def __init__(self, channels: int, frames: int, ops):
        super().__init__()
        self.attention_blocks = nn.ModuleList(TemporalAttention(channels, frames, ops) for _ in range(2))
        self.norms = nn.ModuleList(ops.LayerNorm(channels, eps=1e-5) for _ in range(2))
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([GEGLU(channels, 4 * channels, ops), nn.Identity(), ops.Linear(4 * channels, channels)])
        self.ff_norm = ops.LayerNorm(channels, eps=1e-5)

    def forward(self, x, memory=None):
        for i, (attention, norm) in enumerate(zip(self.attention_blocks, self.norms, strict=True)):
            x = x + attention(norm(x), memory and memory[i])
        return x + self.ff.net[2](self.ff.net[0](self.ff_norm(x)))


class TemporalAttention(nn.Module):
    """Every frame sees all frames of the window. The position table is added to queries, keys and values alike."""

    def __init__(self, channels: int, frames: int, ops):
        super().__init__()
        self.to_q = ops.Linear(channels, channels, bias=False)
        self.to_k = ops.Linear(channels, channels, bias=False)
        self.to_v = ops.Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([ops.Linear(channels, channels)])
        self.pos_encoder = nn.Module()
        self.pos_encoder.register_buffer("pe", sinusoids(frames, channels))

    def forward(self, x, memory=None):
        """[positions, T, C]; with a memory T = 1, and the frame stands after those remembered."""
        from einops import rearrange

        earlier = memory.recall() if memory else []
        if memory:
            memory.add(x[:, 0])
        seen = torch.cat([torch.stack(earlier, dim=1), x], dim=1) if earlier else x
        seen = seen + cast(self.pos_encoder.pe, x)[:, : seen.shape[1]]
        q, k, v = (
            rearrange(y, "p t (heads d) -> p heads t d", heads=HEADS)
            for y in (self.to_q(seen[:, len(earlier) :]), self.to_k(seen), self.to_v(seen))
        )
        return self.to_out[0](rearrange(F.scaled_dot_product_attention(q, k, v), "p heads t d -> p t (heads d)"))


class GEGLU(nn.Module):
    """value * gelu(gate), both from one layer."""

    def __init__(self, channels: int, inner: int, ops):
        super().__init__()
        self.proj = ops.Linear(channels, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class StreamMemory:
    """What one temporal attention remembers of earlier frames when frames come one at a time (section 8.3)."""

    def __init__(self):
        self.entries = []
        self.frames = 0

    def recall(self) -> list:
        """The 31 entries that the next frame attends to; none for the first frame."""
        return self.entries[:2] + self.entries[-29:]

    def add(self, entry) -> None:
        """Remember a frame: the normed input of the attention [positions, C]."""
        if not self.entries:
            self.entries = [entry] * WINDOW
        else:
            self.entries.append(entry)
        if self.frames > 10:
            del self.entries[1]
        self.frames += 1


def sinusoids(frames: int, channels: int) -> torch.Tensor:
    """[1, frames, channels] sine on even channels, cosine on odd ones, wavelengths from 2 pi to 10000 times that."""
    angle = torch.arange(frames)[:, None] * torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[None]


def windows(count: int) -> Iterator[list[int]]:
    """Which frame each of the 32 slots of each window shows, for a clip of `count` frames. The last frame fills what is left over."""
    slots: list[int] = []
    for start in range(0, count, STEP):
        slots = [slots[k] for k in KEYFRAMES] if slots else []
        slots += [min(start + s, count - 1) for s in range(len(slots), WINDOW)]
        yield slots


def scale_and_shift(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[float, float]:
    """The (a, b) for which a prediction + b is nearest to the target in the least squares sense; (1, 0) for a flat prediction.

    All of one shape; mask are weights >= 0. Centred sums in float64 on the CPU: float32 sums of squares lose flat maps far from zero
    (section 12.11), and not every device has float64.
    """
    x, y = prediction.to("cpu", torch.float64).flatten(), target.to("cpu", torch.float64).flatten()
    weight = torch.ones_like(x) if mask is None else mask.to("cpu", torch.float64).flatten()
    total = weight.sum().clamp_min(1e-300)
    x_mean, y_mean = (weight * x).sum() / total, (weight * y).sum() / total
    x = x - x_mean
    spread = (weight * x * x).sum()
    if spread <= 1e-20 * total * x_mean.square():
        return 1.0, 0.0
    scale = (weight * x * (y - y_mean)).sum() / spread
    return float(scale), float(y_mean - scale * x_mean)


def stitch(
    predictions: Iterable[torch.Tensor],  # per window [32, h, w], as `windows` lays them out
    count: int,  # frames of the clip
    align: bool,  # False for metric models: their windows need no scale and shift
    plain: Callable[[torch.Tensor], torch.Tensor],  # [n, h, w] -> [n, H, W]
    full: Callable[[torch.Tensor, int], torch.Tensor],  # the same for the frames from that number on, perhaps better
    chunk: int = 4,  # maps at a time
) -> Iterator[torch.Tensor]:
    """The depth of the clip in order, [n, H, W] at a time: windows aligned to the first one, overlaps blended.

    Only small maps of two windows are kept; full ones are made as they leave. Alignment is at full size, as published.
    """

    def aligned(maps: torch.Tensor, first: int, scale: float, shift: float) -> torch.Tensor:
        return (full(maps, first) * scale + shift).clamp_min(0)

    last, kept = (count - 1) // STEP, WINDOW - BLENDED
    beginning = before = before_fit = None
    for number, low in enumerate(predictions):
        start, fit = number * STEP, (1.0, 0.0)
        if number == 0:
            beginning = low[:1].clone()
        elif align:
            keyframe = plain(before[KEYFRAMES[1]][None]) * before_fit[0] + before_fit[1]
            fit = scale_and_shift(plain(low[:2]), torch.cat([plain(beginning), keyframe]).clamp_min(0))
        if number > 0:  # the slots before OVERLAP, except the two for alignment, show the last BLENDED frames of the window before
            for part in parts(min(BLENDED, count - start - OVERLAP + BLENDED), chunk):
                frame = start + OVERLAP - BLENDED + part.start
                new = aligned(low[OVERLAP - BLENDED : OVERLAP][part], frame, *fit)
                old = aligned(before[kept:][part], frame, *before_fit)
                weight = torch.arange(part.start, part.stop, device=new.device) / (BLENDED - 1)
                yield torch.lerp(old, new, weight[:, None, None])
        begin = OVERLAP if number else 0
        for part in parts(min(WINDOW if number == last else kept, count - start) - begin, chunk):
            yield aligned(low[begin:][part], start + begin + part.start, *fit)
        before, before_fit = low, fit


def parts(count: int, size: int) -> Iterator[slice]:
    """0..count in slices of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
