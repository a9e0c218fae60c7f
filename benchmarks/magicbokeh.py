"""What MagicBokeh costs, measured in one run: attention by regions against its definition, and the modes against each other.

    python benchmarks/magicbokeh.py [--threads 1 2] [--share 0.5] [--json FILE]

- attention: at the real size of the UNet's finest level (4096 tokens of 320, 5 heads, bokeh LoRA of rank 128), random weights: the masked
  attention alone, by regions and by its dense definition; and the whole layer, as users run it and with all scores of both branches
  formed, as released. Wall time, best of three. Memory: growth of the resident peak of a fresh process
- work: multiply-adds counted as 2, on the meta device, networks at full size: one patch, and a whole photo of 1562 x 1024 in both modes
- difference: a photo of 700 x 600 through both modes with the tiny random networks of the tests. These turn small differences into large
  ones: the number shows that the modes differ, not how much they differ with the real weights

Prints Markdown, then JSON.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bokeh_core.samplers.magicbokeh import sampler
from bokeh_core.samplers.magicbokeh.focus_aware_attention import FocusAwareAttention, dense_masked_attention, part, split_masked_attention
from bokeh_core.samplers.magicbokeh.network import LATENT_CELL, ControlNet, Decoder, Encoder, PrunedUNet, focus_regions, pruned_unet
from bokeh_core.samplers.magicbokeh.patches import PATCH, grid, tiles

TOKENS, CHANNELS, HEADS, RANK = 4096, 320, 5, 128
UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 64,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def layer_case(share):
    """(layer, x [1, N, C], mask [1, N])."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = FocusAwareAttention(Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS), RANK).eval()
    return layer, torch.randn(1, TOKENS, CHANNELS), (torch.arange(TOKENS)[None] < share * TOKENS).float()


