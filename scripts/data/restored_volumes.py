"""Restores a reconstruction to the shape, affine, intensities and data type of the file that the volume came from.

What is needed for that is in a record, plain JSON: it is made from a preprocessed volume and kept beside a latent.
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, SpatialResample, Transform
from monai.utils import ImageMetaKey

from scripts.bundle.files import write_atomically
from scripts.bundle.json_files import shortened
from scripts.data.dataset_tables import conditions_of, dataset_list_of
from scripts.data.file_names import OUTSIDE, is_nifti, output_path, stays_inside
from scripts.data.intensity_window import intensity_window, unscaled
from scripts.data.volume_checks import problem_of_affine, problem_of_memory

__all__ = [
    "DESCRIBED",
    "DescribeSourced",
    "SaveVolumed",
    "clipped_shares",
    "nifti_bytes",
    "problem_of_record",
    "restore",
]

RESTORING = {"preprocessed_shape": 8, "shape": 16}  # least bytes per voxel: two copies in float32, then two in float64
RECORD = "record"  # key of a volume's record, as JSON text
COMPRESSION = 1  # level of gzip; noisy voxels hardly shrink further at higher ones
DATA_TYPES = ["|i1", "|u1", *(order + kind for order in "<>" for kind in ("i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"))]
XFORM_CODES = [0, 1, 2, 3, 4, 5]  # that NIfTI defines
MAX_SIZE = 2**15 - 1  # of an axis in NIfTI-1
SMALLEST_SLOPE = 1e-30  # a smaller one is 0 in a header
FLOAT_RANGE = {"minimum": -1e38, "maximum": 1e38}  # so that differences are float32 numbers too
_AFFINE = {
    "type": "array",
    "minItems": 4,
    "maxItems": 4,
    "items": {
        "type": "array",
        "minItems": 4,
        "maxItems": 4,
        "items": {"type": "number"},
    },
    "description": "four rows of four finite numbers",
}
_SHAPE = {
    "type": "array",
    "minItems": 3,
    "maxItems": 3,
    "items": {"type": "integer", "minimum": 1, "maximum": MAX_SIZE},
    "description": f"three sizes in voxels, from 1 to {MAX_SIZE}",
}
_INTENSITIES = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "number", **FLOAT_RANGE},
    "description": "a finite float32 number for each channel",
}
_NUMBER = {"type": "number", **FLOAT_RANGE, "description": "a finite float32 number"}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1, "description": "a share from 0 to 1"}
_CODE = {"enum": XFORM_CODES, "type": "integer", "description": "a code of NIfTI, from 0 to 5"}
DESCRIBED = {  # schema of a record; older versions wrote no `clipped_below` and `clipped_above`
    "source": {"type": "string", "minLength": 1, "maxLength": 4096, "description": "a relative path"},
    "keep_ending": {"type": "boolean", "description": "true or false"},
    "shape": _SHAPE,
    "affine": _AFFINE,
    "data_type": {"enum": DATA_TYPES, "description": f"a data type of real numbers, one of {', '.join(DATA_TYPES)}"},
    "scl_slope": _NUMBER,
    "scl_inter": _NUMBER,
    "xyzt_units": {"type": "integer", "minimum": 0, "maximum": 255, "description": "an integer from 0 to 255"},
    "qform_code": _CODE,
    "sform_code": _CODE,
    "preprocessed_shape": _SHAPE,
    "preprocessed_affine": _AFFINE,
    "intensity_low": _INTENSITIES,
    "intensity_high": _INTENSITIES,
    "clipped": _SHARE,
    "clipped_below": _SHARE,
    "clipped_above": _SHARE,
}
logger = logging.getLogger(__name__)


class DescribeSourced(MapTransform):
    """
    Add the record of a volume, which :py:func:`restore` needs, as JSON text under the key ``record``. It must be the last
    transform.

    Args:
        keys: key of the image, which ``ScaleIntensityWindowd`` has scaled.
        dataset_dir: folder; the record holds the file's path relative to it.
    """

    def __init__(self, keys: KeysCollection, dataset_dir: str) -> None:
        super().__init__(keys)
        self.dataset_dir = dataset_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[RECORD] = json.dumps(
                {**_record(d[key], Path(self.dataset_dir)), "keep_ending": bool(d.get("keep_ending", False))}
            )
        return d


class SaveVolumed(Transform):
    """
    Restore a prediction to the file that its record describes, and write it as compressed NIfTI in one step.

    Args:
        key: of the prediction, ``CxHxWxD`` in [0, 1].
        output_dir: folder to write to; the file gets the relative path that the source has in its folder.
        postfix: added to the name.
    """

    def __init__(self, key: str, output_dir: str, postfix: str) -> None:
        self.key, self.output_dir, self.postfix = key, output_dir, postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        record = json.loads(data[RECORD])
        path = output_path(self.output_dir, record["source"], self.postfix, record["keep_ending"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(nifti_bytes(restore(data[self.key], record), record), path)
        logger.info(f"{path}: {clipped_shares(record)}")
        return dict(data)


def clipped_shares(record: Mapping[str, Any]) -> str:
    """How much of a volume the intensity window clipped, as text. Clipped air (below) is expected, clipped bone is not."""
    total = f"{record['clipped']:.2%} of the voxels were outside the intensity window"
    if not {"clipped_below", "clipped_above"} <= record.keys():  # of a latent that an older version made
        return total
    return f"{total} ({record['clipped_below']:.2%} below, {record['clipped_above']:.2%} above)"


def problem_of_record(record: Mapping[str, Any], num_channels: int) -> str | None:
    """
    Check that the fields of a record agree with each other, and that its volume fits into memory.

    Args:
        record: of a volume, with fields as in :py:data:`DESCRIBED`.
        num_channels: number of channels of the network's result.

    Returns:
        None when all is well, otherwise the field and what was found.
    """
    if not stays_inside(record["source"]):
        return f"`source` is {shortened(record['source'])}, which {OUTSIDE}: its result could lie outside of `output_dir`"
    if abs(record["scl_slope"]) < SMALLEST_SLOPE:
        return f"`scl_slope` is {record['scl_slope']}; a slope must not be 0, nor closer to 0 than {SMALLEST_SLOPE:g}"
    for name in ("affine", "preprocessed_affine"):
        problem = problem_of_affine(record[name])
        if problem is not None:
            return f"`{name}` is {problem}"
        if record[name][3] != [0, 0, 0, 1]:
            return f"`{name}` has the last row {record[name][3]}; it must be 0, 0, 0, 1"
    for name in ("intensity_low", "intensity_high"):
        if len(record[name]) != num_channels:
            return f"`{name}` has {len(record[name])} numbers for {num_channels} channels"
    if not all(low < high for low, high in zip(record["intensity_low"], record["intensity_high"])):
        return f"`intensity_low` {record['intensity_low']} is not below `intensity_high` {record['intensity_high']}"
    if not _lies_over(record):
        return (
            f"`shape` {record['shape']} with `affine` does not lie where `preprocessed_shape` "
            f"{record['preprocessed_shape']} with `preprocessed_affine` does"
        )
    problem = problem_of_memory(num_channels * sum(size * math.prod(record[name]) for name, size in RESTORING.items()))
    return problem and f"`shape` {record['shape']} and `preprocessed_shape` {record['preprocessed_shape']} take {problem}"


def _lies_over(record: Mapping[str, Any]) -> bool:
    """Whether the corners of the file's grid lie within the preprocessed grid or at most half its size away from it."""
    to_preprocessed = np.linalg.solve(np.array(record["preprocessed_affine"]), np.array(record["affine"]))
    corners = np.array(list(itertools.product(*((0, size - 1) for size in record["shape"]))))
    size = np.array(record["preprocessed_shape"])
    found = nib.affines.apply_affine(to_preprocessed, corners)
    return bool((found >= -size / 2 - 2).all() and (found <= 1.5 * size + 2).all())


