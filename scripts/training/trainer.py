"""The trainers, whose runs can be resumed bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer, Trainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from scripts.bundle.precision import autocast_dtype
from scripts.training.losses import Adversary, LossTerm, kl_divergence

Losses = dict[str, torch.Tensor]
TrainedPart = tuple[torch.nn.Module, torch.optim.Optimizer, LRScheduler | None]  # a network, its optimizer and schedule
logger = logging.getLogger(__name__)


class ResumableTrainer(SupervisedTrainer):
    """
    MONAI's ``SupervisedTrainer`` with mixed precision on any device, clipped gradients, and a gradient scaler that a resumed
    run keeps. A step whose loss or gradient is not finite is skipped. Schedule and average follow the steps of the
    optimizer.

    ``engine.state.output`` is a list of one dict: the input, the target, the prediction, and the losses of the whole batch.
    A trainer with further losses has a ``compute_losses`` and ``loss_names`` of its own.

    Args:
        amp_dtype: ``"bfloat16"``, or ``"float16"`` with a gradient scaler.
        lr_scheduler: schedule of the learning rate, which counts steps of the optimizer, or None.
        average: average of the network's weights, see :py:func:`scripts.training.moving_average`, or None.
        max_grad_norm: largest norm of the gradients of a network; longer ones are clipped to it.
        max_nonfinite_steps: number of steps in a row that are not finite after which the run stops with an error.
        kwargs: arguments of ``SupervisedTrainer``; ``amp`` switches mixed precision on, ``accumulation_steps`` counts the
            batches of one optimizer step.

    Attributes:
        precision: ``amp`` and ``amp_dtype`` of the run.
        exit_code: exit code of the process when ``run`` ends, if it is not 0.

    Raises:
        FloatingPointError: when training, after ``max_nonfinite_steps``, with the files of the batch.
    """

    adversary: Adversary | None = None

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
        self.precision = {"amp": self.amp, "amp_dtype": amp_dtype}
        self.autocast = {"device_type": self.state.device.type, "dtype": autocast_dtype(amp_dtype), "enabled": self.amp}
        self.scaler: Any = torch.amp.GradScaler(self.state.device.type, enabled=self.amp and amp_dtype == "float16")
        self.exit_code = 0
        self.nonfinite_steps = 0
        self.batches_of_step: list[tuple[list[str], torch.Tensor]] = []  # files and loss of each

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses in ``engine.state.output``, the total first."""
        return (Keys.LOSS.value,)

    @property
    def step_is_complete(self) -> bool:
        """Whether the optimizer uses the gradients of this batch, so that none is lost if the run stops after it."""
        position = (self.state.iteration - 1) % self.state.epoch_length + 1
        return position % self.accumulation_steps == 0 or position == self.state.epoch_length  # the last may have fewer

    @property
    def active_adversary(self) -> Adversary | None:
        """The adversary, once its warm-up is over."""
        return self.adversary if self.adversary and self.state.epoch > self.adversary.warmup_epochs else None

    def trained_parts(self) -> list[TrainedPart]:
        """Each network that this step trains, with its optimizer and schedule."""
        adversary, parts = self.active_adversary, [(self.network, self.optimizer, self.lr_scheduler)]
        return [*parts, (adversary.network, adversary.optimizer, adversary.lr_scheduler)] if adversary else parts

    def run(self) -> None:  # type: ignore[override]
        super(Trainer, self).run()  # past MONAI's Trainer, which would make a new gradient scaler
        if self.exit_code:
            raise SystemExit(self.exit_code)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> list[dict[str, Any]]:  # type: ignore[override]
        adversary, trained = self.active_adversary, self.trained_parts()
        self.network.train()
        if (self.state.iteration - 1) % self.state.epoch_length % self.accumulation_steps == 0:
            self.batches_of_step = []
            for _, optimizer, _ in trained:
                optimizer.zero_grad(set_to_none=True)

        batch: Any = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        inputs, targets, args, kwargs = batch if len(batch) == 4 else (*batch, (), {})
        inputs = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        with self._gradients_shared(self.network):
            with torch.autocast(**self.autocast):
                output = self.inferer(inputs, self.network, *args, **kwargs)
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            losses = self.compute_losses(output, inputs, targets)
            self.fire_event(IterationEvents.LOSS_COMPLETED)
            self._backward(losses[Keys.LOSS])
        pred = (output[0] if isinstance(output, tuple) else output).detach()
        if adversary is not None:
            with self._gradients_shared(adversary.network):
                with torch.autocast(**self.autocast):
                    losses["discriminator_loss"] = adversary.discriminator_loss(inputs, pred)
                self._backward(losses["discriminator_loss"])
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)

        zero = inputs.new_zeros((), dtype=torch.float32)  # for a loss that is not computed yet
        losses = {name: losses.get(name, zero).detach() for name in self.loss_names}
        self.batches_of_step.append((batchdata.get("file", []), losses[Keys.LOSS]))
        if self.step_is_complete:
            self._step_or_skip(trained)
        self.state.output = [{Keys.IMAGE: inputs, Keys.LABEL: targets, Keys.PRED: pred, **losses}]
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    def compute_losses(self, output: Any, inputs: torch.Tensor, targets: Any) -> Losses:
        """
        ``"loss"``, which is minimised, and its parts without their weights.

        Args:
            output: what the network makes of ``inputs`` (``BxCxHxWxD``), in the data type of the run.
            inputs: images of the batch.
            targets: what ``prepare_batch`` gives beside them.
        """
        return {Keys.LOSS.value: self.loss_function(output.float(), targets)}

    def _gradients_shared(self, network: torch.nn.Module) -> contextlib.AbstractContextManager:
        """Processes exchange gradients only for the last batch of a step."""
        if isinstance(network, DistributedDataParallel) and not self.step_is_complete:
            return network.no_sync()
        return contextlib.nullcontext()

    def _backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss / self.accumulation_steps).backward()

    def _step_or_skip(self, trained: list[TrainedPart]) -> None:
        norms = []
        for network, optimizer, _ in trained:
            self.scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm))
        # The norms are those of the gradients of all processes, so all agree. A gradient scaler skips steps by itself, and
        # overflows while it looks for the scale: with one, the losses decide whether a step counts as not finite.
        decisive = [loss for _, loss in self.batches_of_step] if self.scaler.is_enabled() else norms
        finite, scale = self.are_finite(decisive), self.scaler.get_scale()
        if finite or self.scaler.is_enabled():
            for _, optimizer, _ in trained:
                self.scaler.step(optimizer)
            self.scaler.update()
        if finite and self.scaler.get_scale() >= scale:  # it falls when the scaler has skipped a step
            for *_, schedule in trained:
                if schedule is not None:
                    schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.nonfinite_steps = 0 if finite else self.nonfinite_steps + 1
        if not finite:
            self._report_nonfinite()

    @staticmethod
    def are_finite(values: list[torch.Tensor]) -> bool:
        """Whether all values are finite. Nothing else in a step reads values; a trainer on fake tensors overrides this."""
        return bool(torch.isfinite(torch.stack(values)).all())

    def _report_nonfinite(self) -> None:
        batches = [files for files, loss in self.batches_of_step if not torch.isfinite(loss)]
        where = f"the loss of {', '.join(file for files in batches for file in files)}" if batches else "the gradient"
        logger.warning(f"iteration {self.state.iteration}: {where} is not finite; the step is skipped")
        if self.nonfinite_steps >= self.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self.nonfinite_steps} steps in a row were not finite (`max_nonfinite_steps`), the last at iteration "
                f"{self.state.iteration}, because of {where}."
            )


