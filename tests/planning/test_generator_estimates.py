"""The planner speaks of the generator: its counts on fake tensors are those of a real step."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.__main__ import main
from scripts.data.latents import read_description
from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.training_data import latent_lists
from scripts.planning.fake_tensors import nbytes_of
from scripts.planning.generator_estimates import estimate_generator, plan_generator
from scripts.planning.inference_costs import inference_cost
from tests.conftest import ROOT
from tests.diffusion.runs import encode, make_weights
from tests.planning.real_steps import saved_in_a_generator_step

CONFIG = str(ROOT / "configs" / "train_diffusion.json")
PRESET = str(ROOT / "configs" / "presets" / "16x.json")
SMALL = {"channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8}
SIZED = ["--config_file", CONFIG, "--spatial_size", "64"]
SPATIAL = {"spatial_keys": ["label", "t2"], "num_classes": 132}


@pytest.mark.parametrize("prediction, amp, batch_size, spatial", [("gain", True, 1, SPATIAL), ("v", False, 2, {})])
def test_saved_activations_are_those_of_a_real_step(prediction, amp, batch_size, spatial):
    keys = {**SMALL, "prediction": prediction, "amp": amp, "amp_dtype": "bfloat16", "batch_size": batch_size, **spatial}
    plan = plan_generator(CONFIG, 64, PRESET, device="cpu", **keys)
    counted = saved_in_a_generator_step(plan)
    assert estimate_generator(plan).costs["training"].saved_activations == pytest.approx(counted, rel=0.02)


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


def test_spatial_conditions_add_their_channels_to_training_and_sampling_and_are_encoded_a_plane_at_a_time():
    without, found = (plan_generator(CONFIG, 64, PRESET, amp=False, **SMALL, **spatial) for spatial in ({}, SPATIAL))
    channels = found.network.arguments["spatial_channels"]
    assert channels == (8 + 1) * 64 + 2  # 132 classes are 8 planes of bits, the image is one, and each has a channel
    before, after = estimate_generator(without).costs, estimate_generator(found).costs
    twice = 2 * channels * 4**3 * 4  # inputs of two convolutions in training; given and left out in sampling
    assert after["training"].saved_activations - before["training"].saved_activations == twice
    weights = nbytes_of(found.network.state_dict()) - nbytes_of(without.network.state_dict())
    assert twice <= after["sampling"].peak - before["sampling"].peak - weights <= 3 * twice
    plane = inference_cost(found.autoencoder, [64] * 3, amp_dtype=None, operation="encode", others=[found.network])
    assert "encoding" not in before and after["encoding"].in_slabs and after["encoding"].peak == plane.peak


def test_512_at_16x_with_132_classes_trains_a_network_of_150_million_within_6_gib():
    before = torch.random.get_rng_state()
    keys = {"spatial_keys": ["label"], "num_classes": 132}
    found = estimate_generator(plan_generator(CONFIG, 512, PRESET, channels=[192, 384, 544], **keys))
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing is computed
    assert found.latent_shape == (64, 32, 32, 32)
    assert 150e6 <= found.parameters <= 200e6
    assert found.costs["training"].needed <= 6 * 2**30


def test_latents_in_the_folder_tell_size_autoencoder_and_spatial_conditions(volumes, tmp_path):
    for image in volumes.rglob("*_T1w.nii.gz"):
        shape = nib.load(image).shape
        labels = (np.arange(np.prod(shape)) % 21).reshape(shape).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, nib.load(image).affine), str(image).replace("_T1w", "_label"))
    weights = make_weights(tmp_path / "autoencoder")
    latents = encode(volumes, tmp_path / "latents", weights, spatial_keys=["label"])
    plan = plan_generator(CONFIG, dataset_dir=str(latents), spatial_keys=["label"], **SMALL)
    training = [read_description(Path(item["image"])) for item in latent_lists(str(latents), 0.1, 0)["training"]]
    assert plan.volume.size == tuple(max(n) for n in zip(*(each.preprocessed_shape for each in training)))
    assert plan.autoencoder.arguments == {**plan.autoencoder.arguments, **training[0].network}
    assert plan.statistics.spatial == {"label": SpatialKind(tuple(range(1, 21)))}
    assert plan.network.arguments["spatial_channels"] == 5 * 8 + 1


def test_command_line_prints_the_estimate(capsys):
    request = ["estimate", *SIZED, "--autoencoder", PRESET, "--channels", "[16,32]"]
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
        (["--config_file", CONFIG, "--dataset_dir", "nowhere"], "`dataset_dir` is 'nowhere'"),
        (["--config_file", CONFIG, "--autoencoder", PRESET], "need `spatial_size`"),
        (["--config_file", CONFIG, "--num_classes", "4"], "need `spatial_size`"),
        ([*SIZED, "--spatial_keys", "['label']"], "label map 'label' needs a number of classes"),
        ([*SIZED, "--num_classes", "4"], "`spatial_keys` is [] and `num_classes` is 4"),
        ([*SIZED, "--batch_size", "0"], "`batch_size`"),
    ],
)
def test_bad_request_gets_one_line(capsys, request_, words):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", *request_])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "\n" not in line
