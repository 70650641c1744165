"""Samples on the grids of spatial conditions: a folder of label maps becomes pairs of volumes and labels."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.processes import share_of
from scripts.data.dataset_tables import conditions_of
from scripts.data.grids import Grid, preprocessed_grid
from scripts.data.restored_volumes import NiftiHeader, Record, nifti_bytes, on_source_grid
from scripts.data.spatial_files import find_spatial_items
from scripts.data.volume_lists import EVERY_NIFTI
from scripts.data.volume_reader import affine_of, is_read_by_nibabel, read_volume, state_of
from scripts.diffusion.conditions import Volume
from scripts.diffusion.sampler import Sampler
from scripts.diffusion.statistics import ranges
from scripts.inference.samples import HEADER, Item, SamplePlan
from scripts.training.repeatable_batches import derive_seed

__all__ = ["SpatialSamplePlan", "sample_plan"]

FARTHEST = 1.5  # times a size or spacing beyond what training saw


def sample_plan(
    sampler: Sampler, output_dir: str, spatial_keys: Sequence[str], dataset_dir: str, spatial_size: Any = None, **kwargs: Any
) -> SamplePlan:
    """
    Which samples a run makes: on the grids of spatial conditions where ``spatial_keys`` names any.

    Args:
        sampler: sampler that makes the latents.
        output_dir: folder of the samples.
        spatial_keys: names of the spatial conditions; an empty list for none.
        dataset_dir: folder of the spatial conditions.
        spatial_size: see :py:class:`SamplePlan`.
        kwargs: further arguments of :py:class:`SamplePlan`.

    Raises:
        ValueError: for a ``spatial_size`` with spatial conditions, which have one.
    """
    if not spatial_keys:
        return SamplePlan(sampler, output_dir, spatial_size=spatial_size, **kwargs)
    if spatial_size is not None:
        raise ValueError(
            f"`spatial_size` is {spatial_size}, but samples have the size of their spatial conditions; leave it out."
        )
    return SpatialSamplePlan(sampler, output_dir, spatial_keys=spatial_keys, dataset_dir=dataset_dir, **kwargs)


class SpatialSamplePlan(SamplePlan):
    """
    Samples that belong to spatial conditions: for each case, ``num_samples`` on the grid of its first condition, or on that
    grid with another ``spacing``. They are written as nnU-Net and MONAI train on them, with a ``dataset.json``:
    ``imagesTr/CASE_sample_00_0000.nii.gz`` and, for label maps, ``labelsTr/CASE_sample_00.nii.gz``.

    Args:
        sampler: sampler that makes the latents.
        output_dir: folder of the samples.
        num_samples: number of samples of each case.
        seed: seed of the run; a sample depends on it, on its number and on the name of its case.
        conditions: values by name for all samples; others are those of the case in its ``dataset.json`` or
            ``participants.tsv``.
        spacing: mm along each axis (right, anterior, superior), one number for all, or None for that of the conditions.
        spatial_keys: names of the spatial conditions.
        dataset_dir: folder of the conditions, see :py:func:`scripts.data.spatial_files.find_spatial_items`.

    Raises:
        ValueError: for a setting that cannot be, a condition that training did not see, or one that no file has.
    """

    def __init__(
        self,
        sampler: Sampler,
        output_dir: str,
        num_samples: int,
        seed: int = 0,
        conditions: Mapping[str, Any] | None = None,
        spacing: float | Sequence[float] | None = None,
        *,
        spatial_keys: Sequence[str],
        dataset_dir: str,
    ) -> None:
        super().__init__(sampler, output_dir, num_samples, seed, conditions, spacing=spacing)
        self.dataset_dir = dataset_dir
        self.kinds = self.statistics.spatial_kinds(spatial_keys)
        self.cases = find_spatial_items(dataset_dir, EVERY_NIFTI, spatial_keys)

    def items(self) -> list[Item]:
        """
        This process's share of the samples that an earlier run into the folder did not make to the end.

        Returns:
            ``[{"name": case, "index": number, "image": path of the file whose grid it has, "source": path of the case's
            volume, if it has one, "paths" and "spatial": {key: path}}, ...]``
        """
        return share_of(self._missing(self._all()))

    def _all(self) -> list[Item]:
        items: list[Item] = []
        for case in self.cases:
            paths = {key: case["spatial"][key] for key in self.kinds if key in case["spatial"]}
            known = {"name": case["name"], "source": case["image"] or "", "paths": paths, "spatial": paths}
            known[Keys.IMAGE.value] = next(iter(paths.values()))
            items += [{**known, "index": index} for index in range(self.num_samples)]
        return items

    def path(self, item: Item) -> Path:
        """File of a sample."""
        return self.output_dir / "imagesTr" / f"{self._name(item)}_0000.nii.gz"

    def labels_path(self, item: Item, key: str) -> Path:
        """File of a label map that a sample was made from."""
        return self.output_dir / f"{self.label_names[key]}sTr" / f"{self._name(item)}.nii.gz"

    @property
    def label_names(self) -> dict[str, str]:
        """What label maps are called in the pairs: that of the key ``label``, otherwise the first, is the ``label``."""
        keys = [key for key, kind in self.kinds.items() if kind.is_label_map]
        label = Keys.LABEL.value
        return {key: label if key == label or (key == keys[0] and label not in keys) else key for key in keys}

    def _name(self, item: Item) -> str:
        return f"{item['name']}_sample_{item['index']:02d}"

    def noise_seed(self, item: Item) -> int:
        """Seed of the noise of a sample."""
        return derive_seed(self.seed, item["index"], int(content_hash(item["name"].encode())[:8], 16))

    def volume(self, item: Item) -> Volume:
        """
        Size, spacing and conditions of a sample.

        Raises:
            ValueError: for a size or spacing far beyond what training saw.
        """
        grid = self._grid(item)
        spacing = [round(float(length), 4) for length in nib.affines.voxel_sizes(grid.affine)]
        for name, unit, values in (("size", "voxels", grid.shape), ("spacing", "mm", spacing)):
            seen = self.statistics.seen(name)
            words = f"has the {name} {' x '.join(f'{n:g}' for n in values)} {unit}; training saw {ranges(seen)}"
            if not all(low / FARTHEST <= n <= high * FARTHEST for n, (low, high) in zip(values, seen)):
                raise ValueError(f"{words}, and nothing is known of what is so far from it.")
        known = conditions_of(item["source"] or self._file(item), self.dataset_dir)
        known = {key: value for key, value in known.items() if key in self.statistics.conditions.keys}
        return Volume(grid.shape, spacing, {**known, **self.conditions})

    def record(self, item: Item) -> Record:
        """The record of a sample: that of the file whose grid it has, or of that grid with another spacing."""
        grid, image = self._grid(item), nib.load(self._file(item)) if is_read_by_nibabel(self._file(item)) else None
        if self.spacing is None and isinstance(getattr(image, "header", None), nib.Nifti1Header):
            header, shape = NiftiHeader.of_file(image), _read_grid(self._file(item)).shape
        else:
            header, shape = NiftiHeader.of_affine(grid.affine), grid.shape
        header = replace(header, **self.stored)
        return self._record(header, self.path(item).name, shape, grid.shape, grid.affine)

    def settings(self, item: Item) -> dict[str, Any]:
        """What a sample depends on."""
        volume = self.volume(item)
        return {
            **self._settings(item),
            "case": item["name"],
            "spatial": {key: Path(path).relative_to(self.dataset_dir).as_posix() for key, path in item["paths"].items()},
            "spatial_states": {key: state_of(path) for key, path in item["paths"].items()},
            "spatial_size": list(volume.size),
            "spacing": list(volume.spacing),
            "conditions": dict(volume.conditions),
        }

    def is_whole(self, item: Item) -> bool:
        """Whether a sample lies there that was made in this way, with its label maps."""
        return all(self.labels_path(item, key).is_file() for key in self._label_keys(item)) and super().is_whole(item)

    def save_labels(self, item: Item, record: Record) -> None:
        """Write the label maps of a sample, on its grid."""
        for key in self._label_keys(item):
            stored = on_source_grid(item["spatial"][key], record)[..., 0]
            stored = stored.astype(np.result_type(*(np.min_scalar_type(int(end)) for end in (stored.min(), stored.max()))))
            values = {each.name: getattr(record, each.name) for each in fields(NiftiHeader)}
            header = NiftiHeader(**{**values, "data_type": stored.dtype.str, "scl_slope": 1.0, "scl_inter": 0.0})
            path = self.labels_path(item, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(nifti_bytes(stored, header), path)

    def finish(self) -> None:
        """Write ``dataset.json``, with the samples of all processes that are whole."""
        if idist.get_world_size() > 1:
            idist.barrier()
        if idist.get_rank() > 0:
            return
        training = []
        for item in filter(self.is_whole, self._all()):
            files = {
                Keys.IMAGE.value: self.path(item),
                **{self.label_names[key]: self.labels_path(item, key) for key in self._label_keys(item)},
            }
            paths = {key: f"./{path.relative_to(self.output_dir).as_posix()}" for key, path in files.items()}
            training.append({**self.volume(item).conditions, **paths})
        kind = next((self.kinds[key] for key, name in self.label_names.items() if name == Keys.LABEL.value), None)
        names = {"background": 0, **{f"class {label}": label for label in (kind.classes if kind else ())}}
        content = {
            "description": HEADER,
            "channel_names": {str(channel): "image" for channel in range(len(self.statistics.intensity_low))},
            "labels": names,
            "numTraining": len(training),
            "file_ending": ".nii.gz",
            "training": training,
        }
        write_atomically(json.dumps(content, indent=2).encode(), self.output_dir / "dataset.json")

    def _label_keys(self, item: Item) -> list[str]:
        return [key for key in item["paths"] if key in self.label_names]

    def _file(self, item: Item) -> str:
        """The file whose grid a sample has."""
        return next(iter(item["paths"].values()))

    def _grid(self, item: Item) -> Grid:
        """The grid of a sample as the network sees it."""
        return preprocessed_grid(_read_grid(self._file(item)), self.spacing)


@functools.lru_cache
def _read_grid(path: str) -> Grid:
    """The grid of a file."""
    if is_read_by_nibabel(path):
        image: Any = nib.load(path)
        return Grid(tuple(map(int, image.shape[:3])), affine_of(image))
    values, affine = read_volume(path)
    return Grid(values.shape[:3], affine)
