"""The linear shortcut, a linear code beside the network, and the initialisation of the network beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from scripts.layers.float32_convolutions import bfloat16_fails, run_in_float32
from scripts.layers.linear_codes import (
    alignments,
    expected_deviation,
    lowest_frequencies,
    lowest_waves,
    principal_components,
    ridge_regression,
)
from scripts.layers.resampling import depth_to_space, space_to_depth

MAX_PARAMETERS = 10_000_000  # of a code in one step; a larger one takes two
INNER_SIZE = 8  # voxels along an edge, at most, of the blocks of the first of two steps
CORRECTION_AMPLITUDE = 0.05  # in units of the image, of a network's correction of 1
LEAST_SCALE = 1e-3  # deviations below it are noise of no interest in volumes in [0, 1]
BLOCKS_PER_PATCH = 512
PRIOR_WAVES = 4  # cosine waves per latent channel in the prior on blocks
# How a network beside a linear shortcut is initialised:
CORRECTION_SCALE = 0.1  # factor of the last norms and weights before the latent and the image
DETAIL_GAIN = 10.0  # factor of the first filters, whose mean is 0: the linear code carries the brightness
LOG_VARIANCE_START = -12.0  # noise of 0.25 % of the latent; 5 % masked what the network had to learn


class BlockTransform(nn.Module):
    """
    A convolution with kernel = stride = ``factors`` and a transposed convolution of the same shape, written as matrix
    products: the kernels are as large as blocks, and convolution libraries are not made for such kernels.

    With ``overlapped``, the decoder also uses the coefficients of the blocks that share a face with a block. Edges of blocks
    are then less visible, as in lapped transforms (Malvar and Staelin, The LOT, IEEE Trans. ASSP 37, 1989). It adds a linear
    function of the differences between the neighbours' coefficients and the block's own, which starts as zero. At the border
    of a volume the last block is repeated.

    Args:
        in_channels: number of input channels.
        count: number of coefficients of a block.
        factors: size of a block along each axis.
        overlapped: whether the decoder uses the neighbours.
    """

    def __init__(self, in_channels: int, count: int, factors: Sequence[int], overlapped: bool = False) -> None:
        super().__init__()
        self.factors = list(factors)
        self.voxels = math.prod(factors)
        self.analysis = nn.Parameter(torch.zeros(count, in_channels, *factors))
        self.synthesis = nn.Parameter(torch.zeros(count, in_channels, *factors))
        self.neighbours = nn.Parameter(torch.zeros(2 * len(factors) * count, in_channels, *factors)) if overlapped else None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``BxCxHxWxD`` to coefficients on the grid of blocks."""
        return _per_voxel(space_to_depth(x, self.factors), self.analysis.flatten(1) / self.voxels)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Coefficients to ``BxCxHxWxD``."""
        functions: torch.Tensor = self.synthesis
        if self.neighbours is not None:
            z = beside_neighbours(z)
            functions = torch.cat([functions, self.neighbours])
        return depth_to_space(_per_voxel(z, functions.flatten(1).t()), self.factors)

    @torch.no_grad()
    def start_as(self, functions: torch.Tensor) -> None:
        """
        Set analysis and synthesis to orthogonal functions; further coefficients and the weights of neighbours are zero.

        Args:
            functions: at most ``count`` x ``in_channels`` x ``factors``.
        """
        for weight in self.parameters():
            weight.zero_()
        for weight in (self.analysis, self.synthesis):
            weight[: len(functions)] = functions


def beside_neighbours(z: torch.Tensor) -> torch.Tensor:
    """
    A map, followed by the differences between each voxel's face neighbours and the voxel itself.

    Args:
        z: ``BxCxHxWxD`` (or 1D, 2D).

    Returns:
        the same shape with the channels of ``z``, and as many again for each of the two neighbours along each axis.
    """
    found = [z]
    for axis in range(2, z.dim()):
        places = torch.arange(z.shape[axis], device=z.device)
        last = z.shape[axis] - 1
        for shift in (-1, 1):
            found.append(z.index_select(axis, (places + shift).clamp(0, last)) - z)
    return torch.cat(found, 1)


def _per_voxel(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply the channels of each voxel by ``matrix``."""
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what follows, in this form alone
        if bfloat16_fails(x):
            return run_in_float32(_product, x, matrix)
    return _product(x, matrix)


