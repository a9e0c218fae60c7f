"""Depth Anything V2 and Video Depth Anything (dav2_*, vda_*, depth_anything_*, depth_resize_rule_*)."""

import torch

from bokeh_core.checkpoints.loading import load_strict
from bokeh_core.depth.checkpoint import DepthModel, DepthModelInfo, build
from bokeh_core.depth.depth_anything import DepthAnythingConfig
from bokeh_core.depth.dpt import DPTConfig
from bokeh_core.depth.estimate import depth_maps
from bokeh_core.depth.preprocessing import network_input, network_size, to_size, video_network_size
from bokeh_core.depth.video_depth_anything import (
    StreamMemory,
    TemporalModule,
    VideoDepthAnythingConfig,
    scale_and_shift,
    stitch,
    windows,
)
from bokeh_core.depth.vit import ViTConfig

from .runner import Case, unit, worst


def off(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape, f"{list(ours.shape)} instead of {list(expected.shape)}"
    return float((ours.double() - expected.double()).abs().max())


def weights(case: Case) -> dict[str, torch.Tensor]:
    return {name[2:]: tensor for name, tensor in case.tensors.items() if name.startswith("w.")}


def model(case: Case) -> DepthModel:
    """Our network of the case's configuration (two spellings) with the case's weights."""
    c = case.meta["config"]
    vit = c.get("vit", c)
    patch = vit.get("patch_size", vit.get("patch"))
    config = ViTConfig(
        width=vit["embed_dim"],
        depth=vit["depth"],
        heads=vit.get("num_heads", vit.get("heads")),
        taps=tuple(c.get("intermediate_layer_idx", c.get("layers"))),
        grid=vit.get("img_size", vit.get("img_size (pos_embed grid)")) // patch,
        patch=patch,
        mlp_ratio=vit.get("mlp_ratio", 4),
        position_offset=vit["interpolate_offset"],
    )
    head = DPTConfig(config.width, c["features"], tuple(c["out_channels"]))
    video, max_depth = "num_frames" in c, c.get("max_depth")
    network = VideoDepthAnythingConfig(config, head, c["num_frames"]) if video else DepthAnythingConfig(config, head, max_depth)
    info = DepthModelInfo("of a case", "custom", video, max_depth is not None, max_depth, case.name, network)
    return DepthModel(build(info, weights(case)), info, torch.device("cpu"), torch.float32)


def of_one_picture(model: DepthModel, rgb: torch.Tensor, resolution: int) -> torch.Tensor:
    """[H, W] depth of [H, W, 3] uint8."""
    frame = rgb.movedim(-1, 0).float() / 255
    return next(depth_maps(model, [frame], 1, clip=False, resolution=resolution))[0]


@unit("dav2_rel_")
@unit("dav2_metric_")
def depth_anything_v2(case: Case) -> tuple[float, float]:
    """Whole pictures (in.bgr_uint8), or the network alone (in.pixels) with taps and position table."""
    t, m, tolerance = case.tensors, model(case), case.meta["tolerance"]
    if "in.bgr_uint8" in t:
        rgb = t["in.bgr_uint8"].flip(-1)
        resolution = case.meta["config"]["input_size"]
        size = network_size(*rgb.shape[:2], resolution)
        pixels = network_input(rgb.movedim(-1, 0)[None].float() / 255, size)
        return worst([(off(pixels, t["mid.net_input"]), tolerance), (off(of_one_picture(m, rgb, resolution), t["out.depth"]), tolerance)])
    pixels = t["in.pixels"]
    patch = m.info.config.vit.patch
    taps = m.network.pretrained(pixels)
    errors = [off(m.network(pixels), t["out.depth"])]
    positions = m.network.pretrained.positions(pixels.shape[-2] // patch, pixels.shape[-1] // patch, pixels)
    errors += [off(positions, t["mid.pos_embed_resized"])]
    errors += [off(tap[:, 0], t[f"mid.tap{i}_cls"]) for i, tap in enumerate(taps)]
    errors += [off(tap[:, 1:], t[f"mid.tap{i}_patch"]) for i, tap in enumerate(taps)]
    return max(errors), tolerance


@unit("dav2_pixels_")
def pixels(case: Case) -> tuple[float, float]:
    rgb = case.tensors["in.rgb_uint8"]
    size = network_size(*rgb.shape[:2], case.meta["config"]["input_size"])
    ours = network_input(rgb.movedim(-1, 0)[None].float() / 255, size)[0]
    return off(ours, case.tensors["out.net_input"]), case.meta["tolerance"]


@unit("dav2_resize_rules")
def resize_rules(case: Case) -> tuple[float, float]:
    rules = ("lower bound", "upper bound", "minimal")
    ours = [network_size(h, w, s, rules[rule])[::-1] for s, rule, w, h in case.tensors["in.query"].tolist()]
    return off(torch.tensor(ours), case.tensors["out.net_wh"]), case.meta["tolerance"]


@unit("depth_resize_rule_")
def resize_rule(case: Case) -> tuple[float, float]:
    table = case.tensors["out.table"]
    ours = [(s, w, h, *network_size(h, w, s)[::-1]) for s, w, h, _, _ in table.tolist()]
    return off(torch.tensor(ours), table), 0.0


@unit("depth_anything_")
def depth_anything(case: Case) -> tuple[float, float]:
    """Pixels, features, network depth from the recorded pixels, and the whole way from the picture."""
    t, m, tolerance = case.tensors, model(case), case.meta["tolerance"]
    pairs = []
    for entry in case.meta["cases"]:
        j, resolution = entry["index"], entry["input_size"]
        rgb = t[f"in.image_rgb.{j}"]
        size = network_size(*rgb.shape[:2], resolution)
        pairs += [(off(network_input(rgb.movedim(-1, 0)[None].float() / 255, size), t[f"mid.tensor.{j}"]), tolerance["mid.tensor"])]
        taps = m.network.pretrained(t[f"mid.tensor.{j}"])
        pairs += [(off(tap[:, 1:], t[f"mid.feature{i}.{j}"]), tolerance["mid.feature"]) for i, tap in enumerate(taps)]
        pairs += [(off(m.network(t[f"mid.tensor.{j}"]), t[f"mid.depth_net.{j}"]), tolerance["mid.depth_net"])]
        depth = of_one_picture(m, rgb, resolution)
        expected = t[f"out.depth_raw.{j}"]
        pairs += [(off(depth, expected) / float(expected.max() - expected.min()), tolerance["out.depth01"])]
        depth01 = (depth - depth.min()) / (depth.max() - depth.min() + 1e-8)
        pairs += [(off(depth01, t[f"out.depth01.{j}"]), tolerance["out.depth01"])]
    return worst(pairs)


@unit("vda_forward_")
def video_forward(case: Case) -> tuple[float, float]:
    m, motion = model(case), {}
    clip = case.tensors["in.clip"]
    for i, module in enumerate(m.network.head.motion_modules):
        module.register_forward_hook(lambda module, inputs, output, i=i: motion.__setitem__(i, output))
    errors = [off(m.network(clip), case.tensors["out.depth"])]
    for i, output in motion.items():
        output = output.unflatten(0, clip.shape[:2]).transpose(1, 2)
        errors.append(off(output, case.tensors[f"mid.motion{i}"]))
    return max(errors), case.meta["tolerance"]


@unit("vda_temporal_")
def temporal(case: Case) -> tuple[float, float]:
    """A window, and one more frame that attends to what was remembered of it."""
    t, c = case.tensors, case.meta["config"]
    x = t["in.x"]
    with torch.device("meta"):
        module = TemporalModule(c["in_channels"], c["temporal_max_len"])
    load_strict(module, weights(case), "the case")
    attentions = module.temporal_transformer.transformer_blocks[0].attention_blocks
    normed = [[] for _ in attentions]
    hooks = [a.register_forward_hook(lambda a, inputs, output, i=i: normed[i].append(inputs[0])) for i, a in enumerate(attentions)]
    errors = [off(over_time(module, x, x.shape[2]), t["out.y"])]
    errors += [off(torch.cat(caught), t[f"mid.cache{i}"]) for i, caught in enumerate(normed)]
    for hook in hooks:
        hook.remove()
    memory = tuple(Recorded(t[f"mid.cache{i}"]) for i in range(len(attentions)))
    errors += [off(over_time(module, t["in.x_next"], 1, memory), t["out.y_next_with_cache"])]
    errors += [off(m.new[:, None], t[f"mid.next_cache{i}"]) for i, m in enumerate(memory)]
    return max(errors), case.meta["tolerance"]


def over_time(module, x, frames, memory=None):
    """[B, C, T, h, w] through a temporal module."""
    return module(x.transpose(1, 2).flatten(0, 1), frames, memory).unflatten(0, (-1, frames)).transpose(1, 2)


class Recorded(StreamMemory):
    """Remembers what the case says it remembers."""

    def __init__(self, cache):
        self.cache = cache

    def recall(self):
        return list(self.cache.unbind(1))

    def add(self, entry):
        self.new = entry


@unit("vda_stitch_")
def stitched(case: Case) -> tuple[float, float]:
    t = case.tensors
    count, size = int(t["in.n_frames"]), t["in.frame_hw"].tolist()
    slots = torch.tensor(list(windows(count)))
    low = t["in.window_predictions"]
    expected_size = video_network_size(*size, case.meta["config"]["input_size"])
    assert low.shape[-2:] == expected_size, f"the network size is {expected_size}"
    maps = list(stitch(low, count, not case.meta["config"]["metric"], lambda x: to_size(x, size), lambda x, first: to_size(x, size)))
    return worst([(off(slots, t["mid.slot_frame_ids"]), 0.0), (off(torch.cat(maps), t["out.depth"]), case.meta["tolerance"])])


@unit("vda_align_helpers")
def align_helpers(case: Case) -> tuple[float, float]:
    """Scale and shift under a mask, of a flat prediction, and blending. (The published fit without a shift is used by no model.)"""
    t, tolerance = case.tensors, case.meta["tolerance"]
    prediction, target, mask = t["in.prediction"], t["in.target"], t["in.mask"]
    fit = scale_and_shift(prediction, target, mask)
    flat = scale_and_shift(torch.ones_like(prediction), target, mask)
    pairs = [(off(torch.tensor(fit), t["out.scale_shift"]), tolerance), (off(torch.tensor(flat), t["out.constant_prediction"]), tolerance)]
    # Two windows whose blended frames are those of the case, raised above 0 because depth is clipped there.
    least = min(t["in.pre"].min(), t["in.post"].min())
    before, after = torch.zeros(2, 32, *t["in.pre"].shape[-2:])
    before[24:], after[2:10] = t["in.pre"] - least, t["in.post"] - least
    blended = torch.cat(list(stitch([before, after], 32, False, lambda x: x, lambda x, first: x)))[24:32] + least
    return worst([*pairs, (off(blended, t["out.blend"]), tolerance)])


@unit("vda_stream_schedule_")
def stream_schedule(case: Case) -> tuple[float, float]:
    memory, recalled, lengths = StreamMemory(), [], []
    for frame in range(int(case.tensors["in.n_frames"])):
        if frame:
            recalled.append(memory.recall())
        memory.add(frame)
        lengths.append(len(memory.entries))
    errors = [
        off(torch.tensor(recalled), case.tensors["out.cache_frame_ids"]),
        off(torch.tensor(lengths), case.tensors["out.cache_length"]),
    ]
    return max(errors), case.meta["tolerance"]


@unit("vda_size_rules")
def video_size_rules(case: Case) -> tuple[float, float]:
    ours = [video_network_size(*row) for row in case.tensors["in.h_w_inputsize"].tolist()]
    return off(torch.tensor(ours), case.tensors["out.net_hw"]), case.meta["tolerance"]
