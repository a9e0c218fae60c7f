"""BokehDepth stage 1: the adapter, FLUX with it, the sampling loop, and the numbers and files around them."""

import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from bokeh_core.optics.stack import BokehStack
from bokeh_core.samplers.kontext_stack import recipe
from bokeh_core.samplers.kontext_stack.adapter import BokehAdapter, LowRank, build_adapter
from bokeh_core.samplers.kontext_stack.colour import color_transfer_lab
from bokeh_core.samplers.kontext_stack.sampler import decode_image, encode_image, sample
from bokeh_core.samplers.kontext_stack.transformer import BokehAttention, Grounded, attach
from bokeh_core.stack_files import load_stack, save_stack

from .runner import Case, unit, worst


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        raise AssertionError(f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    return float((ours.double() - theirs.double()).abs().max())


def _weights(case: Case, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in case.tensors.items() if name.startswith(prefix)}


def _adapter(case: Case, config: dict) -> BokehAdapter:
    """config: rank and alpha, and whether q and k are corrected; where not, the file has no pairs, which is the same as zeros."""
    rank, alpha = (config.get(name, config.get(f"lora_{name}")) for name in ("rank", "alpha"))
    tensors = _weights(case, "w.adapter.")
    for side in "qk":
        if not config.get(f"unfreeze_{side}", True):
            for name, value in list(tensors.items()):
                if match := re.fullmatch(r"(.+)\.to_v_dof\.up\.weight", name):
                    tensors[f"{match[1]}.to_{side}_adp.up.weight"] = torch.zeros_like(value)
                    tensors[f"{match[1]}.to_{side}_adp.down.weight"] = torch.zeros(value.shape[::-1])
    return build_adapter(tensors, case.name, alpha / rank)


def _shift(config: dict) -> recipe.Shift:
    return recipe.Shift(config["base_shift"], config["max_shift"], config["base_image_seq_len"], config["max_image_seq_len"])


@unit("kembed_")
def kembed(case: Case) -> tuple[float, float]:
    """In the dtype of the weights; rows beyond the K values are conditions fed as they are."""
    t = case.tensors
    with torch.device("meta"):
        embedding = torch.nn.Sequential(
            torch.nn.Linear(*reversed(t["w.embedding_layer.0.weight"].shape)),
            torch.nn.ReLU(),
            torch.nn.Linear(*reversed(t["w.embedding_layer.2.weight"].shape)),
        )
    embedding.load_state_dict(_weights(case, "w.embedding_layer."), assign=True)
    k = [recipe.normalise_k(value) for value in t["in.k_values"].tolist()]
    given = torch.cat([torch.tensor(k)[:, None], t["in.camera_ann"].float()[len(k) :]])
    with torch.no_grad():
        out = BokehAdapter.embed(SimpleNamespace(embedding_layer=embedding), given, t["in.camera_ann"].dtype)
    return _largest(out, t["out.camera_embeds"]), case.meta["tolerance_max_abs"]


@unit("proc_")
@unit("grounded_")
def processor(case: Case) -> tuple[float, float]:
    from diffusers.models.transformers.transformer_flux import FluxAttention

    t, config = case.tensors, case.meta["config"]
    dim, double = config["heads"] * config["head_dim"], config["kind"] == "double"
    extra = {"added_kv_proj_dim": dim, "context_pre_only": False} if double else {"pre_only": True}
    attention = FluxAttention(dim, config["heads"], config["head_dim"], bias=True, out_dim=dim, eps=config["norm_eps"], **extra)
    attention.load_state_dict(_weights(case, "w.attn."))
    scale = config["lora_alpha"] / config["lora_rank"]
    pairs = {}
    for name in ("to_v_dof", "to_q_adp", "to_k_adp"):
        weights = _weights(case, f"w.processor.{name}.")
        if weights:
            rank, inner = weights["down.weight"].shape
            pairs[name] = LowRank(inner, dim, rank, scale)
            pairs[name].load_state_dict(weights)
    block = BokehAttention(0, pairs.get("to_q_adp"), pairs.get("to_k_adp"), config["lora_scale"], config["bokeh_scale"])
    attention.set_processor(block)
    swap = config["batch_swap_ids"]
    pivot = {None: None, "i2i": Grounded(), "t2i": Grounded(tuple(swap) if swap else None)}[config["grounded"]]
    tolerance, pairs_out = case.meta["tolerance_max_abs"], []
    with torch.no_grad():
        for start, vectors in (("out.", {0: pairs["to_v_dof"](t["in.camera_embeds"])}), ("out.no_embed_", None)):
            out = attention(
                t["in.hidden_states"],
                t.get("in.encoder_hidden_states"),
                image_rotary_emb=(t["in.rope_cos"], t["in.rope_sin"]),
                bokeh_vectors=vectors,
                grounded=pivot,
            )
            for name, ours in zip(("hidden_states", "encoder_hidden_states"), out if double else (out,), strict=False):
                pairs_out.append((_largest(ours, t[start + name]), tolerance))
        vector = pairs["to_v_dof"](t["in.camera_embeds"])
        pairs_out.append((_largest(vector, t["mid.value_dof"].transpose(1, 2).flatten(1)), tolerance))
    return worst(pairs_out)


def _transformer(config: dict, weights: dict[str, torch.Tensor]):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network = FluxTransformer2DModel(
            in_channels=config["in_channels"],
            num_layers=config["num_layers"],
            num_single_layers=config["num_single_layers"],
            num_attention_heads=config["heads"],
            attention_head_dim=sum(config["axes_dims_rope"]),
            axes_dims_rope=tuple(config["axes_dims_rope"]),
            joint_attention_dim=config["joint_attention_dim"],
            pooled_projection_dim=config.get("pooled_projection_dim") or config.get("pooled"),
            guidance_embeds=config["guidance_embeds"],
        )
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


@unit("flux_tiny_")
def flux_tiny(case: Case) -> tuple[float, float]:
    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance_max_abs"]
    network = _transformer(config, _weights(case, "w.dit_diffusers."))

    def run(vectors=None):
        return network(
            hidden_states=t["in.hidden_states"],
            encoder_hidden_states=t["in.encoder_hidden_states"],
            pooled_projections=t["in.pooled_projections"],
            timestep=t["in.timestep"],
            guidance=t["in.guidance"] if config["guidance_embeds"] else None,
            img_ids=t["in.img_ids"],
            txt_ids=t["in.txt_ids"],
            joint_attention_kwargs=None if vectors is None else {"bokeh_vectors": vectors},
            return_dict=False,
        )[0]

    batch = len(t["in.hidden_states"])
    adapter = _adapter(case, config)
    with torch.no_grad():
        pairs = [(_largest(run(), t["out.base_no_adapter"]), tolerance)]
        attach(network, adapter)
        pairs.append((_largest(run(), t["out.no_embed"]), tolerance))
        for name, theirs in t.items():
            if k := re.fullmatch(r"out\.K([\d.]+)(_clamped)?", name):
                vectors = adapter.vectors_of_k([float(k[1])] * batch)
            elif name == "out.uncond_m1":
                vectors = adapter.vectors(torch.full((batch, 1), -1.0))
            elif raw := re.fullmatch(r"out\.raw_([\d.]+)", name):
                vectors = adapter.vectors(torch.full((batch, 1), float(raw[1])))
            elif name == "out.mixed_batch":
                listed = re.search(r"\[(.+)\]", case.meta["outputs"][name])[1]
                vectors = adapter.vectors(torch.tensor([[float(c)] for c in listed.split(",")]))
            else:
                continue
            pairs.append((_largest(run(vectors), theirs), tolerance))
        constants = adapter.vectors_of_k([0, 10, 20, 30])
        for i, block in enumerate(adapter.config.blocks):
            name = f"mid.value_const.{block}" if f"mid.value_const.{block}" in t else f"mid.value_const.{i}"
            pairs.append((_largest(constants[block], t[name]), tolerance))
    return worst(pairs)


@unit("kontext_loop_")
def kontext_loop(case: Case) -> tuple[float, float]:
    """Frame by frame: what one frame does does not depend on the others."""
    from diffusers import AutoencoderKL

    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance_max_abs"]
    network = _transformer(config["dit"], _weights(case, "w.dit_diffusers."))
    adapter = _adapter(case, config["adapter"])
    attach(network, adapter)
    settings = {name: value for name, value in config["vae"].items() if name != "class"}
    depth = len(settings["block_out_channels"])
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * depth, up_block_types=["UpDecoderBlock2D"] * depth, **settings)
    vae.load_state_dict(_weights(case, "w.vae."))
    vae.eval()

    image = t["in.image_uint8"].movedim(-1, 0) / 255
    size = recipe.generated_size((image.shape[2], image.shape[1]), config["assigned_size"])
    if list(size) != config["generated_wh"]:
        raise AssertionError(f"size {size}, expected {config['generated_wh']}")
    latent = encode_image(vae, recipe.resize(image, *size))
    noise = recipe.shared_noise(config["seed"], *latent.shape[1:])
    sigmas = recipe.schedule(*size, config["steps"], _shift(config["scheduler"]))
    pairs = [
        (_largest(recipe.pack(noise).expand_as(t["mid.noise_packed"]), t["mid.noise_packed"]), 0.0),
        (_largest(recipe.pack(latent).expand_as(t["mid.ref_latents_packed"]), t["mid.ref_latents_packed"]), tolerance["latents"]),
        (_largest(torch.cat([recipe.position_ids(*latent.shape[2:], first) for first in (0, 1)]), t["mid.img_ids"]), 0.0),
        (_largest(sigmas, t["mid.sigmas"]), 1e-6),
        (_largest(recipe.network_timesteps(sigmas, None)[:, None].expand_as(t["mid.timestep"]), t["mid.timestep"]), 1e-6),
    ]
    for i, k in enumerate(t["in.k_values"].tolist()):
        if recipe.prompt_for(recipe.PROMPT, k) != case.meta["prompts"][i]:
            raise AssertionError(f"prompt for K = {k}")
        steps = []
        sampled = sample(
            network, noise, latent, t["in.prompt_embeds"][i : i + 1], t["in.pooled"][i : i + 1], adapter.vectors_of_k([k]), sigmas,
            config["guidance_scale"], step=lambda number, before, velocity, steps=steps: steps.append((before, velocity)),
        )  # fmt: skip
        for name, column in (("latents_before_step", 0), ("velocity", 1)):
            ours = torch.cat([one[column] for one in steps])
            theirs = t[f"mid.{name}"][:, i]
            pairs.append((_largest(ours[:, : theirs.shape[1]], theirs), tolerance["latents"]))
        given = sampled / vae.config.scaling_factor + vae.config.shift_factor
        pairs.append((_largest(given, t["mid.decoder_input"][i : i + 1]), tolerance["latents"] / vae.config.scaling_factor))
        with torch.no_grad():
            pairs.append((_largest(vae.decode(given).sample, t["mid.decoded"][i : i + 1]), tolerance["decoded"]))
        picture = (decode_image(vae, sampled) * 255).round().movedim(0, -1)
        pairs.append((_largest(picture, t["out.images_uint8"][i]), tolerance["images_uint8"]))
    return worst(pairs)


