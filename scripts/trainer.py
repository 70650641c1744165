"""The trainer of the autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer, Trainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys

from scripts.inferer import autocast_dtype
from scripts.losses import kl_divergence

__all__ = ["AutoencoderTrainer"]


class AutoencoderTrainer(SupervisedTrainer):
    """
    MONAI's ``SupervisedTrainer`` for an autoencoder: the target is the image, and the loss is ``loss_function`` of the
    reconstruction plus ``kl_weight`` times the KL divergence of the latent.

    Mixed precision works on any device, gradients are clipped, and the gradient scaler lives as long as the trainer, so
    that a resumed one keeps its scale. ``engine.state.output`` holds the image, the reconstruction and the parts of the
    loss: ``loss``, ``recon_loss``, ``kl_loss``.

    Args:
        kl_weight: weight of the KL divergence, which is summed over the latent.
        amp_dtype: ``"bfloat16"``, or ``"float16"`` with a gradient scaler.
        max_grad_norm: clip gradients to this norm.
        kwargs: arguments of ``SupervisedTrainer``; ``amp`` switches mixed precision on, ``accumulation_steps`` counts the
            batches of one optimizer step.
    """

    def __init__(self, *, kl_weight: float, amp_dtype: str, max_grad_norm: float = 1.0, **kwargs: Any) -> None:
        super().__init__(decollate=False, **kwargs)  # handlers read scalars, no need to take batches apart
        self.kl_weight = kl_weight
        self.max_grad_norm = max_grad_norm
        self.autocast = {"device_type": self.state.device.type, "dtype": autocast_dtype(amp_dtype), "enabled": self.amp}
        self.scaler: Any = torch.amp.GradScaler(self.state.device.type, enabled=self.amp and amp_dtype == "float16")

    def run(self) -> None:  # type: ignore[override]
        super(Trainer, self).run()  # past MONAI's Trainer, which would make a new gradient scaler

    def _iteration(self, engine: Any, batchdata: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        image, _ = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        image = image.as_tensor() if isinstance(image, MetaTensor) else image
        first, last = self._accumulation_window()

        engine.network.train()
        if first:
            engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**self.autocast):
            reconstruction, z_mu, z_sigma = engine.inferer(image, engine.network)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        recon_loss = engine.loss_function(reconstruction.float(), image)
        kl_loss = kl_divergence(z_mu, z_sigma)
        loss = recon_loss + self.kl_weight * kl_loss
        engine.fire_event(IterationEvents.LOSS_COMPLETED)

        self.scaler.scale(loss / self.accumulation_steps).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if last:
            self.scaler.unscale_(engine.optimizer)
            torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_grad_norm)
            self.scaler.step(engine.optimizer)
            self.scaler.update()
        engine.state.output = {
            Keys.IMAGE: image,
            Keys.PRED: reconstruction.detach(),
            Keys.LOSS: loss.detach(),
            "recon_loss": recon_loss.detach(),
            "kl_loss": kl_loss.detach(),
        }
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    @property
    def step_is_complete(self) -> bool:
        """Whether the optimizer has used all gradients so far, so that none would be lost if the run stopped here."""
        return self._accumulation_window()[1]

    def _accumulation_window(self) -> tuple[bool, bool]:
        """Whether this batch is the first and the last of its optimizer step. The last step of an epoch may be shorter."""
        position = (self.state.iteration - 1) % self.state.epoch_length
        last = (position + 1) % self.accumulation_steps == 0 or position + 1 == self.state.epoch_length
        return position % self.accumulation_steps == 0, last
