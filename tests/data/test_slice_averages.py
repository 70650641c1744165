"""Thick slices as averages of thin ones, and volumes that agree with them."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from scripts.data.slice_averages import (
    agree_with_slices,
    average_slices,
    interpolate_slices,
    thin_affine,
)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("axis", [0, 2])
def test_ramp_in_mm_stays_where_it_is(factor, axis):
    """Each voxel has its own coordinate in mm as its value: a shift of any grid would show."""
    thick_affine = np.array([[-2.0, 0.3, 0, 5], [0, 2, 0.4, -7], [0.1, 0, 6, 30], [0, 0, 0, 1]])
    shape = [5, 5, 5]
    shape[axis] = 20
    millimetres = nib.affines.apply_affine(thick_affine, np.moveaxis(np.indices(shape), 0, -1))
    thin = interpolate_slices(millimetres, factor, axis)
    grid = np.moveaxis(np.indices(thin.shape[:3]), 0, -1)
    expected = nib.affines.apply_affine(thin_affine(thick_affine, factor, axis), grid)
    middle = [slice(None)] * 3
    middle[axis] = slice(7 * factor, -7 * factor)  # the ends are repeated, which no ramp is
    np.testing.assert_allclose(thin[tuple(middle)], expected[tuple(middle)], atol=2e-3)
    np.testing.assert_allclose(average_slices(expected, factor, axis), millimetres, atol=1e-9)


def test_slices_are_means_and_the_last_is_repeated():
    ramp = np.arange(7.0).reshape(1, 1, 7)
    np.testing.assert_allclose(average_slices(ramp, 3, 2), [[[1, 4, 6]]])
    assert interpolate_slices(average_slices(ramp, 3, 2), 3, 2, 7).shape == (1, 1, 7)


@pytest.mark.parametrize("num_slices", [1, 3, 13, 16, 64])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sample_has_the_given_averages_afterwards(num_slices, factor):
    random = np.random.default_rng(0)
    sample, truth = random.random((2, 3, num_slices, 4))
    thick = average_slices(truth, factor, 1)
    agreeing = agree_with_slices(sample, thick, factor, 1)
    np.testing.assert_allclose(average_slices(agreeing, factor, 1), thick, atol=1e-9)


def test_interpolated_values_stay_in_the_range_of_the_slices():
    edge = np.array([0, 0, 0, 9, 9, 9]).reshape(1, 1, 6)
    assert interpolate_slices(edge, 4, 2).min() == 0 and interpolate_slices(edge, 4, 2).max() == 9


def test_what_is_added_to_a_sample_is_smooth():
    sample = np.zeros((1, 1, 64))
    thick = np.sin(np.arange(8) / 2).reshape(1, 1, 8)
    added = agree_with_slices(sample, thick, 8, 2)[0, 0]
    assert np.abs(np.diff(added)).max() < 0.25 * np.abs(np.diff(np.repeat(thick, 8))).max()


def test_slices_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"`thick` has the shape \(4, 4, 3\); the averages of the sample have \(4, 4, 2\)"):
        agree_with_slices(np.zeros((4, 4, 8)), np.zeros((4, 4, 3)), 4, 2)
