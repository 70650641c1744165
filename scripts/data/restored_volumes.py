"""Restores a reconstruction to the shape, affine, intensities and header of the file that its volume came from, by a record
that travels with the volume and is kept beside a latent."""

from __future__ import annotations

import gzip
import logging
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, TraceableTransform, Transform
from monai.utils import ImageMetaKey, MetaKeys
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.json_files import Must, PositiveInt, Share, checked
from scripts.data.dataset_tables import conditions_of, dataset_list_of
from scripts.data.file_names import output_path, stays_inside
from scripts.data.grids import back_on_grid
from scripts.data.intensity_window import intensity_window, put_back_missing, unscaled
from scripts.data.volume_reader import HEADER, NiftiHeader, check_memory, spans_volume, state_of

RESTORING = 16  # least bytes per voxel: two copies in float64
COMPRESSION = 1  # level of gzip; noisy voxels hardly shrink further at higher ones
IN_MEMORY = "volume.nii.gz"  # name of a volume that came from no file
WIDTHS = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # of an intensity window
logger = logging.getLogger(__name__)

Row = tuple[float, float, float, float]
Affine = Annotated[
    tuple[Row, Row, Row, Row],
    Must("an affine whose axes span a volume", lambda rows: spans_volume(rows) and rows[3] == (0, 0, 0, 1)),
]
Source = Annotated[
    str,
    Must("a path within a folder, of at most 4096 characters", lambda path: len(path) <= 4096 and stays_inside(path)),
]


@dataclass(frozen=True, kw_only=True)
class Record(NiftiHeader):
    """
    What is known of a volume, and needed to restore it.

    Args:
        source: path of the file, relative to ``dataset_dir``.
        source_state: hash of :py:func:`scripts.data.volume_reader.state_of`.
        keep_ending: whether names of results keep the file's ending.
        preprocessed_shape: shape of the volume that the network sees, without padding, ``HxWxD``.
        preprocessed_affine: its affine, from voxels to mm.
        intensity_low: intensity of each channel that 0 stands for.
        intensity_high: intensity of each channel that 1 stands for.
        clipped_below: share of the voxels below that window.
        clipped_above: share of the voxels above it.
        missing: masks of :py:func:`scripts.data.intensity_window.pack_missing`.
        conditions: numbers and words that are known of the volume.
        dataset_list: list of ``dataset.json`` that has the volume.

    Raises:
        ValueError: when the fields contradict each other, or the volume does not fit into memory.
    """

    source: Source
    source_state: str = ""
    keep_ending: bool = False
    preprocessed_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    preprocessed_affine: Affine
    intensity_low: tuple[float, ...]
    intensity_high: tuple[float, ...]
    clipped_below: Share = 0.0
    clipped_above: Share = 0.0
    missing: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, float | str] = field(default_factory=dict)
    dataset_list: Literal["training", "validation", "none"] | None = None

    def __post_init__(self) -> None:
        try:
            grid, kind = self.grid, np.dtype(self.stored["data_type"]).kind
        except Exception as error:  # nibabel raises errors of any type
            raise ValueError(f"`header` is not that of a NIfTI file ({error}).") from error
        if kind not in "iuf" or len(grid.shape) != 3 or min(self.shape) < 1 or not spans_volume(grid.affine):
            raise ValueError(f"`header` is that of no volume: {kind!r} {self.shape}, affine {grid.affine.tolist()}.")
        channels = [n for n in self.shape[3:] if n > 1] or [1]
        if not channels == [len(self.intensity_low)] == [len(self.intensity_high)]:
            raise ValueError(f"`intensity_low` or `intensity_high` is not of {channels} channels, as the `header` is.")
        with np.errstate(over="ignore", invalid="ignore"):
            widths = np.array(self.intensity_high, dtype=np.float32) - np.array(self.intensity_low, dtype=np.float32)
        if not ((widths >= WIDTHS[0]) & (widths <= WIDTHS[1])).all():
            raise ValueError(f"`intensity_low` {self.intensity_low}, `intensity_high` {self.intensity_high} are no window.")
        corners, size = grid.corners_in(np.array(self.preprocessed_affine)), np.array(self.preprocessed_shape)
        if not ((corners >= -size / 2 - 2) & (corners <= 1.5 * size + 2)).all():  # at most half its size away
            raise ValueError(f"`header` does not lie where `preprocessed_affine` does: {self.affine.tolist()}.")
        voxels = math.prod(grid.shape) + math.prod(self.preprocessed_shape)
        check_memory(RESTORING * channels[0] * voxels, f"voxels of {self.shape} and {self.preprocessed_shape}")


class DescribeSourced(MapTransform, TraceableTransform):
    """
    Trace the :py:class:`Record` of a volume. It must be the last transform.

    Args:
        keys: key of the image, which ``VolumeReader`` has read and ``ScaleIntensityWindowd`` has scaled.
        dataset_dir: folder; the record holds the file's path relative to it.

    Raises:
        ValueError: when called, for a volume that another reader has read, whose affine may not be that of the file.
    """

    def __init__(self, keys: KeysCollection, dataset_dir: str) -> None:
        super().__init__(keys)
        self.dataset_dir = dataset_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = with_record(d[key], self._record(d[key], bool(d.get("keep_ending", False))))
        return d

    def _record(self, image: MetaTensor, keep_ending: bool) -> Record:
        path = str(image.meta.get(ImageMetaKey.FILENAME_OR_OBJ) or "")
        if not path:
            shape = [*map(int, image.meta[MetaKeys.SPATIAL_SHAPE]), *([len(image)] if len(image) > 1 else [])]
            header = NiftiHeader.of_affine(np.array(image.meta[MetaKeys.ORIGINAL_AFFINE]), shape).header
            known = {"source": IN_MEMORY, "header": header}
        elif HEADER not in image.meta:
            raise ValueError(f"{path} was not read by scripts.data.VolumeReader, as it must be.")
        else:
            source = Path(path).relative_to(self.dataset_dir).as_posix()
            known = {"source": source, "header": image.meta[HEADER], "source_state": state_of(path)}
            known |= conditions_and_list(path, self.dataset_dir)
        grid = {"preprocessed_shape": image.shape[1:], "preprocessed_affine": image.affine.tolist()}
        # checked, so that what is encoded can be decoded
        return checked({**known, **grid, **intensity_window(image), "keep_ending": keep_ending}, Record)


