"""MONAI's diffusion U-Net with a vector of conditions, in a form that TorchScript compiles."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, WrappedUpsample, get_timestep_embedding
from torch import nn

from scripts.layers.float32_convolutions import keep_in_float32
from scripts.layers.lean_blocks import SpatialAttention

__all__ = ["ConditionedUNet"]


class ConditionedUNet(DiffusionModelUNet):
    """
    MONAI's ``DiffusionModelUNet`` without cross-attention and ControlNet: the same parameters and results, for a vector of
    conditions instead of a class label. A small network makes of the vector what is added to the embedding of the time.

    Args:
        condition_size: length of the vector of conditions.
        kwargs: arguments of ``DiffusionModelUNet``.
    """

    def __init__(self, condition_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            x: ``BxCxHxWxD``.
            timesteps: ``B``.
            conditions: ``BxK``.
        """
        time = get_timestep_embedding(timesteps, self.block_out_channels[0]).to(x.dtype)
        embedding = self.time_embed(time) + self.class_embedding(conditions).to(x.dtype)
        h = self.conv_in(x)
        kept: list[torch.Tensor] = [h]
        for down in self.down_blocks:
            h, maps = down(h, embedding)
            kept += maps
        h = self.middle_block(h, embedding)
        for up in self.up_blocks:
            count = len(up.resnets)  # type: ignore[arg-type]
            h = up(h, kept[-count:], embedding)
            kept = kept[:-count]
        return self.out(h)


class _Upsample(nn.Sequential):
    """MONAI's ``WrappedUpsample``: layers one after the other. The embedding is not used."""

    def __init__(self, block: WrappedUpsample) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x)
        return x
