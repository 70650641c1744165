"""Terms of the training loss, and the adversary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from monai.losses import JukeboxLoss, PatchAdversarialLoss
from monai.optimizers import WarmupCosineSchedule
from torch.nn import functional

from scripts.layers.float32_convolutions import keep_in_float32


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss: ``weight * function(reconstruction, image)``, both ``BxCxHxWxD`` in float32."""

    weight: float
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ReconstructionLoss:
    """Mean absolute error plus ``mse_weight`` times the mean squared error, of reconstruction and image, ``BxCxHxWxD``."""

    mse_weight: float

    def __call__(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.l1_loss(pred, target) + self.mse_weight * functional.mse_loss(pred, target)


def kl_divergence(z_mu: torch.Tensor, z_sigma: torch.Tensor) -> torch.Tensor:
    """
    Kullback-Leibler divergence of a diagonal normal distribution from the standard one (Kingma and Welling,
    https://arxiv.org/abs/1312.6114, appendix B) in nats, summed over the latent and averaged over the batch. It is computed
    in float32: with the logarithm of a float16 variance, training can become NaN.

    Args:
        z_mu: mean, ``B`` times the latent's shape.
        z_sigma: standard deviation, the same shape.
    """
    z_mu, variance = z_mu.float(), z_sigma.float().square()
    return 0.5 * (z_mu.square() + variance - variance.log() - 1).flatten(1).sum(1).mean()


class SpectralLoss(JukeboxLoss):
    """
    MONAI's ``JukeboxLoss`` (Dhariwal et al., https://arxiv.org/abs/2005.00341), the squared difference of the amplitudes of
    all frequencies, with a gradient that is finite where an amplitude is zero. In MONAI's it is NaN there, and the first
    reconstructions of a network with ``linear_shortcut`` have such frequencies.
    """

    def _get_fft_amplitude(self, images: torch.Tensor) -> torch.Tensor:
        return torch.fft.fftn(images, s=self.fft_signal_size, dim=self.fft_dim, norm=self.fft_norm).abs()


class Adversary:
    """
    A patch discriminator with its optimizer and schedule, as in VQGAN (Esser et al., https://arxiv.org/abs/2012.09841), and
    a least-squares loss.

    Args:
        discriminator: MONAI's ``PatchDiscriminator``. Its last output is the map of scores.
        optimizer: function that makes the optimizer of its parameters.
        num_steps: number of its steps, over which the learning rate falls to zero along a cosine.
        weight: weight of the adversarial loss in the autoencoder's.
        warmup_epochs: number of epochs that the autoencoder trains alone first.
        device: device that it is moved to, None to leave it where it is.

    Attributes:
        network: the discriminator as it is trained; :py:class:`AutoencoderTrainer` wraps it where it trains a wrapped
        network.
    """

    def __init__(
        self,
        discriminator: torch.nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        num_steps: int,
        weight: float,
        warmup_epochs: int,
        device: torch.device | str | None = None,
    ) -> None:
        if device is not None:
            discriminator.to(device)
        keep_in_float32(discriminator)  # some of its convolutions, under the CPU's autocast
        self.discriminator = self.network = discriminator
        self.optimizer = optimizer(discriminator.parameters())
        self.lr_scheduler = WarmupCosineSchedule(self.optimizer, warmup_steps=0, t_total=num_steps)
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def generator_loss(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """Loss of a ``reconstruction`` (``BxCxHxWxD``), to which alone the gradient goes."""
        # not through the wrapper for distributed training, which would wait for gradients of the frozen weights
        self.discriminator.requires_grad_(False)
        try:
            return self.loss(self.discriminator(reconstruction)[-1], target_is_real=True, for_discriminator=False)
        finally:
            self.discriminator.requires_grad_(True)

    def discriminator_loss(self, image: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """Loss of the discriminator, of an image (``BxCxHxWxD``) and its reconstruction, detached from the autoencoder."""
        # one forward pass for both, as the wrapper for distributed training expects
        real, fake = self.network(torch.cat([image, reconstruction.to(image.dtype)]))[-1].chunk(2)
        return 0.5 * (
            self.loss(real, target_is_real=True, for_discriminator=True)
            + self.loss(fake, target_is_real=False, for_discriminator=True)
        )
