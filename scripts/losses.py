"""Terms of the training loss that neither PyTorch nor MONAI has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["LossTerm", "kl_divergence"]


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss: ``weight * function(reconstruction, image)``, both ``BxCxHxWxD`` in float32."""

    weight: float
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kl_divergence(z_mu: torch.Tensor, z_sigma: torch.Tensor) -> torch.Tensor:
    """
    Kullback-Leibler divergence of a diagonal normal distribution from the standard one (Kingma and Welling,
    https://arxiv.org/abs/1312.6114, appendix B), in float32 whatever the input: the logarithm of a float16 variance is how
    training runs become NaN.

    Args:
        z_mu: mean, ``B`` times the latent's shape.
        z_sigma: standard deviation, the same shape.

    Returns:
        the divergence in nats, summed over the latent and averaged over the batch.
    """
    z_mu, variance = z_mu.float(), z_sigma.float().square()
    return 0.5 * (z_mu.square() + variance - variance.log() - 1).flatten(1).sum(1).mean()
