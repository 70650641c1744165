"""The linear shortcut: a linear code beside the network, which starts as a cosine transform or is fitted to the data, and
how the network beside it starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from scripts.layers.block_statistics import alignments, principal_components, ridge_regression
from scripts.layers.cosine_waves import expected_deviation, lowest_frequencies, waves_per_channel
from scripts.layers.float32_convolutions import bfloat16_fails, run_in_float32
from scripts.layers.resampling import depth_to_space, space_to_depth

__all__ = ["LinearShortcut", "start_as_correction"]

MAX_PARAMETERS = 10_000_000  # of a code in one step; a larger one takes two
INNER_SIZE, INNER_COUNT = 8, 32  # of the first of two steps: blocks of up to 8 voxels an edge, with 32 coefficients
CORRECTION_AMPLITUDE = 0.05  # in the image, of a network's correction of 1
LEAST_SCALE = 1e-3  # deviations below it are noise of no interest in volumes in [0, 1]
BLOCKS_PER_PATCH = 512
PRIOR_WAVES = 4  # for each latent channel: of how many waves blocks are believed to be made
CORRECTION_SCALE = 0.1  # beside a linear shortcut: of the norms and weights that end in the latent and in the image
DETAIL_GAIN = 10.0  # ditto: of the first filters, which start blind to the brightness that the linear code carries
LOG_VARIANCE_START = -12.0  # ditto: noise of 0.25 % of the latent; with 5 %, it drowned what the network had to learn


class BlockTransform(nn.Module):
    """
    A convolution with kernel = stride = ``factors`` and its transposed twin, written as products of matrices: their kernels
    are as large as blocks, which libraries for convolutions are not made for.

    Args:
        in_channels: number of input channels.
        count: number of coefficients of a block.
        factors: size of a block along each axis.
    """

    def __init__(self, in_channels: int, count: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = list(factors)
        self.voxels = math.prod(factors)
        self.analysis = nn.Parameter(torch.zeros(count, in_channels, *factors))
        self.synthesis = nn.Parameter(torch.zeros(count, in_channels, *factors))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``BxCxHxWxD`` to coefficients on the grid of blocks."""
        return _per_voxel(space_to_depth(x, self.factors), self.analysis.flatten(1) / self.voxels)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Coefficients to ``BxCxHxWxD``."""
        return depth_to_space(_per_voxel(z, self.synthesis.flatten(1).t()), self.factors)

    @torch.no_grad()
    def start_as(self, functions: torch.Tensor) -> None:
        """Set both to orthogonal functions, ``count`` or fewer times ``in_channels`` times ``factors``; the rest is zero."""
        for weight in (self.analysis, self.synthesis):
            weight.zero_()
            weight[: len(functions)] = functions


class OverlappedTransform(BlockTransform):
    """
    A block transform whose decoder also looks at the blocks that share a face with a block: what a block's coefficients do
    not say, those of its neighbours suggest, and edges of blocks show less, as in lapped transforms (Malvar and Staelin, The
    LOT, IEEE Trans. ASSP 37, 1989). It adds a linear function of the differences between their coefficients and the block's
    own, and starts with none. Beyond the border of a volume the last block repeats itself.

    Args:
        in_channels: number of input channels.
        count: number of coefficients of a block.
        factors: size of a block along each axis.
    """

    def __init__(self, in_channels: int, count: int, factors: Sequence[int]) -> None:
        super().__init__(in_channels, count, factors)
        self.neighbours = nn.Parameter(torch.zeros(2 * len(factors) * count, in_channels, *factors))

    def start_as(self, functions: torch.Tensor) -> None:
        """As without neighbours."""
        super().start_as(functions)
        nn.init.zeros_(self.neighbours)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Coefficients to ``BxCxHxWxD``."""
        functions = torch.cat([self.synthesis, self.neighbours]).flatten(1)
        return depth_to_space(_per_voxel(beside_neighbours(z), functions.t()), self.factors)


