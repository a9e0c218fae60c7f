"""Every model file that a shipped workflow names, as a tiny stand-in where ComfyUI looks for it (FLUX, which core loads, excepted)."""

from pathlib import Path

import torch

from . import any_to_bokeh, bokehdiff, depth, magicbokeh, salient


def write_all(models: Path) -> None:
    """models: the host's folder of models."""
    (models / "depthanything").mkdir(parents=True, exist_ok=True)
    torch.save(depth.depth_anything(), models / "depthanything" / "depth_anything_v2_vits.pth")
    torch.save(depth.video_depth_anything(), models / "depthanything" / "video_depth_anything_vits.pth")
    (models / "salient").mkdir(exist_ok=True)
    salient.write_ldf(models / "salient" / "model-40")
    bokehdiff.write_all(models / "checkpoints", models / "diffusers", models / "loras", models / "vae", "RealVisXL_V5.0_fp16")
    magicbokeh.write_base(models / "diffusers" / "stable-diffusion-2-1-base")
    magicbokeh.write_pickle(models / "loras" / "lora.pkl")
    any_to_bokeh.write(models / "diffusers" / "any_to_bokeh")
