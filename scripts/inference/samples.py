"""Samples of a generator: which a run makes, how, and how they are written, as NIfTI with a JSON file beside each."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.processes import share_of
from scripts.data.restored_volumes import NiftiHeader, Record, nifti_bytes, record_of, restore, rows_of, with_record
from scripts.data.spatial_conditions import SpatialKind
from scripts.diffusion.conditions import Volume
from scripts.diffusion.sampler import Sampler
from scripts.diffusion.statistics import LatentStatistics, ranges
from scripts.training.repeatable_batches import derive_seed

__all__ = ["DrawNoised", "SamplePlan", "SaveSampled"]

HEADER = "synthetic volume of a generative model, no patient"  # up to 79 characters
Item = Mapping[Any, Any]
logger = logging.getLogger(__name__)


class SamplePlan:
    """
    Which samples a run makes. Size and spacing of a sample are drawn from those of the training volumes, together, unless
    they are given.

    Args:
        sampler: sampler that makes the latents.
        output_dir: folder of the samples, ``sample_0000.nii.gz`` and so on.
        num_samples: number of samples that the folder is to hold.
        seed: seed of the run; a sample depends on it and on its number.
        conditions: values by name; what is missing is left to the generator.
        spatial_size: voxels along each axis, or one number for all, or None.
        spacing: mm along each axis, or one number for all, or None.

    Attributes:
        kinds: spatial conditions of the samples, by key; none here.

    Raises:
        ValueError: for a setting that cannot be, a condition that training did not see, or volumes too small to make.
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
    ) -> None:
        if type(num_samples) is not int or num_samples < 1:
            raise ValueError(f"`num_samples` is {num_samples!r}; it must be a positive integer.")
        self.sampler, self.output_dir, self.num_samples, self.seed = sampler, Path(output_dir), num_samples, seed
        self.statistics = sampler.generator.statistics
        self.kinds: dict[str, SpatialKind] = {}
        self.conditions = self.statistics.conditions.checked(conditions or {})
        self.size = _per_axis("spatial_size", spatial_size, self.statistics)
        self.spacing = _per_axis("spacing", spacing, self.statistics)
        self._refuse_small()

    def path(self, item: Item) -> Path:
        """File of a sample."""
        return self.output_dir / f"sample_{item['index']:04d}.nii.gz"

    def noise_seed(self, item: Item) -> int:
        """Seed of the noise of a sample."""
        return derive_seed(self.seed, item["index"])

    def volume(self, item: Item) -> Volume:
        """Size, spacing and conditions of a sample."""
        geometries = self.statistics.geometries
        counts = np.array([each.count for each in geometries], dtype=float)
        random = np.random.default_rng((self.seed, item["index"]))
        drawn = geometries[random.choice(len(geometries), p=counts / counts.sum())]
        return Volume(self.size or drawn.size, list(map(float, self.spacing or drawn.spacing)), self.conditions)

    def record(self, item: Item) -> Record:
        """The record of a sample: axes to the right, anterior and superior, the origin in the volume's middle."""
        volume = self.volume(item)
        affine = np.diag([*volume.spacing, 1.0])
        affine[: len(volume.size), -1] = [-(n - 1) / 2 * step for n, step in zip(volume.size, volume.spacing)]
        header = NiftiHeader.of_affine(affine, qform_code=1, **self.stored)
        return self._record(header, self.path(item).name, tuple(volume.size), tuple(volume.size), affine)

    def settings(self, item: Item) -> dict[str, Any]:
        """What a sample depends on."""
        volume = self.volume(item)
        return {
            **self._settings(item),
            "spatial_size": list(volume.size),
            "spacing": list(volume.spacing),
            "conditions": dict(volume.conditions),
        }

    def items(self) -> list[Item]:
        """
        This process's share of the samples that an earlier run into the folder did not make to the end.

        Returns:
            ``[{"image": path, "index": number}, ...]``
        """
        items = [{"index": index} for index in range(self.num_samples)]
        missing = self._missing([{**item, Keys.IMAGE.value: str(self.path(item))} for item in items])
        self._warn_of_others(missing)
        return share_of(missing)

    def save_labels(self, item: Item, record: Record) -> None:
        """A sample without spatial conditions has no label maps."""

    def finish(self) -> None:
        """Nothing is left to be done when all samples are there."""

    @property
    def stored(self) -> dict[str, Any]:
        """How voxels are stored: as those of the training volumes."""
        return {name: getattr(self.statistics, name) for name in ("data_type", "scl_slope", "scl_inter")}

    def _record(
        self, header: NiftiHeader, source: str, shape: Any, preprocessed_shape: Any, preprocessed_affine: np.ndarray
    ) -> Record:
        channels = len(self.statistics.intensity_low)
        return Record(
            **vars(header),
            source=source,
            shape=(*shape, channels) if channels > 1 else shape,
            preprocessed_shape=preprocessed_shape,
            preprocessed_affine=rows_of(preprocessed_affine),
            intensity_low=tuple(self.statistics.intensity_low),
            intensity_high=tuple(self.statistics.intensity_high),
        )

    def _settings(self, item: Item) -> dict[str, Any]:
        return {
            "synthetic": True,
            "index": item["index"],
            "seed": self.seed,
            **self.sampler.settings,
            "generator_sha256": self.sampler.generator.sha256,
            "autoencoder_sha256": self.statistics.autoencoder.sha256,
        }

    def _missing(self, items: Sequence[Item]) -> list[Item]:
        missing = [item for item in items if not self.is_whole(item)]
        if len(missing) < len(items):
            logger.info(f"{len(items) - len(missing)} of {len(items)} samples are there already")
        return missing

    def is_whole(self, item: Item) -> bool:
        """Whether a sample lies there that was made in this way."""
        try:
            found = json.loads(description_path(self.path(item)).read_text())
            made_so = isinstance(found, dict) and self.settings(item).items() <= found.items()
            return made_so and found.get("volume_sha256") == content_hash(self.path(item).read_bytes())
        except (OSError, ValueError):
            return False

    def _warn_of_others(self, missing: Sequence[Item]) -> None:
        """Samples of other settings in the folder: those of the same number are replaced, others stay."""
        replaced = sum(description_path(self.path(item)).is_file() for item in missing)
        if replaced:
            numbers = [path.stem.removeprefix("sample_") for path in self.output_dir.glob("sample_*.json")]
            beyond = sum(number.isdecimal() and int(number) >= self.num_samples for number in numbers)
            logger.warning(
                f"{self.output_dir} has samples of other settings, or damaged ones: {replaced} are replaced, and {beyond} "
                f"stay, with numbers from {self.num_samples} on. Give each setting an `output_dir` of its own to keep them "
                "apart."
            )

    def _refuse_small(self) -> None:
        """Volumes below both the network's coarsest voxel and all that training saw would be nothing but one value."""
        multiple, seen = self.sampler.generator.network.multiple, self.statistics.seen("size")
        least = [min(factor * multiple, low) for factor, (low, _) in zip(self.statistics.factors, seen)]
        if self.size and any(n < smallest for n, smallest in zip(self.size, least)):
            raise ValueError(
                f"`spatial_size` {self.size} is too small for this generator, which needs at least {least} voxels; training "
                f"saw {ranges(seen)}."
            )


