"""Patches of heads that never existed, made while training runs: the tissue maps of an average brain, deformed at random,
with folds that no atlas has, and with any contrast and voxel size.

It follows SynthSeg (Billot et al., https://arxiv.org/abs/2107.09559), which draws an intensity for each tissue.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from scripts.data.mni152 import tissue_maps
from scripts.data.random_fields import bent_grid, fractal_noise, random_spacing, uniform
from scripts.data.synthetic_patches import SyntheticPatchd

__all__ = ["HeadPatchd"]

LEAST_SHARE = 0.02  # of a tissue, before the logarithm
OUTER_TISSUES = slice(3, 6)  # outer CSF, skull and scalp
FINEST, COARSEST = 0.5, 1.5  # mm
FOLDS = (1.2, 2.2)  # exponents of the noise that moves the borders of tissues


class HeadPatchd(SyntheticPatchd):
    """
    Put a patch of a synthetic head under each key. Half of the heads are skull-stripped.

    Args:
        keys: keys to write, ``1xHxWxD`` in [0, 1].
        spatial_size: of the patch, voxels.
    """

    def make(self, seed: int) -> torch.Tensor:
        return head_patch(_tissues(), self.spatial_size, seed)


def head_patch(tissues: torch.Tensor, spatial_size: Sequence[int], seed: int) -> torch.Tensor:
    """
    Args:
        tissues: shares of the six tissues of :py:func:`scripts.data.mni152.tissue_maps`, ``6xHxWxD`` at 1 mm.
        spatial_size: of the patch, voxels.
        seed: of everything that is random.

    Returns:
        ``HxWxD`` in [0, 1].
    """
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


@functools.cache
def _tissues() -> torch.Tensor:
    return tissue_maps()


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