def dense(layer, x, mask):
    """The layer with all scores formed."""

    def heads(tokens):
        return tokens.unflatten(2, (HEADS, -1)).transpose(1, 2)

    def merged(tokens):
        return tokens.transpose(1, 2).flatten(2)

    lora = layer.processor
    plain = layer.to_q(x), layer.to_k(x), layer.to_v(x)
    changed = [t + layer.scale * d(x) for t, d in zip(plain, (lora.to_q_lora, lora.to_k_lora, lora.to_v_lora), strict=True)]
    q, k, v = map(heads, plain)
    everywhere = merged(((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v)
    within = merged(dense_masked_attention(*map(heads, changed), mask))
    return layer.to_out[0](everywhere) + layer.scale * lora.to_out_lora(within)


def attention(how, share, threads, repeats):
    """(seconds, MiB more at the peak) of one layer in this process."""
    torch.set_num_threads(threads)
    layer, x, mask = layer_case(share)
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, CHANNELS // HEADS)
    work = {
        "regions": lambda: split_masked_attention(q, k, v, part(mask)),
        "dense": lambda: dense_masked_attention(q, k, v, mask),
        "layer by regions": lambda: layer(x, {TOKENS: part(mask)}),
        "dense layer": lambda: dense(layer, x, mask),
    }[how]
    before = resident("VmRSS")
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return min(seconds), resident("VmHWM") - before


def resident(field):
    """MiB of this process from /proc: VmRSS now, VmHWM the peak (Linux; getrusage would count the parent process too)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def in_fresh_process(how, share, threads):
    done = subprocess.run(
        [sys.executable, __file__, "--one", how, "--share", str(share), "--threads", str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def counted(work):
    """TFLOP of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def costs(share):
    """(encode(h, w), denoise(), decode(h, w)): TFLOP of a tile of latents of this size; of ControlNet, and of the UNet, on one patch."""
    from diffusers import AutoencoderKL

    side = PATCH // LATENT_CELL
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(VAE).eval()
        encoder, decoder = Encoder(vae), Decoder(vae)
        controlnet, unet = ControlNet(pruned_unet(UNET), [16, 32, 96, 256]).eval(), PrunedUNet(pruned_unet(UNET), RANK).eval()
        latent, condition = torch.empty(1, 4, side, side), torch.empty(1, 3, PATCH, PATCH)
    mask = (torch.arange(PATCH) < share * PATCH).float()[None, :, None].expand(1, -1, PATCH)
    corrections = controlnet(latent, condition)

    def tile(network, channels, height, width):
        return counted(lambda: network(torch.empty(1, channels, height, width, device="meta")))

    return (
        lambda height, width: tile(encoder, 3, height * LATENT_CELL, width * LATENT_CELL),
        counted(lambda: controlnet(latent, condition)),
        counted(lambda: unet(latent, corrections, focus_regions(mask, "meta"))),
        lambda height, width: tile(decoder, 4, height, width),
    )


def photo_costs(height, width, share):
    """TFLOP of a photo by mode and phase."""
    encode, control, unet, decode = costs(share)
    side = PATCH // LATENT_CELL
    exact = len(grid(height, width))
    cells = [-(-n // LATENT_CELL) for n in (height, width)]
    fast = len(grid(*cells, side, sampler.FAST_STRIDE // LATENT_CELL))
    boxes = [
        (box[0].stop - box[0].start, box[1].stop - box[1].start)
        for _, box in tiles(*cells, sampler.FAST_TILE // LATENT_CELL, sampler.FAST_OVERLAP // LATENT_CELL)
    ]
    one = {"encode": encode(side, side), "controlnet": control, "unet": unet, "decode": decode(side, side)}
    large = {size: (encode(*size), decode(*size)) for size in set(boxes)}
    return {
        "patch": one,
        "exact": {name: exact * value for name, value in one.items()},
        "fast": {
            "encode": sum(large[size][0] for size in boxes),
            "controlnet": fast * control,
            "unet": fast * unet,
            "decode": sum(large[size][1] for size in boxes),
        },
        "patches": {"exact": exact, "fast": fast},
        "tiles": [[n * LATENT_CELL for n in size] for size in boxes],
    }


def mode_difference():
    """PSNR in dB between the modes, colours matched, on the tiny random networks."""
    from bokeh_core.optics.defocus import Defocus
    from bokeh_core.optics.lens import Lens
    from bokeh_core.samplers.magicbokeh.checkpoint import load_magicbokeh
    from bokeh_core.synthesis.demo import demo_scene
    from tests.stand_ins import magicbokeh as stand_ins

    with tempfile.TemporaryDirectory() as folder:
        model = load_magicbokeh(stand_ins.write_base(Path(folder) / "base"), stand_ins.write_converted(Path(folder) / "own.safetensors"))
    scene = demo_scene(width=700, height=600)
    defocus = Defocus(scene["disparity"][None], torch.tensor([0.5]), torch.tensor([24.0]), Lens(), False)
    with torch.inference_mode():
        exact, fast = (sampler.render(model, scene["image"][None].clamp(0, 1), defocus, mode=mode) for mode in sampler.MODES)
    return -10 * math.log10(float(((exact - fast) ** 2).mean()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--share", type=float, default=0.5, help="of the tokens in focus")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(attention(args.one, args.share, args.threads[0], 3)))
        return
    report = {"share": args.share, "attention": {}}
    torch.set_num_threads(args.threads[0])
    layer, x, mask = layer_case(args.share)
    with torch.inference_mode():
        report["largest difference"] = float((layer(x, {TOKENS: part(mask)}) - dense(layer, x, mask)).abs().max())
    print("| | threads | by regions | dense | faster | memory |\n|---|---|---|---|---|---|")
    for threads in args.threads:
        for title, quick, slow in (("masked attention", "regions", "dense"), ("whole layer", "layer by regions", "dense layer")):
            (s, m), (dense_s, dense_m) = (in_fresh_process(how, args.share, threads) for how in (quick, slow))
            report["attention"][f"{title}, {threads}"] = {"regions": [s, m], "dense": [dense_s, dense_m]}
            ratios = f"{dense_s / s:.1f} x | {m / dense_m:.2f}"
            print(f"| {title} | {threads} | {s:.2f} s, {m:.0f} MiB | {dense_s:.2f} s, {dense_m:.0f} MiB | {ratios} |")
    print(f"\nlargest difference of the outputs: {report['largest difference']:.1e}\n")
    report["work"] = photo_costs(1024, 1562, args.share)
    print("| TFLOP | encode | ControlNet | UNet | decode | together |\n|---|---|---|---|---|---|")
    for name, title in (("patch", "one patch"), ("exact", "1562 x 1024, exact"), ("fast", "1562 x 1024, fast")):
        values = report["work"][name]
        print(f"| {title} | " + " | ".join(f"{v:.2f}" for v in (*values.values(), sum(values.values()))) + " |")
    print(f"\nfast / exact: {sum(report['work']['fast'].values()) / sum(report['work']['exact'].values()):.3f}\n")
    report["psnr between the modes, random networks"] = mode_difference()
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