def _per_axis(name: str, value: Any, statistics: LatentStatistics) -> list[Any] | None:
    """``spatial_size`` or ``spacing``, a number for each axis, with a warning where training has not seen it."""
    if value is None:
        return None
    axes = len(statistics.factors)
    seen, types, kind, unit = {
        "spatial_size": ("size", (int,), "integers", "voxels"),
        "spacing": ("spacing", (int, float), "numbers", "mm"),
    }[name]
    values = list(value) if isinstance(value, (list, tuple)) else [value] * axes
    if len(values) != axes or not all(type(n) in types and 0 < n < math.inf for n in values):
        raise ValueError(f"`{name}` is {value!r}; it must be {axes} positive {kind} ({unit}), or one for all axes.")
    limits = statistics.seen(seen)
    if not all(low <= n <= high for n, (low, high) in zip(values, limits)):
        logger.warning(f"`{name}` {values}: training saw {ranges(limits)} {unit}; expect less of what lies outside")
    return values


class DrawNoised(Transform):
    """
    Draw the noise that a sample starts from, which carries the record of the sample, and what the network is conditioned on,
    see :py:meth:`scripts.diffusion.Sampler.start`.

    Args:
        plan: which samples are made.
    """

    def __init__(self, plan: SamplePlan) -> None:
        self.plan = plan

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        seed = self.plan.noise_seed(data)
        start = self.plan.sampler.start(self.plan.volume(data), seed)
        return {
            **data,
            Keys.IMAGE: with_record(start["noise"], self.plan.record(data)),
            "context": start["context"],
            "latent_size": start["latent_size"],
            "noise_seed": torch.tensor(seed),
            "spatial": data.get("spatial", {}),
            "settings": json.dumps(self.plan.settings(data)),
        }


class SaveSampled(Transform):
    """
    Write a sample as NIfTI, in the units that the training volumes had, and then the JSON file that says how it was made.

    Args:
        key: key of the volume, ``CxHxWxD`` in the range of the autoencoder.
        plan: which samples are made.
    """

    def __init__(self, key: str, plan: SamplePlan) -> None:
        self.key, self.plan = key, plan

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path, record = self.plan.path(data), record_of(data[Keys.IMAGE])
        content = nifti_bytes(restore(data[self.key], record), record, HEADER)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(content, path)
        self.plan.save_labels(data, record)
        window = {name: getattr(record, name) for name in ("intensity_low", "intensity_high")}
        description = {**json.loads(data["settings"]), **window, "volume_sha256": content_hash(content)}
        write_atomically(json.dumps(description, indent=2).encode(), description_path(path))
        logger.info(f"{path}")
        return dict(data)


def description_path(path: Path) -> Path:
    """The JSON file that says how a sample was made."""
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")
