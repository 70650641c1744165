"""What a run records beside its weights (MLflow, throughput), and the datasets that a config can choose."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import nibabel as nib
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from torch.utils.tensorboard import SummaryWriter

from scripts.training.checkpoints import TrainingSaver
from scripts.training.handlers import RunHandlers, TrainingProgress
from scripts.training.initial_weights import InitialWeights
from scripts.training.repeatable_batches import Draw, RepeatableOrder
from tests.conftest import ROOT, SMALL, save_volume
from tests.training.test_checkpoints import evaluator_of
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


def runs_of(tmp_path) -> tuple[list, object]:
    """MLflow's runs of the bundle's experiment, the newest first, and its client."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = client.search_experiments(filter_string="name = 'factor-aware-autoencoderkl'")
    return client.search_runs(experiment.experiment_id), client


def test_mlflow_shows_losses_parameters_the_picture_and_the_config(volumes, tmp_path):
    settings = str(ROOT / "configs/mlflow.json")
    workflow(volumes, tmp_path, epochs=2, val_interval=1, tracking=settings, spectral_weight=0.1).run()
    (run,), client = runs_of(tmp_path)
    assert run.info.status == "FINISHED"
    shown = {"loss", "recon_loss", "kl_loss", "spectral_loss", "volumes_per_second", "psnr", "ssim"}
    assert shown <= run.data.metrics.keys()
    assert len(client.get_metric_history(run.info.run_id, "recon_loss")) == 2
    assert run.data.params["downsample_factors"] == "[2, 2]" and run.data.params["spectral_weight"] == "0.1"
    assert {"optimizer", "device", "amp", "lr"} & run.data.params.keys() == {"device", "amp", "lr"}
    found = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert found == {"reconstruction.png", "config_00000000.json"}
    config = json.loads(Path(client.download_artifacts(run.info.run_id, "config_00000000.json", str(tmp_path))).read_text())
    assert config["optimizer"]["lr"] == "@lr" and config["spectral_weight"] == 0.1


def test_mlflow_has_a_run_for_each_training_which_a_resumed_one_goes_on_with(volumes, tmp_path):
    """Also beside a run that was not finished, and with other parameters."""
    keys = {"tracking": str(ROOT / "configs/mlflow.json"), "val_interval": 1, "validate#handlers": []}
    keys |= {"tracking_uri": f"sqlite:///{tmp_path}/mlruns.db", "training": ["$@train#trainer.run()"]}
    for name, further in (
        ("first", {"epochs": 1}),
        ("second", {"epochs": 1, "lr": 0.0001}),
        ("first", {"epochs": 2, "lr": 0.0002, "resume": True}),
    ):
        workflow(volumes, tmp_path / name, **keys, **further).run()
        runs, client = runs_of(tmp_path)
        if name == "first":
            client.update_run(runs[-1].info.run_id, status="RUNNING")  # as if it had been killed
    second, first = runs
    assert (first.data.params["lr"], second.data.params["lr"]) == ("0.0005", "0.0001")
    configs = {artifact.path for artifact in client.list_artifacts(first.info.run_id) if artifact.path.endswith("json")}
    assert len(configs) == 2
    epochs = {run.info.run_id: len(client.get_metric_history(run.info.run_id, "loss")) for run in runs}
    assert epochs == {first.info.run_id: 2, second.info.run_id: 1}


def curves_in(folder) -> dict[str, list[int]]:
    """The steps that TensorBoard shows of each curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def with_curves(folder, epochs: int, interrupt_at: int | None = None, resume: bool = False):
    """A training on three images that writes curves, is validated after every epoch, and may stop within one."""
    time.sleep(1)  # TensorBoard reads files in the order of their names: second, then a number as text, 10 before 9
    writer = SummaryWriter(str(folder / "tensorboard"))
    network = small_network()
    saver = TrainingSaver(str(folder / "checkpoints"), network, {}, evaluator_of(network))
    trainer = trainer_of(network, images(3), handlers=[], max_epochs=epochs)
    run = RunHandlers(InitialWeights(saver, resume), val_interval=1, tensorboard=writer)
    for handler in run.handlers:
        if not isinstance(handler, RepeatableOrder):
            handler.attach(trainer)

    def interrupt():
        raise KeyboardInterrupt

    if interrupt_at:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=interrupt_at), interrupt)
    try:
        trainer.run()
    except KeyboardInterrupt:
        writer.flush()
    return curves_in(folder / "tensorboard")


def test_curves_have_each_step_once_after_a_kill_and_resume(tmp_path):
    killed = with_curves(tmp_path, 3, interrupt_at=5)
    assert killed["loss"] == [1, 2, 3, 4, 5] and killed["psnr"] == [3]
    resumed = with_curves(tmp_path, 3, resume=True)
    assert resumed["loss"] == resumed["lr"] == list(range(1, 10))
    assert resumed["psnr"] == resumed["data_wait"] == [3, 6, 9]


def test_a_new_run_shows_its_own_curves_only(tmp_path):
    with_curves(tmp_path, 2)
    assert with_curves(tmp_path, 1)["loss"] == [1, 2, 3]


def test_throughput_shows_a_trainer_that_waits_for_data(caplog):
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            time.sleep(0.3)
            return images(1)[0]

    caplog.set_level("INFO")
    waits = []
    for items in (Slow(), images(4)):
        trainer = trainer_of(small_network(), items, handlers=[TrainingProgress()])
        trainer.add_event_handler(Events.COMPLETED, lambda engine: waits.append(dict(engine.state.metrics)))
        trainer.run()
    assert waits[0]["data_wait"] > 0.5 > waits[1]["data_wait"]
    assert 1 < waits[0]["volumes_per_second"] < 3.4 < waits[1]["volumes_per_second"]
    assert "volumes/s" in caplog.text and "% of the time waiting for data" in caplog.text


def test_persistent_cache_gives_what_the_cache_in_memory_gives(volumes, tmp_path):
    memory = workflow(volumes, tmp_path).parser.get_parsed_content("train#dataloader").dataset
    disk = workflow(volumes, tmp_path, "persistent_cache.json").parser.get_parsed_content("train#dataloader").dataset
    for _ in range(2):  # computed, then read
        for item in range(len(memory)):
            a, b = (dataset[Draw(item, seed=item)][0] for dataset in (memory, disk))
            assert torch.equal(torch.as_tensor(a["image"]), torch.as_tensor(b["image"])) and a["file"] == b["file"]
    assert len(list((tmp_path / "cache").glob("*.pt"))) == len(memory)


def test_persistent_cache_reads_a_file_that_was_replaced_again(volumes, tmp_path):
    def first_image():
        dataset = workflow(volumes, tmp_path, "persistent_cache.json").parser.get_parsed_content("train#dataloader").dataset
        item = dataset[Draw(0, seed=0)][0]
        return Path(item["file"]), torch.as_tensor(item["image"])

    path, before = first_image()
    state = path.stat()
    save_volume(path, nib.load(path).shape, seed=100)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 10**9))  # as one that is copied from elsewhere, and older
    assert not torch.equal(first_image()[1], before)
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 2
