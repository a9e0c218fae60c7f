"""From one prediction of the noise to the clean latent: the step that BokehDiff (SPEC section 2) and MagicBokeh (SPEC section 6) take."""

import torch


def alphas_cumprod(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> torch.Tensor:
    """[steps] float32 alpha bar, the share of the signal's power left: Stable Diffusion's betas, even in their square roots."""
    return (1 - torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2).cumprod(0)


def one_step(latent: torch.Tensor, noise: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """x0 = (z - sqrt(1 - a) eps) / sqrt(a) in float32, like latent and noise [B, 4, h, w]; nothing is clipped."""
    return (latent.float() - (1 - alpha_bar) ** 0.5 * noise.float()) / alpha_bar**0.5
