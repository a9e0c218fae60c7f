"""What `bokeh models check` says of MagicBokeh's file."""

from pathlib import Path

import torch

from ...checkpoints.catalogue import Report
from ...errors import BokehError
from .lora_file import read_magicbokeh

WIDTH = 320  # of the UNet's finest level in SD 2.1
COUNTS = {"unet": 366, "vae": 64, "processors": 72, "controlnet": 250}  # tensors of the released file (SPEC section 3)


def report(tensors: dict[str, torch.Tensor], path: Path) -> Report | None:
    """lora.pkl (which read_checkpoint refuses, so `tensors` is empty) or the file made from it; None for anything else."""
    converted = any(name.startswith("processors.up_blocks.") for name in tensors)
    if not converted and (tensors or path.suffix != ".pkl" or not path.is_file()):
        return None
    try:
        file = read_magicbokeh(path)
    except BokehError as error:
        return Report("a pickle, or what is left of MagicBokeh's file", problems=(str(error),))
    tables = {name: getattr(file, name) for name in COUNTS}
    problems = [
        f"{name} has {len(tables[name])} tensors; the released file has {count}."
        for name, count in COUNTS.items()
        if len(tables[name]) != count
    ]
    width = file.unet["conv_in.base_layer.weight"].shape[0]
    if width != WIDTH:
        problems.append(f"It fits a UNet whose finest level is {width} wide; Stable Diffusion 2.1 has {WIDTH}.")
    facts = (
        ("architecture", "LoRA sets and a ControlNet for a pruned Stable Diffusion 2.1-base"),
        ("container", "converted to safetensors" if converted else "lora.pkl with a live ControlNet, read without running it"),
        ("rank", f"{file.rank_unet} (UNet), {file.rank_vae} (VAE), {file.rank_bokeh} (bokeh); said by the file and by its tensors"),
        *((f"{name}", f"{len(table)} tensors, {_numbers(table)}, {_dtypes(table)}") for name, table in tables.items()),
        ("made with", f"diffusers {file.controlnet_config.get('_diffusers_version', 'of unknown version')}"),
    )
    return Report("MagicBokeh", facts, tuple(problems))


def _numbers(table: dict[str, torch.Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in table.values()) / 1e6:.2f} million numbers"


def _dtypes(table: dict[str, torch.Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in table.values()}))
