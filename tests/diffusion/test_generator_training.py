"""Trainings of configs/train_diffusion.json, on latents that `encoding` wrote of small volumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.engines.utils import IterationEvents

from scripts.bundle.errors import reason
from scripts.diffusion.conditions import Volume
from scripts.diffusion.generator import load_generator
from scripts.diffusion.training_data import LatentCollate, latent_lists, learn_statistics
from scripts.training.checkpoints import find_checkpoints
from tests.conftest import ROOT, save_volume
from tests.diffusion.runs import AUTOENCODER, KEYS, encode, generate, make_weights, train_generator, workflow
from tests.training.test_resume import same
from tests.training_run import final_state, log_of

AGES = {0: "21", 1: "25", 2: "n/a", 3: "33.5", 4: "40", 5: "52"}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Six subjects of a BIDS folder: sizes that nothing divides, an age missing, thick slices."""
    folder = tmp_path_factory.mktemp("volumes")
    for i in range(6):
        save_volume(folder / f"sub-{i}" / f"sub-{i}_T1w.nii.gz", (13 + i, 18, 9), i, np.diag([1.0, 1.0, 2.0, 1.0]))
    rows = [f"sub-{i}\t{age}\t{'FM'[i % 2]}" for i, age in AGES.items()]
    (folder / "participants.tsv").write_text("\n".join(["participant_id\tage\tsex", *rows]))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_weights(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def latents(volumes, weights, tmp_path_factory) -> Path:
    return encode(volumes, tmp_path_factory.mktemp("latents"), weights)


# --- latents and their statistics ---------------------------------------------------------------------------------------


def description_of(latents: Path, subject: int) -> dict:
    return json.loads((latents / f"sub-{subject}" / f"sub-{subject}_T1w_latent.json").read_text())


def test_encoding_notes_conditions_and_follows_their_changes(volumes, weights, tmp_path):
    source = shutil.copytree(volumes, tmp_path / "volumes")
    latents = encode(source, tmp_path / "latents", weights)
    assert description_of(latents, 3)["conditions"] == {"age": 33.5, "sex": "M"}
    assert description_of(latents, 2)["conditions"] == {"sex": "F"}
    before = {path: path.read_bytes() for path in latents.rglob("*.nii.gz")}
    (source / "participants.tsv").write_text("participant_id\tweight\nsub-3\t70\n")
    lists = {"training": [{"image": f"sub-{i}/sub-{i}_T1w.nii.gz"} for i in range(4)]}
    (source / "dataset.json").write_text(json.dumps(lists))
    encode(source, latents, weights)
    assert description_of(latents, 3)["conditions"] == {"weight": 70.0}
    assert description_of(latents, 3)["dataset_list"] == "training"
    assert {path: path.read_bytes() for path in latents.rglob("*.nii.gz")} == before
    found = latent_lists(str(latents), 0.25, 0)
    assert sorted(Path(item["image"]).parent.name for half in found.values() for item in half) == [
        f"sub-{i}" for i in range(4)
    ]
    lists["validation"] = [lists["training"].pop(1)]
    (source / "dataset.json").write_text(json.dumps(lists))
    encode(source, latents, weights)
    assert [Path(item["image"]).parent.name for item in latent_lists(str(latents), 0.25, 0)["validation"]] == ["sub-1"]


def test_split_is_that_of_the_autoencoder_on_the_same_volumes(volumes, latents):
    keys = {"dataset_dir": volumes, "val_fraction": 0.34}
    lists = workflow("train.json", "training", "train", **keys).parser.get_parsed_content("data#lists")
    for half, items in latent_lists(str(latents), 0.34, 0).items():
        assert [Path(item["image"]).parent.name for item in items] == [
            Path(item["image"]).parent.name for item in lists[half]
        ]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_statistics_normalise_the_training_latents(latents, weights, gamma):
    flow = workflow(
        "train_diffusion.json", "training", "train", dataset_dir=latents, latent_gamma=gamma, device="cpu", **KEYS
    )
    statistics = flow.parser.get_parsed_content("statistics")
    dataset = flow.parser.get_parsed_content("train#dataset")
    found = torch.cat([statistics.normalised(item["image"][None])[0].flatten(1) for item in dataset], 1)
    assert torch.allclose(found.mean(1), torch.zeros(8), atol=1e-4)
    assert found.square().mean().item() == pytest.approx(1, abs=1e-4)
    plain = torch.cat([item["image"].flatten(1) for item in dataset], 1)
    scale = torch.load(weights, weights_only=True)["shortcut.scale"].flatten()
    expected = (plain.std(1, correction=0) * scale) ** gamma
    assert torch.allclose(found.std(1, correction=0), expected / expected.square().mean().sqrt(), rtol=1e-3)
    z = dataset[0]["image"][None]
    assert torch.allclose(statistics.denormalised(statistics.normalised(z)), z, atol=1e-4)


def test_latents_of_two_autoencoders_are_refused_by_name(volumes, latents, tmp_path):
    mixed = shutil.copytree(latents, tmp_path / "latents")
    other = encode(volumes, tmp_path / "other", make_weights(tmp_path / "weights", seed=1))
    for path in other.glob("sub-4/*"):
        shutil.copy(path, mixed / "sub-4")
    with pytest.raises(ValueError, match="sub-4_T1w_latent.nii.gz is of another autoencoder than .*sub-0.*SHA-256"):
        latent_lists(str(mixed), 0.25, 0)
    with pytest.raises(FileNotFoundError, match="there is no latent"):
        latent_lists(str(volumes), 0.25, 0)


def test_latents_of_other_weights_are_replaced_with_a_warning(volumes, latents, tmp_path, caplog):
    mine = shutil.copytree(latents, tmp_path / "latents")
    encode(volumes, mine, make_weights(tmp_path / "weights", seed=1))
    assert f"6 latents in {mine} were made with other weights than {tmp_path / 'weights' / 'model.pt'}" in caplog.text


def test_batch_of_different_sizes_is_padded_and_masked():
    items = [
        {"image": torch.randn(2, *size), "spatial": torch.randn(3, *size), "given": torch.tensor([1.0, 0.0])}
        | {"volume": Volume(size, [1.0] * 3), "seed": i, "file": ""}
        for i, size in enumerate([(5, 8, 3), (4, 4, 4)])
    ]
    batch = LatentCollate(multiple=4)([[item] for item in items])
    assert batch["image"].shape == batch["noise"].shape == (2, 2, 8, 8, 4) and batch["mask"].shape == (2, 1, 8, 8, 4)
    assert batch["mask"].flatten(1).sum(1).tolist() == [5 * 8 * 3, 4**3]
    assert torch.equal(batch["image"][0, :, :5, :8, :3], items[0]["image"])
    for key in ("image", "spatial"):
        assert torch.equal(batch[key][0, :, 7, 7, 3], items[0][key][:, 4, 7, 2])
    assert batch["given"].tolist() == [[1, 0], [1, 0]]
    assert batch["extent"].tolist() == [[5 / 8, 1, 3 / 4], [1 / 2, 1 / 2, 1]]
    alone = LatentCollate(multiple=8)([items[1]])
    assert torch.equal(alone["noise"], LatentCollate(multiple=8)(items[1:])["noise"])
    assert not torch.equal(alone["noise"][0, 0, :4, :4, :4], batch["noise"][0, 0, :4, :4, :4])


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(latents, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "diffusion"
    assert train_generator(latents, output_dir, condition_keys=["age", "sex"]) == 0, log_of(output_dir)
    return output_dir


def test_training_validates_averages_and_leaves_a_generator_that_knows_everything(uninterrupted, latents, weights):
    log = log_of(uninterrupted)
    assert "not finite" not in log and "training is complete" in log
    assert "validation loss before the first step" in log and "unexplained_band_1" in log and "loss_t_75_100" in log
    assert list((uninterrupted / "tensorboard").glob("events*"))
    generator = load_generator(str(uninterrupted / "checkpoints" / "model.pt"))
    statistics = generator.statistics
    assert statistics.autoencoder.sha256 == description_of(latents, 0)["weights_sha256"]
    assert list(statistics.conditions.keys) == ["age", "sex"] and statistics.volumes == 4
    assert all(each.spacing == [1, 1, 2] and each.size[1:] == [18, 9] for each in statistics.geometries)
    average = final_state(uninterrupted)["average"]
    assert all(torch.equal(value, average[f"module.{name}"]) for name, value in generator.network.state_dict().items())
    training = latent_lists(str(latents), 0.25, 0)["training"]
    assert learn_statistics(training, 0.75, ["age", "sex"]) == statistics


def kill_at(iteration: int, flow: ConfigWorkflow):
    """In the middle of a step."""
    trainer = flow.trainer
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda: os.kill(os.getpid(), signal.SIGKILL) if trainer.state.iteration == iteration else None,
    )


def test_killed_and_resumed_is_as_if_nothing_had_happened(latents, uninterrupted, tmp_path):
    output_dir = tmp_path / "diffusion"
    keys = {"condition_keys": ["age", "sex"]}
    assert train_generator(latents, output_dir, partial(kill_at, 6), **keys) == -signal.SIGKILL
    assert train_generator(latents, output_dir, resume=True, num_workers=1, **keys) == 0, log_of(output_dir)
    resumed, expected = final_state(output_dir), final_state(uninterrupted)
    assert expected["trainer"]["iteration"] == 8 and {"average", "statistics", "optimizer"} < expected.keys()
    for part in expected.keys() - {"config"}:
        assert same(resumed[part], expected[part]), part
    start = torch.load(find_checkpoints(uninterrupted / "checkpoints")[-1], weights_only=True)
    assert not same(start["network"], expected["network"])


OTHERS = [
    ({"condition_keys": ["age"]}, "cannot be resumed: `condition_keys` is ['age', 'sex'] there and ['age'] here"),
    ({"latent_gamma": 0.5}, "cannot be resumed: `latent_gamma` is 0.75 there and 0.5 here"),
    ({"prediction": "v"}, "was made for another network: `prediction` is 'gain' there and 'v' here"),
    ({"timestep_shift": 2}, "cannot be resumed: `timestep_shift` is None there and 2 here"),
]


@pytest.mark.parametrize("changed, message", OTHERS)
def test_resuming_with_other_settings_is_refused(latents, uninterrupted, tmp_path, changed, message):
    output_dir = shutil.copytree(uninterrupted, tmp_path / "diffusion")
    keys = {"condition_keys": ["age", "sex"], **changed}
    with pytest.raises(Exception) as refused:
        resume(latents, output_dir, **keys)
    assert message in str(reason(refused.value))
    assert same(final_state(output_dir), final_state(uninterrupted))


def test_resuming_on_latents_of_other_weights_is_refused(volumes, uninterrupted, tmp_path):
    others = encode(volumes, tmp_path / "latents", make_weights(tmp_path, seed=1))
    output_dir = shutil.copytree(uninterrupted, tmp_path / "diffusion")
    with pytest.raises(Exception) as refused:
        resume(others, output_dir, condition_keys=["age", "sex"])
    assert "`SHA-256 of the autoencoder's weights` is" in str(reason(refused.value))


def test_volumes_that_are_added_to_a_run_are_named(volumes, latents, uninterrupted, weights, tmp_path, caplog):
    more = shutil.copytree(volumes, tmp_path / "volumes")
    shutil.copytree(more / "sub-5", more / "sub-6")
    output_dir = shutil.copytree(uninterrupted, tmp_path / "diffusion")
    words = "the training latents are not those that the run began with"
    resume(latents, output_dir, condition_keys=["age", "sex"])
    assert words not in caplog.text
    before = final_state(output_dir)["statistics"]
    resume(encode(more, tmp_path / "latents", weights), output_dir, condition_keys=["age", "sex"], epochs=3)
    assert words in caplog.text
    assert final_state(output_dir)["statistics"] == before


def resume(latents: Path, output_dir: Path, **keys) -> None:
    """In this process."""
    paths = {"dataset_dir": latents, "output_dir": output_dir}
    workflow("train_diffusion.json", "training", "train", **{**KEYS, **paths, "resume": True, **keys}).run()


def test_two_processes_with_batch_1_equal_one_with_batch_2(weights, tmp_path):
    for i in range(6):
        image = save_volume(tmp_path / "volumes" / f"sub-{i}" / "T1w.nii.gz", (16, 14, 12), seed=i)
        if i % 2:  # half of the volumes have a label map
            labels = np.random.default_rng(i).integers(3, size=(16, 14, 12), dtype=np.uint8)
            nib.save(nib.Nifti1Image(labels, nib.load(image).affine), image.with_name("T1w_label.nii.gz"))
    spatial = {"spatial_keys": ["label"]}
    latents = encode(tmp_path / "volumes", tmp_path / "latents", weights, **spatial)
    sgd = {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.1}
    keys = {"optimizer": sgd, "epochs": 2, "val_fraction": 0.34, "condition_dropout": 0.3, **spatial}
    states = []
    for num_processes, batch_size in ((1, 2), (2, 1)):
        output_dir = tmp_path / str(num_processes) / "diffusion"
        output_dir.parent.mkdir()
        code = train_generator(latents, output_dir, num_processes=num_processes, batch_size=batch_size, **keys)
        assert code == 0, log_of(output_dir)
        states.append(final_state(output_dir))
    one, two = states
    assert one["trainer"] == two["trainer"] == {"iteration": 4, "epoch": 2, "epoch_length": 2}
    start = torch.load(find_checkpoints(tmp_path / "1" / "diffusion" / "checkpoints")[-1], weights_only=True)
    assert max((start["network"][name] - value).abs().max() for name, value in one["network"].items()) > 1e-4
    assert one["network"]["from_spatial.conv.weight"].any()  # which starts as zero
    for part in ("network", "average"):
        for name, value in one[part].items():
            assert torch.allclose(value, two[part][name], rtol=0, atol=1e-5), name
    assert one["evaluator"]["best_metric"] == pytest.approx(two["evaluator"]["best_metric"], rel=1e-4)


def test_generator_that_has_seen_one_volume_makes_that_volume(weights, tmp_path):
    """From volume to latent, through the flow and back: nothing is lost but what the autoencoder loses."""
    for i in range(12):
        save_volume(tmp_path / "volumes" / f"sub-{i}" / "T1w.nii.gz", (15, 18, 13), seed=0)
    latents = encode(tmp_path / "volumes", tmp_path / "latents", weights)
    keys = {"channels": [16, 32], "epochs": 20, "val_interval": 20, "batch_size": 2, "lr": 0.002, "ema_decay": 0.9}
    keys |= {"val_fraction": 0.17, "train#saver#minutes": 60, "device": "cpu"}
    out = tmp_path / "diffusion"
    flow = workflow("train_diffusion.json", "training", "train", dataset_dir=latents, output_dir=out, **{**KEYS, **keys})
    flow.run()
    assert flow.evaluator.state.metrics["unexplained_band_1"] < 0.1
    generate(out / "checkpoints", weights, tmp_path / "samples", num_samples=1, num_inference_steps=10)
    keys = {**AUTOENCODER, "dataset_dir": latents, "output_dir": tmp_path / "decoded", "ckpt_dir": weights.parent}
    workflow("inference.json", "decoding", "infer", **keys).run()
    sample, decoded = tmp_path / "samples" / "sample_0000.nii.gz", next((tmp_path / "decoded").rglob("*.nii.gz"))
    made, expected = (nib.load(path).get_fdata() for path in (sample, decoded))
    assert np.corrcoef(made.ravel(), expected.ravel())[0, 1] > 0.97
    assert abs(made.mean() - expected.mean()) < 0.05 * expected.std()


def test_bundle_finds_every_property(latents, tmp_path):
    flow = workflow(
        "train_diffusion.json", "training", "train", dataset_dir=latents, output_dir=tmp_path, device="cpu", **KEYS
    )
    assert flow.check_properties() == []


def test_mlflow_shows_losses_and_what_the_generator_was_trained_with(latents, tmp_path):
    import mlflow

    keys = {"tracking": str(ROOT / "configs/mlflow.json"), "condition_keys": ["sex"], "latent_gamma": 0.5}
    assert train_generator(latents, tmp_path, **keys) == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = client.search_experiments(filter_string="name = 'factor-aware-autoencoderkl'")
    (run,) = client.search_runs(experiment.experiment_id)
    assert run.info.status == "FINISHED"
    assert {"loss", "volumes_per_second", "unexplained_band_1"} <= run.data.metrics.keys()
    assert (run.data.params["prediction"], run.data.params["latent_gamma"]) == ("gain", "0.5")
    assert run.data.params["condition_keys"] == "['sex']"
