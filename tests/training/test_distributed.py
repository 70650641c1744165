"""Several processes train as one does, with gloo; torchrun starts them only in the tests of torchrun itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from scripts.autoencoderkl import AutoencoderKL
from scripts.training.checkpoints import find_checkpoints
from scripts.training.repeatable_batches import RepeatableBatchSampler
from tests.conftest import ROOT, save_volume
from tests.training_run import KEYS, final_state, free_port, log_of, train

SGD = {
    **KEYS,
    "epochs": 1,
    "val_interval": 1,
    "num_workers": 0,
    "amp": False,
    "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.1},
}
SGD |= {"adversary#optimizer": {"_target_": "torch.optim.SGD", "_mode_": "callable", "lr": 0.01}}
SGD |= {"adversary#warmup_epochs": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six training volumes: three steps of two; and two, or with another fraction three, for validation."""
    folder = tmp_path_factory.mktemp("volumes")
    for i in range(8):
        save_volume(folder / f"sub-{i}" / "T1w.nii.gz", (16 + i, 18, 20), seed=i)
    return folder


def record(folder: Path, flow: ConfigWorkflow):
    """Sample the mean, and write the losses of every step and the metrics of validation to a file of the process."""
    AutoencoderKL.sampling = lambda self, z_mu, z_sigma: z_mu
    trainer, evaluator = flow.trainer, flow.evaluator
    rows = []
    keep = ("loss", "spectral_loss", "adv_loss", "discriminator_loss")
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: rows.append([trainer.state.output[0][name].item() for name in keep])
    )
    file = folder / f"{os.environ.get('RANK', 0)}.pt"
    trainer.add_event_handler(Events.COMPLETED, lambda: torch.save((rows, evaluator.state.metrics), file))


def terminate_second_process(flow: ConfigWorkflow):
    trainer = flow.trainer  # in all processes, which wait for each other while it is made
    if os.environ["RANK"] == "1":
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: os.kill(os.getpid(), signal.SIGTERM))


def run(data: Path, output_dir: Path, num_processes: int, **keys) -> tuple[torch.Tensor, dict, dict]:
    """Losses of every step, averaged over the processes; the last checkpoint; the metrics, which all processes share."""
    output_dir.parent.mkdir(exist_ok=True)
    code = train(data, output_dir, partial(record, output_dir.parent), num_processes=num_processes, **{**SGD, **keys})
    assert code == 0, log_of(output_dir)
    parts = [torch.load(output_dir.parent / f"{rank}.pt", weights_only=True) for rank in range(num_processes)]
    assert all(metrics == parts[0][1] for _, metrics in parts)
    return torch.tensor([rows for rows, _ in parts]).mean(0), final_state(output_dir), parts[0][1]


@pytest.mark.parametrize("val_fraction", [0.25, 0.1])
def test_two_processes_with_batch_1_equal_one_with_batch_2(val_fraction, data, tmp_path):
    """With one validation volume, both processes validate it; the last of seven training volumes is drawn with the first."""
    one = run(data, tmp_path / "one" / "eval", 1, batch_size=2, val_fraction=val_fraction)
    two = run(data, tmp_path / "two" / "eval", 2, batch_size=1, val_fraction=val_fraction)
    assert len(one[0]) == (3 if val_fraction == 0.25 else 4)
    assert torch.allclose(one[0], two[0], rtol=0, atol=1e-5)
    start = torch.load(find_checkpoints(tmp_path / "one" / "eval" / "checkpoints")[-1], weights_only=True)
    assert max((start["network"][name] - value).abs().max() for name, value in one[1]["network"].items()) > 1e-4
    for part in ("network", "average", "discriminator"):
        for name, value in one[1][part].items():
            assert torch.allclose(value, two[1][part][name], rtol=0, atol=1e-5), name
    assert one[2].keys() == two[2].keys()
    assert all(one[2][name] == pytest.approx(two[2][name], abs=1e-3) for name in one[2])
    log = log_of(tmp_path / "two" / "eval")
    assert "not finite" not in log
    assert log.count("epoch 1/1: loss") == 1 and log.count("training is complete") == 1  # the first process alone


def test_signal_to_one_process_stops_all_at_the_same_step_and_they_resume(data, tmp_path):
    assert train(data, tmp_path / "eval", terminate_second_process, num_processes=2, **SGD) == 128 + signal.SIGTERM
    assert final_state(tmp_path / "eval")["trainer"]["iteration"] == 2
    assert train(data, tmp_path / "eval", num_processes=2, **{**SGD, "resume": True}) == 0
    assert final_state(tmp_path / "eval")["trainer"]["iteration"] == 3


def test_batches_are_reshuffled_every_epoch_and_shared_out(monkeypatch):
    orders = []
    for rank in range(2):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
        sampler = RepeatableBatchSampler(10, batch_size=2, seed=0)
        assert len(sampler) == 3
        orders.append([])
        for sampler.epoch in (1, 2):
            orders[-1].append([draw for batch in sampler for draw in batch])
    for epoch in range(2):
        items = [draw.item for rank in range(2) for draw in orders[rank][epoch]]
        assert len(items) == 12 and set(items) == set(range(10))
    seeds = [draw.seed for rank in orders for epoch in rank for draw in epoch]
    assert len(set(seeds)) == len(seeds)
    assert [d.item for d in orders[0][0]] != [d.item for d in orders[0][1]]


def test_process_that_dies_takes_the_job_down_with_an_error(data, tmp_path):
    keys = {"channels": "[4,8,8]", "latent_channels": "4", "patch_size": "[16,16,16]", "num_workers": "0", "epochs": "1000"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += ["-m", "monai.bundle", "run", "training"]
    command += ["--config_file", "['configs/train.json','configs/multi_gpu_train.json']", "--dataset_dir", str(data)]
    command += ["--output_dir", str(tmp_path)]
    command += [word for key, value in keys.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            until(lambda: list(tmp_path.glob("checkpoints/checkpoint_*")))
            victim = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[-1])
            os.kill(victim, signal.SIGKILL)
            output, _ = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode == 1
    assert "SIGKILL" in output


def until(condition, timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
