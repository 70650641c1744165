"""The bytes that a step of the real trainer saves for its backward pass, and by which it makes this process grow.

python -m benchmarks.planning_step "'16x lean'"
"""

from __future__ import annotations

import gc
from typing import Any

import fire
import torch

from benchmarks.inference_peak import peak_bytes, resident
from scripts.planning.saved_tensors import SavedTensors
from scripts.training.autoencoder_trainer import AutoencoderTrainer


def saved_in_a_step(
    network: torch.nn.Module,
    size: tuple[int, ...],
    batch_size: int,
    amp_dtype: torch.dtype | None,
    device: str = "cpu",
    **further: Any,
) -> int:
    """Bytes that the second of two iterations saves; ``further`` are arguments of the trainer."""
    network = network.to(device)
    trainer = AutoencoderTrainer.of_images(
        [torch.rand(batch_size, 1, *size, device=device)] * 2,
        network,
        torch.optim.AdamW(network.parameters()),
        amp_dtype=amp_dtype,
        **further,
    )
    modules = [network, *([trainer.adversary.discriminator] if trainer.adversary else [])]
    saved = SavedTensors([parameter for module in modules for parameter in module.parameters()])
    saved.attach(trainer)
    with saved:
        trainer.run()
    return saved.nbytes


def step(name: str) -> None:
    """
    Print the bytes that a step saves, and the bytes by which two steps raise this process's peak above what it held before
    the network was built.

    Args:
        name: of a row of :py:mod:`benchmarks.planning`.
    """
    from benchmarks.planning import ROWS

    row = ROWS[name]
    saved_in_a_step(row.build(), tuple(2 * f for f in row.factors), 1, row.amp_dtype_here)  # loads the libraries
    gc.collect()  # a trainer and its handlers refer to each other, and so keep the network in memory
    before = resident()
    saved = saved_in_a_step(row.build(), row.size, row.batch_size, row.amp_dtype_here)
    print(saved, peak_bytes("cpu") - before)


if __name__ == "__main__":
    fire.Fire(step)
