"""Measures volumes by the spatial conditions that they belong to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from scripts.bundle.progress import ProgressBar
from scripts.data.latents import LatentDescription, read_description, read_labels
from scripts.data.spatial_kinds import SpatialKind
from scripts.evaluation.pictures import overlaid
from scripts.evaluation.samples.sample_sets import CONDITION, HELD_OUT, TRAINING, TRAINING_MEAN, LatentReader, VolumeSet
from scripts.evaluation.samples.segmentation import Pair, Segmenter, train_segmenter
from scripts.evaluation.samples.spatial_metrics import border_step, explained_share, fidelity, inside_mae

__all__ = ["SpatialEvaluation"]

MOST_CLASSES = 6  # that have a column each for their Dice


class SpatialEvaluation:
    """
    Measures volumes by the spatial conditions that samples are given.

    Args:
        kinds: these conditions by key.
        reader: reader of the latents.
        decode: from a normalised latent ``CxHxWxD`` to a volume in [0, 1], which may be padded at its end.
    """

    def __init__(
        self, kinds: Mapping[str, SpatialKind], reader: LatentReader, decode: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.reader, self.decode = reader, decode
        self.images = {key: kind for key, kind in kinds.items() if not kind.is_label_map}
        self.label_maps = {key: kind for key, kind in kinds.items() if kind.is_label_map}
        self.segmenters: dict[str, Segmenter] = {}

    def baselines(self, held_out: VolumeSet, training: VolumeSet) -> dict[str, VolumeSet]:
        """
        Sets that samples with image conditions must be nearer to the held-out volumes than: each condition as it is, and the
        means of the training volumes of the same size. Empty without image conditions.
        """
        sets = {name: VolumeSet() for name in [*(CONDITION + key for key in self.images), TRAINING_MEAN]}
        for latent, volume, path in zip(held_out.latents, held_out.volumes, held_out.paths):
            alike = [z for z in training.latents if z.shape == latent.shape]
            conditions = self.reader.spatial(path, self.images)
            for key, condition in conditions.items():
                sets[CONDITION + key].add(self.reader.statistics.normalised(condition)[0], volume, path)
            if conditions and alike:
                sets[TRAINING_MEAN].add(torch.stack(alike).mean(0), volume, path)
        return {name: each for name, each in sets.items() if each.latents}

    def train_segmenters(self, training: VolumeSet, steps: int, seed: int) -> None:
        """
        Train a network for each label map. It learns from decoded volumes, which lack what the autoencoder does not show, as
        samples do: what is then between the Dice of held-out volumes and that of samples is up to the generator.

        Args:
            training: training volumes; those with a label map are kept in memory, decoded.
            steps: see :py:func:`scripts.evaluation.samples.segmentation.train_segmenter`.
            seed: ditto.
        """
        pairs: dict[str, list[Pair]] = defaultdict(list)
        for path in ProgressBar(training.paths, desc="volumes to segment", unit="volume", leave=False):
            known = read_description(Path(path))
            for key in self.label_maps.keys() & known.spatial:
                volume = self._volume(path, known)
                pairs[key].append((volume.cpu(), read_labels(Path(path), known, key)))
        for key, found in pairs.items():
            self.segmenters[key] = train_segmenter([found], self.label_maps[key].classes, steps, seed, str(volume.device))

    def measured(self, volume: torch.Tensor, name: str, volumes: VolumeSet, index: int) -> dict[str, float]:
        """
        Args:
            volume: decoded, ``CxHxWxD`` in [0, 1].
            name: name of its set. Those of ``held_out`` and ``training`` are the real ones, which others are compared with.
            volumes: its set.
            index: its place in the set.

        Returns:
            numbers by column, see :py:mod:`scripts.evaluation.samples.spatial_metrics`; none for Gaussians.
        """
        if not volumes.paths:
            return {}
        path = volumes.paths[index]
        found: dict[str, float] = {}
        known, truth = read_description(Path(path)), None
        volume = cropped(volume, known)
        has_image = not self.images.keys().isdisjoint(known.spatial)
        if has_image and name not in (HELD_OUT, TRAINING):
            truth = self._volume(path, known)
            found |= fidelity(volume, truth)
        for key in (key for key in self.label_maps if key in known.spatial):
            labels = read_labels(Path(path), known, key).to(volume.device)
            if len(self.label_maps[key].classes) > 1:
                found[f"explained_{key}"] = explained_share(volume, labels)
                other = self._next_labels(key, volumes.paths[index + 1 :] + volumes.paths[:index], known)
                if other is not None:
                    found[f"explained_by_other_{key}"] = explained_share(volume, other.to(volume.device))
            elif has_image:
                found[f"step_{key}"] = border_step(volume, labels)
                if truth is not None:
                    found[f"inside_mae_{key}"] = inside_mae(volume, truth, labels)
            if key in self.segmenters and name != TRAINING:
                found |= self._dice(key, volume, labels)
        return found

    def _dice(self, key: str, volume: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """The mean over the classes and, of few, that of each."""
        classes, dice = self.label_maps[key].classes, self.segmenters[key].dice([(volume, labels)])[0]
        single = {f"dice_{key}_{label}": float(value) for label, value in zip(classes, dice)}
        return {f"dice_{key}": float(dice.nanmean()), **(single if 1 < len(classes) <= MOST_CLASSES else {})}

    def _next_labels(self, key: str, paths: Sequence[str], known: LatentDescription) -> torch.Tensor | None:
        """The label map of the next other volume of the same size."""
        for path in paths:
            other = read_description(Path(path))
            is_another = other.source != known.source and other.preprocessed_shape == known.preprocessed_shape
            if is_another and key in other.spatial:
                return read_labels(Path(path), other, key)
        return None

    def beside(self, sample: torch.Tensor, path: str) -> dict[str, torch.Tensor]:
        """
        What a sample is shown beside: itself with each label map, image conditions, and the volume whose conditions it has.

        Args:
            sample: decoded, ``HxWxD``.
            path: path of the latent of that volume.

        Returns:
            volumes as :py:func:`scripts.evaluation.pictures.panels_of` takes them; none without spatial conditions.
        """
        known = read_description(Path(path))
        columns = {
            f"sample with {key}": overlaid(cropped(sample, known), read_labels(Path(path), known, key)[0], kind.classes)
            for key, kind in self.label_maps.items()
            if key in known.spatial
        }
        for key, z in self.reader.spatial(path, self.images).items():
            columns[key] = cropped(self.decode(self.reader.statistics.normalised(z)[0])[0], known)
        return {**columns, "held-out volume": self._volume(path, known)[0]} if columns else {}

    def _volume(self, path: str, known: LatentDescription) -> torch.Tensor:
        """The real volume, decoded."""
        return cropped(self.decode(self.reader.read(path)[0]), known)


def cropped(volume: torch.Tensor, known: LatentDescription) -> torch.Tensor:
    """A decoded volume without its padding."""
    height, width, depth = known.preprocessed_shape
    return volume[..., :height, :width, :depth]
