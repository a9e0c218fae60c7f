"""MagicBokeh's own file: `lora.pkl` as released, or `magicbokeh.safetensors` made from it (SPEC sections 3 and 4)."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoints.lora import lora_pairs
from ...checkpoints.placeholders import Placeholder, module_tensors, read_with_placeholders
from ...checkpoints.reading import container, read_checkpoint
from ...errors import BokehError

FORMAT = "magicbokeh"  # metadata entry `format` of the converted file
BASE_LAYER = ("conv_in.base_layer.weight", "conv_in.base_layer.bias")
RANKS = {"rank_unet": "rank_unet", "rank_vae": "rank_vae", "rank_bokeh": "state_dict_attn"}  # the last is a number, whatever its name
TABLES = {"unet": "state_dict_unet", "vae": "state_dict_vae", "processors": "processor_state_dict"}
LISTS = {"encoder_modules": "unet_lora_encoder_modules", "decoder_modules": "unet_lora_decoder_modules"}
VAE_LIST = "vae_lora_encoder_modules"  # only to check the table: it names modules more than once
PROCESSORS = {
    f"up_blocks.{block}.attentions.{index}.transformer_blocks.0.attn1.processor.to_{part}_lora.{half}.weight"
    for block in (1, 2, 3)
    for index in (0, 1, 2)
    for part in ("q", "k", "v", "out")
    for half in (0, 1)
}


@dataclass(frozen=True, eq=False)
class MagicBokehFile:
    """All that is in the file.

    rank_unet, rank_vae, rank_bokeh  ranks of the three LoRA sets
    unet               the UNet's restoration LoRA, MODULE.lora_{A,B}.{default_encoder,default_decoder}.weight, and conv_in.base_layer.*
    vae                the VAE encoder's LoRA, MODULE.lora_{A,B}.default_encoder.weight
    processors         the bokeh LoRA of the nine focus-aware attentions
    controlnet         tensors of the ControlNet
    controlnet_config  its settings as far as they are plain values, tuples as lists
    encoder_modules, decoder_modules  the UNet's modules with LoRA, as the file lists them
    Tensors may be mapped from the file: never write into them.
    """

    rank_unet: int
    rank_vae: int
    rank_bokeh: int
    unet: dict[str, torch.Tensor]
    vae: dict[str, torch.Tensor]
    processors: dict[str, torch.Tensor]
    controlnet: dict[str, torch.Tensor]
    controlnet_config: dict
    encoder_modules: list[str]
    decoder_modules: list[str]


def read_magicbokeh(path: str | Path) -> MagicBokehFile:
    """Read lora.pkl or the file `convert` made from it. Nothing in a lora.pkl is imported or run.

    Raises BokehError for a file that is neither, is unsafe, or whose tensors, module lists and ranks do not belong together.
    """
    path = Path(path)
    return _from_safetensors(path) if container(path) == "safetensors" else _from_pickle(path)


def convert(source: str | Path, target: str | Path) -> MagicBokehFile:
    """Write what lora.pkl holds as a safetensors file, which loads at once and can hold nothing but tensors. Returns its contents.

    Raises BokehError where the target exists already. See `write_magicbokeh`.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise BokehError(f"{target} exists already; give another name or remove it first.")
    content = read_magicbokeh(source)
    write_magicbokeh(content, target)
    return content


