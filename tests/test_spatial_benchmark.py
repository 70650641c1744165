"""The benchmark of samples with spatial conditions, on a volume whose samples are known."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks import spatial
from scripts.data import degrade
from scripts.data.volume_reader import state_of
from tests.conftest import head_like

SHAPE = (24, 20, 18)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A validation volume, what is given of it, and two samples: the truth in other units, with noise."""
    for name in ("training", "validation"):
        (tmp_path / "in").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(head_like(SHAPE, len(name)), np.eye(4)), tmp_path / "in" / f"{name}.nii.gz")
    lists = {name: [{"image": f"{name}.nii.gz"}] for name in ("training", "validation")}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(lists))
    degrade.thick_slices(str(tmp_path / "in"), str(tmp_path / "thick"), factor=3)
    degrade.holes(str(tmp_path / "in"), str(tmp_path / "masked"), radius=6)
    truth = head_like(SHAPE, len("validation"))
    for key in ("thick", "masked"):
        out = tmp_path / f"{key}_samples"
        out.mkdir()
        for index in range(2):
            noise = np.random.default_rng(index).normal(0, 60, SHAPE)
            nib.save(nib.Nifti1Image(0.1 * (truth + noise), np.eye(4)), out / f"a_sample_{index:02d}_0000.nii.gz")
            states = {key: state_of(str(tmp_path / key / f"validation_{key}.nii.gz"))}
            (out / f"a_sample_{index:02d}_0000.json").write_text(json.dumps({"spatial_states": states}))
    return tmp_path


def table(text: str) -> dict[str, list[float]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {name: [float(cell.split()[0]) for cell in cells] for name, *cells in rows}


def test_agreeing_samples_are_nearer_to_thin_slices_and_their_mean_is_nearest(folder, capsys):
    spatial.slices(str(folder / "thick_samples"), str(folder / "thick"), factor=3)
    psnr = {name: numbers[0] for name, numbers in table(capsys.readouterr().out).items()}
    assert psnr["sample"] < psnr["sample, agreeing"] < psnr["mean of 2 samples, agreeing"]
    assert psnr["cubic interpolation"] < psnr["mean of 2 samples"] < psnr["mean of 2 samples, agreeing"]
    truth, cubic = head_like(SHAPE, 10), nib.load(folder / "thick" / "validation_thick.nii.gz").get_fdata()
    high = np.percentile(truth, 99.9)
    error = (cubic.clip(0, high) - truth.clip(0, high)) / high
    assert psnr["cubic interpolation"] == pytest.approx(-10 * np.log10((error**2).mean()), abs=0.01)


def test_errors_in_a_hole_and_steps_at_its_border_are_measured(folder, capsys):
    spatial.holes(str(folder / "masked_samples"), str(folder / "masked"))
    found = table(capsys.readouterr().out)
    assert found["mean of 2 samples, without a step"][0] < found["sample, without a step"][0] < 0.1
    assert found["sample, as it is"][2] > 1
