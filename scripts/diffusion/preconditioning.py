"""The denoiser: what goes into the U-Net, and how a clean latent is made of what comes out (``gain``, ``x``, ``v``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets.diffusion_model_unet import zero_module
from torch import Tensor, nn

from scripts.diffusion.network import LatentUNet

PREDICTIONS = ("gain", "x", "v")
LEAST_TIME = 1e-4  # where the time is divided by, or what is left of it
LOGIT = 4.0  # logits of the gain per unit of the U-Net's output: they span more than means do


class Denoiser(nn.Module):
    """
    Estimates clean latents from noisy ones, by a :py:class:`scripts.diffusion.network.LatentUNet`.

    Args:
        spatial_dims: 2 or 3.
        latent_channels: number of channels of the latent.
        condition_size: length of the vector of conditions.
        channels: number of channels of each level.
        num_res_blocks: number of residual blocks of each level.
        prediction: what the U-Net predicts: the clean latent (``"x"``), the velocity ``clean - noise`` (``"v"``), or mean,
            gain and residual of each clean value (``"gain"``, see :py:func:`posterior`).
        amplitude: deviation of each channel of the latents, for ``"gain"``; None where weights that are loaded have it.
        spatial_channels: number of channels of the spatial conditions. A linear function of each of their voxels is added to
            the U-Net's output: the latent of an image is nearly a weighted sum of those of its classes.
        kwargs: further arguments of ``DiffusionModelUNet``, plain JSON, such as ``attention_levels``.

    Attributes:
        arguments: all of them, plain JSON.
        multiple: number of voxels that a latent's sizes must be multiples of.
    """

    __constants__ = ("gain", "velocity")  # for TorchScript, which otherwise compiles what it leaves out

    def __init__(
        self,
        spatial_dims: int,
        latent_channels: int,
        condition_size: int,
        channels: Sequence[int],
        num_res_blocks: int | Sequence[int] = 1,
        prediction: str = "gain",
        amplitude: Sequence[float] | Tensor | None = None,
        spatial_channels: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"`prediction` is {prediction!r}; it must be one of {', '.join(PREDICTIONS)}.")
        blocks = [num_res_blocks] * len(channels) if isinstance(num_res_blocks, int) else list(num_res_blocks)
        of_unet = {"channels": list(channels), "num_res_blocks": blocks, **kwargs}
        self.arguments: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "latent_channels": latent_channels,
            "condition_size": condition_size,
            "prediction": prediction,
            "spatial_channels": spatial_channels,
            **of_unet,
        }
        self.multiple = 2 ** (len(channels) - 1)
        self.gain, self.velocity = prediction == "gain", prediction == "v"
        self.logit, self.least_time = LOGIT, LEAST_TIME  # TorchScript knows no constants of a module
        if self.gain:
            strength = torch.ones(latent_channels) if amplitude is None else torch.as_tensor(amplitude, dtype=torch.float32)
            self.register_buffer("amplitude", strength.reshape(1, -1, *[1] * spatial_dims).clone())
        outputs = latent_channels * (3 if self.gain else 1)
        inputs = latent_channels, outputs, condition_size, spatial_channels
        self.unet = LatentUNet(spatial_dims, *inputs, use_flash_attention=True, **of_unet)
        self.from_spatial = None
        if spatial_channels:
            linear = Convolution(spatial_dims, spatial_channels, outputs, kernel_size=1, conv_only=True)
            self.from_spatial = zero_module(linear)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, extent: Tensor | None = None, spatial: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: noisy latents, ``BxCxHxWxD``, sizes that are multiples of ``multiple``.
            time: ``B``, from 0 (no noise) to 1 (nothing else).
            context: vectors of conditions, ``BxK``.
            extent: share of each axis that is volume, ``Bx3``, where the latents are padded at their end; None for all.
            spatial: spatial conditions, ``BxSxHxWxD``; None without.

        Returns:
            the clean latents, of the shape of ``x``.
        """
        t = time.float().reshape([-1] + [1] * (x.dim() - 1))
        scaled = x
        if self.gain:
            amplitude: Tensor = self.amplitude  # type: ignore[assignment]
            t = t.clamp(self.least_time, 1 - self.least_time)
            scaled = x / (((1 - t) * amplitude).square() + t.square()).sqrt()
        output = self.unet(scaled, time, context, extent, spatial)
        if self.from_spatial is not None and spatial is not None:
            output = output + self.from_spatial(spatial)
        if self.gain:
            prior_mean, logit, residual = output.float().chunk(3, 1)
            mean, deviation = posterior(x, t, amplitude, amplitude * prior_mean, self.logit * logit)
            return mean + deviation * residual
        return x + t * output if self.velocity else output


def posterior(noisy: Tensor, time: Tensor, amplitude: Tensor, mean: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """
    What is known of each clean value by Bayes' rule, from a Gaussian of which ``mean`` and ``log_ratio`` are predicted and
    from the noisy value, which counts by the gain, as in Kalman's filter. With a mean and a logarithm of 0, where a network
    begins whose last layer is zero, this is Wiener's filter, the best linear estimate of each value by itself.

    A residual is predicted in units of the deviation afterwards (Karras et al., https://arxiv.org/abs/2206.00364): with
    little noise it is the noise, and the network need not reproduce the value that it sees.

    Args:
        noisy: ``(1 - time) * clean + time * noise``, ``BxCxHxWxD``.
        time: between 0 and 1, ``Bx1x1x1x1``.
        amplitude: deviation of each channel, ``1xCx1x1x1``.
        mean: mean of each value before, like ``noisy``.
        log_ratio: logarithm of its variance before, in units of the channel's.

    Returns:
        mean and deviation of each value afterwards.
    """
    gain = torch.sigmoid(2 * torch.log((1 - time) * amplitude / time) + log_ratio)
    return (1 - gain) * mean + gain * noisy / (1 - time), gain.sqrt() * time / (1 - time)