def write_magicbokeh(content: MagicBokehFile, target: Path) -> None:
    """Write MagicBokeh's file as safetensors. The target appears when it is complete and was read back equal; raises BokehError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {
        f"{table}.{name}": tensor.contiguous() for table in (*TABLES, "controlnet") for name, tensor in getattr(content, table).items()
    }
    plain = {name: getattr(content, name) for name in (*RANKS, *LISTS, "controlnet_config")}
    part = target.with_name(target.name + ".part")
    try:
        save_file(tensors, str(part), metadata={"format": FORMAT, **{name: json.dumps(value) for name, value in plain.items()}})
        written = read_magicbokeh(part)
        if not _equal(content, written):
            raise BokehError(f"{part} does not hold what was written into it; check the disk and try again.")
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise BokehError(f"{target} could not be written ({error}); check the folder and the free space.") from error
    finally:
        part.unlink(missing_ok=True)


def _equal(one: MagicBokehFile, other: MagicBokehFile) -> bool:
    plain = all(getattr(one, name) == getattr(other, name) for name in (*RANKS, *LISTS, "controlnet_config"))
    tables = [(getattr(one, name), getattr(other, name)) for name in (*TABLES, "controlnet")]
    # Bytes are compared, for a NaN equals nothing.
    return plain and all(a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a) for a, b in tables)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def _from_pickle(path: Path) -> MagicBokehFile:
    content = read_with_placeholders(path)
    names = [*RANKS.values(), *TABLES.values(), *LISTS.values(), VAE_LIST, "controlnet"]
    found = content if isinstance(content, dict) else {}
    missing = [name for name in names if name not in found]
    if missing:
        entries = ", ".join(sorted(map(str, found))[:8]) or type(content).__name__
        raise BokehError(
            f"{path.name} is not MagicBokeh's lora.pkl: it lacks {', '.join(missing[:4])} (found: {entries}). "
            "Get lora.pkl from https://huggingface.co/LinxiaoShi/Magicbokeh."
        )
    config = content["controlnet"].attribute("_internal_dict") if isinstance(content["controlnet"], Placeholder) else None
    if not isinstance(config, Placeholder | dict):
        raise BokehError(f"{path.name}: its 'controlnet' is not a ControlNet saved with its settings; download the file again.")
    file = MagicBokehFile(
        **{field: content[name] for field, name in (RANKS | TABLES | LISTS).items()},
        controlnet=module_tensors(content["controlnet"]),
        controlnet_config=_plain(config.entries if isinstance(config, Placeholder) else config),
    )
    _check(path, file)
    _check_list(path, VAE_LIST, content[VAE_LIST])
    _compare(path, "state_dict_vae", file.vae, _lora_names({*content[VAE_LIST]}, "default_encoder"))
    return file


def _from_safetensors(path: Path) -> MagicBokehFile:
    checkpoint = read_checkpoint(path)
    plain, tables = {}, {name: {} for name in (*TABLES, "controlnet")}
    if checkpoint.metadata.get("format") != FORMAT:
        raise BokehError(
            f"{path.name} is not MagicBokeh's file (found tensors such as {sorted(checkpoint.tensors)[0]}); "
            "expected lora.pkl, or what 'bokeh models convert' makes from it."
        )
    try:
        for name in (*RANKS, *LISTS, "controlnet_config"):
            plain[name] = json.loads(checkpoint.metadata[name])
        for name, tensor in checkpoint.tensors.items():
            table, _, rest = name.partition(".")
            tables[table][rest] = tensor
    except (KeyError, ValueError, RecursionError) as error:
        raise BokehError(f"{path.name} is damaged ({error}); convert lora.pkl again.") from error
    file = MagicBokehFile(**plain, **tables)
    _check(path, file)
    return file


def _check(path: Path, file: MagicBokehFile) -> None:
    """Raise BokehError unless the file is whole and agrees with itself."""
    for name in (*TABLES, "controlnet"):
        table = getattr(file, name)
        if not isinstance(table, dict) or not all(isinstance(key, str) and torch.is_tensor(value) for key, value in table.items()):
            raise BokehError(f"{path.name}: '{TABLES.get(name, name)}' is not a table of tensors; download the file again.")
    for name, entry in LISTS.items():
        _check_list(path, entry, getattr(file, name))
    encoder, decoder = _lora_names({*file.encoder_modules}, "default_encoder"), _lora_names({*file.decoder_modules}, "default_decoder")
    _compare(path, "state_dict_unet", file.unet, {*BASE_LAYER, *encoder, *decoder})
    _compare(path, "processor_state_dict", file.processors, PROCESSORS)
    if not file.controlnet:
        raise BokehError(f"{path.name}: its ControlNet has no tensors; download the file again.")
    adapters = {name: tensor for name, tensor in file.unet.items() if name not in BASE_LAYER}
    shapes = {
        "rank_unet": [(down.shape[0], up.shape[1]) for down, up in _pairs(path, adapters).values()],
        "rank_vae": [(down.shape[0], up.shape[1]) for down, up in _pairs(path, file.vae).values()],
        "rank_bokeh": [
            (file.processors[name].shape[0], file.processors[name.replace("lora.0", "lora.1")].shape[1])
            for name in _matrices(path, file.processors)
            if "lora.0" in name
        ],
    }
    for name, pairs in shapes.items():
        said, ranks = getattr(file, name), sorted({rank for pair in pairs for rank in pair})
        if type(said) is not int or ranks != [said]:
            raise BokehError(
                f"{path.name} says that {RANKS[name]} is {said if type(said) is int else type(said).__name__}, "
                f"but its LoRA tensors have rank {', '.join(map(str, ranks)) or 'none'}; download the file again."
            )


def _check_list(path: Path, entry: str, names) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BokehError(f"{path.name}: '{entry}' is not a list of module names; download the file again.")


def _lora_names(modules: set[str], adapter: str) -> set[str]:
    return {f"{module}.lora_{half}.{adapter}.weight" for module in modules for half in "AB"}


def _matrices(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, if each has rows and columns."""
    flat = [name for name, tensor in tensors.items() if tensor.ndim < 2]
    if flat:
        raise BokehError(f"{path.name}: {flat[0]} has shape {list(tensors[flat[0]].shape)}; a LoRA tensor has 2 or 4 dimensions.")
    return tensors


def _pairs(path: Path, tensors: dict[str, torch.Tensor]):
    matrices = _matrices(path, tensors)
    try:
        return lora_pairs(matrices, prefixes=())
    except BokehError as error:
        raise BokehError(f"{path.name}: {error}") from None


def _compare(path: Path, entry: str, table: dict, wanted: set[str]) -> None:
    for what, names in (("lacks", wanted - table.keys()), ("has the unexpected", table.keys() - wanted)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise BokehError(f"{path.name}: '{entry}' {what} {', '.join(sorted(names)[:3])}{more}; download the file again.")


def _plain(value, depth: int = 8):
    """The value as JSON keeps it: tuples become lists; what is no plain value is left out of tables, and null elsewhere."""
    if isinstance(value, str | int | float | None):
        return value
    if depth and isinstance(value, list | tuple):
        return [_plain(one, depth - 1) for one in value]
    if depth and isinstance(value, dict):
        kept = {key: one for key, one in value.items() if isinstance(one, str | int | float | list | tuple | dict | None)}
        return {str(key): _plain(one, depth - 1) for key, one in kept.items()}
    return None
