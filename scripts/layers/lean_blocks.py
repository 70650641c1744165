"""MONAI's blocks with the same results and fewer feature maps in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock

from scripts.layers.float32_convolutions import bfloat16_fails

__all__ = ["GroupNorm", "ResidualBlock", "SpatialAttention", "group_norm", "norm_silu_conv", "use_lean_blocks"]


def use_lean_blocks(blocks: nn.ModuleList) -> None:
    """
    Replace MONAI's residual, attention and norm blocks by those of this module, which take over their parameters.

    Args:
        blocks: of MONAI's ``Encoder`` or ``Decoder``, changed in place.
    """
    for i, block in enumerate(blocks):
        if isinstance(block, AEKLResBlock):
            blocks[i] = ResidualBlock(block)
        elif isinstance(block, SpatialAttentionBlock):
            blocks[i] = SpatialAttention(block)
        elif isinstance(block, nn.GroupNorm):
            blocks[i] = GroupNorm(block)


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """
    ``torch.nn.functional.group_norm`` in the data type of ``x`` on every device.

    CUDA's autocast would run it in float32 and keep a float32 result, which costs memory and gains nothing: the kernel
    accumulates in float32 for every input type.

    Args:
        x: ``BxCxHxWxD`` (or 1D, 2D).
        weight: ``C`` factors.
        bias: ``C`` summands.
        groups: number of groups of channels.
        eps: added to the variance.

    Returns:
        the same shape and data type as ``x``.
    """
    return _norm_with_statistics(x, weight, bias, groups, eps)[0]


def _norm_with_statistics(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.device.type != "cpu":  # what torch's own group_norm does; the CPU's kernel takes mixed types and memory formats
        x, weight, bias = x.contiguous(), weight.to(x.dtype), bias.to(x.dtype)
    size, channels = x.shape[0], x.shape[1]
    return torch.native_group_norm(x, weight, bias, size, channels, x.numel() // (size * channels), groups, eps)


class _NormSiluConv(torch.autograd.Function):
    """
    ``conv(silu(group_norm(x)))`` that keeps only ``x`` for the backward pass, where plain modules keep the results of norm
    and activation as well. The backward pass computes both again, in little time beside the convolution.
    """

    @staticmethod
    def forward(ctx: Any, x, norm_weight, norm_bias, weight, bias, groups: int, eps: float):  # type: ignore[override]
        h, mean, rstd = _norm_with_statistics(x, norm_weight, norm_bias, groups, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        ones = [1] * (x.ndim - 2)
        ctx.convolution = (ones, ones, ones, False, [0] * len(ones), 1)  # stride, padding, dilation, not transposed
        return torch.convolution(F.silu(h, inplace=True), weight.to(x.dtype), bias.to(x.dtype), *ctx.convolution)

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[override]
        x, norm_weight, norm_bias, weight, mean, rstd = ctx.saved_tensors
        normed = group_norm(x, norm_weight, norm_bias, ctx.groups, ctx.eps)
        needs_x, _, _, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        grad_h, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, F.silu(normed), weight.to(x.dtype), [len(weight)], *ctx.convolution, [True, needs_weight, needs_bias]
        )
        grad_h = torch.ops.aten.silu_backward(grad_h, normed)
        size, channels = x.shape[:2]
        if x.device.type != "cpu":
            x, grad_h, norm_weight = x.contiguous(), grad_h.contiguous(), norm_weight.to(x.dtype)
        grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_group_norm_backward(
            grad_h,
            x,
            mean,
            rstd,
            norm_weight,
            size,
            channels,
            x.numel() // (size * channels),
            ctx.groups,
            [needs_x, ctx.needs_input_grad[1], ctx.needs_input_grad[2]],
        )
        return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None


def norm_silu_conv(x: torch.Tensor, norm: nn.GroupNorm, conv: Any) -> torch.Tensor:
    """
    GroupNorm, SiLU and a convolution of kernel 3, for training: of the feature maps only ``x`` is kept for the backward
    pass.

    Args:
        x: ``BxCxHxWxD`` (or 1D, 2D), cast to the autocast type when autocast is on.
        norm: the norm.
        conv: a convolution of kernel 3, stride 1 and padding 1 with a bias.

    Returns:
        ``conv(silu(norm(x)))``.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    return _NormSiluConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.num_groups, norm.eps)  # type: ignore


class GroupNorm(nn.GroupNorm):
    """
    ``torch.nn.GroupNorm`` in the data type of its input on every device, see :py:func:`group_norm`.

    Args:
        norm: the norm whose parameters it takes over.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        nn.Module.__init__(self)
        self.num_groups, self.num_channels, self.eps, self.affine = norm.num_groups, norm.num_channels, norm.eps, True
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self.weight, self.bias, self.num_groups, self.eps)


class SpatialAttention(SpatialAttentionBlock):
    """MONAI's ``SpatialAttentionBlock`` (same parameters, same result) in a form that TorchScript compiles."""

    def __init__(self, block: SpatialAttentionBlock) -> None:
        nn.Module.__init__(self)
        self.spatial_dims = block.spatial_dims
        self.norm = GroupNorm(block.norm)
        self.attn = block.attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        x = self.norm(x).flatten(2).transpose(1, 2)
        x = self.attn(x)
        return x.transpose(1, 2).reshape(residual.shape) + residual


class ResidualBlock(AEKLResBlock):
    """
    MONAI's ``AEKLResBlock`` (same parameters, same result) that keeps two feature maps for the backward pass instead of
    six. Without gradients it activates and adds in place.

    Args:
        block: the block whose modules it takes over.
    """

    def __init__(self, block: AEKLResBlock) -> None:
        nn.Module.__init__(self)
        self.in_channels, self.out_channels = block.in_channels, block.out_channels
        self.norm1, self.conv1 = GroupNorm(block.norm1), block.conv1
        self.norm2, self.conv2 = GroupNorm(block.norm2), block.conv2
        self.nin_shortcut = block.nin_shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``BxCxHxWxD`` (or 1D, 2D).

        Returns:
            the same spatial shape with ``out_channels`` channels.
        """
        if torch.jit.is_scripting() or torch.jit.is_tracing() or not torch.is_grad_enabled():
            return self._plain(x)
        return self._training(x)

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        in_place = not torch.is_grad_enabled()
        h = self.conv1(F.silu(self.norm1(x), inplace=in_place))
        h = self.conv2(F.silu(self.norm2(h), inplace=in_place))
        x = self.nin_shortcut(x)
        if in_place and h.stride() == x.stride():  # `x + h` has the memory layout of x, and so must the sum in place
            return h.add_(x)
        return x + h

    @torch.jit.unused
    def _training(self, x: torch.Tensor) -> torch.Tensor:
        conv: Any = self.conv1.conv
        if bfloat16_fails(x, conv.kernel_size, padding=conv.padding):
            # the convolutions of `_plain` then run in float32; a map that small needs no saving
            return self._plain(x)
        h = norm_silu_conv(x, self.norm1, self.conv1.conv)
        h = norm_silu_conv(h, self.norm2, self.conv2.conv)
        return self.nin_shortcut(x) + h
