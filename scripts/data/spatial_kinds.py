"""What a spatial condition is: an image, or a label map, which is encoded as planes of zeros and ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from scripts.bundle.json_files import Must

__all__ = ["SpatialKind", "labels_in"]

MOST_CLASSES = 2**10
PLANES_OF_CLASSES = 16  # up to so many classes have a plane each; more share planes, one for each bit of their numbers
LARGEST_LABEL = 2**31 - 1
Classes = Annotated[
    tuple[int, ...],
    Must(f"up to {MOST_CLASSES} different labels, ascending and without 0", lambda c: len(c) <= MOST_CLASSES and _ascend(c)),
]
Range = Annotated[tuple[float, float], Must("two numbers with the lower one first", lambda pair: pair[0] < pair[1])]


@dataclass(frozen=True)
class SpatialKind:
    """
    A spatial condition, as all volumes of a data set have it.

    Args:
        classes: labels of a label map without 0, which is the background; empty for an image.
        intensity_percentiles: of an image, that become 0 and 1, see
            :py:class:`scripts.data.intensity_window.ScaleIntensityWindowd`.
        intensity_range: of an image, instead.
    """

    classes: Classes = ()
    intensity_percentiles: Range = (0.0, 99.9)
    intensity_range: Range | None = None

    @property
    def is_label_map(self) -> bool:
        """Whether it is a label map."""
        return bool(self.classes)

    @property
    def num_planes(self) -> int:
        """Number of volumes that are encoded: 1 for an image, one for each class or, of more than 16, for each bit."""
        count = len(self.classes)
        return max(1, count if count <= PLANES_OF_CLASSES else count.bit_length())

    def summary(self) -> str:
        """In words, for the log."""
        if not self.is_label_map:
            return "an image"
        shown = ", ".join(map(str, self.classes[:20])) + ", ..." * (len(self.classes) > 20)
        return f"a label map of {len(self.classes)} classes ({shown}) in {self.num_planes} planes"

    @property
    def names(self) -> list[str]:
        """What each plane is."""
        if self.num_planes == len(self.classes):
            return [f"class {label}" for label in self.classes]
        # the number of a class follows from all of them
        return [f"bit {bit} of {self.classes}" for bit in range(self.num_planes)] if self.classes else ["image"]

    def planes(self, volume: torch.Tensor, name: str) -> Iterator[torch.Tensor]:
        """
        The volumes that are encoded.

        Args:
            volume: ``BxCxHxWxD``, an image in [0, 1] or labels.
            name: of the volume, for errors.

        Returns:
            ``num_planes`` volumes of the shape of ``volume``, float32 in [0, 1].

        Raises:
            ValueError: for labels that are not among the classes.
        """
        if not self.is_label_map:
            yield volume.float()
            return
        self.check(volume, name)
        if len(self.classes) <= PLANES_OF_CLASSES:
            for label in self.classes:
                yield (volume == label).float()
            return
        known, order = torch.tensor((0, *self.classes), dtype=volume.dtype, device=volume.device).sort()
        numbers = order.to(torch.int16)[torch.searchsorted(known, volume.contiguous(), out_int32=True)]
        for bit in range(self.num_planes):
            yield (numbers >> bit & 1).float()

    def check(self, labels: torch.Tensor, name: str) -> None:
        """
        Check the voxels of a label map.

        Args:
            labels: of any shape.
            name: of the volume, for errors.

        Raises:
            ValueError: for labels that are not among the classes.
        """
        try:
            unknown = sorted(set(labels_in(labels.cpu().numpy())) - {0, *self.classes})
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if unknown:
            shown = ", ".join(map(str, unknown[:10])) + ", ..." * (len(unknown) > 10)
            known = ", ".join(map(str, self.classes[:20])) + ", ..." * (len(self.classes) > 20)
            raise ValueError(f"{name} has labels that are not among the classes: {shown}; known are 0, {known}.")


def labels_in(values: np.ndarray) -> list[int]:
    """
    The labels of a label map, ascending.

    Args:
        values: voxels, of any shape and type.

    Raises:
        ValueError: for voxels that are no labels, with text that follows the name of the volume.
    """
    found: set[int] = set()
    for part in values.reshape(-1, values.shape[-1]) if values.ndim < 3 else values:  # in parts, for memory
        labels = np.unique(part)
        with np.errstate(invalid="ignore"):
            whole = labels.astype(np.int64)
        strange = labels[(whole != labels) | (abs(whole) > LARGEST_LABEL)]
        if len(strange):
            raise ValueError(f"is no label map: it has voxels of {strange[0]:.10g}, and labels are integers.")
        found.update(whole.tolist())
        if len(found) > MOST_CLASSES + 1:
            raise ValueError(f"is no label map: it has more than {MOST_CLASSES} different values.")
    return sorted(found)


def _ascend(classes: tuple[int, ...]) -> bool:
    return all(one < other for one, other in itertools.pairwise(classes)) and 0 not in classes
