"""Names of files: what they say of a file, and how a result is called."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from scripts.bundle.json_files import shortened

FORMATS = r"\.(?:nii|nrrd|nhdr|mha|mhd|mgz|mgh|hdr|img|dcm|ima|mnc)"
ENDING = re.compile(rf"{FORMATS}(?:\.gz)?$", re.IGNORECASE)
ENDING_WITHIN = re.compile(rf"{FORMATS}(?![a-z0-9])", re.IGNORECASE)  # as in x.nii.gz.md5 and x.nii.bak
OUTSIDE = "is no path within a folder (no '..', no '/' or drive in front, no control characters)"
LABELS = re.compile(
    r"(?<![a-z])(?:labels?(?:tr|ts|val)?|(?:[ad]|prob|pve)?seg|segs|segmentations?|masks?|rois?|annot(?:ation)?s?)(?![a-z])"
)
LABELS_OF_FILES = re.compile(  # not of folders, where they may name a study
    r"(?<![a-z])(?:brainmasks?|labelmaps?|lesions?|gt|ground_?truth|atlas(?:es)?|contours?|(?:wm|a)?parc|parcellations?)"
    r"(?![a-z])"
)
BIDS_ENTITY = re.compile(r"(?:^|_)(?:sub|ses|acq|task|run|rec|dir|space|res|ce|mod|inv|echo|part)-[^_.]+")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]")  # control characters, and what is no character
CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # as in liverMask


def without_ending(name: str) -> str:
    """The name of a file without the ending of its format; other dots stay."""
    return ENDING.sub("", name) or name


def is_nifti(path: str) -> bool:
    """Whether a file has the name of a NIfTI file."""
    return path.lower().endswith((".nii", ".nii.gz"))


def is_volume_name(name: str) -> bool:
    """Whether a file can be a volume: nothing follows the ending of a format, as in ``x.nii.gz.md5`` and ``x.nii.json``."""
    return bool(ENDING.search(name)) or not ENDING_WITHIN.search(name)


def has_label_name(relative: Path) -> bool:
    """Whether a path names labels, in a folder (``labelsTr``) or in the file (``label-GM_probseg``, ``liverMask``)."""
    words = [CAPITAL.sub("_", BIDS_ENTITY.sub("_", part)).lower() for part in relative.parts]
    return bool(LABELS_OF_FILES.search(words[-1])) or any(map(LABELS.search, words))


def output_path(output_dir: str, source: str, postfix: str, keep_ending: bool = False) -> Path:
    """
    Where the result of a volume goes: ``folder/name_postfix.nii.gz`` for the source ``folder/name.nii.gz``, or with
    ``keep_ending``, as names of folders and those that would not be unique have it, ``folder/name.nii.gz_postfix.nii.gz``.

    Raises:
        ValueError: for a source that does not stay in its folder.
    """
    if not stays_inside(source):
        raise ValueError(f"{shortened(source)} {OUTSIDE}, so that its result could lie outside of `output_dir`.")
    relative = Path(source)
    name = relative.name if keep_ending else without_ending(relative.name)
    return Path(output_dir) / relative.parent / f"{name}_{postfix}.nii.gz"


def stays_inside(source: str) -> bool:
    """Whether a path stays within its folder on Linux and Windows, and can be printed and opened."""
    paths = PurePosixPath(source), PureWindowsPath(source)
    # Windows ignores spaces and dots at the end of a name
    inside = all(path.name and not path.anchor and all(part.strip(" .") for part in path.parts) for path in paths)
    return inside and not UNPRINTABLE.search(source)
