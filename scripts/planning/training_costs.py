"""The memory and operations that a training step needs, found by running it on fake tensors.

The trainer makes the step with the real network, loss and optimizer under PyTorch's ``FakeTensorMode``: every operation is
run, in the order and the data types of the real step, but tensors have no values. So a volume of any size takes a second and
no memory, and the result follows the training code when that changes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys

from scripts.planning.allocations import AllocationTracker, nbytes_of
from scripts.planning.cuda_casting import casting_rules
from scripts.planning.fake_tensors import fake_copy, fake_image, fake_tensors
from scripts.planning.saved_tensors import LevelCost, LevelListener, SavedTensors
from scripts.training.adversary import Adversary
from scripts.training.autoencoder_trainer import AutoencoderTrainer
from scripts.training.losses import LossTerm
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["FakeStep", "TrainingCost", "step_cost", "training_cost"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MakeOptimizer = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainingCost:
    """
    Cost of one training step, after the first one. All but ``flops`` are bytes.

    Args:
        parameters: of the network, its buffers, their average, and the discriminator's.
        gradients: of all trained parameters.
        optimizer_state: of all optimizers.
        saved_activations: what forward pass and loss keep for the backward pass, parameters apart.
        levels: the same per level, from the image to the latent and back.
        peak: largest amount in use at one time, everything included.
        peak_phase: when that is: ``"forward"``, ``"loss"``, ``"backward"``, ``"discriminator"`` or ``"optimizer"``.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        flops: operations of forward and backward pass, a multiplication and an addition counted as two.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    saved_activations: int
    levels: tuple[LevelCost, ...]
    peak: int
    peak_phase: str
    convolution: int
    flops: int


def training_cost(
    network: nn.Module,
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = torch.bfloat16,
    device: str = "cuda",
    loss: Loss = F.l1_loss,
    loss_terms: dict[str, LossTerm] | None = None,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    accumulates: bool = False,
    discriminator: nn.Module | None = None,
    averaged: bool = False,
) -> TrainingCost:
    """
    Cost of a step of :py:class:`scripts.training.AutoencoderTrainer`. Nothing is computed or allocated.

    Args:
        network: MONAI's ``AutoencoderKL`` or one with its interface (``encoder.blocks``, ``decoder.blocks``, ``forward``
            returning the reconstruction, ``z_mu`` and ``z_sigma``). It is not changed, and may be on the ``meta`` device.
        spatial_size: of the volume or patch, voxels.
        batch_size: volumes per step.
        amp_dtype: data type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``, whose casting rules, optimizer and allocator are imitated. No such device is needed.
        loss: of reconstruction and image, ``BxCxHxWxD`` in float32.
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
        return step_cost(trainer, {Keys.IMAGE: image}, device, averaged, LevelListener)


def step_cost(
    trainer: FakeStep,
    batch: Mapping[str, Any],
    device: str,
    averaged: bool,
    listen: Callable[[nn.Module, SavedTensors], LevelListener] | None = None,
) -> TrainingCost:
    """
    Cost of a step of any trainer on fake tensors. To be called inside :py:func:`scripts.planning.fake_tensors.fake_tensors`.

    Args:
        trainer: whose networks are fake.
        batch: that the step is made with, fake.
        device: see :py:func:`training_cost`.
        averaged: ditto.
        listen: makes of the network what tells its levels apart; None for no levels.
    """
    tracker = AllocationTracker(device)
    trainer.make_optimizer_states(device)
    modules = [*trainer.modules, *([fake_copy(trainer.network)] if averaged else [])]
    saved = SavedTensors(trainer.parameters)
    levels = listen(trainer.network, saved) if listen else None
    saved.attach(trainer)
    _PhaseListener(tracker).attach(trainer)
    with tracker, casting_rules(device), saved, levels.listening() if levels else contextlib.nullcontext():
        tracker.track([module.state_dict() for module in modules], trainer.gradients, trainer.optimizer_states, batch)
        trainer.make_last_step(batch)
    return TrainingCost(
        parameters=sum(nbytes_of(module.state_dict()) for module in modules),
        gradients=nbytes_of(trainer.gradients),
        optimizer_state=nbytes_of(trainer.optimizer_states),
        saved_activations=saved.nbytes,
        levels=levels.costs() if levels else (),
        peak=tracker.peak,
        peak_phase=tracker.peak_phase,
        convolution=tracker.convolution,
        flops=tracker.flops,
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
        return [module for _, module in self.optimizers_and_modules()]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizer, _ in self.optimizers_and_modules()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def optimizer_states(self) -> list[Any]:
        return [dict(optimizer.state) for optimizer in self.optimizers]

    def make_optimizer_states(self, device: str) -> None:
        """Make a first step, which gives the optimizers their state. Gradients remain where batches accumulate."""
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            if group.get("foreach", True) is None:  # left to PyTorch, which cannot tell the device of fake tensors
                group["foreach"] = device == "cuda" and not group.get("fused")
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()
            if self.accumulation_steps == 1:
                optimizer.zero_grad(set_to_none=True)

    def make_last_step(self, batch: Mapping[str, Any]) -> None:
        """The last iteration of the epoch, which ends with a step of the optimizers."""
        self.state.iteration = self.state.epoch_length
        self.fire_event(Events.ITERATION_STARTED)
        self._iteration(self, dict(batch))


class _FakeAutoencoderTrainer(FakeStep, AutoencoderTrainer):
    """The autoencoder's trainer for a single step on fake tensors."""


class _PhaseListener:
    """Trainer handler that tells an :py:class:`AllocationTracker` in which phase the step is."""

    def __init__(self, tracker: AllocationTracker) -> None:
        self.tracker = tracker

    def attach(self, engine: FakeStep) -> None:
        ends = (IterationEvents.FORWARD_COMPLETED, IterationEvents.LOSS_COMPLETED, IterationEvents.BACKWARD_COMPLETED)
        for end, phase in zip(ends, ("loss", "backward", "optimizer")):
            engine.add_event_handler(end, self._start, phase)
        for judge in engine.modules[1:]:
            judge.register_forward_pre_hook(self._judge)

    def _start(self, phase: str) -> None:
        self.tracker.phase = phase

    def _judge(self, *_: Any) -> None:
        if self.tracker.phase == "backward":  # judged once before, for the loss
            self.tracker.phase = "discriminator"
