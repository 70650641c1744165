"""Samples of a generator: which a run makes, on which grids, and how they are written."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.json_files import checked
from scripts.bundle.machine import share_of
from scripts.data.dataset_tables import conditions_of
from scripts.data.grids import back_on_grid, grid_of, spacing_of
from scripts.data.restored_volumes import Record, record_of, restore, save_labels, save_nifti, with_record
from scripts.data.spatial_files import find_spatial_items
from scripts.data.volume_reader import NiftiHeader, read_header, state_of
from scripts.diffusion.conditions import Volume
from scripts.diffusion.sampler import Sampler
from scripts.diffusion.statistics import ranges
from scripts.layers.factors import by
from scripts.training.repeatable_batches import derive_seed

HEADER = "synthetic volume of a generative model, no patient"  # up to 79 characters
FARTHEST, FARTHEST_OF_FILES = 3.0, 1.5  # times beyond the sizes and spacings of training
UNITS = {"size": "voxels", "spacing": "mm"}
LABEL = Keys.LABEL.value
Placed = tuple[Volume, np.ndarray, NiftiHeader]  # affine of the volume, header of its file
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """
    A sample before it is made.

    Args:
        path: its file.
        noise_seed: seed of its noise.
        settings: what it depends on, for the JSON file beside it.
        spatial: files of its spatial conditions, by key; it lies on the grid of the first.
        labels: files of its label maps, by key.
    """

    path: Path
    noise_seed: int
    settings: dict[str, Any]
    spatial: dict[str, str] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)

    @property
    def description_path(self) -> Path:
        """The JSON file that says how it was made; it is written last."""
        return self.path.with_name(self.path.name.removesuffix(".nii.gz") + ".json")

    def is_whole(self) -> bool:
        """Whether its files are there and were made in this way."""
        try:
            found = json.loads(self.description_path.read_text())
            made_so = self.settings.items() <= found.items() and all(path.is_file() for path in self.labels.values())
            return made_so and found.get("volume_sha256") == content_hash(self.path.read_bytes())
        except (OSError, ValueError):
            return False


class Samples:
    """
    The samples of a run, ``sample_0000.nii.gz`` and so on, with size and spacing of a training volume each.

    With spatial conditions: ``num_samples`` for each case, on the grid of its first condition, as nnU-Net and MONAI train on
    them: ``imagesTr/CASE_sample_00_0000.nii.gz``, for label maps ``labelsTr/CASE_sample_00.nii.gz``, and ``dataset.json``.

    Args:
        sampler: sampler that makes the latents.
        output_dir: folder of the samples.
        num_samples: number of samples, of each case if there are cases.
        seed: seed of the run; a sample depends on it, on its number and on the name of its case.
        conditions: values by name, which come before those that a case has in ``dataset.json`` or ``participants.tsv``.
        spatial_size: voxels along each axis, or one number for all, or None.
        spacing: mm along each axis (right, anterior, superior), or one number for all, or None.
        spatial_keys: names of the spatial conditions.
        dataset_dir: folder of the spatial conditions, see :py:func:`scripts.data.spatial_files.find_spatial_items`.

    Raises:
        ValueError: for a setting that cannot be, or a condition that training did not see.
    """

    def __init__(
        self,
        sampler: Sampler,
        output_dir: str,
        num_samples: int,
        seed: int = 0,
        conditions: Mapping[str, Any] | None = None,
        spatial_size: int | Sequence[int] | None = None,
        spacing: float | Sequence[float] | None = None,
        spatial_keys: Sequence[str] = (),
        dataset_dir: str | None = None,
    ) -> None:
        if spatial_keys and spatial_size is not None:
            raise ValueError("`spatial_size` is set, but samples have the size of their spatial conditions; leave it out.")
        if dataset_dir and not spatial_keys:
            raise ValueError("`dataset_dir` is set, but `spatial_keys`, which names what to read there, is not.")
        self.sampler, self.output_dir, self.seed, self.dataset_dir = sampler, Path(output_dir), seed, dataset_dir or ""
        self.statistics = sampler.generator.statistics
        self.conditions = self.statistics.conditions.checked(conditions or {})
        self.size, self.spacing = self._per_axis("spatial_size", spatial_size), self._per_axis("spacing", spacing)
        self.kinds = self.statistics.spatial_kinds(spatial_keys)
        label_maps = [key for key, kind in self.kinds.items() if kind.is_label_map]
        first = LABEL if LABEL in label_maps else next(iter(label_maps), None)
        self.label_names = {key: LABEL if key == first else key for key in label_maps}
        cases = find_spatial_items(self.dataset_dir, spatial_keys) if spatial_keys else [None]
        self.samples = [self._planned(case, index) for case in cases for index in range(num_samples)]

    def missing(self) -> list[dict[str, Any]]:
        """
        This process's share of the samples that are not there yet: ``[{"number": number, "image": what it is named by,
        "spatial": {key: path}}, ...]``.
        """
        missing = {number: sample for number, sample in enumerate(self.samples) if not sample.is_whole()}
        if done := len(self.samples) - len(missing):
            logger.info(f"{done} of {len(self.samples)} samples are there already")
        if any(sample.description_path.is_file() for sample in missing.values()):
            logger.warning(
                f"{self.output_dir} has samples of other settings, or damaged ones: those of the same numbers are replaced, "
                "others stay."
            )
        items = [
            {"number": number, "image": next(iter(sample.spatial.values()), str(sample.path)), "spatial": sample.spatial}
            for number, sample in missing.items()
        ]
        return share_of(items)

    def start(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform: what the :py:class:`SampleInferer` is given for a sample, with the record of the sample."""
        sample, statistics = self.samples[data["number"]], self.statistics
        for key, volume in data["spatial"].items():
            if self.kinds[key].is_label_map and not volume.any():
                logger.warning(f"{sample.spatial[key]}: the label map {key!r} has no label but the background")
        first = next(iter(data["spatial"].values()), None)
        volume, affine, header = self._of_drawn_size(sample) if first is None else self._on_grid(sample, first)
        channels, size = len(statistics.intensity_low), header.shape[:3]
        header = header.with_shape((*size, channels) if channels > 1 else size)
        known = {
            **vars(header.stored_as(statistics.data_type, statistics.scl_slope, statistics.scl_inter)),
            "source": sample.path.name,
            "preprocessed_shape": volume.size,
            "preprocessed_affine": affine.tolist(),
            "intensity_low": statistics.intensity_low,
            "intensity_high": statistics.intensity_high,
        }
        record = checked(known, Record)
        start = self.sampler.start(volume, sample.noise_seed)
        return {
            **data,
            Keys.IMAGE: with_record(start["noise"][0], record),
            "context": start["context"][0],
            "latent_size": torch.tensor(start["latent_size"]),
            "noise_seed": start["seed"],
        }

    def save(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform: write a sample (``pred``, ``CxHxWxD``), its label maps, and last the JSON file."""
        sample, record = self.samples[data["number"]], record_of(data[Keys.IMAGE])
        values = np.moveaxis(restore(data[Keys.PRED], record), 0, -1).reshape(record.shape)
        sha256 = save_nifti(values, record, sample.path, HEADER)
        for key, path in sample.labels.items():
            labels = data["spatial"][key].as_tensor().numpy()
            save_labels(back_on_grid(labels, np.array(record.preprocessed_affine), record.grid)[0], record, path)
        found = {
            "spatial_size": list(record.preprocessed_shape),
            "spacing": spacing_of(record.preprocessed_affine),
            "intensity_low": record.intensity_low,
            "intensity_high": record.intensity_high,
            **sample.settings,
            "volume_sha256": sha256,
        }
        _write(sample.description_path, json.dumps(found, indent=2).encode())
        logger.info(f"{sample.path}")
        return dict(data)

    def finish(self) -> None:
        """Write the ``dataset.json`` of samples with spatial conditions, when all processes are done."""
        idist.barrier()
        if idist.get_rank() > 0 or not self.kinds:
            return
        training = []
        for sample in filter(Sample.is_whole, self.samples):
            files = {"image": sample.path, **{self.label_names[key]: path for key, path in sample.labels.items()}}
            paths = {key: f"./{path.relative_to(self.output_dir).as_posix()}" for key, path in files.items()}
            training.append({**sample.settings["conditions"], **paths})
        classes = [label for key, name in self.label_names.items() if name == LABEL for label in self.kinds[key].classes]
        content = {
            "description": HEADER,
            "channel_names": {str(channel): "image" for channel in range(len(self.statistics.intensity_low))},
            "labels": {"background": 0, **{f"class {label}": label for label in classes}},
            "numTraining": len(training),
            "file_ending": ".nii.gz",
            "training": training,
        }
        _write(self.output_dir / "dataset.json", json.dumps(content, indent=2).encode())

    def _planned(self, case: Mapping[str, Any] | None, index: int) -> Sample:
        settings = {
            "synthetic": True,
            "index": index,
            "seed": self.seed,
            **self.sampler.settings,
            "generator_sha256": self.sampler.generator.sha256,
            "autoencoder_sha256": self.statistics.autoencoder.sha256,
            "requested_size": self.size,
            "requested_spacing": self.spacing,
            "conditions": self.conditions,
        }
        if case is None:
            return Sample(self.output_dir / f"sample_{index:04d}.nii.gz", derive_seed(self.seed, index), settings)
        name, spatial = f"{case['name']}_sample_{index:02d}", case["spatial"]
        known = conditions_of(case["image"] or next(iter(spatial.values())), self.dataset_dir)
        known = {key: value for key, value in known.items() if key in self.statistics.conditions.keys}
        settings |= {
            "case": case["name"],
            "spatial": {key: Path(file).relative_to(self.dataset_dir).as_posix() for key, file in spatial.items()},
            "spatial_states": {key: state_of(file) for key, file in spatial.items()},
            "conditions": {**known, **self.conditions},
        }
        path = self.output_dir / "imagesTr" / f"{name}_0000.nii.gz"
        noise_seed = derive_seed(self.seed, index, int(content_hash(case["name"].encode())[:8], 16))
        folders = {key: self.output_dir / f"{folder}sTr" for key, folder in self.label_names.items() if key in spatial}
        labels = {key: folder / f"{name}.nii.gz" for key, folder in folders.items()}
        return Sample(path, noise_seed, settings, spatial, labels)

    def _of_drawn_size(self, sample: Sample) -> Placed:
        """Axes to the right, anterior and superior, the origin in the volume's middle."""
        geometries = self.statistics.geometries
        counts = np.array([each.count for each in geometries], dtype=float)
        random = np.random.default_rng((self.seed, sample.settings["index"]))
        drawn = geometries[random.choice(len(geometries), p=counts / counts.sum())]
        spacing = list(map(float, self.spacing or drawn.spacing))
        volume = Volume(self.size or drawn.size, spacing, sample.settings["conditions"])
        affine = np.diag([*volume.spacing, 1.0])
        affine[:3, 3] = [-(n - 1) / 2 * step for n, step in zip(volume.size, volume.spacing)]
        return volume, affine, NiftiHeader.of_affine(affine, volume.size, qform_code=1)

    def _on_grid(self, sample: Sample, first: MetaTensor) -> Placed:
        """On the grid of its first spatial condition."""
        (size, affine), file = grid_of(first), next(iter(sample.spatial.values()))
        volume = Volume(size, spacing_of(affine), sample.settings["conditions"])
        self._check_seen("spacing", volume.spacing, FARTHEST_OF_FILES)
        self._check_seen("size", size, FARTHEST_OF_FILES)
        return volume, affine, read_header(file) if self.spacing is None else NiftiHeader.of_affine(affine, size)

    def _per_axis(self, name: str, value: Any) -> list[Any] | None:
        """``spatial_size`` or ``spacing``, a number for each axis."""
        if value is None:
            return None
        axes = len(self.statistics.factors)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * axes
        if len(values) != axes or not all(n > 0 for n in values):
            raise ValueError(f"`{name}` is {value!r}; it must be {axes} positive numbers, or one for all axes.")
        self._check_seen(name.removeprefix("spatial_"), values)
        return values

    def _check_seen(self, name: str, values: Sequence[float], farthest: float = FARTHEST) -> None:
        """Refuse a size or spacing ``farthest`` times beyond what training saw, and warn of one that is less far."""
        seen = self.statistics.seen(name)
        words = f"{name} {by(values, ' x ')} {UNITS[name]}; training saw {ranges(seen)}"
        if any(n * farthest < low or n > high * farthest for n, (low, high) in zip(values, seen)):
            raise ValueError(f"has the {words}, and another `spacing` may be what is needed.")
        if any(not low <= n <= high for n, (low, high) in zip(values, seen)):
            logger.warning(f"{words}: expect less of what lies outside")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(content, path)
