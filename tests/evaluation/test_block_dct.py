"""The block-wise cosine transform keeps the strongest coefficients of a volume, over all of its channels."""

from __future__ import annotations

import torch

from scripts.evaluation.block_dct import BlockDCT, block_dct_reconstruction

X = torch.arange(32) + 0.5
WAVE = 0.5 + 0.4 * torch.cos(torch.pi * 3 * X / 8)  # two of a block's 512 coefficients


def test_block_dct_keeps_what_a_volume_has_most_of():
    image = WAVE.expand(1, 1, 20, 24, 32)
    assert torch.allclose(block_dct_reconstruction(image, [8, 8, 8], 2), image, atol=1e-5)
    assert (block_dct_reconstruction(image, [8, 8, 8], 1) - 0.5).abs().max() < 1e-5  # the mean is the stronger one


def test_channels_share_the_coefficients_of_a_block():
    image = torch.stack([WAVE.expand(20, 21, 32), torch.full((20, 21, 32), 0.25)])[None]
    assert torch.allclose(BlockDCT([8, 8, 8], 3).reconstruct(image), image, atol=1e-5)
    two = BlockDCT([8, 8, 8], 2).reconstruct(image)
    assert torch.allclose(two[:, 0], image[:, 0], atol=1e-5)
    assert two[:, 1].abs().max() < 1e-5  # its mean is the weakest of the three
