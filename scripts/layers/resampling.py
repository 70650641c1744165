"""Layers that change the resolution by a factor per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv

from scripts.layers.factors import padded_size, per_axis
from scripts.layers.float32_convolutions import bfloat16_fails, run_in_float32

UPSAMPLE_MODES = ("nearest", "trilinear")
LINEAR = ("linear", "bilinear", "trilinear")  # PyTorch's names, by the number of axes


class Downsample(nn.Module):
    """
    Strided convolution that shrinks by ``stride`` along each axis and reads every voxel.

    A factor f > 1 pads one voxel on the right and uses a kernel of f + 1, which at f = 2 is the layer of MONAI's
    ``AEKLDownsample``; along an axis with factor 1 the kernel is 3 with a padding of 1.

    Args:
        spatial_dims: number of spatial dimensions, 1 to 3.
        in_channels: number of input channels.
        out_channels: number of output channels, ``in_channels`` if None.
        stride: shrink factor, one for all axes or one per axis.

    Raises:
        ValueError: when ``stride`` is not a positive integer, or not one per axis.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int | None = None, stride: int | Sequence[int] = 2
    ) -> None:
        super().__init__()
        strides = per_axis("stride", stride, spatial_dims)
        self.pad: list[int] = [side for f in reversed(strides) for side in (0, int(f > 1))]  # last axis first
        self.conv = Convolution(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=in_channels if out_channels is None else out_channels,
            strides=strides,
            kernel_size=[f + 1 if f > 1 else 3 for f in strides],
            padding=tuple(0 if f > 1 else 1 for f in strides),
            conv_only=True,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: tensor of shape ``BxCxHxWxD`` (2D: ``BxCxHxW``).

        Returns:
            tensor with each spatial size divided by its factor.
        """
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """
    Enlargement followed by a convolution, or a transposed convolution, as MONAI's decoder has them.

    With nearest neighbours the enlarged feature map is never computed: convolving a map that repeats each voxel f times
    equals a transposed convolution of the small map, with stride f and a kernel in which each weight is spread over f
    neighbours. The result is the same up to rounding, for a fraction of the operations and of the memory. The trilinear
    enlargement is that of MONAI's ``MaisiUpsample``, and its map is computed.

    Args:
        spatial_dims: number of spatial dimensions, 1 to 3.
        in_channels: number of input channels.
        out_channels: number of output channels, ``in_channels`` if None.
        scale_factor: enlargement, one for all axes or one per axis.
        use_convtranspose: instead, a transposed convolution whose kernel (= stride = ``scale_factor``) is learned.
        kernel_size: of the convolution after the enlargement, odd; one for all axes or one per axis.
        mode: of the enlargement, ``"nearest"`` or ``"trilinear"`` (linear along each axis, for any number of axes).

    Raises:
        ValueError: when ``scale_factor`` is not a positive integer, or not one per axis; for an unknown ``mode``, or one
            beside ``use_convtranspose``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int | None = None,
        scale_factor: int | Sequence[int] = 2,
        use_convtranspose: bool = False,
        kernel_size: int | Sequence[int] = 3,
        mode: str = "nearest",
    ) -> None:
        super().__init__()
        check_upsample_mode(mode, use_convtranspose)
        self.interpolation = LINEAR[spatial_dims - 1] if mode == "trilinear" else ""  # empty: nearest neighbours
        self.factors = list(per_axis("scale_factor", scale_factor, spatial_dims))
        out_channels = in_channels if out_channels is None else out_channels
        self.deconv: Any = None  # both are named as in MONAI's Upsample, so that its weights load
        self.postconv: Any = None
        if use_convtranspose:
            stride = tuple(self.factors)
            self.deconv = Conv[Conv.CONVTRANS, spatial_dims](in_channels, out_channels, stride, stride=stride)
        else:
            self.postconv = Convolution(spatial_dims, in_channels, out_channels, kernel_size=kernel_size, conv_only=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: tensor of shape ``BxCxHxWxD`` (or 1D, 2D).

        Returns:
            tensor with each spatial size multiplied by its factor.
        """
        if self.deconv is not None:
            return self.deconv(x)
        if self.interpolation != "":
            scale = [float(factor) for factor in self.factors]
            return self.postconv(F.interpolate(x, scale_factor=scale, mode=self.interpolation).to(x.dtype))
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what follows, in this form alone
            if bfloat16_fails(x, (self.postconv.conv.kernel_size[0], 1)):
                return run_in_float32(self._enlarge_and_convolve, x)
        return self._enlarge_and_convolve(x)

    def _enlarge_and_convolve(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.postconv.conv
        kernel = spread_kernel(conv.weight, self.factors).to(x.dtype)
        padding = [size // 2 for size in conv.weight.shape[2:]]
        ones = [1] * len(padding)
        bias = conv.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return torch.convolution(x, kernel, bias, self.factors, padding, ones, True, [0] * len(padding), 1)


def check_upsample_mode(mode: str, use_convtranspose: bool) -> None:
    """
    Check the mode of an enlargement.

    Raises:
        ValueError: for an unknown mode, or one that transposed convolutions leave without effect.
    """
    if mode not in UPSAMPLE_MODES:
        raise ValueError(f"`upsample_mode` is {mode!r}; it must be one of {', '.join(UPSAMPLE_MODES)}.")
    if mode != "nearest" and use_convtranspose:
        raise ValueError(f"`upsample_mode` is {mode!r}, but `use_convtranspose` enlarges by transposed convolutions.")


def spread_kernel(weight: torch.Tensor, factors: list[int]) -> torch.Tensor:
    """
    The kernel whose transposed convolution with stride ``factors`` equals nearest-neighbour enlargement by ``factors`` and
    convolution with ``weight``.

    Args:
        weight: of the convolution, output channels x input channels x odd sizes.
        factors: enlargement along each axis.

    Returns:
        input channels x output channels x (size + factor - 1) along each axis.
    """
    dims = len(factors)
    for axis, factor in enumerate(factors):
        spread = torch.zeros_like(weight)
        for shift in range(factor):
            pad = [0] * (2 * dims)
            pad[2 * (dims - 1 - axis)] = shift  # the last axis comes first
            pad[2 * (dims - 1 - axis) + 1] = factor - 1 - shift
            shifted = F.pad(weight, pad)
            spread = shifted if shift == 0 else spread + shifted
        weight = spread
    return weight.flip([axis + 2 for axis in range(dims)]).transpose(0, 1)


def space_to_depth(x: torch.Tensor, factors: list[int]) -> torch.Tensor:
    """
    Move each block of ``factors`` voxels into channels, as :py:func:`monai.networks.utils.pixelunshuffle` does for one
    factor (Shi et al., https://arxiv.org/abs/1609.05158).

    Args:
        x: tensor of shape ``BxCxHxWxD`` (or 1D, 2D), sizes divisible by ``factors``.
        factors: block size along each spatial axis.

    Returns:
        tensor with ``C * prod(factors)`` channels and each size divided by its factor.
    """
    dims = len(factors)
    split = [x.shape[0], x.shape[1]]
    for axis, factor in enumerate(factors):
        split += [x.shape[axis + 2] // factor, factor]
    order = [0, 1] + [2 * i + 3 for i in range(dims)] + [2 * i + 2 for i in range(dims)]
    return x.reshape(split).permute(order).flatten(1, 1 + dims)


def depth_to_space(x: torch.Tensor, factors: list[int]) -> torch.Tensor:
    """
    Inverse of :py:func:`space_to_depth`, as :py:func:`monai.networks.utils.pixelshuffle` does for one factor.

    Args:
        x: tensor of shape ``BxCxHxWxD`` (or 1D, 2D), ``C`` divisible by ``prod(factors)``.
        factors: block size along each spatial axis.

    Returns:
        tensor with ``C / prod(factors)`` channels and each size multiplied by its factor.
    """
    dims = len(factors)
    voxels = 1
    for factor in factors:
        voxels *= factor
    split = [x.shape[0], x.shape[1] // voxels]
    merged = [x.shape[0], x.shape[1] // voxels]
    order = [0, 1]
    for axis, factor in enumerate(factors):
        split.append(factor)
        order += [2 + dims + axis, 2 + axis]
        merged.append(x.shape[axis + 2] * factor)
    for axis in range(dims):
        split.append(x.shape[axis + 2])
    return x.reshape(split).permute(order).reshape(merged)


def pad_to_multiple(x: torch.Tensor, factors: Sequence[int]) -> torch.Tensor:
    """
    Repeat the last voxel of each spatial axis until the factors divide it.

    Args:
        x: tensor of shape ``BxCxHxWxD`` (or 1D, 2D).
        factors: one for each spatial axis.
    """
    return pad_at_end(x, padded_size(x.shape[2:], factors))


def pad_at_end(x: torch.Tensor, spatial_size: Sequence[int]) -> torch.Tensor:
    """Repeat the last voxel of each spatial axis of ``BxCxHxWxD`` (or 1D, 2D) up to a size."""
    missing = [wanted - size for wanted, size in zip(spatial_size, x.shape[2:])]
    return F.pad(x, [side for size in reversed(missing) for side in (0, size)], mode="replicate")


class SubpixelDownsample(nn.Module):
    """
    Space-to-depth, then a convolution of kernel 3 on the small grid: no feature map has the input's resolution.

    Args:
        spatial_dims: number of spatial dimensions, 1 to 3.
        in_channels: number of input channels.
        out_channels: number of output channels.
        factors: shrink factor along each axis.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = list(factors)
        self.conv = Convolution(spatial_dims, in_channels * math.prod(factors), out_channels, kernel_size=3, conv_only=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(space_to_depth(x, self.factors))


class SubpixelUpsample(nn.Module):
    """
    A convolution of kernel 3 on the small grid, then depth-to-space. It starts as a nearest-neighbour enlargement
    (ICNR, Aitken et al., https://arxiv.org/abs/1707.02937), which has no checkerboard.

    Args:
        spatial_dims: number of spatial dimensions, 1 to 3.
        in_channels: number of input channels.
        out_channels: number of output channels.
        factors: enlargement along each axis.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = list(factors)
        voxels = math.prod(factors)
        self.conv = Convolution(spatial_dims, in_channels, out_channels * voxels, kernel_size=3, conv_only=True)
        with torch.no_grad():
            for parameter in self.conv.parameters():  # all voxels of a block start with the first one's weights
                parameter.copy_(parameter[::voxels].repeat_interleave(voxels, dim=0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depth_to_space(self.conv(x), self.factors)
