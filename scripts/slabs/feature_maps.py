"""Feature maps in the host's memory or in files, read and written in slabs along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.layers.factors import padded_size
from scripts.layers.resampling import pad_at_end

__all__ = ["FeatureMap", "PaddedImage"]

CHANNEL_BLOCK = 16  # libraries reorder maps in blocks of this many channels


class FeatureMap:
    """
    A map that is read and written in slabs.

    Args:
        tensor: the map, or the file that holds it.
        dim: dimension along which slabs are cut.
        shape: of a map in a file.
        dtype: of a map in a file.
    """

    def __init__(
        self, tensor: torch.Tensor | Path, dim: int, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        self._content, self.dim = tensor, dim
        self.shape = torch.Size(shape) if isinstance(tensor, Path) else tensor.shape
        self.dtype = dtype if isinstance(tensor, Path) else tensor.dtype
        self.moments: torch.Tensor | None = None  # number, sum and sum of squares of each channel's values, 3xBxC

    @property
    def rows(self) -> int:
        """Size along ``dim``."""
        return self.shape[self.dim]

    @property
    def row_values(self) -> int:
        """Values of one row, its channels rounded up to the blocks in which libraries reorder them."""
        channels = self.shape[1] if self.shape[1] == 1 else -(-self.shape[1] // CHANNEL_BLOCK) * CHANNEL_BLOCK
        return self.shape.numel() // self.rows // self.shape[1] * channels

    def tensor(self) -> torch.Tensor:
        """The whole map. Of one in a file, the parts in use count as memory of the process until the tensor is deleted."""
        if isinstance(self._content, torch.Tensor):
            return self._content
        return torch.from_file(str(self._content), shared=True, size=self.shape.numel(), dtype=self.dtype).view(self.shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows from ``start`` up to ``stop``."""
        return self.tensor().narrow(self.dim, start, stop - start)

    def write(self, start: int, slab: torch.Tensor) -> None:
        """Replace the rows from ``start`` on."""
        self.read(start, start + slab.shape[self.dim]).copy_(slab)


class PaddedImage(FeatureMap):
    """An image that reads as if its edges were repeated until the factors divide it."""

    def __init__(self, image: torch.Tensor, factors: Sequence[int], dim: int) -> None:
        super().__init__(image, dim)
        self._given = self.shape
        self.shape = torch.Size([*image.shape[:2], *padded_size(image.shape[2:], factors)])

    def read(self, start: int, stop: int) -> torch.Tensor:
        last = self._given[self.dim]
        # at least one row, which is then repeated
        slab = self.tensor().narrow(self.dim, min(start, last - 1), max(min(stop, last) - start, 1))
        sizes = [stop - start if dim == self.dim else self.shape[dim] for dim in range(2, slab.ndim)]
        return slab if sizes == list(slab.shape[2:]) else pad_at_end(slab, sizes)
