"""What an evaluation writes: the metrics of every volume as CSV and as JSON, and a report in HTML."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines import Evaluator
from monai.utils import ImageMetaKey
from monai.utils.enums import CommonKeys as Keys

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.files import file_hash
from scripts.bundle.processes import merged
from scripts.data.intensity_window import intensity_window
from scripts.evaluation.html_pages import render_report
from scripts.evaluation.pictures import Panels, draw_panels
from scripts.evaluation.results import describe, finite, flat_scores, mean_of_finite, write_results
from scripts.evaluation.viewer import MAX_VOXELS, View, view_of
from scripts.evaluation.worst_volumes import WorstVolumes

__all__ = ["EvaluationSaver"]

logger = logging.getLogger(__name__)


class EvaluationSaver:
    """
    Evaluator handler that writes, below a folder,

    - ``metrics.csv``: a row for each volume, a column for each metric;
    - ``metrics.json``: the same with the means, the sizes of the volumes, the network, its weights and the settings;
    - ``report.html``: all of it for reading, with pictures of the worst volumes, and every slice of some.

    Every metric of the engine is included. One that is not defined for a volume is empty in the table, null in JSON, and
    left out of the mean. All processes of a distributed run need the handler, because each has a part of the volumes; the
    first writes.

    Args:
        output_dir: the folder; it is made.
        dataset_dir: folder of the volumes, whose names are relative to it.
        network: that is evaluated.
        weights: path of its weights.
        settings: further config keys that the numbers depend on, for the report.
        max_pictures: number of volumes to show pictures of, those with the largest errors.
        view_worst: number of volumes to show every slice of, those with the largest errors.
        view_volumes: names of further volumes to show every slice of, as in ``metrics.csv``.
        view_max_voxels: of larger volumes only a part is shown in this way.

    Raises:
        ValueError: when the run starts, for a name in ``view_volumes`` that no volume has.
    """

    def __init__(
        self,
        output_dir: str,
        dataset_dir: str,
        network: AutoencoderKL,
        weights: str,
        settings: Mapping[str, Any],
        max_pictures: int = 20,
        view_worst: int = 3,
        view_volumes: Sequence[str] = (),
        view_max_voxels: int = MAX_VOXELS,
    ) -> None:
        self.output_dir, self.dataset_dir = Path(output_dir), dataset_dir
        self.network, self.weights, self.settings = network, weights, dict(settings)
        self.max_pictures, self.view_worst = max(max_pictures, view_worst), view_worst
        self.view_volumes, self.view_max_voxels = view_volumes, view_max_voxels

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _start(self, engine: Evaluator) -> None:
        items = engine.data_loader.dataset.data  # type: ignore[union-attr]
        self._check_names([self._name(item[Keys.IMAGE]) for item in items])
        self.volumes: dict[str, dict[str, Any]] = {}
        self.pictures = WorstVolumes[Panels](self.max_pictures, self.view_volumes)
        self.views = WorstVolumes[View](self.view_worst, self.view_volumes)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.dataset_dir)

    def _check_names(self, known: Sequence[str]) -> None:
        for name in self.view_volumes:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"`view_volumes` has {name!r}, not one of the {len(known)} volumes that are evaluated; the "
                    f"nearest name is {nearest!r}."
                )

    def _remember(self, engine: Evaluator) -> None:
        for output in engine.state.output:
            image, pred = output[Keys.IMAGE], output[Keys.PRED]
            name = self._name(image.meta[ImageMetaKey.FILENAME_OR_OBJ])
            self.volumes[name] = describe(image)
            error = (pred - image).square().mean().item()
            self.pictures.add(name, error, partial(draw_panels, image[0], pred[0]))
            self.views.add(name, error, partial(self._view, image, pred))

    def _view(self, image: MetaTensor, pred: torch.Tensor) -> View:
        """The first channel, as in the pictures."""
        window = intensity_window(image)
        volumes = {"image": image.as_tensor()[0], "reconstruction": pred[0]}
        low, high = window["low"][0], window["high"][0]
        return view_of(volumes, "error", image.affine.tolist(), low, high, max_voxels=self.view_max_voxels)

    def _save(self, engine: Evaluator) -> None:
        # The engine's scores are those of all processes, one after the other, and so are the volumes. With fewer volumes
        # than processes, each process has all of them, and the scores of the first process come first.
        volumes = merged(self.volumes)
        pictures, views = self.pictures.of_all_processes(), self.views.of_all_processes()
        if idist.get_rank() > 0:
            return
        scores = {metric: flat_scores(values)[: len(volumes)] for metric, values in engine.state.metric_details.items()}
        for i, (name, volume) in enumerate(volumes.items()):
            volume["metrics"] = {metric: finite(values[i]) for metric, values in scores.items()}
            logger.info(f"{name}: {_readable(volume['metrics'])}")
        mean = {metric: mean_of_finite(values) for metric, values in scores.items()}
        logger.info(f"mean of {len(volumes)}: {_readable(mean)}")
        for metric, values in scores.items():
            undefined = sum(not math.isfinite(value) for value in values)
            if undefined:
                logger.info(f"{metric} is not defined for {undefined} of {len(volumes)} volumes")
        evaluation = {**self._configuration(), "mean": mean, "volumes": volumes}
        rows = [{"volume": name, **volume["metrics"]} for name, volume in volumes.items()]
        write_results(self.output_dir, rows, evaluation, render_report(evaluation, pictures, views))

    def _configuration(self) -> dict[str, Any]:
        return {
            "network": self.network.arguments,
            "total_downsample_factor": list(self.network.total_downsample_factor),
            "weights": self.weights,
            "weights_sha256": file_hash(self.weights),
            "settings": {"dataset_dir": self.dataset_dir, **self.settings},
        }


def _readable(metrics: Mapping[str, float | None]) -> str:
    return ", ".join(f"{metric} {'-' if value is None else f'{value:.4g}'}" for metric, value in metrics.items())
