"""The adapter of BokehDepth stage 1: its file and its network (SPEC sections 2 to 4).

It does two things to FLUX. In every block a low-rank correction of the projected q and k of the image tokens, which does not depend on
K. And in every block one vector that depends on K alone, added to the attention's output before the output projection: published as
cross-attention to a single "bokeh token", whose softmax over one key is 1, so that the result is the value vector itself.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...checkpoints.loading import load_strict
from ...checkpoints.reading import read_checkpoint
from ...errors import BokehError
from .recipe import compress_block_ids, normalise_k

FILE = "bokeh_lora.bin"
WHERE = f"{FILE} of BokehDepth stage 1, in models/loras"
PAIRS = ("to_k_dof", "to_v_dof", "to_q_adp", "to_k_adp")
LICENCE = "not stated; trained on FLUX.1 [dev], whose licence is non-commercial"

_EMBEDDING = re.compile(r"(?:^|.*\.)(embedding_layer\.[02]\.(?:weight|bias))")
_PAIR = re.compile(r"(?:^|.*\.)(\d+)\.(" + "|".join(PAIRS) + r")\.(down|up)\.weight")


@dataclass(frozen=True)
class AdapterConfig:
    """What the shapes of an adapter say.

    blocks   indices of the adapted attention blocks: double-stream blocks first, then single-stream ones
    width    of the FLUX it belongs to
    rank     of every low-rank pair
    scale    alpha / rank; alpha is not stored in the file, the released one equals the rank
    hidden   width of the K embedding's hidden layer
    context  width of the bokeh token
    """

    blocks: tuple[int, ...]
    width: int
    rank: int
    scale: float = 1.0
    hidden: int = 64
    context: int = 768


RELEASED = AdapterConfig(blocks=tuple(range(57)), width=3072, rank=128)


class LowRank(nn.Module):
    """x [..., in] -> scale * up(down(x)) [..., out], in the dtype of x."""

    def __init__(self, inner: int, outer: int, rank: int, scale: float, ops=nn):
        super().__init__()
        self.down = ops.Linear(inner, rank, bias=False)
        self.up = ops.Linear(rank, outer, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.up(self.down(x))
        return low if self.scale == 1 else low * self.scale


class BokehAdapter(nn.Module):
    """All of the adapter, with the names of its file. Used to compute the vectors of a K; the corrections run in `Corrections`."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        width, rank, scale = config.width, config.rank, config.scale
        self.embedding_layer = nn.Sequential(nn.Linear(1, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.context))
        inner = {"to_k_dof": config.context, "to_v_dof": config.context, "to_q_adp": width, "to_k_adp": width}
        self.adapter_modules = nn.ModuleDict(
            {str(i): nn.ModuleDict({name: LowRank(inner[name], width, rank, scale) for name in PAIRS}) for i in config.blocks}
        )

    def embed(self, condition: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[B, 1] K / 30 (see `normalise_k`) -> [B, context] in `dtype`. The published run uses bfloat16, whose steps of K are 0.12 wide."""
        first, _, last = self.embedding_layer
        hidden = nn.functional.linear(condition.to(dtype), first.weight.to(dtype), first.bias.to(dtype)).relu()
        return nn.functional.linear(hidden, last.weight.to(dtype), last.bias.to(dtype))

    def vectors(self, condition: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
        """[B, 1] K / 30 -> {block: [B, width] in `dtype`}: what K adds to every token of a block's attention output."""
        token = self.embed(condition, dtype)
        out = {}
        for i in self.config.blocks:
            pair = self.adapter_modules[str(i)]["to_v_dof"]
            low = nn.functional.linear(token, pair.down.weight.to(dtype))
            out[i] = nn.functional.linear(low, pair.up.weight.to(dtype)) * self.config.scale
        return out

    def vectors_of_k(self, k: list[float], dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
        """The same for a list of K, clamped and normalised as the weights need it."""
        return self.vectors(torch.tensor([[normalise_k(value)] for value in k]), dtype)

    def correction_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of `Corrections`."""
        return {
            f"{i}.{name}.{half}.weight": getattr(self.adapter_modules[str(i)][name], half).weight.detach()
            for i in self.config.blocks
            for name in ("to_q_adp", "to_k_adp")
            for half in ("down", "up")
        }


class Corrections(nn.ModuleDict):
    """block -> its two K-independent corrections, to_q_adp and to_k_adp: all of the adapter that must stay with the FLUX network."""

    def __init__(self, config: AdapterConfig, ops=nn):
        width, rank, scale = config.width, config.rank, config.scale
        names = ("to_q_adp", "to_k_adp")
        super().__init__({str(i): nn.ModuleDict({name: LowRank(width, width, rank, scale, ops) for name in names}) for i in config.blocks})


def build_corrections(adapter: BokehAdapter, ops=nn, tensors: dict[str, torch.Tensor] | None = None) -> Corrections:
    """The corrections of an adapter, with layers from `ops`; `tensors` are its `correction_tensors`, perhaps in another dtype."""
    with torch.device("meta"):
        network = Corrections(adapter.config, ops)
    return load_strict(network, tensors or adapter.correction_tensors(), "The adapter's corrections")


def read_adapter(path: str | Path, *, blocks: int = len(RELEASED.blocks), width: int = RELEASED.width) -> BokehAdapter:
    """The adapter in a file (or a folder that holds model.safetensors or pytorch_model.bin), for a FLUX of `blocks` blocks of `width`.

    Raises BokehError when it is another file, is partial, or was made for another network.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise BokehError(f"{path} holds neither model.safetensors nor pytorch_model.bin; expected the folder of the stage 1 adapter.")
        path = found[0]
    adapter = build_adapter(read_checkpoint(path).tensors, path.name)
    config = adapter.config
    if config.width != width:
        raise BokehError(
            f"{path.name} is made for a network {config.width} wide, but this FLUX is {width} wide; use {WHERE} with FLUX.1-Kontext."
        )
    if config.blocks != tuple(range(blocks)):
        raise BokehError(
            f"{path.name} adapts {len(config.blocks)} of the {blocks} attention blocks ({_ids(config.blocks)}); "
            f"expected all of them (0-{blocks - 1}). The file is incomplete or was made for another network; download {FILE} again."
        )
    if config.rank != RELEASED.rank:
        raise BokehError(
            f"{path.name} has rank {config.rank}; expected {RELEASED.rank}. The strength of other ranks is not stored in the file, "
            "so it can not be applied rightly."
        )
    return adapter


def build_adapter(tensors: dict[str, torch.Tensor], what: str, scale: float = 1.0) -> BokehAdapter:
    """The adapter of a table of tensors, under any prefix (such as `module.` or `adapter_modules.`), strictly and by reference."""
    tensors = plain_names(tensors, what)
    return load_strict(_on_meta(adapter_config(tensors, what, scale)), tensors, f"{what}, taken for the stage 1 adapter,")


def plain_names(tensors: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """The tensors with the names of the released file. Raises BokehError for a name that is none of the adapter's, or comes twice."""
    named: dict[str, torch.Tensor] = {}
    foreign = []
    for name, tensor in tensors.items():
        if match := _EMBEDDING.fullmatch(name):
            plain = match[1]
        elif match := _PAIR.fullmatch(name):
            plain = f"adapter_modules.{int(match[1])}.{match[2]}.{match[3]}.weight"
        else:
            foreign.append(name)
            continue
        if plain in named:
            raise BokehError(f"{what} holds {plain} twice, under different prefixes; expected one adapter in a file.")
        named[plain] = tensor
    if foreign:
        raise BokehError(
            f"{what} is not the stage 1 adapter: {len(foreign)} of its {len(tensors)} tensors have other names, for example {foreign[0]}. "
            f"Expected {WHERE}."
        )
    return named


def adapter_config(tensors: dict[str, torch.Tensor], what: str, scale: float = 1.0) -> AdapterConfig:
    """What the shapes of tensors with plain names say. Raises BokehError when there is too little to say it."""
    blocks = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("adapter_modules.")})
    up = next((tensor for name, tensor in tensors.items() if name.endswith(".up.weight") and tensor.ndim == 2), None)
    first, last = (tensors.get(f"embedding_layer.{i}.weight") for i in (0, 2))
    if up is None or first is None or last is None or first.ndim != 2 or last.ndim != 2:
        raise BokehError(f"{what} lacks the K embedding or every low-rank pair of the stage 1 adapter; expected {WHERE}.")
    if first.shape[1] != 1:
        raise BokehError(
            f"{what} embeds {first.shape[1]} numbers instead of K alone: it belongs to an older revision, which works differently. "
            f"Expected {WHERE}."
        )
    return AdapterConfig(tuple(blocks), up.shape[0], up.shape[1], scale, first.shape[0], last.shape[0])


def _on_meta(config: AdapterConfig) -> BokehAdapter:
    with torch.device("meta"):
        return BokehAdapter(config)


def _ids(blocks) -> str:
    return compress_block_ids(list(blocks)).replace("_", ", ")


def report(tensors: dict[str, torch.Tensor], path: str | Path):
    """What `bokeh models check` says about a file: a catalogue Report, None when it is another file."""
    from ...checkpoints.catalogue import Report

    if not any(_PAIR.fullmatch(name) for name in tensors):
        return None
    what, title = Path(path).name, "BokehDepth stage 1 adapter, for FLUX.1-Kontext"
    try:
        adapter = build_adapter(tensors, what)
    except BokehError as error:
        return Report(title, problems=(str(error),), licence=LICENCE)
    config = adapter.config
    keys = [adapter.adapter_modules[str(i)]["to_k_dof"].up.weight for i in config.blocks]
    zero = sum(not bool(weight.any()) for weight in keys)
    facts = [
        ("attention blocks", f"{len(config.blocks)} ({_ids(config.blocks)}), {config.width} wide"),
        ("rank", str(config.rank)),
        ("K embedding", f"1 > {config.hidden} > {config.context}"),
        ("bokeh keys that are zero, as training leaves them", f"{zero} of {len(keys)}"),
    ]
    expected = (
        ("list of blocks", config.blocks, RELEASED.blocks, _ids),
        ("width", config.width, RELEASED.width, str),
        ("rank", config.rank, RELEASED.rank, str),
    )
    differing = [(name, say(ours), say(theirs)) for name, ours, theirs, say in expected if ours != theirs]
    problems = [f"The {name} is {ours}; the released adapter has {theirs}." for name, ours, theirs in differing]
    return Report(title, tuple(facts), tuple(problems), LICENCE)
