"""MAISI's autoencoder: its weights as they are published give its results here, in every pipeline."""

from __future__ import annotations

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.bundle import ConfigWorkflow

from scripts.autoencoderkl import AutoencoderKL, Reconstructor, Upsample
from scripts.bundle.weights import load_weights
from scripts.planning.autoencoder_estimates import read_plan
from scripts.planning.fake_tensors import AllocationTracker, fake_tensors
from scripts.slabs import stream
from scripts.training.initial_weights import load_pretrained
from tests.conftest import ROOT, save_volume
from tests.fake_cuda import autocast_of_cuda

NARROW = {"channels": [8, 16, 32], "norm_num_groups": 8}


def of_maisi() -> AutoencoderKlMaisi:
    torch.manual_seed(0)
    return AutoencoderKlMaisi(3, 1, 1, [2, 2, 2], NARROW["channels"], [False] * 3, 4, norm_num_groups=8, num_splits=1).eval()


def network_of_preset(cls: type = AutoencoderKL, **arguments) -> AutoencoderKL:
    files = [str(ROOT / "configs/inference.json"), str(ROOT / "configs/presets/maisi.json")]
    saved = read_plan(files, **NARROW).network.arguments
    return cls(**{**saved, **arguments}).eval()


@pytest.mark.parametrize("load", [load_weights, load_pretrained])
@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: {"unet_state_dict": state, "epoch": 273},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "unet_state_dict", "module"],
)
def test_its_weights_give_its_results_at_every_size(load, form, tmp_path):
    theirs, network = of_maisi(), network_of_preset()
    torch.save(form(theirs.state_dict()), tmp_path / "autoencoder.pt")
    load(network, tmp_path / "autoencoder.pt")
    for size in [(16, 16, 16), (24, 20, 28), (8, 32, 12)]:
        image, z = torch.rand(1, 1, *size), torch.randn(1, 4, *(n // 4 for n in size))
        with torch.no_grad():
            for ours, expected in zip(network.encode(image), theirs.encode(image)):
                assert torch.allclose(ours, expected, rtol=0, atol=1e-5)
            assert torch.allclose(network.decode(z), theirs.decode(z), rtol=0, atol=1e-5)


def test_weights_in_float16_are_loaded_as_float32(tmp_path):
    theirs, network = of_maisi(), network_of_preset()
    torch.save({key: value.half() for key, value in theirs.state_dict().items()}, tmp_path / "half.pt")
    load_weights(network, tmp_path / "half.pt")
    theirs.half().float()
    z = torch.randn(1, 4, 4, 4, 4)
    with torch.no_grad():
        assert torch.allclose(network.decode(z), theirs.decode(z), rtol=0, atol=1e-5)


def test_a_network_that_repeats_voxels_refuses_its_weights(tmp_path):
    torch.save(of_maisi().state_dict(), tmp_path / "autoencoder.pt")
    with pytest.raises(ValueError, match=r"MAISI's network.*presets/maisi.json"):
        load_weights(network_of_preset(upsample_mode="nearest"), tmp_path / "autoencoder.pt")


def test_fine_tuning_of_a_network_that_repeats_voxels_leaves_its_enlargements_out(tmp_path, caplog):
    caplog.set_level("INFO")
    torch.save(of_maisi().state_dict(), tmp_path / "autoencoder.pt")
    load_pretrained(network_of_preset(upsample_mode="nearest"), tmp_path / "autoencoder.pt")
    (left_out,) = (record.message for record in caplog.records if record.message.startswith("not taken over"))
    assert left_out.count(",") == 1 and "trilinear" in caplog.text


def test_another_mode_and_transposed_convolutions_are_refused():
    with pytest.raises(ValueError, match="`upsample_mode` is 'linear'; it must be one of nearest, trilinear"):
        Upsample(3, 4, mode="linear")
    with pytest.raises(ValueError, match="`use_convtranspose` enlarges"):
        network_of_preset(use_convtranspose=True, upsample_mode="trilinear")


def test_torchscript_and_export_enlarge_trilinearly():
    network = network_of_preset(Reconstructor)
    image = torch.rand(1, 1, 16, 12, 9)
    with torch.no_grad():
        expected = network(image)
        assert torch.allclose(torch.jit.script(network)(image), expected, atol=1e-6)
        assert torch.allclose(torch.export.export(network, (image,)).module()(image), expected, atol=1e-6)


def test_slabs_on_a_gpu_keep_within_the_budget(monkeypatch):
    monkeypatch.setattr("scripts.slabs.free_memory", lambda: 2**40)
    tracker, budget = AllocationTracker("cuda", only="cuda"), 2**-4  # GiB
    with fake_tensors(), torch.no_grad():
        with torch.device("cuda"):
            network = network_of_preset()
        z = torch.empty(1, 4, 24, 24, 24)
        with tracker, autocast_of_cuda(torch.bfloat16):
            tracker.track(network.state_dict())
            assert stream(network, z, "decode", budget).shape == (1, 1, 96, 96, 96)
    assert tracker.peak < budget * 2**30


def workflow(config: str, run_id: str, **keys) -> ConfigWorkflow:
    flow = ConfigWorkflow(
        config_file=[str(ROOT / "configs" / config), str(ROOT / "configs/presets/maisi.json")],
        meta_file=str(ROOT / "configs/metadata.json"),
        logging_file=False,
        workflow_type="train" if config == "train.json" else "infer",
        run_id=run_id,
        bundle_root=str(ROOT),
        num_workers=0,
        device="cpu",
        amp=False,
        **NARROW,
        **keys,
    )
    flow.initialize()
    flow.run()
    return flow


def test_every_pipeline_takes_its_checkpoint(tmp_path):
    for i in range(2):
        save_volume(tmp_path / "in" / f"sub-{i}" / "T1w.nii.gz", (16, 20, 18), seed=i)
    weights = str(tmp_path / "autoencoder.pt")
    torch.save({"unet_state_dict": of_maisi().state_dict()}, weights)
    for run_id, source, result in (
        ("evaluating", "in", "out"),
        ("encoding", "in", "latents"),
        ("decoding", "latents", "again"),
    ):
        folders = {"dataset_dir": str(tmp_path / source), "output_dir": str(tmp_path / result)}
        workflow("inference.json", run_id, weights=weights, memory_gb=1e-3, **folders)
        assert len(list((tmp_path / result).rglob("*.nii.gz"))) == 2
    flow = workflow(
        "train.json",
        "training",
        dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "eval"),
        pretrained=weights,
        patch_size=[8, 8, 8],
        val_fraction=0.5,
        fast_dev_run=True,
        **{"training": ["$@train#trainer.run()"]},
    )
    assert flow.trainer.state.iteration > 0
