"""The evaluation of codecs, one or several on the same volumes: the evaluator, and the handler that writes."""

from __future__ import annotations

import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import Evaluator, SupervisedEvaluator
from monai.utils import ImageMetaKey
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.files import file_hash
from scripts.bundle.machine import merged
from scripts.data.grids import spacing_of
from scripts.data.intensity_window import intensity_window
from scripts.evaluation.codecs import BlockDCT, Codec, block_dct_of
from scripts.evaluation.pictures import ERROR_GAIN, Panels, panels_of
from scripts.evaluation.reports import mean_of_finite, summary_table, write_results
from scripts.evaluation.viewer import MAX_VOXELS, View, view_of

CODEC = "codec"  # key of an output: the name of the codec
FACTORS = "total_downsample_factor"
logger = logging.getLogger(__name__)


class CodecEvaluator(SupervisedEvaluator):
    """
    MONAI's ``SupervisedEvaluator`` with an iteration for each volume and codec, the codecs of a volume in a row. One
    reconstruction is in memory at a time. An output also has the name of its codec, ``codec``, and
    ``total_downsample_factor``.

    Args:
        network: codecs by name.
        val_data_loader: loader of the volumes, one at a time.
        kwargs: further arguments of ``SupervisedEvaluator``.
    """

    def __init__(self, network: Mapping[str, Codec], val_data_loader: Any, **kwargs: Any) -> None:
        self.codecs = network
        first = next(iter(network.values())).network
        super().__init__(network=first, val_data_loader=_ForEach(val_data_loader, list(network)), **kwargs)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> Any:
        codec = self.codecs[batchdata[CODEC]]
        engine.network = codec.network
        outputs: Any = super()._iteration(engine, batchdata)  # a list, with the default `decollate`
        for output in outputs:
            output[CODEC] = batchdata[CODEC]
            output[FACTORS] = torch.tensor(codec.network.total_downsample_factor)
        return outputs


