"""The benchmarks, on small volumes: what factors save, and that they measure what they say."""

from __future__ import annotations

import json

import pytest
import torch
from ignite.engine import Engine
from monai.optimizers import WarmupCosineSchedule

from benchmarks.cost import peak, saved_activations
from benchmarks.loop import overhead
from benchmarks.networks import FACTORS, MONAI, build
from benchmarks.quality import ROWS, Budget, linear, read_recipe, result_path, tables, train
from benchmarks.tables import described
from scripts.planning.fake_tensors import fake_tensors
from tests.conftest import save_volume


def test_head_line_names_the_instruction_set_and_the_precision():
    line = described("cpu", "float32")
    assert torch.backends.cpu.get_cpu_capability() in line and line.endswith("float32")


@pytest.fixture(scope="module")
def kept_by_monai() -> int:
    with fake_tensors():  # nothing is computed
        return saved_activations(MONAI, 64, "cpu")


@pytest.mark.parametrize(
    "name, least_saving",
    [("[2,2]", 0.45), ("initial 2, [2,2]", 0.94), ("initial 2, [4,2]", 0.94), ("initial 4, [2,2]", 0.985)],
)
def test_saved_activations_shrink_against_monai(kept_by_monai, name, least_saving):
    with fake_tensors():
        assert 1 - saved_activations(name, 64, "cpu") / kept_by_monai > least_saving


def test_benchmarked_networks_have_the_factors_of_their_names():
    for name in FACTORS:
        levels = [int(f) for f in name[name.index("[") + 1 : -1].split(",")]
        initial = int(name.split()[1].rstrip(",")) if name.startswith("initial") else 1
        assert build(name).total_downsample_factor == (initial * levels[0] * levels[1],) * 3


@pytest.mark.parametrize("memory_gb", [None, 1e-4])
def test_peak_of_inference_is_measured_in_one_pass_and_in_slabs(memory_gb):
    assert 0 <= peak("initial 2, [2,2]", 32, memory_gb=memory_gb) < 2**30


def test_overhead_of_the_training_loop_is_measured_on_equal_steps(capsys):
    """A bound that holds on a busy machine; `make bench` prints the number."""
    assert -0.5 < overhead(epochs=2, patch_size=16, channels=[16, 16, 16], latent_channels=8, fit_shortcut=False) < 0.5
    assert "(7 pairs)" in capsys.readouterr().out


def test_learning_rate_warms_up_from_the_first_step_however_long_the_preparation_took(monkeypatch):
    """A first step of Adam at half the learning rate lost 5 dB."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    WarmupCosineSchedule(optimizer, warmup_steps=5, t_total=100)  # as in train.json; it sets the rate to 0
    seconds = iter([0.0, *(30.0 + i for i in range(100))])  # half a minute before the first step, then a second each
    monkeypatch.setattr(Budget, "now", lambda self: next(seconds))
    rates = []
    engine = Engine(lambda engine, batch: rates.append(optimizer.param_groups[0]["lr"]))
    engine.optimizer = optimizer
    Budget(100.0, "cpu").attach(engine)
    engine.run([0] * 200)
    assert rates[:3] == pytest.approx([0.0, 0.390, 0.768], abs=0.01)
    assert max(rates) < 0.8 and rates[-1] == pytest.approx(0.0, abs=0.01)
    assert len(rates) == 70  # until the hundredth second


def test_each_fit_of_the_linear_shortcut_wins_on_volumes_that_it_did_not_see(tmp_path):
    for i in range(4):
        save_volume(tmp_path / f"sub-{i}" / "t1.nii.gz", (48, 40, 44), seed=i)
    found = linear("8x", "sample", dataset_dir=str(tmp_path), patch_size=[32, 32, 32], val_fraction=0.25)
    lowest, components, neighbours = (
        sum(found[name].values()) for name in ("lowest frequencies", "principal components", "and neighbours")
    )
    assert all(len(by_volume) == 1 for by_volume in found.values())
    assert lowest < components < neighbours


def test_row_of_a_network_of_monai_is_trained_and_printed(tmp_path, monkeypatch, capsys):
    for i in range(3):
        save_volume(tmp_path / f"sub-{i}" / "t1.nii.gz", (20, 18, 17), seed=i)
    monkeypatch.chdir(tmp_path)
    small = {"channels": [4, 8, 8], "norm_num_groups": 4, "patch_size": [16, 16, 16], "val_fraction": 0.34, "amp": False}
    train("MONAI", minutes=0.01, dataset_dir=str(tmp_path), **small)
    tables()
    assert "| MONAI | 0.01 |" in capsys.readouterr().out


def test_keys_of_a_benchmark_are_checked_as_those_of_a_run(tmp_path):
    save_volume(tmp_path / "t1.nii.gz", (16, 16, 16))
    plain = read_recipe("8x", "sample", dataset_dir=str(tmp_path), linear_shortcut="false")
    assert plain.get_parsed_content("network_def").shortcut is None
    with pytest.raises(ValueError, match="latent_chanels.*latent_channels"):
        read_recipe("8x", "sample", latent_chanels=8)


def test_rows_of_quality_are_what_their_names_say_and_overwrite_none():
    rows = json.loads(ROWS.read_text())
    assert len({result_path(row) for row in rows}) == len(rows)
    for row in rows:
        name = row.get("name", row["network"])
        overrides = {key: value for key, value in row.items() if key not in ("network", "data", "name", "minutes")}
        config = read_recipe(row["network"], row["data"], **overrides).config  # checks the keys
        if "[" in name:
            levels = [int(f) for f in name[name.index("[") + 1 : -1].split(",")]
            initial = int(name.split()[1]) if name.startswith("initial") else 1
            assert (config["initial_downsample_factor"], config["downsample_factors"]) == (initial, levels)
            assert config["initial_mode"] == "conv" and not config["linear_shortcut"]
