"""Which files are the spatial conditions of a volume."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from scripts.data.dataset_tables import conditions_of
from scripts.data.spatial_files import find_spatial, find_spatial_items


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def found(folder: Path, images: list[str], keys: list[str]) -> dict[str, dict[str, str]]:
    """The conditions of images by key, all as paths in the folder."""
    items = find_spatial([{"image": str(folder / name)} for name in images], str(folder), keys)
    return {
        os.path.relpath(item["image"], folder): {key: os.path.relpath(p, folder) for key, p in item["spatial"].items()}
        for item in items
    }


def write_list(folder: Path, training: list[Any], **lists: list[Any]) -> None:
    (folder / "dataset.json").write_text(json.dumps({"training": training, **lists}))


@pytest.mark.parametrize(
    "image, condition, key",
    [
        ("a/head.nii.gz", "a/head_label.nii.gz", "label"),
        ("a/head.nii.gz", "a/head_label.nrrd", "label"),
        ("a/head.nii.gz", "a/head_wall-2.nii", "wall-2"),
        ("sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T2w.nii.gz", "T2w"),
        ("sub-1/anat/sub-1_acq-a_T1w.nii.gz", "sub-1/anat/sub-1_acq-a_dseg.nii.gz", "dseg"),
        ("sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w_label.nii.gz", "label"),
        ("sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_desc-lesion_mask.nii.gz", "lesion"),
        ("sub-1/anat/sub-1_desc-preproc_T1w.nii.gz", "sub-1/anat/sub-1_dseg.nii.gz", "dseg"),
        ("sub-1/anat/sub-1_T1w.nii.gz", "derivatives/masks/sub-1/anat/sub-1_dseg.nii.gz", "dseg"),
        ("imagesTr/case.nii.gz", "labelsTr/case.nii.gz", "label"),
        ("imagesTr/case_0000.nii.gz", "labelsTr/case.nii.gz", "label"),
        ("imagesTs/case_0000.nii.gz", "labelsTs/case.nii.gz", "label"),
    ],
)
def test_file_beside_is_found(tmp_path, image, condition, key):
    touch(tmp_path, image, condition, "other/b.nii.gz")
    assert found(tmp_path, [image, "other/b.nii.gz"], [key]) == {image: {key: condition}, "other/b.nii.gz": {}}


@pytest.mark.parametrize(
    "image, other, key",
    [
        ("sub-1/sub-1_T1w.nii.gz", "sub-1/sub-1_acq-b_T2w.nii.gz", "T2w"),
        ("sub-1/sub-1_T1w.nii.gz", "sub-1/sub-1_desc-denoised_T2w.nii.gz", "T2w"),
        ("sub-1/sub-1_T1w.nii.gz", "sub-1/sub-1_T2w.json", "T2w"),
        ("sub-1/sub-1_T1w.nii.gz", "sub-2/sub-2_T2w.nii.gz", "T2w"),
        ("head_1.nii.gz", "head_label.nii.gz", "label"),
        ("head.nii.gz", "head_2_label.nii.gz", "label"),
        ("imagesTr/case.nii.gz", "labelsTr/case.nii.gz", "seg"),
    ],
)
def test_file_of_another_name_is_no_condition_and_the_key_is_refused(tmp_path, image, other, key):
    touch(tmp_path, image, other)
    with pytest.raises(ValueError, match=f"no volume below .* has the spatial condition '{key}'"):
        found(tmp_path, [image], [key])


def test_condition_is_no_volume_of_its_own_and_some_may_be_missing(tmp_path, caplog):
    names = [f"sub-{i}_{suffix}.nii.gz" for i, suffix in ((1, "T1w"), (1, "T2w"), (2, "T1w"))]
    touch(tmp_path, *names)
    with caplog.at_level(logging.INFO):
        assert found(tmp_path, names, ["T2w"]) == {names[0]: {"T2w": names[1]}, names[2]: {}}
    assert "1 of 2 volumes have the spatial condition 'T2w'" in caplog.text
    with pytest.raises(ValueError, match="every volume below .* is a condition of another one"):
        found(tmp_path, names[:2], ["T1w", "T2w"])


def test_two_files_that_fit_are_refused_by_name_but_not_two_paths_to_one(tmp_path):
    touch(tmp_path, "sub-1_T1w.nii.gz", "sub-1_desc-brain_mask.nii.gz", "sub-1_desc-brain_T1w.nii.gz")
    with pytest.raises(ValueError, match="sub-1_T1w.nii.gz has several files as 'brain': .*brain_T1w.* and .*brain_mask"):
        found(tmp_path, ["sub-1_T1w.nii.gz"], ["brain"])
    os.remove(tmp_path / "sub-1_desc-brain_T1w.nii.gz")
    (tmp_path / "sub-1_brain.nii.gz").symlink_to(tmp_path / "sub-1_desc-brain_mask.nii.gz")
    touch(tmp_path, "head.nii.gz", "head_t2.hdr", "head_t2.img")
    assert len(found(tmp_path, ["sub-1_T1w.nii.gz", "head.nii.gz"], ["brain", "t2"])) == 2


def test_dataset_json_decides_where_it_has_the_key(tmp_path):
    images = ["imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "imagesTr/c.nii.gz"]
    touch(tmp_path, *images, "maps/x.nii.gz", *(name.replace("images", "labels") for name in images), "imagesTr/c_t2.nii.gz")
    listed = [{"image": f"./{images[0]}", "label": "./maps/x.nii.gz"}, {"image": images[1], "label": None}, images[2]]
    write_list(tmp_path, listed[:1], validation=listed[1:])
    assert found(tmp_path, images, ["label", "t2"]) == {
        images[0]: {"label": "maps/x.nii.gz"},
        images[1]: {},
        images[2]: {"t2": "imagesTr/c_t2.nii.gz"},
    }


@pytest.mark.parametrize("value", ["../a.nii.gz", "/etc/passwd", ["a.nii.gz"], 3, "labelsTr/../../a.nii.gz"])
def test_path_of_dataset_json_stays_in_its_folder(tmp_path, value):
    folder = tmp_path / "data"
    touch(folder, "a.nii.gz")
    touch(tmp_path, "a.nii.gz")
    write_list(folder, [{"image": "a.nii.gz", "label": value}])
    with pytest.raises(ValueError, match=r"dataset.json has .* as `label` of .*, which must be the path of one file"):
        found(folder, ["a.nii.gz"], ["label"])


def test_missing_file_of_dataset_json_is_named(tmp_path):
    touch(tmp_path, "a.nii.gz")
    write_list(tmp_path, [{"image": "a.nii.gz", "label": "b.nii.gz"}])
    with pytest.raises(FileNotFoundError, match=r"dataset.json has 'b.nii.gz' as `label` of .*, which does not exist"):
        found(tmp_path, ["a.nii.gz"], ["label"])


def test_path_of_a_volume_does_not_describe_the_volume(tmp_path):
    touch(tmp_path, "a.nii.gz")
    write_list(tmp_path, [{"image": "a.nii.gz", "t2": "t2/a.nii.gz", "scanner": "GE", "age": 3}])
    assert conditions_of(str(tmp_path / "a.nii.gz"), str(tmp_path)) == {"scanner": "GE", "age": 3.0}


def cases(folder: Path, *keys: str) -> list[tuple[Any, ...]]:
    items = find_spatial_items(str(folder), keys)
    return [
        (item["name"], item["image"] and Path(item["image"]).name, {k: Path(p).name for k, p in item["spatial"].items()})
        for item in items
    ]


def test_cases_of_dataset_json_are_of_all_lists(tmp_path):
    touch(tmp_path, "a.nii.gz", "l/a.nii.gz", "l/b.nii.gz", "t/b.nii.gz", "c.nii.gz")
    training = [{"image": "a.nii.gz", "label": "l/a.nii.gz"}, "c.nii.gz"]
    write_list(tmp_path, training, validation=[{"image": "b.nii.gz", "label": "l/b.nii.gz", "t2": "t/b.nii.gz"}])
    assert cases(tmp_path, "label", "t2") == [
        ("a", "a.nii.gz", {"label": "a.nii.gz"}),
        ("b", None, {"label": "b.nii.gz", "t2": "b.nii.gz"}),
    ]


def test_cases_of_files_are_those_that_belong_together(tmp_path):
    touch(tmp_path, "sub-1/sub-1_dseg.nii.gz", "sub-1/sub-1_desc-hole_T1w.nii.gz", "sub-2/sub-2_dseg.nii.gz", "x.nii.gz")
    assert cases(tmp_path, "dseg", "hole") == [
        ("sub-1", None, {"dseg": "sub-1_dseg.nii.gz", "hole": "sub-1_desc-hole_T1w.nii.gz"}),
        ("sub-2", None, {"dseg": "sub-2_dseg.nii.gz"}),
    ]
    with pytest.raises(ValueError, match="no volume below .* has the spatial condition 'T2w'"):
        cases(tmp_path, "dseg", "T2w")


def test_files_of_any_name_are_those_of_a_single_key(tmp_path):
    touch(tmp_path, "p1/mask.nii.gz", "p2/mask.nii.gz", "p2/notes.txt")
    named = [("p1_mask", None, {"label": "mask.nii.gz"}), ("p2_mask", None, {"label": "mask.nii.gz"})]
    assert cases(tmp_path, "label") == named
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert cases(tmp_path, "label") == [("a", None, {"label": "a.nii.gz"})]
