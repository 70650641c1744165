"""Waves of the discrete cosine transform (DCT-II), with which a linear shortcut is initialised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

__all__ = ["expected_deviation", "lowest_frequencies", "waves_per_channel"]


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


def _waves(frequencies: Sequence[int], size: int) -> torch.Tensor:
    """Cosines with a root mean square of 1, one in each row."""
    times = math.pi * torch.tensor(frequencies, dtype=torch.float64)
    waves = torch.cos(times[:, None] * (torch.arange(size, dtype=torch.float64) + 0.5) / size)
    return waves / waves.square().mean(1, keepdim=True).sqrt()


def expected_deviation(index: Sequence[int]) -> float:
    """
    Amplitude that a DCT frequency has in blocks of medical volumes in [0, 1], as a standard deviation: a block's mean
    varies by about 0.3, and the rest falls with frequency as 1/f^1.5. Read off the MNI152 T1 template, blocks of 4 to 16.
    """
    frequency = math.sqrt(sum(i * i for i in index))
    return 0.3 if frequency == 0 else 0.04 * frequency**-1.5


def waves_per_channel(
    indices: Sequence[Sequence[int]],
    inner_indices: Sequence[Sequence[int]],
    outer: Sequence[int],
    inner: Sequence[int],
    channels: int,
) -> torch.Tensor:
    """
    The cosine waves of blocks of ``outer * inner`` voxels, written as functions of coefficients of the smaller blocks of
    ``inner`` voxels (those that ``inner_indices`` names), for each channel by itself.

    Returns:
        ``(len(indices) * channels) x (len(inner_indices) * channels)`` times ``outer``; the channel changes fastest.
    """
    functions = torch.ones(len(indices), len(inner_indices), *[1] * len(outer), dtype=torch.float64)
    for axis, (f, g) in enumerate(zip(outer, inner)):
        small = _waves([k[axis] for k in inner_indices], g)
        large = _waves([k[axis] for k in indices], f * g).reshape(-1, f, g)
        along = torch.einsum("kpn,jn->kjp", large, small) / g
        shape = [1] * len(outer)
        shape[axis] = f
        functions = functions * along.reshape(len(indices), len(inner_indices), *shape)
    per_channel = torch.einsum("kj...,ab->kajb...", functions, torch.eye(channels, dtype=torch.float64))
    return per_channel.flatten(2, 3).flatten(0, 1)
