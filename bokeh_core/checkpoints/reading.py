"""Reads checkpoint files as plain tensors. A checkpoint is data: nothing in it is ever imported or run."""

import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import BokehError
from .placeholders import read_with_placeholders

# Where training scripts put the weights among their bookkeeping (bokehdepth_stage2 SPEC section 1, magicbokeh SPEC section 11).
CONTAINERS = ("model", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, and what was around them.

    tensors    name -> tensor, on the CPU, possibly mapped from the file: never write into them
    path       the file
    container  name of the entry of the file that held the tensors, "" for the file itself
    metadata   strings of a safetensors header
    """

    tensors: dict[str, torch.Tensor]
    path: Path
    container: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The tensors of a .safetensors file or of a PyTorch file (.pth, .pt, .ckpt, .bin), told apart by content, not by name.

    PyTorch files are read without running anything: see `placeholders`; files from before PyTorch 1.6 by torch's restricted
    unpickler (weights_only). Tensors inside an entry `model` or `state_dict` are found,
    entries that are no tensors are left out. Names are kept as they are.
    Raises BokehError for a missing, empty, truncated or foreign file, and for one that holds live Python objects.
    """
    path = Path(path)
    return _read_safetensors(path) if container(path) == "safetensors" else _read_torch(path)


def container(path: str | Path) -> str:
    """What a checkpoint file is by its first bytes: "safetensors" or "torch". Raises BokehError where it is neither."""
    path = Path(path)
    if not path.is_file():
        raise BokehError(f"There is no file {path}; check the name and the folder.")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise BokehError(f"{path.name} is a Git LFS pointer, not the file itself; download the file from its model page.")
    if head.lstrip()[:1] == b"<":
        raise BokehError(f"{path.name} is a web page, not a checkpoint; the download went wrong, get it from its model page again.")
    if head[8:9] == b"{":
        return "safetensors"
    if zipfile.is_zipfile(path) or head[:1] == b"\x80":
        return "torch"
    raise BokehError(
        f"{path.name} ({path.stat().st_size} bytes) is neither a safetensors nor a complete PyTorch file; "
        "it may be cut off, download it again."
    )


def strip_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors without `prefix`, if every name has it; else the same names."""
    if tensors and all(name.startswith(prefix) for name in tensors):
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError, OSError) as error:
        raise BokehError(f"{path.name} is a damaged safetensors file ({error}); download it again.") from error
    if not tensors:
        raise BokehError(f"{path.name} holds no tensors.")
    return Checkpoint(tensors, path, metadata=metadata)


def _read_torch(path: Path) -> Checkpoint:
    if zipfile.is_zipfile(path):
        return _table(path, read_with_placeholders(path, objects=False))
    try:  # the format before PyTorch 1.6
        with path.open("rb") as file:  # torch goes by the suffix of a path, whatever the file is
            return _table(path, torch.load(file, map_location="cpu", weights_only=True))
    except BokehError:
        raise
    except pickle.UnpicklingError as error:
        raise BokehError(
            f"{path.name} holds Python objects beside its tensors, which could run code, so it was not opened; "
            "use a file of plain tensors or a .safetensors version of it."
        ) from error
    except Exception as error:  # a cut or altered file fails anywhere in torch's reader, even by asking for all the memory
        raise BokehError(f"{path.name} is a damaged PyTorch file ({type(error).__name__}); download it again.") from error


def _table(path: Path, content) -> Checkpoint:
    """The tensors among the contents of a PyTorch file."""
    around = ""
    if isinstance(content, dict):
        around = next((name for name in CONTAINERS if isinstance(content.get(name), dict)), "")
        content = content[around] if around else content
    tensors = {name: value for name, value in content.items() if torch.is_tensor(value)} if isinstance(content, dict) else {}
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(name, str)}
    size = path.stat().st_size
    for name, tensor in tensors.items():
        # Sparse, expanded, or with a storage that torch made larger for it.
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > size:
            raise BokehError(f"{path.name} claims {list(tensor.shape)} numbers for {name[:80]} and does not hold them; download it again.")
    if not tensors:
        raise BokehError(f"{path.name} holds no table of tensors (found: {_contents(content)}); expected names with tensors.")
    return Checkpoint(tensors, path, around)


def _contents(content) -> str:
    if isinstance(content, dict):
        return "entries " + ", ".join(sorted(map(str, content))[:8]) if content else "an empty table"
    return type(content).__name__
