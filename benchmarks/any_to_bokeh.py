"""Any-to-Bokeh: our schedule against the published one.

Published: every segment encodes its own frames, and the masked-out visual tokens go through the attention. Ours: every frame is encoded
once, no visual tokens, single-key attention as its constant. Operations are counted with the networks at full size; time is that of the
tests' tiny networks, and of the real ones where there is a GPU.
"""

import contextlib
import tempfile
from pathlib import Path

import torch

from bokeh_core.samplers.any_to_bokeh import checkpoint, fuser, sampler
from bokeh_core.samplers.any_to_bokeh.image_encoder import ImageEncoder
from bokeh_core.samplers.any_to_bokeh.network import AnyToBokehUNet, drop_unused
from bokeh_core.samplers.any_to_bokeh.preparation import PUBLISHED_SIZE
from bokeh_core.samplers.any_to_bokeh.vae import LatentEncoder, SkipDecoder
from bokeh_core.video import segments

from .measure import Counted, Pair, flops

VAE = {"channels": (128, 256, 512, 512), "layers": 2}
CLIP = {"hidden": 1280, "mlp": 5120, "layers": 32, "heads": 16, "patch": 14, "size": 224, "projection": 1024}
UNET = {"num_attention_heads": (5, 10, 20, 20)}


def model_on(device: str, dtype: torch.dtype, whole: bool) -> sampler.AnyToBokeh:
    """The full-size networks without weights (meta) or with random ones; whole: with all of the UNet's layers."""
    with torch.device(device):
        unet = AnyToBokehUNet(**UNET)
        parts = [unet if whole else drop_unused(unet), LatentEncoder(**VAE), SkipDecoder(**VAE), ImageEncoder(**CLIP)]
    dtypes = [dtype, torch.float32, dtype, dtype]
    return sampler.AnyToBokeh(
        *(
            checkpoint.Network(part.to(kind).eval().requires_grad_(False), torch.device(device), kind)
            for part, kind in zip(parts, dtypes, strict=True)
        )
    )


def frames_on(device: str, count: int, size: tuple[int, int]) -> list[sampler.Frame]:
    return [sampler.Frame(torch.zeros(3, *size, device=device), torch.zeros(*size, device=device), 16.0) for _ in range(count)]


@contextlib.contextmanager
def all_tokens_ask():
    """As released, the visual tokens are queries too, and their answers are thrown away; ours asks for the picture's tokens only."""
    only_needed = fuser.attend

    def released(attention, x, keys=None, mask=None):
        return only_needed(attention, x if keys is None else keys, None, mask)[:, : x.shape[1]]

    fuser.attend = released
    try:
        yield
    finally:
        fuser.attend = only_needed


def count_flops(frames: int) -> dict:
    """TFLOP per output frame of a clip at 1024 x 576: what a frame, a segment and a window cost, times how often the schedules do them."""

    def cost(work):
        results = []
        return flops(lambda: results.append(work())), results[0]

    ours, published = (model_on("meta", torch.float16, whole) for whole in (False, True))
    (frame,) = frames_on("meta", 1, PUBLISHED_SIZE)
    encode, item = cost(lambda: ours.encode(frame))
    segment, (latents,) = cost(lambda: ours.denoise(0, [[item] * 8]))
    with all_tokens_ask():
        segment_released, _ = cost(lambda: published.denoise(0, [[item] * 8], masked_out=True))
    window, _ = cost(lambda: ours.decode(segments.Window([item] * 8, latents, slice(0, 8)), 8))
    note = f"encoders {encode:.2f} per frame, UNet {segment / 8:.2f} (released {segment_released / 8:.2f}), decoder {window / 8:.2f}"
    count, windows = segments.segment_count(frames), len(segments.decode_windows(frames))
    encoded_by_all = int((segments.segment_frames(frames) >= 0).sum())
    return {
        "ours": (frames * encode + count * segment + windows * window) / frames,
        "published": (encoded_by_all * encode + count * segment_released + windows * window) / frames,
        "note": note,
    }


def measure(quick, device):
    from tests.stand_ins import any_to_bokeh as stand_in

    counted = count_flops(100)
    yield Counted("a frame at 1024 x 576, clip of 100", counted["ours"], counted["published"], "published schedule", 1.35, counted["note"])
    frames = 9 if quick else 25
    with tempfile.TemporaryDirectory() as folder:
        release = stand_in.write(Path(folder) / "release")
        ours = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(release)))
        published = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(release, visual=True)))
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.rand(*shape, generator=generator) * 2 - 1

    clip = [sampler.Frame(noise(3, 64, 64), noise(64, 64), float(1 + i % 32)) for i in range(frames)]

    def whole():
        with all_tokens_ask():
            return sampler.whole_shot(published, clip, visual_tokens=True)

    def streamed():
        return torch.cat([piece.frames for piece in sampler.stream_shot(ours, clip, frames)])

    yield Pair(f"tiny networks, {frames} frames of 64 x 64", streamed, whole, "published schedule", rounds=1)
    if device == "cuda":
        model, clip_there = model_on("cuda", torch.float16, False), frames_on("cuda", 9 if quick else 33, PUBLISHED_SIZE)

        def real():
            list(sampler.stream_shot(model, clip_there, len(clip_there)))

        yield Pair(f"{len(clip_there)} frames of 1024 x 576, fp16", real, rounds=1)
