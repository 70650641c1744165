"""What a spatial condition is, an image or a label map, and the planes that it is encoded as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from scripts.bundle.json_files import Must, shortened
from scripts.data.intensity_window import Range

MOST_CLASSES = 2**10
PLANES_OF_CLASSES = 16  # up to so many classes have a plane each; more share planes, one for each bit of their numbers
LARGEST_LABEL = 2**31 - 1
Classes = Annotated[
    tuple[int, ...],
    Must(
        f"up to {MOST_CLASSES} different labels, ascending and without 0",
        lambda found: len(found) <= MOST_CLASSES and list(found) == sorted({*found} - {0}),
    ),
]


@dataclass(frozen=True)
class SpatialKind:
    """
    A spatial condition, as all volumes of a data set have it.

    Args:
        classes: labels of a label map without 0, which is the background; empty for an image.
        intensity_percentiles: percentiles of :py:class:`scripts.data.ScaleIntensityWindowd`, for an image.
        intensity_range: its ``intensity_range``.
    """

    classes: Classes = ()
    intensity_percentiles: Range = (0.0, 99.9)
    intensity_range: Range | None = None

    @property
    def is_label_map(self) -> bool:
        return bool(self.classes)

    @property
    def num_planes(self) -> int:
        """Number of volumes that are encoded: 1 for an image, one for each class or, of more than 16, for each bit."""
        count = len(self.classes)
        return max(1, count if count <= PLANES_OF_CLASSES else count.bit_length())

    @property
    def names(self) -> list[str]:
        """What each plane is."""
        if self.num_planes == len(self.classes):
            return [f"class {label}" for label in self.classes]
        # the number of a class follows from all of them
        return [f"bit {bit} of {self.classes}" for bit in range(self.num_planes)] if self.classes else ["image"]

    def planes(self, volume: torch.Tensor, name: str) -> Iterator[torch.Tensor]:
        """
        The volumes that are encoded: of an image in [0, 1] or labels, ``BxCxHxWxD``, ``num_planes`` of the same shape,
        float32 in [0, 1].

        Raises:
            ValueError: for labels that are not among the classes, with text that begins with ``name``.
        """
        if not self.is_label_map:
            yield volume.float()
            return
        self.check(labels_in(volume.flatten(0, 2).cpu().numpy()), name)
        if len(self.classes) <= PLANES_OF_CLASSES:
            for label in self.classes:
                yield (volume == label).float()
            return
        known, order = torch.tensor((0, *self.classes), dtype=volume.dtype, device=volume.device).sort()
        numbers = order.to(torch.int16)[torch.searchsorted(known, volume.contiguous(), out_int32=True)]
        for bit in range(self.num_planes):
            yield (numbers >> bit & 1).float()

    def check(self, labels: Sequence[int], name: str) -> None:
        """Raise a ValueError, which begins with ``name``, for labels that are not among the classes."""
        unknown = sorted({*labels} - {0, *self.classes})
        if unknown:
            known = shortened([0, *self.classes])
            raise ValueError(f"{name} has labels that are not among the classes: {shortened(unknown)}; known are {known}.")


def labels_in(values: np.ndarray) -> list[int]:
    """
    The labels of a label map, ``HxWxD`` of any type, ascending.

    Raises:
        ValueError: for voxels that are no labels, or several channels, with text that follows the name of the volume.
    """
    if values.ndim > 3:
        raise ValueError(f"has {values.shape[-1]} channels; a label map has one, with an integer for each class.")
    labels = np.unique(np.concatenate([np.unique(part) for part in values]))  # in parts, for memory
    strange = labels[(labels != np.rint(labels)) | (labels < -LARGEST_LABEL) | (labels > LARGEST_LABEL)]
    if len(strange):
        raise ValueError(f"is no label map: it has voxels of {strange[0]:.10g}, and labels are integers.")
    if len(labels) > MOST_CLASSES + 1:
        raise ValueError(f"is no label map: it has more than {MOST_CLASSES} different values.")
    return labels.astype(np.int64).tolist()
