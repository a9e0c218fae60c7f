"""Installed beside the pack in the tests' ComfyUI: what lets the core's own FLUX code run on tiny stand-ins.

Text encoders: the core's FluxClipModel with the core's tokenizers, one narrow layer each, because the core's loaders only build T5-XXL at
full size. Loader: ComfyUI before 0.30 takes FLUX's width or number of heads for granted; here both follow from the file, as they do now.
"""

import types

import comfy.model_detection
import comfy.sd
import comfy.text_encoders.flux
import torch

HEAD = 128
detect = comfy.model_detection.detect_unet_config


def detect_by_shape(state_dict, prefix, *args, **keywords):
    config = detect(state_dict, prefix, *args, **keywords)
    if config and config.get("image_model") == "flux":
        config["hidden_size"], config["context_in_dim"] = state_dict[prefix + "txt_in.weight"].shape
        config["num_heads"] = config["hidden_size"] // HEAD
    return config


comfy.model_detection.detect_unet_config = detect_by_shape


def tiny_clip(width=64):
    made = comfy.text_encoders.flux.flux_clip()
    target = types.SimpleNamespace(params={}, clip=made, tokenizer=comfy.text_encoders.flux.FluxTokenizer)

    options = {
        "clip_l_model_config": {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 1, "num_hidden_layers": 1},
        "t5xxl_model_config": {"d_model": width, "d_ff": width, "d_kv": width, "num_heads": 1, "num_layers": 1},
    }
    clip = comfy.sd.CLIP(target, model_options=options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in clip.cond_stage_model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = (1 + values if "norm" in name else values).to(parameter)
    return clip


class StandInFluxClip:
    CATEGORY = "stand-ins"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (tiny_clip(),)


NODE_CLASS_MAPPINGS = {"StandInFluxClip": StandInFluxClip}
