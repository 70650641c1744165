"""Several codecs on the same volumes: each volume is loaded once and goes through all of them, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from monai.engines import SupervisedEvaluator

from scripts.evaluation.block_dct import BlockDCT
from scripts.layers.factors import by

__all__ = ["Codec", "ComparisonEvaluator", "block_dct_of", "with_block_dcts"]

CODEC = "codec"  # key of an output: the name of the codec
FACTORS = "total_downsample_factor"


@dataclass(frozen=True)
class Codec:
    """
    Something that compresses volumes.

    Args:
        network: with ``reconstruct(x)``, which takes volumes ``BxCxHxWxD`` of any size and returns the same shape.
        total_downsample_factor: voxels of one position in the latent, along each axis.
        latent_channels: values at one position.
        image_channels: number of channels of the volumes.
        weights: path of the file that it was read from.
    """

    network: nn.Module
    total_downsample_factor: tuple[int, ...]
    latent_channels: int
    image_channels: int = 1
    weights: str = ""

    @property
    def voxels_per_value(self) -> float:
        """Values of a volume, all channels counted, for one value of its latent."""
        return math.prod(self.total_downsample_factor) * self.image_channels / self.latent_channels


def block_dct_of(codec: Codec) -> str:
    """The name of the block-wise cosine transform that keeps as many values as a codec, in blocks of its factor."""
    return f"block DCT, {codec.latent_channels} of {by(codec.total_downsample_factor)}"


def with_block_dcts(codecs: Mapping[str, Codec]) -> dict[str, Codec]:
    """Codecs, and behind them the block-wise cosine transforms of their sizes, each size once."""
    transforms = {}
    for codec in codecs.values():
        network = BlockDCT(codec.total_downsample_factor, codec.latent_channels)
        transforms[block_dct_of(codec)] = Codec(network, codec.total_downsample_factor, codec.latent_channels)
    return {**codecs, **transforms}


class ComparisonEvaluator(SupervisedEvaluator):
    """
    MONAI's ``SupervisedEvaluator`` with an iteration for each volume and codec, the codecs of a volume in a row, and after
    them the cosine transforms of :py:func:`with_block_dcts`. One reconstruction is in memory at a time. An output also has
    the name of its codec, ``codec``, and ``total_downsample_factor``.

    Args:
        network: the codecs by name.
        val_data_loader: of the volumes, one at a time.
        kwargs: further arguments of ``SupervisedEvaluator``.
    """

    def __init__(self, network: Mapping[str, Codec], val_data_loader: Any, **kwargs: Any) -> None:
        self.codecs = with_block_dcts(network)
        first = next(iter(network.values())).network
        super().__init__(network=first, val_data_loader=_ForEach(val_data_loader, list(self.codecs)), **kwargs)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> Any:
        name = batchdata[CODEC]
        engine.network = self.codecs[name].network
        outputs: Any = super()._iteration(engine, batchdata)  # a list, with the default `decollate`
        for output in outputs:
            output[CODEC] = name
            output[FACTORS] = torch.tensor(self.codecs[name].total_downsample_factor)
        return outputs


class _ForEach(Sized):
    """Each batch of a loader once for each name."""

    def __init__(self, loader: Any, names: list[str]) -> None:
        self.loader, self.names = loader, names

    def __len__(self) -> int:
        return len(self.loader) * len(self.names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            for name in self.names:
                yield {**batch, CODEC: name}