def restore(image: torch.Tensor, record: Mapping[str, Any]) -> np.ndarray:
    """
    Undo the preprocessing of a volume.

    Args:
        image: ``CxHxWxD`` in [0, 1], possibly padded at the end of each axis. What lies outside [0, 1] is clipped.
        record: of the volume.

    Returns:
        ``HxWxD``, or ``HxWxDxC`` for several channels, in the file's data type, as it is stored (before its slope).
    """
    image = image.detach().as_subclass(torch.Tensor).cpu()
    for dim, size in enumerate(record["preprocessed_shape"], start=1):
        image = image.narrow(dim, 0, size)
    image = unscaled(image.clamp(0, 1), record["intensity_low"], record["intensity_high"])
    values = _to_source_grid(image, record).double().numpy()
    values = (values - record["scl_inter"]) / record["scl_slope"]
    data_type = np.dtype(record["data_type"])
    if np.issubdtype(data_type, np.integer):
        limits = np.iinfo(data_type)
        values = np.clip(np.rint(values), limits.min, limits.max)
    values = values.astype(data_type)
    return values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)


def nifti_bytes(stored: np.ndarray, record: Mapping[str, Any]) -> bytes:
    """
    A compressed NIfTI file, the same bytes for the same content.

    Args:
        stored: voxels as they are stored, ``HxWxD`` or ``HxWxDxC``.
        record: with ``affine``, ``data_type``, ``scl_slope``, ``scl_inter``, ``xyzt_units``, ``qform_code`` and
            ``sform_code``; and optionally ``description``, text for the header.
    """
    affine = np.array(record["affine"])
    data_type = np.dtype(record["data_type"])
    header = nib.Nifti1Header(endianness=">" if data_type.byteorder == ">" else "<")
    header.set_data_dtype(data_type)
    image = nib.Nifti1Image(stored, affine, header)
    image.set_sform(affine, record["sform_code"])
    image.set_qform(affine, record["qform_code"])
    image.header["xyzt_units"] = record["xyzt_units"]
    image.header["descrip"] = record.get("description", "")
    image.header.set_slope_inter(record["scl_slope"], record["scl_inter"])  # nibabel then writes the voxels as they are
    return gzip.compress(image.to_bytes(), COMPRESSION, mtime=0)


