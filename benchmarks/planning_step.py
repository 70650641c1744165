"""The bytes that a step of the real trainer saves for its backward pass, and by which it makes this process grow.

python -m benchmarks.planning_step "'16x lean'"
"""

from __future__ import annotations

import gc
from typing import Any

import fire
import torch
from torch.optim.swa_utils import AveragedModel

from benchmarks.inference_peak import peak_bytes, resident
from scripts.diffusion.preconditioning import Denoiser
from scripts.planning.generator_estimates import GeneratorPlan, latent_batch, step_trainer
from scripts.planning.saved_tensors import SavedTensors
from scripts.training.autoencoder_trainer import AutoencoderTrainer
from scripts.training.resumable_trainer import ResumableTrainer, moving_average


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
    return _saved_by(trainer, modules)


def saved_in_a_generator_step(plan: GeneratorPlan) -> int:
    """Bytes that the second of two iterations of a generator's training on the CPU saves, with an average of the weights."""
    network = Denoiser(**plan.network.arguments)
    trainer = step_trainer(ResumableTrainer, plan, network, [latent_batch(plan)] * 2)
    trainer.average = AveragedModel(network, multi_avg_fn=moving_average(0.999))
    return _saved_by(trainer, [network])


def _saved_by(trainer: ResumableTrainer, modules: list[torch.nn.Module]) -> int:
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
    from benchmarks.planning import GENERATORS, ROWS

    row = (ROWS | GENERATORS)[name]
    row.smallest().step()  # loads the libraries
    gc.collect()  # a trainer and its handlers refer to each other, and so keep the network in memory
    before = resident()
    print(row.step(), peak_bytes("cpu") - before)


if __name__ == "__main__":
    fire.Fire(step)
