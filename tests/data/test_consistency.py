"""Generated volumes agree with what they were generated from."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.bundle.files import content_hash
from scripts.data import consistency, degrade
from scripts.data.consistency import agree_with_slices
from scripts.data.degrade import average_slices
from tests.conftest import head_like

SHAPE = (24, 20, 18)
AFFINE = np.diag([-1.0, 1, 2, 1])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A volume, what is given of it, and a sample in other units and with other noise."""
    truth = head_like(SHAPE)
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(truth, AFFINE), tmp_path / "in" / "a.nii.gz")
    to_thin = np.diag([1, 1, 3.0, 1])
    to_thin[2, 3] = 1  # the middle of the slices 0 to 2
    slices = np.rint(average_slices(truth, 3, 2)).astype(np.int16)
    (tmp_path / "thick").mkdir()
    nib.save(nib.Nifti1Image(slices, AFFINE @ to_thin), tmp_path / "thick" / "a.nii")
    degrade.holes(str(tmp_path / "in"), str(tmp_path / "holes"), radius=6)
    noise = np.random.default_rng(1).normal(0, 10, SHAPE)
    image = nib.Nifti1Image((0.01 * (truth + noise) + 5).astype(np.float32), AFFINE)
    image.header["descrip"] = "synthetic"
    for task, spatial in (("thick", ["thick"]), ("holes", ["masked", "hole"])):
        sample = tmp_path / f"{task}_samples" / "imagesTr" / "a_sample_00_0000.nii.gz"
        sample.parent.mkdir(parents=True)
        nib.save(image, sample)
        description = {"seed": 0, "spatial": {key: f"a_{key}.nii.gz" for key in spatial}}
        sample.with_name("a_sample_00_0000.json").write_text(json.dumps(description))
    return tmp_path


def run(folder: Path, task: str) -> nib.Nifti1Image:
    command = {"thick": consistency.slices, "holes": consistency.holes}[task]
    command(*(str(folder / name) for name in (f"{task}_samples", task, "out")))
    path = folder / "out" / "imagesTr" / "a_sample_00_0000.nii.gz"
    description = json.loads(path.with_name("a_sample_00_0000.json").read_text())
    assert description["seed"] == 0 and description["volume_sha256"] == content_hash(path.read_bytes())
    return nib.load(path)


def test_sample_is_brought_to_the_given_intensities():
    truth = np.random.default_rng(0).random(50)
    sample = 3 - 2 * truth
    np.testing.assert_allclose(consistency.in_units_of(truth[:20], sample, sample[:20]), truth)


def test_averages_of_a_sample_are_the_given_slices(folder):
    truth, result = head_like(SHAPE), run(folder, "thick")
    thick = nib.load(folder / "thick" / "a.nii").get_fdata()
    np.testing.assert_allclose(average_slices(result.get_fdata(), 3, 2), thick, atol=0.5)  # rounded
    assert result.get_data_dtype() == np.int16
    assert np.array_equal(result.affine, AFFINE) and result.header["descrip"] == b"synthetic"
    assert np.abs(result.get_fdata() - truth).mean() < 10  # the sample's detail in the given units


def test_voxels_outside_of_the_hole_are_those_of_the_file(folder):
    truth, result = head_like(SHAPE), run(folder, "holes")
    hole = nib.load(folder / "holes" / "a_hole.nii.gz").get_fdata() == 1
    assert result.get_data_dtype() == np.int16
    assert np.array_equal(result.get_fdata()[~hole], truth[~hole])
    assert 1 < np.abs(result.get_fdata() - truth)[hole].mean() < 30


def test_other_conditions_grids_and_folders_are_refused_by_name(folder):
    with pytest.raises(FileNotFoundError, match="no sample below .*thick_samples' was generated from masked, hole"):
        consistency.holes(str(folder / "thick_samples"), str(folder / "thick"), str(folder / "out"))
    with pytest.raises(FileNotFoundError, match="no sample below `samples_dir`"):
        consistency.holes(str(folder / "in"), str(folder / "holes"), str(folder / "out"))
    with pytest.raises(ValueError, match="`output_dir` is `samples_dir`"):
        consistency.holes(str(folder / "in"), str(folder / "holes"), str(folder / "in"))
    nib.save(nib.Nifti1Image(head_like((24, 20, 6)), np.diag([-1.0, 1, 6, 1])), folder / "thick" / "a.nii")
    with pytest.raises(ValueError, match=r"a_sample_00_0000.nii.gz is not on a grid of thin slices within those of .*a.nii"):
        run(folder, "thick")
    nib.save(nib.Nifti1Image(head_like(SHAPE), np.eye(4)), folder / "holes" / "a_masked.nii.gz")
    with pytest.raises(ValueError, match=r"a_sample_00_0000.nii.gz and .*a_masked.nii.gz have different grids"):
        run(folder, "holes")
    description = folder / "holes_samples" / "imagesTr" / "a_sample_00_0000.json"
    description.write_text(json.dumps({"spatial": {"masked": "../a.nii.gz", "hole": "a_hole.nii.gz"}}))
    with pytest.raises(ValueError, match=r"a_sample_00_0000.json names '../a.nii.gz', which is no path within a folder"):
        run(folder, "holes")


@pytest.mark.parametrize("num_slices", [1, 3, 13, 16, 64])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sample_has_the_given_averages_afterwards(num_slices, factor):
    random = np.random.default_rng(0)
    sample, truth = random.random((2, 3, num_slices, 4))
    thick = average_slices(truth, factor, 1)
    agreeing = agree_with_slices(sample, thick, factor, 1)
    np.testing.assert_allclose(average_slices(agreeing, factor, 1), thick, atol=1e-9)


def test_what_is_added_to_a_sample_is_smooth():
    sample = np.zeros((1, 1, 64))
    thick = np.sin(np.arange(8) / 2).reshape(1, 1, 8)
    added = agree_with_slices(sample, thick, 8, 2)[0, 0]
    assert np.abs(np.diff(added)).max() < 0.25 * np.abs(np.diff(np.repeat(thick, 8))).max()
