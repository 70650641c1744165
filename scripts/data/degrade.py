"""Data sets of volumes with what a generator is given of them: thick slices, and volumes with holes.

    python -m scripts.data.degrade thick_slices --dataset_dir THIN --output_dir PAIRS --factor 4 [--axis 2]
    python -m scripts.data.degrade thin_grid --dataset_dir THICK --output_dir GIVEN --factor 4 [--axis 2]
    python -m scripts.data.degrade holes --dataset_dir VOLUMES --output_dir PAIRS [--radius 15] [--per_volume 1] [--seed 0]
    python -m scripts.data.degrade holes --dataset_dir VOLUMES --output_dir PAIRS --hole_key label

Volumes are NIfTI files: those of the lists in ``dataset.json``, otherwise all below the folder that ``image_glob`` matches.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np

from scripts.bundle.errors import short_messages
from scripts.bundle.files import write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.data.dataset_tables import conditions_of, dataset_lists
from scripts.data.file_names import OUTSIDE, is_nifti, output_path, stays_inside
from scripts.data.holes import draw_hole, fill_hole
from scripts.data.restored_volumes import NiftiHeader, as_stored, nifti_bytes
from scripts.data.slice_averages import average_slices, interpolate_slices, thin_affine
from scripts.data.volume_lists import EVERY_NIFTI, find_images
from scripts.data.volume_reader import read_volume

__all__ = ["holes", "thick_slices", "thin_grid"]

FLOAT: dict[str, Any] = {"data_type": "<f4", "scl_slope": 1.0, "scl_inter": 0.0}  # what was interpolated is not rounded
LABEL = {**FLOAT, "data_type": "|u1"}
Files = dict[str, tuple[np.ndarray, NiftiHeader]]
logger = logging.getLogger(__name__)


def thick_slices(dataset_dir: str, output_dir: str, factor: int, axis: int = 2, image_glob: str = EVERY_NIFTI) -> None:
    """
    Write each volume, and beside it ``NAME_thick.nii.gz``: slices averaged to thick ones, and interpolated back to the
    volume's grid, see :py:func:`scripts.data.slice_averages.interpolate_slices`.

    Args:
        dataset_dir: folder of the volumes.
        output_dir: folder to write, with a ``dataset.json`` whose items have ``image``, ``thick`` and what is known of them.
        factor: slices that are averaged to one, from 2 on. Where it does not divide their number, the last is repeated.
        axis: of the file, 0 to 2, along which the slices lie.
        image_glob: see :py:func:`scripts.data.find_images`.
    """
    _check_slices(factor, axis)

    def thick(values: np.ndarray, header: NiftiHeader, item: dict[str, Any]) -> Files:
        averages = average_slices(values, factor, axis)
        return {"thick": (interpolate_slices(averages, factor, axis, values.shape[axis]), replace(header, **FLOAT))}

    _write_pairs(dataset_dir, output_dir, image_glob, thick)


def thin_grid(dataset_dir: str, output_dir: str, factor: int, axis: int = 2, image_glob: str = EVERY_NIFTI) -> None:
    """
    Write each volume of thick slices on a grid of thin ones, as ``NAME_thick.nii.gz``: what this is in the pairs of
    :py:func:`thick_slices`.

    Args:
        dataset_dir: folder of the volumes.
        output_dir: folder to write.
        factor: slices that each becomes, from 2 on.
        axis: of the file, 0 to 2, along which the slices lie.
        image_glob: see :py:func:`scripts.data.find_images`.
    """
    _check_slices(factor, axis)
    _check_folders(dataset_dir, output_dir)
    lists = _lists(dataset_dir, image_glob, output_dir)
    for item in ProgressBar([item for items in lists.values() for item in items], desc="volumes", unit="volume"):
        values, header = _read(item["image"])
        path = output_path(output_dir, os.path.relpath(item["image"], dataset_dir), "thick")
        codes = {"xyzt_units": header.xyzt_units, "sform_code": max(1, header.sform_code)}
        affine = thin_affine(np.array(header.affine), factor, axis)
        _save(interpolate_slices(values, factor, axis), NiftiHeader.of_affine(affine, **codes), path)


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
        dataset_dir: folder of the volumes.
        output_dir: folder to write, with a ``dataset.json`` whose items have ``image``, ``masked``, ``hole`` and what is
            known of them.
        radius: of a hole, a ball around a voxel that is brighter than the volume's mean, mm.
        per_volume: number of balls.
        seed: of the places, which depend on it and on the name of the file.
        hole_key: key of label maps in ``dataset.json`` whose labels are the holes instead.
        image_glob: see :py:func:`scripts.data.find_images`.
    """
    _check_whole("per_volume", per_volume, 1, math.inf)
    if not radius > 0:
        raise ValueError(f"`radius` is {radius!r}; it must be a number of mm above 0.")

    def masked(values: np.ndarray, header: NiftiHeader, item: dict[str, Any]) -> Files:
        if hole_key is not None:
            hole = _hole_of(item, hole_key, values, header, dataset_dir)
        else:
            name = os.path.relpath(item["image"], dataset_dir)
            random = np.random.default_rng((seed, zlib.crc32(Path(name).as_posix().encode())))
            grey = values.reshape(*values.shape[:3], -1).mean(-1)
            hole = draw_hole(grey, np.array(header.affine), radius, per_volume, random)
        filled = fill_hole(np.zeros_like(values), values, hole, nib.affines.voxel_sizes(np.array(header.affine)))
        return {"masked": (filled, header), "hole": (hole, replace(header, **LABEL))}

    _write_pairs(dataset_dir, output_dir, image_glob, masked)


