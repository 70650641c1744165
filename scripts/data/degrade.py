"""Data sets of volumes with what a generator is given of them: thick slices, and volumes with holes.

    python -m scripts.data.degrade thick_slices --dataset_dir THIN --output_dir PAIRS --factor 4 [--axis 2]
    python -m scripts.data.degrade thin_grid --dataset_dir THICK --output_dir GIVEN --factor 4 [--axis 2]
    python -m scripts.data.degrade holes --dataset_dir VOLUMES --output_dir PAIRS [--radius 15] [--per_volume 1] [--seed 0]
    python -m scripts.data.degrade holes --dataset_dir VOLUMES --output_dir PAIRS --hole_key label

Volumes are NIfTI files: those of the lists in ``dataset.json``, otherwise all below the folder that ``image_glob`` matches.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from scipy.ndimage import find_objects, zoom
from scipy.sparse import csr_array, kronsum
from scipy.sparse.linalg import cg

from scripts.bundle.errors import short_messages
from scripts.bundle.progress import ProgressBar
from scripts.data.dataset_tables import conditions_of, dataset_lists
from scripts.data.file_names import is_nifti, output_path, stays_inside
from scripts.data.restored_volumes import save_nifti
from scripts.data.volume_lists import EVERY_NIFTI, find_images
from scripts.data.volume_reader import NiftiHeader, read_volume

SHIFT = 1e-3  # mm by which the affines of one grid may differ through rounding
Item = dict[str, Any]
Files = dict[str, tuple[np.ndarray, NiftiHeader]]


def thick_slices(dataset_dir: str, output_dir: str, factor: int, axis: int = 2, image_glob: str = EVERY_NIFTI) -> None:
    """
    Write each volume, and beside it ``NAME_thick.nii.gz``: slices averaged to thick ones, and interpolated back to the
    volume's grid, see :py:func:`interpolate_slices`.

    Args:
        dataset_dir: Folder of the volumes.
        output_dir: Folder to write, with a ``dataset.json`` whose items have ``image``, ``thick`` and what is known of them.
        factor: Number of slices that are averaged to one. Where it does not divide their number, the last is repeated.
        axis: Axis of the file, 0 to 2, along which the slices lie.
        image_glob: Pattern of the volumes.
    """

    def thick(values: np.ndarray, header: NiftiHeader, item: Item) -> Files:
        averages = average_slices(values, factor, axis)
        interpolated = interpolate_slices(averages, factor, axis, values.shape[axis])
        return {"thick": (interpolated, header.stored_as("<f4"))}  # not rounded

    _write_pairs(dataset_dir, output_dir, image_glob, thick)


def thin_grid(dataset_dir: str, output_dir: str, factor: int, axis: int = 2, image_glob: str = EVERY_NIFTI) -> None:
    """
    Write each volume of thick slices on a grid of thin ones, as ``NAME_thick.nii.gz``: what this is in the pairs of
    :py:func:`thick_slices`.

    Args:
        dataset_dir: Folder of the volumes.
        output_dir: Folder to write.
        factor: Number of slices that each becomes.
        axis: Axis of the file, 0 to 2, along which the slices lie.
        image_glob: Pattern of the volumes.
    """
    items = [item for of_list in _lists(dataset_dir, image_glob, output_dir).values() for item in of_list]
    for item in ProgressBar(items, desc="volumes", unit="volume"):
        values, header = read_nifti(os.path.join(dataset_dir, item["image"]))
        header = NiftiHeader.of_affine(thin_affine(header.affine, factor, axis), like=header)
        save_nifti(interpolate_slices(values, factor, axis), header, output_path(output_dir, item["image"], "thick"))


def holes(
    dataset_dir: str,
    output_dir: str,
    radius: float = 15,
    per_volume: int = 1,
    seed: int = 0,
    hole_key: str | None = None,
    image_glob: str = EVERY_NIFTI,
) -> None:
    """
    Write each volume, and beside it ``NAME_hole.nii.gz``, which is 1 in the hole, and ``NAME_masked.nii.gz``, the volume
    with the membrane (solution of Laplace's equation) in the hole.

    Args:
        dataset_dir: Folder of the volumes.
        output_dir: Folder to write, with a ``dataset.json`` whose items have ``image``, ``masked``, ``hole`` and what is
            known of them.
        radius: Radius of a hole, a ball around a voxel that is brighter than the volume's mean, mm.
        per_volume: Number of balls.
        seed: Seed of the places, which depend on it and on the name of the file.
        hole_key: Key of label maps in ``dataset.json`` whose labels are the holes instead.
        image_glob: Pattern of the volumes.
    """

    def masked(values: np.ndarray, header: NiftiHeader, item: Item) -> Files:
        if hole_key is None:
            random = np.random.default_rng((seed, zlib.crc32(item["image"].encode())))
            hole = draw_hole(values.reshape(*values.shape[:3], -1).mean(-1), header.affine, radius, per_volume, random)
        elif hole_key not in item:
            raise ValueError(f"has no `{hole_key}` in dataset.json.")
        else:
            hole, of_hole = read_nifti(os.path.join(dataset_dir, item[hole_key]))
            if hole.shape != values.shape[:3] or not np.allclose(of_hole.affine, header.affine, atol=SHIFT):
                raise ValueError(f"and its `{hole_key}`, {item[hole_key]}, have different grids.")
        filled = fill_hole(np.zeros_like(values), values, hole, nib.affines.voxel_sizes(header.affine))
        return {"masked": (filled, header), "hole": (hole != 0, header.stored_as("|u1"))}

    _write_pairs(dataset_dir, output_dir, image_glob, masked)


def _write_pairs(
    dataset_dir: str, output_dir: str, image_glob: str, degrade: Callable[[np.ndarray, NiftiHeader, Item], Files]
) -> None:
    """Write volumes with what ``degrade`` makes of them, and the lists of both."""
    lists = _lists(dataset_dir, image_glob, output_dir)
    for item in ProgressBar([item for items in lists.values() for item in items], desc="volumes", unit="volume"):
        image = os.path.join(dataset_dir, item["image"])
        values, header = read_nifti(image)
        try:
            made = degrade(values, header, item)
        except ValueError as error:
            raise ValueError(f"{image} {error}") from error
        for name in item.values():
            source, target = Path(dataset_dir, str(name)), Path(output_dir, str(name))
            if isinstance(name, str) and stays_inside(name) and source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        item.update({**conditions_of(image, dataset_dir), **item})
        for key, (voxels, header_of_key) in made.items():
            path = output_path(output_dir, item["image"], key)
            save_nifti(voxels, header_of_key, path)
            item[key] = path.relative_to(output_dir).as_posix()
    source = Path(dataset_dir, "dataset.json")
    content = json.loads(source.read_text(encoding="utf-8-sig")) if source.is_file() else {}
    Path(output_dir, "dataset.json").write_text(json.dumps({**content, **lists}, indent=2))


def _lists(dataset_dir: str, image_glob: str, output_dir: str) -> dict[str, list[Item]]:
    """The lists of ``dataset.json``, otherwise all volumes below the folder; paths are relative to it."""
    if Path(dataset_dir).resolve() == Path(output_dir).resolve():
        raise ValueError(f"`output_dir` is `dataset_dir`, {dataset_dir}; name another folder.")
    found = dataset_lists(dataset_dir) or {"training": find_images(dataset_dir, image_glob, output_dir)}
    lists = {
        name: [{**item, "image": Path(os.path.relpath(item["image"], dataset_dir)).as_posix()} for item in items]
        for name, items in found.items()
    }
    results: dict[Path, str] = {}
    for image in (item["image"] for items in lists.values() for item in items):
        if not is_nifti(image):
            raise ValueError(f"{image} below {dataset_dir} is no NIfTI file.")
        other = results.setdefault(output_path(output_dir, image, ""), image)
        if other != image:
            raise ValueError(f"{dataset_dir} holds {other} and {image}, whose results would have one name; rename one.")
    return lists


def average_slices(volume: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """The means of ``factor`` slices each of ``HxWxD`` or ``HxWxDxC`` along an axis, where the last slice is repeated."""
    return along(axis, averaging(volume.shape[axis], factor), volume)


def interpolate_slices(thick: np.ndarray, factor: int, axis: int, num_slices: int | None = None) -> np.ndarray:
    """
    Thin slices from thick ones, by SciPy's cubic B-spline along one axis. A thick slice lies in the middle of its thin ones;
    the outermost are repeated beyond the ends. Values stay in the range of the slices, so that the spline's overshoot does
    not decide the intensity window.

    Args:
        thick: ``HxWxD``, or ``HxWxDxC``.
        factor: Number of thin slices in a thick one.
        axis: Axis along which they lie.
        num_slices: Number of slices of the result, which is cut at its end; None for all.
    """
    spline = interpolation(num_slices or thick.shape[axis] * factor, factor)
    return along(axis, spline, thick).clip(thick.min(), thick.max())


def thin_affine(affine: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """The affine of :py:func:`interpolate_slices`, from that of the thick slices."""
    to_thick = np.eye(4)
    to_thick[axis, axis] = 1 / factor
    to_thick[axis, 3] = (1 / factor - 1) / 2
    return affine @ to_thick


def averaging(num_slices: int, factor: int) -> np.ndarray:
    """Matrix from thin to thick slices."""
    thin = np.arange(-(-num_slices // factor) * factor)
    matrix = np.zeros((len(thin) // factor, num_slices))
    np.add.at(matrix, (thin // factor, thin.clip(max=num_slices - 1)), 1 / factor)
    return matrix


def interpolation(num_slices: int, factor: int) -> np.ndarray:
    """Matrix from thick to thin slices."""
    unit = np.eye(-(-num_slices // factor))
    return zoom(unit, (factor, 1), order=3, mode="nearest", grid_mode=True)[:num_slices]


def along(axis: int, matrix: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """A matrix times a volume along one axis."""
    return np.moveaxis(np.tensordot(matrix, volume, (1, axis)), 0, axis)


def draw_hole(volume: np.ndarray, affine: np.ndarray, radius: float, count: int, random: np.random.Generator) -> np.ndarray:
    """
    Balls of a radius in mm around random voxels that are brighter than the mean of the volume: ``HxWxD``, true in the balls,
    which may overlap and reach beyond the volume.
    """
    content = np.flatnonzero(volume > volume.mean())
    if not len(content):
        raise ValueError("is constant, so that there is no content to make a hole in.")
    hole = np.zeros(volume.shape, dtype=bool)
    for centre in zip(*np.unravel_index(random.choice(content, count), volume.shape)):
        offsets = [axis - middle for axis, middle in zip(np.ogrid[tuple(map(slice, volume.shape))], centre)]
        squares = sum(sum(x * offset for x, offset in zip(row, offsets)) ** 2 for row in affine[:3, :3])
        hole |= squares <= radius**2
    return hole


def fill_hole(sample: np.ndarray, given: np.ndarray, hole: np.ndarray, spacing: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """
    Fill a hole with a sample that meets the volume around it: the sample plus the membrane (solution of Laplace's equation)
    through the differences at the hole's border. At the edges of the volume the membrane is level.

    Args:
        sample: ``HxWxD``, or ``HxWxDxC``.
        given: Volume with the hole, of the same shape.
        hole: ``HxWxD``, not 0 in the hole.
        spacing: Spacing of the voxels, mm.

    Returns:
        float64, of the shape of ``sample``; ``given`` outside of the hole.

    Raises:
        ValueError: for a hole without voxels, or without a border.
    """
    inside = hole != 0
    filled = given.astype(np.float64)
    filled[inside] = sample[inside]
    for channel in np.ndindex(sample.shape[3:]):
        each = (..., *channel)
        filled[each][inside] += cg(*hole_equations(given[each] - sample[each].astype(np.float64), inside, spacing))[0]
    return filled


def hole_equations(
    values: np.ndarray, hole: np.ndarray, spacing: Sequence[float] = (1, 1, 1), order: int = 1
) -> tuple[csr_array, np.ndarray]:
    """
    The equations of a function that continues values into a hole, for :py:func:`scipy.sparse.linalg.cg`: Laplace's
    (``order`` 1), or the biharmonic one (2). Arguments as those of :py:func:`fill_hole`.

    Returns:
        Matrix and right side for the voxels of the hole, in their order in ``values[hole]``.
    """
    if not hole.any() or hole.all():
        raise ValueError("the hole is empty or the whole volume, so that it has no border.")
    box = tuple(slice(max(0, side.start - order), side.stop + order) for side in find_objects(hole.astype(np.int8))[0])
    operator = csr_array((1, 1))
    for size, step in zip(hole[box].shape, spacing):
        gradient = csr_array(np.diff(np.eye(size), axis=0) / step)
        operator = kronsum(gradient.T @ gradient, operator)
    unknown = hole[box].ravel()
    rows = csr_array(operator if order == 1 else operator @ operator)[unknown]
    return rows[:, unknown], -rows[:, ~unknown] @ values[box].ravel()[~unknown]


def read_nifti(path: str | Path) -> tuple[np.ndarray, NiftiHeader]:
    """Finite voxels, ``HxWxD`` or ``HxWxDxC``, and the header of a NIfTI file."""
    values, header = read_volume(str(path))
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has voxels that are NaN or infinite.")
    return values, header


if __name__ == "__main__":
    short_messages()
    fire.Fire({"thick_slices": thick_slices, "thin_grid": thin_grid, "holes": holes})