class _ForEach:
    """Each batch of a loader once for each name."""

    def __init__(self, loader: Any, names: Sequence[str]) -> None:
        self.loader, self.names, self.dataset = loader, names, loader.dataset

    def __len__(self) -> int:
        return len(self.loader) * len(self.names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({**batch, CODEC: name} for batch in self.loader for name in self.names)


@dataclass(eq=False)
class EvaluationSaver:
    """
    Handler of a :py:class:`CodecEvaluator` that writes, below a folder,

    - ``metrics.csv``: a row for each volume and codec, a column for each metric, and behind them those of the block-wise
      cosine transform that keeps as many values (``block_dct_...``), where it was run too;
    - ``metrics.json``: the same with the means, the codecs, the sizes of the volumes and the settings;
    - ``report.html``: all of it for reading, with pictures of the worst volumes, and every slice of some.

    Every metric of the engine is included. One that is not defined for a volume is empty in the table, null in JSON, and
    left out of the mean. All processes of a distributed run need the handler; the first writes.

    Args:
        output_dir: the folder; it is made.
        dataset_dir: folder of the volumes, whose names are relative to it.
        codecs: those of the evaluator.
        settings: further config keys that the numbers depend on.
        max_pictures: number of volumes to show pictures of, those with the largest errors.
        view_worst: number of volumes to show every slice of, those with the largest errors, by the last codec.
        view_volumes: names of further volumes to show every slice of, as in ``metrics.csv``.
        view_max_voxels: of larger volumes only a part is shown in this way.

    Raises:
        ValueError: when the run starts, for a name in ``view_volumes`` that no volume has.
    """

    output_dir: str
    dataset_dir: str
    codecs: Mapping[str, Codec]
    settings: Mapping[str, Any]
    max_pictures: int = 20
    view_worst: int = 3
    view_volumes: Sequence[str] = ()
    view_max_voxels: int = MAX_VOXELS

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.dataset_dir)

    def _start(self, engine: Evaluator) -> None:
        items: Any = engine.data_loader.dataset  # type: ignore[union-attr]
        unknown = {*self.view_volumes} - {self._name(item[Keys.IMAGE]) for item in items.data}
        if unknown:
            raise ValueError(f"`view_volumes` names {', '.join(unknown)}; metrics.csv has the names of what is evaluated.")
        self.shown = [name for name, codec in self.codecs.items() if not isinstance(codec.network, BlockDCT)]
        self.volumes: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, float] = defaultdict(float)  # sum over the codecs
        self.pictures: dict[str, Panels] = {}
        self.views: dict[str, View] = {}

    def _remember(self, engine: Evaluator) -> None:
        (output,) = engine.state.output
        codec, image, pred = output[CODEC], output[Keys.IMAGE], output[Keys.PRED]
        name, window = self._name(image.meta[ImageMetaKey.FILENAME_OR_OBJ]), intensity_window(image)
        self.volumes[name] = {
            "shape": list(image.shape[1:]),
            "spacing": spacing_of(image.affine),
            **{key: value for key, value in window.items() if key != "missing"},
        }
        if codec not in self.shown:
            return
        self.errors[name] += (pred - image).square().mean().item()
        error = (pred[0] - image[0]).abs() * ERROR_GAIN
        panels = panels_of({"image": image[0], codec: pred[0], f"{codec}, error x {ERROR_GAIN}": error})
        self.pictures.setdefault(name, {}).update(panels)
        if codec == self.shown[-1]:
            self.pictures = self._worst(self.pictures, max(self.max_pictures, self.view_worst))
            if name in self._worst(self.errors, self.view_worst):
                ends, affine = (window["intensity_low"][0], window["intensity_high"][0]), image.affine.tolist()
                volumes = {"image": image.as_tensor()[0], codec: pred[0]}
                self.views[name] = view_of(volumes, "error", affine, ends, max_voxels=self.view_max_voxels)
            self.views = self._worst(self.views, self.view_worst)

    def _worst(self, kept: Mapping[str, Any], count: int) -> dict[str, Any]:
        """What is kept of the ``count`` volumes with the largest errors, and of those that are named, the worst first."""
        ordered = sorted(self.errors, key=lambda name: -self.errors[name])
        chosen = [name for i, name in enumerate(ordered) if i < count or name in self.view_volumes]
        return {name: kept[name] for name in chosen if name in kept}

    def _save(self, engine: Evaluator) -> None:
        # The engine's scores are those of all processes, one after the other, and so are the volumes. With fewer volumes
        # than processes, each process has all of them, and the scores of the first process come first.
        volumes, self.errors = merged(self.volumes), merged(self.errors)
        pictures = self._worst(merged(self.pictures), max(self.max_pictures, self.view_worst))
        views = self._worst(merged(self.views), self.view_worst)
        if idist.get_rank() > 0:
            return
        scores = {metric: values.flatten(1).mean(1).tolist() for metric, values in engine.state.metric_details.items()}
        outputs = [dict(zip(scores, values)) for values in zip(*scores.values())]
        found, rows = dict(zip(itertools.product(volumes, self.codecs), outputs)), []
        for name, codec in itertools.product(volumes, self.shown):
            transform = found.get((name, block_dct_of(self.codecs[codec])), {})
            metrics = found[name, codec] | {f"block_dct_{metric}": value for metric, value in transform.items()}
            volumes[name].setdefault("metrics", {})[codec] = metrics
            rows.append({"volume": name, "codec": codec, **metrics})
            logger.info(f"{name}, {codec}: {', '.join(f'{metric} {value:.4g}' for metric, value in metrics.items())}")
        codecs = {codec: self._summary(codec, volumes.values()) for codec in self.shown}
        means = summary_table({codec: each["mean"] for codec, each in codecs.items()})
        logger.info(f"means of {len(volumes)} volume{'s' * (len(volumes) != 1)}:\n{means}")
        settings = {"dataset_dir": self.dataset_dir, **self.settings}
        evaluation = {"settings": settings, "codecs": codecs, "volumes": volumes}
        shown = {"order": list(self._worst(self.errors, len(volumes))), "pictures": pictures, "views": views}
        write_results(Path(self.output_dir), rows, evaluation, "report.html.jinja", **shown)

    def _summary(self, name: str, volumes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        codec, metrics = self.codecs[name], [volume["metrics"][name] for volume in volumes]
        return {
            "weights": codec.weights,
            "weights_sha256": file_hash(codec.weights),
            "network": getattr(codec.network, "arguments", None),
            "total_downsample_factor": codec.network.total_downsample_factor,
            "latent_channels": codec.network.latent_channels,
            "voxels_per_value": codec.voxels_per_value,
            "mean": {metric: mean_of_finite(each[metric] for each in metrics) for metric in metrics[0]},
        }
