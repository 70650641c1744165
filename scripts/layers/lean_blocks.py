"""MONAI's blocks with fewer feature maps in memory: with the same results, or with a norm of each voxel's channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock

from scripts.layers.float32_convolutions import bfloat16_fails


def use_lean_blocks(blocks: nn.ModuleList, norm: str = "group") -> None:
    """
    Replace MONAI's residual, attention and norm blocks by those of this module, which take over their parameters.

    Args:
        blocks: of MONAI's ``Encoder`` or ``Decoder``, changed in place.
        norm: ``"group"``, as MONAI has it, or ``"rms"``.

    Raises:
        ValueError: for another ``norm``.
    """
    if norm not in NORMS:
        raise ValueError(f"`norm` is {norm!r}; it must be one of {', '.join(NORMS)}.")
    make_norm = NORMS[norm]
    for i, block in enumerate(blocks):
        if isinstance(block, AEKLResBlock):
            blocks[i] = ResidualBlock(block, make_norm)
        elif isinstance(block, SpatialAttentionBlock):
            blocks[i] = SpatialAttention(block, make_norm)
        elif isinstance(block, nn.GroupNorm):
            blocks[i] = make_norm(block)


def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
        the same shape and data type as ``x``, and the mean and the inverse deviation of each group.
    """
    if x.device.type != "cpu":  # what torch's own group_norm does; the CPU's kernel takes mixed types and memory formats
        x, weight, bias = x.contiguous(), weight.to(x.dtype), bias.to(x.dtype)
    size, channels = x.shape[0], x.shape[1]
    return torch.native_group_norm(x, weight, bias, size, channels, x.numel() // (size * channels), groups, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """
    Divide the channels of each voxel by their root mean square (Zhang and Sennrich, https://arxiv.org/abs/1910.07467), as
    the Deep Compression Autoencoder does (Chen et al., https://arxiv.org/abs/2410.10733). The result at a voxel depends on
    that voxel alone, so it is the same in a patch and in the whole volume.

    Args:
        x: ``BxCxHxWxD`` (or 1D, 2D).
        weight: ``C`` factors.
        bias: ``C`` summands.
        eps: added to the mean square.

    Returns:
        the same shape, data type and memory format as ``x``.
    """
    normed = x / _root_mean_square(x, eps)
    weight, bias = _of_channels(weight, x), _of_channels(bias, x)
    if torch.is_grad_enabled():
        return (normed * weight).add_(bias)
    return normed.mul_(weight).add_(bias)


def _root_mean_square(x: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype == torch.float16:  # squares could overflow
        mean_square = torch.linalg.vector_norm(x, dim=[1], keepdim=True).float().square() / x.shape[1]
    else:
        dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        mean_square = (x * x).mean([1], keepdim=True, dtype=dtype)
    return (mean_square + eps).sqrt().to(x.dtype)  # not `rsqrt`, which CUDA's autocast would run in float32


def _of_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value for each channel, in the type of ``x`` and in a shape that is broadcast to its own."""
    return values.to(x.dtype).view([1, -1] + [1] * (x.dim() - 2))


class _NormSiluConv(torch.autograd.Function):
    """
    ``conv(silu(norm(x)))`` that keeps only ``x`` for the backward pass, where plain modules keep the results of norm and
    activation as well. The backward pass computes both again, in little time beside the convolution.
    """

    @staticmethod
    def forward(ctx: Any, x, norm_weight, norm_bias, weight, bias, norm: GroupNorm | RMSNorm):  # type: ignore[override]
        h, *statistics = norm.with_statistics(x, norm_weight, norm_bias)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, *statistics)
        ctx.norm = norm
        ones = [1] * (x.ndim - 2)
        ctx.convolution = (ones, ones, ones, False, [0] * len(ones), 1)  # stride, padding, dilation, not transposed
        return torch.convolution(F.silu(h, inplace=True), weight.to(x.dtype), bias.to(x.dtype), *ctx.convolution)

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[override]
        x, norm_weight, norm_bias, weight, *statistics = ctx.saved_tensors
        normed = ctx.norm.with_statistics(x, norm_weight, norm_bias)[0]
        needs_x, needs_norm, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_h, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, F.silu(normed), weight.to(x.dtype), [len(weight)], *ctx.convolution, [True, needs_weight, needs_bias]
        )
        grad_h = torch.ops.aten.silu_backward(grad_h, normed)
        del normed
        grads = ctx.norm.gradients(grad_h, x, norm_weight, statistics, needs_x, needs_norm)
        return *grads, grad_weight, grad_bias, None


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
        return group_norm(input, self.weight, self.bias, self.num_groups, self.eps)[0]

    @torch.jit.unused
    def with_statistics(self, x, weight, bias):  # type: ignore[no-untyped-def]
        """The norm with these parameters, and what :py:meth:`gradients` needs of it."""
        return group_norm(x, weight, bias, self.num_groups, self.eps)

    @torch.jit.unused
    def gradients(self, grad, x, weight, statistics, needs_x: bool, needs_norm: bool):  # type: ignore[no-untyped-def]
        """Of input, weight and bias, from that of the result."""
        size, channels = x.shape[:2]
        if x.device.type != "cpu":
            x, grad, weight = x.contiguous(), grad.contiguous(), weight.to(x.dtype)
        voxels = x.numel() // (size * channels)
        needs = [needs_x, needs_norm, needs_norm]
        return torch.ops.aten.native_group_norm_backward(
            grad, x, *statistics, weight, size, channels, voxels, self.num_groups, needs
        )


class RMSNorm(nn.Module):
    """
    A norm of the channels of each voxel, see :py:func:`rms_norm`.

    Args:
        norm: a norm whose parameters it takes over.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.bias, self.eps)

    @torch.jit.unused
    def with_statistics(self, x, weight, bias):  # type: ignore[no-untyped-def]
        """The norm with these parameters; :py:meth:`gradients` needs no more, as a scale for each voxel is soon computed."""
        return (rms_norm(x, weight, bias, self.eps),)

    @torch.jit.unused
    def gradients(self, grad, x, weight, statistics, needs_x: bool, needs_norm: bool):  # type: ignore[no-untyped-def]
        """Of input, weight and bias, from that of the result."""
        scale = _root_mean_square(x, self.eps)
        normed = x / scale
        others = [0, *range(2, x.dim())]
        grad_weight = (grad * normed).sum(others) if needs_norm else None
        grad_bias = grad.sum(others) if needs_norm else None
        if not needs_x:
            return None, grad_weight, grad_bias
        grad = grad * _of_channels(weight, x)
        along = (grad * normed).mean([1], keepdim=True)
        return grad.sub_(normed.mul_(along)).div_(scale), grad_weight, grad_bias


MakeNorm = Callable[[nn.GroupNorm], GroupNorm | RMSNorm]
NORMS: dict[str, MakeNorm] = {"group": GroupNorm, "rms": RMSNorm}


class SpatialAttention(SpatialAttentionBlock):
    """
    MONAI's ``SpatialAttentionBlock`` (same parameters, with its norm the same result) in a form that TorchScript compiles.

    Args:
        block: the block whose modules it takes over.
        make_norm: makes its norm of MONAI's.
    """

    def __init__(self, block: SpatialAttentionBlock, make_norm: MakeNorm = GroupNorm) -> None:
        nn.Module.__init__(self)
        self.spatial_dims = block.spatial_dims
        self.norm = make_norm(block.norm)  # type: ignore[assignment]
        self.attn = block.attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        x = self.norm(x).flatten(2).transpose(1, 2)
        x = self.attn(x)
        return x.transpose(1, 2).reshape(residual.shape) + residual


class ResidualBlock(AEKLResBlock):
    """
    MONAI's ``AEKLResBlock`` (same parameters, with its norms the same result) that keeps two feature maps for the backward
    pass instead of six. Without gradients it activates and adds in place.

    Args:
        block: the block whose modules it takes over.
        make_norm: makes its norms of MONAI's.
    """

    def __init__(self, block: AEKLResBlock, make_norm: MakeNorm = GroupNorm) -> None:
        nn.Module.__init__(self)
        self.in_channels, self.out_channels = block.in_channels, block.out_channels
        self.norm1, self.conv1 = make_norm(block.norm1), block.conv1  # type: ignore[assignment]
        self.norm2, self.conv2 = make_norm(block.norm2), block.conv2  # type: ignore[assignment]
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
        h = self._norm_silu_conv(x, self.norm1, conv)
        h = self._norm_silu_conv(h, self.norm2, self.conv2.conv)
        return self.nin_shortcut(x) + h

    @torch.jit.unused
    def _norm_silu_conv(self, x: torch.Tensor, norm: Any, conv: Any) -> torch.Tensor:
        """A convolution of kernel 3, stride 1 and padding 1 after norm and SiLU, in the autocast type if there is one."""
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        return _NormSiluConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm)  # type: ignore
