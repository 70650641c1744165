"""Volumes that cannot be trained on are found before the first epoch, all of them, with the reason."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.data.volume_checks import find_problem, usable_volumes
from scripts.data.volume_reader import read_volume
from tests.conftest import head_like, save_volume
from tests.processes import bundle_run

SHAPE = (8, 9, 10)


def save(path: Path, values: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    return str(path)


def truncated(path: Path) -> str:
    save_volume(path, (30, 30, 30))
    path.write_bytes(path.read_bytes()[:-500])
    return str(path)


def with_voxel(path: Path, value: float) -> str:
    values = head_like(SHAPE).astype(np.float32)
    values[1, 2, 3] = value
    return save(path, values)


def with_header(path: Path, affine: np.ndarray | None = None, **fields: object) -> str:
    """A volume whose header does not agree with the content of the file."""
    image = nib.Nifti1Image(head_like(SHAPE), np.eye(4))
    for name, value in {"vox_offset": 352, **fields}.items():
        image.header[name] = value
    if affine is not None:
        image.header["sform_code"] = 1
        for name, row in zip(("srow_x", "srow_y", "srow_z"), affine):
            image.header[name] = row
    content = image.header.binaryblock + bytes(4) + image.get_fdata().astype("<i2").tobytes("F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def colours(path: Path) -> str:
    values = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    values["G"] = np.arange(10)
    return save(path, values)


HUGE = [3, 32000, 32000, 32000, 1, 1, 1, 1]
FLAT = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]])
FAULTS = {
    "truncated.nii.gz": (truncated, "cannot be read to its end"),
    "truncated.nii": (truncated, "cannot be read to its end"),
    "text.nii": (lambda path: (path.write_text("no volume"), str(path))[1], "cannot be read to its end"),
    "nan.nii.gz": (lambda path: save(path, np.full(SHAPE, np.nan, np.float32)), "is NaN, infinite or padding in 100.0% of"),
    "constant.nii": (lambda path: save(path, np.full(SHAPE, 7, np.int16)), "is constant (7)"),
    "slice.nii": (lambda path: save(path, head_like((9, 9, 1))), "(a 2D slice has two)"),
    "flat.nii": (lambda path: save(path, head_like((9, 9, 1))[..., 0]), "(a 2D slice has two)"),
    "series.nii": (
        lambda path: save(path, np.ones((5, 6, 7, 20), np.int16)),
        "has the shape (5, 6, 7, 20); needed are three axes (a 2D slice has two) and 1 channels",
    ),
    "vectors.nii": (
        lambda path: save(path, np.ones((5, 6, 7, 2, 3), np.int16)),
        "has the shape (5, 6, 7, 2, 3); needed are three axes",
    ),
    "rgb.nii.gz": (colours, "has voxels of the type [('R', 'u1'), ('G', 'u1'), ('B', 'u1')]; convert"),
    "complex.nii.gz": (
        lambda path: save(path, head_like(SHAPE) * np.complex64(1 + 1j)),
        "has voxels of the type complex64; convert",
    ),
    "zero.nii": (
        lambda path: with_header(path, np.zeros((3, 4))),
        "has no orientation and spacing: its affine is [[0.0, 0.0",
    ),
    "flat_affine.nii.gz": (lambda path: with_header(path, FLAT), "has no orientation and spacing"),
    "nan_affine.nii": (lambda path: with_header(path, np.nan * FLAT), "has no orientation and spacing: its affine is [[nan"),
    "huge.nii": (
        lambda path: with_header(path, dim=HUGE),
        "its 32000x32000x32000 voxels in float32 take 122,070 GiB, and this machine has",
    ),
    "huge.nii.gz": (lambda path: with_header(path, dim=HUGE), "its 32000x32000x32000 voxels in float32 take 122,070 GiB"),
    "in_header.nii": (lambda path: with_header(path, vox_offset=0), "voxels begin where its header does"),
    "offset.nii": (lambda path: with_header(path, vox_offset=1e9), "cannot be read to its end"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_volume_that_cannot_be_used_is_told_why(name, tmp_path):
    make, words = FAULTS[name]
    path = make(tmp_path / name)
    assert words in (find_problem(path, 1) or "")


def test_volume_that_memory_cannot_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = str(save_volume(tmp_path / "a.nii.gz", SHAPE))
    monkeypatch.setattr("scripts.data.volume_reader.total_memory", lambda device: 4 * 8 * 9 * 10 - 1)
    with pytest.raises(ValueError, match="its 8x9x10 voxels in float32 take 0 GiB, and this machine has 0 GiB"):
        read_volume(path)
    monkeypatch.setattr("scripts.data.volume_reader.total_memory", lambda device: 4 * 8 * 9 * 10)
    read_volume(path)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {"state": "x", "problem": null}}', "[" * 10**5])
def test_invalid_cache_of_checks_is_named_and_made_again(tmp_path, caplog, content):
    lists, cache = volumes_with_two_bad(tmp_path), tmp_path / "checked.json"
    cache.write_text(content)
    assert len(usable_volumes(lists, 1, True, str(cache))["training"]) == 3
    assert f"{cache}" in caplog.text and "all volumes are checked again" in caplog.text
    assert len(json.loads(cache.read_text())) == 6


def test_volume_that_can_be_used_has_no_problem(tmp_path):
    assert find_problem(str(save_volume(tmp_path / "a.nii.gz", SHAPE)), 1) is None
    for value in (np.nan, np.inf, -np.inf, -1e6):
        assert find_problem(with_voxel(tmp_path / "voxel.nii.gz", value), 1) is None
    two = np.stack([head_like(SHAPE), head_like(SHAPE)], axis=-1)
    assert find_problem(save(tmp_path / "two.nii", two), 2) is None
    assert "and 2 channels, `image_channels`" in (find_problem(str(tmp_path / "a.nii.gz"), 2) or "")


def volumes_with_two_bad(folder: Path) -> dict[str, list[dict[str, str]]]:
    paths = [str(save_volume(folder / f"{i}.nii", SHAPE, seed=i)) for i in range(4)]
    paths += [truncated(folder / "bad.nii.gz"), save(folder / "flat.nii", np.full(SHAPE, 7, np.int16))]
    return {"training": [{"image": path} for path in paths[1:]], "validation": [{"image": paths[0]}]}


def test_all_bad_volumes_are_listed_before_the_run_stops_or_goes_on_without_them(tmp_path, caplog):
    lists, cache = volumes_with_two_bad(tmp_path), str(tmp_path / "checked.json")
    with pytest.raises(ValueError, match=r"2 of 6 volumes(?s:.)*bad.nii.gz cannot(?s:.)*flat.nii is const(?s:.)*skip_bad_f"):
        usable_volumes(lists, 1, False, cache)
    caplog.set_level(logging.INFO)
    good = usable_volumes(lists, 1, True, cache)
    assert good == {"training": lists["training"][:3], "validation": lists["validation"]}
    assert "going on without 2 of 6" in caplog.text and "training: 3 volumes, size 8x9x10" in caplog.text
    lists["validation"] = lists["training"][3:]
    with pytest.raises(ValueError, match="Nothing is left for validation"):
        usable_volumes(lists, 1, True, cache)


def test_list_of_a_run_that_does_not_train_stays_empty(tmp_path):
    bad = volumes_with_two_bad(tmp_path)["training"]
    good = usable_volumes({"training": [], "validation": bad}, 1, True, str(tmp_path / "checked.json"))
    assert good == {"training": [], "validation": bad[:3]}


def test_checked_volumes_are_remembered_until_they_change(tmp_path, monkeypatch):
    lists, cache = volumes_with_two_bad(tmp_path), tmp_path / "checked.json"
    read = []
    monkeypatch.setattr(
        "scripts.data.volume_checks.find_problem",
        lambda path, *args: (read.append(Path(path).name), find_problem(path, *args))[1],
    )
    usable_volumes(lists, 1, True, str(cache))
    assert len(read) == 6
    usable_volumes(lists, 1, True, str(cache))
    assert len(read) == 6
    save_volume(tmp_path / "bad.nii.gz", SHAPE)
    assert len(usable_volumes(lists, 1, True, str(cache))["training"]) == 4
    assert read[6:] == ["bad.nii.gz"]
    cache.write_text("{ damaged")
    usable_volumes(lists, 1, True, str(cache), max_volumes=1)
    assert sorted(read[7:]) == ["0.nii", "1.nii"]
    assert len(json.loads(cache.read_text())) == 2


def test_constant_channel_is_found_before_the_training_with_its_own_value(tmp_path):
    two = np.stack([head_like(SHAPE), np.full(SHAPE, 7, np.int16)], axis=-1)
    assert find_problem(save(tmp_path / "two.nii", two), 2) == "(channel 1) is constant (7)."


def test_dicom_that_is_no_volume_is_found_before_the_training(tmp_path):
    series = pytest.importorskip("tests.data.test_dicom_series")

    def colours(image, k):
        image.PhotometricInterpretation, image.SamplesPerPixel, image.PlanarConfiguration = "RGB", 3, 0

    series.save_series(tmp_path / "whole")
    series.save_series(tmp_path / "rgb", change=colours)
    series.save_series(tmp_path / "single", slices=[3], change=lambda image, k: setattr(image, "SliceThickness", 2))
    found = {name: find_problem(str(tmp_path / name), 1) or "" for name in ("whole", "rgb", "single")}
    assert found["whole"] == ""
    assert "only gray values are read" in found["rgb"]
    assert "a 2D slice" in found["single"]


def test_series_is_checked_again_when_a_slice_changes(tmp_path):
    series = pytest.importorskip("tests.data.test_dicom_series")
    series.save_series(tmp_path / "series")
    lists = {"training": [{"image": str(tmp_path / "series")}], "validation": [{"image": str(tmp_path / "series")}]}
    usable_volumes(lists, 1, False, str(tmp_path / "checked.json"))
    next((tmp_path / "series").iterdir()).write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 1 volumes cannot be used"):
        usable_volumes(lists, 1, False, str(tmp_path / "checked.json"))


def test_truncated_volume_stops_training_before_the_first_step(volumes, tmp_path):
    truncated(volumes / "sub-09" / "broken.nii.gz")
    process = bundle_run(
        "training", "train.json", check=False, dataset_dir=str(volumes), output_dir=str(tmp_path / "eval"), device="cpu"
    )
    assert process.returncode == 1
    assert "1 of 5 volumes cannot be used" in process.stdout
    assert "sub-09/broken.nii.gz cannot be read to its end" in process.stdout
    assert "before the first step" not in process.stdout and not list(tmp_path.rglob("*.pt"))


def test_file_without_permission_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "a.nii.gz").write_bytes(b"unreadable")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read all files
    assert "PermissionError: no permission to read it" in str(find_problem(str(tmp_path / "a.nii.gz"), 1))
