"""DSFA: the focus step for the reference alone against all frames, memory of a whole model; and the quality of depth from a sweep.

    python benchmarks/dsfa.py [--patches 342] [--frames 3] [--repeat 5] [--threads 1] [--size 256] [--json FILE]

The block: full width (1024), 8 heads, random weights, float32, CPU; both forms take turns, the least time counts. Memory: full-size
UniDepthV2 with DSFA on the meta device, at the most pixels it takes (600 000), every tensor counted while it is alive. The sweep:
ray-traced scenes of `bokeh_core.synthesis` (8-bit pictures, three frames), error of the offset in shares of the depth range, by the
strongest blur and by texture (contrast of the surfaces). Prints Markdown, then JSON.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from bokeh_core.depth import refine, sweep
from bokeh_core.depth.checkpoint import DepthModel, DepthModelInfo
from bokeh_core.depth.dsfa import DSFABlock, DSFAConfig
from bokeh_core.depth.unidepth import UniDepth, UniDepthConfig
from bokeh_core.depth.vit import ViTConfig
from bokeh_core.optics.stack import STACK_WIDTH, BokehStack
from bokeh_core.render.light import to_display
from bokeh_core.render.rays import trace
from bokeh_core.render.scene import Scene
from bokeh_core.synthesis.scenes import flatten, make_scene
from tests.live_bytes import LiveBytes

SCENES = (("plane", 0.95), ("ground", 0.95), ("portrait", 0.95), ("three", 0.95), ("portrait", 0.8))
BLUR = (4, 8, 16, 32, 48)  # px at 512, of the whole depth range in the strongest frame
CONTRAST = (1.0, 0.3, 0.1, 0.03)


def block(patches: int, frames: int, repeat: int) -> dict:
    torch.manual_seed(0)
    made = DSFABlock(1024, DSFAConfig((0,), squared_space_scale=True)).requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.startswith("gamma"):
            parameter.fill_(0.1)
    reference, stack, k = torch.randn(1, patches, 1024), torch.randn(1, frames, patches, 1024), torch.ones(1, frames)
    forms = {"all frames": lambda: made.dense(reference, stack, k)[:, 0], "reference only": lambda: made(reference, stack, k)}
    seconds = dict.fromkeys(forms, float("inf"))
    for _ in range(repeat + 1):  # the first round warms up, and counts only if it is the quickest
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    difference = float((forms["all frames"]() - forms["reference only"]()).abs().max())
    return {"seconds": seconds, "ratio": seconds["all frames"] / seconds["reference only"], "difference": difference}


def memory(frames: int) -> dict:
    """MiB of features and at the peak, of a picture of 600 000 px."""
    vit = ViTConfig(1024, 24, 16, (5, 11, 17, 23), final_norm_eps=1e-5, position_offset=None, unused_registers=1)
    config = UniDepthConfig(vit, DSFAConfig((0, 1, 2, 3), squared_space_scale=True))
    with torch.device("meta"):
        network = UniDepth(config)
    info = DepthModelInfo("UniDepth V2 + DSFA", "L", False, True, None, "", config)
    model = DepthModel(network, info, torch.device("meta"), torch.float32)
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **more: torch.empty_like(q)  # on meta it would be counted unfused
    try:
        pictures = torch.empty(frames + 1, 3, 672, 896, device="meta")
        with torch.no_grad(), LiveBytes(network.state_dict().values()) as live:
            features = refine.encode(model, pictures[0], pictures[1:])
            refine.decode(model, features, torch.ones(frames, device="meta"))
    finally:
        F.scaled_dot_product_attention = attention
    kept = sum(x.nbytes for x in (*features.taps, *features.stack.values()))
    return {"network px": list(features.network), "features MiB": kept / 2**20, "peak MiB": live.peak / 2**20}


def flatter(scene: Scene, contrast: float) -> Scene:
    """The scene with less texture: colours drawn towards the mean of their surface."""
    layers = []
    for layer in scene.layers:
        mean = layer.color.mean((1, 2), keepdim=True)
        layers.append(replace(layer, color=mean + contrast * (layer.color - mean)))
    return Scene(tuple(layers))


def quality(kind: str, focus: float, blur: float, contrast: float, size: int, rays: int = 128) -> dict:
    scene = flatter(make_scene(kind, 3, size), contrast)
    light, disparity = flatten(scene)
    k = [blur * size / STACK_WIDTH * share for share in (1 / 3, 2 / 3, 1)]
    pictures = torch.stack([light, *(trace(scene, one, focus, rays=rays) for one in k)])
    pictures = (to_display(pictures.clamp(0, 1)) * 255).round() / 255
    stack = BokehStack(pictures[0], pictures[1:], [one * STACK_WIDTH / size for one in k])
    side = "behind" if focus > float(disparity.max()) else "from depth"
    found = sweep.depth_from_sweep(stack, side=side, depth=disparity)
    inner = (slice(size // 16, -size // 16),) * 2
    off, confidence = (found.offset - (disparity - focus).abs()).abs()[inner], found.confidence[inner]
    surer = off[confidence >= confidence.median()]
    sign = ((found.disparity.sign() == (disparity - focus).sign()) | ((disparity - focus).abs() < 0.05))[inner]
    return {
        "median": float(off.median()),
        "mean": float(off.mean()),
        "surer half, mean": float(surer.mean()),
        "sure": float((confidence > 0.5).float().mean()),
        "right side": float(sign.float().mean()),
    }


def mean_of(results: list[dict]) -> dict:
    return {name: sum(one[name] for one in results) / len(results) for name in results[0]}


def table(title: str, rows: dict) -> None:
    print(f"| {title} | median | mean | surer half, mean | share with confidence > 0.5 | right side |\n|---|---|---|---|---|---|")
    for name, r in rows.items():
        errors = " | ".join(f"{100 * r[one]:.1f} %" for one in ("median", "mean", "surer half, mean", "sure", "right side"))
        print(f"| {name} | {errors} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=342)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"block": block(args.patches, args.frames, args.repeat), "memory": memory(args.frames)}
    b, m = results["block"], results["memory"]
    print(f"DSFA block, {args.patches} patches, {args.frames + 1} frames, {args.threads} thread(s):")
    print(
        f"all frames {b['seconds']['all frames']:.3f} s, reference only {b['seconds']['reference only']:.3f} s: {b['ratio']:.2f}x;", end=" "
    )
    print(f"difference {b['difference']:.1e}")
    print(f"UniDepthV2 with DSFA, {args.frames} frames of {m['network px'][1]}x{m['network px'][0]} px, float32: ", end="")
    print(f"kept features {m['features MiB']:.0f} MiB, peak {m['peak MiB']:.0f} MiB beside the weights\n")
    blur = {f"{px} px": mean_of([quality(kind, focus, px, 1.0, args.size) for kind, focus in SCENES]) for px in BLUR}
    table("strongest blur at 512 px", blur)
    texture = {f"{share:g}": mean_of([quality(kind, focus, 32, share, args.size) for kind, focus in SCENES]) for share in CONTRAST}
    table("contrast of the texture", texture)
    results |= {"blur": blur, "texture": texture}
    text = json.dumps(results, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
