"""Reads volumes of all formats, each with the one affine by which it is oriented, resampled, encoded and restored."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple, optional_import
from nibabel.fileholders import FileHolder

__all__ = [
    "VolumeReader",
    "affine_of",
    "geometry_note",
    "identity_of",
    "is_read_by_nibabel",
    "millimetres_per_unit",
    "problem_of_affine",
    "read_volume",
    "state_of",
]

NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz", ".mgh", ".mgz")
PAIR = (".hdr", ".img")  # two files of one volume
GZIP_SUFFIXES = (".gz", ".mgz")
NRRD_SUFFIXES = (".nrrd", ".nhdr")
OTHER_SUFFIXES = (
    ".mha",
    ".mhd",
    ".mnc",
    ".par",
    ".rec",
    ".head",
    ".brik",
    ".npy",
    ".npz",
    ".png",
    ".jpg",
    ".tif",
    ".tiff",
    ".vtk",
)
NRRD_SPACES = {  # signs that make them right, anterior and superior
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
}
NIFTI_UNITS = {1: 1e3, 3: 1e-3}  # mm, by the code of metres and micrometres; files without a unit are in mm
NRRD_UNITS = {  # ditto
    **dict.fromkeys(("", "mm", "millimeter", "millimeters"), 1.0),
    **dict.fromkeys(("um", "µm", "micron", "microns", "micrometer", "micrometers"), 1e-3),
}
FLAT = 1e-6  # a determinant of three unit vectors up to this: they lie in a plane, up to rounding
FARTHEST, SHORTEST = 1e9, 1e-9  # mm, from the origin and of a voxel's edge
NOTED_SHIFT = 0.1  # voxels between sform and qform
BLOCK = 2**20  # bytes that are read at once


class VolumeReader(ImageReader):
    """
    MONAI reader for ``LoadImage(reader=...)``, see :py:func:`read_volume`. Files are opened in :py:meth:`get_data`: after an
    error in ``read``, MONAI would try its own readers, which change headers.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return True

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> str:
        """The path of the only file or folder."""
        (path,) = ensure_tuple(data)
        return str(path)

    def get_data(self, img: str) -> tuple[np.ndarray, dict]:
        """Voxels and metadata of a path."""
        values, affine = read_volume(img)
        return values, {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(values.shape[:3]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if values.ndim == 3 else -1,
            MetaKeys.SPACE: SpaceKeys.RAS,
        }


def read_volume(path: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Read a volume to the end of its file, so that a wrong checksum is found.

    Args:
        path: NIfTI, Analyze, MGH or NRRD file, or file or folder of a DICOM series.

    Returns:
        voxels ``HxWxD`` or ``HxWxDxC``, in the units of the file, and the affine from voxels to mm (right, anterior,
        superior).

    Raises:
        ValueError: for a format that is not read, or a volume without orientation and spacing.
    """
    if is_read_by_nibabel(path):
        values, affine = _read_with_nibabel(path)
    elif path.lower().endswith(NRRD_SUFFIXES):
        values, affine = _read_nrrd(path)
    else:
        values, affine = _read_dicom(path)
    problem = problem_of_affine(affine)
    if problem is not None:
        raise ValueError(f"has {problem}, so that its orientation and spacing are unknown.")
    channels = [n for n in values.shape[3:] if n > 1]
    return values.reshape(*values.shape[:3], *channels), affine


def is_read_by_nibabel(path: str) -> bool:
    """Whether a path is that of a NIfTI, Analyze or MGH file."""
    return path.lower().endswith(NIBABEL_SUFFIXES) and not Path(path).is_dir()


def identity_of(path: Path) -> tuple[int, int]:
    """The same for all paths to one volume: links to a file or folder, and the header and the voxels of a pair."""
    voxels = path.with_suffix(".img")
    status = (voxels if path.suffix == ".hdr" and voxels.is_file() else path).stat()
    return status.st_dev, status.st_ino


def state_of(path: str) -> str:
    """
    A SHA-256 that changes when a file of a volume is replaced: of the name, size and time of each.

    Args:
        path: of the volume's file or folder.
    """
    volume = Path(path)
    if volume.is_dir():
        files = [file for file in volume.iterdir() if file.is_file()]
    elif volume.suffix in PAIR:
        files = [file for file in map(volume.with_suffix, PAIR) if file.is_file()]
    else:
        files = [volume]
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def affine_of(image: Any) -> np.ndarray:
    """
    The affine of a file, as nibabel, FSL and SPM choose it: the sform where its code is above 0, otherwise the qform where
    its code is, otherwise that of the voxel sizes alone. An sform that defines no orientation gives way to a valid qform.

    Args:
        image: that nibabel has opened, or a NIfTI header.

    Returns:
        4x4, from voxels to mm, whatever the file's unit is; with :py:func:`problem_of_affine` where the file has no valid
        one.
    """
    header = getattr(image, "header", image)
    if not isinstance(header, nib.Nifti1Header):
        return np.array(image.affine)
    return np.diag([*3 * [millimetres_per_unit(int(header["xyzt_units"]))], 1.0]) @ _chosen_form(header)


def millimetres_per_unit(xyzt_units: int) -> float:
    """What a length of a NIfTI file is multiplied by, for mm; ``xyzt_units`` is the field of its header."""
    return NIFTI_UNITS.get(xyzt_units % 8, 1.0)


def _chosen_form(header: nib.Nifti1Header) -> np.ndarray:
    sform = header.get_sform()
    if header["sform_code"] > 0 and problem_of_affine(sform) is None:
        return sform
    qform = _valid_qform(header)
    if qform is not None:
        return qform
    return sform if header["sform_code"] > 0 else header.get_base_affine()


def geometry_note(image: Any) -> str | None:
    """
    What a user should know of a file's affines, as text that follows the path: that they disagree by more than a tenth of a
    voxel, or that one is unusable.

    Args:
        image: that nibabel has opened.
    """
    header = image.header
    is_analyze = isinstance(header, nib.AnalyzeHeader) and not isinstance(header, nib.Nifti1Header)
    if is_analyze and np.array_equal(image.affine, header.get_best_affine()):  # SPM's .mat beside it would say otherwise
        return "is an Analyze file, which does not say where left is: its first axis is taken to run from right to left"
    if not isinstance(header, nib.Nifti1Header) or not (header["sform_code"] > 0 and header["qform_code"] > 0):
        return None
    sform, qform = header.get_sform(), _valid_qform(header)
    problem = problem_of_affine(sform)
    if problem is not None or qform is None:
        return f"has an sform that is {problem}; its qform is used" if problem else "has no valid qform; its sform is used"
    corners = np.array(list(itertools.product(*((0, n - 1) for n in image.shape[:3]))))
    shift = np.abs(nib.affines.apply_affine(np.linalg.solve(sform, qform), corners) - corners).max()
    return (
        f"has an sform and a qform that are up to {shift:.3g} voxels apart; the sform is used"
        if shift > NOTED_SHIFT
        else None
    )


def problem_of_affine(affine: Any) -> str | None:
    """
    Why an affine does not define orientation and spacing; None when it does.

    Args:
        affine: 4x4, from voxels to mm.
    """
    axes = np.asarray(affine, dtype=np.float64)[:3]
    if not (np.abs(axes) <= FARTHEST).all():  # true for NaN as well
        return f"an affine with values that are NaN, infinite or beyond {FARTHEST:g} mm"
    lengths = np.linalg.norm(axes[:, :3], axis=0)
    if lengths.min() > SHORTEST and abs(np.linalg.det(axes[:, :3] / lengths)) > FLAT:
        return None
    spacing = " x ".join(f"{length:.3g}" for length in lengths)
    return f"a singular affine: its three axes ({spacing} mm long) span no volume"


def _valid_qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """The qform where its code is above 0 and it defines an orientation."""
    if not header["qform_code"] > 0:
        return None
    try:
        qform = header.get_qform()
    except ValueError:  # a quaternion longer than 1
        return None
    return qform if problem_of_affine(qform) is None else None


def _read_with_nibabel(path: str) -> tuple[np.ndarray, np.ndarray]:
    image: Any = nib.load(path)
    holder = image.file_map["image"]
    if not str(holder.filename).lower().endswith(GZIP_SUFFIXES):
        return np.asanyarray(image.dataobj), affine_of(image)
    with gzip.open(holder.filename) as file:
        image = type(image).from_file_map({**image.file_map, "image": FileHolder(fileobj=file)})
        values = np.asanyarray(image.dataobj)
        while file.read(BLOCK):  # nibabel stops before the checksum
            pass
    return values, affine_of(image)


def _read_nrrd(path: str) -> tuple[np.ndarray, np.ndarray]:
    nrrd, found = optional_import("nrrd")
    if not found:
        raise ValueError("is an NRRD file, which the package pynrrd reads: pip install pynrrd.")
    values, header = nrrd.read(path)
    return _with_nrrd_affine(values, header)


def _with_nrrd_affine(values: np.ndarray, header: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels with the spatial axes first, and their affine."""
    signs = NRRD_SPACES.get(str(header.get("space")).lower())
    if signs is None or "space directions" not in header:
        raise ValueError(
            f"has the `space` {header.get('space')!r}; its orientation is known with `space directions` in one of "
            f"{', '.join(NRRD_SPACES)}."
        )
    rows = [np.full(3, np.nan) if row is None else np.asarray(row, float) for row in header["space directions"]]
    spatial = [axis for axis, row in enumerate(rows) if np.isfinite(row).all()]
    if len(spatial) != 3:
        raise ValueError(f"has `space directions` for {len(spatial)} axes; a volume has three.")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([rows[axis] for axis in spatial], axis=1)
    affine[:3, 3] = header.get("space origin", np.zeros(3))
    units = [str(unit).strip().lower() for unit in header.get("space units", 3 * ["mm"])]
    if not NRRD_UNITS.keys() >= set(units):
        raise ValueError(f"has the `space units` {units}, which are not read; write its lengths in mm.")
    scales = [sign * NRRD_UNITS[unit] for sign, unit in zip(signs, units)]
    return np.moveaxis(values, spatial, (0, 1, 2)), np.diag([*scales, 1.0]) @ affine


def _read_dicom(path: str) -> tuple[np.ndarray, np.ndarray]:
    if path.lower().endswith(OTHER_SUFFIXES) and not Path(path).is_dir():
        raise ValueError("has a format that is not read; convert it to NIfTI, for example with SimpleITK or 3D Slicer.")
    from scripts.data.dicom_series import read_dicom

    return read_dicom(path)
