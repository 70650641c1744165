"""The overhead of the training loop: a step of the trainer with all its handlers, against the same step in plain PyTorch.

    python -m benchmarks.loop [--epochs 4] [--patch_size 96] [--device cpu]

The two alternate in one run, so that other load slows both down. The configuration is configs/train.json; loading data is
excluded from both.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from scripts.bundle.config import ROOT
from scripts.training.losses import kl_divergence
from scripts.training.muon import Muon

WARM_UP = 3


def overhead(epochs: int = 4, patch_size: int = 96, device: str = "cpu", **overrides: Any) -> float:
    """
    Print and return how much longer a step of the trainer takes than one of the plain loop, as a share: the median over
    pairs of successive steps.

    Args:
        epochs: number of epochs, of five steps each.
        patch_size: edge of a patch, voxels.
        device: where to run.
        overrides: further keys of ``configs/train.json``, such as ``amp``.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_volumes(Path(folder, "volumes"), 6, patch_size)  # one of them for validation
        flow = ConfigWorkflow(
            config_file=str(ROOT / "configs/train.json"),
            logging_file=str(ROOT / "configs/logging.conf"),
            workflow_type="train",
            run_id="training",
            bundle_root=str(ROOT),
            dataset_dir=f"{folder}/volumes",
            output_dir=f"{folder}/eval",
            epochs=epochs,
            val_interval=epochs,
            patch_size=[patch_size] * 3,
            device=device,
            **{"num_workers": 0, **overrides},
        )
        flow.initialize()
        bare, whole, trainer = Stopwatch(device), Stopwatch(device), flow.trainer
        trainer.add_event_handler(Events.GET_BATCH_STARTED, plain_step(flow, patch_size, bare))
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, whole.start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, whole.stop)  # attached last, so it is called last
        flow.run()
    ours, plain = whole.seconds[WARM_UP:], bare.seconds[WARM_UP:]
    share = median(a / b for a, b in zip(ours, plain)) - 1
    print(
        f"step of {patch_size}³ on {device}: {1000 * median(ours):.0f} ms with the trainer and its handlers, "
        f"{1000 * median(plain):.0f} ms in a plain loop, {share:+.1%} ({len(ours)} pairs)"
    )
    return share


def save_volumes(folder: Path, number: int, size: int) -> None:
    """Random volumes, cubes of ``size`` voxels, in a new folder."""
    folder.mkdir(parents=True)
    for i in range(number):
        values = np.random.default_rng(i).integers(0, 1000, (size,) * 3, dtype=np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"sub-{i}.nii")


class Stopwatch:
    """The durations between pairs of ``start`` and ``stop``, seconds."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        self.seconds.append(self.now() - self.started)

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def plain_step(flow: ConfigWorkflow, patch_size: int, watch: Stopwatch) -> Callable[[], None]:
    """The same step on a copy of the network, written in plain PyTorch."""
    get = flow.parser.get_parsed_content
    network, device = copy.deepcopy(get("network_def")).train(), get("device")
    optimizer = Muon(network.parameters(), lr=get("lr"))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    autocast = {"device_type": device, "dtype": getattr(torch, get("amp_dtype")), "enabled": get("amp")}
    loss_function, kl_weight = get("loss"), get("kl_weight")
    batch = torch.rand(get("batch_size"), 1, *[patch_size] * 3)

    def step() -> None:
        watch.start()
        image = batch.to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**autocast):
            reconstruction, z_mu, z_sigma = network(image)
        loss = loss_function(reconstruction.float(), image) + kl_weight * kl_divergence(z_mu, z_sigma)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        watch.stop()

    return step


if __name__ == "__main__":
    fire.Fire(overhead, serialize=lambda share: None)
