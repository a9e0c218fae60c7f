"""A small LDF file: the names of the published one, narrow layers, seeded weights."""

from pathlib import Path

import torch

from bokeh_core.salient.ldf import LDF, Config


def ldf_tensors(config: Config | None = None, seed: int = 5) -> dict[str, torch.Tensor]:
    """The tensors of a file, scaled so that masks are neither black nor white."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LDF(config or Config(stem=4, width=8, depths=(1, 2, 1, 1))).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        n = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            return torch.zeros(shape, dtype=torch.int64)
        if len(shape) == 4:
            return n * (2 / shape[1:].numel()) ** 0.5
        if name.endswith("running_var"):
            return 1 + 0.2 * n.abs()
        return 1 + 0.1 * n if name.endswith("weight") else 0.1 * n

    return {name: draw(name, shape) for name, shape in shapes.items()}


def write_ldf(path: Path, config: Config | None = None, legacy: bool = False) -> Path:
    """A file as the authors' torch saved it; `legacy` is the format before PyTorch 1.6."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(ldf_tensors(config), path, _use_new_zipfile_serialization=not legacy)
    return path
