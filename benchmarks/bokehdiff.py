"""Speed and memory of PISA's fast form against its dense definition, as ratios measured in one run.

    python benchmarks/bokehdiff.py [--tokens 1024 4096] [--threads 1] [--json FILE]
    python benchmarks/bokehdiff.py --device cuda [--sides 1024 2048] [--dtypes float16 bfloat16 float32]

First form: what PISA adds to one UNet pass, at SDXL's width (10 heads of 64) with random weights: the maps and two attention layers. Dense
finds the maps in both layers, as the published code does; fast finds them once. Both give the same result (the largest difference is
shown). Memory: growth of the resident peak of a fresh process, less inputs and result.

Second form: whole pictures with the full-size SDXL networks and random weights: seconds an image, peak memory of the device, and the share
of the time that PISA takes, fast and dense. `--tiny` takes small networks, to try the benchmark itself. Prints Markdown, then JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from bokeh_core.optics.defocus import make_defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.bokehdiff import checkpoint, network, pisa, sampler

HEADS, WIDTH, CELL = 10, 64, 16
BEHAVIOURS = {"best": pisa.Pisa(), "as published": pisa.PISA_AS_PUBLISHED}
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TINY = {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 1, 1], "transformer_layers_per_block": [1, 2, 1]}


def scene_maps(side, k):
    """[1, 2, H, W] disparity of a slanted floor with two boxes, and CoC radii, for side x side tokens."""
    generator = torch.Generator().manual_seed(0)
    size = side * CELL
    disparity = F.interpolate(torch.rand(1, 1, 5, 5, generator=generator) * 0.5, size=(size, size), mode="bilinear", align_corners=True)
    disparity[..., size // 4 : size // 2, size // 3 : size // 2] = 0.9
    disparity[..., size // 2 : -CELL, : size // 4] = 0.7
    return torch.cat([disparity, (disparity - 0.4).abs() * k / 10], 1)


def one_pass(form, side, k, behaviour):
    """(seconds, MiB, result) of what PISA adds to a UNet pass."""
    generator = torch.Generator().manual_seed(1)
    maps = scene_maps(side, k)
    q, key, v = (torch.randn(1, HEADS, side * side, WIDTH, generator=generator) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with torch.no_grad():
        scene = pisa.scene_of(maps, (side, side))
        if form == "dense":
            for _ in range(2):
                maps = pisa.dense_maps(scene, behaviour, pisa.Draws(0))
                out = pisa.dense_attention(q, key, v, maps, behaviour, pisa.Draws(0))
        else:
            blocks = pisa.scene_blocks(scene, behaviour, pisa.Draws(0))
            for _ in range(2):
                out = pisa.block_attention(q, key, v, (side, side), blocks, behaviour, pisa.Draws(0))
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return seconds, grown - out.numel() * 4 / 2**20, out


def in_fresh_process(form, side, k, name, threads, keep=None):
    command = [sys.executable, __file__, "--one", form, str(side), str(k), name, "--threads", str(threads)]
    done = subprocess.run([*command, *(["--keep", keep] if keep else [])], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cpu(tokens, threads, folder):
    rows = []
    for count in tokens:
        side = round(count**0.5)
        for name in BEHAVIOURS:
            for k in (20, 60):
                found = {}
                for form in ("dense", "fast"):
                    found[form] = in_fresh_process(form, side, k, name, threads, str(folder / f"{form}.pt"))
                a, b = (torch.load(folder / f"{form}.pt") for form in ("dense", "fast"))
                rows.append(
                    {
                        "tokens": side * side,
                        "fidelity": name,
                        "K": k,
                        "dense_s": found["dense"]["seconds"],
                        "fast_s": found["fast"]["seconds"],
                        "times_faster": found["dense"]["seconds"] / found["fast"]["seconds"],
                        "dense_mib": found["dense"]["mib"],
                        "fast_mib": found["fast"]["mib"],
                        "memory_share": found["fast"]["mib"] / found["dense"]["mib"],
                        # Published behaviour draws in another order, so there the results differ by their noise.
                        "largest_difference": float((a - b).abs().max()) if name == "best" else None,
                    }
                )
    return rows


def random_weights(build, config, kind, device, dtype):
    with torch.device("meta"):
        shapes = kind.from_config(config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    return build(
        config,
        {
            name: torch.randn(one.shape, generator=generator, device=device, dtype=dtype) * one[0].numel() ** -0.5
            if one.ndim > 1
            else torch.full(one.shape, float("norm" in name and name.endswith("weight")), device=device, dtype=dtype)
            for name, one in shapes.items()
        },
    )


def pictures(device, sides, dtypes, tiny):
    """Whole pictures; `dense` puts the definition in the fast form's place."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    device, rows = torch.device(device), []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    spent = [0.0]

    def timed(function):
        def run(*given):
            wait()
            start = time.perf_counter()
            out = function(*given)
            wait()
            spent[0] += time.perf_counter() - start
            return out

        return run

    def dense(q, k, v, grid, scene, *more):
        return pisa.dense_attention(q, k, v, pisa.dense_maps(scene, *more), *more)

    forms = {"fast": (pisa.scene_blocks, pisa.block_attention), "dense": (lambda scene, *_: scene, dense)}
    for name in dtypes:
        dtype = getattr(torch, name)
        vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        unet = random_weights(network.build_unet, {**SDXL, **(TINY if tiny else {})}, UNet2DConditionModel, device, dtype)
        vae = random_weights(
            network.build_vae, {**VAE, **({"block_out_channels": [32] * 4} if tiny else {})}, AutoencoderKL, device, vae_dtype
        )
        model = checkpoint.BokehDiff(
            checkpoint.Placed(unet, device, dtype),
            checkpoint.Placed(vae, device, vae_dtype),
            torch.zeros(1, 77, 2048),
            torch.zeros(1, 1280),
        )
        for side in sides:
            maps = scene_maps(-(-side // CELL), 0)[:, 0, :side, :side]
            image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2)).to(device)
            defocus = make_defocus(maps.to(device), Lens(strength=30), 0.4, width=side)
            for form, (blocks, attention) in forms.items():
                sampler.scene_blocks, network.block_attention = timed(blocks), timed(attention)
                sampler.render(model, image, defocus)  # warm
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                spent[0] = 0.0
                start = time.perf_counter()
                result = sampler.render(model, image, defocus)
                wait()
                seconds = time.perf_counter() - start
                assert result.isfinite().all()
                peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
                rows.append(
                    {"dtype": name, "side": side, "form": form, "seconds": seconds, "peak_mib": peak, "pisa_share": spent[0] / seconds}
                )
        sampler.scene_blocks, network.block_attention = forms["fast"]
        del model, unet, vae
    return rows


def table(rows):
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        form, side, k, name = args.one
        one_pass(form, 8, 20, BEHAVIOURS[name])  # warm
        seconds, mib, out = one_pass(form, int(side), float(k), BEHAVIOURS[name])
        if args.keep:
            torch.save(out, args.keep)
        print(json.dumps({"seconds": seconds, "mib": mib}))
        return
    if args.device:
        rows = pictures(args.device, args.sides, args.dtypes, args.tiny)
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            rows = cpu(args.tokens, args.threads, Path(folder))
    print(table(rows))
    text = json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
