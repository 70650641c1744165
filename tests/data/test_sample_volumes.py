"""The sample volumes and the demonstration heads, which need no download."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric

from scripts.data import sample_volumes
from scripts.data.synthetic_heads import synthesise_head, synthesise_similar_head, t1_template, tissue_maps


@pytest.fixture(scope="module")
def tissues() -> torch.Tensor:
    return tissue_maps()


@pytest.fixture(scope="module")
def demonstration(tissues, tmp_path_factory) -> Path:
    """Four heads for training, four for validation."""
    folder = tmp_path_factory.mktemp("data") / "heads"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_volumes, "NUM_HELD_OUT_HEADS", 4)
        patch.setattr(sample_volumes, "tissue_maps", lambda: tissues)
        assert sample_volumes.prepare_demonstration_heads(str(folder), num_training=4) == str(folder)
    return folder


def heads_of(folder: Path) -> dict[str, list[tuple[str, np.ndarray]]]:
    lists = json.loads((folder / "dataset.json").read_text())
    return {
        part: [(item["skull"], np.asarray(nib.load(folder / item["image"]).dataobj)) for item in lists[part]]
        for part in ("training", "validation")
    }


def test_sample_volumes_are_complete_and_made_once(tissues, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_volumes, "NUM_TRAINING_VOLUMES", 1)
    monkeypatch.setattr(sample_volumes, "tissue_maps", lambda: tissues)
    monkeypatch.setattr(sample_volumes, "synthesise_head", lambda tissues, seed: 255 * tissues[0].numpy())
    folder = tmp_path / "data" / "sample"
    assert sample_volumes.prepare_sample_volumes(str(folder)) == str(folder)
    lists = json.loads((folder / "dataset.json").read_text())
    paths = [folder / item["image"] for name in ("training", "validation") for item in lists[name]]
    head, template = (nib.load(path) for path in paths)
    assert head.shape == template.shape == (197, 233, 189)
    assert np.unique(np.asarray(head.dataobj)).size > 50
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["sample"]  # nothing unfinished stays

    monkeypatch.setattr(sample_volumes, "synthesise_head", lambda *_: 1 / 0)
    sample_volumes.prepare_sample_volumes(str(folder))  # does not make them again


@pytest.mark.parametrize(
    "prepare, synthesise",
    [
        (sample_volumes.prepare_sample_volumes, "synthesise_head"),
        (sample_volumes.prepare_demonstration_heads, "synthesise_similar_head"),
    ],
)
def test_interrupted_preparation_is_not_taken_for_whole(prepare, synthesise, tissues, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_volumes, "tissue_maps", lambda: tissues)
    monkeypatch.setattr(sample_volumes, synthesise, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tmp_path / "sample"))
    assert not (tmp_path / "sample").exists()


def test_training_volumes_differ_and_come_out_the_same_again(tissues):
    heads = [synthesise_head(tissues[:, 60:90, 100:130, 80:110], seed) for seed in (0, 1, 0)]
    assert heads[0].shape == (30, 30, 30) and np.unique(heads[0].astype(np.uint8)).size > 50
    assert np.array_equal(heads[0], heads[2])
    assert abs(heads[0] - heads[1]).mean() > 10


def test_demonstration_heads_are_made_once(demonstration, monkeypatch):
    assert [path.name for path in demonstration.parent.iterdir()] == ["heads"]
    assert sorted(path.name for path in demonstration.iterdir()) == ["dataset.json", "training", "validation"]
    monkeypatch.setattr(sample_volumes, "synthesise_similar_head", lambda *_: 1 / 0)
    for number in (4, None):
        sample_volumes.prepare_demonstration_heads(str(demonstration), num_training=number)
    with pytest.raises(ValueError, match="holds 4 training heads, not 5; name another"):
        sample_volumes.prepare_demonstration_heads(str(demonstration), num_training=5)


def test_label_maps_show_the_tissues_of_their_heads(demonstration):
    """The tissues of a T1-weighted head: white matter is brighter than grey, and both than CSF, skull and background."""
    lists = json.loads((demonstration / "dataset.json").read_text())
    assert list(lists["labels"].values())[:3] == ["background", "grey matter", "white matter"]
    for item in [*lists["training"], *lists["validation"]]:
        head, label = (nib.load(demonstration / item[key]) for key in ("image", "label"))
        assert np.array_equal(head.affine, label.affine) and label.get_data_dtype() == np.uint8
        values, labels = (np.asarray(volume.dataobj) for volume in (head, label))
        whole = item["skull"] == "whole"
        assert np.unique(labels).tolist() == list(range(7 if whole else 4))
        background, grey, white, inner_csf, *others = (values[labels == each].mean() for each in np.unique(labels))
        assert background < inner_csf < grey < white and background < 10
        if whole:
            outer_csf, skull, scalp = others
            assert max(outer_csf, skull) < min(grey, scalp)
        means = np.array([background, grey, white, inner_csf, *others])
        assert (values - means[labels]).var() < 0.1 * values.var()


def test_more_training_heads_leave_the_others_as_they_are(demonstration, tissues, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_volumes, "NUM_HELD_OUT_HEADS", 4)
    monkeypatch.setattr(sample_volumes, "tissue_maps", lambda: tissues)
    more = Path(sample_volumes.prepare_demonstration_heads(str(tmp_path / "more"), num_training=5))
    for part, heads in heads_of(demonstration).items():
        for (skull, head), (same_skull, same_head) in zip(heads, heads_of(more)[part]):
            assert skull == same_skull and np.array_equal(head, same_head)


def test_half_of_the_demonstration_heads_are_stripped_as_the_lists_say(demonstration, tissues):
    """Whole heads reach further than brains: they fill more of the volume."""
    for heads in heads_of(demonstration).values():
        filled = {skull: [(head > 10).mean() for word, head in heads if word == skull] for skull in ("whole", "stripped")}
        assert [len(shares) for shares in filled.values()] == [2, 2]
        assert min(filled["whole"]) > 1.3 * max(filled["stripped"])


def test_demonstration_heads_differ_in_anatomy_and_lie_within_the_volume(demonstration):
    """Also those for validation from those for training. Two heads of the same kind are compared."""
    similarity = MultiScaleSSIMMetric(spatial_dims=3, data_range=255, kernel_size=3, kernel_sigma=0.5)
    heads = [torch.from_numpy(head).float()[None, None] for part in heads_of(demonstration).values() for _, head in part]
    for kind in (heads[0::2], heads[1::2]):
        for i, first in enumerate(kind):
            assert first.shape == (1, 1, 64, 80, 64)
            assert max(first[..., side, :, :].max() for side in (0, -1)) < 0.5 * first.max()
            for second in kind[:i]:
                assert similarity(first, second).item() < 0.9  # of a copy: 1


def test_demonstration_heads_come_out_the_same_again(tissues):
    shrunk = torch.nn.functional.avg_pool3d(tissues, 8)
    (first, _), (again, _), (other, _) = (synthesise_similar_head(shrunk, seed, False, (32, 32, 32)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert abs(first - other).mean() > 5


def test_demonstration_heads_lie_where_the_template_lies(demonstration):
    head = nib.load(demonstration / "training" / "head_000.nii.gz")
    template = t1_template()
    assert head.header.get_zooms() == (3, 3, 3)
    middles = [image.affine @ np.append((np.array(image.shape) - 1) / 2, 1) for image in (head, template)]
    assert abs(middles[0] - middles[1]).max() <= 1  # mm: an odd voxel was left out
