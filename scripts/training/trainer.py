"""The trainer of the autoencoder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer, Trainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.utils.enums import CommonKeys as Keys
from torch.nn.parallel import DistributedDataParallel

from scripts.bundle.precision import autocast_dtype
from scripts.training.adversary import Adversary
from scripts.training.losses import LossTerm, kl_divergence

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.10 has none

__all__ = ["AutoencoderTrainer"]

Losses = dict[str, torch.Tensor]
logger = logging.getLogger(__name__)


class AutoencoderTrainer(SupervisedTrainer):
    """
    MONAI's ``SupervisedTrainer`` for an autoencoder. The target is the image, and the loss is the sum of

    - ``recon_loss``: ``loss_function`` of the reconstruction;
    - ``kl_loss``: the KL divergence of the latent, times ``kl_weight``;
    - each of ``loss_terms``, times its weight;
    - ``adv_loss``: whether the adversary takes the reconstruction for an image, times its weight, after its warm-up. The
      adversary then makes its own step on the same batch (``discriminator_loss``).

    ``engine.state.output`` is a list of one dict, as MONAI's handlers expect: the image, the reconstruction, ``loss``, and
    its parts without their weights, all of the whole batch.

    Mixed precision works on any device, gradients are clipped, and the gradient scaler lives as long as the trainer, so
    that a resumed one keeps its scale. A step whose loss or gradient is not finite is left out.

    Args:
        kl_weight: weight of the KL divergence, which is summed over the latent.
        amp_dtype: ``"bfloat16"``, or ``"float16"`` with a gradient scaler.
        loss_terms: further terms of the loss, by name.
        adversary: the discriminator, or None to train without.
        max_grad_norm: clip gradients to this norm.
        max_nonfinite_steps: stop with an error after so many steps in a row that are not finite.
        kwargs: arguments of ``SupervisedTrainer``; ``amp`` switches mixed precision on, ``accumulation_steps`` counts the
            batches of one optimizer step.

    Raises:
        FloatingPointError: when training, after ``max_nonfinite_steps``, with the files of the batch and the last finite
            losses.
    """

    def __init__(
        self,
        *,
        kl_weight: float,
        amp_dtype: str,
        loss_terms: dict[str, LossTerm] | None = None,
        adversary: Adversary | None = None,
        max_grad_norm: float = 1.0,
        max_nonfinite_steps: int = 10,
        **kwargs: Any,
    ) -> None:
        self.loss_terms = loss_terms or {}  # before handlers are attached, which ask for `loss_names`
        self.adversary = adversary
        super().__init__(decollate=False, **kwargs)  # handlers read scalars, no need to take apart
        self.kl_weight = kl_weight
        self.max_grad_norm = max_grad_norm
        self.max_nonfinite_steps = max_nonfinite_steps
        self.autocast = {"device_type": self.state.device.type, "dtype": autocast_dtype(amp_dtype), "enabled": self.amp}
        self.scaler: Any = torch.amp.GradScaler(self.state.device.type, enabled=self.amp and amp_dtype == "float16")
        self.exit_code = 0
        self.nonfinite_steps = 0
        self.batches_of_step: list[tuple[list[str], torch.Tensor]] = []
        self.finite_losses: Losses = {}

    @classmethod
    def of_images(
        cls,
        images: Sequence[torch.Tensor],
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.l1_loss,
        **kwargs: Any,
    ) -> Self:
        """
        A trainer for a few given steps, without data and handlers of a run: what estimates, tests and benchmarks use.

        Args:
            images: the batches of its only epoch, each ``BxCxHxWxD``, on the device where it trains.
            network: on that device.
            optimizer: of the network.
            amp_dtype: data type of mixed precision, None for none.
            loss_function: of reconstruction and image.
            kwargs: further arguments of the trainer.
        """
        return cls(
            device=images[0].device,
            max_epochs=1,
            train_data_loader=[{Keys.IMAGE: image} for image in images],
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            inferer=SimpleInferer(),
            amp=amp_dtype is not None,
            amp_dtype=str(amp_dtype or torch.bfloat16).removeprefix("torch."),
            **{"kl_weight": 1e-8, **kwargs},
        )

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses in ``engine.state.output``, the total first."""
        adversarial = ("adv_loss", "discriminator_loss") if self.adversary else ()
        return (Keys.LOSS.value, "recon_loss", "kl_loss", *self.loss_terms, *adversarial)

    def run(self) -> None:  # type: ignore[override]
        super(Trainer, self).run()  # past MONAI's Trainer, which would make a new gradient scaler
        if self.exit_code:
            raise SystemExit(self.exit_code)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> list[Losses]:  # type: ignore[override]
        image, _ = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        image = image.as_tensor() if isinstance(image, MetaTensor) else image
        first, last = self._accumulation_window()
        adversary = self.adversary if self.adversary and self.adversary.has_started(engine.state.epoch) else None

        engine.network.train()
        if first:
            self._start_step()
        with self._gradients_shared(engine.network, last):
            with torch.autocast(**self.autocast):
                reconstruction, z_mu, z_sigma = engine.inferer(image, engine.network)
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            losses = self._generator_losses(image, reconstruction.float(), z_mu, z_sigma, adversary)
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
            self.scaler.scale(losses[Keys.LOSS] / self.accumulation_steps).backward()
        if adversary is not None:
            with self._gradients_shared(adversary.discriminator, last):
                with torch.autocast(**self.autocast):
                    losses["discriminator_loss"] = adversary.discriminator_loss(image, reconstruction.detach())
                self.scaler.scale(losses["discriminator_loss"] / self.accumulation_steps).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)

        zero = losses[Keys.LOSS].new_zeros(())
        losses = {name: losses.get(name, zero).detach() for name in self.loss_names}  # zero: the adversary waits
        self.batches_of_step.append((batchdata.get("file", []), losses[Keys.LOSS]))
        if last:
            self._finish_step(losses, adversary)
        engine.state.output = [{Keys.IMAGE: image, Keys.PRED: reconstruction.detach(), **losses}]
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _generator_losses(
        self,
        image: torch.Tensor,
        reconstruction: torch.Tensor,
        z_mu: torch.Tensor,
        z_sigma: torch.Tensor,
        adversary: Adversary | None,
    ) -> Losses:
        losses = {"recon_loss": self.loss_function(reconstruction, image), "kl_loss": kl_divergence(z_mu, z_sigma)}
        total = losses["recon_loss"] + self.kl_weight * losses["kl_loss"]
        for name, term in self.loss_terms.items():
            losses[name] = term.function(reconstruction, image)
            total = total + term.weight * losses[name]
        if adversary is not None:
            with torch.autocast(**self.autocast):
                losses["adv_loss"] = adversary.generator_loss(reconstruction)
            total = total + adversary.weight * losses["adv_loss"]
        return {Keys.LOSS: total, **losses}

    def _start_step(self) -> None:
        self.batches_of_step = []
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary:
            self.adversary.optimizer.zero_grad(set_to_none=True)

    def _finish_step(self, losses: Losses, adversary: Adversary | None) -> None:
        pairs: list[tuple[Any, Any]] = [(self.optimizer, self.network)]
        if adversary is not None:
            pairs.append((adversary.optimizer, adversary.discriminator))
        norms = []
        for optimizer, network in pairs:
            self.scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm))
        # The gradients of all processes are in the norms, so all agree. A gradient scaler leaves a step out by itself, and
        # an overflow is its way to find the scale: there the losses decide what is counted.
        decisive = [loss for _, loss in self.batches_of_step] if self.scaler.is_enabled() else norms
        finite = self._are_finite(decisive)
        if finite or self.scaler.is_enabled():
            for optimizer, _ in pairs:
                self.scaler.step(optimizer)
            self.scaler.update()
        self._count_nonfinite(finite, losses)

    @staticmethod
    def _are_finite(values: list[torch.Tensor]) -> bool:
        """What a step decides by numbers: the planner, whose tensors have none, replaces it."""
        return bool(torch.isfinite(torch.stack(values)).all())

    def _count_nonfinite(self, finite: bool, losses: Losses) -> None:
        if finite:
            self.nonfinite_steps = 0
            self.finite_losses = losses
            return
        self.nonfinite_steps += 1
        batches = [files for files, loss in self.batches_of_step if not torch.isfinite(loss)]
        files = [file for batch in batches for file in batch]
        where = f"the loss of {', '.join(files)}" if batches else "the gradient"
        logger.warning(f"iteration {self.state.iteration}: {where} is not finite; the step is left out")
        if self.nonfinite_steps >= self.max_nonfinite_steps:
            last = ", ".join(f"{name} {value.item():.4g}" for name, value in self.finite_losses.items())
            raise FloatingPointError(
                f"{self.nonfinite_steps} steps in a row were not finite (`max_nonfinite_steps`), the last at iteration "
                f"{self.state.iteration}, because of {where}. The last finite losses were: {last or 'none'}. The weights "
                "have not moved since. Look at the volume, lower `lr` or set `amp` to false, and go on with `--resume true`."
            )

    @staticmethod
    def _gradients_shared(network: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Processes need each other's gradients only for the last batch of a step."""
        if isinstance(network, DistributedDataParallel) and not last:
            return network.no_sync()
        return contextlib.nullcontext()

    @property
    def step_is_complete(self) -> bool:
        """Whether the optimizer has used all gradients so far, so that none would be lost if the run stopped here."""
        return self._accumulation_window()[1]

    def _accumulation_window(self) -> tuple[bool, bool]:
        """Whether this batch is the first and the last of its optimizer step. The last step of an epoch may be shorter."""
        position = (self.state.iteration - 1) % self.state.epoch_length
        last = (position + 1) % self.accumulation_steps == 0 or position + 1 == self.state.epoch_length
        return position % self.accumulation_steps == 0, last
