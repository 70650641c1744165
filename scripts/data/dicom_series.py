"""DICOM: the volume of a series of files, or of a multi-frame file, with its affine."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

pydicom, _ = optional_import("pydicom")

GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
SAME_ORIENTATION = 1e-3  # of direction cosines: 0.25 mm at the edge of 256 mm
SAME_POSITION = 0.01  # mm
TOLERANCE = 0.1  # of the distance between slices: how far one may lie from its place
LISTED = 8  # series in an error
SEPARATE = "put each into a folder of its own, or convert with dcm2niix"
logger = logging.getLogger(__name__)
log_once = functools.cache(logger.info)  # an epoch reads each volume again


def read_dicom(path: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Read the one volume in a folder of DICOM files, or a multi-frame file.

    Slices are ordered by their positions along their normal, and each has its own rescale slope and intercept. Files that
    hold no image and exact duplicates are left out, with a line in the log. A gantry tilt makes a sheared affine.

    Args:
        path: folder of one series, whose sub-folders are not searched, or a multi-frame file.

    Returns:
        the volume, ``HxWxD`` (columns, rows, slices) in float32, and its affine from voxels to RAS in mm.

    Raises:
        ValueError: when there is no volume, more than one, or one with missing slices or without geometry; with text that
            follows the path.
    """
    stacks = _stacks(_images(Path(path)))
    if len(stacks) > 1:
        listed = "; ".join(map(_describe, stacks[:LISTED]))
        raise ValueError(f"holds {len(stacks)} volumes ({listed}); {SEPARATE}.")
    images = stacks[0]
    try:
        if Path(path).is_file() and not _is_multiframe(images[0]):
            raise ValueError('one slice of a series; give the folder (`image_glob` "**/")')
        return _read(images)
    except ValueError as error:
        raise ValueError(f"holds {_describe(images)}: {error}.") from error


def _images(path: Path) -> list[Any]:
    files = [path] if path.is_file() else [child for child in sorted(path.iterdir()) if child.is_file()]
    files = [file for file in files if not file.name.startswith(".")]
    images = [image for image in map(_image, files) if image is not None]
    if not images:
        raise ValueError(f"holds no DICOM image ({len(files)} other files).")
    if len(images) < len(files):
        log_once(f"{path}: left out {len(files) - len(images)} files that hold no image")
    return images


def _image(file: Path) -> Any:
    """The data set of a file with its pixels, ``None`` when it holds no image, or a segmentation."""
    is_dicom = pydicom.misc.is_dicom(file)
    try:
        image = pydicom.dcmread(file, force=True)
    except Exception as error:  # what pydicom raises from bytes that are no DICOM is not limited
        if is_dicom:
            raise ValueError(f"holds {file.name}, which cannot be read as DICOM ({error}).") from error
        return None
    if "Rows" not in image or "SOPClassUID" not in image or image.get("Modality") == "SEG":
        return None
    if not {"PixelData", "FloatPixelData", "DoubleFloatPixelData"} & set(image.dir()):
        raise ValueError(f"holds {file.name}, an image without pixels; it may be cut short.")
    if "TransferSyntaxUID" not in image.file_meta:  # no preamble
        syntaxes = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian
        image.file_meta.TransferSyntaxUID = syntaxes[image.original_encoding[0]]
    return image


