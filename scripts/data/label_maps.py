"""Which volumes are label maps and segmentations instead of images: by their names, and by their voxels."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["LABEL_MAP", "LabelMapError", "RefuseLabelMapd", "has_label_name", "is_label_map"]

WORDS = re.compile(
    r"(?:^|[^a-z])(?:labels?(?:tr|ts|val)?|seg|segs|segmentations?|masks?|[ad]seg|(?:prob|pve)seg|rois?|annot(?:ation)?s?)"
    r"(?:[^a-z]|$)"
)
WORDS_OF_FILES = re.compile(  # not of folders, where they may name a study
    r"(?:^|[^a-z])(?:brain_?masks?|label_?maps?|lesions?|gt|ground_?truth|atlas(?:es)?|contours?|wmparc|aparc|parc"
    r"|parcellations?)(?:[^a-z]|$)"
)
BIDS_ENTITY = re.compile(r"(?:^|_)(?:sub|ses|acq|task|run|rec|dir|space|res|ce|mod|inv|echo|part)-[^_.]+")
CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # as in liverMask
MAX_LABELS = 256
FEW_LABELS = 4  # whose regions may be thin
LEAST_EQUAL = 0.6  # share of a voxel's neighbours that have its label
SAMPLED = 2**20  # about so many voxels are looked at before all are
LABEL_MAP = "looks like a label map: few integers, in regions. If it is an image, name it in `image_glob`."


class LabelMapError(ValueError):
    """A volume that is left out."""


class RefuseLabelMapd(MapTransform):
    """
    Refuse volumes that look like label maps, see :py:func:`is_label_map`.

    Args:
        keys: key of the image, ``CxHxWxD``, as it was read.

    Raises:
        LabelMapError: when called, for a label map.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            if is_label_map(np.moveaxis(np.asarray(data[key]), 0, -1)):
                raise LabelMapError(LABEL_MAP)
        return dict(data)


def has_label_name(relative: Path) -> bool:
    """Whether a path names labels, in a folder (``labelsTr``) or in the file (``label-GM_probseg``, ``liverMask``)."""
    words = [CAPITAL.sub("_", BIDS_ENTITY.sub("_", part)).lower() for part in relative.parts]
    return bool(WORDS_OF_FILES.search(words[-1])) or any(map(WORDS.search, words))


def is_label_map(values: np.ndarray) -> bool:
    """
    Whether voxels are labels: at most 256 integers, most of which have neighbours with the same one; or at most 4 integers.

    Args:
        values: of a volume, ``HxWxD`` or ``HxWxDxC``.
    """
    sampled = values[:, :: max(1, values.size // SAMPLED)]  # lines along the first axis
    labels, counts = np.unique(sampled, return_counts=True)
    if len(labels) == 1 or not _are_labels(labels):
        return False
    one, other = sampled[1:], sampled[:-1]
    inside = (one != labels[counts.argmax()]) | (other != labels[counts.argmax()])  # not in the background
    in_regions = len(labels) <= FEW_LABELS or (one == other)[inside].mean() > LEAST_EQUAL
    return bool(in_regions) and _are_labels(np.unique(values))


def _are_labels(labels: np.ndarray) -> bool:
    return len(labels) <= MAX_LABELS and bool((labels == np.rint(labels)).all())
