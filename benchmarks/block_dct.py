"""The reference code: a block-wise 3D cosine transform that keeps as many numbers as a latent has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.fft import dctn, idctn

from scripts.layers.resampling import pad_to_multiple


def block_dct_reconstruction(image: torch.Tensor, factors: Sequence[int], count: int) -> torch.Tensor:
    """
    Keep the same ``count`` coefficients of every block, those with the most energy over this volume.

    Args:
        image: ``1x1xHxWxD``; sizes that the factors do not divide are padded as the network pads them, and cropped back.
        factors: size of a block along each axis.
        count: coefficients per block.

    Returns:
        the same shape, clipped to [0, 1].
    """
    shape = image.shape[2:]
    padded = pad_to_multiple(image, factors)[0, 0].numpy()
    grid = [n // f for n, f in zip(padded.shape, factors)]
    blocks = padded.reshape(grid[0], factors[0], grid[1], factors[1], grid[2], factors[2]).transpose(0, 2, 4, 1, 3, 5)
    spectrum = dctn(blocks, axes=(3, 4, 5), norm="ortho")
    energy = (spectrum**2).sum((0, 1, 2))
    spectrum *= energy >= sorted(energy.ravel())[-min(count, energy.size)]
    restored = idctn(spectrum, axes=(3, 4, 5), norm="ortho").transpose(0, 3, 1, 4, 2, 5).reshape(padded.shape)
    return torch.from_numpy(restored[: shape[0], : shape[1], : shape[2]].copy())[None, None].clamp(0, 1)
