"""Data sets for tasks that follow from spatial conditions: thick slices as averages of thin ones, and holes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from scripts.data import degrade
from scripts.data.dataset_tables import dataset_lists
from scripts.data.degrade import average_slices, draw_hole, fill_hole, interpolate_slices, thin_affine
from tests.conftest import head_like

SHAPE = (12, 10, 18)
LARGE = (20, 18, 16)
AFFINE = np.array([[-1.0, 0, 0, 5], [0, 0, 1, -7], [0, 1, 0, 3], [0, 0, 0, 1]])


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


@pytest.fixture
def folder(tmp_path) -> str:
    """Two volumes for training and one for validation, with label maps."""
    for i in range(3):
        save(tmp_path / "in" / "imagesTr" / f"{i}.nii", head_like(SHAPE, i))
        save(tmp_path / "in" / "labelsTr" / f"{i}.nii", (head_like(SHAPE, i) > 1000).astype(np.uint8))
    items = [{"image": f"imagesTr/{i}.nii", "label": f"labelsTr/{i}.nii", "age": 60 + i} for i in range(3)]
    lists = {"name": "mine", "training": items[:2], "validation": items[2:]}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(lists))
    return str(tmp_path / "in")


def values(folder: str, name: str) -> np.ndarray:
    return nib.load(Path(folder) / name).get_fdata()


def test_pairs_keep_lists_keys_files_and_geometry(folder, tmp_path):
    out = str(tmp_path / "out")
    degrade.thick_slices(folder, out, factor=4)
    content = json.loads(Path(out, "dataset.json").read_text())
    assert content["name"] == "mine"
    (item,) = content["validation"]
    assert item == {
        "image": "imagesTr/2.nii", "label": "labelsTr/2.nii", "age": 62, "thick": "imagesTr/2_thick.nii.gz"
    }  # fmt: skip
    assert [Path(each["image"]).name for each in dataset_lists(out)["training"]] == ["0.nii", "1.nii"]
    for name in (item["image"], item["label"]):
        assert Path(out, name).read_bytes() == Path(folder, name).read_bytes()
    image, thick = (nib.load(Path(out, item[key])) for key in ("image", "thick"))
    assert thick.shape == image.shape and np.array_equal(thick.affine, image.affine)
    assert thick.get_data_dtype() == np.float32  # not rounded
    assert 0.9 < np.corrcoef(image.get_fdata().ravel(), thick.get_fdata().ravel())[0, 1] < 0.999


def test_real_thick_volume_on_the_thin_grid_is_what_the_pairs_have(folder, tmp_path):
    thin = values(folder, "imagesTr/0.nii")[:, :, :16]
    save(tmp_path / "thin" / "a.nii.gz", thin)
    degrade.thick_slices(str(tmp_path / "thin"), str(tmp_path / "pairs"), factor=4)
    to_thin = np.diag([1, 1, 4.0, 1])
    to_thin[2, 3] = 1.5  # the middle of the slices 0 to 3
    save(tmp_path / "thick" / "a.nii.gz", average_slices(thin, 4, 2), AFFINE @ to_thin)
    degrade.thin_grid(str(tmp_path / "thick"), str(tmp_path / "given"), factor=4)
    pair, given = (nib.load(tmp_path / name) for name in ("pairs/a_thick.nii.gz", "given/a_thick.nii.gz"))
    np.testing.assert_allclose(given.affine, pair.affine, atol=1e-6)
    np.testing.assert_allclose(given.get_fdata(), pair.get_fdata(), atol=1e-3)


def test_holes_hold_a_membrane_and_depend_on_seed_and_name(folder, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        degrade.holes(folder, str(tmp_path / out), radius=3, seed=seed)
    item = json.loads((tmp_path / "a" / "dataset.json").read_text())["validation"][0]
    assert item["masked"] == "imagesTr/2_masked.nii.gz" and item["age"] == 62
    image, masked, hole = (values(tmp_path / "a", item[key]) for key in ("image", "masked", "hole"))
    assert set(np.unique(hole)) == {0, 1} and 30 < hole.sum() < 200
    assert np.array_equal(masked[hole == 0], image[hole == 0]) and not np.array_equal(masked, image)
    around = binary_dilation(hole) & (hole == 0)
    assert image[around].min() <= masked[hole == 1].min() and masked[hole == 1].max() <= image[around].max()
    assert nib.load(tmp_path / "a" / item["masked"]).get_data_dtype() == np.int16
    same, other_seed = ((tmp_path / out / item["hole"]).read_bytes() for out in ("b", "c"))
    assert same == (tmp_path / "a" / item["hole"]).read_bytes() != other_seed
    assert not np.array_equal(hole, values(tmp_path / "a", "imagesTr/1_hole.nii.gz"))


def test_holes_are_those_of_a_label_map(folder, tmp_path):
    degrade.holes(folder, str(tmp_path / "out"), hole_key="label")
    assert np.array_equal(values(tmp_path / "out", "imagesTr/2_hole.nii.gz"), values(folder, "labelsTr/2.nii"))


def test_conditions_of_a_bids_table_are_kept(tmp_path):
    save(tmp_path / "in" / "sub-1" / "sub-1_T1w.nii.gz", head_like(SHAPE))
    (tmp_path / "in" / "participants.tsv").write_text("participant_id\tage\nsub-1\t70\n")
    degrade.thick_slices(str(tmp_path / "in"), str(tmp_path / "out"), factor=3, axis=0)
    (item,) = json.loads((tmp_path / "out" / "dataset.json").read_text())["training"]
    assert item == {"age": 70, "image": "sub-1/sub-1_T1w.nii.gz", "thick": "sub-1/sub-1_T1w_thick.nii.gz"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda i, o: degrade.holes(i, i), "`output_dir` is `dataset_dir`"),
        (lambda i, o: degrade.holes(i, o, hole_key="lesion"), "imagesTr/0.nii has no `lesion` in dataset.json"),
    ],
)
def test_bad_arguments_are_refused_by_name(folder, tmp_path, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(folder, str(tmp_path / "out"))


def test_volumes_that_cannot_be_degraded_are_refused_by_name(folder, tmp_path):
    save(Path(folder, "labelsTr/0.nii"), np.ones((12, 10, 17), np.uint8))
    with pytest.raises(ValueError, match=r"imagesTr/0.nii and its `label`, labelsTr/0.nii, have different grids"):
        degrade.holes(folder, str(tmp_path / "out"), hole_key="label")
    save(Path(folder, "labelsTr/0.nii"), np.zeros(SHAPE, np.uint8))
    with pytest.raises(ValueError, match=r"imagesTr/0.nii the hole is empty or the whole volume"):
        degrade.holes(folder, str(tmp_path / "out"), hole_key="label")
    save(Path(folder, "imagesTr/0.nii"), np.full(SHAPE, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"imagesTr/0.nii has voxels that are NaN or infinite"):
        degrade.thick_slices(folder, str(tmp_path / "out"), factor=4)
    save(tmp_path / "two" / "a.nii", head_like(SHAPE))
    save(tmp_path / "two" / "a.nii.gz", head_like(SHAPE))
    with pytest.raises(ValueError, match=r"holds a.nii and a.nii.gz, whose results would have one name"):
        degrade.thick_slices(str(tmp_path / "two"), str(tmp_path / "out"), factor=4)


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


def test_interpolated_values_stay_in_the_range_of_the_slices():
    edge = np.array([0, 0, 0, 9, 9, 9]).reshape(1, 1, 6)
    assert interpolate_slices(edge, 4, 2).min() == 0 and interpolate_slices(edge, 4, 2).max() == 9


def test_ball_has_its_radius_in_mm_around_a_bright_voxel():
    volume = np.zeros((40, 30, 20))
    volume[20, 15, 10] = 1
    hole = draw_hole(volume, np.diag([-1.0, 1.5, 2, 1]), 9, 1, np.random.default_rng(0))
    offsets = (np.argwhere(hole) - (20, 15, 10)) * (1, 1.5, 2)
    assert np.abs(offsets).max(0).tolist() == [9, 9, 8]
    assert hole.sum() * 3 == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.02)


def test_several_balls_are_drawn():
    found = [draw_hole(head_like(LARGE), np.eye(4), 2, count, np.random.default_rng(1)).sum() for count in (1, 3)]
    assert found[1] > 1.5 * found[0]


def test_no_hole_in_a_constant_volume():
    with pytest.raises(ValueError, match="is constant"):
        draw_hole(np.ones(LARGE), np.eye(4), 2, 1, np.random.default_rng(0))


def box(*sides: slice) -> np.ndarray:
    hole = np.zeros(LARGE, dtype=np.uint8)
    hole[sides] = 1
    return hole


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 2, 3)])
def test_sample_that_is_off_by_a_ramp_becomes_the_volume(spacing):
    """A ramp is harmonic: adding the membrane through its border takes it away."""
    truth = head_like(LARGE).astype(float)
    ramp = np.tensordot((3, -2, 5), np.indices(LARGE), 1) + 100
    hole = box(slice(5, 14), slice(4, 12), slice(3, 10))
    given = np.where(hole, 0, truth)
    np.testing.assert_allclose(fill_hole(truth - ramp, given, hole, spacing), truth, atol=0.05)


def test_membrane_is_level_at_the_edge_of_the_volume_and_channels_are_apart():
    hole = box(slice(0, 6), slice(2, 9), slice(0, 16))
    sample = np.random.default_rng(0).random((*LARGE, 2))
    filled = fill_hole(sample, sample + (7, -2), hole)
    np.testing.assert_allclose(filled, sample + (7, -2), atol=1e-3)


def test_voxels_outside_of_the_hole_are_those_of_the_volume():
    given, sample = np.random.default_rng(0).random((2, *LARGE))
    hole = box(slice(5, 14), slice(4, 12), slice(3, 10))
    filled = fill_hole(sample, given, hole)
    assert np.array_equal(filled[hole == 0], given[hole == 0])
    assert not np.isclose(filled, given)[hole == 1].any()


def test_hole_without_a_border_is_refused():
    volume = np.zeros(LARGE)
    with pytest.raises(ValueError, match="the hole is empty or the whole volume"):
        fill_hole(volume, volume, volume + 1)
