"""Any-to-Bokeh: our schedule against the published one, in one run.

    python -m benchmarks.any_to_bokeh          FLOPs per frame at full size, counted; exactness, time and memory at tiny size
    python -m benchmarks.any_to_bokeh --gpu    also frames per second and peak memory at 1024 x 576, full width, fp16, random weights

Counted on the meta device, a multiply-add as 2. Published: every segment encodes its own frames, and the masked-out visual tokens go
through the attention. Ours: every frame is encoded once, no visual tokens, single-key attention as its constant.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bokeh_core.samplers.any_to_bokeh import checkpoint, fuser, sampler
from bokeh_core.samplers.any_to_bokeh.image_encoder import ImageEncoder
from bokeh_core.samplers.any_to_bokeh.network import AnyToBokehUNet, drop_unused
from bokeh_core.samplers.any_to_bokeh.preparation import PUBLISHED_SIZE
from bokeh_core.samplers.any_to_bokeh.vae import LatentEncoder, SkipDecoder
from bokeh_core.video import segments

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


def count_flops(frames: int) -> dict[str, float]:
    """TFLOP per output frame of a clip at 1024 x 576: what a frame, a segment and a window cost, times how often the schedules do them."""

    def cost(work):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            result = work()
        return counter.get_total_flops() / 1e12, result

    ours, published = (model_on("meta", torch.float16, whole) for whole in (False, True))
    (frame,) = frames_on("meta", 1, PUBLISHED_SIZE)
    encode, item = cost(lambda: ours.encode(frame))
    segment, (latents,) = cost(lambda: ours.denoise(0, [[item] * 8]))
    with all_tokens_ask():
        segment_released, _ = cost(lambda: published.denoise(0, [[item] * 8], masked_out=True))
    window, _ = cost(lambda: ours.decode(segments.Window([item] * 8, latents, slice(0, 8)), 8))
    print(f"TFLOP: encoders {encode:.2f} per frame, UNet {segment / 8:.2f} (released {segment_released / 8:.2f}), decoder {window / 8:.2f}")
    count, windows = segments.segment_count(frames), len(segments.decode_windows(frames))
    encoded_by_all = int((segments.segment_frames(frames) >= 0).sum())
    return {
        "ours": (frames * encode + count * segment + windows * window) / frames,
        "published": (encoded_by_all * encode + count * segment_released + windows * window) / frames,
    }


def tiny(frames: int) -> None:
    """Exactness and time on the CPU with the stand-in's widths."""
    from tests.stand_ins import any_to_bokeh as stand_in

    with tempfile.TemporaryDirectory() as folder:
        release = stand_in.write(Path(folder) / "release")
        ours = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(release)))
        published = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(release, visual=True)))
    generator = torch.Generator().manual_seed(0)
    clip = [
        sampler.Frame(
            torch.rand(3, 64, 64, generator=generator) * 2 - 1, torch.rand(64, 64, generator=generator) * 2 - 1, float(1 + i % 32)
        )
        for i in range(frames)
    ]
    with torch.no_grad():
        list(sampler.stream_shot(ours, clip[:9], 9))  # warm up
        start = time.perf_counter()
        streamed = torch.cat([piece.frames for piece in sampler.stream_shot(ours, clip, frames)])
        middle = time.perf_counter()
        with all_tokens_ask():
            whole = sampler.whole_shot(published, clip, visual_tokens=True)
        end = time.perf_counter()
    print(f"tiny, {frames} frames of 64 x 64 on the CPU: largest difference {float((streamed - whole).abs().max()):.1e}")
    print(f"  time: ours {middle - start:.2f} s, published {end - middle:.2f} s, {(end - middle) / (middle - start):.2f} x faster")


def peak(frames: int) -> float:
    """MB at most, of a run of its own over a clip that exists one frame at a time."""
    command = [sys.executable, "-m", "benchmarks.any_to_bokeh", "--peak", str(frames)]
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=exact).stdout)


def run_for_peak(frames: int) -> None:
    from tests.stand_ins import any_to_bokeh as stand_in

    with tempfile.TemporaryDirectory() as folder:
        model = sampler.AnyToBokeh(**checkpoint.load(checkpoint.read_files(stand_in.write(Path(folder) / "release"))))
    clip = (sampler.Frame(torch.rand(3, 32, 32) * 2 - 1, torch.rand(32, 32), 9.0) for _ in range(frames))
    with torch.no_grad():
        done = sum(len(piece.frames) for piece in sampler.stream_shot(model, clip, frames))
    assert done == frames
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def on_gpu(frames: int) -> None:
    model, clip = model_on("cuda", torch.float16, False), frames_on("cuda", frames, PUBLISHED_SIZE)
    with torch.no_grad():
        list(sampler.stream_shot(model, clip[:9], 9))  # warm up
        for chunk in (8, 4, 2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            list(sampler.stream_shot(model, clip, frames, shrinking=lambda work, size, chunk=chunk: work(chunk)))
            torch.cuda.synchronize()
            seconds, memory = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30
            print(f"{torch.cuda.get_device_name()}, 1024 x 576, fp16, {chunk} frames decoded together: ", end="")
            print(f"{frames / seconds:.2f} frames per second, peak {memory:.1f} GiB with the weights")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        run_for_peak(args.peak)
        return
    counted = count_flops(args.frames)
    print(f"1024 x 576, {args.frames} frames: published {counted['published']:.2f} TFLOP per frame, ours {counted['ours']:.2f}, ", end="")
    print(f"{counted['published'] / counted['ours']:.2f} x fewer")
    tiny(25)
    few, many = peak(50), peak(1000)
    print(f"memory at most: 50 frames {few:.0f} MB, 1000 frames {many:.0f} MB, {many / few:.3f} x")
    if args.gpu:
        on_gpu(33)


if __name__ == "__main__":
    main()
