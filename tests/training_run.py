"""Training runs for tests, each in a new process."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigWorkflow

from scripts.training.checkpoints import find_checkpoints
from tests.conftest import ROOT
from tests.processes import SERVER, act_as_from_a_terminal

KEYS = {
    "channels": [4, 8, 8],
    "latent_channels": 4,
    "patch_size": [16, 16, 16],
    "num_workers": 2,
    "epochs": 3,
    "val_interval": 3,
    "val_fraction": 0.25,
    "train#saver#minutes": 0,  # at every step
    "validate#handlers": [],  # no pictures, for speed
    "adv_weight": 0.1,
    "adversary#warmup_epochs": 1,
    "adversary#discriminator#channels": 4,
    "adversary#discriminator#num_layers_d": 2,
    "spectral_weight": 0.1,
}


def train(
    data: Path,
    output_dir: Path,
    prepare: Callable | None = None,
    num_processes: int = 1,
    config: str = "train.json",
    overlays: Sequence[str] = (),
    **keys,
) -> int:
    """Train, and return the exit code of the first process. ``prepare``, which must pickle, gets the workflow."""
    port = free_port()
    keys = {**KEYS, **keys} if config == "train.json" else keys
    configs = [config, *overlays, *(["multi_gpu_train.json"] if num_processes > 1 else [])]
    arguments = [(data, output_dir, prepare, rank, num_processes, port, configs, keys) for rank in range(num_processes)]
    processes = [SERVER.Process(target=_train_here, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, f"the run hangs\n{log_of(output_dir)}"
    return processes[0].exitcode


def _train_here(
    data: Path,
    output_dir: Path,
    prepare: Callable | None,
    rank: int,
    num_processes: int,
    port: int,
    configs: list[str],
    keys: dict,
):
    act_as_from_a_terminal()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = output_dir.with_suffix(".log").open("a", buffering=1)
    flow = ConfigWorkflow(
        config_file=[str(ROOT / "configs" / name) for name in configs],
        meta_file=str(ROOT / "configs/metadata.json"),
        logging_file=str(ROOT / "configs/logging.conf"),
        workflow_type="train",
        bundle_root=str(ROOT),
        dataset_dir=str(data),
        output_dir=str(output_dir),
        run_id="training",
        **keys,
    )
    flow.initialize()
    if prepare is not None:
        prepare(flow)
    flow.run()
    flow.finalize()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_of(output_dir: Path) -> str:
    return output_dir.with_suffix(".log").read_text()


def final_state(output_dir: Path) -> dict:
    return torch.load(find_checkpoints(output_dir / "checkpoints")[0], weights_only=True)
