"""The building blocks that MONAI's AutoencoderKL does not have: sub-pixel layers with a factor per axis, and the linear
shortcut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv

__all__ = ["LinearShortcut", "SubpixelDownsample", "SubpixelUpsample", "depth_to_space", "dct_basis", "space_to_depth"]


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


def dct_basis(factors: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The lowest frequencies of the orthonormal discrete cosine transform (DCT-II) of one block.

    Args:
        factors: size of the block along each axis.
        count: how many basis functions, at most ``prod(factors)``.

    Returns:
        the functions, ``count`` times ``factors``, and the frequency of each (the norm of its index per axis).
    """
    indices = sorted(itertools.product(*(range(f) for f in factors)), key=lambda k: (sum(i * i for i in k), k))[:count]
    functions = []
    for index in indices:
        function = torch.ones((), dtype=torch.float64)
        for k, f in zip(index, factors):
            wave = torch.cos(math.pi * k * (torch.arange(f, dtype=torch.float64) + 0.5) / f)
            function = function[..., None] * wave / wave.norm()
        functions.append(function)
    frequencies = torch.tensor([math.sqrt(sum(i * i for i in k)) for k in indices], dtype=torch.float64)
    return torch.stack(functions), frequencies


def _expected_deviation(frequencies: torch.Tensor) -> torch.Tensor:
    """
    Amplitude that each DCT frequency has in blocks of medical volumes in [0, 1], as a standard deviation: a block's mean
    varies by about 0.3, and the rest falls with frequency as 1/f^1.5. Read off the MNI152 T1 template, blocks of 4 to 16.
    """
    return torch.where(frequencies == 0, 0.3, 0.04 * frequencies.clamp(min=1) ** -1.5)


class LinearShortcut(nn.Module):
    """
    A linear code beside the network: residual autoencoding (Deep Compression Autoencoder,
    https://arxiv.org/abs/2410.10733) from the image straight to the latent and back.

    Both convolutions have kernel = stride = ``factors``. They start as the lowest frequencies of the block's DCT and are
    trained with the network. ``scale`` divides the latent and multiplies it again, so that the latent of a volume in [0, 1]
    has about unit variance while all weights are about 1: otherwise an optimizer that moves every weight by the same
    step, as Adam does, would distort the loudest channel (a block's mean) most. With more than one image channel the latent
    channels are dealt out to them in turn.

    Args:
        in_channels: number of image channels.
        latent_channels: number of latent channels.
        out_channels: number of channels of the reconstruction.
        factors: total downsample factor along each axis.
    """

    def __init__(self, in_channels: int, latent_channels: int, out_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        dims, kernel = len(factors), tuple(factors)
        self.voxels = math.prod(factors)
        self.to_latent = Conv[Conv.CONV, dims](in_channels, latent_channels, kernel, stride=kernel)
        self.to_image = Conv[Conv.CONVTRANS, dims](latent_channels, out_channels, kernel, stride=kernel)
        self.register_buffer("scale", torch.ones(1, latent_channels, *[1] * dims))
        self.scale: torch.Tensor
        self._start_as_dct(factors)

    @torch.no_grad()
    def _start_as_dct(self, factors: Sequence[int]) -> None:
        latent_channels, in_channels = self.to_latent.weight.shape[:2]
        out_channels = self.to_image.weight.shape[1]
        for parameter in self.parameters():
            parameter.zero_()
        basis, frequencies = dct_basis(factors, min(self.voxels, -(-latent_channels // in_channels)))
        waves = basis * math.sqrt(self.voxels)  # a root mean square of 1
        scales = _expected_deviation(frequencies)
        for z in range(min(latent_channels, len(basis) * in_channels)):
            frequency, channel = divmod(z, in_channels)
            self.scale[0, z] = scales[frequency]
            self.to_latent.weight[z, channel] = waves[frequency]
            if channel < out_channels:
                self.to_image.weight[z, channel] = waves[frequency]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Image ``BxCxHxWxD`` to its linear latent."""
        return self.to_latent(x) / (self.voxels * self.scale)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent to its linear image ``BxCxHxWxD``."""
        return self.to_image(z * self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image to linear reconstruction."""
        return self.decode(self.encode(x))