def _product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    weight = matrix.reshape(list(matrix.shape) + [1] * (x.dim() - 2))
    if x.dim() == 3:
        return F.conv1d(x, weight)
    return F.conv2d(x, weight) if x.dim() == 4 else F.conv3d(x, weight)


class LinearShortcut(nn.Module):
    """
    A linear code beside the network: residual autoencoding (Deep Compression Autoencoder,
    https://arxiv.org/abs/2410.10733) from the image straight to the latent and back.

    It starts as the lowest frequencies of the block's DCT, or is fitted to data (:py:meth:`fit`), and is trained with the
    network. The encoder divides the latent by ``scale`` and the decoder multiplies by it, so that the latent of a volume in
    [0, 1] has about unit variance while all functions have a root mean square of 1: otherwise an optimizer that moves every
    weight by the same step, as Adam does, would distort the channel with the largest amplitude (a block's mean) most. With
    several image channels, the latent channels are assigned to them in turn.

    Once fitted, it decodes a block from its neighbours as well. A code of more than 10 million weights is factorised: a
    transform of small blocks, then one of their coefficients. If the second is too large with neighbours, it has none.

    Args:
        in_channels: number of image channels.
        latent_channels: number of latent channels.
        factors: total downsample factor along each axis.
    """

    def __init__(self, in_channels: int, latent_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.in_channels = in_channels
        ones = [1] * len(factors)
        inner = ones
        if 2 * in_channels * latent_channels * math.prod(factors) > MAX_PARAMETERS:
            inner = [math.gcd(f, INNER_SIZE) for f in factors]
        outer = [f // i for f, i in zip(factors, inner)]
        functions = lowest_waves(latent_channels, outer, inner, in_channels)
        coefficients = functions.shape[1]
        self.inner: BlockTransform | None = None
        if inner != ones:
            self.inner = BlockTransform(in_channels, coefficients, inner)
            self.inner.start_as(lowest_waves(coefficients, inner, ones, in_channels))
        overlapped = coefficients * latent_channels * math.prod(outer) * (2 + 2 * len(factors)) <= MAX_PARAMETERS
        self.outer = BlockTransform(coefficients, latent_channels, outer, overlapped)
        self.outer.start_as(functions)
        self.correction_amplitude = CORRECTION_AMPLITUDE  # TorchScript reads no globals
        self.register_buffer("scale", torch.ones(1, latent_channels, *ones))
        self.scale: torch.Tensor
        indices = lowest_frequencies(factors, latent_channels)
        for z in range(len(functions)):
            self.scale[0, z] = max(LEAST_SCALE, expected_deviation(indices[z // in_channels]))

    def encode(self, x: torch.Tensor, correction: torch.Tensor | None = None) -> torch.Tensor:
        """
        Image to latent.

        Args:
            x: image ``BxCxHxWxD``.
            correction: what the network adds, of the latent's shape. It is in units of the image, like the linear code
                before scaling. In units of the latent, an error in a block's mean would weigh ten times as much as one in
                its finest detail, and the network would learn nothing else.
        """
        if self.inner is not None:
            x = self.inner.encode(x)
        z = self.outer.encode(x) / self.scale
        return z if correction is None else z + correction * (self.correction_amplitude / self.scale)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent to its linear image ``BxCxHxWxD``."""
        x = self.outer.decode(z * self.scale)
        if self.inner is not None:
            x = self.inner.decode(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image to linear reconstruction."""
        return self.decode(self.encode(x))

    def is_as_built(self) -> bool:
        """Whether the code is still the initial one, of cosine waves: neither fitted, nor trained, nor loaded."""
        waves = self._lowest_waves(len(self.outer.analysis)).to(self.outer.analysis)
        return torch.equal(self.outer.analysis[: len(waves)], waves)

    @torch.no_grad()
    def fit(self, images: Iterable[torch.Tensor]) -> int:
        """
        Set the code to the principal components of blocks, the best linear code for them. They are not centred: the first
        component is close to a block's mean. Cosine waves are the prior, which matters where there are few blocks.

        Args:
            images: ``BxCxHxWxD`` each, sizes divisible by the factors.

        Returns:
            number of blocks.
        """
        found: list[torch.Tensor] = []
        for x in map(self._outer_input, images):
            blocks = space_to_depth(x, self.outer.factors).flatten(2).transpose(1, 2).flatten(0, 1)
            found.append(blocks[torch.randperm(len(blocks), device=blocks.device)[:BLOCKS_PER_PATCH]])
        blocks = torch.cat(found)
        count = min(len(self.outer.analysis), blocks.shape[1])
        waves = self._lowest_waves(PRIOR_WAVES * count).flatten(1).to(blocks) / math.sqrt(self.outer.voxels)
        components = principal_components(blocks, waves, count)
        functions = components.t() * math.sqrt(self.outer.voxels)
        self.outer.start_as(functions.reshape(count, *self.outer.analysis.shape[1:]))
        deviation = (blocks @ components).square().mean(0).sqrt() / math.sqrt(self.outer.voxels)
        self.scale.fill_(1.0)
        self.scale[0, :count] = deviation.clamp(min=LEAST_SCALE).reshape(-1, *self.scale.shape[2:])
        return len(blocks)

    @torch.no_grad()
    def fit_neighbours(self, images: Iterable[torch.Tensor]) -> int:
        """
        Set the decoder to the best linear estimate of a block from its own coefficients and its neighbours', regularised
        towards the decoder without neighbours. A transform without neighbours stays as it is.

        Args:
            images: ``BxCxHxWxD`` each, sizes divisible by the factors.

        Returns:
            number of blocks, including those shifted by half a block.
        """
        outer = self.outer
        if outer.neighbours is None:
            return 0
        scale = self.scale.flatten()
        scale = scale.repeat(1 + len(outer.neighbours) // len(scale))[:, None]
        start = torch.cat([outer.synthesis, outer.neighbours]).flatten(1) * scale
        weights, number = ridge_regression(start, map(self._observations, images))
        functions = weights / scale
        outer.synthesis.copy_(functions[: len(outer.synthesis)].view_as(outer.synthesis))
        outer.neighbours.copy_(functions[len(outer.synthesis) :].view_as(outer.neighbours))
        return number

    def _observations(self, image: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Coefficients of an image's blocks and of their neighbours, and the blocks; the last axis counts blocks."""
        for x in alignments(self._outer_input(image), self.outer.factors):
            seen = beside_neighbours(self.outer.encode(x) / self.scale).transpose(0, 1).flatten(1)
            yield seen, space_to_depth(x, self.outer.factors).transpose(0, 1).flatten(1)

    def _lowest_waves(self, count: int) -> torch.Tensor:
        """The ``count`` lowest frequencies of the block's DCT, or as many as there are, as functions of ``outer``."""
        outer = self.outer.factors
        inner = [1] * len(outer) if self.inner is None else self.inner.factors
        return lowest_waves(count, outer, inner, self.in_channels)

    def _outer_input(self, image: torch.Tensor) -> torch.Tensor:
        """The input of ``outer``: the image, or its coefficients in ``inner``."""
        x = image.to(self.scale.device, torch.float32)
        return x if self.inner is None else self.inner.encode(x)

    @property
    def halo(self) -> int:
        """How many neighbouring voxels of the latent :py:meth:`decode` reads on each side."""
        return int(self.outer.neighbours is not None)


@torch.no_grad()
def start_as_correction(network: Any) -> None:
    """
    Initialise a network as a small correction of its linear shortcut's code, such that the correction grows in small steps.

    Scaling the last layers alone is not enough: Adam moves all weights of a convolution by the same step, and with
    hundreds of inputs that is a large step of its output. So the norm before it is scaled as well.

    What the linear code lacks is detail, whose amplitude is a twentieth of a volume's brightness. Filters that respond to
    both, and the norms after them, would hardly pass it on. So the filters that read an image start with a mean of zero, as
    differences of voxels, and with larger weights.

    Args:
        network: a :py:class:`scripts.autoencoderkl.AutoencoderKL` with a linear shortcut, changed in place.
    """
    encoder, decoder, log_sigma = network.encoder, network.decoder, network.quant_conv_log_sigma
    for norm in (encoder.blocks[-2], decoder.blocks[-2]):
        norm.weight.mul_(CORRECTION_SCALE)
    for layer in (decoder.blocks[-1], network.quant_conv_mu, log_sigma):
        for parameter in layer.parameters():
            parameter.mul_(CORRECTION_SCALE)
    log_sigma.conv.bias.fill_(LOG_VARIANCE_START)
    for layer in (encoder.blocks[0], decoder.refine):
        for name, parameter in layer.named_parameters():
            if name.endswith("weight"):  # output channels x image channels and voxels x kernel
                parameter.sub_(parameter.flatten(1).mean(1).view(-1, *[1] * (parameter.dim() - 1)))
                parameter.mul_(DETAIL_GAIN)
