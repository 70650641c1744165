"""Latents that `encoding` wrote, as a generator is trained on them: lists, statistics, loading and batches."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.weights import what_differs
from scripts.data.grids import spacing_of
from scripts.data.latents import LatentDescription, all_latents, read_description, read_latent, read_spatial
from scripts.data.spatial_kinds import SpatialKind
from scripts.data.volume_lists import split_by_subject
from scripts.diffusion.conditions import Conditions, Volume
from scripts.diffusion.flow import draw_noise
from scripts.diffusion.statistics import Geometry, LatentAutoencoder, LatentStatistics
from scripts.layers.factors import padded_size
from scripts.layers.resampling import pad_at_end

LEAST_SHARE = 1e-6  # of the strongest channel's deviation; a weaker channel is as good as constant
Item = dict[str, str]
logger = logging.getLogger(__name__)


def latent_lists(
    dataset_dir: str, val_fraction: float, seed: int, max_volumes: int | None = None, subject_pattern: str | None = None
) -> dict[str, list[Item]]:
    """
    The latents below a folder, for training and for validation: as the ``dataset.json`` of the volumes said, otherwise by
    a split that is the one of the autoencoder's training on the same volumes, with the same fraction, seed and pattern.

    Args:
        dataset_dir: folder that `encoding` wrote to.
        val_fraction: share of the subjects for validation, where no ``dataset.json`` had a validation list.
        seed: seed of the split.
        max_volumes: largest number of items of each list; None for all.
        subject_pattern: pattern that finds the subject in the path of a volume.

    Returns:
        ``{"training": [{"image": path}, ...], "validation": [...]}``.

    Raises:
        FileNotFoundError: when there is no latent, or none that ``dataset.json`` lists for training.
        ValueError: for latents of more than one autoencoder, by name, and when there is nothing to split.
    """
    descriptions = {path: read_description(Path(path)) for path in all_latents(dataset_dir)}
    _refuse_mixture(descriptions)
    # the split looks at the paths of the volumes
    items: list[Any] = [
        {"image": each.source, "latent": path, "list": each.dataset_list} for path, each in descriptions.items()
    ]
    lists = {name: [item for item in items if item["list"] == name] for name in ("training", "validation")}
    if any(item["list"] for item in items):
        items = lists["training"]
        if not items:
            raise FileNotFoundError(f"{dataset_dir!r} has no latent of a volume that dataset.json lists for training.")
    if not lists["validation"]:
        lists = split_by_subject(items, ".", val_fraction, seed, subject_pattern)
    return {name: [{"image": item["latent"]} for item in found][:max_volumes] for name, found in lists.items()}


def learn_statistics(
    items: Sequence[Item], latent_gamma: float, condition_keys: Sequence[str] = (), spatial_keys: Sequence[str] = ()
) -> LatentStatistics:
    """
    Statistics of latents, by the JSON files beside them.

    Args:
        items: training list, latents of one autoencoder.
        latent_gamma: 0 to 1, see :py:class:`LatentStatistics`.
        condition_keys: conditions to use.
        spatial_keys: spatial conditions to use.

    Raises:
        ValueError: for conditions that no volume has, and a spatial condition that was not encoded alike for all.
    """
    descriptions = [read_description(Path(item["image"])) for item in items]
    volumes, first = [volume_of(each) for each in descriptions], descriptions[0]
    counts = Counter((tuple(volume.size), tuple(volume.spacing)) for volume in volumes)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    statistics = LatentStatistics(
        autoencoder=LatentAutoencoder(first.network, first.weights_sha256),
        volumes=len(descriptions),
        latent_gamma=latent_gamma,
        **_channels(descriptions, latent_gamma),
        conditions=Conditions.learn(condition_keys, volumes),
        geometries=[Geometry(list(size), list(spacing), count) for (size, spacing), count in ordered],
        intensity_low=np.median([each.intensity_low for each in descriptions], axis=0).tolist(),
        intensity_high=np.median([each.intensity_high for each in descriptions], axis=0).tolist(),
        **(first.stored if all(each.stored == first.stored for each in descriptions) else {}),
        spatial={key: _kind(key, descriptions) for key in spatial_keys},
    )
    logger.info(statistics.summary())
    return statistics


def volume_of(description: LatentDescription) -> Volume:
    """The volume that a latent was made of."""
    return Volume(description.preprocessed_shape, spacing_of(description.preprocessed_affine), description.conditions)


def _kind(key: str, descriptions: Sequence[LatentDescription]) -> SpatialKind:
    kinds = [each.spatial[key].kind for each in descriptions if key in each.spatial]
    if not kinds:
        known = ", ".join(sorted({name for each in descriptions for name in each.spatial})) or "none"
        raise ValueError(f"`spatial_keys` names {key!r}, which no training latent has; they have {known}.")
    if len(set(kinds)) > 1:
        raise ValueError(f"the spatial condition {key!r} was encoded with different classes; encode all volumes again.")
    logger.info(f"{len(kinds)} of {len(descriptions)} training latents have the spatial condition {key!r}")
    return kinds[0]


def _channels(descriptions: Sequence[LatentDescription], latent_gamma: float) -> dict[str, Any]:
    """Mean, deviation and amplitude of each channel over all latents."""
    count = [each.count for each in descriptions]
    mean = np.average([each.channel_mean for each in descriptions], axis=0, weights=count)
    mean_square = np.average([each.channel_mean_square for each in descriptions], axis=0, weights=count)
    deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
    deviation = np.maximum(deviation, LEAST_SHARE * deviation.max())
    amplitude = (deviation * np.array(descriptions[0].image_scale)) ** latent_gamma
    amplitude /= np.sqrt(np.mean(amplitude**2))
    found = {"channel_mean": mean, "channel_deviation": deviation, "channel_amplitude": amplitude}
    return {name: values.tolist() for name, values in found.items()}


def _refuse_mixture(descriptions: Mapping[str, LatentDescription]) -> None:
    made_by = {path: {**each.network, "SHA-256": each.weights_sha256[:12]} for path, each in descriptions.items()}
    first = next(iter(made_by))
    for path, autoencoder in made_by.items():
        if details := what_differs(autoencoder, made_by[first]):
            raise ValueError(f"{path} is of another autoencoder than {first}: {details}. Encode all with the same weights.")


class ReadLatentd(Transform):
    """
    Read a latent and what is known of its volume: ``volume``, a :py:class:`scripts.diffusion.conditions.Volume`; ``seed``,
    which follows from the file's name; ``file``; and ``spatial`` and ``given``, the latents of the spatial conditions, see
    :py:meth:`LatentStatistics.stacked`. A damaged latent is a ValueError.
    """

    def __init__(self, statistics: LatentStatistics) -> None:
        self.statistics = statistics

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path = Path(data[Keys.IMAGE])
        description = read_description(path)
        latent, conditions = read_latent(path, description), read_spatial(path, description, self.statistics.spatial)
        spatial, given = self.statistics.stacked(conditions, latent.shape[1:])
        return {
            **data,
            Keys.IMAGE: latent,
            "spatial": spatial,
            "given": given,
            "volume": volume_of(description),
            "seed": int.from_bytes(hashlib.sha256(description.source.encode()).digest()[:4], "big"),
            "file": str(path),
        }


class LatentCollate:
    """
    Make a batch of latents, which may differ in size: each is padded at its end, by repeating its last voxels, to the
    largest of the batch and to what the network divides. The noise of each comes from its own seed, so that it does not
    depend on what else is in the batch.

    Args:
        multiple: number of voxels that padded sizes are multiples of.
    """

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """
        Make a batch of what :py:class:`ReadLatentd` returns, or of lists of it.

        Returns:
            ``image`` and ``noise`` ``BxCxHxWxD``, ``mask`` ``Bx1xHxWxD`` (1 in the volume), ``extent`` ``Bx3`` (share of
            each axis that is volume), ``spatial`` ``BxNxHxWxD``, ``given`` ``BxK``, and lists of the rest.
        """
        items = [item for sample in samples for item in (sample if isinstance(sample, list) else [sample])]
        latents, channels = [item[Keys.IMAGE] for item in items], len(items[0][Keys.IMAGE])
        largest = [max(sizes) for sizes in zip(*(z.shape[1:] for z in latents))]
        size = padded_size(largest, [self.multiple] * len(largest))
        mask = torch.zeros(len(latents), 1, *size)
        for i, z in enumerate(latents):
            mask[i, 0][tuple(slice(n) for n in z.shape[1:])] = 1
        padded = torch.cat([pad_at_end(torch.cat([item[Keys.IMAGE], item["spatial"]])[None], size) for item in items])
        return {
            Keys.IMAGE: padded[:, :channels],
            "spatial": padded[:, channels:],
            "given": torch.stack([item["given"] for item in items]),
            "noise": torch.stack([draw_noise((len(z), *size), item["seed"]) for z, item in zip(latents, items)]),
            "mask": mask,
            "extent": torch.tensor([[n / whole for n, whole in zip(z.shape[1:], size)] for z in latents]),
            **{key: [item[key] for item in items] for key in ("volume", "seed", "file")},
        }
