"""What a training run reports: factors at the start, progress, curves, the metric before and after; and to MLflow."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from ignite.handlers import Timer
from ignite.metrics import Average
from monai.engines import Evaluator, Trainer
from monai.handlers import MLFlowHandler, from_engine
from monai.utils.enums import CommonKeys as Keys
from torch.utils.tensorboard import SummaryWriter

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.files import write_atomically
from scripts.bundle.progress import ProgressBar
from scripts.layers.factors import by
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["BeforeAndAfter", "Curves", "MLflowRun", "TrainingProgress", "log_factors"]

THROUGHPUT = ("volumes_per_second", "data_wait")
MLFLOW_RUN = "mlflow_run.txt"  # in the run's folder: the id of its run of MLflow
logger = logging.getLogger(__name__)


def log_factors(network: AutoencoderKL, patch_size: Sequence[int]) -> None:
    """
    Log in one line by how much the network shrinks, and the latent of one patch.

    Args:
        network: the network.
        patch_size: spatial size of a training patch, voxels.

    Raises:
        ValueError: when the total factor does not divide the patch.
    """
    latent = network.latent_shape(patch_size)
    levels = ", ".join(by(factors) for factors in network.downsample_factors) or "none"
    share = math.prod(patch_size) * network.arguments["in_channels"] / math.prod(latent)
    logger.info(
        f"downsample factors: initial {by(network.initial_downsample_factor)}, per level {levels}, "
        f"total {by(network.total_downsample_factor)}; a patch of {by(patch_size)} has a latent of "
        f"{latent[0]} channels x {by(latent[1:])}, {share:.3g} voxels per latent value"
    )


class TrainingProgress:
    """
    Trainer handler that shows one progress bar over all iterations (epoch, losses, time left; Ignite's ``ProgressBar``
    covers one epoch only). After every epoch, it logs the mean losses, how many volumes were trained on per second, by all
    processes, and the share of the time that was spent waiting for data: a large share means that the loader is too slow.
    (Ignite's ``Frequency`` rounds down to whole volumes, and its profilers measure the whole run.)

    It must be attached before validation, whose time is not that of training, in all processes of a distributed run.
    """

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None
        self.epoch, self.waiting = Timer(), Timer()
        self.volumes = 0

    def attach(self, engine: ResumableTrainer) -> None:
        for name in engine.loss_names:
            Average(output_transform=from_engine([name], first=True)).attach(engine, name)
        start = Events.EPOCH_STARTED
        self.epoch.attach(engine, start)
        self.waiting.attach(engine, start, pause=Events.GET_BATCH_COMPLETED, resume=Events.GET_BATCH_STARTED)
        engine.add_event_handler(start, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.EXCEPTION_RAISED):
            engine.add_event_handler(event, self._close)

    def _start(self, engine: ResumableTrainer) -> None:
        self.volumes = 0
        if self.bar is None:
            total = engine.state.max_epochs * engine.state.epoch_length
            self.bar = ProgressBar(total=total, initial=engine.state.iteration, desc="training", unit="step")

    def _advance(self, engine: ResumableTrainer) -> None:
        self.volumes += len(engine.state.batch[Keys.IMAGE]) * idist.get_world_size()
        assert self.bar is not None
        if self.bar.update():  # only when it is redrawn, because reading the losses makes the GPU wait
            losses = {name: f"{engine.state.output[0][name].item():.3g}" for name in engine.loss_names}
            epoch = f"{engine.state.epoch}/{engine.state.max_epochs}"
            self.bar.set_postfix({"epoch": epoch, **losses}, refresh=False)

    def _log(self, engine: ResumableTrainer) -> None:
        seconds, metrics = self.epoch.value(), engine.state.metrics
        metrics |= {"volumes_per_second": self.volumes / seconds, "data_wait": self.waiting.value() / seconds}
        losses = ", ".join(f"{name} {metrics[name]:.4g}" for name in engine.loss_names)
        speed = f"{metrics['volumes_per_second']:.3g} volumes/s, {metrics['data_wait']:.0%} of the time waiting for data"
        logger.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {losses}; {speed}")

    def _close(self, engine: ResumableTrainer, error: BaseException | None = None) -> None:
        if self.bar is not None:  # None when the run ends before its first step
            self.bar.close()
        if error is not None:
            raise error  # ignite swallows an exception that has a handler


@dataclass(eq=False)
class Curves:
    """
    Trainer handler that writes TensorBoard's curves: learning rate and losses of every iteration, throughput and metrics of
    every epoch, all by the number of the iteration. So a resumed run hides what was written after its checkpoint, and a new
    run what an earlier one left in the folder.

    Args:
        writer: writer of the run's folder.
        evaluator: validation engine, whose metrics are written.
        overwrite: whether a new run removes the curves of an earlier one.
    """

    writer: SummaryWriter
    evaluator: Any
    overwrite: bool = False

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write_losses)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self._write(engine, THROUGHPUT, engine.state.metrics))
        self.evaluator.add_event_handler(Events.COMPLETED, lambda: self._write(engine, None, self.evaluator.state.metrics))

    def _start(self, engine: ResumableTrainer) -> None:
        self.writer.close()  # the next event opens a new file, which starts with the step from which others are hidden
        if engine.state.iteration == 0 and self.overwrite:
            for path in Path(self.writer.log_dir).glob("events.out.tfevents.*"):
                path.unlink()
        self.writer.purge_step = engine.state.iteration + 1 if engine.state.iteration else 0

    def _write_losses(self, engine: ResumableTrainer) -> None:
        rate = engine.optimizer.param_groups[0]["lr"]
        self._write(engine, ("lr", *engine.loss_names), {**engine.state.output[0], "lr": rate})

    def _write(self, engine: ResumableTrainer, names: Sequence[str] | None, values: Mapping[str, Any]) -> None:
        for name in names or values:
            self.writer.add_scalar(name, values[name], engine.state.iteration)


@dataclass(eq=False)
class BeforeAndAfter:
    """
    Trainer handler that validates before the first step and after the last. At the end it logs the validation engine's key
    metric before and after, metrics to compare it with, and the files that the run has written. Training that made nothing
    better gets a warning.

    Args:
        validator: validation engine.
        name: name of its key metric in the log.
        unit: unit of the key metric, and of those that it is compared with, in the log.
        compare: further metrics of the engine to compare the key metric with: ``{text: name of the metric}``.
        files: files that the run has written: ``{text: path}``.
    """

    validator: Any
    name: str
    unit: str = ""
    compare: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.STARTED, self._validate_before)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._validate_last_epoch)
        engine.add_event_handler(Events.COMPLETED, self._report)

    def _validate_before(self, engine: Trainer) -> None:
        if engine.state.iteration > 0:  # resumed
            return
        self.validator.run()
        state = self.validator.state
        state.metric_before = state.metrics[state.key_metric_name]  # checkpoints hold it
        logger.info(f"before the first step: validation {self.name} {self._value(state.metric_before)}")
        # the untrained network must not count as the best one, and the next validation is number 1
        state.best_metric = state.best_metric_epoch = -1
        state.epoch = 0

    def _validate_last_epoch(self, engine: Trainer) -> None:
        if engine.state.epoch == engine.state.max_epochs and self.validator.state.epoch != engine.state.epoch:
            self.validator.run(engine.state.epoch)

    def _report(self, engine: Trainer) -> None:
        if self.validator.state.epoch != engine.state.epoch:  # resumed after the last epoch
            self.validator.run(engine.state.epoch)
        state = self.validator.state
        rows = {}
        if hasattr(state, "metric_before"):
            rows[f"validation {self.name} before the first step:"] = self._value(state.metric_before)
        best = f"(best {self._value(state.best_metric)} at epoch {state.best_metric_epoch})"
        rows[f"validation {self.name} at the end:"] = f"{self._value(state.metrics[state.key_metric_name])} {best}"
        rows |= {f"{text}:": self._value(state.metrics[metric]) for text, metric in self.compare.items()}
        width = max(map(len, rows))
        lines = [f"{text:<{width}} {value}" for text, value in rows.items()]
        logger.info("\n  ".join(["training is complete", *lines, *(f"{text}: {path}" for text, path in self.files.items())]))
        if hasattr(state, "metric_before") and not self.validator.metric_cmp_fn(state.best_metric, state.metric_before):
            logger.warning(
                "no validation was better than the one before the first step: these weights are no better than those that "
                "the run began with. Train longer, or with another `lr`."
            )

    def _value(self, value: float) -> str:
        return f"{value:#.4g} {self.unit}".rstrip()


class MLflowRun(MLFlowHandler):
    """
    Trainer handler: MONAI's, with a run of MLflow for each run of training. A resumed run goes on with its own, also when
    that was finished; MONAI's joins any run of the experiment that is not.

    Losses and metrics are means over epochs, because the database is too slow for values of every step. Parameters are the
    plain values at the top of the config, and precision; what another part of the run changed is a tag. The whole config is
    an artifact.

    Args:
        evaluator: validation engine, whose metrics are tracked.
        run_dir: folder of the run, which keeps the id of its run of MLflow.
        config: config of the run, as JSON has it.
        kwargs: arguments of ``MLFlowHandler``.
    """

    def __init__(self, evaluator: Evaluator, run_dir: str, config: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(iteration_log=False, close_on_complete=True, **kwargs)
        self.evaluator: Any = evaluator
        self.file = Path(run_dir, MLFLOW_RUN)
        self.config = config

    def attach(self, engine: ResumableTrainer) -> None:  # type: ignore[override]
        super().attach(engine)
        self.evaluator.add_event_handler(Events.COMPLETED, self._log_validation, engine)

    def _log_validation(self, evaluator: Evaluator, trainer: ResumableTrainer) -> None:
        self.start(trainer)  # unless the run has started: the first validation is before the first step
        self._default_epoch_log(evaluator)

    def start(self, engine: ResumableTrainer) -> None:  # type: ignore[override]
        """Make the run, or go on with it, and log parameters and config."""
        if self.cur_run is not None:
            return
        self._set_experiment()
        run = self.cur_run = self._own_run(resumed=engine.state.iteration > 0)
        run_id, known = run.info.run_id, run.data.params
        wanted = {key: str(value) for key, value in {**_plain(self.config), **engine.precision}.items()}
        self._log_params({key: value for key, value in wanted.items() if key not in known})
        for key, value in wanted.items():
            if known.get(key, value) != value:
                self.client.set_tag(run_id, key, value)
        self.client.log_dict(run_id, self.config, f"config_{engine.state.iteration:08d}.json")

    def _own_run(self, resumed: bool) -> Any:
        if resumed and self.file.is_file():
            run_id = self.file.read_text().strip()
            with contextlib.suppress(Exception):  # errors of any type where another server or database does not know it
                self.client.update_run(run_id, status="RUNNING")
                return self.client.get_run(run_id)
        assert self.experiment is not None
        run = self.client.create_run(experiment_id=self.experiment.experiment_id, run_name=self.run_name)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run.info.run_id.encode(), self.file)
        return run


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The values at the top of a config that are neither expressions nor objects."""
    texts = {key: json.dumps(value) for key, value in config.items()}
    return {key: config[key] for key, text in texts.items() if not any(mark in text for mark in ("{", '"$', '"@', '"%'))}
