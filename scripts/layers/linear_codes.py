"""Linear codes of blocks of images, for a linear shortcut: cosine waves, principal components, and ridge regression."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

INNER_COUNT = 32  # coefficients of the smaller blocks of a code in two steps
# Candidate ridge strengths, as a number of observations of features with unit variance
RIDGES = (1e5, 3e4, 1e4, 3e3, 1e3, 300.0, 100.0)
LEFT_OUT = 4  # one image in so many is held out, to choose the strength


def lowest_frequencies(factors: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """
    Indices of the lowest frequencies of the discrete cosine transform (DCT-II) of one block.

    Args:
        factors: size of the block along each axis.
        count: how many; there are at most ``prod(factors)``.

    Returns:
        one index per axis for each, by the sum of their squares.
    """
    return sorted(itertools.product(*(range(f) for f in factors)), key=lambda k: (sum(i * i for i in k), k))[:count]


def expected_deviation(index: Sequence[int]) -> float:
    """
    Amplitude that a DCT frequency has in blocks of medical volumes in [0, 1], as a standard deviation: a block's mean
    varies by about 0.3, and the rest falls with frequency as 1/f^1.5. Read off the MNI152 T1 template, blocks of 4 to 16.
    """
    frequency = math.sqrt(sum(i * i for i in index))
    return 0.3 if frequency == 0 else 0.04 * frequency**-1.5


def lowest_waves(count: int, outer: Sequence[int], inner: Sequence[int], channels: int) -> torch.Tensor:
    """
    The lowest frequencies of the DCT of blocks of ``outer * inner`` voxels, for each channel by itself, as functions of the
    lowest 32 coefficients of the smaller blocks of ``inner`` voxels.

    Returns:
        at most ``count`` x (coefficients * channels) x ``outer``; the channel changes fastest.
    """
    indices = lowest_frequencies([f * g for f, g in zip(outer, inner)], -(-count // channels))
    inner_indices = lowest_frequencies(inner, INNER_COUNT)
    functions = torch.ones(len(indices), len(inner_indices), *[1] * len(outer), dtype=torch.float64)
    for axis, (f, g) in enumerate(zip(outer, inner)):
        small = _waves([k[axis] for k in inner_indices], g)
        large = _waves([k[axis] for k in indices], f * g).reshape(-1, f, g)
        along = torch.einsum("kpn,jn->kjp", large, small) / g
        shape = [1] * len(outer)
        shape[axis] = f
        functions = functions * along.reshape(len(indices), len(inner_indices), *shape)
    per_channel = torch.einsum("kj...,ab->kajb...", functions, torch.eye(channels, dtype=torch.float64))
    return per_channel.flatten(2, 3).flatten(0, 1)[:count]


def _waves(frequencies: Sequence[int], size: int) -> torch.Tensor:
    """Cosines with a root mean square of 1, one in each row."""
    times = math.pi * torch.tensor(frequencies, dtype=torch.float64)
    waves = torch.cos(times[:, None] * (torch.arange(size, dtype=torch.float64) + 0.5) / size)
    return waves / waves.square().mean(1, keepdim=True).sqrt()


def principal_components(blocks: torch.Tensor, waves: torch.Tensor, count: int) -> torch.Tensor:
    """
    Directions along which blocks vary most around zero. Large blocks have more values than there are blocks to learn from,
    so their covariance is mixed with that of independent waves, each with the amplitude that it has in the blocks. The waves
    count as much as one block for each value of a block.

    Args:
        blocks: number x values of a block.
        waves: number x values of a block, orthonormal.
        count: how many components.

    Returns:
        values of a block x count, orthonormal.
    """
    strength = (blocks @ waves.t()).square().mean(0).sqrt()
    rows = torch.cat([blocks, math.sqrt(blocks.shape[1]) * strength[:, None] * waves])
    return torch.svd_lowrank(rows, q=min(count + 16, *rows.shape), niter=4)[2][:, :count]


def ridge_regression(
    start: torch.Tensor, images: Iterable[Iterable[tuple[torch.Tensor, torch.Tensor]]]
) -> tuple[torch.Tensor, int]:
    """
    Least squares with a ridge penalty on the distance of the weights from ``start``. Its strength is the one with the
    smallest error on held-out images.

    Args:
        start: features x targets.
        images: for each, its observations in pieces: features x number, and targets x number.

    Returns:
        the weights, features x targets, and the number of observations.
    """
    grams = [start.new_zeros(len(start), len(start)) for _ in range(2)]  # of the images that are fitted, and held out
    products = [torch.zeros_like(start) for _ in range(2)]
    number = 0
    for i, observations in enumerate(images):
        held_out = i % LEFT_OUT == LEFT_OUT - 1
        for features, targets in observations:
            grams[held_out] += features @ features.t()
            products[held_out] += features @ (targets - start.t() @ features).t()
            number += features.shape[1]

    def change(ridge: float, gram: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """Of the weights. The penalty counts as ``ridge`` observations of features with unit variance."""
        return torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), product)

    def error(ridge: float) -> float:
        """Sum of squared errors on the held-out images, minus that of the start."""
        found = change(ridge, grams[False], products[False])
        return (found * (grams[True] @ found - 2 * products[True])).sum().item()

    best = min(RIDGES, key=error)
    return start + change(best, grams[True] + grams[False], products[True] + products[False]), number


def alignments(x: torch.Tensor, factors: Sequence[int]) -> Iterator[torch.Tensor]:
    """``x``, and ``x`` from half a block on along axes with three blocks or more, to have further blocks of the image."""
    starts = [(0, f // 2) if f > 1 and n >= 3 * f else (0,) for n, f in zip(x.shape[2:], factors)]
    for start in itertools.product(*starts):
        shifted = x
        for axis, (first, f) in enumerate(zip(start, factors), 2):
            shifted = shifted.narrow(axis, first, x.shape[axis] - (f if first else 0))
        yield shifted
