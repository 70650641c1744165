"""What is given of a volume, averages of its slices or all but a hole, and volumes that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import find_objects, zoom
from scipy.sparse import csr_array, kronsum
from scipy.sparse.linalg import cg


def average_slices(volume: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """
    The means of ``factor`` slices each.

    Args:
        volume: ``HxWxD``, or ``HxWxDxC``.
        factor: Number of thin slices in a thick one.
        axis: Axis along which they lie. Where ``factor`` does not divide its size, the last slice is repeated.

    Returns:
        float64, with ``ceil(size / factor)`` slices along ``axis``.
    """
    return _along(axis, _averaging(volume.shape[axis], factor), volume)


def interpolate_slices(thick: np.ndarray, factor: int, axis: int, num_slices: int | None = None) -> np.ndarray:
    """
    Thin slices from thick ones, by SciPy's cubic B-spline along one axis. A thick slice lies in the middle of its thin ones;
    the outermost are repeated beyond the ends. Values stay in the range of the slices, so that the spline's overshoot does
    not decide the intensity window.

    Args:
        thick: ``HxWxD``, or ``HxWxDxC``.
        factor: Number of thin slices in a thick one.
        axis: Axis along which they lie.
        num_slices: Number of slices of the result, which is cut at its end; None for all.

    Returns:
        float64, with ``num_slices`` slices along ``axis``.
    """
    spline = _interpolation(num_slices or thick.shape[axis] * factor, factor)
    return _along(axis, spline, thick).clip(thick.min(), thick.max())


def agree_with_slices(sample: np.ndarray, thick: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """
    Add to a volume the cubic spline with which its averages become the given slices.

    Args:
        sample: ``HxWxD``, or ``HxWxDxC``.
        thick: Slices that are given, as :py:func:`average_slices` has them.
        factor: Number of thin slices in a thick one.
        axis: Axis along which they lie.

    Returns:
        float64, of the shape of ``sample``, whose :py:func:`average_slices` are ``thick``.
    """
    averaging, spline = _averaging(sample.shape[axis], factor), _interpolation(sample.shape[axis], factor)
    correction = spline @ np.linalg.inv(averaging @ spline)
    return sample + _along(axis, correction, thick - average_slices(sample, factor, axis))


def thin_affine(affine: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """
    The affine of :py:func:`interpolate_slices`.

    Args:
        affine: Affine of the thick slices, 4x4 from voxels to mm.
        factor: Number of thin slices in a thick one.
        axis: Axis along which they lie.
    """
    to_thick = np.eye(4)
    to_thick[axis, axis] = 1 / factor
    to_thick[axis, 3] = (1 / factor - 1) / 2
    return affine @ to_thick


def _averaging(num_slices: int, factor: int) -> np.ndarray:
    """Matrix from thin to thick slices."""
    thin = np.arange(-(-num_slices // factor) * factor)
    matrix = np.zeros((len(thin) // factor, num_slices))
    np.add.at(matrix, (thin // factor, thin.clip(max=num_slices - 1)), 1 / factor)
    return matrix


def _interpolation(num_slices: int, factor: int) -> np.ndarray:
    """Matrix from thick to thin slices."""
    unit = np.eye(-(-num_slices // factor))
    return zoom(unit, (factor, 1), order=3, mode="nearest", grid_mode=True)[:num_slices]


def _along(axis: int, matrix: np.ndarray, volume: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, volume, (1, axis)), 0, axis)


def draw_hole(volume: np.ndarray, affine: np.ndarray, radius: float, count: int, random: np.random.Generator) -> np.ndarray:
    """
    Balls around random voxels that are brighter than the mean of the volume.

    Args:
        volume: ``HxWxD``, finite.
        affine: 4x4, from voxels to mm.
        radius: Radius of a ball, mm.
        count: Number of balls, which may overlap and reach beyond the volume.
        random: Source of the centres.

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
        given: Volume with the hole, of the same shape.
        hole: ``HxWxD``, not 0 in the hole.
        spacing: Spacing of the voxels, mm.

    Returns:
        float64, of the shape of ``sample``; ``given`` outside of the hole.

    Raises:
        ValueError: for a hole without a border.
    """
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
        spacing: Spacing of the voxels, mm.
        order: 1 for Laplace's equation, 2 for the biharmonic one.

    Returns:
        Matrix and right side for the voxels of the hole, in their order in ``values[hole]``.

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
