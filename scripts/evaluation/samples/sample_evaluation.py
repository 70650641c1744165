"""Are the samples of a generator any good? They are measured beside real volumes and beside Gaussians."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.bundle.files import write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.data.latents import read_description
from scripts.diffusion.training_data import learn_statistics
from scripts.evaluation.metrics import grid_energy
from scripts.evaluation.pictures import Panels, draw_columns, panels_of
from scripts.evaluation.reports import mean_of_finite, summary_table, write_results
from scripts.evaluation.samples.features import (
    channel_statistics,
    coarse_latent,
    load_slice_network,
    local_statistics,
    share_obeyed,
    slice_features,
    standardised,
)
from scripts.evaluation.samples.sample_metrics import (
    NUM_BANDS,
    NearestLatents,
    kernel_mmd,
    pairwise_ms_ssim,
    power_spectrum,
    shrunk,
)
from scripts.evaluation.samples.sample_sets import (
    COVARIANCE,
    GAUSSIAN,
    HELD_OUT,
    SAMPLES,
    TRAINING,
    CovarianceGaussian,
    Latent,
    LatentReader,
    draw_samples,
    plain_gaussian,
)
from scripts.evaluation.samples.spatial_evaluation import SpatialEvaluation
from scripts.evaluation.viewer import MAX_VOXELS, View, view_of
from scripts.inference.generator_inferers import SampleInferer

CLOSE = 0.05  # quantile of held-out distances below which a sample counts as close to a training volume
FEW = 20  # held-out volumes
MAX_PICTURES = 12  # of samples in the report
SAME_SPLIT = 1e-6  # difference of the channels' means over one training half, from rounding
NEAREST, DIFFERENCE = "nearest training volume", "difference"
Sets = Mapping[str, Sequence[Latent]]
Found = list[tuple[float, str]]  # distance and path of the nearest training latents; infinite without one
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class SampleEvaluation:
    """
    Draws samples with the sizes, spacings, conditions and spatial conditions of held-out volumes, and measures them beside

    - ``held_out``: volumes that training did not see, up to as many as there are samples;
    - ``training``: as many training volumes;
    - ``condition_KEY``, ``training_mean``, with image conditions: see :py:meth:`SpatialEvaluation.baselines`;
    - ``covariance_gaussian``, ``gaussian``: what needs no network, see ``sample_sets``.

    All of them are latents that go through the autoencoder's decoder, so that what it cannot show is missing everywhere.
    Latents are compared in units of the image. Results are ``metrics.json``, ``metrics.csv`` (a row for each set),
    ``report.html`` and ``samples.png``. A number that is not defined, because there are too few volumes or they are too
    small, is null, empty or a dash.

    Args:
        inferer: inferer that makes samples and decodes.
        weights: path of the generator's weights.
        datalist: lists of the training, ``{"training": [{"image": path}, ...], "validation": [...]}``.
        output_dir: the folder; it is made.
        num_samples: number of samples, at least two.
        seed: seed of samples, Gaussians, choices and permutations.
        settings: config keys that the numbers depend on, for the report.
        spatial_keys: names of the spatial conditions that samples are given, where their held-out volume has them.
        segmenter_steps: steps for which a network is trained on pairs of decoded training volumes and label maps, whose Dice
            is measured; 0 for none.
        view_nearest: of how many samples to show every slice, those nearest to a training volume.
        view_samples: numbers of further samples to show every slice of.
        view_max_voxels: of larger volumes only a part is shown in this way.

    Raises:
        ValueError: for fewer than two samples, a number in ``view_samples`` that no sample has, and spatial conditions that
            the generator does not have or was trained with otherwise.
    """

    inferer: SampleInferer
    weights: str
    datalist: Mapping[str, Sequence[dict[str, str]]]
    output_dir: str
    num_samples: int
    seed: int
    settings: Mapping[str, Any]
    spatial_keys: Sequence[str] = ()
    segmenter_steps: int = 0
    view_nearest: int = 3
    view_samples: Sequence[int] = ()
    view_max_voxels: int = MAX_VOXELS

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise ValueError(f"`num_samples` is {self.num_samples}; it must be at least 2.")
        if not {*self.view_samples} <= {*range(self.num_samples)}:
            raise ValueError(f"`view_samples` is {self.view_samples}; samples have the numbers 0 to {self.num_samples - 1}.")
        self.sampler, self.generator = self.inferer.sampler, self.inferer.sampler.generator
        self.kinds = self.generator.statistics.spatial_kinds(self.spatial_keys)
        self.slice_network = load_slice_network()

    def run(self) -> None:
        """Draw, measure and write."""
        paths = {name: [item["image"] for item in items] for name, items in self.datalist.items()}
        self.descriptions = [read_description(Path(path)) for path in paths["training"]]
        self.statistics = learn_statistics(self.datalist["training"], latent_gamma=1.0)
        self.reader = LatentReader(self.statistics, lambda z: self.inferer.decoder(z, self.inferer.autoencoder))
        self.spatial = SpatialEvaluation(self.kinds, self.reader)
        notes = self._notes(paths["validation"])
        for note in notes:
            logger.warning(note)
        held_out = self.reader.chosen(paths["validation"], self.num_samples, self.seed)
        training = self.reader.chosen(paths["training"], self.num_samples, self.seed)
        samples = draw_samples(self.sampler, self.reader, held_out, self.kinds, self.num_samples, self.seed)
        sets = {SAMPLES: samples, HELD_OUT: held_out, TRAINING: training}
        nearest, gaussian, coarse = self._compare_with_training(sets, paths["training"])
        sets |= self.spatial.baselines(held_out, training)
        if gaussian:
            sets[COVARIANCE] = gaussian
        sets[GAUSSIAN] = plain_gaussian([each.z.shape for each in samples], self.statistics.amplitude, self.seed)
        if self.segmenter_steps:
            device = str(next(self.inferer.autoencoder.parameters()).device)
            self.spatial.train_segmenters(training, self.segmenter_steps, self.seed, device)
        rows, spectra = self._rows(sets, coarse)
        limit = _limit(nearest[HELD_OUT])
        for name, row in rows.items():
            row["nearest"], row["close"] = _closeness(nearest.get(name, []), limit)
        described, pictures, views = self._shown(samples, nearest[SAMPLES], limit)
        settings = {"num_samples": self.num_samples, "seed": self.seed, **self.sampler.settings, **self.settings}
        evaluation = {
            "weights": self.weights,
            "weights_sha256": self.generator.sha256,
            "autoencoder_sha256": self.generator.statistics.autoencoder.sha256,
            "network": self.generator.network.arguments,
            "settings": settings,
            "training_volumes": len(paths["training"]),
            "held_out_volumes": len(paths["validation"]),
            "notes": notes,
            "close": limit,
            "sets": rows,
            "spectra": spectra,
            "samples": described,
        }
        logger.info(f"samples beside real volumes and Gaussians:\n{summary_table(rows)}")
        table, folder = [{"set": name, **row} for name, row in rows.items()], Path(self.output_dir)
        write_results(folder, table, evaluation, "sample_report.html.jinja", pictures=pictures, views=views)
        write_atomically(self._picture(samples, held_out), folder / "samples.png")

    def _notes(self, held_out: Sequence[str]) -> list[str]:
        """What limits the numbers."""
        trained, here, count = self.generator.statistics, self.statistics, len(held_out)
        notes = []
        if trained.volumes != here.volumes or not np.allclose(trained.own_mean, here.own_mean, SAME_SPLIT, SAME_SPLIT):
            notes.append(
                f"The training half here ({here.volumes} latents) is not the one that the generator was trained on "
                f"({trained.volumes} latents): held-out volumes may be among those."
            )
        if count < FEW:
            notes.append(f"Few volumes are held out: {count}. With fewer than {FEW}, all comparisons are rough.")
        for key in self.kinds:
            missing = sum(key not in read_description(Path(path)).spatial for path in held_out)
            if missing:
                notes.append(f"{missing} of {count} held-out volumes do not have the spatial condition {key!r}.")
        if len({each.preprocessed_shape for each in self.descriptions}) > 1:
            notes.append("Volumes differ in size: a latent is compared only with training latents of its own size.")
        if self.slice_network is None:
            notes.append('Slices are not compared: pip install ".[features]" brings their network (17 MB).')
        return notes

    def _compare_with_training(
        self, sets: Sets, training: Sequence[str]
    ) -> tuple[dict[str, Found], list[Latent], torch.Tensor]:
        """Nearest training latent of each latent, Gaussians like the samples, and coarse training latents, in one pass."""
        shapes = [(channels, *size) for *size, channels in (each.latent_shape for each in self.descriptions)]
        gaussian = CovarianceGaussian([latent.z.shape for latent in sets[SAMPLES]], shapes, self.seed)
        search, coarse = NearestLatents(sets), []
        for path in ProgressBar(training, desc="training latents", unit="latent", leave=False):
            z = self.reader.read(path).z
            search.add(path, z)
            gaussian.add(z)
            coarse.append(coarse_latent(z))
        return search.found, gaussian.samples, torch.stack(coarse)

    def _rows(self, sets: Sets, coarse: torch.Tensor) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
        """The numbers of each set, and its power spectrum."""
        measured = {name: self._measured(name, latents) for name, latents in sets.items()}
        rows: dict[str, dict[str, float]] = {name: {"number": len(latents)} for name, latents in sets.items()}
        features = {}
        for kind in measured[HELD_OUT][0]["features"]:
            found = {name: torch.stack([each["features"][kind] for each in volumes]) for name, volumes in measured.items()}
            real = coarse if kind == "coarse" else found[TRAINING]
            bandwidth = float(torch.pdist(standardised(real, real)).median())  # NaN of one
            features[kind] = {name: standardised(each, real) for name, each in found.items()}
            for name, row in rows.items():
                distance = kernel_mmd(features[kind][name], features[kind][HELD_OUT], bandwidth, self.seed)
                row[f"mmd2_{kind}"], row[f"p_{kind}"] = distance if name != HELD_OUT else (math.nan, math.nan)
        spectra = {name: torch.stack([each["spectrum"] for each in found]).nanmean(0) for name, found in measured.items()}
        columns = dict.fromkeys(column for found in measured.values() for each in found for column in each["numbers"])
        for name, row in rows.items():
            row["ms_ssim"] = pairwise_ms_ssim([each["small"] for each in measured[name]], self.seed)
            difference = (spectra[name] - spectra[HELD_OUT]).tolist()
            row["spectrum"] = mean_of_finite(map(abs, difference))
            row["fine_detail"] = mean_of_finite(difference[NUM_BANDS // 2 :])
            for column in columns:
                row[column] = mean_of_finite(each["numbers"].get(column, math.nan) for each in measured[name])
        training = standardised(coarse, coarse)
        for key, condition in self.generator.statistics.conditions.keys.items():
            labels = [str(each.conditions.get(key)) for each in self.descriptions]
            classes = [name for name in getattr(condition, "classes", ()) if name in labels]
            if len(classes) > 1:
                for name, row in rows.items():
                    asked = [str(latent.volume.conditions.get(key)) if latent.volume else "" for latent in sets[name]]
                    volumes = features["coarse"][name]
                    row[f"obeyed_{key}"] = share_obeyed(volumes, asked, training, labels, classes)
        return rows, {name: spectrum.tolist() for name, spectrum in spectra.items()}

    def _measured(self, name: str, latents: Sequence[Latent]) -> list[dict[str, Any]]:
        """Features, spectrum and numbers of each volume of a set, and the volume itself, small."""
        found = []
        for index, latent in enumerate(ProgressBar(latents, desc=f"decoding: {name}", unit="volume", leave=False)):
            volume = self.reader.decode(latent.z)
            features = {
                "coarse": coarse_latent(latent.z),
                "channels": channel_statistics(latent.z, self.statistics.amplitude),
                "local": local_statistics(volume),
            }
            if self.slice_network is not None:
                features["slices"] = slice_features(volume, self.slice_network)
            energy = grid_energy(volume[None], self.statistics.factors)
            numbers = {"grid_energy": energy, **self.spatial.measured(volume, name, latents, index)}
            spectrum, small = power_spectrum(volume), shrunk(volume)
            found.append({"features": features, "spectrum": spectrum, "small": small, "numbers": numbers})
        return found

    def _shown(
        self, samples: Sequence[Latent], nearest: Found, limit: float
    ) -> tuple[list[dict[str, Any]], dict[int, Panels], dict[int, View]]:
        """
        What is known of each sample, the one nearest to a training volume first; by its number, pictures of some beside the
        volumes whose spatial conditions they have and their nearest training volumes; and all slices of fewer.
        """
        described, pictures, views = [], {}, {}
        for rank, index in enumerate(sorted(range(len(samples)), key=lambda i: nearest[i][0])):
            sample, (distance, path) = samples[index], nearest[index]
            row = {"index": index, "like": sample.path, **asdict(sample.volume), "nearest": path or None}
            close = distance < limit if path and math.isfinite(limit) else None
            described.append({**row, "distance": distance, "close": close})
            viewed = rank < self.view_nearest or index in self.view_samples
            if rank >= MAX_PICTURES and not viewed:
                continue
            volume = self.reader.decode(sample.z)[0]
            volumes, columns = {"sample": volume}, {"sample": volume, **self.spatial.beside(volume, sample)}
            if path:
                volumes[NEAREST] = columns[NEAREST] = self.reader.decode(self.reader.read(path).z)[0]
                columns[DIFFERENCE] = (columns[NEAREST] - volume).abs()
            pictures[index] = panels_of(columns)
            if viewed:
                affine = np.diag([*sample.volume.spacing, 1.0]).tolist()
                views[index] = view_of(volumes, DIFFERENCE, affine, gain=1, max_voxels=self.view_max_voxels)
        return described, pictures, views

    def _picture(self, samples: Sequence[Latent], held_out: Sequence[Latent]) -> bytes:
        """
        A PNG file of four samples and two held-out volumes, or of two samples beside the volumes whose spatial conditions
        they have, which are not the same. Those of other sizes and spacings than the first sample are left out.
        """
        first, columns = samples[0].volume, {}
        of_each = samples[: len(held_out)]  # held-out volumes take turns
        drawn = {"sample": of_each[:2]} if self.kinds else {"sample": samples[:4], "held out": held_out[:2]}
        for title, latents in drawn.items():
            for i, latent in enumerate(latents):
                if (latent.volume.size, latent.volume.spacing) == (first.size, first.spacing):
                    known = ", ".join(map(str, latent.volume.conditions.values()))
                    volume = self.reader.decode(latent.z)[0]
                    columns[f"{title} {i}" + f" ({known})" * bool(known)] = volume
                    columns |= {f"{name} {i}": each for name, each in self.spatial.beside(volume, latent).items()}
        file = io.BytesIO()
        draw_columns(columns, first.spacing).savefig(file, format="png", dpi=60)
        return file.getvalue()


def _limit(held_out: Found) -> float:
    """Distance below which 5 % of held-out volumes are from a training volume; NaN if there are too few to tell."""
    distances = [distance for distance, path in held_out if path]
    return float(np.quantile(distances, CLOSE)) if len(distances) >= FEW else math.nan


def _closeness(nearest: Found, limit: float) -> tuple[float, float]:
    """Median distance to the nearest training volume, and the share of those that are closer than the limit."""
    distances = [distance for distance, path in nearest if path]
    close = mean_of_finite([distance < limit for distance in distances]) if math.isfinite(limit) else math.nan
    return float(np.median(distances)) if distances else math.nan, close
