"""Are the samples of a generator any good? They are measured beside real volumes and beside Gaussians."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.bundle.files import file_hash, write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.data.latents import read_description
from scripts.diffusion.conditions import ClassCondition
from scripts.diffusion.training_data import learn_statistics
from scripts.evaluation.metrics import grid_energy
from scripts.evaluation.pictures import Panels, draw_columns, panels_of
from scripts.evaluation.results import finite, mean_of_finite
from scripts.evaluation.samples.sample_features import (
    Standardised,
    channel_statistics,
    coarse_latent,
    local_statistics,
    nearest_class,
)
from scripts.evaluation.samples.sample_metrics import (
    NUM_BANDS,
    Nearest,
    NearestLatents,
    kernel_mmd,
    median_distance,
    pairwise_ms_ssim,
    power_spectrum,
    shrunk,
)
from scripts.evaluation.samples.sample_report import write_report
from scripts.evaluation.samples.sample_sets import (
    HELD_OUT,
    SAMPLES,
    TRAINING,
    LatentReader,
    VolumeSet,
    draw_samples,
    gaussians,
)
from scripts.evaluation.samples.slice_features import ADVICE, load_slice_features
from scripts.evaluation.samples.spatial_evaluation import SpatialEvaluation
from scripts.evaluation.viewer import MAX_VOXELS, View, view_of
from scripts.inference.inferers import SampleInferer

__all__ = ["SampleEvaluation"]

CLOSE = 0.05  # quantile of held-out distances below which a sample counts as close to a training volume
FEW = 20  # held-out volumes
SAMPLES_DRAWN, HELD_OUT_DRAWN, PAIRS_DRAWN = 4, 2, 2
SAME_SPLIT = 1e-6  # difference of the channels' means over one training half, from rounding
NEAREST, DIFFERENCE = "nearest training volume", "difference"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """
    What is kept of a decoded volume.

    Args:
        numbers: numbers by column.
        spectrum: ``B``, dB.
        small: the volume with at most 64 voxels along an axis.
        local: its ``local_statistics``.
        slices: features of its slices; None without the network that they need.
    """

    numbers: dict[str, float]
    spectrum: torch.Tensor
    small: torch.Tensor
    local: torch.Tensor
    slices: torch.Tensor | None


class SampleEvaluation:
    """
    Draws samples with the sizes, spacings, conditions and spatial conditions of held-out volumes, and measures them beside

    - ``held_out``: volumes that training did not see, up to as many as there are samples;
    - ``training``: as many training volumes;
    - ``condition_KEY``, ``training_mean``, with image conditions: see :py:meth:`SpatialEvaluation.baselines`;
    - ``covariance_gaussian``, ``gaussian``: what needs no network, see ``sample_sets``.

    All of them are latents that go through the autoencoder's decoder, so that what it cannot show is missing everywhere.
    Latents are compared in units of the image, whatever ``latent_gamma`` the generator was trained with. Results are
    written below a folder: ``metrics.json``, ``metrics.csv`` (a row for each set), ``report.html`` and ``samples.png``. A
    number that is not defined, because there are too few volumes or they are too small, is null, empty or a dash.

    In memory lie the latents of all sets, and of each decoded volume what :py:class:`Decoded` holds.

    Args:
        inferer: that makes samples and decodes.
        weights: path of the generator's weights.
        datalist: of the training, ``{"training": [{"image": path}, ...], "validation": [...]}``.
        output_dir: the folder; it is made.
        num_samples: how many samples.
        seed: of samples, Gaussians, choices and permutations.
        settings: config keys that the numbers depend on, for the report.
        spatial_keys: names of the spatial conditions that samples are given, where their held-out volume has them.
        segmenter_steps: steps for which a network is trained on pairs of decoded training volumes and label maps, whose Dice
            is measured; 0 for none.
        max_pictures: of how many samples to show pictures, those nearest to a training volume.
        view_nearest: of how many of them to show every slice.
        view_samples: numbers of further samples to show every slice of.
        view_max_voxels: of larger volumes only a part is shown in this way.

    Raises:
        ValueError: for fewer than two samples, a number in ``view_samples`` that no sample has, and spatial conditions that
            the generator does not have or was trained with otherwise.
    """

    def __init__(
        self,
        inferer: SampleInferer,
        weights: str,
        datalist: Mapping[str, Sequence[Mapping[str, str]]],
        output_dir: str,
        num_samples: int,
        seed: int,
        settings: Mapping[str, Any],
        spatial_keys: Sequence[str] = (),
        segmenter_steps: int = 0,
        max_pictures: int = 12,
        view_nearest: int = 3,
        view_samples: Sequence[int] = (),
        view_max_voxels: int = MAX_VOXELS,
    ) -> None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
            raise ValueError(f"`num_samples` is {num_samples!r}; it must be an integer from 2 on.")
        for index in view_samples:
            if index not in range(num_samples):
                raise ValueError(f"`view_samples` has {index!r}; samples have the numbers 0 to {num_samples - 1}.")
        self.inferer, self.sampler, self.weights = inferer, inferer.sampler, weights
        self.training = [item["image"] for item in datalist["training"]]
        self.held_out = [item["image"] for item in datalist["validation"]]
        self.output_dir, self.num_samples, self.seed = Path(output_dir), num_samples, seed
        self.settings, self.max_pictures = {**self.sampler.settings, **settings}, max(max_pictures, view_nearest)
        self.view_nearest, self.view_samples, self.view_max_voxels = view_nearest, view_samples, view_max_voxels
        self.kinds = self.sampler.generator.statistics.spatial_kinds(spatial_keys)
        self.segmenter_steps = segmenter_steps
        self.slice_features = load_slice_features()
        self.notes: list[str] = []

    def run(self) -> None:
        """Draw, measure and write."""
        self.descriptions = [read_description(Path(path)) for path in self.training]
        self.statistics = learn_statistics([{"image": path} for path in self.training], latent_gamma=1.0)
        self.reader = LatentReader(self.statistics)
        self.spatial = SpatialEvaluation(self.kinds, self.reader, self._decode)
        self._note_limits()
        held_out = self.reader.chosen(self.held_out, self.num_samples, self.seed)
        samples = draw_samples(self.sampler, self.reader, held_out, self.kinds, self.num_samples, self.seed)
        training = self.reader.chosen(self.training, self.num_samples, self.seed)
        drawn, training_features = gaussians(self.reader, self.training, samples.latents, self.seed)
        sets = {SAMPLES: samples, HELD_OUT: held_out, TRAINING: training}
        sets |= self.spatial.baselines(held_out, training) | drawn
        if self.segmenter_steps:
            self.spatial.train_segmenters(training, self.segmenter_steps, self.seed)
        nearest = self._nearest({name: sets[name] for name in (SAMPLES, HELD_OUT, TRAINING)})
        limit = _limit(nearest[HELD_OUT])
        decoded = {name: self._measured(name, each) for name, each in sets.items()}
        kept = ("numbers", "spectrum", "small", "local", "slices")
        numbers, spectra, small, local, slices = (
            {name: [getattr(volume, kind) for volume in each] for name, each in decoded.items()} for kind in kept
        )
        channels = {name: [channel_statistics(z, self.statistics.amplitude) for z in s.latents] for name, s in sets.items()}
        columns: list[dict[str, dict[str, Any]]] = [
            {name: {"number": len(each.latents)} for name, each in sets.items()},
            self._distances("coarse", {name: map(coarse_latent, s.latents) for name, s in sets.items()}, training_features),
            self._distances("channels", channels, channels[TRAINING]),
            self._distances("local", local, local[TRAINING]),
            self._distances("slices", slices, slices[TRAINING]) if self.slice_features else {name: {} for name in sets},
            {name: {"ms_ssim": pairwise_ms_ssim(each, self.seed)} for name, each in small.items()},
            {name: _closeness(nearest.get(name, []), limit) for name in sets},
            {name: _spectral(each, spectra[HELD_OUT]) for name, each in spectra.items()},
            _means(numbers),
            self._obeyed(sets, training_features),
        ]
        rows = {name: {k: _rounded(v) for column in columns for k, v in column[name].items()} for name in sets}
        described = self._described(samples, nearest[SAMPLES], limit)
        pictures, views = self._shown(samples, described)
        evaluation = {**self._configuration(), "close": _rounded(limit), "sets": rows}
        evaluation["spectra"] = {name: list(map(_rounded, _spectrum(each))) for name, each in spectra.items()}
        write_report({**evaluation, "samples": described}, pictures, views, self.output_dir)
        self._draw(samples, held_out)

    def _draw(self, samples: VolumeSet, held_out: VolumeSet) -> None:
        """Some samples, and some held-out volumes of the same size and spacing, or samples beside the volumes whose spatial
        conditions they have, in ``samples.png``."""
        first, columns = samples.volumes[0], {}
        drawn = [("sample", samples, SAMPLES_DRAWN), ("held out", held_out, HELD_OUT_DRAWN)]
        for title, found, count in [("sample", samples, PAIRS_DRAWN)] if self.kinds else drawn:
            alike = [i for i, v in enumerate(found.volumes) if (v.size, v.spacing) == (first.size, first.spacing)]
            for i in alike[:count]:
                known = ", ".join(str(value) for value in found.volumes[i].conditions.values())
                volume = self._decode(found.latents[i])[0]
                columns[f"{title} {i}" + f" ({known})" * bool(known)] = volume
                columns |= {f"{other} {i}": each for other, each in self.spatial.beside(volume, found.paths[i]).items()}
        file = io.BytesIO()
        draw_columns(columns, first.spacing).savefig(file, format="png", dpi=60)
        path = self.output_dir / "samples.png"
        write_atomically(file.getvalue(), path)
        logger.info(f"picture: {path}")

    def _note_limits(self) -> None:
        """Note what limits the numbers."""
        trained, here = self.sampler.generator.statistics, self.statistics
        means = trained.own_mean, here.own_mean
        if trained.volumes != here.volumes or not np.allclose(*means, rtol=SAME_SPLIT, atol=SAME_SPLIT):
            self.notes.append(
                f"The training half here ({here.volumes} latents) is not the one that the generator was trained on "
                f"({trained.volumes} latents): held-out volumes may be among those. Give dataset_dir, val_fraction and "
                "seed as in training."
            )
        if len(self.held_out) < FEW:
            self.notes.append(
                f"Few volumes are held out: {len(self.held_out)}. With fewer than {FEW}, distances between distributions "
                "are rough, the test finds only large differences, and no limit tells which samples are close to a training "
                "volume; with one, distances are not defined. A larger val_fraction in training and here holds out more."
            )
        for key in self.kinds:
            missing = sum(key not in read_description(Path(path)).spatial for path in self.held_out)
            if missing:
                self.notes.append(
                    f"{missing} of {len(self.held_out)} held-out volumes do not have the spatial condition {key!r}: samples "
                    "like them are made without it."
                )
        if len({each.preprocessed_shape for each in self.descriptions}) > 1:
            self.notes.append(
                "Volumes differ in size. A latent is compared only with training latents of its own size, and there is no "
                "Gaussian with the covariance of a size that fewer than two training latents have."
            )
        for note in self.notes:
            logger.warning(note)

    def _nearest(self, sets: Mapping[str, VolumeSet]) -> dict[str, list[Nearest | None]]:
        """The nearest training latent of each latent, other than itself."""
        latents = [z for each in sets.values() for z in each.latents]
        paths = [path for each in sets.values() for path in each.paths]
        search = NearestLatents(latents, paths)
        for path in ProgressBar(self.training, desc="nearest training latents", unit="latent", leave=False):
            search.add(path, self.reader.read(path)[0])
        found = iter(search.found)
        return {name: [next(found) for _ in each.latents] for name, each in sets.items()}

    def _decode(self, latent: torch.Tensor) -> torch.Tensor:
        """A normalised latent to a volume ``CxHxWxD`` in [0, 1], as samples are written."""
        return self.inferer.decoder(self.statistics.denormalised(latent[None]), self.inferer.autoencoder)[0].clamp(0, 1)

    def _measured(self, name: str, volumes: VolumeSet) -> list[Decoded]:
        found = []
        for index, latent in enumerate(ProgressBar(volumes.latents, desc=f"decoding: {name}", unit="volume", leave=False)):
            volume = self._decode(latent)
            energy = grid_energy(volume[None], self.statistics.factors)
            numbers = {"grid_energy": energy, **self.spatial.measured(volume, name, volumes, index)}
            slices = None if self.slice_features is None else self.slice_features(volume)
            found.append(Decoded(numbers, power_spectrum(volume), shrunk(volume), local_statistics(volume), slices))
        return found

    def _distances(
        self, kind: str, features: Mapping[str, Iterable[torch.Tensor]], training: Sequence[torch.Tensor]
    ) -> dict[str, dict[str, float | None]]:
        """MMD² to the held-out set and its p, in features that are standardised by the training's."""
        standardised = Standardised(training)
        found = {name: standardised(list(each)) for name, each in features.items()}
        names = [f"{metric}_{kind}" for metric in ("mmd2", "p")]
        rows: dict[str, dict[str, float | None]] = {name: dict.fromkeys(names) for name in found}
        bandwidth = median_distance(standardised(training)) if len(training) > 1 else 0
        for name, each in found.items():
            if name != HELD_OUT and min(len(each), len(found[HELD_OUT])) > 1 and bandwidth > 0:
                rows[name] = dict(zip(names, kernel_mmd(each, found[HELD_OUT], bandwidth, self.seed)))
        return rows

    def _obeyed(
        self, sets: Mapping[str, VolumeSet], training_features: Sequence[torch.Tensor]
    ) -> dict[str, dict[str, float | None]]:
        """For each condition with classes, the share of volumes that are nearest to the mean of their class."""
        rows: dict[str, dict[str, float | None]] = {name: {} for name in sets}
        standardised = Standardised(training_features)
        for key, condition in self.sampler.generator.statistics.conditions.keys.items():
            if not isinstance(condition, ClassCondition) or len(condition.classes) < 2:
                continue
            labels = [str(each.conditions.get(key)) for each in self.descriptions]
            for name, each in sets.items():
                asked = {i: str(v.conditions[key]) for i, v in enumerate(each.volumes) if key in v.conditions}
                asked = {i: label for i, label in asked.items() if label in labels}
                latents = [coarse_latent(each.latents[i]) for i in asked]
                given = nearest_class(latents, training_features, labels, condition.classes, standardised) if asked else []
                hits = [one == other for one, other in zip(given, asked.values())]
                rows[name][f"obeyed_{key}"] = mean_of_finite(hits)
        return rows

    def _described(self, samples: VolumeSet, nearest: Sequence[Nearest | None], limit: float | None) -> list[dict[str, Any]]:
        """What is known of each sample, the one nearest to a training volume first."""
        rows = []
        for index, (volume, path, other) in enumerate(zip(samples.volumes, samples.paths, nearest)):
            row = {"index": index, "like": path, **asdict(volume), "nearest": None, "distance": None, "close": None}
            if other is not None:
                row |= {"nearest": other.path, "distance": _rounded(other.distance)}
                row["close"] = None if limit is None else other.distance < limit
            rows.append(row)
        return sorted(rows, key=lambda row: math.inf if row["distance"] is None else row["distance"])

    def _shown(
        self, samples: VolumeSet, described: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[int, Panels], dict[int, View]]:
        """
        Pictures of samples beside the volumes whose spatial conditions they have and their nearest training volumes in three
        planes, and all slices of some, by index.
        """
        pictures, views = {}, {}
        for rank, each in enumerate(described):
            index, named = each["index"], each["index"] in self.view_samples
            if rank < self.max_pictures or named:
                volumes, difference = {"sample": self._decode(samples.latents[index])[0]}, {}
                beside = self.spatial.beside(volumes["sample"], samples.paths[index])
                if each["nearest"] is not None:
                    volumes[NEAREST] = self._decode(self.reader.read(each["nearest"])[0])[0]
                    difference[DIFFERENCE] = (volumes[NEAREST] - volumes["sample"]).abs()
                pictures[index] = panels_of({"sample": volumes["sample"], **beside, **volumes, **difference})
            if rank < self.view_nearest or named:
                affine = np.diag([*each["spacing"], 1.0]).tolist()
                views[index] = view_of(volumes, DIFFERENCE, affine, gain=1, max_voxels=self.view_max_voxels)
        return pictures, views

    def _configuration(self) -> dict[str, Any]:
        generator = self.sampler.generator
        return {
            "weights": self.weights,
            "weights_sha256": file_hash(self.weights),
            "autoencoder_sha256": generator.statistics.autoencoder.sha256,
            "network": generator.network.arguments,
            "settings": {"num_samples": self.num_samples, "seed": self.seed, **self.settings},
            "training_volumes": len(self.training),
            "held_out_volumes": len(self.held_out),
            "notes": self.notes,
            "left_out": ADVICE if self.slice_features is None else None,
        }


