"""What the bokeh adapter adds to a forward pass of FLUX.1-Kontext.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/kontext_stack.py

Two tables: operations of the whole network at 512x512 (counted on the meta device, nothing is computed), and seconds of the hooks on
ComfyUI's own Flux class at two widths, plain and hooked in turns, the fastest of each. Without COMFYUI_PATH only the first.
"""

import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bokeh_core.samplers.kontext_stack.adapter import RELEASED, AdapterConfig, BokehAdapter, build_corrections
from bokeh_core.samplers.kontext_stack.hooks import FluxHooks
from bokeh_core.samplers.kontext_stack.transformer import attach

TEXT, SIDE, ROUNDS = 512, 512, 5


def operations() -> tuple[int, int]:
    """FLOPs of one forward at full size: (without, with the adapter)."""
    from diffusers import FluxTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
        adapter = BokehAdapter(RELEASED).to(torch.bfloat16)
    tokens = 2 * (SIDE // 16) ** 2
    given = {
        "hidden_states": torch.empty(1, tokens, 64, device="meta", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.empty(1, TEXT, 4096, device="meta", dtype=torch.bfloat16),
        "pooled_projections": torch.empty(1, 768, device="meta", dtype=torch.bfloat16),
        "timestep": torch.empty(1, device="meta"),
        "guidance": torch.empty(1, device="meta"),
        "img_ids": torch.zeros(tokens, 3, device="meta"),
        "txt_ids": torch.zeros(TEXT, 3, device="meta"),
    }

    def count(**more):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(**given, **more)
        return counter.get_total_flops()

    plain = count()
    attach(network, adapter)
    vectors = {i: torch.empty(1, RELEASED.width, device="meta") for i in RELEASED.blocks}
    return plain, count(joint_attention_kwargs={"bokeh_vectors": vectors})


def seconds(width: int, rank: int, double: int, single: int, side: int, text: int) -> tuple[float, float]:
    """Fastest forward of ComfyUI's Flux of that width: (plain, hooked)."""
    import comfy.ops
    from comfy.ldm.flux import model as flux

    settings = {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": width, "mlp_ratio": 4.0,
        "num_heads": width // 128, "depth": double, "depth_single_blocks": single, "axes_dim": [16, 56, 56], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if name in flux.FluxParams.__dataclass_fields__}
    network = flux.Flux(**settings, operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu")
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.02)
    adapter = BokehAdapter(AdapterConfig(tuple(range(double + single)), width, rank))
    hooks = FluxHooks(network, build_corrections(adapter))
    vectors = adapter.vectors_of_k([10.0])
    latent = torch.randn(1, 16, side // 8, side // 8)
    given = (latent, torch.tensor([0.5]), torch.randn(1, text, 64), torch.randn(1, 64), torch.tensor([7.0]))

    def run():
        start = time.perf_counter()
        with torch.inference_mode():
            network(*given, ref_latents=[latent], transformer_options={})
        return time.perf_counter() - start

    run()
    plain, hooked = [], []
    for _ in range(ROUNDS):
        plain.append(run())
        hooks.attach()
        hooks.vectors = vectors
        hooked.append(run())
        hooks.detach()
    return min(plain), min(hooked)


def main() -> None:
    plain, adapted = operations()
    print(f"operations at {SIDE}x{SIDE}: {plain / 1e12:.2f} TFLOP, with the adapter {adapted / 1e12:.2f}: + {adapted / plain - 1:.2%}")
    if not os.environ.get("COMFYUI_PATH"):
        print("COMFYUI_PATH is not set: the hooks are not timed.")
        return
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = sys.argv[:1]
    import comfy.options
    from comfy.cli_args import args

    comfy.options.enable_args_parsing(False)
    args.cpu = True
    for name, shape in (("tiny", (512, 16, 2, 4, 256, 64)), ("full width, two blocks", (3072, 128, 1, 1, 192, 64))):
        plain, hooked = seconds(*shape)
        print(f"{name} (width {shape[0]}, rank {shape[1]}): {plain:.3f} s, hooked {hooked:.3f} s: {hooked / plain - 1:+.1%}")


if __name__ == "__main__":
    main()
