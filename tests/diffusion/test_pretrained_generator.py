"""Training of a generator that starts from the weights of another run, on other volumes and with other conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.bundle.errors import reason
from scripts.bundle.weights import save_weights
from scripts.diffusion.conditions import Conditions, Volume
from scripts.diffusion.generator import describe, load_generator, load_pretrained_generator
from tests.conftest import save_volume
from tests.diffusion.runs import KEYS, encode, leave_start, make_weights, workflow

SPACING = (1.0, 1.0, 2.0)


def volumes(folder: Path, sizes: list[int], table: list[str]) -> Path:
    for i, size in enumerate(sizes):
        save_volume(folder / f"sub-{i}" / "T1w.nii.gz", (size, 18, 12), i + size, np.diag([*SPACING, 1.0]))
    (folder / "participants.tsv").write_text("\n".join(table))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Latents of a run, latents of other volumes with other conditions, and the generator of the run."""
    folder = tmp_path_factory.mktemp("runs")
    weights = make_weights(folder / "autoencoder")
    rows = ["participant_id\tage\tsex", *(f"sub-{i}\t{20 + 5 * i}\t{'FM'[i % 2]}" for i in range(4))]
    encode(volumes(folder / "volumes", [14, 16, 14, 16], rows), folder / "latents", weights)
    rows = ["participant_id\tage\tsex\tweight", *(f"sub-{i}\t{22 + 5 * i}\t{'FX'[i % 2]}\t{60 + i}" for i in range(4))]
    encode(volumes(folder / "other_volumes", [15, 15, 17, 15], rows), folder / "other_latents", weights)
    flow = training(folder / "latents", folder / "run", condition_keys=["age", "sex"])
    network, statistics, rectified = (flow.parser.get_parsed_content(name) for name in ("network_def", "statistics", "flow"))
    torch.manual_seed(0)
    leave_start(network)
    save_weights(network, folder / "model.pt", describe(statistics, rectified, 0.1))
    return folder


def training(latents: Path, output_dir: Path, **keys) -> ConfigWorkflow:
    keys = {**KEYS, "epochs": 1, "val_interval": 1, "latent_gamma": 0.5, "device": "cpu", **keys}
    return workflow("train_diffusion.json", "training", "train", dataset_dir=latents, output_dir=output_dir, **keys)


CONDITIONS = {"condition_keys": ["weight", "sex", "age"]}


def test_other_conditions_change_nothing_before_the_first_step(folder, tmp_path, caplog):
    before = load_generator(str(folder / "model.pt"))
    flow = training(folder / "other_latents", tmp_path, **CONDITIONS, latent_gamma=1.0)
    network, statistics = (flow.parser.get_parsed_content(name) for name in ("network_def", "statistics"))
    load_pretrained_generator(network.eval(), str(folder / "model.pt"), statistics)
    assert "`latent_gamma` is 1; " in caplog.text and "that are lost" not in caplog.text
    fewer = training(folder / "other_latents", tmp_path, condition_keys=["weight", "sex"])
    parts = (fewer.parser.get_parsed_content(name) for name in ("network_def", "statistics"))
    load_pretrained_generator(next(parts), str(folder / "model.pt"), next(parts))
    assert "that are lost: age" in caplog.text
    z = torch.randn(1, 8, 8, 8, 8)
    assert torch.equal(statistics.normalised(z), before.statistics.normalised(z))
    x, time = torch.randn(1, 8, 8, 8, 8), torch.tensor([0.3])
    predictions = []
    for known, further in [({"age": 31.0, "sex": "F"}, {"weight": 61}), ({"sex": "F"}, {}), ({"age": 22.0}, {"sex": "X"})]:
        old = before.statistics.conditions.vector(Volume((15, 18, 12), SPACING, known))
        new = statistics.conditions.vector(Volume((15, 18, 12), SPACING, {**known, **further}))
        assert len(new) == len(old) + 2  # the weight, and whether it is known
        with torch.no_grad():
            predictions.append(before.network(x, time, old[None]))
            assert torch.allclose(network(x, time, new[None]), predictions[-1], atol=1e-5, rtol=1e-5)
    assert (predictions[0] - predictions[1]).abs().max() > 1e-3


def test_run_keeps_the_normalisation_and_can_be_trained_further(folder, tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    keys = {"latents": folder / "other_latents", **CONDITIONS}
    flow = training(output_dir=first, pretrained=folder / "model.pt", **keys)
    own_mean = flow.parser.get_parsed_content("statistics").channel_mean
    flow.run()
    before, after = (load_generator(str(path / "model.pt")) for path in (folder, first / "checkpoints"))
    kept = ("latent_gamma", "channel_mean", "channel_deviation", "channel_amplitude")
    assert all(getattr(after.statistics, name) == getattr(before.statistics, name) for name in kept)
    assert torch.equal(after.network.amplitude, before.network.amplitude)
    assert after.statistics.own_mean == own_mean != before.statistics.own_mean
    assert {each.size[0] for each in after.statistics.geometries} <= {15, 17}
    assert list(after.statistics.conditions.keys) == CONDITIONS["condition_keys"]
    again = training(output_dir=second, pretrained=first / "checkpoints" / "model.pt", **keys)
    again.run()
    assert again.evaluator.state.metric_before == pytest.approx(flow.evaluator.state.best_metric, rel=1e-5)


def test_numbers_are_standardised_as_before_where_that_says_something_of_them():
    sizes = [[16, 18, 20], [20, 18, 20]]

    def learned(ages: list[float]) -> Conditions:
        return Conditions.learn(["age"], [Volume(size, [1.0, 1.0, 2.0], {"age": age}) for size, age in zip(sizes, ages)])

    before = learned([20.0, 30.0])
    near, far = (learned(ages).standardised_as(before).keys["age"] for ages in ([30.0, 36.0], [60.0, 80.0]))
    assert (near.mean, near.deviation) == (25, 5) and (near.lowest, near.highest) == (30, 36)
    assert (far.mean, far.deviation) == (70, 10)
    constant = learned([25.0, 25.0])
    assert learned([24.0, 26.0]).standardised_as(constant).keys["age"].deviation == 1


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"channels": [8, 8]}, "another network: `channels` is [8, 16] there and [8, 8] here"),
        ({"prediction": "x"}, "another network: `prediction` is 'gain' there and 'x' here"),
        ({"pretrained": "nowhere/model.pt"}, "there are no weights at nowhere/model.pt"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_differs(folder, tmp_path, keys, words):
    keys = {"condition_keys": ["age"], "pretrained": str(folder / "model.pt"), **keys}
    with pytest.raises(RuntimeError) as error:
        training(folder / "latents", tmp_path, **keys).run()
    assert words in str(reason(error.value))


def test_weights_of_another_autoencoder_are_refused(folder, tmp_path):
    other = encode(folder / "volumes", tmp_path / "latents", make_weights(tmp_path / "autoencoder", seed=1))
    with pytest.raises(RuntimeError) as error:
        training(other, tmp_path, condition_keys=["age", "sex"], pretrained=folder / "model.pt").run()
    assert "is not that of the latents: its SHA-256 begins with" in str(reason(error.value))
