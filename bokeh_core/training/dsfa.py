"""BokehDepth stage 2: DSFA on Depth Anything V2 or UniDepthV2 (bokehdepth_stage2 SPEC sections 3 to 5 and 11).

A sharp picture and a stack of its blurred versions go in, metric depth comes out. The published losses and learning rates are not
known; ours are the usual ones of metric depth.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoints.loading import load_strict
from ..depth.checkpoint import DOUBLE, SINGLE, DepthModelInfo, build, read_depth_file, recognise
from ..depth.depth_anything import DepthAnythingConfig
from ..depth.dsfa import DepthAnythingDSFA, DepthAnythingDSFAConfig, DSFABlock, DSFAConfig, fuse
from ..depth.preprocessing import PATCH, RESOLUTION, normalised
from ..depth.unidepth import UniDepth, UniDepthConfig, made_up_camera
from ..errors import BokehError
from ..media import one_channel, read_picture
from ..stack_files import load_stack
from . import photos
from .depth_losses import silog
from .losses import cosine
from .manifests import StackTruth, read_depth, read_stack_truths
from .task import Group, Task

FILES = {UniDepthConfig: "UDv2_dsfa.safetensors", DepthAnythingConfig: "DAV2_dsfa.safetensors"}
DEPTH_ANYTHING_METRES = 80.0  # the range of Depth Anything's metric head: that of the released DSFA
TAPS = {DepthAnythingConfig: (2, 3), UniDepthConfig: (0, 1, 2, 3)}  # that the releases rewrite
GATE = 0.1  # first value of the gates: an untrained block is not the identity
HELD_OUT = 20  # every so many stacks of a manifest, one is kept for measuring
ENCODERS = ("pretrained.", "pixel_encoder.backbone.")
CAMERA = (".camera_layer.", ".camera_token_adapter.")  # never trained: the camera is given, as in the published pipeline
FUSION = ("encoder_fusion.", "pixel_encoder.fusion_blocks.")


@dataclass(frozen=True)
class Model:
    """What training starts from.

    depth  a metric Depth Anything V2 (the release began with ViT-L, VKITTI) or a UniDepthV2, to which new DSFA blocks are added, or a file
           with DSFA, which is trained on
    kind   of a Depth Anything whose file name does not say it, see depth.checkpoint.recognise
    """

    depth: Path
    kind: Literal["auto", "metric indoor", "metric outdoor"] = "auto"


@dataclass(frozen=True)
class Data:
    """Stacks with depth.

    stacks  a manifest of stacks with depth in metres (see manifests.read_stack_truths); empty: stacks of procedural scenes by the
            physical renderer
    near, far  metres that disparity 1 and 0 of a procedural scene stand for
    """

    stacks: Path | None = None
    near: float = 1.0
    far: float = 20.0

    def __post_init__(self):
        if not 0 < self.near < self.far:
            raise BokehError(f"[data] near is {self.near} m and far {self.far} m; expected 0 < near < far.")


@dataclass(frozen=True)
class Options:
    """The recipe.

    size        px of the square pictures, a multiple of 14
    k           strengths of the stack's frames, px on a picture 512 px wide. A manifest brings its own, of which as many are used
    deliver_k   the network is told the K. False: zeros, as the released UniDepthV2 training ran, because the K it stored never arrived
    frames      of a stack that are used; 0: all. The released UniDepthV2 training saw 1
    attention   of Depth Anything: see depth.checkpoint.recognise
    train       "dsfa and head": the blocks and the depth head, over a frozen transformer whose features the stack is read by; "dsfa": the
                blocks alone; "all". Which of them the release trained is not known. The first is the default: the head must learn
                what the blocks now say, and a transformer trained on our scenes would forget real photos
    silog_focus    share of the squared mean error that is forgiven
    error_weight   of UniDepthV2's error map, whose logarithm learns the absolute error of the depth after rescaling by the median
    least, most    metres between which depth counts
    learning_rate, head_learning_rate, encoder_learning_rate   ours
    weight_decay, clip
    warmup, total  steps of the cosine; total: as many as [train] steps, 0: no decay
    """

    size: int = RESOLUTION
    k: tuple[float, ...] = (10.0, 20.0, 30.0)
    deliver_k: bool = True
    frames: int = 0
    attention: Literal["single", "double"] = "single"
    train: Literal["dsfa and head", "dsfa", "all"] = "dsfa and head"
    silog_focus: float = 0.5
    error_weight: float = 0.1
    least: float = 0.1
    most: float = 80.0
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-5
    encoder_learning_rate: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 500
    total: int = 0

    def __post_init__(self):
        if self.size % PATCH or self.size < 64:
            raise BokehError(f"[options] size is {self.size}; expected a multiple of {PATCH}, 70 or more.")
        if not self.k or min(self.k) <= 0 or self.frames > len(self.k):
            raise BokehError(
                f"[options] k is {list(self.k)} and frames {self.frames}; expected numbers above 0, and no more frames than K."
            )


class DSFA(Task):
    """DSFA on a depth network."""

    Model, Data, Options = Model, Data, Options

    def __init__(self, model: Model, data: Data, options: Options, seed: int):
        super().__init__()
        self.data, self.options, self.seed = data, options, seed
        self.stacks, self.held_out_stacks = _read(data.stacks)
        self.info, self.network = with_dsfa(model.depth, model.kind, options.attention, seed)

    @property
    def uni(self) -> bool:
        return isinstance(self.info.config, UniDepthConfig)

    def groups(self) -> dict[str, list[Group]]:
        options = self.options
        rates = {"dsfa": options.learning_rate, "head": options.head_learning_rate, "encoder": options.encoder_learning_rate}
        trained = {"dsfa": ("dsfa",), "dsfa and head": ("dsfa", "head"), "all": ("dsfa", "head", "encoder")}[options.train]
        parts: dict[str, dict] = {name: {} for name in trained}
        for name, parameter in self.network.named_parameters():
            if any(mark in name for mark in CAMERA):
                continue
            part = "dsfa" if name.startswith(FUSION) else "encoder" if name.startswith(ENCODERS) else "head"
            if part in parts:
                parts[part][f"network.{name}"] = parameter

        def schedule(step: int) -> float:
            total = options.total or 2**62
            return cosine(min(step, total), options.warmup, total)

        groups = [
            Group(some, rates[part], weight_decay=options.weight_decay, clip=options.clip, schedule=schedule)
            for part, some in parts.items()
        ]
        return {"depth": groups}

    # Data

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """sharp [3, S, S] 0..1, stack [N, 3, S, S], k [N], depth [S, S] metres, valid [S, S] bool."""
        return self._sample(index, self.stacks)

    def held_out(self, index: int) -> dict[str, torch.Tensor]:
        return self._sample(2**40 + index, self.held_out_stacks or self.stacks)

    def _sample(self, index: int, stacks: list[StackTruth]) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, index])
        sharp, frames, k, depth, valid = self._from_disk(stacks[rng.integers(len(stacks))], rng) if stacks else self._synthetic(rng)
        count = self.options.frames or len(self.options.k)
        valid &= depth.isfinite() & (depth >= self.options.least) & (depth <= self.options.most)
        return {
            "sharp": sharp, "stack": frames[:count], "k": k[:count], "depth": torch.where(valid, depth, 1.0), "valid": valid,
            "seed": torch.tensor(int(rng.integers(2**62))),
        }  # fmt: skip

    def _synthetic(self, rng):
        photo = photos.synthetic_photo(rng, self.options.size)
        k = torch.tensor(self.options.k)
        disparity = torch.from_numpy(photo.placed.disparity)
        near, far = 1 / self.data.near, 1 / self.data.far
        depth = 1 / (far + disparity * (near - far))
        return photo.image, torch.stack([photo.blurred(float(value)) for value in k]), k, depth, torch.ones_like(depth, dtype=torch.bool)

    def _from_disk(self, truth: StackTruth, rng):
        stack = load_stack(truth.manifest, truth.entry)
        stack = stack.fitted(*stack.reference.shape[-2:])
        if len(stack.k) < len(self.options.k):
            raise BokehError(
                f"{truth.manifest}, stack {truth.entry}, has {len(stack.k)} frames; [options] k asks for {len(self.options.k)}."
            )
        height, width = stack.reference.shape[-2:]
        size = self.options.size
        new = tuple(max(round(side * size / min(height, width)), size) for side in (height, width))
        top, left = (int(rng.integers(side - size + 1)) for side in new)
        cut = (..., slice(top, top + size), slice(left, left + size))
        pictures = F.interpolate(torch.cat([stack.reference[None], stack.frames]).float(), new, mode="bicubic", antialias=True).clamp(0, 1)
        depth = F.interpolate(read_depth(truth.depth)[None, None], new, mode="nearest-exact")[0, 0][cut]
        valid = torch.ones_like(depth, dtype=torch.bool)
        if truth.mask:
            mask = one_channel(read_picture(truth.mask).pixels, f"{truth.mask}: this mask")
            valid = F.interpolate(mask[None, None], new, mode="nearest-exact")[0, 0][cut] > 0.5
        pictures = pictures[cut].contiguous()
        return pictures[0], pictures[1 : 1 + len(self.options.k)], stack.k.float()[: len(self.options.k)], depth.contiguous(), valid

    # Losses

    def predict(self, batch: dict[str, torch.Tensor], with_stack: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(depth [B, S, S] in metres, UniDepthV2's error [B, S, S]), differentiable in what is trained."""
        network, stack = self.network, batch["stack"]
        size = batch["sharp"].shape[-2:]
        frozen = not any(parameter.requires_grad for name, parameter in network.named_parameters() if name.startswith(ENCODERS))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            taps = network.encode(normalised(batch["sharp"]))
            found = network.encode(normalised(stack.flatten(0, 1))) if with_stack else []
        if with_stack:
            kept = {tap: found[tap][:, 1:].unflatten(0, stack.shape[:2]) for tap in network.blocks}
            taps = fuse(network.blocks, taps, kept, batch["k"] if self.options.deliver_k else torch.zeros_like(batch["k"]))
        # Half precision would step depth by a hundredth, so the heads compute in float32 whatever the engine says.
        with torch.autocast(stack.device.type, enabled=False):
            taps = [tap.float() for tap in taps]
            if not self.uni:
                return network.depth(taps, size), None
            found = network.decode(taps, size, made_up_camera(*size).to(stack.device))
        return found.depth, found.error

    def forward(self, part: str, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        depth, error = self.predict(batch)
        truth, valid = batch["depth"], batch["valid"]
        losses = {"silog": silog(depth, truth, valid, self.options.silog_focus).mean()}
        if error is not None:
            ratio = torch.where(valid, truth / depth.detach().clamp_min(1e-6), torch.nan).flatten(1).nanmedian(1).values.nan_to_num(1.0)
            wrong = (depth.detach() * ratio[:, None, None] - truth).abs()
            distance = torch.where(valid, (error.log() - wrong).abs(), 0.0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)
            losses["error"] = self.options.error_weight * distance.mean()
        return losses

    # Results

    @torch.no_grad()
    def measure(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """delta1: share of pixels whose depth is within a factor of 1.25 of the truth. abs_rel: mean |depth - truth| / truth."""
        return _scores(self.predict(batch)[0], batch)

    @torch.no_grad()
    def baselines(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        middle = torch.where(batch["valid"], batch["depth"], torch.nan).flatten(1).nanmedian(1).values.nan_to_num(1.0)
        constant = middle[:, None, None].expand_as(batch["depth"])
        return {
            "the network without the stack": _scores(self.predict(batch, with_stack=False)[0], batch),
            "the true median everywhere": _scores(constant, batch),
        }

    def notes(self) -> list[str]:
        return (
            [] if self.stacks else [f"No stacks are named: training on procedural scenes from {self.data.near:g} to {self.data.far:g} m."]
        )

    @torch.no_grad()
    def preview(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The picture, its most blurred version, and inverse depth, ours and true, on the scale of the truth."""
        depth, _ = self.predict(batch)
        maps = []
        for one, truth, valid in zip(depth, batch["depth"], batch["valid"], strict=True):
            inverse = 1 / truth[valid] if valid.any() else torch.ones(1, device=truth.device)
            low, high = inverse.min(), inverse.max()
            ours, theirs = (((1 / d.clamp_min(1e-6) - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for d in (one, truth))
            maps.append(torch.cat([ours, torch.where(valid, theirs, 0.0)], -1).expand(3, -1, -1))
        return torch.cat([batch["sharp"], batch["stack"][:, -1], torch.stack(maps)], -1)

    def save(self, folder: Path) -> list[Path]:
        """The whole network under the names of the release, as Load Depth Model takes it: for models/depth."""
        from safetensors.torch import save_file

        path = Path(folder) / next(file for kind, file in FILES.items() if isinstance(self.info.config, kind))
        save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in self.network.state_dict().items()}, path)
        return [path]


def _scores(depth: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    truth, valid, depth = batch["depth"], batch["valid"], depth.clamp_min(1e-6)
    count = valid.flatten(1).sum(1).clamp_min(1)
    near = (torch.maximum(depth / truth, truth / depth) < 1.25) & valid
    error = torch.where(valid, (depth - truth).abs() / truth, 0.0)
    return {"delta1": near.flatten(1).sum(1) / count, "abs_rel": error.flatten(1).sum(1) / count}


def with_dsfa(path: Path, kind: str, attention: str, seed: int) -> tuple[DepthModelInfo, nn.Module]:
    """The network of a depth file in float32 on the CPU, with DSFA blocks: its own, or new ones. Raises BokehError for another file."""
    tensors = read_depth_file(path)
    own = any("encoder_fusion." in name for name in tensors)
    info, tensors = recognise(tensors, str(path), kind, attention if own else SINGLE)
    if info.video or not info.metric:
        raise BokehError(
            f"{Path(path).name} is {info.title}; DSFA goes on a metric Depth Anything V2 or a UniDepthV2. If it is a metric file under "
            "another name, say so as kind in [model]."
        )
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    config = info.config
    if getattr(config, "dsfa", None) is not None:
        return info, build(info, tensors)
    double = attention == DOUBLE
    if isinstance(config, UniDepthConfig):
        config = replace(config, dsfa=DSFAConfig(TAPS[UniDepthConfig], squared_space_scale=True))
        network_class = UniDepth
    else:
        dsfa = DSFAConfig(TAPS[DepthAnythingConfig], squared_space_scale=double, nested_film=True)
        config = DepthAnythingDSFAConfig(replace(config.vit, squared_scale=double), config.head, DEPTH_ANYTHING_METRES, dsfa)
        network_class = DepthAnythingDSFA
    with torch.device("meta"):
        network = network_class(config)
    tensors |= new_blocks(network, seed)
    info = replace(info, family=f"{info.family} + DSFA", title=f"{info.family} + DSFA {info.size}, metric", metric=True, config=config)
    return info, load_strict(network, tensors, f"{Path(path).name}, taken for {info.title},")


def new_blocks(network: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """First weights of the DSFA blocks of a network (on the meta device), by their names in it: torch's own, gates at 0.1."""
    tensors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in network.named_modules():
            if isinstance(module, DSFABlock):
                block = DSFABlock(module.ln_space_attn.normalized_shape[0], module.config)
                for key, tensor in block.state_dict().items():
                    tensors[f"{name}.{key}"] = torch.full_like(tensor, GATE) if key.startswith("gamma_") else tensor
    return tensors


def _read(path: Path | None) -> tuple[list[StackTruth], list[StackTruth]]:
    """(stacks to train on, stacks held out)."""
    found = [] if path is None else read_stack_truths(path)
    if len(found) < HELD_OUT:
        return found, []
    return [one for i, one in enumerate(found) if i % HELD_OUT], found[::HELD_OUT]
