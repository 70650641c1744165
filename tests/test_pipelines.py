"""The commands as a user types them, each in a separate process, on a folder of real files."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from scripts.bundle.weights import load_weights
from tests.conftest import ROOT, SMALL, save_volume
from tests.processes import bundle_run

EVALUATE = ("train.json", "evaluate.json")
NETWORK = {key: SMALL[key] for key in ("channels", "latent_channels", "device", "num_workers")}


def resembles(image: np.ndarray, reconstruction: np.ndarray) -> bool:
    """Whether the two correlate well, and better than when either axis is mirrored."""

    def correlation(other: np.ndarray) -> float:
        return np.corrcoef(image.ravel(), other.ravel())[0, 1]

    return correlation(reconstruction) > max(0.8, *(correlation(np.flip(reconstruction, axis)) for axis in range(3)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, str]:
    """A training run of two epochs with a preset-like override: (its folder, its data, its log)."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "volumes"
    for i, shape in enumerate([(24, 24, 24), (21, 26, 19), (12, 20, 17), (33, 18, 24)]):
        save_volume(data / f"sub-{i:02d}" / "T1w.nii.gz", shape, seed=i)
    process = bundle_run(
        "training",
        "train.json",
        dataset_dir=str(data),
        output_dir=str(folder / "eval"),
        epochs="2",
        val_interval="2",
        val_fraction="0.5",
        **SMALL,
    )
    return folder, data, process.stdout


def test_training_says_what_it_does_and_leaves_its_files(trained):
    folder, data, log = trained
    assert "downsample factors: initial 2x2x2, per level 2x2x2, 2x2x2, total 8x8x8" in log
    assert "8 channels x 2x2x2" in log
    assert "training: 2 volumes" in log and "validation: 2 volumes" in log
    assert "epoch 2/2: loss" in log and "recon_loss" in log and "kl_loss" in log
    for words in (
        "before the first step: ",
        "at the end: ",
        "trilinear shrinking, same factor:",
        "picture: ",
        "weights: ",
    ):
        assert words in log, words
    output = folder / "eval"
    assert nib.load(data / "sub-00" / "T1w.nii.gz")
    assert (output / "reconstruction.png").stat().st_size > 0
    for name in ("model.pt", "model.json", "checkpoint_00000002.pt", "checkpoint_00000004.pt"):
        assert (output / "checkpoints" / name).stat().st_size > 0, name
    state = torch.load(output / "checkpoints" / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_training_curves_and_picture_are_in_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "eval" / "tensorboard"))
    events.Reload()
    curves = {"loss", "recon_loss", "kl_loss", "lr", "psnr", "ssim", "foreground_psnr", "volumes_per_second", "data_wait"}
    assert curves <= set(events.Tags()["scalars"])
    assert len(events.Scalars("recon_loss")) == 4
    assert "reconstruction" in events.Tags()["images"]


def test_second_run_into_the_folder_is_refused_and_resume_goes_on(trained):
    folder, data, _ = trained
    arguments = {"dataset_dir": str(data), "output_dir": str(folder / "eval"), "val_fraction": "0.5", **SMALL}
    weights = (folder / "eval/checkpoints/checkpoint_00000004.pt").read_bytes()
    refused = bundle_run("training", "train.json", check=False, **arguments)
    assert refused.returncode != 0
    assert "checkpoint_00000004.pt and checkpoint_00000002.pt and model.pt of an earlier run" in refused.stdout
    assert (folder / "eval/checkpoints/checkpoint_00000004.pt").read_bytes() == weights

    resumed = bundle_run("run", "train.json", resume="true", epochs="3", val_interval="2", **arguments)
    assert "epoch 2 complete" in resumed.stdout and "epoch 3/3" in resumed.stdout
    assert "epoch 1/3" not in resumed.stdout


def test_evaluating_gives_numbers_per_volume(trained):
    folder, data, _ = trained
    arguments = {"dataset_dir": str(data), "output_dir": str(folder / "eval"), "val_fraction": "0.5", **NETWORK}
    process = bundle_run("evaluating", *EVALUATE, **arguments)
    rows = list(csv.DictReader((folder / "eval" / "evaluation" / "metrics.csv").open()))
    assert len(rows) == 2
    for row in rows:
        line = next(line for line in process.stdout.splitlines() if row["volume"] in line and "psnr" in line)
        assert all(metric in line for metric in ("psnr", "ssim", "mae", "foreground_psnr"))
    assert f"report: {folder / 'eval' / 'evaluation' / 'report.html'}" in process.stdout


