"""FLUX.1-Kontext from the files on disk, as diffusers' networks. For use without ComfyUI: sampling in plain Python, and training.

Everything comes from the files: a diffusers folder, or single files in the original layout whose shapes say the rest.
"""

from pathlib import Path

import torch

from ...checkpoints.loading import load_strict
from ...checkpoints.reading import read_checkpoint
from ...checkpoints.stable_diffusion import Part, read_folder, read_vae
from ...errors import BokehError
from .recipe import TEXT_TOKENS, VAE_SCALE, VAE_SHIFT
from .sampler import EncodeText

MODEL = "FLUX.1-Kontext-dev"
CLIP_TOKENS = 77
TEXT_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def load_transformer(path: str | Path, dtype: torch.dtype = torch.bfloat16):
    """The frozen FluxTransformer2DModel of a diffusers folder (or its subfolder `transformer`), or of one file (flux1-kontext-dev).

    Raises BokehError for other files, and for weights packed to fewer than 16 bits, which only ComfyUI runs.
    """
    from diffusers import FluxTransformer2DModel

    path = Path(path)
    part = read_folder(path, "transformer") if path.is_dir() else _from_file(path)
    tensors = {name: _unpacked(name, tensor, path).to(dtype) for name, tensor in part.tensors.items()}
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(part.config)
    return load_strict(network, tensors, f"{path.name}, taken for the transformer of {MODEL},")


def load_vae(path: str | Path, dtype: torch.dtype = torch.bfloat16):
    """The frozen AutoencoderKL of a diffusers folder (or its subfolder `vae`), or of one file (ae.safetensors)."""
    from diffusers import AutoencoderKL

    part = read_vae(path, VAE_SCALE)
    tensors = {name: tensor.to(dtype) for name, tensor in part.tensors.items()}
    around = {name: f"{name.removeprefix('use_')}.weight" in tensors for name in ("use_quant_conv", "use_post_quant_conv")}
    with torch.device("meta"):
        network = AutoencoderKL.from_config({"shift_factor": VAE_SHIFT, **part.config, **around})
    return load_strict(network, tensors, f"{Path(path).name}, taken for the VAE of {MODEL},")


class TextEncoders(torch.nn.Module):
    """CLIP and T5 of a diffusers folder. Frozen; nothing in their files is run.

    `tokenise` needs no network, `forward` no words: a data worker does the one, the device the other.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16):
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        super().__init__()
        folder = Path(folder)
        missing = [name for name in TEXT_FOLDERS if not (folder / name).is_dir()]
        if missing:
            raise BokehError(f"{folder} lacks the folders {', '.join(missing)}; expected the diffusers folder of {MODEL}.")
        try:
            self.clip_words, self.t5_words = (
                AutoTokenizer.from_pretrained(folder / name, local_files_only=True) for name in TEXT_FOLDERS[2:]
            )
            self.clip, self.t5 = (
                kind.from_pretrained(folder / name, local_files_only=True, use_safetensors=True, dtype=dtype)
                for kind, name in zip((CLIPTextModel, T5EncoderModel), TEXT_FOLDERS[:2], strict=True)
            )
        except (OSError, ValueError, KeyError) as error:
            raise BokehError(f"The text encoders in {folder} cannot be loaded ({error}); download {MODEL} again.") from error
        self.train(False).requires_grad_(False)

    def tokenise(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """([77] of CLIP, [512] of T5) int64, padded to these lengths; what is longer is cut."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = self.clip_words(prompt, max_length=CLIP_TOKENS, **options).input_ids[0]
        return clip, self.t5_words(prompt, max_length=TEXT_TOKENS, **options).input_ids[0]

    @torch.no_grad()
    def forward(self, clip: torch.Tensor, t5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T5 states [B, 512, D], CLIP pooled vector [B, P]) of tokens [B, 77] and [B, 512]. Padding is not masked, as published."""
        return self.t5(t5)[0], self.clip(clip).pooler_output

    @property
    def encode_text(self) -> EncodeText:
        """What `sampler.generate_stack` takes."""

        def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
            device = next(self.parameters()).device
            return self(*(tokens[None].to(device) for tokens in self.tokenise(prompt)))

        return encode


def _from_file(path: Path) -> Part:
    """A file under diffusers' names or in the original layout (with or without ComfyUI's prefix)."""
    tensors = read_checkpoint(path).tensors
    tensors = {name.removeprefix("model.diffusion_model."): _unpacked(name, tensor, path) for name, tensor in tensors.items()}
    if "double_blocks.0.img_attn.qkv.weight" in tensors:
        from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

        if len(tensors["double_blocks.0.img_attn.qkv.bias"]) != 3 * 3072:
            raise BokehError(f"{path.name} is not as wide as {MODEL}; give a diffusers folder for a network of another size.")
        tensors = convert_flux_transformer_checkpoint_to_diffusers(tensors)
    try:
        head = len(tensors["transformer_blocks.0.attn.norm_q.weight"])
        config = {
            "in_channels": tensors["x_embedder.weight"].shape[1],
            "num_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks.")),
            "num_single_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("single_transformer_blocks.")),
            "attention_head_dim": head,
            "num_attention_heads": len(tensors["x_embedder.bias"]) // head,
            "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
            "pooled_projection_dim": tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
            "guidance_embeds": any("guidance_embedder" in name for name in tensors),
        }
    except (KeyError, ValueError) as error:
        raise BokehError(f"{path.name} is no FLUX transformer (found: {', '.join(list(tensors)[:3])}); expected {MODEL}.") from error
    return Part(tensors, config)


def _unpacked(name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BokehError(
            f"{path.name} holds {name} as {str(tensor.dtype).removeprefix('torch.')}; expected weights of 16 or 32 bits: "
            f"use the bf16 file of {MODEL}. Packed files (fp8, GGUF) run in ComfyUI only."
        )
    return tensor