@unit("schedule_")
def schedule(case: Case) -> tuple[float, float]:
    t, tolerance, pairs = case.tensors, case.meta["tolerance_max_abs"], []
    for i, row in enumerate(case.meta["cases"]):
        sigmas = recipe.schedule(row["width"], row["height"], row["steps"], _shift(case.meta["config"]))
        rounded = recipe.network_timesteps(sigmas, torch.bfloat16)
        ours = {
            "sigmas": sigmas,
            "timesteps": sigmas[:-1] * recipe.TIMESTEPS,
            "bf16_sigma_arg": rounded,
            "bf16_embedded_timestep": (rounded * recipe.TIMESTEPS).float(),
        }
        pairs += [(_largest(tensor, t[f"out.{i}.{name}"]), tolerance[name]) for name, tensor in ours.items()]
    return worst(pairs)


@unit("helpers_")
def helpers(case: Case) -> tuple[float, float]:
    """Counts what differs."""
    wrong = []
    for row in case.meta.get("block_ids", ()):
        if recipe.parse_block_ids(row["arg"]) != row["ids"] or recipe.compress_block_ids(row["ids"]) != row["compressed"]:
            wrong.append(row)
    for row in case.meta.get("prompts", ()):
        try:
            good = recipe.prompt_for(row["template"], row["K"]) == row.get("prompt")
        except Exception as error:
            good = type(error).__name__ == row.get("raises")
        if not good:
            wrong.append(row)
    for row in case.meta.get("k_sequences", ()):
        if recipe.k_range(row["k_min"], row["k_max"], row["k_step"]) != row["k_values"]:
            wrong.append(row)
    for row in case.meta.get("sizes", ()):
        reference = recipe.reference_size(
            tuple(row["input_wh"]), ref_width=row["ref_width"], ref_height=row["ref_height"], short_side=row["short_side"]
        )
        if list(reference) != row["ref_png_wh"] or list(recipe.generated_size(reference)) != row["generated_wh"]:
            wrong.append(row)
    if wrong:
        raise AssertionError(f"{len(wrong)} differ, first {wrong[0]}")
    return 0.0, 0.0


