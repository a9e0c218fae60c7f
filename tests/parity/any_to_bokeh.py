"""Any-to-Bokeh: networks, preparation, weighted overlap, whole pipeline."""

from dataclasses import replace

import torch

from bokeh_core.samplers.any_to_bokeh import checkpoint, fuser, image_encoder, mpi, preparation, sampler
from bokeh_core.video import segments

from .runner import Case, load_case, unit, worst


def weights(tensors, prefix="w."):
    """The weights of a case in float32, without the prefix; they are stored in float16 where that is exact."""
    return {name[len(prefix) :]: tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}


def error(ours, theirs):
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).abs().max())


def off_by_one(ours, theirs, share):
    """(error, tolerance) of integer maps that may differ by one at a share of the pixels."""
    step = (ours.int() - theirs.int()).abs()
    return (float((step > 0).double().mean()), share) if int(step.max()) <= 1 else (float(step.max()), share)


@unit("mpi_region_")
def mpi_region(case: Case) -> tuple[float, float]:
    t = case.tensors
    disparity = t["in.disparity_u8"].float()[None] / 255
    pairs = []
    for one in case.meta["config"]["cases"]:
        focus = torch.tensor([one["f"]], dtype=torch.float64)
        index, planes = one["index"], one["segments"]
        pairs.append((error(mpi.borders(one["f"], one["alpha"], planes)[1:-1], t[f"mid.thresholds.{index}"][1:-1]), 1e-6))
        pairs.append(off_by_one(mpi.regions(disparity, focus, one["alpha"], planes)[0], t[f"out.region.{index}"], 1e-3))
        pairs.append((error(preparation.disparity_difference(disparity, focus)[0], t[f"out.coc.{index}"]), 1e-6))
    return worst(pairs)


def fuser_of(case, tensors):
    config = case.meta["config"]
    with torch.device("meta"):
        network = fuser.Fuser(config["query_dim"], config["n_heads"], config["context_dim"])
    return checkpoint.load_strict(network, tensors, case.name)


@unit("mpi_attention_")
def mpi_attention(case: Case) -> tuple[float, float]:
    """Through the visual tokens, and where the mask is zero also without them."""
    t, config = case.tensors, case.meta["config"]
    network = fuser_of(case, weights(t))
    clips, frames = t["in.K"].shape
    k = fuser.embed_k(t["in.K"], "float32").flatten(0, 1)
    condition = fuser.Condition(frames, k.new_zeros(len(k), 1), k)
    mask = t.get("in.mask", torch.zeros(clips, frames, *config["mask_pixel_hw"])).float()
    masked = fuser.Condition(frames, k.new_zeros(len(k), 1), k, visual=t["in.mpi_cond"], mask=mask)
    with torch.no_grad():
        pairs = [(error(network(t["in.x"], masked), t["out.y"]), case.meta["tolerance"])]
        _, seen = network.visual_tokens(t["in.x"], masked)
        pairs.append((error(seen[:, t["in.x"].shape[1] :], t["mid.key_mask_visual_tokens"]), 0.0))
        pairs.append((error(t["in.x"] + network.k_encoder(k)[:, None], t["mid.x_plus_k"]), case.meta["tolerance"]))
        if not mask.any():
            pairs.append((error(network(t["in.x"], condition), t["out.y"]), case.meta["tolerance"]))
    return worst(pairs)


@unit("k_embedding_")
def k_embedding(case: Case) -> tuple[float, float]:
    """The tolerances are given as prose; these are its numbers."""
    t = case.tensors
    encoder = torch.nn.Linear(t["w.k_encoder.weight"].shape[1], t["w.k_encoder.weight"].shape[0])
    encoder.load_state_dict({"weight": t["w.k_encoder.weight"].float(), "bias": t["w.k_encoder.bias"].float()})
    pairs = []
    for table, name, tolerance in (("float32", "fp32", 2e-5), ("float16", "fp16", 2e-3), ("autocast", "autocast", 2e-5)):
        embedding = fuser.embed_k(t["in.K"], table)
        pairs.append((error(embedding, t[f"out.embedding_{name}"]), tolerance))
        if f"out.k_term_{name}" in t:
            with torch.no_grad():
                term = encoder(embedding.float()).flatten(0, 1)[:, None]
            pairs.append((error(term, t[f"out.k_term_{name}"]), 1e-2 if name == "fp16" else 2e-5))
    return worst(pairs)


