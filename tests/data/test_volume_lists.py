"""Which volumes are found, how they are split, and the intensity window."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel as nib
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
        "brainmask.nii.gz",
        "a_labelmap.nii.gz",
        "lesion.nii",
        "patientGT.nii.gz",
        "atlas.nii",
        "a_annot.nii",
        "contours.nii",
        "T1_pveseg.nii.gz",
        "aparc+aseg.nii.gz",
        "liverMask.nii",
    ],
)
def test_labels_are_left_out(tmp_path, label, caplog):
    save_volume(tmp_path / "imagesTr" / "a.nii.gz", SHAPE)
    save_volume(tmp_path / label, SHAPE)
    with caplog.at_level(logging.INFO):
        assert names(find_images(str(tmp_path), GLOB)) == ["a.nii.gz"]
    assert "left out 1 labels" in caplog.text


@pytest.mark.parametrize(
    "image",
    [
        "segovia.nii.gz",
        "unlabelled.nii.gz",
        "sub-maskin/T1.nii",
        "roidata.nii",
        "sub-lesion01_acq-mask_T1w.nii",
        "lesion study/T1.nii",
    ],
)
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


def test_pattern_that_names_labels_or_results_takes_them(tmp_path):
    for name in (
        "a.nii.gz",
        "a_mask.nii.gz",
        "a_reconstruction.nii.gz",
        "a_latent.nii.gz",
        "sample_0001.nii.gz",
        "a_spatial-t2.nii.gz",
    ):
        save_volume(tmp_path / name, SHAPE)
    assert names(find_images(str(tmp_path), GLOB)) == ["a.nii.gz"]
    assert names(find_images(str(tmp_path), "*mask*")) == ["a_mask.nii.gz"]
    assert names(find_images(str(tmp_path), "*_reconstruction.nii.gz")) == ["a_reconstruction.nii.gz"]


def test_names_in_capitals_are_found_and_what_is_no_volume_is_not(tmp_path):
    save_volume(tmp_path / "X.NII.GZ", SHAPE)
    for other in ("x.nii.gz.md5", "x.nii.gz.bak", "x.nii.json", "x.nii.gz~", ".x.nii.gz", "._x.nii.gz", ".git/x.nii.gz"):
        save_volume(tmp_path / "y.nii.gz", SHAPE)
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / "y.nii.gz").rename(tmp_path / other)
    assert names(find_images(str(tmp_path), GLOB)) == ["X.NII.GZ"]


def test_links_are_followed_once_and_named_where_they_lead_nowhere(tmp_path, caplog):
    data, store = tmp_path / "data", tmp_path / "store"
    save_volume(data / "sub-1" / "a.nii.gz", SHAPE)
    save_volume(store / "sub-2" / "b.nii.gz", SHAPE)
    save_volume(data / ".git" / "annex" / "objects" / "SHA256.nii.gz", SHAPE)
    (data / "all.nii.gz").symlink_to("sub-1/a.nii.gz")  # a further path to the same file
    (data / "linked").symlink_to("sub-1")
    (data / "sub-2").symlink_to(store / "sub-2")
    (data / "sub-2-again").symlink_to(store / "sub-2")
    (data / "sub-2" / "up").symlink_to(data)
    (data / "sub-3").symlink_to(store / "sub-3")
    (data / "sub-1" / "c.nii.gz").symlink_to("../.git/annex/objects/SHA256.nii.gz")
    (data / "sub-1" / "gone.nii.gz").symlink_to("../.git/annex/objects/gone")
    found = [Path(item["image"]).relative_to(data).as_posix() for item in find_images(str(data), GLOB)]
    assert found == ["sub-1/a.nii.gz", "sub-1/c.nii.gz", "sub-2/b.nii.gz"]
    (nowhere,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "2 links that lead nowhere" in nowhere and "sub-3" in nowhere and "sub-1/gone.nii.gz" in nowhere


def test_header_and_voxels_of_a_pair_are_one_volume(tmp_path):
    nib.save(nib.Nifti1Pair(np.zeros((2, 2, 2), np.int16), np.eye(4)), tmp_path / "a.hdr")
    for pattern, name in (("**/*", "a.hdr"), ("*.hdr", "a.hdr"), ("*.img", "a.img")):
        assert find_images(str(tmp_path), pattern) == [{"image": str(tmp_path / name)}]


def test_patterns_match_folders_at_their_depth(tmp_path):
    for name in ("a.nii", "b/c.nii", "b/d/e.nii"):
        save_volume(tmp_path / name, SHAPE)
    for pattern, expected in (
        ("*.nii", ["a.nii"]),
        ("*/*.nii", ["c.nii"]),
        ("**/d/*", ["e.nii"]),
        ("b/**/*.nii", ["c.nii", "e.nii"]),
        ("[b]*/**", ["c.nii", "e.nii"]),
        ("**/", ["b", "d"]),
        ("*/", ["b"]),
    ):
        assert names(find_images(str(tmp_path), pattern)) == expected, pattern


def test_output_folder_is_left_out(tmp_path):
    for name in ("a.nii", "out/b.nii"):
        save_volume(tmp_path / name, SHAPE)
    assert names(find_images(str(tmp_path), GLOB, str(tmp_path / "out"))) == ["a.nii"]
    for output_dir in (tmp_path, tmp_path / "elsewhere", tmp_path.parent):
        assert names(find_images(str(tmp_path), GLOB, str(output_dir))) == ["a.nii", "b.nii"]


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


def test_decathlon_lists_may_name_folders_of_series(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "dataset.json").write_text('{"training": ["a"], "validation": ["b"]}')
    assert {name: names(items) for name, items in split(tmp_path).items()} == {"training": ["a"], "validation": ["b"]}


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset_dir.*nowhere"):
        find_images(str(tmp_path / "nowhere"), GLOB)
    with pytest.raises(FileNotFoundError, match=r"image_glob.*\*\*/\*.nii"):
        find_images(str(tmp_path), GLOB)
    save_volume(tmp_path / "only.nii", SHAPE)
    with pytest.raises(ValueError, match=r"of one subject \(only\).*`subject_pattern`"):
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