def _is_multiframe(image: Any) -> bool:
    return int(image.get("NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in image


def _stacks(images: list[Any]) -> list[list[Any]]:
    """Images that could be slices of one volume: of one series, matrix, orientation and pixel spacing."""
    stacks: list[list[Any]] = []
    for image in images:
        stack = next((stack for stack in stacks if _are_parallel(stack[0], image)), [])
        if not stack:
            stacks.append(stack)
        stack.append(image)
    return stacks


def _are_parallel(one: Any, other: Any) -> bool:
    names = ("SeriesInstanceUID", "Rows", "Columns")
    if _is_multiframe(one) or _is_multiframe(other) or any(one.get(name) != other.get(name) for name in names):
        return False
    return np.allclose(_plane(one), _plane(other), rtol=0, atol=SAME_ORIENTATION)


def _plane(image: Any) -> list[float]:
    return [*(image.get("ImageOrientationPatient") or 6 * [0.0]), *(image.get("PixelSpacing") or 2 * [0.0])]


def _normal(image: Any) -> np.ndarray:
    orientation = _plane(image)[:6]
    return np.cross(orientation[:3], orientation[3:])


def _describe(images: list[Any]) -> str:
    image = images[0]
    slices = len(images) * int(image.get("NumberOfFrames") or 1)
    normal = np.abs(_normal(image))
    plane = ("sagittal ", "coronal ", "axial ")[normal.argmax()] if normal.any() else ""
    name = f"series {image.get('SeriesInstanceUID')} {str(image.get('SeriesDescription', ''))!r}"
    return f"{name}, {slices} {plane}slice{'s' if slices > 1 else ''} of {image.Columns}x{image.Rows}"


def _read(images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    if any("MOSAIC" in (image.get("ImageType") or ()) for image in images):
        raise ValueError("a Siemens mosaic; convert it with dcm2niix")
    kinds = {str(image.get("PhotometricInterpretation")) for image in images}
    if not kinds <= {"MONOCHROME1", "MONOCHROME2"}:
        raise ValueError(f"pixels of {', '.join(sorted(kinds))}; only gray values are read")
    is_multiframe = _is_multiframe(images[0])
    frames = _frames(images[0]) if is_multiframe else images
    missing = [name for name in GEOMETRY if not frames or not all(frame.get(name) for frame in frames)]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}, so the geometry is unknown; convert it with dcm2niix")
    if len(_stacks(frames)) > 1:
        raise ValueError("frames of several orientations; convert it with dcm2niix")
    normal = _normal(frames[0])
    order = sorted(range(len(frames)), key=lambda k: np.dot(frames[k].ImagePositionPatient, normal))
    if not is_multiframe:
        order = _without_duplicates(images, order)
    first, step = frames[order[0]], _step([frames[k] for k in order])
    pixels = _pixels(images[0])[order] if is_multiframe else (_pixels(images[k])[0] for k in order)
    values = [pydicom.pixels.apply_modality_lut(each, frames[k]).astype(np.float32) for k, each in zip(order, pixels)]
    between_rows, between_columns = first.PixelSpacing
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.ImageOrientationPatient[:3], float) * between_columns
    affine[:3, 1] = np.array(first.ImageOrientationPatient[3:], float) * between_rows
    affine[:3, 2], affine[:3, 3] = step, first.ImagePositionPatient
    return np.stack(values).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS


def _frames(image: Any) -> list[Any]:
    """The attributes of each frame, those that all share included."""
    frames = []
    for groups in image.get("PerFrameFunctionalGroupsSequence") or ():
        frames.append(pydicom.Dataset())
        for element in [*image.SharedFunctionalGroupsSequence[0], *groups]:
            if element.VR == "SQ" and element.value:
                frames[-1].update(element.value[0])
    return frames


def _without_duplicates(images: list[Any], order: list[int]) -> list[int]:
    names = ("ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "PixelData")
    kept = order[:1]
    for k in order[1:]:
        if any(images[k].get(name) != images[kept[-1]].get(name) for name in names):
            kept.append(k)
    if len(kept) < len(order):
        log_once(f"{_describe(images)}: left out {len(order) - len(kept)} exact duplicates")
    return kept


def _pixels(image: Any) -> np.ndarray:
    """The stored values of all frames of a file, ``frames x rows x columns``."""
    try:
        return image.pixel_array.reshape(-1, image.Rows, image.Columns)
    except Exception as error:  # each decoder has its own
        name, syntax = Path(image.filename).name, image.file_meta.TransferSyntaxUID.name
        raise ValueError(f"{name} cannot be decoded ({syntax}: {error})") from error


def _step(slices: list[Any]) -> np.ndarray:
    """The vector from each of the sorted slices to the next; an error where they are not evenly spaced."""
    normal = _normal(slices[0])
    if len(slices) == 1:
        thickness = slices[0].get("SpacingBetweenSlices") or slices[0].get("SliceThickness")
        if not thickness:
            raise ValueError("a slice without SliceThickness")
        return normal * abs(float(thickness))
    positions = np.array([slice_.ImagePositionPatient for slice_ in slices], dtype=float)
    distances = positions @ normal
    gaps = np.diff(distances)
    if (gaps < SAME_POSITION).any():
        number = 1 + int((gaps >= SAME_POSITION).sum())
        raise ValueError(f"{len(slices)} slices lie at {number} positions, as several phases do; {SEPARATE}")
    step = (positions[-1] - positions[0]) / len(gaps)
    expected = positions[0] + np.arange(len(slices))[:, None] * step
    if not np.linalg.norm(positions - expected, axis=1).max() <= TOLERANCE * np.linalg.norm(step):
        usual, k = np.median(gaps), np.abs(gaps - np.median(gaps)).argmax()
        raise ValueError(
            f"slices are missing or not on one line: {usual:.4g} mm apart along their normal, but {gaps[k]:.4g} mm between "
            f"{distances[k]:.6g} and {distances[k + 1]:.6g}; complete the series, or convert it with dcm2niix"
        )
    return step
