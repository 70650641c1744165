"""Random fields that synthetic volumes are made of: fractal noise, and grids that are bent smoothly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch.nn import functional

__all__ = ["bent_grid", "fractal_noise", "random_spacing", "uniform"]

SPACING_RATIO = 8.0  # the coarsest axis against the finest, at most
BENDS = (3, 12)  # points along each axis at which the grid is moved, from to


def uniform(random: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=random).item()


def fractal_noise(
    spatial_size: Sequence[int], spacing: Sequence[float], roughness: float, random: torch.Generator
) -> torch.Tensor:
    """
    Gaussian noise whose amplitude falls with a power of the frequency.

    Args:
        spatial_size: voxels.
        spacing: size of a voxel along each axis, in any unit.
        roughness: that power; larger is smoother.
        random: source of random numbers.

    Returns:
        mean 0 and deviation 1, of ``spatial_size``; opposite faces fit together.
    """
    last = len(spatial_size) - 1
    frequencies = [
        (torch.fft.rfftfreq if axis == last else torch.fft.fftfreq)(size, step)
        for axis, (size, step) in enumerate(zip(spatial_size, spacing))
    ]
    squared = functools.reduce(torch.add, (f.square() for f in torch.meshgrid(*frequencies, indexing="ij")))
    squared[(0,) * len(spatial_size)] = math.inf  # no constant part
    white = torch.randn(*squared.shape, dtype=torch.complex64, generator=random)
    noise = torch.fft.irfftn(white * squared.pow(-roughness / 2), s=tuple(spatial_size))
    return noise / noise.std()


def random_spacing(random: torch.Generator) -> list[float]:
    """1 along each axis, in half of the cases larger along one of them."""
    spacing = [1.0, 1.0, 1.0]
    if uniform(random) < 0.5:
        spacing[int(uniform(random, 0, 3))] = SPACING_RATIO ** uniform(random)
    return spacing


def bent_grid(spatial_size: Sequence[int], spacing: Sequence[float], random: torch.Generator) -> torch.Tensor:
    """Positions of the voxels, ``3xHxWxD``, displaced smoothly, so that no body is an ellipsoid."""
    axes = [torch.arange(size) * step for size, step in zip(spatial_size, spacing)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    count = int(uniform(random, *BENDS))
    moves = torch.randn(1, 3, count, count, count, generator=random) * (4 * max(spatial_size) / 100 * uniform(random))
    return grid + functional.interpolate(moves, tuple(spatial_size), mode="trilinear", align_corners=True)[0]
