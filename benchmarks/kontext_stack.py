"""What the bokeh adapter adds to a forward pass of FLUX.1-Kontext: operations of the whole network at 512 x 512, counted."""

import torch

from bokeh_core.samplers.kontext_stack.adapter import RELEASED, BokehAdapter
from bokeh_core.samplers.kontext_stack.transformer import attach

from .measure import Counted

TEXT, SIDE = 512, 512


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


def measure(quick, device):
    plain, adapted = (n / 1e12 for n in operations())
    yield Counted("a forward of FLUX.1-Kontext with the adapter", adapted, plain, "without it", note=f"+ {adapted / plain - 1:.2%}")