@unit("transformer_")
def transformer(case: Case) -> tuple[float, float]:
    from bokeh_core.samplers.any_to_bokeh.network import FusedTransformer, use_mixers

    t, config = case.tensors, case.meta["config"]
    with torch.device("meta"):
        network = FusedTransformer(
            config["heads"],
            config["dim"] // config["heads"],
            config["dim"],
            num_layers=config["num_layers"],
            cross_attention_dim=config["cross_attention_dim"],
        )
        for block in network.transformer_blocks:
            block.fuser = fuser.Fuser(config["dim"], config["heads"], config["context_dim"])
    use_mixers(network)
    checkpoint.load_strict(network, weights(t), case.name)
    frames = config["frames"]
    visual = {}
    if "in.mask" in t:
        visual = {"visual": t["in.mpi_cond"], "mask": t["in.mask"].float()}
    k = fuser.embed_k(t["in.K"], "float32").flatten(0, 1)
    condition = fuser.Condition(frames, t["in.context"][:, 0], k, released_order=True, **visual)
    with torch.no_grad():
        (y,) = network(t["in.x"], condition)
    return error(y, t["out.y"]), case.meta["tolerance"]


@unit("unet_tiny_")
def unet_tiny(case: Case) -> tuple[float, float]:
    """As it runs for users, without what never matters; and whole, with the visual tokens behind their mask of zeros."""
    from bokeh_core.samplers.any_to_bokeh.network import drop_unused

    t, tolerance = case.tensors, case.meta["tolerance"]
    network = checkpoint.build_unet(case.meta["config"], weights(t), what=case.name)
    given = (t["in.ref_latents"], t["in.coc_latents"], t["in.context"][:, 0], t["in.K"])
    how = {"k_table": "float32", "released_order": True, "added_ids": t["in.added_time_ids"]}
    nothing = torch.full_like(t["in.mpi_region"], sampler.ZERO_MASK)
    with torch.no_grad():
        whole = network(*given, **how, region=nothing)
        live = drop_unused(network)(*given, **how)
    return worst([(error(whole, t["out.pred"]), tolerance), (error(live, t["out.pred"]), tolerance)])


@unit("vae_tiny_")
def vae_tiny(case: Case) -> tuple[float, float]:
    t, tolerance, chunk = case.tensors, case.meta["tolerance"], case.meta["chunk"]
    encoder, decoder = vae(weights(t))
    with torch.no_grad():
        mean, std, residuals = encoder(t["in.images"])
        residuals = [encoder.first_residual(t["in.images"]), *residuals]
        to_decode = t["in.latents_to_decode"]

        def decode(size, skips):
            starts = range(0, len(to_decode), size)
            return torch.cat([decoder(to_decode[i : i + size], [r[i : i + size] for r in skips]) for i in starts])

        pairs = [
            (error((mean + std * t["in.noise"]) * preparation.SCALE, t["out.latents_scaled"]), tolerance),
            (error(decode(chunk, residuals), t["out.decoded_chunked"]), tolerance),
            (error(decode(len(to_decode), residuals), t["out.decoded_one_chunk"]), tolerance),
            (error(decode(len(to_decode), [torch.zeros_like(r) for r in residuals]), t["out.decoded_zero_skip"]), tolerance),
            *((error(r[:1], t[f"mid.residual_{i}_frame0"]), tolerance) for i, r in enumerate(residuals)),
        ]
    return worst(pairs)


