"""Files of one subject stay on one side of the split, and a subject stays on its side when others come and go."""

from __future__ import annotations

import logging

import pytest

from scripts.data.volume_lists import split_by_subject, subjects_of


def split(paths: list[str], val_fraction: float = 0.25, seed: int = 0, subject_pattern: str | None = None):
    lists = split_by_subject([{"image": path} for path in paths], ".", val_fraction, seed, subject_pattern)
    return {name: [item["image"] for item in items] for name, items in lists.items()}


def held_out(subjects: list[str], **keys) -> set[str]:
    return set(split(subjects, **keys)["validation"])


def test_subjects_that_come_and_go_move_nobody():
    subjects = [f"sub-{i:03d}" for i in range(200)]
    all_of_them = held_out(subjects)
    assert 35 <= len(all_of_them) <= 65  # a quarter of 200, drawn
    for kept in (subjects[:-1], subjects[50:], subjects[::7]):
        assert held_out(kept) == all_of_them & set(kept)
    assert held_out(subjects, val_fraction=0.1) < all_of_them
    assert held_out(subjects, seed=1) != all_of_them


@pytest.mark.parametrize("val_fraction", [0.001, 0.999])
def test_each_side_has_a_subject(val_fraction):
    lists = split(["a.nii", "b.nii", "c.nii"], val_fraction)
    assert sorted(map(len, lists.values())) == [1, 2]


@pytest.mark.parametrize(
    "paths, subjects",
    [
        (["sub-1/ses-1/T1w.nii", "sub-1_T2w.nii", "raw/sub-NDAR-INV01/x.nii"], ["sub-1", "sub-1", "sub-NDAR-INV01"]),
        (["sub-NDAR-INV01_T1w.nii", "sub-NDAR-INV02_T1w.nii"], ["sub-NDAR-INV01", "sub-NDAR-INV02"]),
        (["a/visit1/t1.nii", "a/visit2/t1.nii", "b/t1.nii"], ["a", "a", "b"]),
        (["imagesTr/a.nii.gz", "imagesTs/b/t1.nii", "Training/c.nii"], ["a", "b", "c"]),
        (["scans/0.nii", "scans/1.nii"], ["0", "1"]),
        (["OASIS/0.nii", "OASIS/1.nii"], ["0", "1"]),
        (["case1_0000.nii.gz", "case1_0001.nii.gz", "case2_0000.nii.gz"], ["case1", "case1", "case2"]),
        (["scan_0001.nii.gz", "scan_0002.nii.gz"], ["scan_0001", "scan_0002"]),
        (["a.b.nii", "a.c.nii.gz"], ["a.b", "a.c"]),
    ],
)
def test_subject_is_read_from_the_path(paths, subjects, caplog):
    with caplog.at_level(logging.INFO):
        assert subjects_of([f"data/{path}" for path in paths], "data") == subjects
    assert f"{len(set(subjects))} subjects ({subjects[0]}" in caplog.text


def test_pattern_says_what_a_subject_is():
    paths = ["x/P01_a.nii", "x/P01_b.nii", "y/P02.nii"]
    assert subjects_of(paths, ".", r"P\d+") == ["P01", "P01", "P02"]
    assert subjects_of(paths, ".", r"P(\d)\d") == ["0", "0", "0"]
    assert len(split(paths, 0.5, subject_pattern=r"P\d+")["training"]) in (1, 2)
    with pytest.raises(ValueError, match="`subject_pattern` 'P01' finds no subject in 'y/P02.nii'"):
        subjects_of(paths, ".", "P01")
