"""A run that is killed and goes on ends with the weights of one that was not, to the last bit; no fault costs more than the
minutes since the last checkpoint. Every run is that of configs/train.json, in a forked process of its own."""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.engines.utils import IterationEvents

from scripts.checkpoints import find_checkpoints
from tests.conftest import ROOT, save_volume

EPOCH_LENGTH = 3
KEYS = {
    "channels": [4, 8, 8],
    "latent_channels": 4,
    "patch_size": [16, 16, 16],
    "num_workers": 2,
    "epochs": 3,
    "val_interval": 3,
    "val_fraction": 0.25,
    "ckpt_minutes": 0,  # at every step
    "validate#handlers": [],  # no pictures, for speed
    "adv_weight": 0.1,
    "adv_warmup_epochs": 1,
    "discriminator_def#channels": 4,
    "discriminator_def#num_layers_d": 2,
    "spectral_weight": 0.1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    for i, shape in enumerate([(18, 20, 24), (21, 16, 19), (16, 20, 17), (23, 18, 16)]):
        save_volume(folder / f"sub-{i}" / "T1w.nii.gz", shape, seed=i)
    return folder


def train(data: Path, output_dir: Path, prepare: Callable | None = None, num_processes: int = 1, **keys) -> int:
    """Train in forked processes; returns the exit code of the first. ``prepare`` is called there with the trainer."""
    overlay = ["multi_gpu_train.json"] if num_processes > 1 else []
    port = free_port()

    def child(rank: int):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if num_processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stdout = sys.stderr = output_dir.with_suffix(".log").open("a", buffering=1)
        flow = ConfigWorkflow(
            config_file=[str(ROOT / "configs" / name) for name in ["train.json", *overlay]],
            meta_file=str(ROOT / "configs/metadata.json"),
            logging_file=str(ROOT / "configs/logging.conf"),
            workflow_type="train",
            bundle_root=str(ROOT),
            dataset_dir=str(data),
            output_dir=str(output_dir),
            run_id="training",
            **{**KEYS, **keys},
        )
        flow.initialize()
        if prepare is not None:
            flow.trainer.evaluator_of_test = flow.evaluator
            prepare(flow.trainer)
        flow.run()
        flow.finalize()

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert all(process.exitcode is not None for process in processes), "the run hangs"
    return processes[0].exitcode


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_of(output_dir: Path) -> str:
    return output_dir.with_suffix(".log").read_text()


def final_state(output_dir: Path) -> dict:
    return torch.load(find_checkpoints(output_dir / "checkpoints")[0], weights_only=True)


def kill_at(iteration: int) -> Callable:
    """In the middle of a step: the forward pass is done, the weights have not moved."""

    def prepare(trainer):
        at = IterationEvents.BACKWARD_COMPLETED
        trainer.add_event_handler(at, lambda: trainer.state.iteration == iteration and os.kill(os.getpid(), signal.SIGKILL))

    return prepare


def kill_in_write(number: int, function: str) -> Callable:
    """While the ``number``-th checkpoint is written: ``os.fsync`` before it is whole on disk, ``os.replace`` before it has
    its name."""

    def prepare(trainer):
        original = getattr(os, function)
        calls = []

        def killing(*args):
            is_checkpoint = any("checkpoint_" in path.name for path in Path(trainer.ckpt_dir_of_test).glob("*.unfinished"))
            calls.extend([1] if is_checkpoint else [])
            if len(calls) == number:
                half = next(Path(trainer.ckpt_dir_of_test).glob("checkpoint_*.unfinished"))
                os.truncate(half, half.stat().st_size // 2) if function == "fsync" else None
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(os, function, killing)

    return prepare


def same(a, b) -> bool:
    """Equal to the last bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> dict:
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "eval"
    assert train(data, output_dir) == 0, log_of(output_dir)
    return {**final_state(output_dir), "log": log_of(output_dir).splitlines()}


def test_the_run_that_is_compared_with_learns_and_augments(uninterrupted, data, tmp_path):
    """Otherwise equality would say nothing."""
    assert not any("not finite" in line for line in uninterrupted["log"])
    assert uninterrupted["trainer"] == {"iteration": 9, "epoch": 3, "epoch_length": EPOCH_LENGTH}
    assert train(data, tmp_path / "eval", seed=1) == 0
    assert not same(final_state(tmp_path / "eval")["network"], uninterrupted["network"])


KILLS = {
    "within an epoch": kill_at(5),
    "half a checkpoint": kill_in_write(4, "fsync"),
    "checkpoint without its name": kill_in_write(6, "replace"),
    "last checkpoint": kill_in_write(9, "fsync"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_resumed_is_as_if_nothing_had_happened(moment, data, tmp_path, uninterrupted):
    output_dir = tmp_path / "eval"

    def prepare(trainer):
        trainer.ckpt_dir_of_test = output_dir / "checkpoints"
        KILLS[moment](trainer)

    assert train(data, output_dir, prepare) == -signal.SIGKILL
    assert train(data, output_dir, resume=True, num_workers=1) == 0, log_of(output_dir)
    assert "checkpoints: resumed" in log_of(output_dir)
    resumed = final_state(output_dir)
    assert {"average", "discriminator", "discriminator_optimizer", "discriminator_lr_scheduler"} < uninterrupted.keys()
    for part in uninterrupted.keys() - {"random", "log"}:
        assert same(resumed[part], uninterrupted[part]), part


# --- signals and faults ----------------------------------------------------------------------------------------------


def at_iteration(iteration: int, action: Callable) -> Callable:
    """Do something in the middle of a step."""

    def prepare(trainer):
        trainer.add_event_handler(
            IterationEvents.FORWARD_COMPLETED, lambda: action() if trainer.state.iteration == iteration else None
        )

    return prepare


@pytest.mark.parametrize("number, iteration", [(signal.SIGTERM, 5), (signal.SIGINT, 6)])
def test_signal_finishes_the_step_saves_and_gives_its_exit_code(number, iteration, data, tmp_path, uninterrupted):
    """Iteration 6 ends an epoch, which is finished as well."""
    output_dir = tmp_path / "eval"
    prepare = at_iteration(iteration, lambda: os.kill(os.getpid(), number))
    assert train(data, output_dir, prepare, ckpt_minutes=60) == 128 + number, log_of(output_dir)
    assert final_state(output_dir)["trainer"]["iteration"] == iteration
    assert f"{number.name}: stopping after iteration {iteration}" in log_of(output_dir)
    assert train(data, output_dir, resume=True) == 0
    assert same(final_state(output_dir)["network"], uninterrupted["network"])


def fill_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


def make_read_only():
    original = open

    def refusing(path, mode="r", *args, **kwargs):
        if "w" in mode and "checkpoint_" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original(path, mode, *args, **kwargs)

    builtins.open = refusing


@pytest.mark.parametrize("fault, words", [(fill_disk, "File too large"), (make_read_only, "Read-only file system")])
def test_checkpoint_that_cannot_be_written_is_an_error_and_costs_no_other(fault, words, data, tmp_path):
    output_dir = tmp_path / "eval"
    assert train(data, output_dir, at_iteration(5, fault)) == 1
    assert "checkpoint_00000005.pt could not be written" in log_of(output_dir)
    assert words in log_of(output_dir) and "Make room, or choose a folder" in log_of(output_dir)
    assert final_state(output_dir)["trainer"]["iteration"] == 4
    assert not list(output_dir.rglob("*.unfinished"))
    assert train(data, output_dir, resume=True, epochs=2) == 0
