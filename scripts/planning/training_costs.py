"""The memory and operations that a training step needs, found by running it on fake tensors.

The trainer makes the step with the real network, loss and optimizer under PyTorch's ``FakeTensorMode``: every operation is
run, in the order and the data types of the real step, but tensors have no values. So a volume of any size takes a second and
no memory, and the result follows the training code when that changes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only

from scripts.bundle.machine import GIB, total_memory
from scripts.planning.allocations import AllocationTracker, nbytes_of
from scripts.planning.costs import Cost
from scripts.planning.fake_tensors import casting_rules, fake_copy, fake_image, fake_tensors
from scripts.planning.saved_tensors import LevelListener, SavedTensors
from scripts.training.autoencoder_trainer import AutoencoderTrainer
from scripts.training.losses import Adversary, LossTerm
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["FakeStep", "log_estimate", "step_cost", "training_cost"]

PHASES = {
    IterationEvents.FORWARD_COMPLETED: "loss",
    IterationEvents.LOSS_COMPLETED: "backward",
    IterationEvents.BACKWARD_COMPLETED: "optimizer",
}
logger = logging.getLogger(__name__)


def training_cost(
    network: nn.Module,
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = torch.bfloat16,
    device: str = "cuda",
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.l1_loss,
    loss_terms: dict[str, LossTerm] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    accumulates: bool = False,
    discriminator: nn.Module | None = None,
    averaged: bool = False,
) -> Cost:
    """
    Cost of a step of :py:class:`scripts.training.AutoencoderTrainer`. Nothing is computed or allocated.

    Args:
        network: MONAI's ``AutoencoderKL`` or one with its interface (``encoder.blocks``, ``decoder.blocks``, ``forward``
            returning the reconstruction, ``z_mu`` and ``z_sigma``). It is not changed, and may be on the ``meta`` device.
        spatial_size: size of the volume or patch, voxels.
        batch_size: volumes per step.
        amp_dtype: data type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``, whose casting rules, optimizer and allocator are imitated. No such device is needed.
        loss: function of reconstruction and image, ``BxCxHxWxD`` in float32.
        loss_terms: further terms of the loss, by name.
        optimizer: makes an optimizer from parameters. The discriminator's is AdamW.
        accumulates: gradients of an earlier batch are in memory while the batch runs (gradient accumulation).
        discriminator: for adversarial training, MONAI's ``PatchDiscriminator`` or one with its interface.
        averaged: an average of the weights, PyTorch's ``AveragedModel``, is kept.

    Raises:
        ValueError: for another device.
    """
    with fake_tensors():
        network = fake_copy(network)
        batches = 2 if accumulates else 1
        image = fake_image(network, batch_size, spatial_size)
        trainer = _FakeAutoencoderTrainer.of_images(
            [image] * batches,
            network,
            optimizer(network.parameters()),
            amp_dtype=amp_dtype,
            loss_function=loss,
            loss_terms=loss_terms,
            adversary=None if discriminator is None else _fake_adversary(discriminator),
            accumulation_steps=batches,
        )
        return step_cost(trainer, {Keys.IMAGE: image}, device, averaged, by_level=True)


def step_cost(trainer: FakeStep, batch: Mapping[str, Any], device: str, averaged: bool, by_level: bool = False) -> Cost:
    """
    Cost of a step of any trainer on fake tensors. To be called inside :py:func:`scripts.planning.fake_tensors.fake_tensors`.

    Args:
        trainer: trainer whose networks are fake.
        batch: batch that the step is made with, fake.
        device: see :py:func:`training_cost`.
        averaged: ditto.
        by_level: whether to tell the levels of the trainer's network apart.
    """
    tracker = AllocationTracker(device)
    trainer.make_optimizer_states(device)
    modules = [*trainer.modules, *([fake_copy(trainer.network)] if averaged else [])]
    saved = SavedTensors(trainer.parameters)
    levels = LevelListener(trainer.network, saved) if by_level else None
    saved.attach(trainer)
    for event, phase in PHASES.items():
        trainer.add_event_handler(event, setattr, tracker, "phase", phase)
    with tracker, casting_rules(device), saved, levels.listening() if levels else contextlib.nullcontext():
        tracker.track([module.state_dict() for module in modules], trainer.gradients, trainer.optimizer_states, batch)
        trainer.make_last_step(batch)
    return tracker.cost(
        sum(nbytes_of(module.state_dict()) for module in modules),
        gradients=nbytes_of(trainer.gradients),
        optimizer_state=nbytes_of(trainer.optimizer_states),
        saved_activations=saved.nbytes,
        levels=levels.costs() if levels else (),
    )


def _fake_adversary(discriminator: nn.Module) -> Adversary:
    return Adversary(fake_copy(discriminator), torch.optim.AdamW, num_steps=1, weight=1.0, warmup_epochs=0)


class FakeStep(ResumableTrainer):
    """A trainer for a single step on fake tensors: it reads no values."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler(enabled=False)  # an enabled one reads whether gradients are finite
        self.state.epoch = 1

    @staticmethod
    def are_finite(values: list[torch.Tensor]) -> bool:
        return True

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module, _, _ in self.trained_parts()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def optimizer_states(self) -> list[Any]:
        return [dict(optimizer.state) for _, optimizer, _ in self.trained_parts()]

    def make_optimizer_states(self, device: str) -> None:
        """
        Give the optimizers their state by a first step of one parameter of each shape; that of the others is alike.
        Gradients remain where batches accumulate.
        """
        for _, optimizer, _ in self.trained_parts():
            alike: dict[Any, list[nn.Parameter]] = {}
            for index, group in enumerate(optimizer.param_groups):
                if group.get("foreach", True) is None:  # left to PyTorch, which cannot tell the device of fake tensors
                    group["foreach"] = device == "cuda" and not group.get("fused")
                for parameter in group["params"]:
                    alike.setdefault((index, parameter.shape), []).append(parameter)
            for first, *_ in alike.values():
                first.grad = torch.zeros_like(first)
            optimizer.step()
            for first, *others in alike.values():
                for other in others:
                    optimizer.state[other] = tree_map_only(torch.Tensor, torch.clone, optimizer.state[first])
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if self.accumulation_steps > 1 else None

    def make_last_step(self, batch: Mapping[str, Any]) -> None:
        """The last iteration of the epoch, which ends with a step of the optimizers."""
        self.state.iteration = self.state.epoch_length
        self.fire_event(Events.ITERATION_STARTED)
        self._iteration(self, dict(batch))


