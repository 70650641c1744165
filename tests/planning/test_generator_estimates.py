"""The planner speaks of the generator: its counts on fake tensors are those of a real step."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.__main__ import main
from scripts.data.latents import read_description
from scripts.planning.allocations import nbytes_of
from scripts.planning.generator_estimates import estimate_generator, plan_generator
from tests.conftest import ROOT
from tests.diffusion.runs import encode, make_weights
from tests.planning.real_steps import saved_in_a_generator_step

CONFIG = str(ROOT / "configs" / "train_diffusion.json")
PRESET = str(ROOT / "configs" / "presets" / "16x.json")
SMALL = {"channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8}


@pytest.mark.parametrize("prediction, amp, batch_size", [("gain", True, 1), ("v", False, 2)])
def test_saved_activations_are_those_of_a_real_step(prediction, amp, batch_size):
    keys = {**SMALL, "prediction": prediction, "amp": amp, "amp_dtype": "bfloat16", "batch_size": batch_size}
    plan = plan_generator(CONFIG, 64, PRESET, device="cpu", **keys)
    counted = saved_in_a_generator_step(plan)
    assert estimate_generator(plan, "cpu").costs["training"].saved_activations == pytest.approx(counted, rel=0.02)


def test_average_optimizer_and_the_network_beside_the_decoder_are_counted():
    small, wide = (
        estimate_generator(plan_generator(CONFIG, 64, PRESET, **{**SMALL, "channels": channels}))
        for channels in ([8, 16], [64, 128])
    )
    network = plan_generator(CONFIG, 64, PRESET, **{**SMALL, "channels": [64, 128]}).network
    assert wide.costs["training"].parameters == 2 * nbytes_of(network.state_dict())
    assert wide.costs["training"].optimizer_state >= 2 * wide.costs["training"].gradients
    more = (wide.parameters - small.parameters) * 4
    assert wide.costs["decoding"].peak - small.costs["decoding"].peak == pytest.approx(more, rel=0.05)


def test_512_at_16x_trains_a_network_of_150_million_within_5_gib():
    before = torch.random.get_rng_state()
    found = estimate_generator(plan_generator(CONFIG, 512, PRESET, channels=[192, 384, 544]))
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing is computed
    assert found.latent_shape == (64, 32, 32, 32)
    assert 150e6 <= found.parameters <= 200e6
    assert found.costs["training"].needed <= 5 * 2**30


def test_latents_in_the_folder_tell_size_and_autoencoder(volumes, tmp_path):
    weights = make_weights(tmp_path / "autoencoder")
    latents = encode(volumes, tmp_path / "latents", weights)
    descriptions = [read_description(path) for path in latents.rglob("*_latent.nii.gz")]
    plan = plan_generator(CONFIG, dataset_dir=str(latents), **SMALL)
    assert plan.spatial_size == tuple(max(n) for n in zip(*(each.preprocessed_shape for each in descriptions)))
    assert plan.autoencoder.arguments == {**plan.autoencoder.arguments, **descriptions[0].network}


def test_command_line_prints_the_estimate(capsys):
    request = ["estimate", "--config_file", CONFIG, "--spatial_size", "64", "--autoencoder", PRESET, "--channels", "[16,32]"]
    main([*request, "--memory_gb", "8"])
    text = capsys.readouterr().out
    assert "latent 64 channels x 4x4x4" in text and "training fits into 8 GiB" in text
    assert "decoding fits into 8 GiB in one pass" in text


def test_recommendation_lists_the_memory_of_the_generator(capsys):
    main(["recommend", "--spatial_size", "64", "--memory_gb", "4", "--count", "1", "--channels", "[4,8,8]", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["generator"]["latent_shape"] == found["estimate"]["latent_shape"]


@pytest.mark.parametrize(
    "request_, words",
    [
        (["--config_file", CONFIG, "--dataset_dir", "nowhere"], "An estimate before `encoding` needs `spatial_size`"),
        (["--config_file", CONFIG, "--autoencoder", PRESET], "set `spatial_size` too"),
        (["--config_file", CONFIG, "--spatial_size", "64", "--volume_size", "64"], "`volume_size` is for an autoencoder"),
        (["--autoencoder", PRESET], "`autoencoder` is for the config of a generator"),
        (["--config_file", CONFIG, "--spatial_size", "64", "--batch_size", "0"], "`batch_size`"),
    ],
)
def test_bad_request_gets_one_line(capsys, request_, words):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", *request_])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "\n" not in line
