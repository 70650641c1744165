"""Holes: where they are, and how they are filled."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.data.holes import draw_hole, fill_hole
from tests.conftest import head_like

SHAPE = (20, 18, 16)


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


def test_other_shapes_and_a_hole_without_a_border_are_refused():
    volume = np.zeros(SHAPE)
    with pytest.raises(ValueError, match="shapes of sample, volume and hole differ"):
        fill_hole(volume, volume[1:], volume)
    with pytest.raises(ValueError, match="the hole is empty or the whole volume"):
        fill_hole(volume, volume, volume + 1)
