"""Makes generated volumes agree with what they were generated from: thick slices, or a volume with a hole.

    python -m scripts.data.consistency slices --samples_dir OUT --dataset_dir GIVEN --output_dir AGREEING --factor 4
    python -m scripts.data.consistency holes --samples_dir OUT --dataset_dir GIVEN --output_dir AGREEING

The JSON file beside a sample says which files below ``dataset_dir`` it was generated from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np

from scripts.bundle.errors import short_messages
from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.data.file_names import OUTSIDE, stays_inside
from scripts.data.holes import fill_hole
from scripts.data.restored_volumes import NiftiHeader, as_stored, nifti_bytes
from scripts.data.slice_averages import agree_with_slices, average_slices, averages_of
from scripts.data.volume_reader import read_volume

__all__ = ["holes", "in_units_of", "slices"]

SHIFT = 1e-3  # mm by which the affines of one grid may differ through rounding


def in_units_of(given: np.ndarray, sample: np.ndarray, like_given: np.ndarray) -> np.ndarray:
    """
    A sample in the intensities of what it was generated from, by a straight line (least squares): samples have the
    intensities of the training volumes, and those of MR are arbitrary.

    Args:
        given: intensities that are known, of any shape.
        sample: of any shape.
        like_given: what the sample has in the place of ``given``.
    """
    deviation = like_given - like_given.mean()
    slope = (deviation * (given - given.mean())).sum() / (deviation**2).sum()
    return given.mean() + slope * (sample - like_given.mean())


def slices(
    samples_dir: str, dataset_dir: str, output_dir: str, factor: int, axis: int = 2, thick_key: str = "thick"
) -> None:
    """
    Write each sample with a spline added, with which its averages are the thick slices that it was generated from, see
    :py:func:`scripts.data.slice_averages.agree_with_slices`. It gets the data type float32.

    Args:
        samples_dir: folder of the samples.
        dataset_dir: folder of the thick slices on the thin grid, which the samples were generated from.
        output_dir: folder to write.
        factor: thin slices in a thick one.
        axis: of the file, 0 to 2, along which the slices lie.
        thick_key: spatial key of the thick slices.
    """

    def agree(sample: np.ndarray, thick: np.ndarray) -> np.ndarray:
        averages = averages_of(thick, factor, axis)
        matched = in_units_of(averages, sample, average_slices(sample, factor, axis))
        return agree_with_slices(matched, averages, factor, axis)

    _write_agreeing(samples_dir, dataset_dir, output_dir, [thick_key], agree)


def holes(samples_dir: str, dataset_dir: str, output_dir: str, masked_key: str = "masked", hole_key: str = "hole") -> None:
    """
    Write each volume with its hole filled by the sample, without a step at the border, see
    :py:func:`scripts.data.holes.fill_hole`. All other voxels, and the data type, are those of the volume with the hole.

    Args:
        samples_dir: folder of the samples.
        dataset_dir: folder of the volumes with holes, which the samples were generated from.
        output_dir: folder to write.
        masked_key: spatial key of the volumes with holes.
        hole_key: spatial key of the label maps that are not 0 in the hole.
    """

    def agree(sample: np.ndarray, masked: np.ndarray, hole: np.ndarray) -> np.ndarray:
        known = hole == 0
        return fill_hole(in_units_of(masked[known], sample, sample[known]), masked, hole)

    _write_agreeing(samples_dir, dataset_dir, output_dir, [masked_key, hole_key], agree)


def _write_agreeing(
    samples_dir: str, dataset_dir: str, output_dir: str, keys: list[str], agree: Callable[..., np.ndarray]
) -> None:
    """Write what ``agree`` makes of each sample and the volumes of its keys, with the header of the first of them."""
    if Path(samples_dir).resolve() == Path(output_dir).resolve():
        raise ValueError(f"`output_dir` is `samples_dir`, {samples_dir}; name another folder.")
    for path, description in ProgressBar(list(_samples(samples_dir, keys)), desc="samples", unit="sample"):
        sample, affine = _read(path)
        sources = [_source(description["spatial"][key], dataset_dir, path) for key in keys]
        given = []
        for source in sources:
            values, of_source = _read(source)
            if values.shape[:3] != sample.shape[:3] or not np.allclose(of_source, affine, atol=SHIFT):
                raise ValueError(f"{path} and {source} have different grids.")
            given.append(values)
        header = NiftiHeader.of_file(nib.load(sources[0]))
        of_sample: Any = nib.load(path).header
        description_in_header = of_sample["descrip"].item().decode()
        content = nifti_bytes(as_stored(agree(sample, *given), header), header, description_in_header)
        target = Path(output_dir) / path.relative_to(samples_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(content, target)
        changed = {**description, "agrees_with": keys, "volume_sha256": content_hash(content)}
        write_atomically(json.dumps(changed, indent=2).encode(), _description_path(target))


def _samples(samples_dir: str, keys: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The samples below a folder that were generated from spatial conditions, each with what the file beside it says."""
    found = False
    for path in sorted(Path(samples_dir).rglob("*.nii.gz")):
        file = _description_path(path)
        description = json.loads(file.read_text()) if file.is_file() else {}
        spatial = description.get("spatial")
        if not spatial:
            continue
        if not set(keys) <= set(spatial):
            raise ValueError(f"{file} names the spatial conditions {', '.join(spatial)}, and not {', '.join(keys)}.")
        found = True
        yield path, description
    if not found:
        raise FileNotFoundError(f"no sample below `samples_dir` {samples_dir!r} has spatial conditions in its JSON file.")


def _source(name: str, dataset_dir: str, path: Path) -> Path:
    if not stays_inside(name):
        raise ValueError(f"{_description_path(path)} names {name!r}, which {OUTSIDE}.")
    return Path(dataset_dir) / name


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        return read_volume(str(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _description_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    short_messages()
    fire.Fire({"slices": slices, "holes": holes})
