"""The U-Net of the generator: MONAI's, with coordinates beside the latent and a vector of conditions."""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, WrappedUpsample, get_timestep_embedding
from torch import Tensor, nn

from scripts.layers.float32_convolutions import keep_in_float32
from scripts.layers.lean_blocks import SpatialAttention

NUM_TIMESTEPS = 1000  # what MONAI's embedding of the time is made for


class LatentUNet(DiffusionModelUNet):
    """
    MONAI's ``DiffusionModelUNet`` without cross-attention and ControlNet, in a form that TorchScript compiles, with

    - :py:func:`coordinates` and spatial conditions as further input channels;
    - a vector of conditions instead of a class label. A small network makes of it what is added to the time's embedding.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of channels of the latent.
        out_channels: number of output channels.
        condition_size: length of the vector of conditions.
        spatial_channels: number of channels of the spatial conditions.
        kwargs: further arguments of ``DiffusionModelUNet``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        condition_size: int,
        spatial_channels: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, in_channels + 3 * spatial_dims + spatial_channels, out_channels, **kwargs)
        self.num_timesteps = NUM_TIMESTEPS  # TorchScript knows no constants of a module
        width = self.block_out_channels[0] * 4
        embedding = nn.Sequential(nn.Linear(condition_size, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = embedding  # type: ignore[assignment]
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, SpatialAttentionBlock):
                    setattr(module, name, SpatialAttention(child))
                elif isinstance(child, WrappedUpsample):
                    setattr(module, name, _Upsample(child))
        keep_in_float32(self)  # some of its convolutions, under the CPU's autocast

    def forward(  # type: ignore[override]
        self, x: Tensor, time: Tensor, context: Tensor, extent: Tensor | None = None, spatial: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: latents, ``BxCxHxWxD``.
            time: ``B``, from 0 to 1.
            context: vectors of conditions, ``BxK``.
            extent: share of each axis that is volume, ``Bx3``; None for all.
            spatial: spatial conditions, ``BxSxHxWxD``; None where the network has none.
        """
        inputs = [x, coordinates(x, extent)]
        if spatial is not None:
            inputs.append(spatial.to(x.dtype))
        h = self.conv_in(torch.cat(inputs, 1))
        sinusoids = get_timestep_embedding(self.num_timesteps * time, self.block_out_channels[0])
        embedding = self.time_embed(sinusoids.to(x.dtype))
        embedding = embedding + self.class_embedding(context).to(x.dtype)
        skips: list[Tensor] = [h]
        for down in self.down_blocks:
            h, maps = down(h, embedding)
            skips += maps
        h = self.middle_block(h, embedding)
        for up in self.up_blocks:
            count = len(up.resnets)  # type: ignore[arg-type]
            h = up(h, skips[-count:], embedding)
            skips = skips[:-count]
        return self.out(h)


class _Upsample(nn.Sequential):
    """MONAI's ``WrappedUpsample``: layers one after the other. The embedding is not used."""

    def __init__(self, block: WrappedUpsample) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x)
        return x


def coordinates(x: Tensor, extent: Tensor | None) -> Tensor:
    """
    The position of each voxel of ``x`` along each axis, its sine and its cosine, ``Bx9xHxWxD`` (CoordConv,
    https://arxiv.org/abs/1807.03247). Positions run from -1 to 1 over ``extent``, the share of each axis that is volume,
    ``Bx3``, and beyond it on.
    """
    axes = x.dim() - 2
    shape = [x.shape[0], 1] + list(x.shape[2:])
    found: list[Tensor] = []
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
