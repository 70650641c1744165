"""The network of the generator: MONAI's diffusion U-Net, told where a voxel is and what volume it is to make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scripts.diffusion.conditioned_unet import ConditionedUNet

__all__ = ["LatentUNet"]

NUM_TIMESTEPS = 1000  # what MONAI's embedding of the time is made for
LEAST_TIME = 1e-4  # where the time is divided by, or what is left of it
LOGIT = 4.0  # logits of the gain per unit of the network's output: they span more than means do


class LatentUNet(nn.Module):
    """
    MONAI's ``DiffusionModelUNet`` with

    - channels of coordinates beside the latent: the position in the volume from -1 to 1 along each axis, its sine and its
      cosine (Liu et al., CoordConv, https://arxiv.org/abs/1807.03247). A convolution knows nothing of where it is, and what
      it makes depends on that: heads have one nose;
    - a vector of conditions, of which a small network makes something that is added to the embedding of the time, as
      MONAI's class embedding is;
    - on request three outputs for each value, of which :py:func:`posterior` makes the clean latent.

    Args:
        spatial_dims: 2 or 3.
        latent_channels: channels of the latent.
        condition_size: length of the vector of conditions.
        channels: of each level.
        attention_levels: which levels have attention. The middle block always has it.
        num_res_blocks: residual blocks of each level.
        norm_num_groups: groups of the normalisation; must divide all ``channels``.
        num_head_channels: channels of a head of attention; must divide the channels where there is attention.
        gain: whether the network predicts mean, gain and residual of each value.
        amplitude: deviation of each channel of the latents, for ``gain``; None where weights that are loaded have it.

    Attributes:
        arguments: all of them, plain JSON.
        multiple: number of voxels that a latent's sizes must be multiples of.

    Raises:
        ValueError: for arguments that do not fit each other.
    """

    __constants__ = ("gain",)  # for TorchScript, which otherwise compiles what it leaves out

    def __init__(
        self,
        spatial_dims: int,
        latent_channels: int,
        condition_size: int,
        channels: Sequence[int],
        attention_levels: Sequence[bool],
        num_res_blocks: int | Sequence[int] = 1,
        norm_num_groups: int = 16,
        num_head_channels: int = 32,
        gain: bool = False,
        amplitude: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if len(attention_levels) != len(channels):
            raise ValueError(
                f"`attention_levels` has {len(attention_levels)} entries for {len(channels)} levels (`channels`); it needs "
                "one for each."
            )
        for width, attends in zip(channels, [*attention_levels[:-1], True]):
            multiple = math.lcm(norm_num_groups, num_head_channels if attends else 1)
            if width % multiple:
                raise ValueError(
                    f"`channels` has {width}; {'with' if attends else 'without'} attention it must be a multiple of "
                    f"{multiple} (`norm_num_groups` {norm_num_groups}, `num_head_channels` {num_head_channels})."
                )
        self.arguments: dict[str, Any] = {
            "spatial_dims": spatial_dims,
            "latent_channels": latent_channels,
            "condition_size": condition_size,
            "channels": list(channels),
            "attention_levels": [bool(attends) for attends in attention_levels],
            "num_res_blocks": [num_res_blocks] * len(channels) if isinstance(num_res_blocks, int) else list(num_res_blocks),
            "norm_num_groups": norm_num_groups,
            "num_head_channels": num_head_channels,
            "gain": gain,
        }
        self.gain, self.logit = gain, LOGIT
        if gain:
            strength = torch.ones(latent_channels) if amplitude is None else torch.as_tensor(amplitude, dtype=torch.float32)
            self.register_buffer("amplitude", strength.reshape(1, -1, *[1] * spatial_dims).clone())
        self.multiple = 2 ** (len(channels) - 1)
        self.unet = ConditionedUNet(
            condition_size,
            spatial_dims=spatial_dims,
            in_channels=latent_channels + 3 * spatial_dims,
            out_channels=latent_channels * (3 if gain else 1),
            num_res_blocks=self.arguments["num_res_blocks"],
            channels=channels,
            attention_levels=attention_levels,
            norm_num_groups=norm_num_groups,
            num_head_channels=num_head_channels,
            use_flash_attention=True,
        )

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, extent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            x: noisy latents, ``BxCxHxWxD``, sizes that are multiples of ``multiple``.
            timesteps: ``B``, from 0 (no noise) to 1000 (nothing else).
            context: vectors of conditions, ``BxK``.
            extent: the share of each axis that is volume, ``Bx3``, where the latents are padded at their end; None for all.

        Returns:
            what the network was trained to predict, of the shape of ``x``.
        """
        place = coordinates(x, extent)
        if not self.gain:
            return self.unet(torch.cat([x, place], 1), timesteps, context)
        amplitude: torch.Tensor = self.amplitude  # type: ignore[assignment]
        time = time_of(timesteps, x.dim())
        strength = (((1 - time) * amplitude).square() + time.square()).sqrt()
        prior_mean, logit, residual = self.unet(torch.cat([x / strength, place], 1), timesteps, context).float().chunk(3, 1)
        mean, deviation = posterior(x, time, amplitude, amplitude * prior_mean, self.logit * logit)
        return mean + deviation * residual


def time_of(
    timesteps: torch.Tensor, dim: int, num_timesteps: int = NUM_TIMESTEPS, least: float = LEAST_TIME
) -> torch.Tensor:
    """Times, away from 0 and 1, ``Bx1x1x1x1`` of ``dim`` dimensions, from timesteps ``B``."""
    return (timesteps.float() / num_timesteps).clamp(least, 1 - least).reshape([-1] + [1] * (dim - 1))


def posterior(
    noisy: torch.Tensor, time: torch.Tensor, amplitude: torch.Tensor, mean: torch.Tensor, log_ratio: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What is known of each clean value by Bayes' rule. Before the noisy latent is seen, the value has a Gaussian distribution,
    of which ``mean`` and ``log_ratio`` are predicted; so it has afterwards. The noisy value counts by the gain (as in
    Kalman's filter), a number from 0 to 1, and the predicted mean by the rest: where the noise is strong or the value is
    certain, as in air, the predicted mean; elsewhere the noisy value.

    With a mean and a logarithm of 0 this is Wiener's filter, the best linear estimate of each value by itself. A network
    whose last layer is zero begins there.

    What neighbours and other channels tell beyond it is predicted in units of the deviation afterwards, as Karras et al.
    (https://arxiv.org/abs/2206.00364) predict it in those of Wiener's filter: with little noise it is the noise, and the
    network need not reproduce the value that it sees.

    Args:
        noisy: ``(1 - time) * clean + time * noise``, ``BxCxHxWxD``.
        time: between 0 and 1, ``Bx1x1x1x1``.
        amplitude: deviation of each channel, ``1xCx1x1x1``.
        mean: of each value before, like ``noisy``.
        log_ratio: logarithm of its variance before, in units of the channel's, like ``noisy``.

    Returns:
        mean and deviation of each value afterwards, like ``noisy``.
    """
    gain = torch.sigmoid(2 * torch.log((1 - time) * amplitude / time) + log_ratio)
    return (1 - gain) * mean + gain * noisy / (1 - time), gain.sqrt() * time / (1 - time)


def coordinates(x: torch.Tensor, extent: torch.Tensor | None) -> torch.Tensor:
    """
    The position of each voxel, its sine and its cosine.

    Args:
        x: ``BxCxHxWxD``, whose shape, type and device count.
        extent: share of each axis that is volume, ``Bx3``; the position runs from -1 to 1 over that, and beyond it on.

    Returns:
        ``Bx9xHxWxD``.
    """
    axes = x.dim() - 2
    shape = [x.shape[0], 1] + list(x.shape[2:])
    found: list[torch.Tensor] = []
    for axis in range(axes):
        size = x.shape[axis + 2]
        share = (torch.arange(size, device=x.device, dtype=torch.float32) + 0.5) / size
        position = share[None].expand(x.shape[0], -1)
        if extent is not None:
            position = position / extent[:, axis, None]
        along = [x.shape[0], 1] + [1] * axes
        along[axis + 2] = size
        position = (2 * position - 1).reshape(along).expand(shape)
        found += [position, torch.sin(math.pi * position), torch.cos(math.pi * position)]
    return torch.cat(found, 1).to(x.dtype)
