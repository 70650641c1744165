"""Label maps are told from images by their voxels, where no name says so."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest

from scripts.data.volume_checks import is_label_map, usable_volumes
from scripts.data.volume_lists import guesses_labels
from tests.conftest import head_like, save_volume

GRID = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1)
BALL = np.linalg.norm(GRID - 20, axis=-1) < 17
BLOCKS = 1 + GRID[..., 0] // 8 + 5 * (GRID[..., 1] // 8) + 25 * (GRID[..., 2] // 8)  # 125 labels
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("labels", [BALL, 3 * BALL, BALL * BLOCKS, BLOCKS, (GRID.sum(-1) % 20 == 0) * 2])
def test_few_integers_in_regions_are_labels(labels):
    assert is_label_map(labels.astype(np.float32))


@pytest.mark.parametrize(
    "image",
    [
        head_like((40, 40, 40)),
        RANDOM.poisson(5 * BALL),  # counts of a scintillation camera
        RANDOM.poisson(0.7 * BALL),
        np.round(GRID.sum(-1) / 2 + RANDOM.normal(0, 1, BALL.shape)),
        BALL * 0.5,
        np.full((4, 4, 4), 3),
    ],
)
def test_images_with_few_values_are_images(image):
    assert not is_label_map(image.astype(np.float32))


def test_label_maps_are_left_out_of_a_training_unless_they_are_named(tmp_path, caplog):
    images = [{"image": str(save_volume(tmp_path / f"{i}.nii", (20, 20, 20), seed=i))} for i in range(2)]
    nib.save(nib.Nifti1Image(BALL.astype(np.uint8), np.eye(4)), tmp_path / "unnamed.nii")
    lists = {"training": [*images[:1], {"image": str(tmp_path / "unnamed.nii")}], "validation": images[1:]}
    cache = str(tmp_path / "checked.json")
    assert usable_volumes(lists, 1, False, cache) == lists
    with caplog.at_level(logging.INFO):
        assert usable_volumes(lists, 1, False, cache, guess_labels=True)["training"] == images[:1]
    assert "unnamed.nii looks like a label map" in caplog.text and "going on without 1 of 3 volumes" in caplog.text
    assert guesses_labels(str(tmp_path), "**/*.nii*") and not guesses_labels(str(tmp_path), "*.nii")
    (tmp_path / "dataset.json").write_text('{"training": ["unnamed.nii"]}')
    assert not guesses_labels(str(tmp_path), "**/*.nii*")
