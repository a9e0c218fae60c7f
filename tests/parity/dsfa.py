"""DSFA on Depth Anything V2 and on UniDepthV2 (dsfa_*, dav2_dsfa_*, udv2_*), and depth from a sweep of apertures (ols_*)."""

import torch

from bokeh_core.checkpoints.loading import load_strict
from bokeh_core.depth import refine, sweep, unidepth
from bokeh_core.depth.checkpoint import DepthModel, DepthModelInfo, build
from bokeh_core.depth.dpt import DPTConfig
from bokeh_core.depth.dsfa import DepthAnythingDSFAConfig, DSFAAttention, DSFABlock, DSFAConfig, fuse
from bokeh_core.depth.vit import ViTConfig

from .depth import off, weights
from .runner import Case, unit, worst


def loaded(make, case: Case, prefix: str = ""):
    with torch.device("meta"):
        module = make()
    return load_strict(module, {prefix + name: tensor for name, tensor in weights(case).items()}, "the case")


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape, f"{list(ours.shape)} instead of {list(expected.shape)}"
    return float(((ours - expected).abs() / expected.abs().clamp(min=1e-12)).max())


def is_squared(scale: str) -> bool:
    return scale.replace(" ", "") == "1/head_dim"


@unit("dsfa_mhsa_")
def attention(case: Case) -> tuple[float, float]:
    t, c = case.tensors, case.meta["config"]
    errors = []
    for squared, name in ((True, "fused_kernel_no_bias"), (False, "plain_no_bias")):
        module = loaded(lambda s=squared: DSFAAttention(c["embed_dim"], c["num_heads"], squared_scale=s), case)
        errors.append(off(module(t["in.x"]), t[f"out.{name}"]))
        for flag in ("fused_flag", "plain"):
            errors.append(off(module(t["in.x"], t["in.bias"]), t[f"out.{flag}_with_bias"]))
        errors.append(off(module(t["in.x"], t["in.bias"], queries=1), t["out.plain_with_bias"][:, :1]))
    return max(errors), case.meta["tolerance"]


@unit("dsfa_block_")
def block(case: Case) -> tuple[float, float]:
    """Every step, the dense form, and the form users run."""
    t, c = case.tensors, case.meta["config"]
    nested = "w.focus_film.0.weight" in t
    config = DSFAConfig((0,), c["num_heads"], c["alibi_scale"], squared_space_scale=c["use_sdpa"], nested_film=nested)
    module = loaded(lambda: DSFABlock(c["embed_dim"], config), case)
    reference, stack, k = t["in.ref"], t["in.stack"], t.get("in.k")
    caught = {}
    for name in ("space_attn", "focus_attn", "focus_film"):
        getattr(module, name).register_forward_hook(lambda m, inputs, output, name=name: caught.__setitem__(name, output))
    dense = module.dense(reference, stack, k)
    tokens = module.k_tokens(module.strengths(stack, k), reference)
    frames = torch.cat([reference[:, None], stack], dim=1)
    space = module.space(frames.flatten(0, 1), tokens.flatten(0, 1))[:, 1:]
    film = module.film(space, tokens.flatten(0, 1)).unflatten(0, frames.shape[:2])
    pairs = {
        "mid.k_values": module.strengths(stack, k)[..., None],
        "mid.k_tokens": tokens,
        "mid.film_raw": caught["focus_film"].view(t["mid.film_raw"].shape),
        "mid.space_attn_out": caught["space_attn"],
        "mid.after_space": space.unflatten(0, frames.shape[:2]),
        "mid.after_film_patch_major": film.transpose(1, 2).flatten(0, 1),
        "mid.focus_attn_out": caught["focus_attn"],
        "mid.all_frames_out": dense,
        "out.ref": dense[:, 0],
    }
    errors = [off(ours, t[name]) for name, ours in pairs.items() if name in t]
    caught.clear()
    errors.append(off(module(reference, stack, k), t["out.ref"]))
    return max(errors), case.meta["tolerance"]