def beside_neighbours(z: torch.Tensor) -> torch.Tensor:
    """
    A map, and how the neighbours of each voxel that share a face with it differ from it.

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


def _transform(in_channels: int, count: int, factors: Sequence[int]) -> BlockTransform:
    """The transform with neighbours, unless it is too large."""
    weights = count * in_channels * math.prod(factors) * (2 + 2 * len(factors))
    return (OverlappedTransform if weights <= MAX_PARAMETERS else BlockTransform)(in_channels, count, factors)


class LinearShortcut(nn.Module):
    """
    A linear code beside the network: residual autoencoding (Deep Compression Autoencoder,
    https://arxiv.org/abs/2410.10733) from the image straight to the latent and back.

    It starts as the lowest frequencies of the block's DCT, or is fitted to data (:py:meth:`fit`), and is trained with the
    network. ``scale`` divides the latent and multiplies it again, so that the latent of a volume in [0, 1] has about unit
    variance while all functions have a root mean square of 1: otherwise an optimizer that moves every weight by the same
    step, as Adam does, would distort the loudest channel (a block's mean) most. With more than one image channel the latent
    channels are dealt out to them in turn.

    Once fitted, it decodes a block from its neighbours as well, see :py:class:`OverlappedTransform`. A code of more than
    10 million weights is factorised: a transform of small blocks, then one of their coefficients; if that leaves no room for
    neighbours, it goes without.

    Args:
        in_channels: number of image channels.
        latent_channels: number of latent channels.
        factors: total downsample factor along each axis.
    """

    def __init__(self, in_channels: int, latent_channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.in_channels = in_channels
        inner = tuple(1 for _ in factors)
        if 2 * in_channels * latent_channels * math.prod(factors) > MAX_PARAMETERS:
            inner = tuple(math.gcd(f, INNER_SIZE) for f in factors)
        outer = tuple(f // i for f, i in zip(factors, inner))
        inner_indices = lowest_frequencies(inner, INNER_COUNT)
        self.inner: BlockTransform | None = None
        if math.prod(inner) > 1:
            self.inner = BlockTransform(in_channels, in_channels * len(inner_indices), inner)
            self.inner.start_as(waves_per_channel(inner_indices, [(0,) * len(inner)], inner, (1,) * len(inner), in_channels))
        self.outer = _transform(in_channels * len(inner_indices), latent_channels, outer)
        indices = lowest_frequencies(factors, -(-latent_channels // in_channels))
        functions = self._lowest_waves(latent_channels)
        self.outer.start_as(functions)
        self.correction_amplitude = CORRECTION_AMPLITUDE  # TorchScript reads no globals
        self.register_buffer("scale", torch.ones(1, latent_channels, *[1] * len(factors)))
        self.scale: torch.Tensor
        for z in range(len(functions)):
            self.scale[0, z] = max(LEAST_SCALE, expected_deviation(indices[z // in_channels]))

    def encode(self, x: torch.Tensor, correction: torch.Tensor | None = None) -> torch.Tensor:
        """
        Image to latent.

        Args:
            x: image ``BxCxHxWxD``.
            correction: what the network adds, of the latent's shape. It is taken in units of the image, like the linear code
                before it is scaled: in units of the latent, a mistake in a block's mean would be ten times as loud as one in
                its finest detail, and nothing else would be learned.
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
        """Whether its code is still that of cosine waves: nobody has fitted, trained or loaded it."""
        waves = self._lowest_waves(len(self.outer.analysis)).to(self.outer.analysis)
        return torch.equal(self.outer.analysis[: len(waves)], waves)

    @torch.no_grad()
    def fit(self, images: Iterable[torch.Tensor]) -> int:
        """
        Set the code to the principal components of blocks, the best linear code for them. They are not centred: the first
        component is close to a block's mean. Cosine waves say what blocks are like where there are too few of them.

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
        Set what is decoded from a block and its neighbours to the best linear estimate of the block, drawn to the code
        without neighbours. Without room for neighbours it does nothing.

        Args:
            images: ``BxCxHxWxD`` each, sizes divisible by the factors.

        Returns:
            number of blocks, those that overlap by half included.
        """
        outer = self.outer
        if not isinstance(outer, OverlappedTransform):
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
        """What blocks of an image and their neighbours are coded as, and the blocks themselves, number last."""
        for x in alignments(self._outer_input(image), self.outer.factors):
            seen = beside_neighbours(self.outer.encode(x) / self.scale).transpose(0, 1).flatten(1)
            yield seen, space_to_depth(x, self.outer.factors).transpose(0, 1).flatten(1)

    def _lowest_waves(self, count: int) -> torch.Tensor:
        """The ``count`` lowest frequencies of the block's DCT, or as many as there are, as functions of ``outer``."""
        outer = self.outer.factors
        inner = [1] * len(outer) if self.inner is None else self.inner.factors
        indices = lowest_frequencies([f * i for f, i in zip(outer, inner)], -(-count // self.in_channels))
        return waves_per_channel(indices, lowest_frequencies(inner, INNER_COUNT), outer, inner, self.in_channels)[:count]

    def _outer_input(self, image: torch.Tensor) -> torch.Tensor:
        """What the second of two steps, or the only one, sees of an image."""
        x = image.to(self.scale.device, torch.float32)
        return x if self.inner is None else self.inner.encode(x)

    @property
    def halo(self) -> int:
        """How far :py:meth:`decode` looks, in voxels of the latent."""
        return int(isinstance(self.outer, OverlappedTransform))


@torch.no_grad()
def start_as_correction(network: Any) -> None:
    """
    Let a network start as a small correction of its linear shortcut's code, and grow in small steps.

    Scaling the last layers alone is not enough: Adam moves all weights of a convolution by the same step, and with
    hundreds of inputs that is a large step of its output. So the norm in front of it is scaled as well.

    What the linear code lacks is in the detail, which is a twentieth of a volume's brightness: to filters that see both,
    and to the norms behind them, it is nothing. So the filters that read an image start as differences of voxels, and
    louder.

    Args:
        network: a :py:class:`scripts.autoencoderkl.AutoencoderKL` with a linear shortcut, changed in place.
    """
    encoder, decoder, log_sigma = network.encoder, network.decoder, network.quant_conv_log_sigma
    for norm in (encoder.last_norm, decoder.last_norm):
        norm.weight.mul_(CORRECTION_SCALE)
    for layer in (decoder.last_conv, network.quant_conv_mu, log_sigma):
        for parameter in layer.parameters():
            parameter.mul_(CORRECTION_SCALE)
    log_sigma.conv.bias.fill_(LOG_VARIANCE_START)
    for layer in (encoder.first_conv, decoder.refine):
        for name, parameter in layer.named_parameters():
            if name.endswith("weight"):  # output channels x image channels and voxels x kernel
                parameter.sub_(parameter.flatten(1).mean(1).view(-1, *[1] * (parameter.dim() - 1)))
                parameter.mul_(DETAIL_GAIN)