def _write_pairs(
    dataset_dir: str, output_dir: str, image_glob: str, degrade: Callable[[np.ndarray, NiftiHeader, dict[str, Any]], Files]
) -> None:
    """Write volumes with what ``degrade`` makes of them, and the lists of both."""
    _check_folders(dataset_dir, output_dir)
    lists = _lists(dataset_dir, image_glob, output_dir)
    bar = ProgressBar([(name, item) for name, items in lists.items() for item in items], desc="volumes", unit="volume")
    written: dict[str, list[dict[str, Any]]] = {name: [] for name in lists}
    for name, item in bar:
        image = Path(item["image"]).relative_to(dataset_dir).as_posix()
        values, header = _read(item["image"])
        try:
            made = degrade(values, header, item)
        except ValueError as error:
            raise ValueError(f"{item['image']} {error}") from error
        known = {**conditions_of(item["image"], dataset_dir), **item, "image": image}
        for value in known.values():
            _copy_file(value, dataset_dir, output_dir)
        for key, (voxels, header_of_key) in made.items():
            path = output_path(output_dir, image, key)
            _save(voxels, header_of_key, path)
            known[key] = path.relative_to(output_dir).as_posix()
        written[name].append(known)
    source = Path(dataset_dir, "dataset.json")
    content = json.loads(source.read_text(encoding="utf-8-sig")) if source.is_file() else {}
    Path(output_dir, "dataset.json").write_text(json.dumps({**content, **written}, indent=2))


def _lists(dataset_dir: str, image_glob: str, output_dir: str) -> dict[str, list[dict[str, Any]]]:
    """The lists of ``dataset.json``, otherwise all volumes below the folder."""
    lists = dataset_lists(dataset_dir) or {"training": find_images(dataset_dir, image_glob, output_dir)}
    targets: dict[Path, str] = {}
    for item in (item for items in lists.values() for item in items):
        image = os.path.relpath(item["image"], dataset_dir)
        if not is_nifti(image) or not stays_inside(image):
            raise ValueError(f"{item['image']} is no NIfTI file below {dataset_dir}.")
        other = targets.setdefault(output_path(output_dir, image, ""), image)
        if other != image:
            raise ValueError(f"{dataset_dir} holds {other} and {image}, whose results would have one name; rename one.")
    return lists


def _read(path: str) -> tuple[np.ndarray, NiftiHeader]:
    """Voxels ``HxWxD`` or ``HxWxDxC``, and the header of a NIfTI file."""
    try:
        values, _ = read_volume(path)
        if not np.isfinite(values).all():
            raise ValueError("has voxels that are NaN or infinite.")
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return values, NiftiHeader.of_file(nib.load(path))


def _hole_of(item: dict[str, Any], key: str, image: np.ndarray, header: NiftiHeader, dataset_dir: str) -> np.ndarray:
    """Where the label map of an item is not 0."""
    if key not in item:
        raise ValueError(f"has no `{key}` in dataset.json, which `hole_key` names.")
    labels, of_labels = _read(os.path.join(dataset_dir, item[key]))
    if labels.shape != image.shape[:3] or not np.allclose(of_labels.affine, header.affine, atol=1e-3):
        raise ValueError(f"and its `{key}`, {item[key]}, have different grids.")
    if not labels.any():
        raise ValueError(f"has no hole: its `{key}`, {item[key]}, is 0 everywhere.")
    return labels != 0


def _copy_file(value: Any, dataset_dir: str, output_dir: str) -> None:
    """Copy what an item of ``dataset.json`` names, if it is a file below the folder."""
    source = Path(dataset_dir) / str(value)
    if isinstance(value, str) and value and source.is_file() and not os.path.isabs(value):
        if not stays_inside(value):
            raise ValueError(f"{source} {OUTSIDE}, so that it cannot be copied to {output_dir}.")
        target = Path(output_dir) / value
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _save(values: np.ndarray, header: NiftiHeader, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(nifti_bytes(as_stored(values, header), header), path)


def _check_slices(factor: int, axis: int) -> None:
    _check_whole("factor", factor, 2, math.inf)
    _check_whole("axis", axis, 0, 2)


def _check_whole(name: str, value: Any, least: int, most: float) -> None:
    if type(value) is not int or not least <= value <= most:
        limits = f"from {least} on" if math.isinf(most) else f"from {least} to {most}"
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number {limits}.")


def _check_folders(dataset_dir: str, output_dir: str) -> None:
    if Path(dataset_dir).resolve() == Path(output_dir).resolve():
        raise ValueError(f"`output_dir` is `dataset_dir`, {dataset_dir}; name another folder.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    short_messages()
    fire.Fire({"thick_slices": thick_slices, "thin_grid": thin_grid, "holes": holes})
