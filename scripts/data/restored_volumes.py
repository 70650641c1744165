"""Restores a reconstruction to the shape, affine, intensities and header of the file that its volume came from.

What is needed for that is a record, which travels with the volume and is kept beside a latent.
"""

from __future__ import annotations

import gzip
import itertools
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
from monai.transforms import MapTransform, SpatialResample, TraceableTransform, Transform
from monai.utils import ImageMetaKey, MetaKeys
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.files import write_atomically
from scripts.bundle.json_files import Must, Share, checked
from scripts.data.dataset_tables import conditions_of, dataset_list_of
from scripts.data.file_names import output_path, stays_inside
from scripts.data.intensity_window import intensity_window, unscaled
from scripts.data.missing_voxels import put_back_missing
from scripts.data.volume_checks import check_memory
from scripts.data.volume_reader import (
    affine_of,
    geometry_note,
    is_read_by_nibabel,
    millimetres_per_unit,
    problem_of_affine,
    state_of,
)

__all__ = [
    "DescribeSourced",
    "NiftiHeader",
    "Record",
    "RestoreVolumed",
    "SaveImageOfRecordd",
    "as_stored",
    "clipped_shares",
    "conditions_and_list",
    "nifti_bytes",
    "on_source_grid",
    "record_of",
    "restore",
    "rows_of",
    "with_record",
]

RESTORING = {"preprocessed_shape": 8, "shape": 16}  # least bytes per voxel: two copies in float32, then two in float64
COMPRESSION = 1  # level of gzip; noisy voxels hardly shrink further at higher ones
MAX_SIZE = 2**15 - 1  # of an axis in NIfTI-1
SHIFT = 1e-3  # voxels by which an affine may be off through rounding
IN_MEMORY = "volume.nii.gz"  # name of a volume that came from no file
LEAST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MILLIMETRES = 2  # of NIfTI's units
RAW_FIELDS = {  # fields of a NIfTI header that say where voxels are and how far apart, as they are kept in a record
    "pixdim": ("pixdim",),
    "quatern": ("quatern_b", "quatern_c", "quatern_d"),
    "qoffset": ("qoffset_x", "qoffset_y", "qoffset_z"),
    "srow": ("srow_x", "srow_y", "srow_z"),
}
logger = logging.getLogger(__name__)