def _record(image: MetaTensor, dataset_dir: Path) -> dict[str, Any]:
    path = str(image.meta[ImageMetaKey.FILENAME_OR_OBJ])
    window = intensity_window(image)
    return {
        "source": Path(path).relative_to(dataset_dir).as_posix(),
        **(_nifti_header(path) if is_nifti(path) else _plain_header(image)),
        "preprocessed_shape": list(image.shape[1:]),
        "preprocessed_affine": torch.as_tensor(image.affine).tolist(),
        "intensity_low": window["low"],
        "intensity_high": window["high"],
        "clipped": window["clipped"],
        "clipped_below": window["clipped_below"],
        "clipped_above": window["clipped_above"],
        "conditions": conditions_of(path, str(dataset_dir)),
        "dataset_list": dataset_list_of(path, str(dataset_dir)),
    }


def _nifti_header(path: str) -> dict[str, Any]:
    image: Any = nib.load(path)
    header = image.header
    return {
        "shape": [int(n) for n in image.shape[:3]],
        "affine": image.affine.tolist(),
        "data_type": header.get_data_dtype().str,
        # nibabel clears those of the header when it reads a file
        "scl_slope": float(image.dataobj.slope),
        "scl_inter": float(image.dataobj.inter),
        "xyzt_units": int(header["xyzt_units"]),
        "qform_code": _known_code(header["qform_code"]),
        "sform_code": _known_code(header["sform_code"]),
    }


def _known_code(code: Any) -> int:
    """A code that NIfTI defines. Other codes above 0 become 1 (scanner), since any code above 0 makes the affine valid."""
    return int(code) if int(code) in XFORM_CODES else int(code > 0)


def _plain_header(image: MetaTensor) -> dict[str, Any]:
    """Header of a volume in another format than NIfTI, in mm."""
    return {
        "shape": [int(n) for n in image.meta["spatial_shape"]],
        "affine": torch.as_tensor(image.meta["original_affine"]).tolist(),
        "data_type": "<f4",
        "scl_slope": 1.0,
        "scl_inter": 0.0,
        "xyzt_units": 2,
        "qform_code": 0,
        "sform_code": 1,
    }


def _to_source_grid(image: torch.Tensor, record: Mapping[str, Any]) -> torch.Tensor:
    """Reorient ``CxHxWxD`` to the file's grid and resample it where needed; otherwise voxels only change places."""
    affine = np.array(record["affine"])
    volume: Any = MetaTensor(image, affine=torch.tensor(record["preprocessed_affine"], dtype=torch.float64))
    volume = Orientation(axcodes="".join(nib.aff2axcodes(affine)), labels=None)(volume)
    shape: Sequence[int] = record["shape"]
    moved = not np.allclose(volume.affine, affine, atol=1e-3 * math.sqrt(np.square(affine[:3, :3]).sum()))
    if list(volume.shape[1:]) != list(shape) or moved:
        resample = SpatialResample(mode="bilinear", padding_mode="border")
        volume = resample(volume, dst_affine=torch.tensor(affine), spatial_size=shape)
    return volume.as_tensor()
