"""A trainer whose runs can be resumed bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer, Trainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from scripts.bundle.precision import autocast_dtype, dtype_name

__all__ = ["Output", "ResumableTrainer", "TrainedPart", "moving_average"]

Output = list[dict[str, Any]]
TrainedPart = tuple[torch.nn.Module, torch.optim.Optimizer, LRScheduler | None]  # a network, its optimizer and schedule
logger = logging.getLogger(__name__)


class ResumableTrainer(SupervisedTrainer):
    """
    MONAI's ``SupervisedTrainer`` with mixed precision on any device, clipped gradients, and a gradient scaler that is made
    once, so that a resumed run keeps its scale. A step whose loss or gradient is not finite is skipped. Schedule and average
    follow the steps of the optimizer.

    ``engine.state.output`` is a list of one dict, as MONAI's handlers expect: the image, the prediction, and the losses of
    the whole batch. A trainer with further losses or networks has an ``_iteration`` of its own, made of the same parts.

    Args:
        amp_dtype: ``"bfloat16"``, or ``"float16"`` with a gradient scaler.
        lr_scheduler: schedule of the learning rate, which counts steps of the optimizer, or None.
        average: average of the network's weights, see :py:func:`moving_average`, or None.
        max_grad_norm: largest norm of the gradients of a network; longer ones are clipped to it.
        max_nonfinite_steps: number of steps in a row that are not finite after which the run stops with an error.
        kwargs: arguments of ``SupervisedTrainer``; ``amp`` switches mixed precision on, ``accumulation_steps`` counts the
            batches of one optimizer step.

    Attributes:
        exit_code: exit code of the process when ``run`` ends, if it is not 0.

    Raises:
        FloatingPointError: when training, after ``max_nonfinite_steps``, with the files of the batch and the last finite
            losses.
    """

    def __init__(
        self,
        *,
        amp_dtype: str,
        lr_scheduler: LRScheduler | None = None,
        average: AveragedModel | None = None,
        max_grad_norm: float = 1.0,
        max_nonfinite_steps: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(decollate=False, **kwargs)  # handlers read scalars only
        self.lr_scheduler = lr_scheduler
        self.average = average
        self.max_grad_norm = max_grad_norm
        self.max_nonfinite_steps = max_nonfinite_steps
        self.autocast = {"device_type": self.state.device.type, "dtype": autocast_dtype(amp_dtype), "enabled": self.amp}
        self.scaler: Any = torch.amp.GradScaler(self.state.device.type, enabled=self.amp and amp_dtype == "float16")
        self.exit_code = 0
        self.nonfinite_steps = 0
        self.batches_of_step: list[tuple[list[str], torch.Tensor]] = []
        self.finite_losses: dict[str, torch.Tensor] = {}

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses in ``engine.state.output``, the total first."""
        return (Keys.LOSS.value,)

    @property
    def precision(self) -> dict[str, Any]:
        """``amp`` and ``amp_dtype`` of the run."""
        return {"amp": self.autocast["enabled"], "amp_dtype": dtype_name(self.autocast["dtype"])}

    @property
    def step_is_complete(self) -> bool:
        """Whether the optimizer uses the gradients of this batch, so that none is lost if the run stops after it."""
        position = self._position + 1  # the last step of an epoch may be of fewer batches
        return position % self.accumulation_steps == 0 or position == self.state.epoch_length

    @property
    def _position(self) -> int:
        """The batches of the epoch before this one."""
        return (self.state.iteration - 1) % self.state.epoch_length

    def run(self) -> None:  # type: ignore[override]
        super(Trainer, self).run()  # past MONAI's Trainer, which would make a new gradient scaler
        if self.exit_code:
            raise SystemExit(self.exit_code)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> Output:  # type: ignore[override]
        self.start_batch()
        inputs, targets, args, kwargs = self.prepare(batchdata)
        with self.gradients_shared(self.network):
            with torch.autocast(**self.autocast):
                pred = self.inferer(inputs, self.network, *args, **kwargs)
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss = self.loss_function(pred.float(), targets)
            self.fire_event(IterationEvents.LOSS_COMPLETED)
            self.backward(loss)
        pred, losses = pred.detach(), {Keys.LOSS.value: loss.detach()}
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)

        self.step_or_skip(losses, batchdata.get("file", []))
        self.state.output = [{Keys.IMAGE: inputs, Keys.LABEL: targets, Keys.PRED: pred, **losses}]
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    # --- the parts of an iteration -----------------------------------------------------------------------------------

    def trained_parts(self) -> list[TrainedPart]:
        """Each network that this step trains, with its optimizer and schedule."""
        return [(self.network, self.optimizer, self.lr_scheduler)]

    def start_batch(self) -> None:
        """Set the network to training, and remove the gradients of the step before where a new one starts."""
        self.network.train()
        if self._position % self.accumulation_steps == 0:
            self.batches_of_step = []
            for _, optimizer, _ in self.trained_parts():
                optimizer.zero_grad(set_to_none=True)

    def prepare(self, batchdata: dict[str, Any]) -> tuple[Any, Any, tuple, dict[str, Any]]:
        """A batch on the trainer's device, by ``prepare_batch``: inputs, targets, and further arguments of the inferer."""
        batch: Any = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        inputs, targets, args, kwargs = batch if len(batch) == 4 else (*batch, (), {})
        inputs, targets = (item.as_tensor() if isinstance(item, MetaTensor) else item for item in (inputs, targets))
        return inputs, targets, args, kwargs

    def gradients_shared(self, network: torch.nn.Module) -> contextlib.AbstractContextManager:
        """A context in which processes exchange gradients, which they do only for the last batch of a step."""
        if isinstance(network, DistributedDataParallel) and not self.step_is_complete:
            return network.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one batch's loss to those of its optimizer step."""
        self.scaler.scale(loss / self.accumulation_steps).backward()

    def step_or_skip(self, losses: dict[str, torch.Tensor], files: list[str]) -> None:
        """
        After the last batch of a step, clip the gradients and step, unless they are not finite; move the schedules on, and
        update the average.

        Args:
            losses: losses of the batch.
            files: files of the batch.
        """
        self.batches_of_step.append((files, losses[Keys.LOSS]))
        if not self.step_is_complete:
            return
        parts, norms = self.trained_parts(), []
        for network, optimizer, _ in parts:
            self.scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm))
        # The norms are those of the gradients of all processes, so all agree. A gradient scaler skips steps by itself, and
        # overflows while it looks for the scale: with one, the losses decide whether a step counts as not finite.
        decisive = [loss for _, loss in self.batches_of_step] if self.scaler.is_enabled() else norms
        finite, scale = self.are_finite(decisive), self.scaler.get_scale()
        if finite or self.scaler.is_enabled():
            for _, optimizer, _ in parts:
                self.scaler.step(optimizer)
            self.scaler.update()
        if finite and self.scaler.get_scale() >= scale:  # it falls when the scaler has skipped a step
            for schedule in (schedule for *_, schedule in parts if schedule):
                schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self._count_nonfinite(finite, losses)

    @staticmethod
    def are_finite(values: list[torch.Tensor]) -> bool:
        """Whether all values are finite. Nothing else in a step reads values; a trainer on fake tensors overrides this."""
        return bool(torch.isfinite(torch.stack(values)).all())

    def _count_nonfinite(self, finite: bool, losses: dict[str, torch.Tensor]) -> None:
        if finite:
            self.nonfinite_steps = 0
            self.finite_losses = losses
            return
        self.nonfinite_steps += 1
        batches = [files for files, loss in self.batches_of_step if not torch.isfinite(loss)]
        files = [file for batch in batches for file in batch]
        where = f"the loss of {', '.join(files)}" if batches else "the gradient"
        logger.warning(f"iteration {self.state.iteration}: {where} is not finite; the step is skipped")
        if self.nonfinite_steps >= self.max_nonfinite_steps:
            last = ", ".join(f"{name} {value.item():.4g}" for name, value in self.finite_losses.items())
            raise FloatingPointError(
                f"{self.nonfinite_steps} steps in a row were not finite (`max_nonfinite_steps`), the last at iteration "
                f"{self.state.iteration}, because of {where}. The last finite losses were: {last or 'none'}. The weights "
                "have not changed since. Look at the volume; `--resume true` goes on, with a lower `--lr` or `--amp false`."
            )


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """
    A ``multi_avg_fn`` for PyTorch's ``AveragedModel``. The share that a step keeps grows with the run, up to ``decay``, so
    that the first weights soon have no influence and short runs gain from the average too.

    Args:
        decay: largest share of the average that a step keeps, in [0, 1); 0 is no average.

    Raises:
        ValueError: for another ``decay``.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`ema_decay` is {decay!r}; it must be at least 0 and below 1.")

    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor | int) -> None:
        steps = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    return average