Size = Annotated[int, Must(f"a size from 1 to {MAX_SIZE} voxels", lambda n: 1 <= n <= MAX_SIZE)]
Row = tuple[float, float, float, float]
Affine = Annotated[
    tuple[Row, Row, Row, Row],
    Must("an affine whose axes span a volume", lambda rows: problem_of_affine(rows) is None and rows[3] == (0, 0, 0, 1)),
]
Number = Annotated[float, Must("a float32 number", lambda x: abs(x) <= LARGEST)]
Slope = Annotated[float, Must("a float32 number that is not 0", lambda x: LEAST <= abs(x) <= LARGEST)]
Byte = Annotated[int, Must("an integer from 0 to 255", lambda n: 0 <= n <= 255)]
Source = Annotated[
    str,
    Must("a path within a folder, of at most 4096 characters", lambda path: len(path) <= 4096 and stays_inside(path)),
]
Raw = float | None  # None stands for NaN
XformCode = Literal[0, 1, 2, 3, 4, 5]
DataType = Literal[
    "|i1",
    "|u1",
    "<i2",
    ">i2",
    "<u2",
    ">u2",
    "<i4",
    ">i4",
    "<u4",
    ">u4",
    "<i8",
    ">i8",
    "<u8",
    ">u8",
    "<f4",
    ">f4",
    "<f8",
    ">f8",
]


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """
    What the header of a NIfTI file says: where the voxels are, and how their intensities are stored.

    Args:
        affine: the affine by which the volume was read, from voxels to mm.
        data_type: of the stored voxels, as NumPy spells it, with the byte order.
        scl_slope: factor from stored to true intensities.
        scl_inter: what is added to them then.
        xyzt_units: NIfTI's code of the units.
        qform_code: NIfTI's code of the qform.
        sform_code: ditto of the sform.
        pixdim: the field of the header, as are the following: spacings, of time too.
        quatern: rotation of the qform.
        qoffset: origin of the qform.
        srow: the sform.
    """

    affine: Affine
    data_type: DataType
    scl_slope: Slope
    scl_inter: Number
    xyzt_units: Byte
    qform_code: XformCode
    sform_code: XformCode
    pixdim: tuple[Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw]
    quatern: tuple[Raw, Raw, Raw]
    qoffset: tuple[Raw, Raw, Raw]
    srow: tuple[Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw]

    @classmethod
    def of_file(cls, image: Any) -> NiftiHeader:
        """
        The header of a NIfTI file.

        Args:
            image: that nibabel has opened.
        """
        header = image.header
        return cls(
            affine=rows_of(affine_of(image)),
            data_type=header.get_data_dtype().str,
            scl_slope=float(image.dataobj.slope),  # nibabel clears those of the header when it reads a file
            scl_inter=float(image.dataobj.inter),
            **_fields(header),
        )

    @classmethod
    def of_affine(
        cls, affine: np.ndarray, *, xyzt_units: int = MILLIMETRES, qform_code: int = 0, sform_code: int = 1, **stored: Any
    ) -> NiftiHeader:
        """
        The header of a volume that did not come from a NIfTI file.

        Args:
            affine: from voxels to mm.
            xyzt_units: NIfTI's code of the units.
            qform_code: ditto of the qform.
            sform_code: ditto of the sform, above 0.
            stored: ``data_type``, ``scl_slope`` and ``scl_inter``, where voxels are not stored as float32.
        """
        header = nib.Nifti1Header()
        in_units = np.diag([*3 * [1 / millimetres_per_unit(xyzt_units)], 1.0]) @ affine
        header.set_sform(in_units, sform_code)
        header.set_qform(in_units, qform_code)
        header["xyzt_units"] = xyzt_units
        stored = {"data_type": "<f4", "scl_slope": 1.0, "scl_inter": 0.0, **stored}
        return cls(affine=rows_of(affine), **stored, **_fields(header))

    def to_nibabel(self, shape: tuple[int, ...]) -> nib.Nifti1Header:
        """The header of a file with voxels of this shape, without the slope."""
        data_type = np.dtype(self.data_type)
        header = nib.Nifti1Header(endianness=">" if data_type.byteorder == ">" else "<")
        header.set_data_dtype(data_type)
        header.set_data_shape(shape)  # this resets the end of `pixdim`
        for name, parts in RAW_FIELDS.items():
            values = np.array(getattr(self, name), dtype=np.float32).reshape(len(parts), -1)
            for part, value in zip(parts, values):
                header[part] = value.squeeze()
        for name in ("xyzt_units", "qform_code", "sform_code"):
            header[name] = getattr(self, name)
        return header