def vae(tensors):
    """(encoder, decoder) of tensors under the names of the release."""
    config = checkpoint.vae_config(tensors)
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    decoder = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    return checkpoint.build_encoder(config, encoder), checkpoint.build_decoder(config, decoder)


@unit("clip_resize_")
def clip_resize(case: Case) -> tuple[float, float]:
    t, tolerance = case.tensors, case.meta["tolerance"]
    size, _ = case.meta["config"]["size"]
    plain = image_encoder.prepare(t["in.images"], size)
    return worst(
        [
            (error(plain * 2 - 1, t["out.resized"]), tolerance),
            (error(plain, t["out.clip_input_inference"]), tolerance),
            (error(image_encoder.prepare(t["in.images"], size, normalise=True), t["out.clip_input_training"]), tolerance),
        ]
    )


@unit("wois_")
def wois(case: Case) -> tuple[float, float]:
    """Blended latents by the plain definition and by the stream, weights, and the windows that are decoded."""
    t, tolerance, half = case.tensors, case.meta["tolerance"], case.meta["config"]["overlap"]
    pairs = []
    for one in case.meta["cases"]:
        frames = one["frames"]
        if "reference_fails" in one:
            assert sum(len(range(2 * half)[keep]) for _, keep, _ in segments.decode_windows(frames, half)) == frames
            continue
        latents = t[f"in.latents.{frames}"]
        pairs.append((error(segments.overlap_weights(frames, half), t[f"mid.weights.{frames}"]), tolerance))
        sizes = (segments.segment_frames(frames, half) >= 0).sum(1).tolist()
        assert sizes == one["segment_sizes"] and len(sizes) == one["segments"]
        pairs.append((error(segments.blend(latents, frames), t[f"out.frames.{frames}"]), tolerance))

        def recorded(first, two, latents=latents):
            return list(latents[first : first + len(two)])

        windows = list(segments.stream(range(frames), frames, recorded, half=half))
        pairs.append((error(torch.cat([w.latents[w.keep] for w in windows]), t[f"out.frames.{frames}"]), tolerance))
        calls = [call for batch in one["decode_calls_per_batch"] for call in batch]
        assert [len(w.latents) for w in windows] == [call["latents"] for call in calls]
        plan = segments.decode_windows(frames, half)  # the release counts a window's start in the pictures of its pair
        assert [0 if blended else 2 * half for _, _, blended in plan] == [call["start_frame"] for call in calls]
    return worst(pairs)


@unit("loader_")
def loader(case: Case) -> tuple[float, float]:
    """One frame at a time, as a clip is read, then put in segments; places that are filled up hold zeros."""
    t, config = case.tensors, case.meta["config"]
    size, half = tuple(config["sample_size"]), config["overlap"]
    disparity, focus = t["in.disparity_u8"].float() / 255, t["in.zf"]
    names = [preparation.read_name(name) for name in case.meta["file_names"]]
    k = [named if named is not None else config["K"] for _, _, named in names]
    frames = len(disparity)
    ours = {
        "pixel_values": preparation.resize(t["in.frames_u8"].movedim(-1, 1).float() / 255, size) * 2 - 1,
        "coc_channel0": preparation.resize(preparation.disparity_difference(disparity, focus), size) * 2 - 1,
        "region_u8": preparation.resize_regions(mpi.regions(disparity, focus, config["alpha"]), size),
        "K": torch.tensor(k, dtype=torch.float32),
    }
    places = segments.segment_frames(frames, half)

    def in_segments(values):
        filled = torch.cat([values, torch.zeros_like(values[:1])])  # place -1
        return filled[places]

    pairs = [(error(segments.overlap_weights(frames, half), t["out.weight"]), 1e-6)]
    pairs += [(abs(name[1] - float(f)), 1e-5) for name, f in zip(names, focus, strict=True)]
    pairs += [(error(in_segments(ours[name]), t[f"out.{name}"]), 1e-4) for name in ("pixel_values", "coc_channel0")]
    pairs.append((error(in_segments(ours["K"]), t["out.K"]), 1e-6))
    pairs.append(off_by_one(in_segments(ours["region_u8"]), t["out.region_u8"], 5e-3))
    return worst(pairs)