def depth_anything(case: Case) -> DepthModel:
    c = case.meta["config"]
    vit = c["vit"]
    fused = c["use_sdpa"]  # on a CPU; on CUDA the transformer too
    config = ViTConfig(
        width=vit["embed_dim"],
        depth=vit["depth"],
        heads=vit["num_heads"],
        taps=tuple(c["intermediate_layer_idx"]),
        grid=vit["img_size"] // vit["patch_size"],
        patch=vit["patch_size"],
        mlp_ratio=vit["mlp_ratio"],
        position_offset=vit["interpolate_offset"],
        squared_scale=is_squared(c.get("vit_attention_logit_scale", "")),
    )
    squared = is_squared(c["dsfa_space_attention_logit_scale"]) if "dsfa_space_attention_logit_scale" in c else fused
    dsfa = DSFAConfig(tuple(c["fusion_layers"]), c["num_heads"], c["alibi_scale"], squared, nested_film=True)
    head = DPTConfig(config.width, c["features"], tuple(c["out_channels"]))
    whole = DepthAnythingDSFAConfig(config, head, c["max_depth"], dsfa)
    info = DepthModelInfo("of a case", "custom", False, True, c["max_depth"], case.name, whole)
    return DepthModel(build(info, weights(case)), info, torch.device("cpu"), torch.float32)


@unit("dav2_dsfa_")
def dav2_dsfa(case: Case) -> tuple[float, float]:
    t, m, tolerance = case.tensors, depth_anything(case), case.meta["tolerance"]
    network = m.network
    if "in.bgr_uint8" in t:
        picture = t["in.bgr_uint8"].flip(-1).movedim(-1, 0).float() / 255
        stack = [one.flip(-1).movedim(-1, 0).float() / 255 for one in t["in.stack_bgr_uint8"]]
        features = refine.encode(m, picture, stack, resolution=case.meta["config"]["input_size"])
        return off(refine.decode(m, features, t["in.k"]).depth, t["out.depth"]), tolerance
    pixels = t["in.pixels"]
    taps = network.encode(pixels)
    errors = [off(tap[:, 0], t[f"mid.tap{i}_cls"]) for i, tap in enumerate(taps)]
    errors += [off(tap[:, 1:], t[f"mid.tap{i}_patch"]) for i, tap in enumerate(taps)]
    errors += [] if "in.stack" in t else [off(network(pixels), t["out.depth"])]
    if "in.stack" in t:
        count = t["in.stack"].shape[:2]
        stack = [tap[:, 1:].unflatten(0, count) for tap in network.encode(t["in.stack"].flatten(0, 1))]
        taps = fuse(network.blocks, taps, {tap: stack[tap] for tap in network.blocks}, t["in.k"])
        errors += [off(taps[tap][:, 1:], t[f"mid.fused_tap{tap}"]) for tap in network.blocks]
    errors += [off(network.depth(taps, pixels.shape[-2:]), t["out.depth"])]
    return max(errors), tolerance


def unidepth_config(case: Case) -> unidepth.UniDepthConfig:
    vit, c = case.meta["config"]["vit"], case.meta["config"]["model"]
    offset = vit["interpolate_offset"]
    config = ViTConfig(
        width=vit["embed_dim"],
        depth=vit["depth"],
        heads=vit["num_heads"],
        taps=tuple(i - 1 for i in c["idx"]),
        grid=vit["img_size"] // vit["patch_size"],
        patch=vit["patch_size"],
        final_norm_eps=vit["final_norm_eps"],
        position_offset=offset or None,
        unused_registers=next((t.shape[1] for name, t in case.tensors.items() if name.endswith("register_tokens")), 0),
    )
    dsfa = DSFAConfig(tuple(c["fusion"]), c["fheads"], c["alibi"], squared_space_scale=c["sdpa"])
    return unidepth.UniDepthConfig(
        config, dsfa, c["hidden"], c["heads"], depths=tuple(c["depths"]), ratio=tuple(c["ratio"]), pixels=tuple(c["pix"])
    )


def uni_model(case: Case) -> DepthModel:
    config = unidepth_config(case)
    info = DepthModelInfo("of a case", "custom", False, True, None, case.name, config)
    return DepthModel(build(info, weights(case)), info, torch.device("cpu"), torch.float32)


def fused(network, t: dict) -> list[torch.Tensor]:
    taps = network.encode(t["in.pixels"])
    if "in.stack" not in t:
        return taps
    stack = [tap[:, 1:].unflatten(0, t["in.stack"].shape[:2]) for tap in network.encode(t["in.stack"].flatten(0, 1))]
    return fuse(network.blocks, taps, {tap: stack[tap] for tap in network.blocks}, t.get("in.k"))