@dataclass(frozen=True, kw_only=True)
class Record(NiftiHeader):
    """
    What is known of a volume, and needed to restore it.

    Args:
        source: path of the file, relative to ``dataset_dir``.
        source_state: state of the file, see :py:func:`scripts.data.volume_reader.state_of`.
        keep_ending: whether names of results keep the file's ending.
        shape: of the file, ``HxWxD`` and further axes.
        preprocessed_shape: of the volume that the network sees, without padding, ``HxWxD``.
        preprocessed_affine: ditto, from voxels to mm.
        intensity_low: intensity of each channel that 0 stands for.
        intensity_high: intensity of each channel that 1 stands for.
        clipped: share of the voxels outside of that window.
        clipped_below: part of it.
        clipped_above: part of it.
        missing: masks of the voxels without a measurement, see :py:func:`scripts.data.missing_voxels.pack_missing`.
        conditions: numbers and words that are known of the volume.
        dataset_list: list of ``dataset.json`` that has the volume.

    Raises:
        ValueError: when the fields contradict each other, or the volume does not fit into memory.
    """

    source: Source
    source_state: str = ""
    keep_ending: bool = False
    shape: tuple[Size, ...]
    preprocessed_shape: tuple[Size, Size, Size]
    preprocessed_affine: Affine
    intensity_low: tuple[Number, ...]
    intensity_high: tuple[Number, ...]
    clipped: Share = 0.0
    clipped_below: Share = 0.0
    clipped_above: Share = 0.0
    missing: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, float | str] = field(default_factory=dict)
    dataset_list: Literal["training", "validation", "none"] | None = None

    def __post_init__(self) -> None:
        found = affine_of(self.to_nibabel(self.shape))
        if not _same_place(found, np.array(self.affine)):
            raise ValueError(f"`affine` is {self.affine}, but a file with the other fields has {found.tolist()}.")
        channels = [n for n in self.shape[3:] if n > 1] or [1]
        if len(self.shape) < 3 or not channels == [len(self.intensity_low)] == [len(self.intensity_high)]:
            raise ValueError(
                f"`shape` is {self.shape}, with {len(self.intensity_low)} `intensity_low` and {len(self.intensity_high)} "
                "`intensity_high`; there must be one of each for a channel."
            )
        with np.errstate(over="ignore"):
            widths = np.array(self.intensity_high, dtype=np.float32) - np.array(self.intensity_low, dtype=np.float32)
        if not ((widths > 0) & np.isfinite(widths)).all():
            raise ValueError(
                f"`intensity_low` {self.intensity_low} and `intensity_high` {self.intensity_high} are no window in float32."
            )
        if not self._lies_over():
            raise ValueError(
                f"`shape` {self.shape} with `affine` does not lie where `preprocessed_shape` {self.preprocessed_shape} with "
                "`preprocessed_affine` does."
            )
        voxels = {name: math.prod(getattr(self, name)[:3]) for name in RESTORING}
        num_bytes = len(self.intensity_low) * sum(size * voxels[name] for name, size in RESTORING.items())
        check_memory(num_bytes, f"`shape` {self.shape} and `preprocessed_shape` {self.preprocessed_shape}")

    def _lies_over(self) -> bool:
        """Whether the corners of the file's grid lie within the preprocessed grid or at most half its size away from it."""
        to_preprocessed = np.linalg.solve(self.preprocessed_affine, self.affine)
        corners = np.array(list(itertools.product(*((0, size - 1) for size in self.shape[:3]))))
        size = np.array(self.preprocessed_shape)
        found = nib.affines.apply_affine(to_preprocessed, corners)
        return bool((found >= -size / 2 - 2).all() and (found <= 1.5 * size + 2).all())


class DescribeSourced(MapTransform, TraceableTransform):
    """
    Trace the record of a volume, for :py:func:`record_of`. It must be the last transform.

    Args:
        keys: key of the image, which ``ScaleIntensityWindowd`` has scaled.
        dataset_dir: folder; the record holds the file's path relative to it.

    Raises:
        ValueError: when called, for a volume that was not read by the affine of its file.
    """

    def __init__(self, keys: KeysCollection, dataset_dir: str) -> None:
        super().__init__(keys)
        self.dataset_dir = dataset_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            record = _record(d[key], Path(self.dataset_dir), bool(d.get("keep_ending", False)))
            d[key] = with_record(d[key], record)
        return d


def with_record(image: torch.Tensor, record: Record) -> MetaTensor:
    """An image with the record of its volume, which MONAI's loaders and evaluators pass on."""
    traced: MetaTensor = image if isinstance(image, MetaTensor) else MetaTensor(image)
    traced.push_applied_operation({"class": DescribeSourced.__name__, "extra_info": {"record": record}})
    return traced


def record_of(image: MetaTensor) -> Record:
    """The record of an image's volume."""
    name = DescribeSourced.__name__
    return next(op for op in reversed(image.applied_operations) if op["class"] == name)["extra_info"]["record"]


