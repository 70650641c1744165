"""Volumes on the grid of another one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing, SpatialResample
from scipy.ndimage import affine_transform

SAME = 0.01  # voxels between two grids that are one, up to the rounding of headers


class Grid(NamedTuple):
    """Where the voxels of a volume are."""

    shape: tuple[int, ...]  # HxWxD
    affine: np.ndarray  # 4x4, from voxels to mm

    def corners_in(self, affine: np.ndarray) -> np.ndarray:
        """The eight corners of the grid, in voxels of another affine."""
        corners = np.array(list(itertools.product(*((0, size - 1) for size in self.shape))))
        return nib.affines.apply_affine(np.linalg.solve(affine, self.affine), corners)

    def shift_to(self, affine: np.ndarray) -> float:
        """By how many voxels a corner is elsewhere with another affine, at most."""
        return float(np.abs(self.corners_in(affine) - self.corners_in(self.affine)).max())

    def is_grid(self, other: Grid) -> bool:
        """Whether another grid is this one, up to the rounding of headers."""
        return self.shape == other.shape and self.shift_to(other.affine) < SAME


def grid_of(image: MetaTensor) -> Grid:
    """The grid of an image, ``CxHxWxD``."""
    return Grid(tuple(image.shape[1:]), image.affine.numpy())


def spacing_of(affine: Any) -> list[float]:
    """The spacing of voxels with a 4x4 affine, rounded to four digits."""
    return [round(float(length), 4) for length in nib.affines.voxel_sizes(np.array(affine))]


def preprocessed_grid(grid: Grid, spacing: float | Sequence[float] | None = None) -> Grid:
    """The grid of a file after its preprocessing; spacing in mm to the right, anterior and superior, or that of the file."""
    volume = MetaTensor(torch.empty(1).expand(1, *grid.shape), affine=torch.from_numpy(grid.affine))
    turned: Any = Orientation("RAS", labels=None, lazy=True)(volume)
    if spacing is not None:
        turned = Spacing(spacing, lazy=True)(turned)
    return Grid(tuple(map(int, turned.peek_pending_shape())), turned.peek_pending_affine().numpy())


def on_grid(values: np.ndarray, affine: np.ndarray, grid: Grid, nearest: bool = False) -> tuple[np.ndarray, float]:
    """
    Bring a volume, ``CxHxWxD``, to a grid by linear interpolation, or by the nearest voxel. Where that is its own grid,
    whatever the order and direction of the axes, voxels are not changed.

    Returns:
        the volume in its data type, 0 outside of its field of view, and the share of the grid that the field of view covers.

    Raises:
        ValueError: for a volume that does not overlap the grid, with text that follows its name.
    """
    values, own = _turned(values, affine, grid)
    if own.is_grid(grid):
        return values, 1.0
    to_volume = np.linalg.solve(own.affine, grid.affine)
    matrix, offset = to_volume[:3, :3], to_volume[:3, 3]
    inside = affine_transform(np.ones(own.shape, np.uint8), matrix, offset, grid.shape, order=0, mode="grid-constant")
    if not inside.any():
        raise ValueError("does not overlap the volume that it is a condition of.")
    order = 0 if nearest else 1
    moved = (affine_transform(channel, matrix, offset, grid.shape, order=order, mode="nearest") for channel in values)
    return np.stack([channel * inside for channel in moved]).astype(values.dtype, copy=False), float(inside.mean())


def back_on_grid(values: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """
    Bring a preprocessed volume, ``CxHxWxD``, back to the grid of its file: voxels are turned, and interpolated only where
    the spacing was changed; those outside of its field of view are its nearest ones.
    """
    values, own = _turned(values, affine, grid)
    if own.is_grid(grid):
        return values
    volume: Any = MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(own.affine))
    resample = SpatialResample(mode="bilinear", padding_mode="border")
    volume = resample(volume, dst_affine=torch.tensor(grid.affine), spatial_size=grid.shape)
    return volume.as_tensor().numpy()


def _turned(values: np.ndarray, affine: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
    """A volume, ``CxHxWxD``, with its axes in the order and direction of those of a grid, and its own grid then."""
    orientation = nib.io_orientation(np.linalg.solve(grid.affine, affine))
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, values.shape[1:])
    values = np.moveaxis(nib.apply_orientation(np.moveaxis(values, 0, -1), orientation), -1, 0)
    return np.ascontiguousarray(values), Grid(values.shape[1:], affine)
