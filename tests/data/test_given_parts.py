"""Thick slices as averages of thin ones, holes, and volumes that agree with what is given."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from scripts.data.given_parts import (
    agree_with_slices,
    average_slices,
    draw_hole,
    fill_hole,
    interpolate_slices,
    thin_affine,
)
from tests.conftest import head_like

SHAPE = (20, 18, 16)


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


def test_ball_has_its_radius_in_mm_around_a_bright_voxel():
    volume = np.zeros((40, 30, 20))
    volume[20, 15, 10] = 1
    hole = draw_hole(volume, np.diag([-1.0, 1.5, 2, 1]), 9, 1, np.random.default_rng(0))
    offsets = (np.argwhere(hole) - (20, 15, 10)) * (1, 1.5, 2)
    assert np.abs(offsets).max(0).tolist() == [9, 9, 8]
    assert hole.sum() * 3 == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.02)


def test_several_balls_are_drawn():
    found = [draw_hole(head_like(SHAPE), np.eye(4), 2, count, np.random.default_rng(1)).sum() for count in (1, 3)]
    assert found[1] > 1.5 * found[0]


def test_no_hole_in_a_constant_volume():
    with pytest.raises(ValueError, match="is constant"):
        draw_hole(np.ones(SHAPE), np.eye(4), 2, 1, np.random.default_rng(0))


def box(*sides: slice) -> np.ndarray:
    hole = np.zeros(SHAPE, dtype=np.uint8)
    hole[sides] = 1
    return hole


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 2, 3)])
def test_sample_that_is_off_by_a_ramp_becomes_the_volume(spacing):
    """A ramp is harmonic: adding the membrane through its border takes it away."""
    truth = head_like(SHAPE).astype(float)
    ramp = np.tensordot((3, -2, 5), np.indices(SHAPE), 1) + 100
    hole = box(slice(5, 14), slice(4, 12), slice(3, 10))
    given = np.where(hole, 0, truth)
    np.testing.assert_allclose(fill_hole(truth - ramp, given, hole, spacing), truth, atol=0.05)


def test_membrane_is_level_at_the_edge_of_the_volume_and_channels_are_apart():
    hole = box(slice(0, 6), slice(2, 9), slice(0, 16))
    sample = np.random.default_rng(0).random((*SHAPE, 2))
    filled = fill_hole(sample, sample + (7, -2), hole)
    np.testing.assert_allclose(filled, sample + (7, -2), atol=1e-3)


def test_voxels_outside_of_the_hole_are_those_of_the_volume():
    given, sample = np.random.default_rng(0).random((2, *SHAPE))
    hole = box(slice(5, 14), slice(4, 12), slice(3, 10))
    filled = fill_hole(sample, given, hole)
    assert np.array_equal(filled[hole == 0], given[hole == 0])
    assert not np.isclose(filled, given)[hole == 1].any()


def test_hole_without_a_border_is_refused():
    volume = np.zeros(SHAPE)
    with pytest.raises(ValueError, match="the hole is empty or the whole volume"):
        fill_hole(volume, volume, volume + 1)