class RestoreVolumed(MapTransform):
    """
    Restore predictions to the grid and the intensities of the file that the record of the image describes.

    Args:
        keys: keys of predictions, ``CxHxWxD`` in [0, 1]; they become float32, with the record.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d, record = dict(data), record_of(data[Keys.IMAGE])  # type: ignore[index]
        for key in self.key_iterator(d):
            values = torch.from_numpy(np.ascontiguousarray(_restored(d[key], record)))
            d[key] = with_record(MetaTensor(values, affine=torch.tensor(record.affine)), record)
        return d


class SaveImageOfRecordd(Transform):
    """
    Write a volume that :py:class:`RestoreVolumed` has restored, as compressed NIfTI in one step. MONAI Deploy, which keeps
    volumes in memory, leaves out transforms with ``SaveImage`` in their name.

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
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.moveaxis(data[self.key].as_tensor().numpy(), 0, -1)
        write_atomically(nifti_bytes(as_stored(values, record).reshape(record.shape), record), path)
        logger.info(f"{path}: {clipped_shares(vars(record))}")
        return dict(data)


def clipped_shares(window: Mapping[str, Any]) -> str:
    """How much of a volume the intensity window clipped, as text. Clipped air (below) is expected, clipped bone is not."""
    return (
        f"{window['clipped']:.2%} of the voxels were outside the intensity window "
        f"({window['clipped_below']:.2%} below, {window['clipped_above']:.2%} above)"
    )


def restore(image: torch.Tensor, record: Record) -> np.ndarray:
    """
    Undo the preprocessing of a volume.

    Args:
        image: ``CxHxWxD`` in [0, 1], possibly padded at the end of each axis. What lies outside [0, 1] is clipped.
        record: of the volume.

    Returns:
        the shape of the file, in its data type, as it is stored (before its slope).
    """
    return as_stored(np.moveaxis(_restored(image, record), 0, -1), record).reshape(record.shape)


def _restored(image: torch.Tensor, record: Record) -> np.ndarray:
    """True intensities on the file's grid, ``CxHxWxD`` in float32."""
    image = image.detach().as_subclass(torch.Tensor).cpu()
    for dim, size in enumerate(record.preprocessed_shape, start=1):
        image = image.narrow(dim, 0, size)
    image = unscaled(image.clamp(0, 1), record.intensity_low, record.intensity_high)
    values = np.moveaxis(on_source_grid(image, record), -1, 0)
    put_back_missing(values, record.missing)
    return values


def as_stored(values: np.ndarray, header: NiftiHeader) -> np.ndarray:
    """
    Intensities in the data type of a file, before its slope.

    Args:
        values: of any shape.
        header: of the file.
    """
    values = (values.astype(np.float64) - header.scl_inter) / header.scl_slope
    data_type = np.dtype(header.data_type)
    if np.issubdtype(data_type, np.integer):
        limits = np.iinfo(data_type)
        largest = np.float64(limits.max)
        if int(largest) > limits.max:  # of 64 bits, rounded up
            largest = np.nextafter(largest, 0)
        values = np.clip(np.rint(values), limits.min, largest)
    return values.astype(data_type)


def nifti_bytes(stored: np.ndarray, header: NiftiHeader, description: str = "") -> bytes:
    """
    A compressed NIfTI file, the same bytes for the same content.

    Args:
        stored: voxels as they are stored, of any shape.
        header: of the file.
        description: text for the header.
    """
    found = header.to_nibabel(stored.shape)
    found["descrip"] = description
    image = nib.Nifti1Image(stored, None, found)  # without an affine, so that the header stays as it is
    image.header.set_slope_inter(header.scl_slope, header.scl_inter)  # nibabel then writes the voxels as they are
    return gzip.compress(image.to_bytes(), COMPRESSION, mtime=0)


