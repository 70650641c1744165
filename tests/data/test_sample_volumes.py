"""The sample volumes that need no download."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data import sample_volumes


@pytest.fixture(scope="module")
def tissues() -> torch.Tensor:
    return sample_volumes._tissue_maps()


def test_sample_volumes_are_complete_and_made_once(tissues, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_volumes, "NUM_TRAINING_VOLUMES", 1)
    monkeypatch.setattr(sample_volumes, "_tissue_maps", lambda: tissues)
    monkeypatch.setattr(sample_volumes, "_synthesise_head", lambda tissues, seed: 255 * tissues[0].numpy())
    folder = tmp_path / "data" / "sample"
    assert sample_volumes.prepare_sample_volumes(str(folder)) == str(folder)
    lists = json.loads((folder / "dataset.json").read_text())
    paths = [folder / item["image"] for name in ("training", "validation") for item in lists[name]]
    head, template = (nib.load(path) for path in paths)
    assert head.shape == template.shape == (197, 233, 189)
    assert np.unique(np.asarray(head.dataobj)).size > 50
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["sample"]  # nothing unfinished stays

    monkeypatch.setattr(sample_volumes, "_synthesise_head", lambda *_: 1 / 0)
    sample_volumes.prepare_sample_volumes(str(folder))  # does not make them again


def test_interrupted_preparation_is_not_taken_for_whole(tissues, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_volumes, "_tissue_maps", lambda: tissues)
    monkeypatch.setattr(sample_volumes, "_synthesise_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_volumes.prepare_sample_volumes(str(tmp_path / "sample"))
    assert not (tmp_path / "sample").exists()


def test_training_volumes_differ_and_come_out_the_same_again(tissues):
    heads = [sample_volumes._synthesise_head(tissues[:, 60:90, 100:130, 80:110], seed) for seed in (0, 1, 0)]
    assert heads[0].shape == (30, 30, 30) and np.unique(heads[0].astype(np.uint8)).size > 50
    assert np.array_equal(heads[0], heads[2])
    assert abs(heads[0] - heads[1]).mean() > 10
