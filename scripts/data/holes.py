"""Holes in volumes: balls at random places, and filling without a step at the border."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import cg

__all__ = ["draw_hole", "fill_hole"]


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
    through the differences at the hole's border. Beyond the edges of the volume the membrane goes on level.

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
    inside = hole != 0
    if not sample.shape == given.shape or not sample.shape[:3] == hole.shape:
        raise ValueError(f"the shapes of sample, volume and hole differ: {sample.shape}, {given.shape} and {hole.shape}.")
    if inside.all():
        raise ValueError("the hole is the whole volume, so that there is nothing that the sample could agree with.")
    difference = given.astype(np.float64) - sample
    laplacian, border = _laplace(inside, difference.reshape(*hole.shape, -1), spacing)
    membrane = np.stack([cg(laplacian, channel)[0] for channel in border.T], axis=-1)
    filled = given.astype(np.float64)
    filled[inside] = sample[inside] + membrane.reshape(sample[inside].shape)
    return filled


def _laplace(inside: np.ndarray, values: np.ndarray, spacing: Sequence[float]) -> tuple[csr_array, np.ndarray]:
    """Laplace's equation within a region as a system of equations: its matrix, and its right side for each channel of the
    values around the region."""
    count = np.count_nonzero(inside)
    numbers = np.full(inside.shape, -1)
    numbers[inside] = np.arange(count)
    diagonal, border, links = np.zeros(count), np.zeros((count, values.shape[-1])), csr_array((count, count))
    for axis, step in enumerate(spacing):
        lower, upper = ([slice(None)] * axis + [part] for part in (slice(None, -1), slice(1, None)))
        for one, other in ((tuple(lower), tuple(upper)), (tuple(upper), tuple(lower))):
            here, there = numbers[one], numbers[other]
            linked, outside = (here >= 0) & (there >= 0), (here >= 0) & (there < 0)
            diagonal[here[here >= 0]] += step**-2
            border[here[outside]] += step**-2 * values[other][outside]
            weights = np.full(np.count_nonzero(linked), step**-2)
            links += csr_array((weights, (here[linked], there[linked])), shape=links.shape)
    return (diags_array(diagonal) - links).tocsr(), border
