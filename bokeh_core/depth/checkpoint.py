"""Depth checkpoints: what a file is, told from the names and shapes of its tensors, and the network made of it."""

import re
import zipfile
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from torch import nn

from ..checkpoints.loading import load_strict
from ..checkpoints.placeholders import read_with_placeholders
from ..checkpoints.reading import CONTAINERS, container, read_checkpoint, strip_prefix
from ..errors import BokehError
from . import dpt, unidepth
from .depth_anything import DepthAnything, DepthAnythingConfig
from .dpt import DPTConfig
from .dsfa import DepthAnythingDSFA, DepthAnythingDSFAConfig, DSFAConfig
from .unidepth import UniDepth, UniDepthConfig
from .video_depth_anything import VideoDepthAnything, VideoDepthAnythingConfig
from .vit import ViTConfig

KINDS = ("auto", "relative", "metric indoor", "metric outdoor")
INDOOR, OUTDOOR = 20.0, 80.0  # metres: the ranges of Hypersim and of Virtual KITTI
SIZES = {(384, 12): "S", (768, 12): "B", (1024, 24): "L"}  # (width, depth) of the ViT
TAPS = {24: (4, 11, 17, 23)}  # of Depth Anything, by depth; else the ends of the quarters
HEAD_WIDTH = 64
EXPECTED = "expected a Depth Anything V2, Video Depth Anything, UniDepth V2 or BokehDepth (DSFA) file"
IN_FLOAT32 = (dpt.IN_FLOAT32, *unidepth.IN_FLOAT32)
SINGLE, DOUBLE = "single", "double"  # scaling of attention logits; see `recognise`
EMA = (("ema", "ema_state_dict"), ("shadow_params", "average_params"))  # names of an average of the weights, and of its tensors

# Other files people have in the same folders: a mark in the names of their tensors, and what to say of them.
_MOGE = "is a MoGe file; load it with ComfyUI's own MoGe nodes and connect their geometry"
_DA3 = "is a Depth Anything 3 file; load it with ComfyUI's own Depth Anything 3 nodes and connect their geometry"
OTHERS = (
    (r"^points_head\.|^head\.upsample_blocks\.|^encoder\.backbone\.", _MOGE),
    (r"backbone\.pretrained\.|^backbone\.embeddings\.", _DA3),
    (r"\.lora_(A|B|up|down)\b", "is a LoRA"),
    (r"^model\.diffusion_model\.", "is a Stable Diffusion checkpoint or another diffusion model"),
    (r"^(down_blocks|encoder\.down_blocks|first_stage_model|encoder\.down)\.", "is a part of a diffusion model"),
    (r"double_blocks\.", "is a FLUX model"),
)


@dataclass(frozen=True)
class DepthModelInfo:
    """What a checkpoint is.

    family     "Depth Anything V2", "Video Depth Anything", "UniDepth V2", or one of the photo models' with " + DSFA"
    size       "S", "B", "L" or "custom"
    video      made for clips
    metric     gives metres (near = small); else inverse depth of unknown scale and shift (near = large)
    max_depth  metres at the far end of a metric Depth Anything V2 model, else None
    title      words for users
    config     of the network
    """

    family: str
    size: str
    video: bool
    metric: bool
    max_depth: float | None
    title: str
    config: DepthAnythingConfig | VideoDepthAnythingConfig | UniDepthConfig

    @property
    def align_corners(self) -> bool:
        """How the network's maps lie on the picture: corners on corners, or (UniDepthV2) borders on borders."""
        return not isinstance(self.config, UniDepthConfig)


@dataclass
class DepthModel:
    """A network ready to run: inputs go to `device` in `dtype`, the weights are there or come there by themselves."""

    network: nn.Module
    info: DepthModelInfo
    device: torch.device
    dtype: torch.dtype


