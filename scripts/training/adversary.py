"""The discriminator of adversarial training, with its losses, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.losses import PatchAdversarialLoss
from monai.optimizers import WarmupCosineSchedule
from torch.nn.parallel import DistributedDataParallel

from scripts.layers.float32_convolutions import keep_in_float32

__all__ = ["Adversary"]


class Adversary:
    """
    A patch discriminator with its optimizer and schedule, as in VQGAN (Esser et al., https://arxiv.org/abs/2012.09841), with
    a least-squares loss.

    Args:
        discriminator: MONAI's ``PatchDiscriminator``, wrapped for distributed training or not. Its last output is the map of
            scores.
        optimizer: function that makes the optimizer of its parameters.
        num_steps: number of its steps, over which the learning rate falls to zero along a cosine.
        weight: weight of the adversarial loss in the autoencoder's.
        warmup_epochs: number of epochs that the autoencoder trains alone first.
    """

    def __init__(
        self,
        discriminator: torch.nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        num_steps: int,
        weight: float,
        warmup_epochs: int,
    ) -> None:
        self.discriminator = discriminator
        keep_in_float32(discriminator)  # some of its convolutions, under the CPU's autocast
        self.optimizer = optimizer(discriminator.parameters())
        self.lr_scheduler = WarmupCosineSchedule(self.optimizer, warmup_steps=0, t_total=num_steps)
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def has_started(self, epoch: int) -> bool:
        """Whether the warm-up is over in ``epoch``, which counts from 1."""
        return epoch > self.warmup_epochs

    def generator_loss(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """
        Loss of a ``reconstruction`` (``BxCxHxWxD``), smallest where the discriminator takes it for an image. The gradient
        goes to the reconstruction, not to the discriminator.
        """
        # Not through the wrapper for distributed training, which would wait for gradients of the frozen weights.
        wrapped = isinstance(self.discriminator, DistributedDataParallel)
        judge: Any = self.discriminator.module if wrapped else self.discriminator
        judge.requires_grad_(False)
        try:
            return self.loss(judge(reconstruction)[-1], target_is_real=True, for_discriminator=False)
        finally:
            judge.requires_grad_(True)

    def discriminator_loss(self, image: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """
        Loss of the discriminator, smallest where it tells images from reconstructions.

        Args:
            image: ``BxCxHxWxD``.
            reconstruction: the same shape, detached from the autoencoder.
        """
        # one forward pass for both, as the wrapper for distributed training expects
        real, fake = self.discriminator(torch.cat([image, reconstruction.to(image.dtype)]))[-1].chunk(2)
        return 0.5 * (
            self.loss(real, target_is_real=True, for_discriminator=True)
            + self.loss(fake, target_is_real=False, for_discriminator=True)
        )
