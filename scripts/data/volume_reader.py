"""Reads volumes of all formats, each with a header whose one affine orients, resamples, encodes and restores it."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple, optional_import
from nibabel.fileholders import FileHolder

from scripts.bundle.machine import GIB, total_memory
from scripts.data.dicom_series import read_dicom
from scripts.data.grids import Grid

nrrd, _ = optional_import("nrrd")

HEADER = "nifti_header"  # of the metadata: the header of a volume's file, in hexadecimal
NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz", ".mgh", ".mgz")
PAIR = (".hdr", ".img")  # two files of one volume
GZIP_SUFFIXES = (".gz", ".mgz")
NRRD_SUFFIXES = (".nrrd", ".nhdr")
NRRD_SPACES = {"ras": (1, 1, 1), "las": (-1, 1, 1), "lps": (-1, -1, 1)}  # signs that make them right, anterior and superior
NRRD_UNITS = {**dict.fromkeys(("mm", "millimeters", ""), 1.0), **dict.fromkeys(("um", "µm", "microns"), 1e-3)}  # in mm
NIFTI_UNITS = {1: 1e3, 3: 1e-3}  # metres and micrometres in mm; files without a unit are in mm
MILLIMETRES = 2  # of NIfTI's units
GEOMETRY = (  # fields of a NIfTI header that say where voxels are and how far apart
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
FLAT = 1e-6  # a determinant of three unit vectors up to this: they lie in a plane, up to rounding
FARTHEST, SHORTEST = 1e9, 1e-9  # mm, from the origin and of a voxel's edge
NOTED_SHIFT = 0.1  # voxels between sform and qform
FLOAT_SIZE = 4  # bytes
BLOCK = 2**20  # bytes that are read at once
logger = logging.getLogger(__name__)
warn_once = functools.cache(logger.warning)  # an epoch reads each volume again


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """
    What a result keeps of the header of its volume's file: where voxels are, and how their intensities are stored.

    Args:
        header: NIfTI header, in hexadecimal.
    """

    header: str

    @classmethod
    def of_file(cls, image: Any) -> NiftiHeader:
        """Shape, geometry, data type, byte order, slope and units of an image that nibabel has opened."""
        if not isinstance(image.header, nib.Nifti1Header):
            return cls.of_affine(image.affine, image.shape)
        header = nib.Nifti1Header(endianness=image.header.endianness)
        header.set_data_dtype(image.header.get_data_dtype())
        header.set_data_shape(image.shape)  # this resets the end of `pixdim`
        header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)  # nibabel clears those of the header it has read
        for name in GEOMETRY:
            header[name] = image.header[name]
        return cls(header=header.binaryblock.hex())

    @classmethod
    def of_affine(
        cls, affine: np.ndarray, shape: Sequence[int] = (), *, like: NiftiHeader | None = None, qform_code: int = 0
    ) -> NiftiHeader:
        """
        The header of float32 voxels that did not come from a NIfTI file.

        Args:
            affine: from voxels to mm.
            shape: ``HxWxD`` and further axes.
            like: header with the same units and code of the sform; None for mm and the code 1.
            qform_code: NIfTI's code of the qform.
        """
        header = nib.Nifti1Header()
        header.set_data_dtype(np.float32)
        header.set_data_shape(shape)
        header["xyzt_units"] = MILLIMETRES if like is None else like.nibabel["xyzt_units"]
        in_units = np.diag([*3 * [1 / _millimetres(header)], 1.0]) @ affine
        header.set_sform(in_units, max(1, 0 if like is None else int(like.nibabel["sform_code"])))
        header.set_qform(in_units, qform_code)
        return cls(header=header.binaryblock.hex())

    @property
    def nibabel(self) -> nib.Nifti1Header:
        return nib.Nifti1Header(bytes.fromhex(self.header), check=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.nibabel.get_data_shape()))

    @property
    def affine(self) -> np.ndarray:
        """
        4x4, from voxels to mm (right, anterior, superior), as nibabel, FSL and SPM choose it: the sform where its code is
        above 0, otherwise the qform where its code is, otherwise that of the voxel sizes alone. An sform that spans no
        volume gives way to a valid qform.
        """
        header = self.nibabel
        sform, qform = _forms(header)
        if sform is None and qform is None:
            sform = header.get_sform() if header["sform_code"] > 0 else header.get_base_affine()
        return np.diag([*3 * [_millimetres(header)], 1.0]) @ (qform if sform is None else sform)

    @property
    def grid(self) -> Grid:
        return Grid(self.shape[:3], self.affine)

    @property
    def stored(self) -> dict[str, Any]:
        """How voxels are stored: the arguments of :py:meth:`stored_as`."""
        slope, inter = self.nibabel.get_slope_inter()
        data_type = self.nibabel.get_data_dtype().str
        return {"data_type": data_type, "scl_slope": 1.0 if slope is None else slope, "scl_inter": inter or 0.0}

    def stored_as(self, data_type: str, scl_slope: float = 1.0, scl_inter: float = 0.0) -> NiftiHeader:
        """The header of the same voxels in another data type, as NumPy spells it, and with another slope and intercept."""
        header = self.nibabel
        header.set_data_dtype(data_type)
        header.set_slope_inter(scl_slope, scl_inter)
        return NiftiHeader(header=header.binaryblock.hex())

    def with_shape(self, shape: Sequence[int]) -> NiftiHeader:
        """The header of a volume with another number of channels or voxels."""
        header = self.nibabel
        pixdim = header["pixdim"].copy()
        header.set_data_shape(shape)  # this resets the end of `pixdim`
        header["pixdim"] = pixdim
        return NiftiHeader(header=header.binaryblock.hex())


class VolumeReader(ImageReader):
    """
    MONAI reader for ``LoadImage(reader=...)``, see :py:func:`read_volume`.

    Args:
        image_channels: number of channels that a volume must have; None for an array of any shape.
    """

    def __init__(self, image_channels: int | None = None) -> None:
        super().__init__()
        self.image_channels = image_channels

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return True

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> str:
        """The path alone: after an error here, MONAI would try its own readers, which change headers."""
        (path,) = ensure_tuple(data)
        return str(path)

    def get_data(self, img: str) -> tuple[np.ndarray, dict]:
        values, header = read_volume(img, self.image_channels)
        return values, {
            MetaKeys.AFFINE: header.affine,
            MetaKeys.ORIGINAL_AFFINE: header.affine,
            MetaKeys.SPATIAL_SHAPE: np.asarray(values.shape[:3]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if values.ndim == 3 else -1,
            MetaKeys.SPACE: SpaceKeys.RAS,
            HEADER: header.header,
        }


def read_volume(path: str, image_channels: int | None = None) -> tuple[np.ndarray, NiftiHeader]:
    """
    Read a volume to the end of its file, so that a wrong checksum is found.

    Args:
        path: NIfTI, Analyze, MGH or NRRD file, or file or folder of a DICOM series.
        image_channels: number of channels that it must have; None for an array of any shape.

    Returns:
        voxels ``HxWxD`` or ``HxWxDxC``, in the units of the file, and the header that a result of this volume gets.

    Raises:
        ValueError: for whatever cannot be read or has no orientation and spacing, with the path and the reason.
    """
    try:
        if os.path.exists(path) and not os.access(path, os.R_OK):  # of which nibabel says that it is no volume
            raise PermissionError("no permission to read it")
        if _is_read_by_nibabel(path):
            values, header = _read_with_nibabel(path, image_channels)
        else:
            values, affine = _read_nrrd(path) if path.lower().endswith(NRRD_SUFFIXES) else read_dicom(path)
            header = NiftiHeader.of_affine(affine, values.shape)
            if image_channels is not None:
                check_shape(values.shape, image_channels)
        if not spans_volume(header.affine):
            raise ValueError(f"has no orientation and spacing: its affine is {header.affine.tolist()}.")
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # readers raise errors of any type
        raise ValueError(f"{path} cannot be read to its end ({type(error).__name__}: {error}).") from error
    channels = [n for n in values.shape[3:] if n > 1]
    return values.reshape(*values.shape[:3], *channels), header


def read_header(path: str) -> NiftiHeader:
    """The header that :py:func:`read_volume` returns, without reading the voxels where the format allows it."""
    return NiftiHeader.of_file(nib.load(path)) if _is_read_by_nibabel(path) else read_volume(path)[1]


def check_shape(shape: Sequence[int], image_channels: int) -> None:
    """Raise a ValueError, with text that follows the path, unless a shape, with the channels last, is that of a volume."""
    channels = [n for n in shape[3:] if n != 1] or [1]
    if len(shape) < 3 or min(shape[:3]) < 2 or channels != [image_channels]:
        raise ValueError(
            f"has the shape {tuple(map(int, shape))}; needed are three axes (a 2D slice has two) and "
            f"{image_channels} channels, `image_channels`."
        )


def check_memory(num_bytes: float, what: str) -> None:
    """Raise a ValueError when ``what`` takes more bytes than this machine has, as far as that is known."""
    total = total_memory("cpu")
    if total is not None and num_bytes > total:
        raise ValueError(f"{what} take {num_bytes / GIB:,.0f} GiB, and this machine has {total / GIB:,.0f} GiB.")


def identity_of(path: Path) -> tuple[int, int]:
    """The same for all paths to one volume: links to a file or folder, and the header and the voxels of a pair."""
    voxels = path.with_suffix(".img")
    status = (voxels if path.suffix == ".hdr" and voxels.is_file() else path).stat()
    return status.st_dev, status.st_ino


def state_of(path: str) -> str:
    """A SHA-256 of the name, size and time of each file of a volume, which changes when one is replaced."""
    volume = Path(path)
    pair = map(volume.with_suffix, PAIR) if volume.suffix in PAIR else [volume]
    files = [file for file in (volume.iterdir() if volume.is_dir() else pair) if file.is_file()]
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def spans_volume(affine: Any) -> bool:
    """Whether an affine (4x4, from voxels to mm) defines orientation and spacing."""
    axes = np.asarray(affine, dtype=np.float64)[:3]
    if not (np.abs(axes) <= FARTHEST).all():  # true for NaN as well
        return False
    lengths = np.linalg.norm(axes[:, :3], axis=0)
    return bool(lengths.min() > SHORTEST and abs(np.linalg.det(axes[:, :3] / lengths)) > FLAT)


def _millimetres(header: nib.Nifti1Header) -> float:
    """The unit of a header's lengths in mm."""
    return NIFTI_UNITS.get(int(header["xyzt_units"]) % 8, 1.0)


