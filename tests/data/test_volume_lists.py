"""Which volumes are found, how they are split, and the intensity window."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from scripts.data.volume_lists import affordable_cache_rate, describe, find_images, training_and_validation
from tests.conftest import save_volume

GLOB = "**/*.nii*"
SHAPE = (6, 5, 4)


def names(items) -> list[str]:
    return [Path(item["image"]).name for item in items]


def split(folder: Path, val_fraction: float = 0.25, seed: int = 0):
    return training_and_validation(str(folder), GLOB, val_fraction, seed)


@pytest.mark.parametrize(
    "label",
    [
        "labelsTr/a.nii.gz",
        "a_seg.nii.gz",
        "a-mask.nii",
        "sub-1/sub-1_dseg.nii.gz",
        "sub-1/sub-1_label-GM_probseg.nii.gz",
        "Segmentation.nii.gz",
        "masks/a.nii.gz",
    ],
)
def test_labels_are_left_out(tmp_path, label, caplog):
    save_volume(tmp_path / "imagesTr" / "a.nii.gz", SHAPE)
    save_volume(tmp_path / label, SHAPE)
    with caplog.at_level(logging.INFO):
        assert names(find_images(str(tmp_path), GLOB)) == ["a.nii.gz"]
    assert "left out 1 labels" in caplog.text


@pytest.mark.parametrize("image", ["segovia.nii.gz", "unlabelled.nii.gz", "sub-maskin/T1.nii", "roidata.nii"])
def test_words_that_only_contain_a_label_word_are_kept(tmp_path, image):
    save_volume(tmp_path / image, SHAPE)
    assert len(find_images(str(tmp_path), GLOB)) == 1


def test_names_above_the_dataset_folder_do_not_count(tmp_path):
    save_volume(tmp_path / "masks" / "study" / "a.nii.gz", SHAPE)
    assert len(find_images(str(tmp_path / "masks" / "study"), GLOB)) == 1


def test_count_sizes_and_spacings_are_told(tmp_path):
    save_volume(tmp_path / "a.nii.gz", (6, 5, 4))
    save_volume(tmp_path / "b.nii.gz", (3, 9, 4), affine=np.diag([0.5, 1, 2.5, 1]))
    told = describe(find_images(str(tmp_path), GLOB))
    assert told == "2 volumes, size 3x5x4 to 6x9x4 voxels, spacing 0.5x1x1 to 1x1x2.5 mm"


def test_files_of_one_subject_stay_together(tmp_path):
    for subject in range(8):
        for session in ("ses-1", "ses-2"):
            save_volume(tmp_path / f"sub-{subject}" / session / "T1w.nii.gz", SHAPE)
    lists = split(tmp_path)
    subjects = {k: {Path(i["image"]).parts[-3] for i in items} for k, items in lists.items()}
    assert not subjects["training"] & subjects["validation"]
    assert (len(lists["training"]), len(lists["validation"])) == (12, 4)
    assert split(tmp_path) == lists
    assert split(tmp_path, seed=1) != lists


def test_a_folder_is_a_subject_where_no_name_says_so(tmp_path):
    for patient in "abcd":
        save_volume(tmp_path / patient / "t1.nii", SHAPE)
        save_volume(tmp_path / patient / "t2.nii", SHAPE)
    lists = split(tmp_path)
    assert {len(lists["training"]), len(lists["validation"])} == {6, 2}
    assert len({Path(i["image"]).parent for i in lists["validation"]}) == 1


@pytest.mark.parametrize("folder", [".", "imagesTr", "scans"])
def test_files_that_share_the_only_folder_are_subjects(tmp_path, folder):
    for i in range(4):
        save_volume(tmp_path / folder / f"{i}.nii", SHAPE)
    assert len(split(tmp_path)["training"]) == 3


def test_decathlon_lists_are_used(tmp_path):
    for i in range(4):
        save_volume(tmp_path / "imagesTr" / f"{i}.nii", SHAPE)
    entries = [{"image": f"./imagesTr/{i}.nii", "label": f"./labelsTr/{i}.nii"} for i in range(4)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries[:3], "validation": entries[3:]}))
    lists = split(tmp_path)
    assert names(lists["training"]) == ["0.nii", "1.nii", "2.nii"]
    assert names(lists["validation"]) == ["3.nii"]
    assert set(lists["training"][0]) == {"image"}

    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    lists = split(tmp_path)
    assert (len(lists["training"]), len(lists["validation"])) == (3, 1)

    (tmp_path / "imagesTr" / "2.nii").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset.json lists 1 files.*2.nii"):
        split(tmp_path)


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset_dir.*nowhere"):
        find_images(str(tmp_path / "nowhere"), GLOB)
    with pytest.raises(FileNotFoundError, match=r"image_glob.*\*\*/\*.nii"):
        find_images(str(tmp_path), GLOB)
    save_volume(tmp_path / "only.nii", SHAPE)
    with pytest.raises(ValueError, match="at least two subjects"):
        split(tmp_path)
    save_volume(tmp_path / "second.nii", SHAPE)
    for fraction in (0, 1, -0.1, True):
        with pytest.raises(ValueError, match="val_fraction"):
            split(tmp_path, val_fraction=fraction)


def test_cache_holds_what_fits_into_memory(tmp_path, monkeypatch):
    items = [{"image": str(save_volume(tmp_path / f"{i}.nii", (10, 10, 10)))} for i in range(4)]
    assert affordable_cache_rate(items) == 1.0
    memory = {"SC_AVPHYS_PAGES": 16_000, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr("os.sysconf", memory.__getitem__)
    assert affordable_cache_rate(items) == pytest.approx(0.5)  # half of 16 kB for 4 x 4 kB
