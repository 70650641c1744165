"""The overhead of the training loop: a step of the trainer with all its handlers, against the same step in plain PyTorch.

    python -m benchmarks.loop [--epochs 4] [--patch_size 96] [--device cpu]

The two alternate in one run, so that other load slows both down. The configuration is configs/train.json; loading data is
excluded from both.
"""

from __future__ import annotations

import copy
import tempfile
import time
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

NUM_VOLUMES = 6  # one of them for validation
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
        save_volumes(Path(folder, "volumes"), NUM_VOLUMES, patch_size)
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
        bare, whole = PlainLoop(flow, patch_size), Stopwatch(device)
        trainer = flow.trainer
        trainer.add_event_handler(Events.GET_BATCH_STARTED, bare.step)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, whole.start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, whole.stop)  # attached last, so it is called last
        flow.run()
    ours, plain = whole.seconds[WARM_UP:], bare.watch.seconds[WARM_UP:]
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
    """Collects the durations between pairs of ``start`` and ``stop``, seconds."""

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


class PlainLoop:
    """The same step on a copy of the network, written in plain PyTorch."""

    def __init__(self, flow: ConfigWorkflow, patch_size: int) -> None:
        get = flow.parser.get_parsed_content
        self.network = copy.deepcopy(get("network_def")).train()
        self.optimizer = Muon(self.network.parameters(), lr=get("lr"))
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
        self.loss = get("loss")
        self.kl_weight = get("kl_weight")
        self.autocast = {"device_type": get("device"), "dtype": getattr(torch, get("amp_dtype")), "enabled": get("amp")}
        self.batch = torch.rand(get("batch_size"), 1, *[patch_size] * 3)
        self.watch = Stopwatch(get("device"))

    def step(self) -> None:
        self.watch.start()
        image = self.batch.to(self.autocast["device_type"])
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**self.autocast):
            reconstruction, z_mu, z_sigma = self.network(image)
        loss = self.loss(reconstruction.float(), image) + self.kl_weight * kl_divergence(z_mu, z_sigma)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.watch.stop()


if __name__ == "__main__":
    fire.Fire(overhead, serialize=lambda share: None)
