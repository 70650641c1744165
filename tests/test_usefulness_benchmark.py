"""The benchmark of generated pairs, on small volumes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks import usefulness as benchmark
from benchmarks.usefulness import usefulness
from scripts.evaluation.samples import segmentation


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(segmentation, "PATCH_SIZE", (16, 16, 16))
    monkeypatch.setattr(segmentation, "WINDOW_SIZE", (16, 16, 16))
    monkeypatch.setattr(benchmark, "described", lambda *_: "a machine")


def save_pairs(folder: Path, **counts: int) -> str:
    """Pairs in noise, half of each bright and labelled, in lists of such lengths."""
    folder.mkdir()
    lists: dict[str, list[dict[str, str]]] = {part: [] for part in counts}
    for number, part in enumerate(part for part, count in counts.items() for _ in range(count)):
        labels = np.zeros((16, 16, 16), np.uint8)
        labels[:8] = 1
        image = 100 * labels + np.random.default_rng(number).integers(0, 50, labels.shape, np.uint8)
        item = {"image": f"{number}.nii.gz", "label": f"{number}_label.nii.gz"}
        for name, volume in zip(item.values(), (image, labels)):
            nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / name)
        lists[part].append(item)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "bone"}, **lists}))
    return str(folder)


def test_each_network_is_trained_once_on_the_pairs_of_its_row(tmp_path, monkeypatch, capsys):
    real = save_pairs(tmp_path / "real", training=3, validation=1)
    made = save_pairs(tmp_path / "made", training=4)
    train, trained_on = benchmark.train_segmenter, []

    def recorded(pools, *arguments):
        trained_on.append([len(pool) for pool in pools])
        return train(pools, *arguments)

    monkeypatch.setattr(benchmark, "train_segmenter", recorded)
    arguments = {"few": 1, "steps": 1, "seeds": 2, "output": str(tmp_path / "results")}
    usefulness(real, **arguments)
    assert trained_on == 2 * [[1], [3]]
    capsys.readouterr()
    usefulness(real, made, made, **arguments)
    assert trained_on[4:] == 2 * [[4], [1, 4]]  # those of the first rows are there
    header, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert "bone" in header
    assert [row[0] for row in rows] == ["| 1 real", "| 3 real", "| 4 generated", "| 1 real and 4 generated"]
    for row in rows:
        first, second = map(float, row[2].split(", "))
        assert 0 <= first <= 1 and float(row[1].strip("*")) == pytest.approx((first + second) / 2, abs=0.001)
