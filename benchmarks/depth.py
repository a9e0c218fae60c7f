"""Our Depth Anything V2 against the transformers library's, and cached windows of Video Depth Anything, as ratios measured in one run.

    python benchmarks/depth.py [--size 518] [--repeat 3] [--threads 1] [--json FILE]

Depth Anything V2 ViT-S, random weights, one square picture, float32, CPU: the same weights in both networks, which take turns; the
least time counts. Memory: growth of the resident peak of a fresh process that holds nothing but one network and its input.
Video Depth Anything ViT-S, 76 frames of 140 x 196 px: the published scheme (every window whole through the network) against ours
(every frame through the ViT once, the end of the head only for frames that are used). Prints Markdown, then JSON. Needs transformers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bokeh_core.depth.checkpoint import DepthModel, DepthModelInfo, build, recognise
from bokeh_core.depth.depth_anything import DepthAnything, DepthAnythingConfig
from bokeh_core.depth.dpt import DPTConfig
from bokeh_core.depth.estimate import depth_maps
from bokeh_core.depth.video_depth_anything import VideoDepthAnything, VideoDepthAnythingConfig, windows
from bokeh_core.depth.vit import ViTConfig

VIT = ViTConfig(width=384, depth=12, heads=6, taps=(2, 5, 8, 11))
HEAD = DPTConfig(width=384, features=64, out_channels=(48, 96, 192, 384))
FRAMES, CLIP = 76, (140, 196)


def random_weights(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5 + 0.1 * noise)
    return network.eval().requires_grad_(False)


def theirs():
    from transformers import DepthAnythingConfig as Config
    from transformers import DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=VIT.width,
        num_hidden_layers=VIT.depth,
        num_attention_heads=VIT.heads,
        image_size=518,
        patch_size=14,
        out_indices=[tap + 1 for tap in VIT.taps],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = Config(
        backbone_config=backbone,
        reassemble_hidden_size=HEAD.width,
        neck_hidden_sizes=list(HEAD.out_channels),
        fusion_hidden_size=HEAD.features,
        patch_size=14,
    )
    return DepthAnythingForDepthEstimation(config)


def pixels(size):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def photo(size, repeat):
    other = random_weights(theirs())
    info, tensors = recognise(other.state_dict(), "model.safetensors")
    ours, x = build(info, tensors), pixels(size)
    times = {"ours": [], "transformers": []}
    with torch.no_grad():
        a, b = ours(x), other(x).predicted_depth
        for _ in range(repeat):
            for name, network in (("ours", ours), ("transformers", other)):
                start = time.perf_counter()
                network(x)
                times[name].append(time.perf_counter() - start)
    return {
        "seconds": {name: min(t) for name, t in times.items()},
        "difference": float((a - b).abs().max() / b.abs().max()),
        "attention": other.config.backbone_config._attn_implementation,
    }


def memory(size, which):
    network = random_weights(DepthAnything(DepthAnythingConfig(VIT, HEAD)) if which == "ours" else theirs())
    x = pixels(size)
    with torch.no_grad():
        network(x[..., :140, :140])  # code and workspaces are loaded
        before = _peak_reset()
        network(x)
    return (_peak() - before) / 2**20


def video():
    network = random_weights(VideoDepthAnything(VideoDepthAnythingConfig(VIT, HEAD)))
    info = DepthModelInfo("Video Depth Anything", "S", True, False, None, "a benchmark", network.config)
    model = DepthModel(network, info, torch.device("cpu"), torch.float32)
    frames = [torch.rand(3, *CLIP, generator=torch.Generator().manual_seed(i)) for i in range(FRAMES)]
    encoded = []
    network.pretrained.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    times, counts = {}, {}
    with torch.no_grad():
        for name in ("ours", "published"):
            encoded.clear()
            start = time.perf_counter()
            if name == "ours":
                for _ in depth_maps(model, frames, FRAMES, clip=True, resolution=CLIP[0]):
                    pass
            else:
                for slots in windows(FRAMES):
                    network(torch.stack([frames[i] for i in slots])[None])
            times[name], counts[name] = time.perf_counter() - start, sum(encoded)
    return {"seconds": times, "frames_through_the_vit": counts}


def _peak_reset():
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew from what is resident now
    return _peak()


def _peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def child(threads, what, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if what == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc would keep freed blocks, and hide the peak
    command = [sys.executable, __file__, "--child", what, *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+")
    options = parser.parse_args()
    if options.child:
        what, *rest = options.child
        work = {"photo": photo, "memory": memory, "video": video}[what]
        print(json.dumps(work(*(int(argument) if argument.isdigit() else argument for argument in rest))))
        return
    size, threads = options.size, options.threads
    load = os.getloadavg()[0]
    result = {"size": size, "threads": threads, "torch": torch.__version__, "load_before": load}
    result["photo"] = child(threads, "photo", size, options.repeat)
    result["memory_mib"] = {which: child(threads, "memory", size, which) for which in ("ours", "transformers")}
    result["video"] = child(threads, "video")
    result["load_after"] = os.getloadavg()[0]

    seconds, mib, clip = result["photo"]["seconds"], result["memory_mib"], result["video"]
    print(f"torch {result['torch']}, {threads} threads, load {load:.1f} before, {result['load_after']:.1f} after\n")
    print(f"| ViT-S, {size}² | ours | transformers | theirs / ours |\n|---|---|---|---|")
    print(f"| seconds | {seconds['ours']:.2f} | {seconds['transformers']:.2f} | **{seconds['transformers'] / seconds['ours']:.2f}x** |")
    print(f"| working memory, MiB | {mib['ours']:.0f} | {mib['transformers']:.0f} | **{mib['transformers'] / mib['ours']:.2f}x** |")
    print(f"| largest difference | {result['photo']['difference']:.1e} of the largest depth | | |\n")
    print(f"| Video Depth Anything S, {FRAMES} frames | ours | published | published / ours |\n|---|---|---|---|")
    for words, key in (("seconds", "seconds"), ("frames through the ViT", "frames_through_the_vit")):
        ours, published = clip[key]["ours"], clip[key]["published"]
        print(f"| {words} | {ours:.4g} | {published:.4g} | **{published / ours:.2f}x** |")
    print("\n" + json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
