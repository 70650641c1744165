"""What a comparison of codecs writes: a table in the log, all metrics as CSV and as JSON, and a page with pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from monai.engines import Evaluator
from monai.utils import ImageMetaKey
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.files import file_hash
from scripts.bundle.processes import merged
from scripts.bundle.text_table import table
from scripts.evaluation.comparison import CODEC, Codec, block_dct_of, with_block_dcts
from scripts.evaluation.html_pages import columns_of, render_comparison
from scripts.evaluation.pictures import draw_panels
from scripts.evaluation.results import describe, finite, flat_scores, mean_of_finite, write_results
from scripts.evaluation.worst_volumes import WorstVolumes

__all__ = ["ComparisonSaver"]

SHOWN = ("psnr", "foreground_psnr", "ssim", "sharpness", "grid_energy")  # in the log
logger = logging.getLogger(__name__)


class ComparisonSaver:
    """
    Handler of a :py:class:`scripts.evaluation.ComparisonEvaluator` that writes, below a folder,

    - ``metrics.csv``: a row for each volume and codec, a column for each metric, and behind them those of the block-wise
      cosine transform that keeps as many values (``block_dct_...``);
    - ``metrics.json``: the same with the means, the codecs, the sizes of the volumes and the settings;
    - ``report.html``: all of it for reading, with pictures of the volumes with the largest errors;

    and logs a table of the means. Every metric of the engine is included. One that is not defined for a volume is empty in
    the table, null in JSON, and left out of the mean. All processes of a distributed run need the handler; the first writes.

    Args:
        output_dir: the folder; it is made.
        dataset_dir: folder of the volumes, whose names are relative to it.
        codecs: that are compared, by name.
        settings: config keys that the numbers depend on.
        max_pictures: number of volumes to show pictures of.
    """

    def __init__(
        self,
        output_dir: str,
        dataset_dir: str,
        codecs: Mapping[str, Codec],
        settings: Mapping[str, Any],
        max_pictures: int = 10,
    ) -> None:
        self.output_dir, self.dataset_dir = Path(output_dir), dataset_dir
        self.codecs, self.settings, self.max_pictures = dict(codecs), dict(settings), max_pictures

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _start(self) -> None:
        self.volumes: dict[str, dict[str, Any]] = {}
        self.drawn: dict[str, Any] = {}  # panels of the current volume, by codec
        self.error = 0.0  # sum of the squared errors of the current volume
        self.pictures = WorstVolumes[dict[str, Any]](self.max_pictures, ())

    def _remember(self, engine: Evaluator) -> None:
        for output in engine.state.output:
            codec = output[CODEC]
            if codec not in self.codecs:  # a cosine transform, which has numbers alone
                continue
            image, pred = output[Keys.IMAGE], output[Keys.PRED]
            name = os.path.relpath(image.meta[ImageMetaKey.FILENAME_OR_OBJ], self.dataset_dir)
            self.volumes[name] = describe(image)
            self.error += (pred - image).square().mean().item()
            self.drawn[codec] = draw_panels(image[0], pred[0])
            if len(self.drawn) == len(self.codecs):
                drawn, self.drawn = self.drawn, {}
                error, self.error = self.error, 0.0
                self.pictures.add(name, error, partial(dict, drawn))

    def _save(self, engine: Evaluator) -> None:
        # Scores are those of all processes, one after the other, and so are the volumes; see EvaluationSaver
        volumes = merged(self.volumes)
        pictures = self.pictures.of_all_processes()
        if idist.get_rank() > 0:
            return
        rounds = list(with_block_dcts(self.codecs))
        scores = {metric: flat_scores(values) for metric, values in engine.state.metric_details.items()}
        of_codec = {
            codec: {metric: values[i :: len(rounds)][: len(volumes)] for metric, values in scores.items()}
            for i, codec in enumerate(rounds)
        }
        for i, volume in enumerate(volumes.values()):
            volume["codecs"] = self._paired({codec: _at(i, found) for codec, found in of_codec.items()})
        means = {
            codec: {metric: mean_of_finite(values) for metric, values in found.items()} for codec, found in of_codec.items()
        }
        codecs = {name: {**self._described(codec), **self._paired(means)[name]} for name, codec in self.codecs.items()}
        settings = {"dataset_dir": self.dataset_dir, **self.settings}
        comparison = {"settings": settings, "codecs": codecs, "volumes": volumes}
        logger.info(f"means of {len(volumes)} volume{'s' if len(volumes) != 1 else ''}:\n{_summary(codecs)}")
        write_results(self.output_dir, self._rows(volumes), comparison, render_comparison(comparison, pictures))

    def _paired(self, metrics: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """For each codec, its metrics and those of the cosine transform of its size."""
        return {
            name: {"metrics": metrics[name], "block_dct": metrics[block_dct_of(codec)]}
            for name, codec in self.codecs.items()
        }

    @staticmethod
    def _described(codec: Codec) -> dict[str, Any]:
        return {
            "weights": codec.weights,
            "weights_sha256": file_hash(codec.weights),
            "total_downsample_factor": list(codec.total_downsample_factor),
            "latent_channels": codec.latent_channels,
            "voxels_per_value": codec.voxels_per_value,
        }

    def _rows(self, volumes: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "volume": volume,
                "codec": codec,
                "voxels_per_value": self.codecs[codec].voxels_per_value,
                **found["metrics"],
                **{f"block_dct_{metric}": value for metric, value in found["block_dct"].items()},
            }
            for volume, each in volumes.items()
            for codec, found in each["codecs"].items()
        ]


def _at(index: int, scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    return {metric: finite(values[index]) for metric, values in scores.items()}


def _summary(codecs: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the means."""
    columns = {
        metric: column for metric, column in columns_of(next(iter(codecs.values()))["metrics"]).items() if metric in SHOWN
    }
    rows = [
        [
            name,
            f"{codec['voxels_per_value']:.3g}",
            *(_both(codec, metric, column.form) for metric, column in columns.items()),
        ]
        for name, codec in codecs.items()
    ]
    return table(["codec (block DCT)", "voxels per value", *(column.label for column in columns.values())], rows)


def _both(found: Mapping[str, Any], metric: str, form: str) -> str:
    own, transform = ("-" if (v := found[key][metric]) is None else format(v, form) for key in ("metrics", "block_dct"))
    return f"{own} ({transform})"