class _FakeAutoencoderTrainer(FakeStep, AutoencoderTrainer):
    """The autoencoder's trainer for a single step on fake tensors."""


def log_estimate(
    trainer: AutoencoderTrainer, patch_size: Sequence[int], batch_size: int, average: AveragedModel | None = None
) -> None:
    """
    Log in one line the memory that a training step will need, and warn when the device has less.

    Args:
        trainer: its network, losses, types of optimizers and mixed precision are used; it is not changed.
        patch_size: spatial size of a training patch, voxels.
        batch_size: patches per batch.
        average: average of the weights, which takes as much memory as they do.
    """
    device = trainer.state.device
    try:
        cost = training_cost(
            _unwrapped(trainer.network),
            patch_size,
            batch_size=batch_size,
            amp_dtype=trainer.autocast["dtype"] if trainer.amp else None,
            device="cpu" if device.type == "cpu" else "cuda",
            loss=trainer.loss_function,
            loss_terms=trainer.loss_terms,
            optimizer=_maker(trainer.optimizer),
            accumulates=trainer.accumulation_steps > 1,
            discriminator=_unwrapped(trainer.adversary.discriminator) if trainer.adversary else None,
            averaged=average is not None,
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
        logger.warning(
            f"{device} has {available / GIB:.1f} GiB, and training is estimated to need {cost.needed / GIB:.1f} GiB. "
            f"`python -m scripts estimate --memory_gb {available / GIB:.0f}` with this configuration shows what would fit."
        )


def _unwrapped(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network


def _maker(optimizer: torch.optim.Optimizer) -> Callable[..., torch.optim.Optimizer]:
    """A function that makes optimizers of the same type, with the same settings."""
    accepted = inspect.signature(type(optimizer)).parameters
    return partial(type(optimizer), **{key: value for key, value in optimizer.defaults.items() if key in accepted})