class AutoencoderTrainer(ResumableTrainer):
    """
    Trainer of an autoencoder. The target is the image, and the loss is the sum of

    - ``recon_loss``: ``loss_function`` of the reconstruction;
    - ``kl_loss``: the KL divergence of the latent, times ``kl_weight``;
    - each of ``loss_terms``, times its weight;
    - ``adv_loss``: the adversary's loss of the reconstruction, times its weight, once its warm-up is over. From then on the
      adversary makes its own step on the same batch (``discriminator_loss``).

    Args:
        kl_weight: weight of the KL divergence, which is summed over the latent.
        loss_terms: further terms of the loss, by name.
        adversary: the discriminator, or None to train without.
        kwargs: arguments of :py:class:`ResumableTrainer`.
    """

    def __init__(
        self,
        *,
        kl_weight: float,
        loss_terms: dict[str, LossTerm] | None = None,
        adversary: Adversary | None = None,
        **kwargs: Any,
    ) -> None:
        self.kl_weight = kl_weight
        self.loss_terms = loss_terms or {}  # before handlers are attached, which ask for `loss_names`
        self.adversary = adversary
        super().__init__(**kwargs)
        if adversary is not None and isinstance(self.network, DistributedDataParallel):
            adversary.network = DistributedDataParallel(adversary.discriminator, self.network.device_ids)

    @classmethod
    def of_images(
        cls,
        images: Sequence[torch.Tensor],
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> AutoencoderTrainer:
        """
        A trainer without the data and handlers of a run, for estimates, tests and benchmarks.

        Args:
            images: the batches of its only epoch, each ``BxCxHxWxD``, on the device where it trains.
            network: network on that device.
            optimizer: optimizer of the network.
            amp_dtype: data type of mixed precision, None for none.
            kwargs: further arguments of the trainer; by default, the loss is the absolute error and the KL divergence.
        """
        precision = {"amp": amp_dtype is not None, "amp_dtype": str(amp_dtype or torch.bfloat16).removeprefix("torch.")}
        loss = {"loss_function": torch.nn.functional.l1_loss, "kl_weight": 1e-8}
        batches = [{Keys.IMAGE: image} for image in images]
        return cls(
            device=images[0].device,
            max_epochs=1,
            train_data_loader=batches,
            network=network,
            optimizer=optimizer,
            **{**precision, **loss, **kwargs},
        )

    @property
    def loss_names(self) -> tuple[str, ...]:
        adversarial = ("adv_loss", "discriminator_loss") if self.adversary else ()
        return (Keys.LOSS.value, "recon_loss", "kl_loss", *self.loss_terms, *adversarial)

    def compute_losses(self, output: Any, inputs: torch.Tensor, targets: Any) -> Losses:
        reconstruction, z_mu, z_sigma = output
        pred = reconstruction.float()
        losses = {"recon_loss": self.loss_function(pred, inputs), "kl_loss": kl_divergence(z_mu, z_sigma)}
        total = losses["recon_loss"] + self.kl_weight * losses["kl_loss"]
        for name, term in self.loss_terms.items():
            losses[name] = term.function(pred, inputs)
            total = total + term.weight * losses[name]
        if (adversary := self.active_adversary) is not None:
            with torch.autocast(**self.autocast):
                losses["adv_loss"] = adversary.generator_loss(pred)
            total = total + adversary.weight * losses["adv_loss"]
        return {Keys.LOSS.value: total, **losses}
