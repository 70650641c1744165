"""Holes in volumes: balls at random places, and filling without a step at the border."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import find_objects
from scipy.sparse import csr_array, kronsum
from scipy.sparse.linalg import cg

__all__ = ["draw_hole", "fill_hole", "hole_equations"]


def draw_hole(volume: np.ndarray, affine: np.ndarray, radius: float, count: int, random: np.random.Generator) -> np.ndarray:
    """
    Balls around random voxels that are brighter than the mean of the volume.

    Args:
        volume: ``HxWxD``, finite.
        affine: 4x4, from voxels to mm.
        radius: of a ball, mm.
        count: number of balls, which may overlap and reach beyond the volume.
        random: source of the centres.

    Returns:
        ``HxWxD``, true in the balls.

    Raises:
        ValueError: for a constant volume.
    """
    content = np.flatnonzero(volume > volume.mean())
    if not len(content):
        raise ValueError("is constant, so that there is no content to make a hole in.")
    hole = np.zeros(volume.shape, dtype=bool)
    for centre in zip(*np.unravel_index(random.choice(content, count), volume.shape)):
        offsets = [axis - middle for axis, middle in zip(np.ogrid[tuple(map(slice, volume.shape))], centre)]
        squares = sum(sum(x * offset for x, offset in zip(row, offsets)) ** 2 for row in affine[:3, :3])
        hole |= squares <= radius**2
    return hole


def fill_hole(sample: np.ndarray, given: np.ndarray, hole: np.ndarray, spacing: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """
    Fill a hole with a sample that meets the volume around it: the sample plus the membrane (solution of Laplace's equation)
    through the differences at the hole's border. At the edges of the volume the membrane is level.

    Args:
        sample: ``HxWxD``, or ``HxWxDxC``.
        given: the volume with the hole, of the same shape.
        hole: ``HxWxD``, not 0 in the hole.
        spacing: of the voxels, mm.

    Returns:
        float64, of the shape of ``sample``; ``given`` outside of the hole.

    Raises:
        ValueError: for shapes that differ, and for a hole without a border.
    """
    if not sample.shape == given.shape or not sample.shape[:3] == hole.shape:
        raise ValueError(f"the shapes of sample, volume and hole differ: {sample.shape}, {given.shape} and {hole.shape}.")
    inside = hole != 0
    filled = given.astype(np.float64)
    filled[inside] = sample[inside]
    for channel in np.ndindex(sample.shape[3:]):
        each = (..., *channel)
        filled[each][inside] += cg(*hole_equations(given[each] - sample[each].astype(np.float64), inside, spacing))[0]
    return filled


def hole_equations(
    values: np.ndarray, hole: np.ndarray, spacing: Sequence[float] = (1, 1, 1), order: int = 1
) -> tuple[csr_array, np.ndarray]:
    """
    The equations of a function that continues values into a hole: Laplace's, or the biharmonic one.

    Args:
        values: ``HxWxD``; those in the hole do not count.
        hole: ``HxWxD``, true in the hole.
        spacing: of the voxels, mm.
        order: 1 for Laplace's equation, 2 for the biharmonic one.

    Returns:
        matrix and right side for the voxels of the hole, in their order in ``values[hole]``.

    Raises:
        ValueError: for a hole without voxels, or without a border.
    """
    if not hole.any() or hole.all():
        raise ValueError("the hole is empty or the whole volume, so that it has no border.")
    box = tuple(slice(max(0, side.start - order), side.stop + order) for side in find_objects(hole.astype(np.int8))[0])
    operator = csr_array((1, 1))
    for size, step in zip(hole[box].shape, spacing):
        gradient = csr_array(np.diff(np.eye(size), axis=0) / step)
        operator = kronsum(gradient.T @ gradient, operator)
    unknown = hole[box].ravel()
    rows = csr_array(operator if order == 1 else operator @ operator)[unknown]
    return rows[:, unknown], -rows[:, ~unknown] @ values[box].ravel()[~unknown]
