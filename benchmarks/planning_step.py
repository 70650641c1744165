"""What a step of the real trainer saves for its backward pass, and by how much it makes this process grow.

python -m benchmarks.planning_step "'16x lean'"
"""

from __future__ import annotations

import gc
from typing import Any

import fire
import torch
from monai.inferers import SimpleInferer

from benchmarks.inference_peak import peak_bytes, resident
from scripts.planning.saved_tensors import SavedTensors
from scripts.training.autoencoder_trainer import AutoencoderTrainer


class CountingTrainer(AutoencoderTrainer):
    """The trainer, which counts what its second iteration saves for the backward pass."""

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        if engine.state.iteration == 1:
            return super()._iteration(engine, batchdata)
        self.saved = SavedTensors(list(engine.network.parameters()))
        with self.saved:
            return super()._iteration(engine, batchdata)


def saved_in_a_step(network: torch.nn.Module, size: tuple[int, ...], batch_size: int, amp: bool) -> int:
    """Bytes that the second of two iterations on the CPU saves for its backward pass."""
    trainer = CountingTrainer(
        kl_weight=1e-8,
        amp_dtype="bfloat16",
        amp=amp,
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.rand(batch_size, 1, *size)}] * 2,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters()),
        loss_function=torch.nn.functional.l1_loss,
        inferer=SimpleInferer(),
    )
    trainer.run()
    return trainer.saved.nbytes


def step(name: str) -> None:
    """
    Print the bytes that a step saves, and the bytes by which two steps raise this process's peak above what it held before
    the network was built.

    Args:
        name: of a row of :py:mod:`benchmarks.planning`.
    """
    from benchmarks.planning import ROWS

    row = ROWS[name]
    saved_in_a_step(row.build(), tuple(2 * f for f in row.factors), 1, row.amp_here)  # loads the libraries
    gc.collect()  # a trainer and its handlers hold each other, and with them the network
    before = resident()
    saved = saved_in_a_step(row.build(), row.size, row.batch_size, row.amp_here)
    print(saved, peak_bytes("cpu") - before)


if __name__ == "__main__":
    fire.Fire(step)
