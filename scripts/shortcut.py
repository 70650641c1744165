"""The linear shortcut: a linear code beside the network, which starts as a block-wise cosine transform."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.layers.factories import Conv

__all__ = ["LinearShortcut", "dct_basis"]


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
