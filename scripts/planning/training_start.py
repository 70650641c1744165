"""The estimate of memory that training logs before its first step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from scripts.bundle.machine import GIB, total_memory
from scripts.planning.estimates import with_margin
from scripts.planning.training_costs import TrainingCost, training_cost
from scripts.training.autoencoder_trainer import AutoencoderTrainer

__all__ = ["log_estimate"]

logger = logging.getLogger(__name__)


def log_estimate(
    trainer: AutoencoderTrainer, patch_size: Sequence[int], batch_size: int, average: AveragedModel | None = None
) -> None:
    """
    Log in one line the memory that a training step will need, and warn when the device has less.

    Args:
        trainer: its network, losses, types of optimizers and mixed precision are used; it is not changed.
        patch_size: spatial size of a training patch, voxels.
        batch_size: patches per batch.
        average: of the weights, which takes as much memory as they do.
    """
    device = trainer.state.device
    rules = "cpu" if device.type == "cpu" else "cuda"
    try:
        cost = _cost(trainer, patch_size, batch_size, average, rules)
    except Exception as error:  # of any type, from private parts of PyTorch; training must start without an estimate too
        logger.warning(f"no estimate of the memory: {type(error).__name__}: {error}")
        return
    needed = with_margin(cost, rules)
    logger.info(
        f"estimate for one training step: {needed / GIB:.2f} GiB with margin, {cost.peak / GIB:.3g} GiB without, of which "
        f"saved activations {cost.saved_activations / GIB:.3g} GiB; {cost.flops / 1e12:.3g} TFLOP"
    )
    available = total_memory(device)
    if available is not None and needed > available:
        logger.warning(
            f"{device} has {available / GIB:.1f} GiB, and training is estimated to need {needed / GIB:.1f} GiB. "
            f"`python -m scripts estimate --memory_gb {available / GIB:.0f}` with this configuration shows what would fit."
        )


def _cost(
    trainer: AutoencoderTrainer, patch_size: Sequence[int], batch_size: int, average: AveragedModel | None, rules: str
) -> TrainingCost:
    return training_cost(
        _unwrapped(trainer.network),
        patch_size,
        batch_size=batch_size,
        amp_dtype=trainer.autocast["dtype"] if trainer.amp else None,
        device=rules,
        loss=trainer.loss_function,
        loss_terms=trainer.loss_terms,
        optimizer=_maker(trainer.optimizer),
        accumulates=trainer.accumulation_steps > 1,
        discriminator=_unwrapped(trainer.adversary.discriminator) if trainer.adversary else None,
        averaged=average is not None,
    )


def _unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network


def _maker(optimizer: torch.optim.Optimizer) -> Callable[..., torch.optim.Optimizer]:
    """A function that makes optimizers of the same type, with the same settings."""
    accepted = inspect.signature(type(optimizer)).parameters
    return partial(type(optimizer), **{key: value for key, value in optimizer.defaults.items() if key in accepted})
