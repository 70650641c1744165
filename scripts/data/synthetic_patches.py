"""What all transforms that make a patch share: a size, and a seed that is drawn for each patch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

__all__ = ["SyntheticPatchd"]


class SyntheticPatchd(RandomizableTransform, MapTransform):
    """
    Put a synthetic patch under each key, which :py:meth:`make` makes from a seed.

    Args:
        keys: keys to write, ``1xHxWxD`` in [0, 1].
        spatial_size: of the patch, voxels.
    """

    def __init__(self, keys: KeysCollection, spatial_size: Sequence[int]) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.spatial_size = tuple(spatial_size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.keys:
            d[key] = self.make(int(self.R.randint(2**31)))[None]
        return d

    def make(self, seed: int) -> torch.Tensor:
        """A patch, ``HxWxD``."""
        raise NotImplementedError
