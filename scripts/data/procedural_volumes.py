"""Volumes of no organ, made at random: overlapping bodies with texture, sheets and vessels, at all scales and resolutions.

What an autoencoder learns from heads alone holds for heads. Networks that restore images learn most of what they need from
occlusion, edges and texture at all scales (Achddou et al., https://arxiv.org/abs/2112.11135, on dead leaves): those have
no end and belong to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from scripts.data.random_fields import bent_grid, fractal_noise, random_spacing, uniform
from scripts.data.synthetic_patches import SyntheticPatchd

__all__ = ["ProceduralVolumed"]

BODIES = (30, 120)  # how many bodies a volume has, from to
RADII = (2.0, 80.0)  # voxels of the finest axis
RADIUS_EXPONENT = 2.0  # small bodies are more frequent: the density of radii falls with this power
ROUGHNESS = (0.8, 2.5)  # exponents of the amplitude of textures: rough to smooth
SMOOTH = 3.0  # that of the fields whose zeros are sheets and vessels
SLIGHTEST_SLOPE = 1e-3


class ProceduralVolumed(SyntheticPatchd):
    """
    Put a procedural volume under each key: dead leaves (bodies that hide each other) with fractal texture, crossed by thin
    sheets and vessels. Voxels are anisotropic in half of the volumes, as in thick slices. An edge takes its share of each
    voxel, as in a scan.

    Args:
        keys: keys to write, ``1xHxWxD`` in [0, 1].
        spatial_size: of the volume, voxels.
    """

    def make(self, seed: int) -> torch.Tensor:
        return procedural_volume(self.spatial_size, seed)


def procedural_volume(spatial_size: Sequence[int], seed: int) -> torch.Tensor:
    """
    Args:
        spatial_size: voxels.
        seed: of everything that is random.

    Returns:
        ``HxWxD`` in [0, 1].
    """
    random = torch.Generator().manual_seed(seed)
    spacing = random_spacing(random)
    volume = torch.full(tuple(spatial_size), uniform(random) * (uniform(random) < 0.5))  # air in half of them
    points = bent_grid(spatial_size, spacing, random)
    textures = torch.stack([fractal_noise(spatial_size, spacing, uniform(random, *ROUGHNESS), random) for _ in range(2)])
    contrast = 0.15 * uniform(random) ** 2
    for radius in sorted((_radius(random) for _ in range(int(uniform(random, *BODIES)))), reverse=True):
        _add_body(volume, points, spacing, radius, contrast * textures, random)
    for _ in range(int(uniform(random, 0, 2.5))):
        _add_sheets_or_vessels(volume, spacing, random)
    return volume.clamp_(0, 1)


def _radius(random: torch.Generator) -> float:
    smallest, largest = (radius ** (1 - RADIUS_EXPONENT) for radius in RADII)
    return uniform(random, smallest, largest) ** (1 / (1 - RADIUS_EXPONENT))


def _add_body(
    volume: torch.Tensor,
    points: torch.Tensor,
    spacing: Sequence[float],
    radius: float,
    textures: torch.Tensor,
    random: torch.Generator,
) -> None:
    """Put an ellipsoid or a box, bent as the grid is, in front of what is there."""
    middle = [int(uniform(random, 0, size)) for size in volume.shape]
    reaches = [math.ceil(2 * radius / step) + 2 for step in spacing]
    box = tuple(slice(max(0, at - reach), at + reach) for at, reach in zip(middle, reaches))
    offsets = points.movedim(0, -1)[box] - points.movedim(0, -1)[tuple(middle)]
    stretch = torch.empty(3, 1).uniform_(0.6, 1.6, generator=random)
    axes = torch.linalg.qr(torch.randn(3, 3, generator=random))[0] * stretch / radius
    offsets = axes @ offsets.flatten(0, 2).T
    squares = offsets.square()
    rounded = squares.sum(0) if uniform(random) < 0.7 else squares.pow(3).sum(0).pow(1 / 3)
    share = share_inside((1 - rounded).reshape(volume[box].shape))
    slope = 0.2 * uniform(random, -1, 1) * offsets[0].reshape(share.shape)
    inside = textures[int(uniform(random, 0, len(textures)))][box] + uniform(random) + slope
    volume[box].lerp_(inside, share)


def _add_sheets_or_vessels(volume: torch.Tensor, spacing: Sequence[float], random: torch.Generator) -> None:
    """Where a smooth field is zero lies a sheet, where two are lies a vessel."""
    count = 1 + (uniform(random) < 0.7)
    fields = torch.stack([fractal_noise(volume.shape, spacing, SMOOTH, random) for _ in range(count)])
    thickness = uniform(random, 0.02, 0.1) * count**2
    share = share_inside(thickness**2 - fields.square().sum(0))
    volume.lerp_(torch.tensor(uniform(random)), share)


def share_inside(level: torch.Tensor) -> torch.Tensor:
    """Share of each voxel in which a field is positive, from its value in the middle and its slopes."""
    slope = torch.full_like(level, SLIGHTEST_SLOPE)
    for axis in range(level.ndim):
        if level.shape[axis] > 1:
            steps = level.diff(dim=axis).abs_()
            slope.narrow(axis, 0, level.shape[axis] - 1).add_(steps)
    return level.div_(slope).add_(0.5).clamp_(0, 1)
