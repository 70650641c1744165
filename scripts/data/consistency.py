"""Makes generated volumes agree with what they were generated from: thick slices, or a volume with a hole.

    python -m scripts.data.consistency slices --samples_dir OUT --dataset_dir THICK --output_dir AGREEING
    python -m scripts.data.consistency holes --samples_dir OUT --dataset_dir GIVEN --output_dir AGREEING

The JSON file beside a sample says which files below ``dataset_dir`` it was generated from; thick slices on the grid of thin
ones, ``NAME_thick.nii.gz``, are those of ``THICK/NAME.nii.gz``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np

from scripts.bundle.errors import short_messages
from scripts.bundle.files import write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.data.degrade import (
    SHIFT,
    along,
    average_slices,
    averaging,
    fill_hole,
    interpolation,
    read_nifti,
    thin_affine,
)
from scripts.data.file_names import OUTSIDE, stays_inside, without_ending
from scripts.data.restored_volumes import save_nifti
from scripts.data.volume_reader import NiftiHeader


def in_units_of(given: np.ndarray, sample: np.ndarray, like_given: np.ndarray) -> np.ndarray:
    """
    A sample in the intensities of what is given, by the straight line (least squares) from ``like_given``, what the sample
    has in its place: samples have the intensities of the training volumes, and those of MR are arbitrary.
    """
    deviation = like_given - like_given.mean()
    slope = (deviation * (given - given.mean())).sum() / (deviation**2).sum()
    return given.mean() + slope * (sample - like_given.mean())


def agree_with_slices(sample: np.ndarray, thick: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """Add to a sample the cubic spline with which its :py:func:`scripts.data.degrade.average_slices` become ``thick``."""
    to_thick, spline = averaging(sample.shape[axis], factor), interpolation(sample.shape[axis], factor)
    correction = spline @ np.linalg.inv(to_thick @ spline)
    return sample + along(axis, correction, thick - average_slices(sample, factor, axis))


def slices(samples_dir: str, dataset_dir: str, output_dir: str, thick_key: str = "thick") -> None:
    """
    Write each sample with a spline added, with which its averages are the thick slices that it was generated from, up to the
    rounding of their data type, which it gets.

    Args:
        samples_dir: Folder of the samples.
        dataset_dir: Folder of the thick slices, from which ``scripts.data.degrade thin_grid`` made what the samples were
            generated from.
        output_dir: Folder to write.
        thick_key: Spatial key of the thick slices.
    """
    for path, target, (on_thin_grid,) in _samples(samples_dir, output_dir, dataset_dir, [thick_key]):
        name = without_ending(on_thin_grid.name).removesuffix(f"_{thick_key}")
        source = on_thin_grid.with_name(f"{name}.nii.gz")
        source = source if source.is_file() else source.with_name(f"{name}.nii")
        (sample, header), (thick, of_thick) = read_nifti(path), read_nifti(source)
        axis = int(np.argmax(np.divide(sample.shape[:3], thick.shape[:3])))
        factor = max(1, sample.shape[axis] // thick.shape[axis])
        averages, affine = average_slices(sample, factor, axis), thin_affine(of_thick.affine, factor, axis)
        if averages.shape != thick.shape or not np.allclose(affine, header.affine, atol=SHIFT):
            raise ValueError(f"{path} is not on a grid of thin slices within those of {source}.")
        agreeing = agree_with_slices(in_units_of(thick, sample, averages), thick, factor, axis)
        _save(agreeing, path, header.stored_as(**of_thick.stored), target)


def holes(samples_dir: str, dataset_dir: str, output_dir: str, masked_key: str = "masked", hole_key: str = "hole") -> None:
    """
    Write each volume with its hole filled by the sample, without a step at the border. All other voxels, and the data type,
    are those of the volume with the hole.

    Args:
        samples_dir: Folder of the samples.
        dataset_dir: Folder of the volumes with holes, which the samples were generated from.
        output_dir: Folder to write.
        masked_key: Spatial key of the volumes with holes.
        hole_key: Spatial key of the label maps that are not 0 in the hole.
    """
    for path, target, sources in _samples(samples_dir, output_dir, dataset_dir, [masked_key, hole_key]):
        sample, header = read_nifti(path)
        found = [read_nifti(source) for source in sources]
        for source, (values, of_source) in zip(sources, found):
            if values.shape[:3] != sample.shape[:3] or not np.allclose(of_source.affine, header.affine, atol=SHIFT):
                raise ValueError(f"{path} and {source} have different grids.")
        (masked, of_masked), (hole, _) = found
        matched = in_units_of(masked[hole == 0], sample, sample[hole == 0])
        filled = fill_hole(matched, masked, hole, nib.affines.voxel_sizes(header.affine))
        _save(filled, path, header.stored_as(**of_masked.stored), target)


def _samples(
    samples_dir: str, output_dir: str, dataset_dir: str, keys: list[str]
) -> Iterator[tuple[Path, Path, list[Path]]]:
    """The samples that were generated from spatial conditions with these keys, where they go, and the conditions' files."""
    if Path(samples_dir).resolve() == Path(output_dir).resolve():
        raise ValueError(f"`output_dir` is `samples_dir`, {samples_dir}; name another folder.")
    found = []
    for file in sorted(Path(samples_dir).rglob("*_sample_*.json")):
        spatial = json.loads(file.read_text()).get("spatial", {})
        names = [spatial[key] for key in keys if key in spatial]
        for name in names:
            if not stays_inside(name):
                raise ValueError(f"{file} names {name!r}, which {OUTSIDE}.")
        if len(names) == len(keys):
            target = Path(output_dir) / file.relative_to(samples_dir).with_suffix(".nii.gz")
            found.append((file.with_suffix(".nii.gz"), target, [Path(dataset_dir, name) for name in names]))
    if not found:
        raise FileNotFoundError(f"no sample below `samples_dir` {samples_dir!r} was generated from {', '.join(keys)}.")
    yield from ProgressBar(found, desc="samples", unit="sample")


def _save(values: np.ndarray, path: Path, header: NiftiHeader, target: Path) -> None:
    """Write a sample that was changed, and the JSON file beside it."""
    of_sample: Any = nib.load(path)
    sha256 = save_nifti(values, header, target, of_sample.header["descrip"].item().decode())
    beside, target_beside = (each.with_suffix("").with_suffix(".json") for each in (path, target))
    changed = {**json.loads(beside.read_text()), "agrees": True, "volume_sha256": sha256}
    write_atomically(json.dumps(changed, indent=2).encode(), target_beside)


if __name__ == "__main__":
    short_messages()
    fire.Fire({"slices": slices, "holes": holes})
