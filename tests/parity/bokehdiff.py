"""BokehDiff: attention, maps, the one step, the whole sampler, input preparation (pisa_*, masks_*, onestep_*, e2e_*, prep_*)."""

from dataclasses import replace

import torch

from bokeh_core.checkpoints.stable_diffusion import Part
from bokeh_core.samplers.bokehdiff import checkpoint, pisa, preparation, sampler
from bokeh_core.samplers.bokehdiff.network import PisaProcessor, build_unet, build_vae, put_pisa
from bokeh_core.samplers.bokehdiff.prompt import embed_prompt

from .runner import Case, unit, worst

FLIPPED = 0.002  # share of the occlusion map's threshold decisions that may fall the other way (tolerance_note)


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        raise AssertionError(f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    return float((ours.double() - theirs.double()).abs().max())


class _Recorded:
    """Recorded random numbers: jitter [B, samples - 1, segments, N, N, 2] and, in training, which weights dropout kept."""

    def __init__(self, jitter=None, keep=None):
        self.numbers, self.keep = jitter, keep

    def jitter(self, samples, segment, image, queries, keys):
        return self.numbers[image, :, segment][:, queries, keys]

    def kept(self, probability, heads, queries, keys, images):
        return self.keep[:, :, queries][..., keys].transpose(-1, -2).view(images, heads, len(keys), len(queries))


def _published(config: dict) -> pisa.Pisa:
    return replace(
        pisa.PISA_AS_PUBLISHED,
        hardness=config["hard"],
        segments=config["segment_num"],
        samples=config["supersampling_num"],
        dropout=0.0,
    )


def _maps(t, config, behaviour, scene, draws, call=""):
    """Pairs of the recorded maps; absent ones are left out."""
    grid, tolerance = scene.grid, config["tolerance"]
    mask, blocked = pisa.dense_maps(scene, behaviour, draws)
    place = pisa.places(grid, behaviour)
    every = torch.arange(len(place))
    queries, keys = torch.cartesian_prod(every, every).unbind(-1)
    points = pisa.grid_points(grid, behaviour)
    parts = torch.linspace(0.1, 0.9, behaviour.segments).tolist()
    positions = [pisa.light_positions(scene, 0, part, points, queries, keys) for part in parts]
    ours = {
        "disp_coc_low": torch.stack([scene.disparity, scene.radius], 1).unflatten(-1, grid),
        "dist": pisa.distance(place[:, None], place[None]),
        "slope" if call in ("", "0") else "": torch.tensor(behaviour.slope),  # recorded before the first call
        f"coc_mask{call}": mask.exp()[:, None],
    }
    pairs = [(_largest(value, t[f"mid.{name}"]), tolerance) for name, value in ours.items() if f"mid.{name}" in t]
    if "mid.disp_highres" in t:  # recorded with the radius beside it, which nobody uses
        pairs.append((_largest(scene.fine[:, 0], t["mid.disp_highres"][:, 0]), tolerance))
    if "mid.P_locs" in t and positions:
        ours, theirs = torch.stack(positions).view_as(t["mid.P_locs"]), t["mid.P_locs"]
        fine = theirs.isfinite()
        far = ((ours - theirs).abs() / theirs.abs().clamp_min(1))[fine]  # positions far outside are held relatively
        pairs.append((float(far.max()), tolerance))
    if f"mid.occ_map{call}" in t:
        flipped = (blocked - t[f"mid.occ_map{call}"][:, 0]).abs() > 1e-6
        pairs.append((float(flipped.float().mean()), FLIPPED))
    return pairs, mask, blocked


@unit("masks_")
def masks(case: Case) -> tuple[float, float]:
    t, config = case.tensors, {**case.meta["config"], "tolerance": case.meta["tolerance"]}
    scene = pisa.scene_of(t["in.disp_coc"], (config["grid_h"], config["grid_w"]))
    return worst(_maps(t, config, _published(config), scene, _Recorded(t.get("in.jitter")))[0])


@unit("pisa_")
def pisa_attention(case: Case) -> tuple[float, float]:
    """One attention module of diffusers with our processor, and the dense form beside it."""
    t, config = case.tensors, {**case.meta["config"], "tolerance": case.meta["tolerance"]}
    behaviour, pairs = _published(config), []
    grid = config["grid_h"], config["grid_w"]
    calls = [""] if "in.hidden_states" in t else [str(i) for i in range(sum(name.startswith("in.hidden_states") for name in t))]
    for call, hardness in zip(calls, case.meta["processor_hard_after_each_call"], strict=True):
        scene = pisa.scene_of(t["in.disp_coc"], grid)
        keep = t.get(f"in.dropout_keep{call}")
        draws = _Recorded(t.get(f"in.jitter{call}"), None if keep is None else keep.view(scene.radius.shape[0], -1, *keep.shape[-2:]))
        behaviour = replace(behaviour, dropout=0.0 if keep is None else 0.1)
        attention = _attention(t, config)
        processor = PisaProcessor()
        put_pisa(attention, processor)
        processor.grid, processor.pisa, processor.draws = grid, behaviour, draws
        states, context = t[f"in.hidden_states{call}"], t.get("in.encoder_hidden_states")
        if context is None:
            found, mask, blocked = _maps(t, config, behaviour, scene, draws, call)
            recorded = t[f"mid.occ_map{call}"][:, 0] if f"mid.occ_map{call}" in t else blocked
            processor.blocks = _believing(recorded, pisa.scene_blocks(scene, behaviour, draws), blocked, grid)
            dense = _dense(attention, states, (mask, recorded), behaviour, draws)
            pairs += [*found, (_largest(dense, t[f"out.hidden_states{call}"]), config["tolerance"])]
        with torch.no_grad():
            ours = attention(states, encoder_hidden_states=context)
        pairs.append((_largest(ours, t[f"out.hidden_states{call}"]), config["tolerance"]))
        if context is None:
            behaviour = behaviour.harder()
        pairs.append((abs(behaviour.hardness - hardness), 0.0))
    return worst(pairs)


def _attention(t, config):
    from diffusers.models.attention_processor import Attention

    attention = Attention(
        config["query_dim"],
        config["cross_attention_dim"],
        heads=config["heads"],
        dim_head=config["dim_head"],
    )
    attention.load_state_dict({name[2:]: tensor for name, tensor in t.items() if name.startswith("w.")})
    return attention.eval()


def _believing(recorded, blocks, blocked, grid):
    """The blocks with the recorded occlusion, where threshold decisions fell the other way; else as they are."""
    if not ((recorded - blocked).abs() > 1e-6).any():
        return blocks
    number = torch.arange(blocked.shape[-1]).view(grid)
    return [
        replace(
            one,
            passed=1
            - recorded[:, number[one.query_rows, one.query_columns].flatten()][
                ..., number[one.key_rows, one.key_columns].flatten()
            ].transpose(-1, -2),
        )
        for one in blocks
    ]


@torch.no_grad()
def _dense(attention, states, maps, behaviour, draws):
    layers = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (layer(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for layer in layers)
    out = pisa.dense_attention(q, k, v, maps, behaviour, draws)
    return attention.to_out[0](out.transpose(1, 2).flatten(2))


@unit("onestep_")
def onestep(case: Case) -> tuple[float, float]:
    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance"]
    scheduler = config["scheduler"]
    table = _table(scheduler)
    ours = sampler.one_step(t["in.latents"], t["in.noise_pred"], float(table[config["T"]]))
    return worst(
        [
            (_largest(table, t["mid.alphas_cumprod"]), tolerance),
            (_largest(table[config["T"]].view_as(t["mid.alpha_T"]), t["mid.alpha_T"]), tolerance),
            (_largest(ours, t["out.x0_pipeline"]), tolerance),
            (_largest(ours, t["out.x0_training"]), tolerance),
        ]
    )


def _table(scheduler):
    return sampler.alpha_bar(scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"])


@unit("e2e_")
@torch.no_grad()
def e2e(case: Case) -> tuple[float, float]:
    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance"]

    def table(name):
        return {key.removeprefix(f"w.{name}."): value for key, value in t.items() if key.startswith(f"w.{name}.")}

    encoders = (Part(table(name), config[name]) for name in ("text_encoder", "text_encoder_2"))
    text, pooled = embed_prompt(*encoders, ids=(t["in.input_ids_1"], t["in.input_ids_2"]))
    unet = build_unet(config["unet"], checkpoint.merge(table("unet"), table("lora"), case.name))
    # Without tiling the VAE's own limit must be out of reach.
    settings = config["vae"] if config["vae_tiling"] else {**config["vae"], "sample_size": 1 << 16}
    vae = build_vae(settings, checkpoint.replace_encoder(table("vae"), table("vae_ckpt"), case.name))
    cpu = torch.device("cpu")
    model = checkpoint.BokehDiff(checkpoint.Placed(unet, cpu, torch.float32), checkpoint.Placed(vae, cpu, torch.float32), text, pooled)
    fidelity = replace(sampler.AS_PUBLISHED, pisa=_published(config))
    draws = _Recorded(t["in.jitter"][None]) if "in.jitter" in t else None
    side, vae_tile = config["tile_size_latent"], settings["sample_size"]

    recorded = {"ids": [], "noise": [], "pisa": []}
    unet.register_forward_hook(lambda _, given, noise: (recorded["ids"].append(given[4]), recorded["noise"].append(noise)) and None)
    first = unet.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    first.register_forward_hook(lambda _, given, states: recorded["pisa"].append(states) and None)

    latents = sampler.encode(model, t["in.image"], vae_tile)
    noise = sampler.predict_noise(model, latents, t["in.disp_coc"], fidelity, side, draws, timestep=config["timestep"])
    clean = sampler.one_step(latents, noise, float(_table(config["scheduler"])[config["timestep"]]))
    picture = sampler.decode(model, clean, vae_tile)
    ids = torch.cat(recorded["ids"])
    levels = (sampler.finish(picture, _size(picture), fidelity)[0].movedim(0, -1) * 255).round()
    pairs = [
        (_largest(text, t["mid.prompt_embeds"]), tolerance),
        (_largest(pooled, t["mid.pooled"]), tolerance),
        (_largest(ids, torch.unique_consecutive(t["mid.time_ids"], dim=0)), tolerance),
        (_largest(latents, t["mid.latents_in"]), tolerance),
        (_largest(recorded["pisa"][0], t["mid.pisa_attn1_block0_out_first_call"]), tolerance),
        (_largest(recorded["noise"][0], t["mid.unet_out_0"]), tolerance),
        (_largest(noise, t["mid.noise_pred"]), tolerance),
        (_largest(clean, t["mid.x0_latents"]), tolerance),
        (_largest(picture, t["out.image"]), tolerance),
        (max(_largest(levels, t["out.image_uint8"]) - 1, 0.0), 0.0),  # cut, not rounded: may fall to the neighbour
    ]
    # The condition itself, from the recorded signed defocus.
    radius = (t["in.defocus_signed"] + config["var_cr"]).abs() * config["K"] / 10
    pairs.append((_largest(torch.cat([t["in.disparity"], radius], 1), t["in.disp_coc"]), tolerance * config["K"] / 10))
    return worst(pairs)


def _size(picture):
    return sampler.Condition(picture, picture, picture, tuple(picture.shape[-2:]))


@unit("prep_")
def prep(case: Case) -> tuple[float, float]:
    """Maps to 1e-5, pixels to one 8-bit level, as the tolerance note words it."""
    t = case.tensors
    ours = preparation.prepare(
        t["in.image_u8"].numpy(), t["in.depth_npy"].numpy(), t["in.mask_u8"].numpy(), case.meta["config"]["upsample"]
    )
    return worst(
        [
            (_largest(ours.pixels, t["out.pixel_values"]), 2 / 255),
            (_largest(ours.disparity, t["out.disparity"]), 1e-5),
            (_largest(ours.defocus, t["out.defocus_strength"]), 1e-5),
            (abs(ours.focus - float(t["out.disp_focus"])), 1e-5),
            (_largest(preparation.focus_shifts(ours.defocus), t["out.focus_shifts"]), 1e-5),
        ]
    )
