"""The planner: its counts on fake tensors are those of a real step."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time

import pytest
import torch
from monai.networks.nets import PatchDiscriminator

from benchmarks.cost import peak_bytes, restart_peak
from benchmarks.networks import MONAI, build
from scripts.__main__ import main
from scripts.bundle.machine import GIB
from scripts.layers.factors import per_axis
from scripts.planning.autoencoder_estimates import TRAIN, estimate_memory, read_plan
from scripts.planning.inference_costs import inference_cost
from scripts.planning.recommendations import recommend_downsample_factors
from scripts.planning.self_test import check_all, check_configuration, configurations
from scripts.planning.tables import verdict
from scripts.planning.training_costs import log_estimate, training_cost
from scripts.training.losses import Adversary, LossTerm, SpectralLoss
from scripts.training.trainer import AutoencoderTrainer
from tests.conftest import ROOT, SMALL
from tests.planning.real_steps import saved_in_a_step
from tests.processes import bundle_run

NARROW = {"channels": (4, 8, 8), "norm_num_groups": 4}  # so narrow that slow bfloat16 does not matter
TINY = {"channels": [4, 8, 8], "latent_channels": 8}


def on_meta(name: str, **arguments) -> torch.nn.Module:
    with torch.device("meta"):
        return build(name, **arguments)


@pytest.mark.parametrize(
    "name, batch_size, amp, arguments",
    [
        (MONAI, 1, True, NARROW),
        ("initial 2 (conv), [4,2]", 1, True, {**NARROW, "use_checkpoint": True}),
        ("initial 2, [2,2]", 1, True, {**NARROW, "attention_levels": (False, False, True), "use_flash_attention": True}),
        ("initial 2, [2,2]", 3, False, {"linear_shortcut": True}),
    ],
)
def test_saved_activations_are_those_of_a_real_step(name, batch_size, amp, arguments):
    network = build(name, **arguments)
    amp_dtype = torch.bfloat16 if amp else None
    estimate = training_cost(network, (32,) * 3, batch_size=batch_size, amp_dtype=amp_dtype, device="cpu")
    assert estimate.saved_activations == pytest.approx(saved_in_a_step(network, (32,) * 3, batch_size, amp_dtype), rel=0.02)
    assert sum(estimate.levels.values()) == estimate.saved_activations


def test_parts_of_the_estimate_are_exact_where_they_can_be_counted_by_hand():
    network = on_meta("initial 2, [2,2]")
    parameters = sum(4 * p.numel() for p in network.parameters())
    estimate = training_cost(network, (64,) * 3)
    assert estimate.parameters == estimate.gradients == parameters
    assert 2 * parameters <= estimate.optimizer_state <= 2 * parameters + 4 * len(list(network.parameters()))
    assert estimate.peak > estimate.saved_activations + 3 * parameters
    edges = [*(("encoder", n) for n in (64, 32, 16, 8)), *(("decoder", n) for n in (8, 16, 32, 64))]
    assert list(estimate.levels) == [*(f"{part} {n}x{n}x{n}" for part, n in edges), "other"]


def test_pytorch_still_has_the_private_parts_that_the_planner_needs():
    layer = torch.nn.Linear(1000, 500, bias=False)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.layer = torch.nn.Module(), layer
            self.encoder.in_channels = 1

        def reconstruct(self, x):
            return self.layer(x)

    cost = inference_cost(Net(), (1000,), batch_size=10, amp_dtype=None)
    image, result, weight = 40_000, 20_000, 2_000_000
    counted = (cost.parameters, cost.flops, cost.peak)
    expected = (weight, 2 * 10 * 1000 * 500, pytest.approx(weight + image + result, abs=3 * 512))
    assert counted == expected, "an upgrade of PyTorch changed FakeTensorMode, TorchDispatchMode or flop_registry"


def test_cuda_keeps_norms_of_plain_modules_in_float32_and_those_of_this_network_not():
    size = (64,) * 3
    plain, lean = ([training_cost(on_meta(n), size, device=d) for d in ("cuda", "cpu")] for n in (MONAI, "[2,2]"))
    assert plain[0].saved_activations > 1.4 * plain[1].saved_activations
    assert lean[0].saved_activations == lean[1].saved_activations


def test_checkpointing_saves_activations_and_costs_operations():
    kept, recomputed = (training_cost(on_meta("[2,2]", use_checkpoint=c), (64,) * 3) for c in (False, True))
    assert recomputed.saved_activations < 0.1 * kept.saved_activations
    assert recomputed.peak < kept.peak
    assert recomputed.flops > 1.2 * kept.flops


def test_estimate_leaves_the_network_as_it_is():
    network = on_meta("initial 4, [2,2]").to_empty(device="cpu").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training_cost(network, (32,) * 3)
    assert not network.training and not network.encoder.blocks[0]._forward_hooks
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in network.state_dict().items())


def test_adversarial_training_costs_a_discriminator():
    with torch.device("meta"):
        discriminator = PatchDiscriminator(spatial_dims=3, channels=16, in_channels=1, num_layers_d=2)
    plain, adversarial = (
        training_cost(on_meta("initial 2, [2,2]"), (32,) * 3, discriminator=d) for d in (None, discriminator)
    )
    weights = sum(4 * p.numel() for p in discriminator.parameters())
    assert adversarial.parameters >= plain.parameters + weights
    assert adversarial.gradients == plain.gradients + weights
    assert adversarial.saved_activations > plain.saved_activations


def test_saved_activations_of_adversary_and_further_losses_are_those_of_a_real_step():
    network = build("initial 4, [2,2]")
    discriminator = PatchDiscriminator(spatial_dims=3, channels=8, in_channels=1, num_layers_d=2)
    terms = {"spectral_loss": LossTerm(0.1, SpectralLoss(spatial_dims=3))}
    shared = {"amp_dtype": None, "device": "cpu"}
    estimate = training_cost(network, (32,) * 3, loss_terms=terms, discriminator=discriminator, **shared)
    adversary = Adversary(discriminator, torch.optim.AdamW, num_steps=2, weight=1.0, warmup_epochs=0)
    counted = saved_in_a_step(network, (32,) * 3, 1, None, loss_terms=terms, adversary=adversary)
    assert estimate.saved_activations == pytest.approx(counted, rel=0.02)
    assert estimate.saved_activations > 1.2 * training_cost(network, (32,) * 3, **shared).saved_activations


def test_average_of_the_weights_is_counted():
    plain, averaged = (training_cost(on_meta("initial 4, [2,2]"), (32,) * 3, averaged=a) for a in (False, True))
    assert averaged.parameters == 2 * plain.parameters
    assert averaged.peak >= plain.peak + plain.parameters


def test_accumulated_gradients_are_there_during_the_step():
    plain, accumulating = (training_cost(on_meta("initial 2, [2,2]"), (64,) * 3, accumulation_steps=n) for n in (1, 4))
    assert accumulating.peak > plain.peak + 0.5 * plain.gradients


def test_optimizer_makes_its_temporaries_for_all_parameters_at_once_on_cuda_only():
    tiny_volume = (16,) * 3  # so small that the optimizer needs most
    cuda, cpu = (training_cost(on_meta("initial 4, [2,2]"), tiny_volume, device=d) for d in ("cuda", "cpu"))
    assert cuda.peak > cpu.peak


def test_volume_of_512_takes_seconds_and_hardly_any_memory():
    start, before = time.process_time(), restart_peak()
    estimate = estimate_memory(512)
    assert estimate.costs["training"].peak > 10 * GIB
    assert time.process_time() - start < 5
    assert peak_bytes("cpu") - before < GIB


def test_estimate_follows_config_overlay_and_arguments(tmp_path):
    overlay = tmp_path / "overlay.json"
    overlay.write_text(
        json.dumps({"initial_downsample_factor": [2, 2, 1], "latent_channels": 12, "patch_size": [32, 32, 16]})
    )
    estimate = estimate_memory(
        channels=[4, 8, 8], downsample_factors=[4, 2], batch_size=2, config_file=[TRAIN, str(overlay)]
    )
    assert estimate.downsample_factor == (16, 16, 8)
    assert estimate.spatial_size == (32, 32, 16)
    assert estimate.latent_shape == (12, 2, 2, 2)
    assert estimate.voxels_per_latent == pytest.approx(16 * 16 * 8 / 12)
    assert estimate.batch_size == 2


def test_inference_config_has_no_training():
    estimate = estimate_memory(20, config_file=str(ROOT / "configs" / "inference.json"))
    assert list(estimate.costs) == ["reconstruction"]
    assert estimate.costs["reconstruction"].peak > estimate.costs["reconstruction"].parameters
    assert estimate.latent_shape == (24, 3, 3, 3)


def test_recommendations_keep_what_they_promise(tmp_path):
    found = recommend_downsample_factors([64, 64, 16], 8, 4, spacing=[1, 1, 3.2], count=2, **TINY)
    assert found and [r.score for r in found] == sorted(r.score for r in found)
    for recommendation in found:
        overlay, estimate = recommendation.overlay, recommendation.estimate
        factors = [overlay["initial_downsample_factor"], *overlay["downsample_factors"]]
        initial, *levels = (per_axis("factor", factor, 3) for factor in factors)
        assert max(initial) <= 4 and all(math.log2(n).is_integer() for factor in (initial, *levels) for n in factor)
        assert all(n % factor == 0 for n, factor in zip(overlay["patch_size"], estimate.downsample_factor))
        assert recommendation.estimate.fits(4)
        (tmp_path / "overlay.json").write_text(json.dumps(recommendation.overlay))
        again = estimate_memory(config_file=[TRAIN, str(tmp_path / "overlay.json")])
        assert again == recommendation.estimate
    assert max(found[0].latent_spacing) / min(found[0].latent_spacing) < 1.3
    assert max(found[0].estimate.latent_shape[1:]) == 8
    assert found[0].overlay["channels"] == [4, 8, 8]


def test_recommendation_says_to_what_size_to_pad():
    best = recommend_downsample_factors([60, 64, 64], 8, count=1, **TINY)[0]
    assert "pad to 64x64x64" in best.reason
    assert best.overlay["patch_size"] == [64, 64, 64]


def test_voxels_per_latent_set_the_latent_channels():
    best = recommend_downsample_factors(64, 8, voxels_per_latent=64, count=1, channels=[4, 8, 8])[0]
    assert best.estimate.voxels_per_latent == 64
    assert best.overlay["latent_channels"] == 8


def test_request_that_nothing_fits_names_what_would_save_memory():
    keys = ["--channels", "[4,8]", "--downsample_factors", "[2]", "--latent_channels", "8"]
    with pytest.raises(SystemExit) as exit_:
        main(["recommend", "--spatial_size", "48", "--memory_gb", "0.6", *keys])  # a message, so the exit code is 1
    assert "nothing fits, not even with initial_downsample_factor" in exit_.value.code
    assert "training does not fit into 0.6 GiB" in exit_.value.code
    assert re.search(r"with --patch_size \[[0-9,]*\]: .* which does not fit", exit_.value.code)


def test_verdict_says_what_does_not_fit():
    assert "training does not fit into 0.1 GiB" in verdict(estimate_memory(16, **TINY), 0.1, {})


def test_verdict_names_changes_that_are_enough(capsys):
    main(["estimate", "--spatial_size", "128", "--batch_size", "4", "--memory_gb", "1.4"])
    printed = capsys.readouterr().out
    assert "training does not fit into 1.4 GiB" in printed
    assert re.search("with --batch_size 1 --gradient_accumulation_steps 4: .* which fits", printed)


def test_a_network_that_infers_is_not_to_be_changed_but_to_run_in_slabs(capsys):
    infers = ["estimate", "--config_file", "configs/inference.json", "--channels", "[4,8,8]", "--spatial_size", "64"]
    main([*infers, "--memory_gb", "0.1"])
    printed = capsys.readouterr().out
    assert "reconstruction does not fit into 0.1 GiB in one pass" in printed and "with less it works in slabs" in printed
    assert "initial_downsample_factor [" not in printed
    main([*infers, "--memory_gb", "8"])
    assert "fits into 8 GiB in one pass" in (printed := capsys.readouterr().out) and "works in slabs" not in printed


def test_json_holds_the_estimate(capsys):
    main(["estimate", "--spatial_size", "32", "--channels", "[4,8,8]", "--memory_gb", "8", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] is True
    assert printed["latent_shape"] == [24, 4, 4, 4]
    assert printed["costs"]["training"]["peak"] < printed["costs"]["training"]["needed"]


@pytest.mark.parametrize(
    "request_, words",
    [
        ("estimate --spatial_size [0,64,64]", "`spatial_size` is [0, 64, 64]"),
        ("estimate --spatial_size [64,64]", "`spatial_size` has 2 values"),
        ("estimate --memory_gb -3", "`memory_gb` is -3"),
        ("recommend --spatial_size 64 --memory_gb -1", "`memory_gb` is -1"),
        ("recommend --spatial_size 64 --spacing [1,0,1]", "`spacing[1]` is 0"),
        ("estimate --config_file nowhere.json", "nowhere.json"),
        ("estimate --config_file configs/presets/16x.json", "has no `network_def`"),
        ("estimate --network_def#_target_ monai.networks.nets.UNet", "is UNet"),
        ("estimate --chanels [4,8]", "no config key 'chanels'"),
        ("estimate --channels [4,8]", "need 1, one between two levels"),
        ("estimate --batch_size 1.5", "`batch_size` is 1.5"),
        ("estimate --channels 8", "`channels` is 8; it must be a list"),
        ("estimate --device tpu", "`device` is 'tpu'"),
    ],
)
def test_bad_request_gets_one_line_and_exit_code_2(capsys, request_, words):
    with pytest.raises(SystemExit) as exit_:
        main(request_.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "command, words", [("check", "every preset"), ("estimate", "--memory_gb"), ("recommend", "--spacing")]
)
def test_every_command_has_a_help(capsys, command, words):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr()
    assert words in printed.out + printed.err


def test_default_and_every_preset_are_checked():
    default, *others = configurations()
    assert default == ["configs/train.json"]
    assert {preset for _, preset in others} == {
        f"configs/presets/{path.name}" for path in ROOT.glob("configs/presets/*.json")
    }


def test_check_counts_what_was_estimated():
    result = check_configuration(["configs/train.json", "configs/presets/16x.json"], channels=[4, 8, 8])
    assert result.error is None
    assert result.estimate.latent_shape[1:] == (2, 2, 2)
    assert result.estimate.costs["training"].saved_activations == pytest.approx(result.saved, rel=0.02)


def test_broken_preset_fails_the_check(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("presets"))
    (tmp_path / "configs/presets").mkdir()
    (tmp_path / "README.md").write_text("no commands\n")
    (tmp_path / "configs/presets/broken.json").write_text('{"downsample_factors": [2, 2, 2]}')
    monkeypatch.setattr("scripts.__main__.check_all", lambda: check_all(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        main(["check"])
    assert exit_.value.code == 1
    good, broken = capsys.readouterr().out.splitlines()[2:]
    assert "good" in good
    assert "ValueError: `downsample_factors` has 3 factors" in broken


def log_of_a_training_start(caplog) -> str:
    network = build("initial 4, [2,2]")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    with caplog.at_level(logging.INFO):
        trainer = AutoencoderTrainer.of_images([torch.zeros(1, 1, 32, 32, 32)], network, optimizer, amp_dtype=torch.bfloat16)
        log_estimate(trainer, (32,) * 3, 1)
    return caplog.text


def test_start_of_training_logs_one_line_and_leaves_the_random_state(caplog):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.set_rng_state(before)
    build("initial 4, [2,2]")
    after_building = torch.get_rng_state()
    torch.set_rng_state(before)
    assert "estimate for one training step" in log_of_a_training_start(caplog)
    assert torch.equal(torch.get_rng_state(), after_building)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_start_of_training_warns_when_the_device_is_too_small(caplog, monkeypatch):
    monkeypatch.setattr("scripts.planning.training_costs.total_memory", lambda device: GIB // 4)
    assert "cpu has 0.2 GiB" in log_of_a_training_start(caplog)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_training_starts_without_an_estimate_when_pytorch_has_changed(caplog, monkeypatch):
    monkeypatch.setattr("scripts.planning.fake_tensors.FakeTensorMode", None)
    assert "no estimate of the memory" in log_of_a_training_start(caplog)


def test_recommended_overlay_trains(volumes, tmp_path):
    overlay = tmp_path / "mine.json"
    request = ["--spatial_size", "[16,16,8]", "--target_latent_size", "2", "--memory_gb", "8", "--spacing", "[1,1,2]"]
    main(["recommend", *request, "--channels", "[4,8,8]", "--count", "1", "--output", str(overlay)])
    arguments = {key: value for key, value in SMALL.items() if key not in ("patch_size", "channels", "latent_channels")}
    process = bundle_run(
        "training",
        "train.json",
        str(overlay),
        dataset_dir=str(volumes),
        output_dir=str(tmp_path / "eval"),
        fast_dev_run="true",
        **arguments,
    )
    assert "initial 2x2x1, per level 2x2x2, 2x2x2" in process.stdout
    assert "estimate for one training step" in process.stdout


@pytest.mark.precision
def test_plans_for_a_gpu_are_in_bfloat16_and_for_the_cpu_in_its_default(monkeypatch):
    monkeypatch.setattr("scripts.bundle.precision.has_convolutions", lambda name: False)
    assert read_plan().amp_dtype is torch.bfloat16
    assert read_plan(device="cpu").amp_dtype is None
    assert estimate_memory(16, device="cpu") == estimate_memory(16, device="cpu", amp=False)
    assert estimate_memory(16, device="cuda") == estimate_memory(16, device="cuda", amp=True, amp_dtype="bfloat16")
    assert read_plan(device="cpu", amp=True).amp_dtype is torch.bfloat16
    assert read_plan(amp_dtype="float16").amp_dtype is torch.float16
