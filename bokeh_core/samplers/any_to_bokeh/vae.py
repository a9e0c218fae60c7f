"""The VAE of Any-to-Bokeh in two halves: Stable Video Diffusion's, with skip connections from encoder to decoder (SPEC section 5).

Needs diffusers; import it inside functions.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.autoencoders.vae import Encoder
from einops import rearrange
from torch import nn

from .network import use_mixers
from .preparation import SCALE


class LatentEncoder(nn.Module):
    """Pictures to latents, one by one. Names of its tensors: encoder.*, quant_conv.*."""

    def __init__(self, channels: tuple[int, ...], layers: int, latent_channels: int = 4):
        super().__init__()
        kinds = ("DownEncoderBlock2D",) * len(channels)
        self.encoder = Encoder(3, latent_channels, down_block_types=kinds, block_out_channels=channels, layers_per_block=layers)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """(mean, std, residuals) of images [n, 3, H, W] in -1..1.

        mean, std  [n, 4, H/8, W/8] of the latents before scaling
        residuals  what entered each down block but the first, [n, C_i, H / 2^i, W / 2^i] for i = 1, 2, 3. The first one is 70 %
                   of the memory and costs nothing to make again: see `first_residual`
        """
        x = self.encoder.conv_in(images)
        residuals = []
        for block in self.encoder.down_blocks:
            residuals.append(x)
            x = block(x)
        x = self.encoder.conv_out(self.encoder.conv_act(self.encoder.conv_norm_out(self.encoder.mid_block(x))))
        mean, log_variance = self.quant_conv(x).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp(), residuals[1:]

    def first_residual(self, images: torch.Tensor) -> torch.Tensor:
        """[n, C_0, H, W] what entered the first down block."""
        return self.encoder.conv_in(images)


class SkipDecoder(TemporalDecoder):
    """Latents to pictures, a window of frames at a time: its temporal layers mix all frames of a window.

    Names of its tensors, below `decoder.`: diffusers' and skip_conv_1 ... skip_conv_4.
    """

    def __init__(self, channels: tuple[int, ...], layers: int, latent_channels: int = 4):
        super().__init__(in_channels=latent_channels, out_channels=3, block_out_channels=channels, layers_per_block=layers)
        use_mixers(self)
        into = [channels[-1], *reversed(channels)]  # channels that enter each up block
        for index, channels_of_residual in enumerate(self.residual_channels(channels)):
            self.add_module(f"skip_conv_{index + 1}", nn.Conv2d(channels_of_residual, into[index], 1, bias=False))

    @staticmethod
    def residual_channels(channels: tuple[int, ...]) -> list[int]:
        """Channels of the residuals in the order of the up blocks, deepest first: a down block's input has its predecessor's."""
        return [*reversed(channels[:-1]), channels[0]]

    def forward(self, latents: torch.Tensor, residuals: list[torch.Tensor]) -> torch.Tensor:
        """[frames, 3, H, W] in about -1..1 of one window.

        latents    [frames, 4, H/8, W/8] scaled
        residuals  of the same frames, shallowest first, as LatentEncoder gives them, the first one included
        """
        frames = len(latents)
        indicator = torch.zeros(1, frames, device=latents.device)  # diffusers' blocks read the number of frames from it
        x = self.mid_block(self.conv_in(latents / SCALE), image_only_indicator=indicator)
        for index, (block, residual) in enumerate(zip(self.up_blocks, reversed(residuals), strict=True)):
            x = x + getattr(self, f"skip_conv_{index + 1}")(residual)
            x = block(x, image_only_indicator=indicator)
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        x = self.time_conv_out(rearrange(x, "f c h w -> 1 c f h w"))
        return rearrange(x, "1 c f h w -> f c h w")
