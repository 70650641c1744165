"""The handlers of a training run, in the order in which they must be: progress, curves, the metric before and after; and
MLflow's."""

from __future__ import annotations

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
from monai.handlers import MLFlowHandler, ValidationHandler, from_engine
from monai.utils.enums import CommonKeys as Keys
from torch.utils.tensorboard import SummaryWriter

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.config import has_expression
from scripts.bundle.progress import ProgressBar
from scripts.bundle.signals import StopOnSignal
from scripts.layers.factors import by
from scripts.training.initial_weights import InitialWeights
from scripts.training.repeatable_batches import RepeatableOrder
from scripts.training.trainer import ResumableTrainer

MLFLOW_RUN = "mlflow_run.txt"  # in the run's folder: the id of its run of MLflow
logger = logging.getLogger(__name__)


class RunHandlers:
    """
    The handlers of a training run: initial weights, order of the batches, progress, curves, validation and what it is
    compared with, checkpoints (of the first process), and stopping on a signal. A metric that is NaN is never the best.

    Args:
        start: initial weights, with the run's checkpoints.
        val_interval: number of epochs from one validation to the next.
        report: what is said of the validation before and after, or None.
        tensorboard: writer of the curves, or None.
    """

    def __init__(
        self,
        start: InitialWeights,
        val_interval: int,
        report: BeforeAndAfter | None = None,
        tensorboard: SummaryWriter | None = None,
    ) -> None:
        evaluator = start.saver.evaluator
        better = evaluator.metric_cmp_fn
        evaluator.metric_cmp_fn = lambda new, best: not math.isnan(new) and (math.isnan(best) or better(new, best))
        self.handlers: list[Any] = [
            start,
            RepeatableOrder(),
            TrainingProgress(),  # before validation, whose time is not that of training
            *([Curves(tensorboard, evaluator)] if tensorboard else []),  # before the first validation
            ValidationHandler(interval=val_interval, validator=evaluator),
            *([report] if report else []),
            *([start.saver] if idist.get_rank() == 0 else []),
            StopOnSignal(evaluator),
        ]

    def attach(self, engine: ResumableTrainer) -> None:
        for handler in self.handlers:
            handler.attach(engine)