def _record(image: MetaTensor, dataset_dir: Path, keep_ending: bool) -> Record:
    path = str(image.meta.get(ImageMetaKey.FILENAME_OR_OBJ) or "")
    of_file: dict[str, Any] = {"source": IN_MEMORY}
    if path:
        of_file = {"source": Path(path).relative_to(dataset_dir).as_posix(), "source_state": state_of(path)}
        of_file |= conditions_and_list(path, str(dataset_dir))
    shape, header = _header(path, image)
    loaded = np.array(image.meta[MetaKeys.ORIGINAL_AFFINE])
    if not _same_place(loaded, np.array(header.affine)):
        raise ValueError(f"was read by the affine {loaded.tolist()}, but its header says {header.affine}.")
    window = intensity_window(image)
    described = {
        **vars(header),
        **of_file,
        "keep_ending": keep_ending,
        "shape": shape,
        "preprocessed_shape": tuple(image.shape[1:]),
        "preprocessed_affine": rows_of(image.affine),
        "intensity_low": tuple(window["low"]),
        "intensity_high": tuple(window["high"]),
        **{name: window[name] for name in ("clipped", "clipped_below", "clipped_above", "missing")},
    }
    return checked(described, Record)  # what is encoded can be decoded


def conditions_and_list(path: str, dataset_dir: str) -> dict[str, Any]:
    """The fields of a record that ``dataset.json`` and ``participants.tsv`` decide."""
    return {"conditions": conditions_of(path, dataset_dir), "dataset_list": dataset_list_of(path, dataset_dir)}


def _header(path: str, image: MetaTensor) -> tuple[tuple[int, ...], NiftiHeader]:
    """Shape and header of the file that a result is written as."""
    if is_read_by_nibabel(path):
        source: Any = nib.load(path)
        note = geometry_note(source)
        if note is not None:
            logger.warning(f"{path} {note}")
        if isinstance(source.header, nib.Nifti1Header):
            return tuple(map(int, source.shape)), NiftiHeader.of_file(source)
    shape = tuple(map(int, image.meta[MetaKeys.SPATIAL_SHAPE])) + ((len(image),) if len(image) > 1 else ())
    return shape, NiftiHeader.of_affine(np.array(image.meta[MetaKeys.ORIGINAL_AFFINE]))


def _fields(header: nib.Nifti1Header) -> dict[str, Any]:
    """The fields of a header that a record keeps as they are."""
    raw = {name: np.concatenate([np.ravel(header[part]) for part in parts]) for name, parts in RAW_FIELDS.items()}
    return {
        **{name: tuple(float(x) if np.isfinite(x) else None for x in values) for name, values in raw.items()},
        **{name: int(header[name]) for name in ("xyzt_units", "qform_code", "sform_code")},
    }


def rows_of(affine: Any) -> Any:
    """A matrix as a tuple of its rows."""
    return tuple(tuple(map(float, row)) for row in affine)


def _same_place(affine: np.ndarray, other: np.ndarray) -> bool:
    """Whether two affines are equal up to the rounding of headers."""
    return np.allclose(affine, other, rtol=1e-5, atol=SHIFT * np.abs(other[:3, :3]).max())


def on_source_grid(image: torch.Tensor, record: Record) -> np.ndarray:
    """``CxHxWxD`` on the file's grid, ``HxWxDxC``: reordered, and resampled only where the spacing was changed."""
    affine, preprocessed = np.array(record.affine), np.array(record.preprocessed_affine)
    orientation = nib.io_orientation(np.linalg.solve(affine, preprocessed))
    moved = preprocessed @ nib.orientations.inv_ornt_aff(orientation, record.preprocessed_shape)
    values = nib.apply_orientation(image.movedim(0, -1).numpy(), orientation)
    if values.shape[:3] == record.shape[:3] and _same_place(moved, affine):
        return values
    channels_first = np.ascontiguousarray(np.moveaxis(values, -1, 0))  # PyTorch takes no negative strides
    volume: Any = MetaTensor(torch.from_numpy(channels_first), affine=torch.from_numpy(moved))
    resample = SpatialResample(mode="bilinear", padding_mode="border")
    volume = resample(volume, dst_affine=torch.tensor(affine), spatial_size=record.shape[:3])
    return volume.as_tensor().movedim(0, -1).numpy()
