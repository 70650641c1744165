"""Real training steps, which count what they save for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from scripts.diffusion.preconditioning import Denoiser
from scripts.planning.fake_tensors import SavedTensors
from scripts.planning.generator_estimates import GeneratorPlan, latent_batch, step_trainer
from scripts.training.averaging import moving_average
from scripts.training.trainer import AutoencoderTrainer, ResumableTrainer


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
    average = AveragedModel(network, multi_avg_fn=moving_average(0.999))
    trainer = step_trainer(plan, network, [latent_batch(plan)] * 2, average=average)
    return _saved_by(trainer, [network])


def _saved_by(trainer: ResumableTrainer, modules: list[torch.nn.Module]) -> int:
    saved = SavedTensors([parameter for module in modules for parameter in module.parameters()])
    saved.attach(trainer)
    with saved:
        trainer.run()
    return saved.nbytes
