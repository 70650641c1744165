"""Volumes on the grid of another one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from scipy.ndimage import affine_transform

__all__ = ["Grid", "on_grid", "preprocessed_grid"]

SAME = 0.01  # voxels between two grids that are one, up to the rounding of headers


class Grid(NamedTuple):
    """
    Where the voxels of a volume are.

    Args:
        shape: ``HxWxD``.
        affine: 4x4, from voxels to mm.
    """

    shape: tuple[int, ...]
    affine: np.ndarray


def preprocessed_grid(grid: Grid, spacing: float | Sequence[float] | None = None) -> Grid:
    """
    The grid of a volume after its preprocessing.

    Args:
        grid: of its file.
        spacing: mm along each axis (right, anterior, superior), or None for that of the file.
    """
    volume = MetaTensor(torch.empty(1).expand(1, *grid.shape), affine=torch.from_numpy(grid.affine))
    turned: Any = Orientation("RAS", labels=None, lazy=True)(volume)
    if spacing is not None:
        turned = Spacing(spacing, lazy=True)(turned)
    return Grid(tuple(map(int, turned.peek_pending_shape())), turned.peek_pending_affine().numpy())


def on_grid(values: np.ndarray, affine: np.ndarray, grid: Grid, nearest: bool = False) -> tuple[np.ndarray, float]:
    """
    Bring a volume to a grid. Where that is its own, whatever the order and direction of the axes, voxels are not changed.

    Args:
        values: ``CxHxWxD``.
        affine: from its voxels to mm.
        grid: which it is brought to.
        nearest: take the nearest voxel instead of interpolating linearly.

    Returns:
        the volume in its data type, 0 outside of its field of view, and the share of the grid that the field of view covers.

    Raises:
        ValueError: for a volume that does not overlap the grid, with text that follows its name.
    """
    orientation = nib.io_orientation(np.linalg.solve(grid.affine, affine))
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, values.shape[1:])
    values = np.moveaxis(nib.apply_orientation(np.moveaxis(values, 0, -1), orientation), -1, 0)
    to_volume = np.linalg.solve(affine, grid.affine)
    corners = np.array(list(itertools.product(*((0, size - 1) for size in grid.shape))))
    shift = np.abs(nib.affines.apply_affine(to_volume, corners) - corners).max()
    if values.shape[1:] == grid.shape and shift < SAME:
        return np.ascontiguousarray(values), 1.0
    matrix, offset = to_volume[:3, :3], to_volume[:3, 3]
    inside = np.ones(values.shape[1:], np.uint8)
    inside = affine_transform(inside, matrix, offset, grid.shape, order=0, mode="grid-constant")
    if not inside.any():
        raise ValueError("does not overlap the volume that it is a condition of.")
    order = 0 if nearest else 1
    moved = (affine_transform(channel, matrix, offset, grid.shape, order=order, mode="nearest") for channel in values)
    return np.stack([channel * inside for channel in moved]).astype(values.dtype, copy=False), float(inside.mean())