def test_inference_keeps_shape_affine_and_intensities_from_another_folder(trained, tmp_path):
    folder, _, _ = trained
    data = tmp_path / "in"
    oblique = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([-1.0, 1.0, 2.0]), [10.0, -20.0, 30.0]
    )
    source = save_volume(data / "deep" / "odd.nii.gz", (21, 26, 19), affine=oblique)
    save_volume(data / "small.nii", (5, 9, 7), seed=1)
    out = tmp_path / "out"
    bundle_run(
        "evaluating",
        "inference.json",
        cwd=tmp_path,
        bundle_root=str(ROOT),
        dataset_dir=str(data),
        output_dir=str(out),
        ckpt_dir=str(folder / "eval" / "checkpoints"),
        **NETWORK,
    )
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.nii.gz")) == [
        "deep/odd_reconstruction.nii.gz",
        "small_reconstruction.nii.gz",
    ]
    image, result = nib.load(source), nib.load(out / "deep" / "odd_reconstruction.nii.gz")
    assert result.shape == image.shape
    assert np.allclose(result.affine, image.affine, atol=1e-4)
    original, reconstruction = image.get_fdata(), result.get_fdata()
    assert reconstruction.max() == pytest.approx(original.max(), rel=0.3)
    assert resembles(original, reconstruction)


def test_inference_resamples_to_spacing_and_back(trained, tmp_path):
    folder, _, _ = trained
    source = save_volume(tmp_path / "in" / "thick.nii.gz", (24, 24, 9), affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    bundle_run(
        "run",
        "inference.json",
        dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"),
        ckpt_dir=str(folder / "eval" / "checkpoints"),
        spacing="[1.5,1.5,1.5]",
        **NETWORK,
    )
    result = nib.load(tmp_path / "out" / "thick_reconstruction.nii.gz")
    assert result.shape == (24, 24, 9)
    assert resembles(nib.load(source).get_fdata(), result.get_fdata())


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"ckpt_dir": "nowhere"}, "there are no weights at nowhere/model.pt"),
        (
            {"downsample_factors": "[4,2]"},
            "`downsample_factors` is [[2, 2, 2], [2, 2, 2]] there and [[4, 4, 4], [2, 2, 2]]",
        ),
    ],
)
def test_unusable_weights_stop_inference_before_a_volume_is_read(trained, tmp_path, overrides, words):
    folder, _, _ = trained
    (tmp_path / "in").mkdir()
    broken = save_volume(tmp_path / "in" / "a.nii", (8, 8, 8))
    broken.write_bytes(broken.read_bytes()[:400])  # the header can be read, the voxels cannot
    arguments = {"ckpt_dir": str(folder / "eval" / "checkpoints"), **NETWORK, **overrides}
    process = bundle_run(
        "evaluating",
        "inference.json",
        check=False,
        dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"),
        **arguments,
    )
    assert process.returncode != 0
    assert words in process.stdout
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_fast_dev_run_with_a_preset_goes_through_everything(volumes, tmp_path):
    arguments = {"dataset_dir": str(volumes), "output_dir": str(tmp_path / "eval"), "fast_dev_run": "true", **SMALL}
    for _ in range(2):  # its own folder may be replaced
        bundle_run("training", "train.json", "presets/16x.json", **arguments)
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["fast_dev_run"]
    bundle_run("evaluating", "train.json", "presets/16x.json", "evaluate.json", **arguments)
    assert (tmp_path / "eval/fast_dev_run/evaluation/metrics.csv").is_file()


def test_misspelt_key_on_the_command_line_is_refused():
    process = bundle_run("evaluating", "inference.json", check=False, ckpt_dirs="models")
    assert process.returncode != 0
    assert "no config key 'ckpt_dirs'; the nearest one is 'ckpt_dir'" in process.stdout


@pytest.mark.parametrize("presets, folder", [([], "models"), (["presets/16x.json"], "models/16x")])
def test_shipped_weights_fit_the_network_of_their_config(presets, folder, caplog):
    caplog.set_level("WARNING")
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in ("inference.json", *presets)])
    load_weights(parser.get_parsed_content("network_def"), str(ROOT / folder / "model.pt"))
    assert caplog.text == ""  # which says what cannot be checked