def _limit(held_out: Sequence[Nearest | None]) -> float | None:
    """Distance below which 5 % of held-out volumes are from a training volume, if there are enough to tell."""
    distances = [each.distance for each in held_out if each is not None]
    return float(np.quantile(distances, CLOSE)) if len(distances) >= FEW else None


def _closeness(nearest: Sequence[Nearest | None], limit: float | None) -> dict[str, float | None]:
    """Median distance to the nearest training volume, and the share of those that are closer than the limit."""
    distances = [each.distance for each in nearest if each is not None]
    return {
        "nearest": float(np.median(distances)) if distances else None,
        "close": mean_of_finite([distance < limit for distance in distances]) if limit is not None else None,
    }


def _spectrum(spectra: Sequence[torch.Tensor]) -> list[float]:
    return torch.stack(list(spectra)).nanmean(0).tolist()


def _spectral(spectra: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> dict[str, float | None]:
    """How far the mean spectrum is from the real ones' in all bands, and whether the upper half has more or less, in dB."""
    difference = np.array(_spectrum(spectra)) - np.array(_spectrum(real))
    return {
        "spectrum": mean_of_finite(abs(difference).tolist()),
        "fine_detail": mean_of_finite(difference[NUM_BANDS // 2 :].tolist()),
    }


def _means(numbers: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Over the volumes of each set that have a number; all sets have the same columns."""
    columns = dict.fromkeys(column for each in numbers.values() for volume in each for column in volume)
    return {
        name: {column: mean_of_finite([volume[column] for volume in each if column in volume]) for column in columns}
        for name, each in numbers.items()
    }


def _rounded(value: float | None) -> float | None:
    """Counts stay whole."""
    return value if value is None or isinstance(value, int) else finite(value)
