"""Are the samples of a generator any good? They are measured beside real volumes and beside Gaussians."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.bundle.files import file_hash, write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.data.latents import read_description
from scripts.diffusion.conditions import ClassCondition
from scripts.diffusion.training_data import statistics_of
from scripts.evaluation.metrics import grid_energy
from scripts.evaluation.pictures import draw_columns, panels_of
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
    COVARIANCE,
    GAUSSIAN,
    HELD_OUT,
    SAMPLES,
    TRAINING,
    LatentReader,
    VolumeSet,
    draw_samples,
    gaussians,
)
from scripts.evaluation.samples.slice_features import ADVICE, load_slice_features
from scripts.evaluation.viewer import MAX_VOXELS, View, view_of
from scripts.inference.inferers import SampleInferer

__all__ = ["SampleEvaluation"]

ROWS = (SAMPLES, HELD_OUT, TRAINING, COVARIANCE, GAUSSIAN)
CLOSE = 0.05  # quantile of held-out distances below which a sample counts as close to a training volume
FEW = 20  # held-out volumes
SAMPLES_DRAWN, HELD_OUT_DRAWN = 4, 2
SAME_SPLIT = 1e-6  # difference of the channels' means over one training half, from rounding
DIFFERENCE = "difference"
logger = logging.getLogger(__name__)


@dataclass
class Decoded:
    """
    What is kept of decoded volumes.

    Args:
        grid_energy: of each.
        spectra: of each, ``B``, dB.
        small: each with at most 64 voxels along an axis.
        local: ``local_statistics`` of each.
        slices: features of the slices of each; none without the network that they need.
    """

    grid_energy: list[float] = field(default_factory=list)
    spectra: list[torch.Tensor] = field(default_factory=list)
    small: list[torch.Tensor] = field(default_factory=list)
    local: list[torch.Tensor] = field(default_factory=list)
    slices: list[torch.Tensor] = field(default_factory=list)


class SampleEvaluation:
    """
    Draws samples with the sizes, spacings and conditions of held-out volumes, and measures them beside

    - ``held_out``: volumes that training did not see, up to as many as there are samples;
    - ``training``: as many training volumes;
    - ``covariance_gaussian``, ``gaussian``: what needs no network, see ``sample_sets``.

    All of them are latents that go through the autoencoder's decoder, so that what it cannot show is missing everywhere.
    Latents are compared in units of the image, whatever ``latent_gamma`` the generator was trained with. Results are
    written below a folder: ``metrics.json``, ``metrics.csv`` (a row for each set), ``report.html`` and ``samples.png``. A
    number that is not defined, because there are too few volumes or they are too small, is null, empty or a dash.

    In memory lie the latents of all five sets, and of each decoded volume what :py:class:`Decoded` holds.

    Args:
        inferer: that makes samples and decodes.
        weights: path of the generator's weights.
        datalist: of the training, ``{"training": [{"image": path}, ...], "validation": [...]}``.
        output_dir: the folder; it is made.
        num_samples: how many samples.
        seed: of samples, Gaussians, choices and permutations.
        settings: config keys that the numbers depend on, for the report.
        max_pictures: of how many samples to show pictures, those nearest to a training volume.
        view_nearest: of how many of them to show every slice.
        view_samples: numbers of further samples to show every slice of.
        view_max_voxels: of larger volumes only a part is shown in this way.

    Raises:
        ValueError: for fewer than two samples, and for a number in ``view_samples`` that no sample has.
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
        self.slice_features = load_slice_features()
        self.notes: list[str] = []

    def run(self) -> None:
        """Draw, measure and write."""
        self.descriptions = [read_description(Path(path)) for path in self.training]
        self.statistics = statistics_of(self.descriptions, latent_gamma=1.0)
        self.reader = LatentReader(self.statistics)
        self._note_limits()
        held_out = self.reader.chosen(self.held_out, self.num_samples, self.seed)
        samples = draw_samples(self.sampler, self.statistics, held_out.volumes, self.num_samples, self.seed)
        sets = {SAMPLES: samples, HELD_OUT: held_out}
        sets[TRAINING] = self.reader.chosen(self.training, self.num_samples, self.seed)
        drawn, training_features = gaussians(self.reader, self.training, samples.latents, self.seed)
        sets = {name: each for name, each in {**sets, **drawn}.items() if name in ROWS}
        nearest = self._nearest({name: sets[name] for name in (SAMPLES, HELD_OUT, TRAINING)})
        limit = _limit(nearest[HELD_OUT])
        decoded = {name: self._measured(name, each.latents) for name, each in sets.items()}
        channels = {name: [channel_statistics(z, self.statistics.amplitude) for z in s.latents] for name, s in sets.items()}
        columns: list[dict[str, dict[str, Any]]] = [
            {name: {"number": len(each.latents)} for name, each in sets.items()},
            self._distances("coarse", {name: map(coarse_latent, s.latents) for name, s in sets.items()}, training_features),
            self._distances("channels", channels, channels[TRAINING]),
            self._distances("local", {name: each.local for name, each in decoded.items()}, decoded[TRAINING].local),
            self._of_slices(decoded),
            {name: {"ms_ssim": pairwise_ms_ssim(each.small, self.seed)} for name, each in decoded.items()},
            {name: _closeness(nearest.get(name, []), limit) for name in sets},
            {name: _spectral(each.spectra, decoded[HELD_OUT].spectra) for name, each in decoded.items()},
            {name: {"grid_energy": _mean(each.grid_energy)} for name, each in decoded.items()},
            self._obeyed(sets, training_features),
        ]
        rows = {name: {k: _rounded(v) for column in columns for k, v in column[name].items()} for name in sets}
        described = self._described(samples, nearest[SAMPLES], limit)
        pictures, views = self._shown(samples, described)
        spectra = {name: [_rounded(v) for v in _spectrum(each.spectra)] for name, each in decoded.items()}
        evaluation = {**self._configuration(), "close": _rounded(limit), "sets": rows, "spectra": spectra}
        write_report({**evaluation, "samples": described}, pictures, views, self.output_dir)
        self._draw(samples, held_out)

    def _draw(self, samples: VolumeSet, held_out: VolumeSet) -> None:
        """Some samples, and some held-out volumes of the same size and spacing, in ``samples.png``."""
        first = samples.volumes[0]
        columns = {}
        for title, found, count in (("sample", samples, SAMPLES_DRAWN), ("held out", held_out, HELD_OUT_DRAWN)):
            alike = [i for i, v in enumerate(found.volumes) if (v.size, v.spacing) == (first.size, first.spacing)]
            for i in alike[:count]:
                known = ", ".join(str(value) for value in found.volumes[i].conditions.values())
                columns[f"{title} {i}" + f" ({known})" * bool(known)] = self._decode(found.latents[i])[0]
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

    def _measured(self, name: str, latents: Sequence[torch.Tensor]) -> Decoded:
        found = Decoded()
        for latent in ProgressBar(latents, desc=f"decoding: {name}", unit="volume", leave=False):
            volume = self._decode(latent)
            found.grid_energy.append(grid_energy(volume[None], self.statistics.factors))
            found.spectra.append(power_spectrum(volume))
            found.small.append(shrunk(volume))
            found.local.append(local_statistics(volume))
            if self.slice_features is not None:
                found.slices.append(self.slice_features(volume))
        return found

    def _of_slices(self, decoded: Mapping[str, Decoded]) -> dict[str, dict[str, float | None]]:
        if self.slice_features is None:
            return {name: {} for name in decoded}
        return self._distances("slices", {name: each.slices for name, each in decoded.items()}, decoded[TRAINING].slices)

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
                rows[name][f"obeyed_{key}"] = _mean(hits)
        return rows

    def _described(self, samples: VolumeSet, nearest: Sequence[Nearest | None], limit: float | None) -> list[dict[str, Any]]:
        """What is known of each sample, the one nearest to a training volume first."""
        rows = []
        for index, (volume, other) in enumerate(zip(samples.volumes, nearest)):
            row = {"index": index, **asdict(volume), "nearest": None, "distance": None, "close": None}
            if other is not None:
                row |= {"nearest": other.path, "distance": _rounded(other.distance)}
                row["close"] = None if limit is None else other.distance < limit
            rows.append(row)
        return sorted(rows, key=lambda row: math.inf if row["distance"] is None else row["distance"])

    def _shown(
        self, samples: VolumeSet, described: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[int, dict[str, dict[str, bytes]]], dict[int, View]]:
        """Pictures of samples beside their nearest training volumes in three planes, and all slices of some, by index."""
        pictures, views = {}, {}
        for rank, each in enumerate(described):
            index, named = each["index"], each["index"] in self.view_samples
            if rank < self.max_pictures or named:
                volumes = self._beside_nearest(samples, each)
                pictures[index] = panels_of(volumes | _difference(volumes))
            if rank < self.view_nearest or named:
                affine = np.diag([*each["spacing"], 1.0]).tolist()
                views[index] = view_of(volumes, DIFFERENCE, affine, gain=1, max_voxels=self.view_max_voxels)
        return pictures, views

    def _beside_nearest(self, samples: VolumeSet, described: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The sample and, if there is one, its nearest training volume."""
        volumes = {"sample": self._decode(samples.latents[described["index"]])[0]}
        if described["nearest"] is not None:
            volumes["nearest training volume"] = self._decode(self.reader.read(described["nearest"])[0])[0]
        return volumes

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


def _difference(volumes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The picture of how two volumes differ, if there are two."""
    first, *others = volumes.values()
    return {DIFFERENCE: (others[0] - first).abs()} if others else {}


def _limit(held_out: Sequence[Nearest | None]) -> float | None:
    """Distance below which 5 % of held-out volumes are from a training volume, if there are enough to tell."""
    distances = [each.distance for each in held_out if each is not None]
    return float(np.quantile(distances, CLOSE)) if len(distances) >= FEW else None


def _closeness(nearest: Sequence[Nearest | None], limit: float | None) -> dict[str, float | None]:
    """Median distance to the nearest training volume, and the share of those that are closer than the limit."""
    distances = [each.distance for each in nearest if each is not None]
    return {
        "nearest": float(np.median(distances)) if distances else None,
        "close": _mean([distance < limit for distance in distances]) if limit is not None else None,
    }


def _spectrum(spectra: Sequence[torch.Tensor]) -> list[float]:
    return torch.stack(list(spectra)).nanmean(0).tolist()


def _spectral(spectra: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> dict[str, float | None]:
    """How far the mean spectrum is from the real ones' in all bands, and whether the upper half has more or less, in dB."""
    difference = np.array(_spectrum(spectra)) - np.array(_spectrum(real))
    return {"spectrum": _mean(abs(difference)), "fine_detail": _mean(difference[NUM_BANDS // 2 :])}


def _mean(values: Iterable[float]) -> float | None:
    """Of those that are defined."""
    defined = [float(value) for value in values if math.isfinite(value)]
    return math.fsum(defined) / len(defined) if defined else None


def _rounded(value: float | None) -> float | None:
    """With six digits, as many as a float32 has; counts stay whole."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
