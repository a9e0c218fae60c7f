"""The released files of Any-to-Bokeh (SPEC section 1): found, told apart from their relatives, checked in full, and loaded."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...checkpoints.catalogue import Report
from ...checkpoints.loading import adopt, load_strict
from ...checkpoints.reading import read_checkpoint
from ...checkpoints.stable_diffusion import Part, read_folder
from ...errors import BokehError
from ..arguments import Placed as Network
from ..arguments import place
from .image_encoder import ImageEncoder, encoder_config

SOURCE = "the checkpoint archive linked in the README of github.com/vivoCameraResearch/any-to-bokeh"
ENCODER_SOURCE = "https://huggingface.co/stabilityai/stable-video-diffusion-img2vid-xt (folder image_encoder)"
_POSITIONS = "vision_model.embeddings.position_ids"  # a buffer some copies carry; it holds 0, 1, 2, ...


@dataclass(frozen=True)
class Files:
    """What the released files hold, checked in full and less what never changes a result. `build` of each part makes the network.

    visual  the weights of the visual tokens were kept, so that the masks can be turned on
    """

    unet: Part
    encoder: Part
    decoder: Part
    image_encoder: Part
    visual: bool

    def builders(self) -> dict[str, tuple[Callable, dict[str, torch.Tensor]]]:
        """name -> (build(ops, tensors) -> network, tensors) of the four networks."""
        return {
            "unet": (lambda ops, tensors: build_unet(self.unet.config, tensors, ops, live=True, visual=self.visual), self.unet.tensors),
            "encoder": (lambda ops, tensors: build_encoder(self.encoder.config, tensors, ops), self.encoder.tensors),
            "decoder": (lambda ops, tensors: build_decoder(self.decoder.config, tensors, ops), self.decoder.tensors),
            "image_encoder": (
                lambda ops, tensors: build_image_encoder(self.image_encoder.config, tensors, ops),
                self.image_encoder.tensors,
            ),
        }


def read_files(unet: str | Path, vae: str | Path | None = None, image_encoder: str | Path | None = None, *, visual: bool = False) -> Files:
    """Read the four networks.

    unet           the folder of the release (holds unet/unet or unet, vae, and image_encoder beside them), a folder of the UNet
                   alone, or one file
    vae            folder or file; None: `vae` in the first folder
    image_encoder  folder or file; None: `image_encoder` in the first folder
    visual         keep the weights of the visual tokens
    Raises BokehError for a missing part, another model's file, and any tensor that is missing, unexpected or of another shape.
    """
    home = Path(unet)
    return Files(
        _read_unet(home, visual),
        *_read_vae(_part(home, vae, "vae", SOURCE)),
        _read_image_encoder(_part(home, image_encoder, "image_encoder", ENCODER_SOURCE)),
        visual,
    )


def load(files: Files, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Network]:
    """The four networks by name, for use without a host. dtype: of all but the encoder of the VAE, which computes in float32; None: as
    stored on CUDA devices, float32 elsewhere.
    """
    device, networks = torch.device(device), {}
    for name, (build, tensors) in files.builders().items():
        stored = next(t.dtype for t in tensors.values() if t.ndim > 1)
        chosen = dtype or (stored if device.type == "cuda" else torch.float32)
        chosen = torch.float32 if name == "encoder" else chosen
        networks[name] = place(build, tensors, device, chosen)
    return networks


def _part(home: Path, given, name: str, source: str) -> Path:
    if given is not None:
        return Path(given)
    if home.is_dir() and (home / name).is_dir():
        return home / name
    raise BokehError(
        f"There is no {name} for Any-to-Bokeh: {home} is no folder with a subfolder {name}. Choose a file or folder for it, "
        f"or put it there; it comes from {source}."
    )


def _read(path: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, config) of a file, or of a folder with config.json; the double folder of the release is one level deeper."""
    if not path.is_dir():
        return dict(read_checkpoint(path).tensors), {}
    for folder in (path / name / name, path / name, path):
        if (folder / "config.json").is_file():
            part = read_folder(folder, name)
            return dict(part.tensors), part.config
    raise BokehError(f"{path} has no {name}/config.json; expected the folder of the release or of its {name}.")


def _count(tensors: dict, pattern: str) -> int:
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


# UNet


def _read_unet(path: Path, visual: bool) -> Part:
    tensors, given = _read(path, "unet")
    if "down_blocks.0.resnets.0.temporal_res_block.conv1.weight" not in tensors:
        raise BokehError(f"{path.name} is no video UNet (found: {', '.join(list(tensors)[:3])}); choose the unet of {SOURCE}.")
    if "conv_in_mpi.weight" not in tensors:
        raise BokehError(f"{path.name} is a plain Stable Video Diffusion UNet, without the layers for bokeh; choose the unet of {SOURCE}.")
    config = unet_config(tensors, given)
    whole = build_unet(config, tensors, what=f"{path.name}, as the UNet of Any-to-Bokeh,")
    from .network import drop_unused

    return Part(drop_unused(whole, keep_visual=visual).state_dict(), config)


