"""What a run records beside its weights (MLflow, throughput), and the datasets that a config can choose."""

from __future__ import annotations

import json
import time

import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from scripts.training.progress import Throughput
from scripts.training.repeatable_batches import Draw
from tests.conftest import ROOT, SMALL
from tests.training.test_training import images, small_network, trainer_of

KEYS = {key: json.loads(value) for key, value in SMALL.items() if key != "device"}


def workflow(volumes, tmp_path, *overlays: str, **keys) -> ConfigWorkflow:
    flow = ConfigWorkflow(
        config_file=[str(ROOT / "configs" / name) for name in ("train.json", *overlays)],
        meta_file=str(ROOT / "configs/metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(ROOT),
        dataset_dir=str(volumes),
        output_dir=str(tmp_path),
        run_id="training",
        device="cpu",
        **{**KEYS, **keys},
    )
    flow.initialize()
    return flow


def test_mlflow_shows_losses_parameters_and_the_picture(volumes, tmp_path):
    import mlflow

    settings = str(ROOT / "configs/mlflow.json")
    workflow(volumes, tmp_path, epochs=2, val_interval=1, tracking=settings, spectral_weight=0.1).run()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = client.search_experiments(filter_string="name = 'factor-aware-autoencoderkl'")
    (run,) = client.search_runs(experiment.experiment_id)
    assert run.info.status == "FINISHED"
    assert {
        "loss",
        "recon_loss",
        "kl_loss",
        "spectral_loss",
        "volumes_per_second",
        "psnr",
        "ssim",
    } <= run.data.metrics.keys()
    assert len(client.get_metric_history(run.info.run_id, "recon_loss")) == 2
    assert run.data.params["downsample_factors"] == "[2, 2]" and run.data.params["spectral_weight"] == "0.1"
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["reconstruction.png"]


def test_throughput_shows_a_trainer_that_waits_for_data(caplog):
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            time.sleep(0.1)
            return images(1)[0]

    caplog.set_level("INFO")
    waits = []
    for items in (Slow(), images(4)):
        trainer = trainer_of(small_network(), items, handlers=[Throughput()])
        trainer.add_event_handler(Events.COMPLETED, lambda engine: waits.append(dict(engine.state.metrics)))
        trainer.run()
    assert waits[0]["data_wait"] > 0.5 > waits[1]["data_wait"]
    assert 2 < waits[0]["volumes_per_second"] < 10 < waits[1]["volumes_per_second"]
    assert "volumes/s" in caplog.text and "% of the time waiting for data" in caplog.text


def test_persistent_cache_gives_what_the_cache_in_memory_gives(volumes, tmp_path):
    memory = workflow(volumes, tmp_path).parser.get_parsed_content("train#dataloader").dataset
    disk = workflow(volumes, tmp_path, "persistent_cache.json").parser.get_parsed_content("train#dataloader").dataset
    for _ in range(2):  # computed, then read
        for item in range(len(memory)):
            a, b = (dataset[Draw(item, seed=item)][0] for dataset in (memory, disk))
            assert torch.equal(torch.as_tensor(a["image"]), torch.as_tensor(b["image"])) and a["file"] == b["file"]
    assert len(list((tmp_path / "cache").glob("*.pt"))) == len(memory)