def _forms(header: nib.Nifti1Header) -> list[np.ndarray | None]:
    """The sform and the qform; None for one whose code is not above 0, or that spans no volume."""
    forms: list[np.ndarray | None] = []
    for name in ("sform", "qform"):
        form = None
        if header[f"{name}_code"] > 0:
            with contextlib.suppress(ValueError):  # a quaternion longer than 1
                form = getattr(header, f"get_{name}")()
        forms.append(form if form is not None and spans_volume(form) else None)
    return forms


def _is_read_by_nibabel(path: str) -> bool:
    return path.lower().endswith(NIBABEL_SUFFIXES) and not Path(path).is_dir()


def _read_with_nibabel(path: str, image_channels: int | None) -> tuple[np.ndarray, NiftiHeader]:
    image: Any = nib.load(path)
    data_type = image.get_data_dtype()
    if data_type.kind not in "iuf":
        raise ValueError(f"has voxels of the type {data_type}; convert them to one gray value each.")
    if image_channels is not None:
        check_shape(image.shape, image_channels)
    if getattr(image.header, "is_single", False) and image.dataobj.offset == 0:
        raise ValueError("says that its voxels begin where its header does (`vox_offset` 0); write it again.")
    check_memory(FLOAT_SIZE * math.prod(map(int, image.shape)), f"its {'x'.join(map(str, image.shape))} voxels in float32")
    _log_geometry(path, image)
    holder = image.file_map["image"]
    if not str(holder.filename).lower().endswith(GZIP_SUFFIXES):
        return np.asanyarray(image.dataobj), NiftiHeader.of_file(image)
    with gzip.open(holder.filename) as file:
        image = type(image).from_file_map({**image.file_map, "image": FileHolder(fileobj=file)})
        values = np.asanyarray(image.dataobj)
        while file.read(BLOCK):  # nibabel stops before the checksum
            pass
    return values, NiftiHeader.of_file(image)


