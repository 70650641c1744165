"""How volumes follow their spatial conditions: a label map, a volume that they should be like, a hole that they fill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from monai.metrics import PSNRMetric

from scripts.bundle.progress import ProgressBar
from scripts.data.latents import read_labels
from scripts.data.spatial_kinds import SpatialKind
from scripts.evaluation.metrics import LargeVolumeSSIMMetric
from scripts.evaluation.pictures import overlaid
from scripts.evaluation.samples.sample_sets import CONDITION, HELD_OUT, TRAINING, TRAINING_MEAN, Latent, LatentReader
from scripts.evaluation.samples.segmentation import dice, train_segmenter

MOST_CLASSES = 6  # that have a column each for their Dice


class SpatialEvaluation:
    """
    Measures volumes by the spatial conditions that samples are given.

    Args:
        kinds: these conditions by key.
        reader: reader of the latents.
    """

    def __init__(self, kinds: Mapping[str, SpatialKind], reader: LatentReader) -> None:
        self.reader = reader
        self.images = {key: kind for key, kind in kinds.items() if not kind.is_label_map}
        self.label_maps = {key: kind for key, kind in kinds.items() if kind.is_label_map}
        self.segmenters: dict[str, torch.nn.Module] = {}

    def baselines(self, held_out: Sequence[Latent], training: Sequence[Latent]) -> dict[str, list[Latent]]:
        """
        Sets that samples with image conditions must be nearer to the held-out volumes than: each condition as it is, and the
        means of the training volumes of the same size. Empty without image conditions.
        """
        sets: dict[str, list[Latent]] = defaultdict(list)
        for latent in held_out:
            conditions = self._image_conditions(latent)
            for key, condition in conditions.items():
                sets[CONDITION + key].append(condition)
            alike = [other.z for other in training if other.z.shape == latent.z.shape]
            if conditions and alike:
                sets[TRAINING_MEAN].append(latent._replace(z=torch.stack(alike).mean(0)))
        return sets

    def train_segmenters(self, training: Sequence[Latent], steps: int, seed: int, device: str) -> None:
        """
        Train a network for each label map, on decoded volumes, which lack what the autoencoder does not show, as samples do:
        what is then between the Dice of held-out volumes and that of samples is up to the generator. The training volumes
        that have a label map are kept in memory.
        """
        for key, kind in self.label_maps.items():
            labelled = [latent for latent in training if key in latent.known.spatial]
            decoding = ProgressBar(labelled, desc=f"volumes with {key}", unit="volume", leave=False)
            pairs = [(self._decoded(latent).cpu(), _labels(latent, key)) for latent in decoding]
            if pairs:
                self.segmenters[key] = train_segmenter([pairs], kind.classes, steps, seed, device)

    def measured(self, volume: torch.Tensor, name: str, latents: Sequence[Latent], index: int) -> dict[str, float]:
        """
        Args:
            volume: decoded, ``CxHxWxD`` in [0, 1].
            name: name of its set. Those of ``held_out`` and ``training`` are the real ones, which others are compared with.
            latents: its set.
            index: its place in the set.

        Returns:
            numbers by column; none for Gaussians.
        """
        latent = latents[index]
        found: dict[str, float] = {}
        if latent.known is None:
            return found
        volume = _cropped(volume, latent)
        has_image = not self.images.keys().isdisjoint(latent.known.spatial)
        truth = self._decoded(self.reader.read(latent.path)) if has_image and name not in (HELD_OUT, TRAINING) else None
        if truth is not None:
            found |= fidelity(volume, truth)
        for key, kind in self.label_maps.items():
            if key not in latent.known.spatial:
                continue
            labels = _labels(latent, key).to(volume.device)
            if len(kind.classes) > 1:
                found[f"explained_{key}"] = explained_share(volume, labels)
                size = latent.known.preprocessed_shape
                others = [
                    each
                    for each in (*latents[index + 1 :], *latents[:index])
                    if each.path != latent.path and each.known.preprocessed_shape == size and key in each.known.spatial
                ]
                if others:
                    found[f"explained_by_other_{key}"] = explained_share(volume, _labels(others[0], key).to(volume.device))
            elif has_image:
                found[f"step_{key}"] = border_step(volume, labels)
                if truth is not None:
                    found[f"inside_mae_{key}"] = inside_mae(volume, truth, labels)
            if key in self.segmenters and name != TRAINING:
                (of_classes,) = dice(self.segmenters[key], [(volume, labels)], kind.classes)
                found[f"dice_{key}"] = float(of_classes.nanmean())
                if 1 < len(kind.classes) <= MOST_CLASSES:
                    found |= {f"dice_{key}_{label}": float(value) for label, value in zip(kind.classes, of_classes)}
        return found

    def beside(self, sample: torch.Tensor, latent: Latent) -> dict[str, torch.Tensor]:
        """
        What a sample (decoded, ``HxWxD``) is shown beside: itself with each label map, image conditions, and the volume that
        they are of; nothing without spatial conditions.
        """
        columns = {
            f"sample with {key}": overlaid(_cropped(sample, latent), _labels(latent, key)[0], kind.classes)
            for key, kind in self.label_maps.items()
            if key in latent.known.spatial
        }
        images = self._image_conditions(latent)
        if columns or images:
            images["held-out volume"] = self.reader.read(latent.path)
        return columns | {title: self._decoded(each)[0] for title, each in images.items()}

    def _image_conditions(self, latent: Latent) -> dict[str, Latent]:
        """The images that a volume has as conditions, in its place."""
        found = self.reader.spatial(latent, self.images)
        return {key: latent._replace(z=self.reader.statistics.normalised(z)[0]) for key, z in found.items()}

    def _decoded(self, latent: Latent) -> torch.Tensor:
        return _cropped(self.reader.decode(latent.z), latent)


def _cropped(volume: torch.Tensor, latent: Latent) -> torch.Tensor:
    """A decoded volume without its padding."""
    height, width, depth = latent.known.preprocessed_shape
    return volume[..., :height, :width, :depth]


def _labels(latent: Latent, key: str) -> torch.Tensor:
    return read_labels(Path(latent.path), latent.known, key)


def explained_share(volume: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Share of a volume's variance that a label map explains (R² of the class means), over the voxels whose label is not 0; NaN
    where the volume is constant over them.

    Args:
        volume: ``CxHxWxD``; the variances are sums over the channels.
        labels: ``1xHxWxD``, integers.
    """
    inside = labels[0] != 0
    values = volume[:, inside].double()
    _, member = labels[0][inside].unique(return_inverse=True)
    count = member.bincount()
    means = values.new_zeros(len(values), len(count)).index_add_(1, member, values) / count
    within, total = (values - means[:, member]).square().sum(), (values - values.mean(1, keepdim=True)).square().sum()
    return float(1 - within / total)