def unet_config(tensors: dict[str, torch.Tensor], given: dict | None = None) -> dict:
    """Keywords of AnyToBokehUNet from the shapes of its tensors; `given`, of a config.json, decides the number of heads, which the
    shapes do not show (without it: 64 channels each).
    """
    depth = _count(tensors, "down_blocks.{}.resnets.0.spatial_res_block.conv1.weight")
    channels = [tensors[f"down_blocks.{i}.resnets.0.spatial_res_block.conv1.weight"].shape[0] for i in range(depth)]
    attended = [f"down_blocks.{i}.attentions.0.proj_in.weight" in tensors for i in range(depth)]
    first = f"down_blocks.{attended.index(True)}.attentions.0" if any(attended) else "mid_block.attentions.0"
    embedded = tensors["add_embedding.linear_1.weight"].shape[1]
    config = {
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_out.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("CrossAttnDownBlockSpatioTemporal" if there else "DownBlockSpatioTemporal" for there in attended),
        "up_block_types": tuple("CrossAttnUpBlockSpatioTemporal" if there else "UpBlockSpatioTemporal" for there in reversed(attended)),
        "layers_per_block": tuple(_count(tensors, f"down_blocks.{i}.resnets.{{}}.spatial_res_block.conv1.weight") for i in range(depth)),
        "cross_attention_dim": tensors[f"{first}.transformer_blocks.0.attn2.to_v.weight"].shape[1],
        "transformer_layers_per_block": 1,
        "addition_time_embed_dim": embedded // 3,
        "projection_class_embeddings_input_dim": embedded,
        "num_attention_heads": tuple(max(1, width // 64) for width in channels),
    }
    heads = (given or {}).get("num_attention_heads")
    if heads is not None:
        config["num_attention_heads"] = heads if isinstance(heads, int) else tuple(heads)
    return config


def build_unet(config: dict, tensors, ops=nn, *, live: bool = False, visual: bool = False, what: str = "The UNet of Any-to-Bokeh"):
    """An AnyToBokehUNet with `tensors` as its weights. live: without the layers that never change a result; visual: see `drop_unused`."""
    from .network import AnyToBokehUNet, drop_unused

    known = inspect.signature(AnyToBokehUNet.__mro__[1].__init__).parameters
    with torch.device("meta"):
        network = AnyToBokehUNet(**{key: value for key, value in config.items() if key in known})
    if live:
        drop_unused(network, keep_visual=visual)
    return load_strict(adopt(network, ops), tensors, what)


# VAE


def _read_vae(path: Path) -> tuple[Part, Part]:
    tensors, _ = _read(path, "vae")
    if "decoder.time_conv_out.weight" not in tensors:
        raise BokehError(f"{path.name} is no video VAE (found: {', '.join(list(tensors)[:3])}); choose the vae of {SOURCE}.")
    if "decoder.skip_conv_1.weight" not in tensors:
        raise BokehError(f"{path.name} is a plain Stable Video Diffusion VAE, without skip connections; choose the vae of {SOURCE}.")
    config = vae_config(tensors)
    decoder = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    what = f"{path.name}, as the {{}} of Any-to-Bokeh's VAE,"
    build_encoder(config, encoder, what=what.format("encoder"))
    build_decoder(config, decoder, what=what.format("decoder"))
    return Part(encoder, config), Part(decoder, config)


def vae_config(tensors: dict[str, torch.Tensor]) -> dict:
    """Keywords of LatentEncoder and SkipDecoder from the shapes of their tensors."""
    depth = _count(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return {
        "channels": tuple(tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(depth)),
        "layers": _count(tensors, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
    }


def build_encoder(config: dict, tensors, ops=nn, what: str = "The encoder of Any-to-Bokeh's VAE"):
    from .vae import LatentEncoder

    with torch.device("meta"):
        network = LatentEncoder(**config)
    return load_strict(adopt(network, ops), tensors, what)


def build_decoder(config: dict, tensors, ops=nn, what: str = "The decoder of Any-to-Bokeh's VAE"):
    from .vae import SkipDecoder

    with torch.device("meta"):
        network = SkipDecoder(**config)
    return load_strict(adopt(network, ops), tensors, what)


# Image encoder


def _read_image_encoder(path: Path) -> Part:
    tensors, given = _read(path, "image_encoder")
    tensors.pop(_POSITIONS, None)
    if "vision_model.embeddings.class_embedding" not in tensors or "visual_projection.weight" not in tensors:
        raise BokehError(
            f"{path.name} is no CLIP vision model with projection (found: {', '.join(list(tensors)[:3])}); choose {ENCODER_SOURCE}."
        )
    config = encoder_config(tensors, given.get("num_attention_heads"))
    build_image_encoder(config, tensors, what=f"{path.name}, as the image encoder of Any-to-Bokeh,")
    return Part(tensors, config)


def build_image_encoder(config: dict, tensors, ops=nn, what: str = "The image encoder of Any-to-Bokeh"):
    with torch.device("meta"):
        network = ImageEncoder(**config, ops=ops)
    return load_strict(network, tensors, what)


# For `bokeh models check`

LICENCE = "non-commercial: fine-tuned from Stable Video Diffusion, in a CC BY-NC 4.0 repository; none of its own is stated"


def report(tensors: dict[str, torch.Tensor], path: Path) -> Report | None:
    """What a file or folder of Any-to-Bokeh is: UNet, VAE, or the release's folder; None for anything else."""
    if tensors:
        if "conv_in_mpi.weight" in tensors:
            return _checked("Any-to-Bokeh: UNet", _unet_facts(tensors), lambda: _read_unet(path, True))
        if "decoder.skip_conv_1.weight" in tensors:
            return _checked("Any-to-Bokeh: VAE", _vae_facts(tensors), lambda: _read_vae(path))
        return None
    try:
        unet, _ = _read(path, "unet")
    except BokehError:
        return None
    if not path.is_dir() or "conv_in_mpi.weight" not in unet:
        return None
    return _checked("Any-to-Bokeh: folder with UNet, VAE and image encoder", _unet_facts(unet), lambda: read_files(path))


def _checked(title: str, facts: tuple, read: Callable) -> Report:
    try:
        read()
    except BokehError as error:
        return Report(title, facts, (str(error),), LICENCE)
    return Report(title, facts, (), LICENCE)


def _unet_facts(tensors) -> tuple[tuple[str, str], ...]:
    config = unet_config(tensors)
    fusers = sum(name.endswith(".fuser.alpha_attn") for name in tensors)
    open_gates = [float(tensors[name]) for name in tensors if name.endswith(".alpha_attn")]
    return (
        ("widths", ", ".join(map(str, config["block_out_channels"]))),
        ("fusers", str(fusers)),
        (
            "attention gates, tanh",
            f"{min(map(math.tanh, open_gates)):.4f} to {max(map(math.tanh, open_gates)):.4f}" if open_gates else "none",
        ),
        ("were the visual tokens trained?", "compare with the public SVD-xt UNet: bokeh models check FILE --against ITS_UNET"),
    )


def _vae_facts(tensors) -> tuple[tuple[str, str], ...]:
    skips = [float(tensor.float().abs().mean()) for name, tensor in tensors.items() if ".skip_conv_" in name]
    return (
        ("widths", ", ".join(map(str, vae_config(tensors)["channels"]))),
        ("skip connections, mean size of weights", ", ".join(f"{size:.2e}" for size in skips) + " (1e-05 before training)"),
    )


def visual_tokens_trained(unet: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> tuple[bool, float, float]:
    """Were the visual tokens used while the released UNet was trained (SPEC section 3.2)?

    conv_in_mpi began as a copy of the first half of the base's conv_in. Weight decay alone shrinks it by one common factor; anything
    else changes its structure. unet: tensors of the release; base: of the public Stable Video Diffusion xt UNet.
    Returns (answer, the factor, what the factor leaves unexplained as a share of the weights).
    """
    if "conv_in_mpi.weight" not in unet or "conv_in.weight" not in base:
        raise BokehError("The comparison needs the UNet of Any-to-Bokeh and, to compare it with, the public SVD-xt UNet.")
    trained = unet["conv_in_mpi.weight"].double()
    start = base["conv_in.weight"][:, : trained.shape[1]].double()
    if start.shape != trained.shape:
        raise BokehError(f"The base UNet has conv_in of shape {list(base['conv_in.weight'].shape)}; expected that of the SVD-xt UNet.")
    factor = float((trained * start).sum() / (start * start).sum())
    rest = float((trained - factor * start).norm() / trained.norm().clamp(min=1e-30))
    return rest > 0.01, factor, rest


def against(path: str | Path, base: str | Path) -> str:
    """The answer of `visual_tokens_trained` for two files or folders, in a sentence."""
    (unet, _), (start, _) = (_read(Path(one), "unet") for one in (path, base))
    trained, factor, rest = visual_tokens_trained(unet, start)
    numbers = f"conv_in_mpi is {factor:.6f} times the base's conv_in, {100 * rest:.3f} % of it left unexplained"
    if trained:
        return f"{numbers}: it was trained, so the masks were on, and the loader's switch for them deserves an experiment."
    return f"{numbers}: weight decay alone, so the masks were off in training too; leave the loader's switch for them off."