@unit("focus_from_mask_")
def focus_from_mask(case: Case) -> tuple[float, float]:
    t = case.tensors
    disparity, focus = preparation.focus_from_masks(t["in.depth"], t["in.masks_u8"])
    expected = [preparation.read_name(name) for name in case.meta["out_file_names"]]
    assert [index for index, _ in focus] == [index for index, _, _ in expected]
    return worst(
        [
            off_by_one(disparity[[index for index, _ in focus]], t["out.disparity_u8"], 1e-3),
            *((abs(ours - theirs), 1e-5) for (_, ours), (_, theirs, _) in zip(focus, expected, strict=True)),
        ]
    )


@unit("schedules_")
def schedules(case: Case) -> tuple[float, float]:
    config = case.meta["config"]
    pairs = []
    for length in config["lengths"]:
        focus = preparation.rack_focus(config["focus_grey"], length)
        pairs.append((error(focus, case.tensors[f"out.focus.{length}"]), case.meta["tolerance"]))
        pairs.append((error(preparation.k_ramp(length), case.tensors[f"out.k.{length}"]), 0.0))
    return worst(pairs)


def pipeline(case: Case) -> tuple[float, float]:
    """Frames to frames, as a stream that encodes every frame once, with the recorded draws. The tolerances are given as prose."""
    t, config = case.tensors, case.meta["config"]
    tensors = t if case.meta["weights_from"] == case.name else load_case(case.folder / case.meta["weights_from"]).tensors
    parts = {name: weights(tensors, f"w.{name}.") for name in ("unet", "vae", "image_encoder")}
    unet = checkpoint.build_unet(config["unet"], parts["unet"])
    clip_config = checkpoint.encoder_config(parts["image_encoder"], config["image_encoder"]["num_attention_heads"])
    networks = (unet, *vae(parts["vae"]), checkpoint.build_image_encoder(clip_config, parts["image_encoder"]))
    model = sampler.AnyToBokeh(*(checkpoint.Network(network, torch.device("cpu"), torch.float32) for network in networks))

    fidelity = replace(sampler.AS_PUBLISHED, k_table="float32")
    places = segments.segment_frames(len(t["in.zf"]), config["decode_chunk"] // 2)
    count = int(places.max()) + 1
    k = torch.zeros(count)
    k[places[places >= 0]] = t["in.K"][places >= 0]
    frames = list(
        sampler.prepared(
            t["in.frames_u8"].movedim(-1, 1).float() / 255,
            t["in.disparity_u8"].float() / 255,
            t["in.zf"],
            k.double() * config["size"][1] / preparation.PUBLISHED_SIZE[1],
            range_=(0.0, 1.0),
            size=tuple(config["size"]),
            fidelity=fidelity,
        )
    )
    predicted = []
    with torch.no_grad():
        embeds = torch.stack([model.encode(frame, fidelity).clip for frame in frames])
        pieces = sampler.stream_shot(
            model,
            frames,
            count,
            fidelity,
            noise=lambda first, shape: tuple(t[f"in.noise_{name}"][first : first + shape[0]] for name in ("ref", "coc")),
            half=config["decode_chunk"] // 2,
            on_prediction=predicted.extend,
        )
        pictures = torch.cat([piece.frames for piece in pieces])
    levels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round()
    return worst(
        [
            (error(embeds[places[places >= 0]], t["mid.image_embeds"][places >= 0]), 1e-4),
            (error(torch.stack(predicted), t["mid.unet_pred"]), 2e-4),
            (error(pictures, t["out.frames_before_clamp"]), 1e-3),
            (max(error(levels, t["out.frames_u8"]) - 1, 0.0), 0.0),  # levels may be off by one
        ]
    )
