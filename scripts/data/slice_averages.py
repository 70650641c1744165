"""Thick slices as averages of thin ones: averaging, cubic interpolation back, and volumes that agree with given averages."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import zoom

__all__ = ["agree_with_slices", "average_slices", "interpolate_slices", "thin_affine"]


def average_slices(volume: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """
    The means of ``factor`` slices each.

    Args:
        volume: ``HxWxD``, or ``HxWxDxC``.
        factor: thin slices in a thick one.
        axis: along which they lie. Where ``factor`` does not divide its size, the last slice is repeated.

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
        factor: thin slices in a thick one.
        axis: along which they lie.
        num_slices: of the result, which is cut at its end; None for all.

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
        thick: the slices that are given, as :py:func:`average_slices` has them.
        factor: thin slices in a thick one.
        axis: along which they lie.

    Returns:
        float64, of the shape of ``sample``, whose :py:func:`average_slices` are ``thick``.

    Raises:
        ValueError: for slices of another shape than the sample's averages.
    """
    averages = average_slices(sample, factor, axis)
    if averages.shape != thick.shape:
        raise ValueError(f"`thick` has the shape {thick.shape}; the averages of the sample have {averages.shape}.")
    averaging, spline = _averaging(sample.shape[axis], factor), _interpolation(sample.shape[axis], factor)
    return sample + _along(axis, spline @ np.linalg.inv(averaging @ spline), thick - averages)


def thin_affine(affine: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """
    The affine of :py:func:`interpolate_slices`.

    Args:
        affine: of the thick slices, 4x4 from voxels to mm.
        factor: thin slices in a thick one.
        axis: along which they lie.
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