def _log_geometry(path: str, image: Any) -> None:
    """Warn of affines that disagree by more than a tenth of a voxel, of unusable ones, and of those without a side."""
    header = image.header
    if not isinstance(header, nib.Nifti1Header):
        is_analyze = isinstance(header, nib.AnalyzeHeader)
        if is_analyze and np.array_equal(image.affine, header.get_best_affine()):  # SPM's .mat beside it would say otherwise
            warn_once(f"{path} is an Analyze file: its first axis is taken to run from right to left")
    elif header["sform_code"] > 0 and header["qform_code"] > 0:
        sform, qform = _forms(header)
        if sform is None or qform is None:
            warn_once(f"{path} has no valid {'sform; its qform' if sform is None else 'qform; its sform'} is used")
        elif (shift := Grid(image.shape[:3], qform).shift_to(sform)) > NOTED_SHIFT:
            warn_once(f"{path} has an sform and a qform that are up to {shift:.3g} voxels apart; the sform is used")


def _read_nrrd(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels with the spatial axes first, and their affine."""
    values, header = nrrd.read(path)
    words, units = str(header.get("space")).lower().split("-"), {unit.strip() for unit in header.get("space units", ["mm"])}
    signs = NRRD_SPACES.get("".join(word[0] for word in words) if len(words) > 1 else words[0])
    rows = [np.full(3, np.nan) if row is None else np.asarray(row, float) for row in header.get("space directions", [])]
    spatial = [axis for axis, row in enumerate(rows) if np.isfinite(row).all()]
    if signs is None or len(spatial) != 3 or len(units) > 1 or not units <= NRRD_UNITS.keys():
        raise ValueError(
            f"has the `space` {header.get('space')}, `space directions` of {len(spatial)} axes and the `space units` "
            f"{sorted(units)}; needed are one of {', '.join(NRRD_SPACES)}, three axes, and mm."
        )
    (scale,) = (NRRD_UNITS[unit] for unit in units)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([rows[axis] for axis in spatial], axis=1)
    affine[:3, 3] = header.get("space origin", np.zeros(3))
    return np.moveaxis(values, spatial, (0, 1, 2)), np.diag([*(scale * sign for sign in signs), 1.0]) @ affine