def with_record(image: torch.Tensor, record: Any) -> MetaTensor:
    """An image with the record of its volume, which MONAI's loaders and evaluators pass on."""
    traced: MetaTensor = image if isinstance(image, MetaTensor) else MetaTensor(image)
    traced.push_applied_operation({"class": DescribeSourced.__name__, "extra_info": {"record": record}})
    return traced


def record_of(image: MetaTensor) -> Any:
    name = DescribeSourced.__name__
    return next(op for op in reversed(image.applied_operations) if op["class"] == name)["extra_info"]["record"]


class RestoreVolumed(MapTransform):
    """
    Restore predictions to the grid and the intensities of the image's file.

    Args:
        keys: keys of predictions, ``CxHxWxD`` in [0, 1]; they become float32, with the record of the image.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d, record = dict(data), record_of(data[Keys.IMAGE])  # type: ignore[index]
        for key in self.key_iterator(d):
            values = MetaTensor(torch.from_numpy(restore(d[key], record)), affine=torch.from_numpy(record.affine))
            d[key] = with_record(values, record)
        return d


class SaveImageOfRecordd(Transform):
    """
    Write a volume that :py:class:`RestoreVolumed` has restored, as compressed NIfTI. MONAI Deploy, which keeps volumes in
    memory, leaves out transforms with ``SaveImage`` in their name.

    Args:
        key: key of the volume.
        output_dir: folder to write to; the file gets the relative path that the source has in its folder.
        postfix: text that is added to the name.
    """

    def __init__(self, key: str, output_dir: str, postfix: str) -> None:
        self.key, self.output_dir, self.postfix = key, output_dir, postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        record = record_of(data[self.key])
        path = output_path(self.output_dir, record.source, self.postfix, record.keep_ending)
        save_nifti(data[self.key].movedim(0, -1).numpy().reshape(record.shape), record, path)
        logger.info(f"{path}: {clipped_shares(record)}")
        return dict(data)


def clipped_shares(record: Record) -> str:
    """How much of a volume its intensity window clipped, as text."""
    return f"{record.clipped_below:.2%} of the voxels are below the intensity window and {record.clipped_above:.2%} above"


def restore(image: torch.Tensor, record: Record) -> np.ndarray:
    """
    Undo the preprocessing of a volume.

    Args:
        image: ``CxHxWxD`` in [0, 1], beyond which it is clipped; possibly padded at the end of each axis.
        record: what is known of the volume.

    Returns:
        intensities on the file's grid, ``CxHxWxD`` in float32.
    """
    image = image.detach().as_subclass(torch.Tensor).cpu()
    for dim, size in enumerate(record.preprocessed_shape, start=1):
        image = image.narrow(dim, 0, size)
    image = unscaled(image.clamp(0, 1), record.intensity_low, record.intensity_high)
    values = back_on_grid(image.numpy(), np.array(record.preprocessed_affine), record.grid)
    put_back_missing(values, record.missing)
    return values


def save_nifti(values: np.ndarray, header: NiftiHeader, path: Path, description: str = "") -> str:
    """
    Write intensities as compressed NIfTI, rounded to the data type and the slope of the header, and return the file's
    SHA-256. The same content has the same bytes.
    """
    found, scale = header.with_shape(values.shape).nibabel, header.stored
    data_type = np.dtype(scale["data_type"])
    stored = (values.astype(np.float64) - scale["scl_inter"]) / scale["scl_slope"]
    if data_type.kind in "iu":
        limits = np.iinfo(data_type)
        largest = np.nextafter(float(limits.max), 0) if data_type.itemsize == 8 else limits.max  # float64 would round it up
        stored = np.clip(np.rint(stored), limits.min, largest)
    found["descrip"] = description
    image = nib.Nifti1Image(stored.astype(data_type), None, found)  # without an affine, so that the header stays as it is
    image.header.set_slope_inter(scale["scl_slope"], scale["scl_inter"])  # nibabel then writes the voxels as they are
    content = gzip.compress(image.to_bytes(), COMPRESSION, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(content, path)
    return content_hash(content)


def save_labels(labels: np.ndarray, header: NiftiHeader, path: Path) -> str:
    """Write a label map in the smallest data type that holds its labels, and return the file's SHA-256."""
    data_type = np.result_type(*(np.min_scalar_type(int(end)) for end in (labels.min(), labels.max())))
    return save_nifti(labels, header.stored_as(data_type.str), path)


def conditions_and_list(path: str, dataset_dir: str) -> dict[str, Any]:
    """The fields of a record that ``dataset.json`` and ``participants.tsv`` decide."""
    return {"conditions": conditions_of(path, dataset_dir), "dataset_list": dataset_list_of(path, dataset_dir)}