@unit("color_transfer_")
def color_transfer(case: Case) -> tuple[float, float]:
    t, errors = case.tensors, []
    for name, theirs in t.items():
        if match := re.fullmatch(r"out\.(\d+)\.adjust_std_(True|False)", name):
            source, target = (t[f"in.{match[1]}.{side}"].numpy() for side in ("source", "target"))
            errors.append(_largest(torch.from_numpy(color_transfer_lab(source, target, match[2] == "True")), theirs))
    return max(errors), case.meta["tolerance_max_abs"]


@unit("stack_manifest_")
def stack_manifest(case: Case) -> tuple[float, float]:
    """Writes a stack of the case's sizes and compares every file and every JSON entry, then reads it back."""
    meta, config = case.meta, case.meta["config"]
    expected = meta["stack_index.json"]
    original = tuple(config["input_wh"])
    exact = (config["ref_width"], config["ref_height"]) if config["ref_width"] and config["ref_height"] else original
    size = recipe.reference_size(original, ref_width=config["ref_width"], ref_height=config["ref_height"], short_side=config["short_side"])
    frame_size = meta["frame0_size"]  # whatever the generator gave
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(len(config["k_values"]), 3, *reversed(frame_size), generator=generator)
    settings = {name: expected[name] for name in ("guidance_scale", "num_inference_steps", "prompt_template")}
    stack = BokehStack(torch.rand(3, *reversed(size), generator=generator), frames, config["k_values"], source="kontext", settings=settings)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder).resolve() / "run"
        save_stack(run, stack, source_size=exact, original_size=original)
        files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
        line = json.loads((run / "manifest.jsonl").read_text().replace(str(run.parent), "$RUNPARENT"))
        index = json.loads((run / "defocus_stack/stack_index.json").read_text().replace(str(run.parent), "$RUNPARENT"))
        if re.fullmatch(r"\d{8}_\d{6}", line["timestamp"]):
            line["timestamp"] = meta["manifest.jsonl (one line)"]["timestamp"]
        sizes = [list(Image.open(run / name).size) for name in ("ref.png", "defocus_stack/0.png")]
        found = {
            "files": files, "stack_index.json": index, "manifest.jsonl (one line)": line,
            "ref_png_size": sizes[0], "frame0_size": sizes[1],
        }  # fmt: skip
        wrong += [(name, ours, meta[name]) for name, ours in found.items() if ours != meta[name]]
        again = load_stack(run / "manifest.jsonl")
        if again.k.tolist() != config["k_values"] or _largest(again.frames, frames) > 0.5 / 255 + 1e-6:
            wrong.append(("read back", again.k, config["k_values"]))
    if wrong:
        raise AssertionError(f"{len(wrong)} differ, first {wrong[0]}")
    return 0.0, 0.0
