"""Tiny random files in the layouts of the stage 1 stack: FLUX as ComfyUI stores it, the adapter, the small FLUX VAE."""

from pathlib import Path

import torch

HEAD = 128  # width of FLUX's attention heads, which the host's loader takes for granted
TEXT, POOLED = 64, 64  # widths of the text states, which the file of a FLUX decides
LATENT = 16


def _random(shapes: dict[str, tuple[int, ...]], seed: int, gain: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        if "norm" in name:
            out[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            fan = torch.Size(shape[1:]).numel() if len(shape) > 1 else 100
            out[name] = gain * torch.randn(shape, generator=generator) / fan**0.5
    return out


def flux(heads: int = 1, double: int = 1, single: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A FLUX.1 with guidance, names of the original release."""
    width = heads * HEAD
    layers = {"img_in": (width, 4 * LATENT), "txt_in": (width, TEXT)}
    for name, inner in (("time_in", 256), ("vector_in", POOLED), ("guidance_in", 256)):
        layers |= {f"{name}.in_layer": (width, inner), f"{name}.out_layer": (width, width)}
    norms = []
    for i in range(double):
        for stream in ("img", "txt"):
            start = f"double_blocks.{i}.{stream}"
            layers |= {f"{start}_mod.lin": (6 * width, width), f"{start}_attn.qkv": (3 * width, width)}
            layers |= {f"{start}_attn.proj": (width, width), f"{start}_mlp.0": (4 * width, width), f"{start}_mlp.2": (width, 4 * width)}
            norms += [f"{start}_attn.norm.query_norm.scale", f"{start}_attn.norm.key_norm.scale"]
    for j in range(single):
        start = f"single_blocks.{j}"
        layers |= {f"{start}.linear1": (7 * width, width), f"{start}.linear2": (width, 5 * width)}
        layers |= {f"{start}.modulation.lin": (3 * width, width)}
        norms += [f"{start}.norm.query_norm.scale", f"{start}.norm.key_norm.scale"]
    layers |= {"final_layer.linear": (4 * LATENT, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()} | {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return _random(shapes | {name: (HEAD,) for name in norms}, seed)


def to_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of diffusers' FluxTransformer2DModel."""
    out = {}

    def put(new, old, rows=slice(None)):
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = tensors[f"{old}.{kind}"][rows]

    def swapped(new, old):  # shift and scale change places in the last layer
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = torch.cat(tensors[f"{old}.{kind}"].chunk(2)[::-1])

    width = len(tensors["img_in.bias"])
    third = [slice(i * width, (i + 1) * width) for i in range(3)]
    put("x_embedder", "img_in")
    put("context_embedder", "txt_in")
    for new, old in (("timestep_embedder", "time_in"), ("text_embedder", "vector_in"), ("guidance_embedder", "guidance_in")):
        put(f"time_text_embed.{new}.linear_1", f"{old}.in_layer")
        put(f"time_text_embed.{new}.linear_2", f"{old}.out_layer")
    i = 0
    while f"double_blocks.{i}.img_attn.qkv.weight" in tensors:
        new, old = f"transformer_blocks.{i}", f"double_blocks.{i}"
        names = {
            "img": ("norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_", "ff"),
            "txt": ("norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_", "ff_context"),
        }
        for stream, (norm, qkv, project, head, mlp) in names.items():
            put(f"{new}.{norm}.linear", f"{old}.{stream}_mod.lin")
            for name, rows in zip(qkv, third, strict=True):
                put(f"{new}.attn.{name}", f"{old}.{stream}_attn.qkv", rows)
            put(f"{new}.attn.{project}", f"{old}.{stream}_attn.proj")
            for short, long in (("q", "query"), ("k", "key")):
                out[f"{new}.attn.{head}{short}.weight"] = tensors[f"{old}.{stream}_attn.norm.{long}_norm.scale"]
            put(f"{new}.{mlp}.net.0.proj", f"{old}.{stream}_mlp.0")
            put(f"{new}.{mlp}.net.2", f"{old}.{stream}_mlp.2")
        i += 1
    j = 0
    while f"single_blocks.{j}.linear1.weight" in tensors:
        new, old = f"single_transformer_blocks.{j}", f"single_blocks.{j}"
        put(f"{new}.norm.linear", f"{old}.modulation.lin")
        put(f"{new}.proj_out", f"{old}.linear2")
        for name, rows in zip(("to_q", "to_k", "to_v"), third, strict=True):
            put(f"{new}.attn.{name}", f"{old}.linear1", rows)
        put(f"{new}.proj_mlp", f"{old}.linear1", slice(3 * width, None))
        for short, long in (("q", "query"), ("k", "key")):
            out[f"{new}.attn.norm_{short}.weight"] = tensors[f"{old}.norm.{long}_norm.scale"]
        j += 1
    put("proj_out", "final_layer.linear")
    swapped("norm_out.linear", "final_layer.adaLN_modulation.1")
    return out


def diffusers_flux(tensors: dict[str, torch.Tensor]):
    """diffusers' network with the weights of `flux`."""
    from diffusers import FluxTransformer2DModel

    names = to_diffusers(tensors)
    starts = ("transformer_blocks.", "single_transformer_blocks.")
    count = [len({name.split(".")[1] for name in names if name.startswith(start)}) for start in starts]
    with torch.device("meta"):
        network = FluxTransformer2DModel(
            in_channels=4 * LATENT, num_layers=count[0], num_single_layers=count[1], attention_head_dim=HEAD,
            num_attention_heads=len(tensors["img_in.bias"]) // HEAD, joint_attention_dim=TEXT, pooled_projection_dim=POOLED,
            guidance_embeds=True,
        )  # fmt: skip
    network.load_state_dict(names, assign=True)
    return network.eval().requires_grad_(False)


def adapter(width: int, blocks: int, rank: int = 128, seed: int = 1, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """The adapter as its file names it, with every factor at work."""
    shapes = {"embedding_layer.0.weight": (64, 1), "embedding_layer.0.bias": (64,)}
    shapes |= {"embedding_layer.2.weight": (768, 64), "embedding_layer.2.bias": (768,)}
    for i in range(blocks):
        for name, inner in (("to_k_dof", 768), ("to_v_dof", 768), ("to_q_adp", width), ("to_k_adp", width)):
            shapes |= {f"adapter_modules.{i}.{name}.down.weight": (rank, inner), f"adapter_modules.{i}.{name}.up.weight": (width, rank)}
    return _random(shapes, seed, gain)


def small_vae(seed: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(encoder, decoder) of TAEF1 (taef1_encoder.safetensors, taef1_decoder.safetensors), which the host loads as the VAE taef1."""

    def block(i):
        return {f"{i}.conv.{j}.{kind}": (64, 64, 3, 3)[: 4 if kind == "weight" else 1] for j in (0, 2, 4) for kind in ("weight", "bias")}

    def conv(i, inner, outer, bias=True):
        return {f"{i}.weight": (outer, inner, 3, 3)} | ({f"{i}.bias": (outer,)} if bias else {})

    encoder, decoder = conv(0, 3, 64) | block(1), conv(1, LATENT, 64)
    for i in (2, 6, 10):
        encoder |= conv(i, 64, 64, bias=False)
    for i in (3, 4, 5, 7, 8, 9, 11, 12, 13):
        encoder |= block(i)
    encoder |= conv(14, 64, LATENT)
    for i in (7, 12, 17):
        decoder |= conv(i, 64, 64, bias=False)
    for i in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        decoder |= block(i)
    decoder |= conv(19, 64, 3)
    return _random(encoder, seed), _random(decoder, seed + 1)


def write(models: Path) -> None:
    """FLUX, the adapter and the small VAE where the workflow looks for them. models: the host's folder."""
    from safetensors.torch import save_file

    for name in ("diffusion_models", "vae_approx", "loras"):
        (models / name).mkdir(parents=True, exist_ok=True)
    save_file(flux(), models / "diffusion_models" / "flux1-dev-kontext_fp8_scaled.safetensors")
    for name, tensors in zip(("encoder", "decoder"), small_vae(), strict=True):
        save_file(tensors, models / "vae_approx" / f"taef1_{name}.safetensors")
    torch.save(adapter(HEAD, 3), models / "loras" / "bokeh_lora.bin")
