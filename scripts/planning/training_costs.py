"""What a training step needs, found by making it on fake tensors: the trainer makes the step with the real network, loss and
optimizer, so the result follows the training code when that changes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Events
from monai.utils.enums import CommonKeys as Keys
from torch.nn.parallel import DistributedDataParallel

from scripts.bundle.machine import GIB, total_memory
from scripts.planning.estimates import Cost
from scripts.planning.fake_tensors import (
    AllocationTracker,
    SavedTensors,
    casting_rules,
    fake_copy,
    fake_image,
    fake_tensors,
    nbytes_of,
)
from scripts.training.losses import Adversary
from scripts.training.trainer import AutoencoderTrainer, ResumableTrainer

logger = logging.getLogger(__name__)


def training_cost(
    network: nn.Module,
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = torch.bfloat16,
    device: str = "cuda",
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    accumulation_steps: int = 1,
    discriminator: nn.Module | None = None,
    averaged: bool = False,
    **kwargs: Any,
) -> Cost:
    """
    Cost of a step of :py:class:`scripts.training.AutoencoderTrainer`. Nothing is computed or allocated.

    Args:
        network: MONAI's ``AutoencoderKL`` or one with its interface, on any device. It is not changed.
        spatial_size: size of the volume or patch, voxels.
        batch_size: volumes per step.
        amp_dtype: data type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``, whose casting rules, optimizer and allocator are imitated. No such device is needed.
        optimizer: makes an optimizer from parameters. The discriminator's is AdamW.
        accumulation_steps: batches of one step; with several, gradients of an earlier one are in memory during the last.
        discriminator: for adversarial training, MONAI's ``PatchDiscriminator`` or one with its interface.
        averaged: whether an average of the weights is kept.
        kwargs: further arguments of the trainer, such as ``loss_function`` and ``loss_terms``.
    """
    with fake_tensors():
        network, batches = fake_copy(network), min(2, accumulation_steps)
        image = fake_image(network, batch_size, spatial_size)
        kwargs |= {"amp_dtype": amp_dtype, "accumulation_steps": batches}
        if discriminator is not None:
            adversary = Adversary(fake_copy(discriminator), torch.optim.AdamW, num_steps=1, weight=1.0, warmup_epochs=0)
            kwargs["adversary"] = adversary
        trainer = AutoencoderTrainer.of_images([image] * batches, network, optimizer(network.parameters()), **kwargs)
        return step_cost(trainer, {Keys.IMAGE: image}, device, averaged)


def step_cost(trainer: ResumableTrainer, batch: Mapping[str, Any], device: str, averaged: bool) -> Cost:
    """Cost of a step of any trainer on a batch, both fake, which is made. To be called inside
    :py:func:`scripts.planning.fake_tensors.fake_tensors`; the last two arguments are those of :py:func:`training_cost`."""
    trainer.are_finite = lambda values: True  # type: ignore[method-assign]  # nothing else in a step reads values
    trainer.scaler = torch.amp.GradScaler(enabled=False)  # an enabled one reads whether gradients are finite
    trainer.state.epoch, trainer.state.iteration = 1, trainer.state.epoch_length  # whose end is a step of the optimizers
    modules, optimizers, _ = zip(*trainer.trained_parts())
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    _make_states(optimizers, parameters, device)
    if trainer.accumulation_steps == 1:
        for parameter in parameters:
            parameter.grad = None
    held = [module.state_dict() for module in (*modules, *([fake_copy(trainer.network)] if averaged else []))]
    states = [list(optimizer.state.values()) for optimizer in optimizers]

    tracker, saved = AllocationTracker(device), SavedTensors(parameters)
    if isinstance(trainer, AutoencoderTrainer):
        saved.watch(trainer.network)
    saved.attach(trainer)
    with tracker, casting_rules(device), saved:
        tracker.track(held, states, [parameter.grad for parameter in parameters], batch)
        trainer.fire_event(Events.ITERATION_STARTED)
        trainer._iteration(trainer, dict(batch))
    return Cost.counted(
        tracker,
        nbytes_of(held),
        gradients=nbytes_of([parameter.grad for parameter in parameters]),
        optimizer_state=nbytes_of(states),
        saved_activations=saved.nbytes,
        levels={**saved.levels, "other": saved.nbytes - sum(saved.levels.values())} if saved.levels else {},
    )


def _make_states(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter], device: str) -> None:
    """Give optimizers the state that they have after a step."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("foreach", True) is None:  # left to PyTorch, which cannot tell the device of fake tensors
                group["foreach"] = device == "cuda" and not group.get("fused")
        optimizer.step()


def log_estimate(trainer: AutoencoderTrainer, patch_size: Sequence[int], batch_size: int) -> None:
    """
    Log in one line the memory that a training step will need, and warn when the device has less.

    Args:
        trainer: its network, losses, types of optimizers and mixed precision are used; it is not changed.
        patch_size: spatial size of a training patch, voxels.
        batch_size: patches per batch.
    """
    device, optimizer = trainer.state.device, trainer.optimizer
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        cost = training_cost(
            _unwrapped(trainer.network),
            patch_size,
            batch_size=batch_size,
            device="cpu" if device.type == "cpu" else "cuda",
            optimizer=partial(type(optimizer), **settings),
            accumulation_steps=trainer.accumulation_steps,
            discriminator=trainer.adversary.discriminator if trainer.adversary else None,
            averaged=trainer.average is not None,
            amp_dtype=trainer.autocast["dtype"] if trainer.amp else None,
            loss_function=trainer.loss_function,
            loss_terms=trainer.loss_terms,
        )
    except Exception as error:  # of any type, from private parts of PyTorch; training must start without an estimate too
        logger.warning(f"no estimate of the memory: {type(error).__name__}: {error}")
        return
    logger.info(
        f"estimate for one training step: {cost.needed / GIB:.2f} GiB with margin, {cost.peak / GIB:.3g} GiB without, of "
        f"which saved activations {cost.saved_activations / GIB:.3g} GiB; {cost.flops / 1e12:.3g} TFLOP"
    )
    available = total_memory(device)
    if available is not None and cost.needed > available:
        logger.warning(f"{device} has {available / GIB:.1f} GiB; training is estimated to need {cost.needed / GIB:.1f} GiB")


def _unwrapped(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network
