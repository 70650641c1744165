"""Synthetic patches that are made while training runs: heads that never existed, and procedural volumes of no organ.

Heads follow SynthSeg (Billot et al., https://arxiv.org/abs/2107.09559), which draws an intensity for each tissue. What is
learned from them holds for heads; networks that restore images learn most of what they need from occlusion, edges and
texture at all scales (Achddou et al., https://arxiv.org/abs/2112.11135, on dead leaves).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from torch.nn import functional

from scripts.data.synthetic_heads import tissue_maps

SPACING_RATIO = 8.0  # the coarsest axis against the finest, at most
BENDS = (3, 12)  # points along each axis at which the grid is moved, from to

LEAST_SHARE = 0.02  # of a tissue, before the logarithm
OUTER_TISSUES = slice(3, 6)  # outer CSF, skull and scalp
FINEST, COARSEST = 0.5, 1.5  # mm
FOLDS = (1.2, 2.2)  # exponents of the noise that moves the borders of tissues

BODIES = (30, 120)  # how many bodies a procedural volume has, from to
RADII = (2.0, 80.0)  # voxels of the finest axis
RADIUS_EXPONENT = 2.0  # small bodies are more frequent: the density of radii falls with this power
ROUGHNESS = (0.8, 2.5)  # exponents of the amplitude of textures: rough to smooth
SMOOTH = 3.0  # that of the fields whose zeros are sheets and vessels
SLIGHTEST_SLOPE = 1e-3

_tissues = functools.cache(tissue_maps)


class SyntheticPatchd(Randomizable, MapTransform):
    """
    Put a synthetic patch under each key, with a seed drawn for each.

    Args:
        keys: Keys to write, ``1xHxWxD`` in [0, 1].
        spatial_size: Size of the patch, voxels.
    """

    def __init__(self, keys: KeysCollection, spatial_size: Sequence[int]) -> None:
        super().__init__(keys)
        self.spatial_size = tuple(spatial_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.keys:
            d[key] = self.make(int(self.R.randint(2**31)))[None]
        return d

    def make(self, seed: int) -> torch.Tensor:
        """A patch, ``HxWxD``."""
        raise NotImplementedError


class HeadPatchd(SyntheticPatchd):
    """
    Patches of synthetic heads: the tissue maps of an average brain, deformed, with folds that no atlas has, and with any
    contrast and voxel size. Half of the heads are skull-stripped.
    """

    def make(self, seed: int) -> torch.Tensor:
        return head_patch(_tissues(), self.spatial_size, seed)


class ProceduralVolumed(SyntheticPatchd):
    """
    Procedural volumes: dead leaves (bodies that hide each other) with fractal texture, crossed by thin sheets and vessels.
    Voxels are anisotropic in half of the volumes, as in thick slices. An edge takes its share of each voxel, as in a scan.
    """

    def make(self, seed: int) -> torch.Tensor:
        return procedural_volume(self.spatial_size, seed)


def head_patch(tissues: torch.Tensor, spatial_size: Sequence[int], seed: int) -> torch.Tensor:
    """A patch of a synthetic head, ``HxWxD`` in [0, 1], from :py:func:`tissue_maps`, ``6xHxWxD`` at 1 mm."""
    random = torch.Generator().manual_seed(seed)
    spacing = random_spacing(random)
    finest = uniform(random, FINEST, COARSEST)
    points = _somewhere_in_head(finest * bent_grid(spatial_size, spacing, random), tissues, random)
    shares = _sampled(tissues, points)
    if uniform(random) < 0.5:
        shares[OUTER_TISSUES] = 0
    shares = torch.cat([shares, (1 - shares.sum(0, keepdim=True)).clamp_min_(0)])  # the last is air
    folds = [fractal_noise(spatial_size, spacing, uniform(random, *FOLDS), random) for _ in range(2)]
    logits = uniform(random, 1, 4) * shares.add_(LEAST_SHARE).log_()
    strength = 1.5 * uniform(random)
    logits[0] += strength * folds[0]  # grey matter
    logits[2:4] += strength * folds[1]  # CSF
    intensities = torch.rand(len(shares), generator=random)
    intensities[4] *= 0.3  # bone is dark
    intensities[-1] = 0
    roughness = intensities * (0.1 * uniform(random) ** 2)
    texture = fractal_noise(spatial_size, spacing, uniform(random, 0.5, 2), random)
    inside = torch.einsum("txyz,tn->nxyz", logits.softmax(0), torch.stack([intensities, roughness], dim=1))
    return (inside[0] + inside[1] * texture).div_(intensities.max()).clamp_(0, 1)


def _somewhere_in_head(grid: torch.Tensor, tissues: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The grid turned at random, with its middle at a random place of the head, in voxels of the tissue maps."""
    middle = torch.tensor([size * uniform(random, 0.2, 0.8) for size in tissues.shape[1:]])
    turned = torch.linalg.qr(torch.eye(3) + 0.3 * torch.randn(3, 3, generator=random))[0]
    flat = grid.flatten(1)
    return (turned @ (flat - flat.mean(1, keepdim=True)) + middle[:, None]).reshape(grid.shape)


def _sampled(tissues: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The tissue maps at points in their voxels, ``3xHxWxD``; air outside."""
    sizes = torch.tensor(tissues.shape[1:])[:, None, None, None]
    normalised = (2 * points / (sizes - 1) - 1).flip(0).movedim(0, -1)
    return functional.grid_sample(tissues[None], normalised[None], align_corners=True)[0]


def procedural_volume(spatial_size: Sequence[int], seed: int) -> torch.Tensor:
    """A procedural volume, ``HxWxD`` in [0, 1], see :py:class:`ProceduralVolumed`."""
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
        slope.narrow(axis, 0, level.shape[axis] - 1).add_(level.diff(dim=axis).abs_())
    return level.div_(slope).add_(0.5).clamp_(0, 1)


def uniform(random: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A random number from ``low`` to ``high``."""
    return low + (high - low) * torch.rand((), generator=random).item()


def fractal_noise(
    spatial_size: Sequence[int], spacing: Sequence[float], roughness: float, random: torch.Generator
) -> torch.Tensor:
    """
    Gaussian noise of mean 0 and deviation 1 whose amplitude falls with a power of the frequency, ``roughness``: a larger one
    is smoother. Opposite faces fit together. ``spacing`` is in any unit.
    """
    frequencies = [*map(torch.fft.fftfreq, spatial_size[:-1], spacing), torch.fft.rfftfreq(spatial_size[-1], spacing[-1])]
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
