"""The reference code: a block-wise 3D cosine transform that keeps as many numbers as a latent has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from scipy.fft import dctn, idctn

from scripts.layers.resampling import pad_to_multiple

__all__ = ["BlockDCT", "block_dct_reconstruction"]


def block_dct_reconstruction(image: torch.Tensor, factors: Sequence[int], count: int) -> torch.Tensor:
    """
    Keep the same ``count`` coefficients of every block, those with the most energy over this volume.

    Args:
        image: ``1xCxHxWxD``; sizes that the factors do not divide are padded as the network pads them, and cropped back.
        factors: size of a block along each axis.
        count: coefficients per block, of all channels together.

    Returns:
        the same shape on the CPU, clipped to [0, 1].
    """
    shape = image.shape[2:]
    padded = pad_to_multiple(image, factors)[0].cpu().numpy()
    grid = [n // f for n, f in zip(padded.shape[1:], factors)]
    blocks = padded.reshape(-1, grid[0], factors[0], grid[1], factors[1], grid[2], factors[2]).transpose(1, 3, 5, 0, 2, 4, 6)
    spectrum = dctn(blocks, axes=(4, 5, 6), norm="ortho")
    energy = (spectrum**2).sum((0, 1, 2))
    spectrum *= energy >= sorted(energy.ravel())[-min(count, energy.size)]
    restored = idctn(spectrum, axes=(4, 5, 6), norm="ortho").transpose(3, 0, 4, 1, 5, 2, 6).reshape(padded.shape)
    return torch.from_numpy(restored[:, : shape[0], : shape[1], : shape[2]].copy())[None].clamp(0, 1)


class BlockDCT(nn.Module):
    """
    :py:func:`block_dct_reconstruction` in the place of an autoencoder.

    Args:
        factors: size of a block along each axis.
        count: coefficients per block.
    """

    def __init__(self, factors: Sequence[int], count: int) -> None:
        super().__init__()
        self.factors, self.count = factors, count

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: one volume, ``1xCxHxWxD``.

        Returns:
            the same shape on the same device.
        """
        return block_dct_reconstruction(x, self.factors, self.count).to(x.device)
