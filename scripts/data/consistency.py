"""Makes generated volumes agree with what they were generated from: thick slices, or a volume with a hole.

    python -m scripts.data.consistency slices --samples_dir OUT --dataset_dir THICK --output_dir AGREEING
    python -m scripts.data.consistency holes --samples_dir OUT --dataset_dir GIVEN --output_dir AGREEING

The JSON file beside a sample says which files below ``dataset_dir`` it was generated from; thick slices on the grid of thin
ones, ``NAME_thick.nii.gz``, are those of ``THICK/NAME.nii.gz``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np

from scripts.bundle.errors import short_messages
from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.data.file_names import OUTSIDE, stays_inside, without_ending
from scripts.data.holes import fill_hole
from scripts.data.restored_volumes import NiftiHeader, as_stored, nifti_bytes
from scripts.data.slice_averages import agree_with_slices, average_slices, thin_affine
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


def slices(samples_dir: str, dataset_dir: str, output_dir: str, thick_key: str = "thick") -> None:
    """
    Write each sample with a spline added, with which its averages are the thick slices that it was generated from, up to the
    rounding of their data type, which it gets. See :py:func:`scripts.data.slice_averages.agree_with_slices`.

    Args:
        samples_dir: folder of the samples.
        dataset_dir: folder of the thick slices, from which ``scripts.data.degrade thin_grid`` made what the samples were
            generated from.
        output_dir: folder to write.
        thick_key: spatial key of the thick slices.
    """
    for path, description in _samples(samples_dir, output_dir, [thick_key]):
        source = _thick_file(_source(description["spatial"][thick_key], dataset_dir, path), thick_key)
        (sample, affine), (thick, of_thick) = _read(path), _read(source)
        found = [
            (factor, axis)
            for axis, (thin, size) in enumerate(zip(sample.shape, thick.shape[:3]))
            for factor in [thin // size]
            if factor > 1 and np.allclose(thin_affine(of_thick, factor, axis), affine, atol=SHIFT)
        ]
        shapes = [(*thick.shape[:axis], thick.shape[axis] * factor, *thick.shape[axis + 1 :]) for factor, axis in found]
        if shapes != [sample.shape]:
            raise ValueError(f"{path} is not on a grid of thin slices within those of {source}.")
        matched = in_units_of(thick, sample, average_slices(sample, *found[0]))
        _save(agree_with_slices(matched, thick, *found[0]), path, source, description, samples_dir, output_dir)


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
    for path, description in _samples(samples_dir, output_dir, [masked_key, hole_key]):
        sources = [_source(description["spatial"][key], dataset_dir, path) for key in (masked_key, hole_key)]
        (sample, affine), *given = map(_read, (path, *sources))
        for source, (values, of_source) in zip(sources, given):
            if values.shape[:3] != sample.shape[:3] or not np.allclose(of_source, affine, atol=SHIFT):
                raise ValueError(f"{path} and {source} have different grids.")
        masked, hole = given[0][0], given[1][0]
        known = hole == 0
        matched = in_units_of(masked[known], sample, sample[known])
        filled = fill_hole(matched, masked, hole, nib.affines.voxel_sizes(affine))
        _save(filled, path, sources[0], description, samples_dir, output_dir)


def _samples(samples_dir: str, output_dir: str, keys: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The samples below a folder that were generated from spatial conditions, each with what the file beside it says."""
    if Path(samples_dir).resolve() == Path(output_dir).resolve():
        raise ValueError(f"`output_dir` is `samples_dir`, {samples_dir}; name another folder.")
    found = []
    for path in sorted(Path(samples_dir).rglob("*.nii.gz")):
        file = _description_path(path)
        description = json.loads(file.read_text()) if file.is_file() else {}
        spatial = description.get("spatial")
        if spatial and not set(keys) <= set(spatial):
            raise ValueError(f"{file} names the spatial conditions {', '.join(spatial)}, and not {', '.join(keys)}.")
        if spatial:
            found.append((path, description))
    if not found:
        raise FileNotFoundError(f"no sample below `samples_dir` {samples_dir!r} has spatial conditions in its JSON file.")
    yield from ProgressBar(found, desc="samples", unit="sample")


def _source(name: str, dataset_dir: str, path: Path) -> Path:
    if not stays_inside(name):
        raise ValueError(f"{_description_path(path)} names {name!r}, which {OUTSIDE}.")
    return Path(dataset_dir) / name


def _thick_file(path: Path, key: str) -> Path:
    """``NAME.nii.gz`` or ``NAME.nii`` for ``NAME_thick.nii.gz``."""
    name = without_ending(path.name).removesuffix(f"_{key}")
    found = [path.with_name(name + ending) for ending in (".nii.gz", ".nii")]
    return next((file for file in found if file.is_file()), found[0])


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        return read_volume(str(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _save(
    values: np.ndarray, path: Path, source: Path, description: dict[str, Any], samples_dir: str, output_dir: str
) -> None:
    """Write a sample that was changed, in the data type of the file that it agrees with, and the file beside it."""
    of_sample: Any = nib.load(path)
    of_source = NiftiHeader.of_file(nib.load(source))
    stored = {name: getattr(of_source, name) for name in ("data_type", "scl_slope", "scl_inter")}
    header = replace(NiftiHeader.of_file(of_sample), **stored)
    content = nifti_bytes(as_stored(values, header), header, of_sample.header["descrip"].item().decode())
    target = Path(output_dir) / path.relative_to(samples_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(content, target)
    changed = {**description, "agrees": True, "volume_sha256": content_hash(content)}
    write_atomically(json.dumps(changed, indent=2).encode(), _description_path(target))


def _description_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    short_messages()
    fire.Fire({"slices": slices, "holes": holes})
