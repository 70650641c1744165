"""The network of the generator: MONAI's diffusion U-Net, told where a voxel is and what volume it is to make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

__all__ = ["LatentUNet"]

NUM_TIMESTEPS = 1000  # what MONAI's embedding of the time is made for


class LatentUNet(nn.Module):
    """
    MONAI's ``DiffusionModelUNet`` with

    - channels of coordinates beside the latent: the position in the volume from -1 to 1 along each axis, its sine and its
      cosine (Liu et al., CoordConv, https://arxiv.org/abs/1807.03247). A convolution knows nothing of where it is, and what
      it makes depends on that: heads have one nose;
    - a vector of conditions, of which a small network makes something that is added to the embedding of the time, as
      MONAI's class embedding is.

    Args:
        spatial_dims: 2 or 3.
        latent_channels: channels of the latent.
        condition_size: length of the vector of conditions.
        channels: of each level.
        attention_levels: which levels have attention. The middle block always has it.
        num_res_blocks: residual blocks of each level.
        norm_num_groups: groups of the normalisation; must divide all ``channels``.
        num_head_channels: channels of a head of attention; must divide the channels where there is attention.

    Attributes:
        arguments: all of them, plain JSON.
        multiple: number of voxels that a latent's sizes must be multiples of.

    Raises:
        ValueError: for arguments that do not fit each other.
    """

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
    ) -> None:
        super().__init__()
        if len(attention_levels) != len(channels):
            raise ValueError(
                f"`attention_levels` has {len(attention_levels)} entries for {len(channels)} levels (`channels`); it needs "
                "one for each."
            )
        for width, attends in zip(channels, [*attention_levels[:-1], True]):
            if width % norm_num_groups or (attends and width % num_head_channels):
                raise ValueError(
                    f"`channels` has {width}; it must be a multiple of `norm_num_groups` {norm_num_groups}, and with "
                    f"attention of `num_head_channels` {num_head_channels}."
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
        }
        self.multiple = 2 ** (len(channels) - 1)
        self.unet = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=latent_channels + 3 * spatial_dims,
            out_channels=latent_channels,
            num_res_blocks=self.arguments["num_res_blocks"],
            channels=channels,
            attention_levels=attention_levels,
            norm_num_groups=norm_num_groups,
            num_head_channels=num_head_channels,
            num_class_embeds=1,
            use_flash_attention=True,
        )
        # MONAI's forward adds what this makes of `class_labels` to the embedding of the time
        width = channels[0] * 4
        told = nn.Sequential(nn.Linear(condition_size, width), nn.SiLU(), nn.Linear(width, width))
        self.unet.class_embedding = told  # type: ignore[assignment]

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
        return self.unet(torch.cat([x, coordinates(x, extent)], 1), timesteps, class_labels=context)


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