def fidelity(volume: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """
    Peak signal-to-noise ratio, dB, and structural similarity, NaN for less than 11 voxels along an axis: ``psnr``, ``ssim``.

    Args:
        volume: ``CxHxWxD`` in [0, 1].
        truth: of the same shape.
    """
    metrics = {"psnr": PSNRMetric(max_val=1.0), "ssim": LargeVolumeSSIMMetric(spatial_dims=3)}
    return {name: float(torch.as_tensor(metric(volume[None], truth[None]))) for name, metric in metrics.items()}


def inside_mae(volume: torch.Tensor, truth: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Mean absolute difference of two volumes in a region; NaN for an empty one.

    Args:
        volume: ``CxHxWxD``.
        truth: of the same shape.
        labels: ``1xHxWxD``, 0 outside of the region.
    """
    return float((volume - truth)[:, labels[0] != 0].abs().mean())


def border_step(volume: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Mean absolute difference of neighbouring voxels of which one is in a region and the other is not; NaN without a border.

    Args:
        volume: ``CxHxWxD``.
        labels: ``1xHxWxD``, 0 outside of the region.
    """
    inside = labels[0] != 0
    # the difference of booleans is whether they differ
    steps = [volume.diff(dim=axis + 1)[:, inside.diff(dim=axis)].abs().flatten() for axis in range(3)]
    return float(torch.cat(steps).mean())
