"""The trainer of the autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.precision import dtype_name
from scripts.training.losses import Adversary, LossTerm, kl_divergence
from scripts.training.resumable_trainer import Output, ResumableTrainer, TrainedPart

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.10 has none

__all__ = ["AutoencoderTrainer"]


class AutoencoderTrainer(ResumableTrainer):
    """
    Trainer of an autoencoder. The target is the image, and the loss is the sum of

    - ``recon_loss``: ``loss_function`` of the reconstruction;
    - ``kl_loss``: the KL divergence of the latent, times ``kl_weight``;
    - each of ``loss_terms``, times its weight;
    - ``adv_loss``: the adversary's loss of the reconstruction, times its weight, once its warm-up is over. From then on the
      adversary makes its own step on the same batch (``discriminator_loss``).

    ``engine.state.output`` holds ``loss`` and its parts without their weights.

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
        A trainer for given batches, without the data and handlers of a run; for estimates, tests and benchmarks.

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
            amp_dtype=dtype_name(amp_dtype or torch.bfloat16),
            **{"kl_weight": 1e-8, **kwargs},
        )

    @property
    def loss_names(self) -> tuple[str, ...]:
        adversarial = ("adv_loss", "discriminator_loss") if self.adversary else ()
        return (Keys.LOSS.value, "recon_loss", "kl_loss", *self.loss_terms, *adversarial)

    @property
    def active_adversary(self) -> Adversary | None:
        """The adversary, once its warm-up is over."""
        return self.adversary if self.adversary and self.state.epoch > self.adversary.warmup_epochs else None

    def trained_parts(self) -> list[TrainedPart]:
        adversary, own = self.active_adversary, super().trained_parts()
        return [*own, (adversary.discriminator, adversary.optimizer, adversary.lr_scheduler)] if adversary else own

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> Output:  # type: ignore[override]
        adversary = self.active_adversary
        self.start_batch()
        image, *_ = self.prepare(batchdata)
        with self.gradients_shared(self.network):
            with torch.autocast(**self.autocast):
                reconstruction, z_mu, z_sigma = self.inferer(image, self.network)
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            losses = self.compute_losses(image, reconstruction.float(), z_mu, z_sigma)
            self.fire_event(IterationEvents.LOSS_COMPLETED)
            self.backward(losses[Keys.LOSS])
        reconstruction = reconstruction.detach()
        if adversary is not None:
            with self.gradients_shared(adversary.discriminator):
                with torch.autocast(**self.autocast):
                    losses["discriminator_loss"] = adversary.discriminator_loss(image, reconstruction)
                self.backward(losses["discriminator_loss"])
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)

        zero = image.new_zeros((), dtype=torch.float32)  # for a loss that is not computed yet
        losses = {name: losses.get(name, zero).detach() for name in self.loss_names}
        self.step_or_skip(losses, batchdata.get("file", []))
        self.state.output = [{Keys.IMAGE: image, Keys.PRED: reconstruction, **losses}]
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    def compute_losses(
        self, image: torch.Tensor, pred: torch.Tensor, z_mu: torch.Tensor, z_sigma: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        The autoencoder's losses.

        Args:
            image: ``BxCxHxWxD``.
            pred: reconstruction, the same shape, in float32.
            z_mu: mean of the latent, ``B`` times its shape.
            z_sigma: standard deviation of the latent, the same shape.

        Returns:
            ``"loss"``, which is minimised, and its parts without their weights.
        """
        losses = {"recon_loss": self.loss_function(pred, image), "kl_loss": kl_divergence(z_mu, z_sigma)}
        total = losses["recon_loss"] + self.kl_weight * losses["kl_loss"]
        for name, term in self.loss_terms.items():
            losses[name] = term.function(pred, image)
            total = total + term.weight * losses[name]
        if (adversary := self.active_adversary) is not None:
            with torch.autocast(**self.autocast):
                losses["adv_loss"] = adversary.generator_loss(pred)
            total = total + adversary.weight * losses["adv_loss"]
        return {Keys.LOSS: total, **losses}