@unit("udv2_encoder_")
def encoder(case: Case) -> tuple[float, float]:
    t = case.tensors
    with torch.device("meta"):
        network = unidepth.UniDepth(unidepth_config(case))
    load_strict(network.pixel_encoder, weights(case), "the case")
    rows = t["in.pixels"].shape[-2] // network.config.vit.patch
    plain, errors = network.encode(t["in.pixels"]), []
    for i, (before, after) in enumerate(zip(plain, fused(network, t), strict=True)):
        errors += [off(before[:, 1:].unflatten(1, (rows, -1)), t[f"mid.plain_stage{i}"])]
        errors += [off(after[:, 1:].unflatten(1, (rows, -1)), t[f"out.stage{i}"]), off(after[:, :1], t[f"out.cls{i}"])]
    return max(errors), case.meta["tolerance"]


@unit("udv2_camera_head_")
def camera_head(case: Case) -> tuple[float, float]:
    t, c = case.tensors, case.meta["config"]
    size = (c["H"], c["W"])
    vit = ViTConfig(8, 4, 2, (0, 1, 2, 3))
    config = unidepth.UniDepthConfig(vit, hidden=c["hidden_dim"], heads=c["num_heads"], expansion=c["expansion"])
    head = loaded(lambda: unidepth.CameraHead(config, torch.nn), case)
    camera = head(t["in.tokens"], size)
    matrix = unidepth.matrix(camera)
    view = unidepth.rays(matrix, size)
    grid = (size[0] // c["patch"], size[1] // c["patch"])
    embedding = unidepth.ray_embedding(view, grid, c["hidden_dim"])
    pairs = [(camera, "fx_fy_cx_cy"), (matrix, "K"), (view.flatten(2).transpose(1, 2), "rays"), (embedding, "ray_embedding")]
    return max(off(ours, t[f"out.{name}"]) for ours, name in pairs), case.meta["tolerance"]


@unit("udv2_whole_")
def whole(case: Case) -> tuple[float, float]:
    t, m, tolerance = case.tensors, uni_model(case), case.meta["tolerance"]
    network, caught = m.network, {}
    head = network.pixel_decoder.depth_layer
    head.register_forward_pre_hook(lambda m, inputs: caught.update({"ray_embedding": inputs[1]}))
    head.prompt_camera[0].layers[0].register_forward_hook(lambda m, i, output: caught.update({"prompted0": output}))
    head.to_latents.register_forward_hook(lambda m, i, output: caught.update({"latents0": output}))
    head.ups[0].register_forward_hook(lambda m, i, output: caught.update({"up0": output}))
    head.to_depth_hr.register_forward_hook(lambda m, i, output: caught.update({"logdepth_raw": output}))
    taps = fused(network, t)
    size = t["in.pixels"].shape[-2:]
    camera = unidepth.matrix(t["in.fx_fy_cx_cy"][None]) if "in.fx_fy_cx_cy" in t else None
    p = network.decode(taps, size, camera)
    rows = size[0] // network.config.vit.patch
    latents = caught["latents0"].transpose(1, 2).unflatten(2, (rows, -1))
    others = [(caught[name], f"mid.{name}") for name in caught]
    others += [(tap[:, 1:].unflatten(1, (rows, -1)), f"mid.feature{i}") for i, tap in enumerate(taps)]
    others += [(p.depth[:, None], "out.depth"), (p.error[:, None], "out.confidence"), (p.intrinsics, "out.intrinsics")]
    others += [(latents, "out.depth_features")]
    pairs = [(off(ours, t[name]), tolerance["others"]) for ours, name in others if name in t]
    pairs += [(off(p.rays, t["out.rays"]), tolerance["rays"])]
    pairs += [(relative(p.radius[:, None], t["out.radius"]), tolerance["radius_relative"])]
    return worst(pairs)


@unit("udv2_infer_")
def infer(case: Case) -> tuple[float, float]:
    t, m, tolerance, quirks = case.tensors, uni_model(case), case.meta["tolerance"], unidepth.INFER
    pictures, stack = t["in.rgb_uint8"].float() / 255, t["in.stack_uint8"].float() / 255
    level = case.meta["config"].get("resolution_level")
    bounds = unidepth.level_pixels(level, m.info.config.pixels) if level is not None else None
    pairs = []
    for i, picture in enumerate(pictures):
        camera = t["in.K"][min(i, len(t["in.K"]) - 1)] if "in.K" in t else None
        features = refine.encode(m, picture, stack[i], quirks=quirks, pixels=bounds)
        found = refine.decode(m, features, t["in.k"][i], camera=camera)
        fit = features.fit
        pairs += [(off(unidepth.network_input(picture[None], fit, quirks), t["mid.net_input"][i : i + 1]), tolerance["net_input"])]
        pairs += [(off(unidepth.network_input(stack[i], fit, quirks), t["mid.net_stack"][i]), tolerance["net_input"])]
        if camera is not None and "mid.net_K" in t:
            ours = unidepth.network_camera(camera, fit, quirks)
            pairs += [(relative(ours, t["mid.net_K"][i : i + 1]), tolerance["intrinsics_relative"])]
        pairs += [(relative(found.depth, t["out.depth"][i, 0]), tolerance["depth_relative"])]
        pairs += [(relative(found.radius, t["out.radius"][i, 0]), tolerance["depth_relative"])]
        pairs += [(relative(found.error, t["out.confidence"][i, 0]), tolerance["depth_relative"])]
        pairs += [(off(found.rays, t["out.rays"][i]), tolerance["rays"])]
        pairs += [(relative(found.estimated, t["out.intrinsics"][i]), tolerance["intrinsics_relative"])]
        if "out.points" in t:
            points = found.rays * found.radius
            scale = float(t["out.points"][i].abs().max())
            pairs += [(off(points, t["out.points"][i]) / scale, tolerance["depth_relative"])]
    return worst(pairs)


@unit("udv2_pipeline_")
def pipeline(case: Case) -> tuple[float, float]:
    t, m, tolerance, quirks = case.tensors, uni_model(case), case.meta["tolerance"], unidepth.PIPELINE
    picture = t["in.rgb_uint8"].movedim(-1, 0).float() / 255
    stack = t["in.stack_uint8"].movedim(-1, 1).float() / 255
    features = refine.encode(m, picture, stack, quirks=quirks)
    camera = unidepth.network_camera(unidepth.made_up_camera(*picture.shape[1:]), features.fit, quirks)
    pairs = [(off(unidepth.network_input(picture[None], features.fit, quirks), t["mid.net_input"]), tolerance["net_input"])]
    pairs += [(relative(camera, t["mid.net_K"]), 1e-5)]
    taps = fuse(m.network.blocks, features.taps, features.stack, t["in.k"][None])
    at_network = m.network.decode(taps, features.fit.network, camera, quirks)
    pairs += [(relative(at_network.depth[:, None], t["mid.net_depth"]), tolerance["depth_relative"])]
    pairs += [(relative(refine.decode(m, features, t["in.k"]).depth, t["out.depth"]), tolerance["depth_relative"])]
    return worst(pairs)


@unit("udv2_padding_rules")
def padding(case: Case) -> tuple[float, float]:
    t, c = case.tensors, case.meta["config"]
    vit = ViTConfig(8, 4, 2, (0, 1, 2, 3), patch=c["multiple"])
    config = unidepth.UniDepthConfig(vit, ratio=tuple(c["ratio_bounds"]), pixels=tuple(c["pixels_bounds"]))
    fits = [unidepth.fit(h, w, config, unidepth.INFER) for h, w in t["in.hw"].tolist()]
    table = torch.tensor([[f.left, f.right, f.top, f.bottom, *f.padded, *f.network] for f in fits])
    factors = torch.tensor([f.factor for f in fits])
    # The factor is recorded in the precision of the file.
    return worst([(off(table, t["out.pad_lrtb_paddedhw_nethw"]), 0.0), (off(factors, t["out.factor"]), 1e-6)])


@unit("ols_")
def least_squares(case: Case) -> tuple[float, float]:
    t, c = case.tensors, case.meta["config"]
    focus = float(t["in.focus_distance"])
    gains = [sweep.gain(c["focal_length"], n, focus, c["pixel_ratio"]) for n in c["f_numbers"]]
    offset, share = sweep.slope(t["in.k"], t["in.radius"])
    inverse = sweep.inverse_depth(offset, focus, t["in.behind"] > 0)
    pairs = [(gains, "in.k"), (offset, "out.offset"), (inverse, "out.inverse_depth"), (1 / inverse, "out.depth")]
    pairs += [(share * c["radius_noise_std"] ** 2, "out.variance")]

    def error(ours, name):  # lengths of up to thousands of px or metres: relative where they are large
        ours, expected = torch.as_tensor(ours, dtype=torch.float64), t[name].double()
        return float(((ours - expected).abs() / expected.abs().clamp(min=1)).max())

    return max(error(ours, name) for ours, name in pairs), case.meta["tolerance"]
