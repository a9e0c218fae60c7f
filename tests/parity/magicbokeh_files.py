"""MagicBokeh's files: lora.pkl read without running it (lora_pkl_bytes_*), and the salient-object network (ldf_*)."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from bokeh_core.checkpoints.placeholders import read_with_placeholders
from bokeh_core.salient.ldf import LDF, Config, build, folded_tensors, logits, prepare, salient_masks
from bokeh_core.samplers.magicbokeh.lora_file import convert, read_magicbokeh

from .runner import Case, unit, worst


@unit("lora_pkl_bytes_")
def lora_pkl_bytes(case: Case) -> tuple[float, float]:
    """Largest error of the ControlNet's sums, read from the pickle and again from the converted file; all else must be equal."""
    expected = case.meta["expected"]
    sums = {
        name.removeprefix("out.controlnet."): value.item() for name, value in case.tensors.items() if name.startswith("out.controlnet.")
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.pkl"
        path.write_bytes(case.tensors["in.bytes"].numpy().tobytes())
        assert set(read_with_placeholders(path)) == set(expected["top_level_keys"])
        convert(path, Path(folder) / "magicbokeh.safetensors")
        errors = []
        for name in ("lora.pkl", "magicbokeh.safetensors"):
            file = read_magicbokeh(Path(folder) / name)
            ranks = (file.rank_unet, file.rank_vae, file.rank_bokeh)
            assert ranks == tuple(expected[key] for key in ("rank_unet", "rank_vae", "state_dict_attn"))
            assert file.controlnet.keys() == sums.keys() and len(sums) == expected["n_controlnet_keys"]
            errors += [abs(file.controlnet[key].double().sum().item() - value) for key, value in sums.items()]
        return float(np.max(errors)), case.meta["tolerance"]


@unit("ldf_")
def ldf(case: Case) -> tuple[float, float]:
    """Input, logits of every head the case holds, and masks."""
    recipe, tolerance = case.meta["weights recipe"], case.meta["tolerance"]
    network = build(torch.nn, folded_tensors(weights(recipe)))
    found = []
    for name, image in case.tensors.items():
        if not name.startswith("in.image_rgb."):
            continue
        index = name.rpartition(".")[2]
        image = image.movedim(-1, 0)[None] / 255
        inputs = prepare(image[0])[None]
        found.append((_distance(inputs[..., ::4, ::4], case.tensors[f"mid.input_352_stride4.{index}"]), tolerance["mid.input"]))
        for head in ("out1", "outb1", "outd1", "out2", "outb2", "outd2"):
            if (wanted := case.tensors.get(f"mid.logit_{head}.{index}")) is not None:
                ours = logits(lambda x, head=head: _head(network, head, x), inputs, image.shape[-2:])
                found.append((_distance(ours, wanted[:, 0]), tolerance["mid.logit"]))
        masks = (salient_masks(network, image)[0] * 255).round()
        found.append((_distance(masks, case.tensors[f"out.mask_u8.{index}"].float()), tolerance["out.mask_u8"]))
    return worst(found)


def weights(recipe: dict) -> dict[str, torch.Tensor]:
    """The tensors of the full-size network by a case's recipe, checked against its sums."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LDF(Config()).state_dict().items()}
    tensors = {name: _draw(name, shape, recipe["seed"]) for name, shape in shapes.items()}
    override = recipe["override values (differ per case)"]
    tensors["linear.3.weight"] *= override["linear.3.weight multiplied by"]
    tensors["linear.3.bias"].fill_(override["linear.3.bias set to"])
    for name, total in recipe["check (sum of key)"].items():
        assert abs(tensors[name].double().sum().item() - total) < 1e-3, name
    return tensors


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    number = (seed * 1000003 + sum(ord(letter) * (place + 1) for place, letter in enumerate(name))) % 2**32
    n = np.random.RandomState(number).standard_normal(shape)
    if len(shape) == 4:
        n = n * np.sqrt(1.6 / np.prod(shape[1:]))
    elif name.endswith("running_var"):
        n = 1 + 0.2 * np.abs(n)
    else:
        n = 1 + 0.1 * n if name.endswith("weight") else 0.1 * n
    return torch.from_numpy(n).float()


def _head(network: LDF, head: str, inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the head "out", "outb" or "outd" of pass 1 or 2."""
    b, d = network.passes(inputs)[int(head[-1]) - 1]
    heads = {"b": (network.linearb, b), "d": (network.lineard, d), "": (network.linear, torch.cat((b, d), 1))}
    layers, x = heads[head[len("out") : -1]]
    return layers(x)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape, (one.shape, other.shape)
    return (one - other).abs().max().item()
