"""MagicBokeh: focus mask and bias, masked attention, networks, one step, patches, colour fix, and the whole path."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from bokeh_core.checkpoints.loading import load_strict
from bokeh_core.checkpoints.lora import lora_pairs, merge_lora
from bokeh_core.checkpoints.stable_diffusion import Part
from bokeh_core.optics.defocus import Defocus
from bokeh_core.optics.lens import Lens
from bokeh_core.samplers.colour_fix import adain, wavelet_fix, wavelet_parts
from bokeh_core.samplers.magicbokeh import sampler
from bokeh_core.samplers.magicbokeh.checkpoint import LORA_ALPHA, MagicBokeh, Placed, blueprints
from bokeh_core.samplers.magicbokeh.focus_aware_attention import FocusAwareAttention, dense_masked_attention, focus_bias, part, token_mask
from bokeh_core.samplers.magicbokeh.network import focus_regions, token_grids
from bokeh_core.samplers.magicbokeh.patches import grid, window

from .runner import Case, load_case, unit, worst


def difference(found, expected) -> float:
    """Largest absolute difference."""
    assert found.shape == expected.shape, f"shape {list(found.shape)}, expected {list(expected.shape)}"
    return float((found.double() - expected.double()).abs().max())


def below(tensors: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def model_of(case: Case) -> MagicBokeh:
    """The model of a case that holds weights, or names one that does: our loader, from full base tensors and LoRA file tensors."""
    if "weights_from" in case.meta:
        case = load_case(case.folder / case.meta["weights_from"])
    config, w = case.meta["config"], below(case.tensors, "w.")
    file = SimpleNamespace(  # what our loader reads of a MagicBokehFile
        rank_unet=config["rank_unet"],
        rank_vae=config["rank_vae"],
        rank_bokeh=config["rank_bokeh (file key state_dict_attn)"],
        unet=below(w, "state_dict_unet."),
        vae=below(w, "state_dict_vae."),
        processors=below(w, "processor_state_dict."),
        controlnet=below(w, "controlnet."),
    )
    parts = blueprints(Part(below(w, "unet."), config["unet_config"]), Part(below(w, "vae."), config["vae_config"]), file)
    placed = {name: Placed(one.build(nn, one.tensors), torch.device("cpu"), torch.float32) for name, one in parts.items()}
    return MagicBokeh(**placed, scaling_factor=config["vae_config"]["scaling_factor"])


@unit("tiny_model_")
def tiny_model(case: Case) -> tuple[float, float]:
    """The weights fill our networks, nothing missing and nothing left over but what pruning drops (the loader raises otherwise)."""
    model = model_of(case)
    ours = sum(p.numel() for part in (model.encoder, model.controlnet, model.unet, model.decoder) for p in part.network.parameters())
    w = below(case.tensors, "w.")
    dropped = (".attn2.", ".norm2.", "mid_block.")
    kept = {
        n: t
        for n, t in below(w, "unet.").items()
        if not (n.startswith("mid_block.") or ("transformer_blocks" in n and any(d in n for d in dropped)))
    }
    used = [*kept.values(), *below(w, "vae.").values(), *below(w, "controlnet.").values(), *below(w, "processor_state_dict.").values()]
    return abs(ours - sum(tensor.numel() for tensor in used)), 0.0


def conditions_of(case: Case, k: float) -> sampler.Conditions:
    disparity = case.tensors["in.disparity_f16"].float()[None]
    defocus = Defocus(disparity, torch.zeros(1), torch.tensor([float(k)]), Lens(), False)
    return sampler.Conditions(defocus, case.tensors["in.salient_mask"].float()[None] / 255, sampler.AS_PUBLISHED)


@unit("focus_bias_")
def focus(case: Case) -> tuple[float, float]:
    t, tolerance = case.tensors, case.meta["tolerance"]["float"]
    conditions = conditions_of(case, case.meta["K"])
    d = conditions.frame(0)
    places = grid(*d.shape)
    results = [(abs(float(conditions.focus(0)) - float(t["out.focus_value"])), tolerance)]
    results.append((difference(torch.tensor(places), t["out.positions"]), 0.0))
    for j, (row, column) in enumerate(places):
        patch = d[row : row + sampler.PATCH, column : column + sampler.PATCH]
        condition, mask = 2 * patch - 1, sampler.in_focus(patch)[None]
        if f"out.c_depth_stride4.{j}" in t:
            results.append((difference(condition[::4, ::4], t[f"out.c_depth_stride4.{j}"]), tolerance))
        if f"out.c_msk.{j}" in t:
            results.append((difference(mask[0], t[f"out.c_msk.{j}"]), 0.0))
        for height, width in token_grids(patch.shape[0] // 8, patch.shape[1] // 8):
            tokens = token_mask(mask, height, width)
            if f"out.bias.{height * width}.{j}" in t:
                results.append((difference(focus_bias(tokens), t[f"out.bias.{height * width}.{j}"]), tolerance))
            if f"out.same_as_token0.{height * width}.{j}" in t:
                results.append((difference((tokens == tokens[:, :1])[0], t[f"out.same_as_token0.{height * width}.{j}"]), 0.0))
    return worst(results)


@unit("masked_attention_")
def masked_attention(case: Case) -> tuple[float, float]:
    """One layer: our module with the SR LoRA merged as the loader merges it; its masked branch also against the dense definition."""
    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance"]
    x, mask = t["in.hidden_states"], t["in.focus_mask"]
    weights = below(t, "w.attn1.")
    base = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items() if ".base_layer." in name}
    adapters = {name: tensor for name, tensor in weights.items() if ".base_layer." not in name}
    merged = merge_lora(base, lora_pairs(adapters, ()), LORA_ALPHA / config["rank_unet"], case.name)
    from diffusers.models.attention_processor import Attention

    attention = Attention(config["C"], heads=config["heads"], dim_head=config["head_dim"])
    layer = FocusAwareAttention(attention, config["rank_bokeh"])
    load_strict(layer, merged | {f"processor.{name}": tensor for name, tensor in below(t, "w.processor.").items()}, case.name)
    regions = part(mask)
    everywhere, within = layer.branches(x, regions)
    results = [
        (difference(everywhere, t["mid.global_branch"]), tolerance),
        (difference(within, t["mid.masked_branch"]), tolerance),
        (difference(layer(x, {x.shape[1]: regions}), t["out.hidden_states"]), tolerance),
    ]

    def heads(tokens):
        return tokens.unflatten(2, (config["heads"], config["head_dim"])).transpose(1, 2)

    low_rank = layer.processor
    q, k, v = (heads(getattr(layer, name)(x) + layer.scale * getattr(low_rank, f"{name}_lora")(x)) for name in ("to_q", "to_k", "to_v"))
    dense = dense_masked_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return worst([*results, (difference(dense, t["mid.masked_branch"]), tolerance)])


@unit("unet_controlnet_")
def unet_controlnet(case: Case) -> tuple[float, float]:
    t, tolerance, model = case.tensors, case.meta["tolerance"], model_of(case)
    latent, condition, mask = t["in.latent"], t["in.c_depth"], t["in.focus_mask"][:, 0]
    controlnet, unet = model.controlnet.network, model.unet.network
    corrections = controlnet(latent, condition.expand(-1, 3, -1, -1))
    found = {
        "mid.cond_embedding": controlnet.controlnet_cond_embedding(condition.expand(-1, 3, -1, -1)),
        **{f"mid.residual.{j}": one for j, one in enumerate(corrections)},
        "out.eps": sampler.predict_eps(model, latent, condition[:, 0], mask),
        "out.eps_no_focus_bias": unet(latent, corrections, focus_regions(torch.ones_like(mask))),
        "out.eps_no_controlnet": unet(latent, None, focus_regions(mask)),
    }
    for height, width in token_grids(*latent.shape[-2:]):
        found[f"mid.token_mask.{height}x{width}"] = token_mask(mask, height, width)
    recorded = [name for name in t if name.startswith(("mid.", "out."))]
    return worst((difference(found[name], t[name]), tolerance) for name in recorded)


@unit("vae_lora_")
def vae_lora(case: Case) -> tuple[float, float]:
    t, tolerance, model = case.tensors, case.meta["tolerance"], model_of(case)
    mean, log_variance = sampler.posterior(model, t["in.image"])
    latent = sampler.latent_of(model, mean, log_variance, lambda shape: t["in.noise"].reshape(shape))
    found = {
        "mid.mean": mean,
        "mid.logvar": log_variance,
        "out.latent": latent,
        "out.decoded": model.decoder.network(latent / model.scaling_factor),  # before the clamp
    }
    if "mid.mean_without_lora" in t:
        base = load_case(case.folder / case.meta["weights_from"])
        weights = {n: v for n, v in below(base.tensors, "w.vae.").items() if n.startswith(("encoder.", "quant_conv."))}
        model.encoder.network.load_state_dict(weights, assign=True)
        found["mid.mean_without_lora"] = sampler.posterior(model, t["in.image"])[0]
    return worst((difference(found[name], t[name]), tolerance) for name in found)


@unit("tiles_")
def patches(case: Case) -> tuple[float, float]:
    from bokeh_core.tiling import Blend

    t, tolerance, results = case.tensors, case.meta["tolerance"], []
    for name, expected in t.items():
        kind, _, rest = name.removeprefix("out.").partition(".")
        if kind == "positions":
            results.append((difference(torch.tensor(grid(*map(int, rest.split("x")))), expected), 0.0))
        elif kind in ("weight_row", "weight_col"):
            size, _, number = rest.partition(".")
            height, width = map(int, size.split("x"))
            weight = window(*grid(height, width)[int(number)], height, width)
            results.append((difference(weight[:, 300] if kind == "weight_row" else weight[300], expected), tolerance))
    for small in case.meta["small"]:
        i, height, width, patch = (small[name] for name in ("index", "h", "w", "patch"))
        places = grid(height, width, patch, small["stride"])
        windows = [window(*place, height, width, patch, small["overlap"]) for place in places]
        image, blend = t[f"in.image.{i}"], Blend((1, 3, height, width))
        for (row, column), tile, weight in zip(places, t[f"in.processed.{i}"], windows, strict=True):
            blend.add(tile, row, column, weight)
        cut = torch.stack([image[..., row : row + patch, column : column + patch] for row, column in places])
        results.append((difference(torch.tensor(places), t[f"out.pos.{i}"]), 0.0))
        results.append((difference(cut, t[f"out.patches.{i}"]), 0.0))
        results.append((difference(torch.stack(windows).reshape(t[f"out.weights.{i}"].shape), t[f"out.weights.{i}"]), tolerance))
        results.append((difference(blend.result(), t[f"out.blended.{i}"]), tolerance))
    return worst(results)


def eight_bits(picture):
    return (picture.clamp(0, 1) * 255).floor()[0].movedim(0, -1)


@unit("colour_fix_")
def colour_fix(case: Case) -> tuple[float, float]:
    t, tolerance = case.tensors, case.meta["tolerance"]["float"]
    target, source = t["in.target"], t["in.source"]
    high, low = wavelet_parts(target)
    found = {
        "out.adain": adain(target, source),
        "out.wavelet": wavelet_fix(target, source),
        "mid.wavelet_high": high,
        "mid.wavelet_low": low,
    }
    results = [(difference(found[name], t[name]), tolerance) for name in found]
    target, source = (t[f"in.{name}_u8"].movedim(-1, 0)[None] / 255 for name in ("target", "source"))
    for name, fixed in (("out.adain_u8", adain(target, source)), ("out.wavelet_u8", wavelet_fix(target, source))):
        off = (eight_bits(fixed) - t[name].float()).abs()
        results.append((float(off.max()), 1.0))
        results.append((float((off > 0).float().mean()), 1e-3))  # only where rounding straddles an integer
    return worst(results)


@unit("colorfix_")
def bokehdiff_colour_fix(case: Case) -> tuple[float, float]:
    t, tolerance, levels = case.tensors, case.meta["tolerance"], case.meta["config"]["levels"]
    content, style = t["in.content"], t["in.style"]
    high, low = wavelet_parts(content, levels)
    found = {
        "out.adain": adain(content, style),
        "out.wavelet": wavelet_fix(content, style, levels),
        "mid.content_high": high,
        "mid.content_low": low,
    }
    return worst((difference(found[name], t[name]), tolerance) for name in found)


@unit("one_step_")
def one_step(case: Case) -> tuple[float, float]:
    t, tolerance = case.tensors, case.meta["tolerance"]
    results = [(difference(sampler.one_step(t["in.latent"], t["in.eps"]), t["out.x0"]), tolerance)]
    results.append((difference(sampler.alphas_cumprod(), t["mid.alphas_cumprod"]), 1e-6))
    return worst(results)


@unit("model_forward_")
def model_forward(case: Case) -> tuple[float, float]:
    t, tolerance, model = case.tensors, case.meta["tolerance"], model_of(case)
    condition, mask = t["in.c_depth"][:, 0], (t["in.c_msk"][:, 0] + 1) / 2
    mean, log_variance = sampler.posterior(model, t["in.lq"])
    latent = sampler.latent_of(model, mean, log_variance, lambda shape: t["in.posterior_noise"].reshape(shape))
    eps = sampler.predict_eps(model, latent, condition, mask)
    x0 = sampler.one_step(latent, eps)
    embed = model.controlnet.network
    found = {
        "mid.moments": torch.cat([mean, log_variance], 1),
        "mid.latent": latent,
        "mid.cond_embedding": embed.controlnet_cond_embedding(t["in.c_depth"].expand(-1, 3, -1, -1)),
        **{f"mid.residual.{j}": one for j, one in enumerate(embed(latent, t["in.c_depth"].expand(-1, 3, -1, -1)))},
        "mid.eps": eps,
        "mid.x0": x0,
        "out.image": sampler.decoded(model, x0),
    }
    recorded = [name for name in t if name.startswith(("mid.", "out."))]
    limits = {name: tolerance["mid.residual.*" if name.startswith("mid.residual.") else name] for name in recorded}
    return worst((difference(found[name], t[name]), limits[name]) for name in recorded)


def pipeline(case: Case) -> tuple[float, float]:
    """The path of the released script, called from tests/parity/pipeline.py. Error: share of differing 8-bit values, at most 0.3 %."""
    t, model = case.tensors, model_of(case)
    photo = t["in.image"].movedim(-1, 0).float() / 255
    noise = iter(t["in.posterior_noise_f16"].float())
    conditions = conditions_of(case, case.meta["K"])
    d = conditions.frame(0)
    path = sampler.Exact(model, photo)
    coded = path.encode(lambda shape: next(noise).reshape(shape))
    picture = path.bokeh(coded, d)
    result = sampler.match_colours(picture, photo, d, "whole picture", sampler.AS_PUBLISHED)
    results = [(abs(float(conditions.focus(0)) - case.meta["focus_value"]), 1e-6)]
    results.append((float(np.abs(np.array(grid(*d.shape)) - np.array(case.meta["positions"])).max()), 0.0))
    before = (picture.clamp(0, 1) * 255).floor()[:, ::2, ::2]
    for found, name in ((before, "mid.before_colour_fix_stride2"), ((result * 255).round(), "out.image")):
        off = (found.movedim(0, -1) - t[name].float()).abs()
        results.append((float((off > 0).float().mean()), 0.003))
        results.append((float(off.max()), 3.0))
    return worst(results)
