"""Training with the overlay synthetic_patches.json, on files and on synthetic patches at once."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from tests.conftest import ROOT, save_volume
from tests.training.test_resume import kill_at, same
from tests.training_run import final_state, log_of, train

CONFIGS = [str(ROOT / "configs" / name) for name in ("train.json", "synthetic_patches.json")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Volumes of heads, and clinical ones."""
    made = {}
    for number, name in enumerate(("heads", "clinical")):
        made[name] = tmp_path_factory.mktemp(name)
        for i, shape in enumerate([(18, 20, 24), (24, 16, 9)]):
            save_volume(made[name] / f"sub-{i}" / f"{name}{i}.nii.gz", shape, seed=10 * number + i)
    return made


def train_mixed(folders: dict[str, Path], output_dir: Path, prepare=None, **keys) -> int:
    few = {"repeats": 1, "further_repeats": 2, "head_patches": 1, "procedural_volumes": 1}
    sizes = {"patch_size": [24, 16, 16], "file_patch_size": [16, 16, 16], "epochs": 2, "val_interval": 2, "adv_weight": 0.0}
    clinical = {"further_dir": str(folders["clinical"]), "val_fraction": 0.5}
    overlays = ["synthetic_patches.json"]
    return train(folders["heads"], output_dir, prepare, overlays=overlays, **few, **sizes, **clinical, **keys)


def test_training_repeats_to_the_last_bit_also_when_it_is_killed_and_resumed(folders, tmp_path):
    assert train_mixed(folders, tmp_path / "whole", num_workers=0) == 0, log_of(tmp_path / "whole")
    expected = final_state(tmp_path / "whole")
    assert expected["trainer"] == {"iteration": 10, "epoch": 2, "epoch_length": 5}
    assert train_mixed(folders, tmp_path / "killed", partial(kill_at, 7)) == -signal.SIGKILL
    assert train_mixed(folders, tmp_path / "killed", resume=True) == 0, log_of(tmp_path / "killed")
    assert same(final_state(tmp_path / "killed")["network"], expected["network"])


def test_what_is_left_out_and_what_is_held_out_is_not_trained_on(folders):
    parser = ConfigParser()
    parser.read_config(CONFIGS)
    keys = {"dataset_dir": str(folders["heads"]), "further_dir": str(folders["clinical"]), "val_fraction": 0.5}
    parser.update({**keys, "left_out": ["clinical"], "repeats": 3})
    lists = parser.get_parsed_content("data#lists")
    trained, held_out = ([Path(item["image"]).name for item in lists[name]] for name in ("training", "validation"))
    assert len(trained) == 3 and {name[:5] for name in trained} == {"heads"}
    assert sorted(name[:5] for name in held_out) == ["clini", "heads"]
    assert not set(trained) & set(held_out)