class TrainingProgress:
    """
    Trainer handler that shows one progress bar over all iterations (Ignite's ``ProgressBar`` covers one epoch). After every
    epoch, it logs the mean losses, how many volumes were trained on per second, by all processes, and the share of the time
    that was spent waiting for data. It must be attached before validation, in all processes of a distributed run.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.waiting = Timer()
        self.volumes = 0

    def attach(self, engine: ResumableTrainer) -> None:
        for name in engine.loss_names:
            Average(output_transform=from_engine([name], first=True)).attach(engine, name)
        start = Events.EPOCH_STARTED
        self.waiting.attach(engine, start, pause=Events.GET_BATCH_COMPLETED, resume=Events.GET_BATCH_STARTED)
        engine.add_event_handler(start, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._close)

    def _start(self, engine: ResumableTrainer) -> None:
        self.volumes = 0
        if self.bar is None:
            total = engine.state.max_epochs * engine.state.epoch_length
            self.bar = ProgressBar(total=total, initial=engine.state.iteration, desc="training", unit="step")

    def _advance(self, engine: ResumableTrainer) -> None:
        self.volumes += len(engine.state.batch[Keys.IMAGE]) * idist.get_world_size()
        if self.bar.update():  # only when it is redrawn, because reading the losses makes the GPU wait
            losses = {name: f"{engine.state.output[0][name].item():.3g}" for name in engine.loss_names}
            self.bar.set_postfix({"epoch": engine.state.epoch, **losses}, refresh=False)

    def _log(self, engine: ResumableTrainer) -> None:
        seconds, metrics = engine.state.times[Events.EPOCH_COMPLETED.name], engine.state.metrics
        metrics |= {"volumes_per_second": self.volumes / seconds, "data_wait": self.waiting.value() / seconds}
        losses = ", ".join(f"{name} {metrics[name]:.4g}" for name in engine.loss_names)
        speed = f"{metrics['volumes_per_second']:.3g} volumes/s, {metrics['data_wait']:.0%} of the time waiting for data"
        logger.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {losses}; {speed}")

    def _close(self) -> None:
        if self.bar is not None:  # None when the run ends before its first step
            self.bar.close()


@dataclass(eq=False)
class Curves:
    """
    Trainer handler that writes TensorBoard's curves: learning rate and losses of every iteration, throughput and metrics of
    every epoch, all by the number of the iteration. So a resumed run hides what was written after its checkpoint, and a new
    run what an earlier one left in the folder.
    """

    writer: SummaryWriter
    evaluator: Any  # of the validation

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write_epoch)
        self.evaluator.add_event_handler(Events.COMPLETED, lambda: self._write(engine, self.evaluator.state.metrics))

    def _start(self, engine: ResumableTrainer) -> None:
        self.writer.close()  # the next event opens a new file, which starts with the step from which others are hidden
        self.writer.purge_step = engine.state.iteration + 1 if engine.state.iteration else 0

    def _write_iteration(self, engine: ResumableTrainer) -> None:
        losses = {name: engine.state.output[0][name] for name in engine.loss_names}
        self._write(engine, {"lr": engine.optimizer.param_groups[0]["lr"], **losses})

    def _write_epoch(self, engine: ResumableTrainer) -> None:
        self._write(engine, {name: engine.state.metrics[name] for name in ("volumes_per_second", "data_wait")})

    def _write(self, engine: ResumableTrainer, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, engine.state.iteration)


@dataclass(eq=False)
class BeforeAndAfter:
    """
    Trainer handler that validates before the first step and after the last, and logs at the end the key metric before and
    after. Training that made nothing better gets a warning.

    Args:
        validator: validation engine.
        name: name of its key metric in the log.
        unit: unit of the metrics in the log.
        compare: further metrics to compare the key metric with: ``{text: name of the metric}``.
        files: files that the run has written, for the log: ``{text: path}``.
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
        before = getattr(state, "metric_before", math.nan)  # another one's, where the validation volumes have changed
        best = f"(best {self._value(state.best_metric)} at epoch {state.best_metric_epoch})"
        lines = [
            f"validation {self.name} before the first step: {self._value(before)}",
            f"validation {self.name} at the end: {self._value(state.metrics[state.key_metric_name])} {best}",
            *(f"{text}: {self._value(state.metrics[metric])}" for text, metric in self.compare.items()),
            *(f"{text}: {path}" for text, path in self.files.items()),
        ]
        logger.info("\n  ".join(["training is complete", *lines]))
        if not math.isnan(before) and not self.validator.metric_cmp_fn(state.best_metric, before):
            logger.warning("no validation was better than the one before the first step")

    def _value(self, value: float) -> str:
        return f"{value:#.4g} {self.unit}".rstrip()


class MLflowRun(MLFlowHandler):
    """
    MONAI's trainer handler, with a run of MLflow for each run of training. A resumed run goes on with its own, also when
    that was finished; MONAI's joins any run of the experiment that is not. Losses and metrics are means over epochs, because
    the database is too slow for values of every step. Parameters are the plain values at the top of the config.

    Args:
        evaluator: validation engine, whose metrics are tracked.
        run_dir: folder of the run, which keeps the id of its run of MLflow.
        config: config of the run, as JSON has it, which becomes an artifact.
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
        if self.cur_run is not None:
            return
        self._set_experiment()
        if engine.state.iteration > 0 and self.file.is_file():
            run = self.client.get_run(self.file.read_text())
            self.client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self.client.create_run(self.experiment.experiment_id, run_name=self.run_name)  # type: ignore[attr-defined]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(run.info.run_id)
        self.cur_run = run
        values = {key: value for key, value in self.config.items() if not (has_expression(value) or isinstance(value, dict))}
        parameters = {**values, **engine.precision}
        self._delete_exist_param_in_dict(parameters)
        self._log_params(parameters)
        self.client.log_dict(run.info.run_id, self.config, f"config_{engine.state.iteration:08d}.json")


def log_factors(network: AutoencoderKL, patch_size: Sequence[int]) -> None:
    """
    Log in one line by how much the network shrinks, and the latent of a patch of ``patch_size`` voxels. A ValueError when
    the total factor does not divide it.
    """
    channels, *size = network.latent_shape(patch_size)
    levels = ", ".join(by(factors) for factors in network.downsample_factors) or "none"
    logger.info(
        f"downsample factors: initial {by(network.initial_downsample_factor)}, per level {levels}, "
        f"total {by(network.total_downsample_factor)}; a patch of {by(patch_size)} has a latent of {channels} channels x "
        f"{by(size)}"
    )