def read_depth_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a depth checkpoint, that of a training run too: options, paths and the optimiser beside them are left out.

    Nothing in the file is run. An average of the weights (EMA) takes their place in a UniDepthV2 file, as its authors' loader does
    it: by name, or in the file's order where it lists as many tensors. Raises BokehError for a damaged or foreign file.
    """
    path = Path(path)
    if container(path) != "torch" or not zipfile.is_zipfile(path):
        return read_checkpoint(path).tensors
    content = read_with_placeholders(path)
    around = next((name for name in CONTAINERS if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    if around is None:
        return read_checkpoint(path).tensors
    tensors = {name: one for name, one in content[around].items() if isinstance(name, str) and torch.is_tensor(one)}
    if not tensors:
        raise BokehError(f"{path.name} holds no tensors in its entry '{around}'; {EXPECTED}.")
    average = next((content[name] for name in EMA[0] if isinstance(content.get(name), dict)), {})
    shadow = next((average[name] for name in EMA[1] if isinstance(average.get(name), dict | list | tuple)), None)
    if shadow is None or not any("pixel_encoder." in name for name in tensors):
        return tensors
    if not isinstance(shadow, dict):
        shadow = dict(zip(tensors, shadow, strict=True)) if len(shadow) == len(tensors) else {}
    known = {_without_module(name): name for name in tensors}
    return tensors | {known[_without_module(n)]: t for n, t in shadow.items() if torch.is_tensor(t) and _without_module(n) in known}


def recognise(
    tensors: dict[str, torch.Tensor], file_name: str, kind: str = "auto", attention: str = SINGLE
) -> tuple[DepthModelInfo, dict[str, torch.Tensor]]:
    """What the tensors of a file are, and the tensors under their original names.

    file_name  tells relative from metric models when kind is "auto": their tensors have the same names and shapes. Words looked for:
               metric, hypersim or indoor (20 m), vkitti or outdoor (80 m); in the folder's name too when the file's says nothing
    kind       one of KINDS
    attention  of a Depth Anything V2 with DSFA. SINGLE: logits times head_width^-1/2, as the published inference command does. DOUBLE:
               times 1/head_width in the transformer and in DSFA's spatial step, as the published training did if it ran as configured.
               Which of the two the release needs is not known (SPEC section 4.3); UniDepthV2's scaling is known
    Takes original names (also below `module.`) and those of the transformers library, both generations.
    Raises BokehError for anything else, with what it is where that can be told.
    """
    if kind not in KINDS:
        raise BokehError(f"The kind of a depth model is '{kind}'; expected one of {', '.join(KINDS)}.")
    if attention not in (SINGLE, DOUBLE):
        raise BokehError(f"The attention scaling is '{attention}'; expected {SINGLE} or {DOUBLE}.")
    tensors = strip_prefix(tensors, "module.")
    fused = any(key.startswith("encoder_fusion.") for key in tensors)
    if attention == DOUBLE and not fused:
        raise BokehError(f"{Path(file_name).name} has one known attention scaling; double is for Depth Anything V2 with DSFA only.")
    if any("pixel_encoder." in key for key in tensors):
        return _recognise_unidepth({_without_module(key): tensor for key, tensor in tensors.items()}, Path(file_name).name)
    name = _telling_name(file_name)
    if any(key.startswith("neck.reassemble_stage.") for key in tensors):
        tensors = _from_transformers(tensors)
    video = any(key.startswith("head.motion_modules.") for key in tensors)
    head = "head." if video else "depth_head."
    needed = ["pretrained.cls_token", "pretrained.pos_embed", f"{head}scratch.layer1_rn.weight"]
    needed += [f"{head}projects.{i}.weight" for i in range(4)]
    found = next((words for mark, words in OTHERS if any(re.search(mark, key) for key in tensors)), None)
    if not found and not all(key in tensors for key in needed):
        found = f"holds other tensors (found: {', '.join(sorted(tensors)[:3])})"
    if found:
        raise BokehError(f"{Path(file_name).name} {found}; {EXPECTED}.")
    # Depth Anything V1 has the very names and shapes of V2 but taps the last four blocks: its depth would be wrong without an error.
    if re.search(r"depth[_-]anything[_-](vit[sbl]14|(small|base|large)-hf)", name):
        raise BokehError(f"{Path(file_name).name} is named like a file of Depth Anything V1, which does not work here; {EXPECTED}.")
    if fused and kind == "auto":  # trained on metres, up to 80
        kind = "metric outdoor"
    metric, max_depth = _kind(name, kind, video, Path(file_name).name)
    vit, head_config = _vit_config(tensors, "pretrained.", Path(file_name).name), _head_config(tensors, head)
    if fused:
        if not metric:
            raise BokehError(f"{Path(file_name).name} is a Depth Anything V2 with DSFA, which gives metres; choose another kind, or auto.")
        taps = _numbers(tensors, r"encoder_fusion\.layers\.(\d+)\.block\.")
        vit = replace(vit, squared_scale=attention == DOUBLE)
        dsfa = DSFAConfig(taps, squared_space_scale=attention == DOUBLE, nested_film=True)
        family, config = "Depth Anything V2 + DSFA", DepthAnythingDSFAConfig(vit, head_config, max_depth, dsfa)
    elif video:
        frames = tensors[_PE].shape[1] if _PE in tensors else VideoDepthAnythingConfig.frames
        family, config = "Video Depth Anything", VideoDepthAnythingConfig(vit, head_config, frames)
    else:
        family, config = "Depth Anything V2", DepthAnythingConfig(vit, head_config, max_depth)
    size = SIZES.get((vit.width, vit.depth), "custom")
    title = f"{family} {size}, {_kind_words(metric, max_depth)}"
    if "dadepth" in name and not video:
        title += " (MagicBokeh's depth model)"
    return DepthModelInfo(family, size, video, metric, max_depth, title, config), tensors


def build(info: DepthModelInfo, tensors: dict[str, torch.Tensor], ops=nn) -> nn.Module:
    """The network of a checkpoint with `tensors` (original names) as its weights; the last layers' are float32.

    ops  namespace of layer classes: torch.nn or one of the host's
    Raises BokehError when a tensor is missing, unexpected or has another shape.
    """
    with torch.device("meta"):
        network = _NETWORKS[type(info.config)](info.config, ops)
    tensors = {name: tensor.float() if _in_float32(name) else tensor for name, tensor in tensors.items()}
    return load_strict(network, tensors, f"The file, taken for {info.title},")


def load_depth_model(
    path: str | Path,
    kind: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = SINGLE,
) -> DepthModel:
    """A depth model from a file, all of it on `device`.

    kind, attention  as for `recognise`
    dtype            to compute in; None = float16 on accelerators, float32 on the CPU
    Raises BokehError for a file that is damaged or no known depth model.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    info, tensors = recognise(read_depth_file(path), str(path), kind, attention)
    tensors = {
        name: tensor.to(device, torch.float32 if _in_float32(name) else dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in tensors.items()
    }
    return DepthModel(build(info, tensors), info, device, dtype)


_NETWORKS = {
    DepthAnythingConfig: DepthAnything,
    DepthAnythingDSFAConfig: DepthAnythingDSFA,
    VideoDepthAnythingConfig: VideoDepthAnything,
    UniDepthConfig: UniDepth,
}
_PE = "head.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"


def _telling_name(file_name: str) -> str:
    """The file's name in lower case, or with its folder's where the name is one that every model has."""
    path = Path(file_name.lower())
    return f"{path.parent.name}/{path.name}" if path.stem in ("model", "pytorch_model", "diffusion_pytorch_model") else path.name


def _kind(name: str, kind: str, video: bool, file: str) -> tuple[bool, float | None]:
    """(metric, max_depth)."""
    indoor, outdoor = ("hypersim" in name or "indoor" in name), ("kitti" in name or "outdoor" in name)
    if kind != "auto":
        metric, indoor, outdoor = kind != "relative", kind == "metric indoor", kind == "metric outdoor"
    else:
        metric = "metric" in name or indoor or outdoor
    if video or not metric:
        return metric, None
    if indoor == outdoor:
        raise BokehError(
            f"{file} is named as a metric model, but not for which range; choose the kind: metric indoor (20 m, Hypersim) "
            "or metric outdoor (80 m, VKITTI)."
        )
    return True, INDOOR if indoor else OUTDOOR


def _kind_words(metric: bool, max_depth: float | None) -> str:
    if not metric:
        return "relative"
    return {None: "metric", INDOOR: "metric indoor (20 m)"}.get(max_depth, "metric outdoor (80 m)")


def _without_module(name: str) -> str:
    return name.replace("module.", "")


def _in_float32(name: str) -> bool:
    return any(mark in name for mark in IN_FLOAT32)


def _numbers(tensors, pattern: str) -> tuple[int, ...]:
    """The numbers that stand in the names where the pattern has its group, ascending."""
    return tuple(sorted({int(found[1]) for found in (re.match(pattern, name) for name in tensors) if found}))


def _recognise_unidepth(tensors, file: str) -> tuple[DepthModelInfo, dict[str, torch.Tensor]]:
    inside = r"pixel_encoder\.(?!backbone\.|fusion_blocks\.)"  # plain UniDepthV2 files lack this level
    tensors = {re.sub(inside, "pixel_encoder.backbone.", name): tensor for name, tensor in tensors.items()}
    base, head = "pixel_encoder.backbone.", "pixel_decoder.depth_layer."
    needed = [f"{base}cls_token", f"{base}pos_embed", f"{head}to_latents.weight"]
    needed += ["pixel_decoder.camera_layer.aggregate1.mlp.proj1.weight"]
    if not all(name in tensors for name in needed):
        raise BokehError(f"{file} is a UniDepth, but not V2 with a ViT; {EXPECTED}.")
    vit = _vit_config(tensors, base, file)
    vit = replace(
        vit,
        taps=_quarters(vit.depth),
        final_norm_eps=1e-5,
        position_offset=None,
        unused_registers=tensors[f"{base}register_tokens"].shape[1] if f"{base}register_tokens" in tensors else 0,
    )
    taps = _numbers(tensors, r"pixel_encoder\.fusion_blocks\.(\d+)\.")
    hidden = tensors[f"{head}to_latents.weight"].shape[0]
    config = UniDepthConfig(
        vit,
        DSFAConfig(taps, squared_space_scale=True) if taps else None,
        hidden,
        expansion=tensors["pixel_decoder.camera_layer.aggregate1.mlp.proj1.weight"].shape[0] // hidden,
        depths=tuple(len(_numbers(tensors, rf"pixel_decoder\.depth_layer\.ups\.{i}\.convs\.(\d+)\.")) for i in range(3)),
    )
    family, size = "UniDepth V2" + (" + DSFA" if taps else ""), SIZES.get((vit.width, vit.depth), "custom")
    return DepthModelInfo(family, size, False, True, None, f"{family} {size}, metric", config), tensors


def _vit_config(tensors, base: str, file: str) -> ViTConfig:
    width = tensors[f"{base}cls_token"].shape[-1]
    depth = 1 + max(_numbers(tensors, re.escape(base) + r"blocks\.(\d+)\."), default=-1)
    grid = isqrt(tensors[f"{base}pos_embed"].shape[1] - 1)
    if width % HEAD_WIDTH or depth < 4:
        raise BokehError(f"{file} has a transformer of {depth} blocks, {width} wide; {EXPECTED} (12 or 24 blocks, 384, 768 or 1024 wide).")
    return ViTConfig(width, depth, width // HEAD_WIDTH, TAPS.get(depth, _quarters(depth)), grid)


def _quarters(depth: int) -> tuple[int, ...]:
    return tuple(depth * (i + 1) // 4 - 1 for i in range(4))


def _head_config(tensors, head: str) -> DPTConfig:
    channels = tuple(tensors[f"{head}projects.{i}.weight"].shape[0] for i in range(4))
    return DPTConfig(tensors[f"{head}projects.0.weight"].shape[1], tensors[f"{head}scratch.layer1_rn.weight"].shape[0], channels)


# transformers' names (5.x) to the original ones, bokehdepth_stage2 SPEC section 9. What files of older versions have instead is
# brought to these names first.
_OLDER = (
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", lambda m: ".attention.o_proj."),
)
_NAMES = (
    (r"backbone\.embeddings\.(cls_token|mask_token)", r"pretrained.\1"),
    (r"backbone\.embeddings\.position_embeddings", r"pretrained.pos_embed"),
    (r"backbone\.embeddings\.patch_embeddings\.projection\.(.+)", r"pretrained.patch_embed.proj.\1"),
    (r"backbone\.encoder\.layer\.(\d+)\.(norm[12]|mlp\.fc[12])\.(.+)", r"pretrained.blocks.\1.\2.\3"),
    (r"backbone\.encoder\.layer\.(\d+)\.attention\.o_proj\.(.+)", r"pretrained.blocks.\1.attn.proj.\2"),
    (r"backbone\.encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"pretrained.blocks.\1.ls\2.gamma"),
    (r"backbone\.layernorm\.(.+)", r"pretrained.norm.\1"),
    (r"neck\.reassemble_stage\.layers\.(\d)\.projection\.(.+)", r"depth_head.projects.\1.\2"),
    (r"neck\.reassemble_stage\.layers\.(\d)\.resize\.(.+)", r"depth_head.resize_layers.\1.\2"),
    (r"neck\.convs\.(\d)\.weight", lambda m: f"depth_head.scratch.layer{int(m[1]) + 1}_rn.weight"),
    (r"neck\.fusion_stage\.layers\.(\d)\.projection\.(.+)", lambda m: f"depth_head.scratch.refinenet{4 - int(m[1])}.out_conv.{m[2]}"),
    (
        r"neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.convolution(\d)\.(.+)",
        lambda m: f"depth_head.scratch.refinenet{4 - int(m[1])}.resConfUnit{m[2]}.conv{m[3]}.{m[4]}",
    ),
    (r"head\.conv1\.(.+)", r"depth_head.scratch.output_conv1.\1"),
    (r"head\.conv2\.(.+)", r"depth_head.scratch.output_conv2.0.\1"),
    (r"head\.conv3\.(.+)", r"depth_head.scratch.output_conv2.2.\1"),
)


def _from_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names that no rule knows are kept, for the message of the strict loading."""
    for pattern, new in _OLDER:
        tensors = {re.sub(pattern, new, key): tensor for key, tensor in tensors.items()}
    renamed, parts = {}, {}
    for key, tensor in tensors.items():
        qkv = re.fullmatch(r"backbone\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(.+)", key)
        if qkv:
            parts.setdefault(f"pretrained.blocks.{qkv[1]}.attn.qkv.{qkv[3]}", {})[qkv[2]] = tensor
            continue
        rule = next(((pattern, new) for pattern, new in _NAMES if re.fullmatch(pattern, key)), None)
        renamed[re.sub(*rule, key) if rule else key] = tensor
    for key, three in parts.items():
        if len(three) == 3:
            renamed[key] = torch.cat([three[letter] for letter in "qkv"])
    return renamed
