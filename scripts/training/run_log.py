"""What a training run reports: factors at the start, progress, throughput, curves, the metric before and after."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from ignite.handlers import Timer
from ignite.metrics import Average
from monai.engines import Evaluator, Trainer
from monai.handlers import from_engine
from monai.utils.enums import CommonKeys as Keys
from torch.utils.tensorboard import SummaryWriter

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.progress import ProgressBar
from scripts.layers.factors import by
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["BeforeAndAfter", "Curves", "Throughput", "TrainingProgress", "log_factors"]

THROUGHPUT = ("volumes_per_second", "data_wait")
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
    covers one epoch only), and logs the mean losses of every epoch. All processes of a distributed run need it, because the
    means are taken over all of them; the first shows the bar.
    """

    bar: ProgressBar | None = None

    def attach(self, engine: ResumableTrainer) -> None:
        for name in engine.loss_names:
            Average(output_transform=from_engine([name], first=True)).attach(engine, name)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.EXCEPTION_RAISED):
            engine.add_event_handler(event, self._close)

    def _start(self, engine: ResumableTrainer) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = ProgressBar(total=total, initial=engine.state.iteration, desc="training", unit="step")

    def _advance(self, engine: ResumableTrainer) -> None:
        assert self.bar is not None
        if self.bar.update():  # only when it is redrawn, because reading the losses makes the GPU wait
            losses = {name: f"{engine.state.output[0][name].item():.3g}" for name in engine.loss_names}
            epoch = f"{engine.state.epoch}/{engine.state.max_epochs}"
            self.bar.set_postfix({"epoch": epoch, **losses}, refresh=False)

    def _log(self, engine: ResumableTrainer) -> None:
        losses = ", ".join(f"{name} {engine.state.metrics[name]:.4g}" for name in engine.loss_names)
        logger.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {losses}")

    def _close(self, engine: ResumableTrainer, error: BaseException | None = None) -> None:
        if self.bar is not None:  # None when the run ends while it starts
            self.bar.close()
        if error is not None:
            raise error  # ignite swallows an exception that has a handler


class Throughput:
    """
    Trainer handler that logs after every epoch how many volumes were trained on per second, by all processes, and the share
    of the time that was spent waiting for data: a large share means that the loader is too slow. It must be attached before
    validation. (Ignite's ``Frequency`` rounds down to whole volumes, and its profilers measure the whole run.)
    """

    def __init__(self) -> None:
        self.epoch, self.waiting = Timer(), Timer()
        self.volumes = 0

    def attach(self, engine: Trainer) -> None:
        start = Events.EPOCH_STARTED
        self.epoch.attach(engine, start)
        self.waiting.attach(engine, start, pause=Events.GET_BATCH_COMPLETED, resume=Events.GET_BATCH_STARTED)
        engine.add_event_handler(start, self._start)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)

    def _start(self) -> None:
        self.volumes = 0

    def _count(self, engine: Trainer) -> None:
        self.volumes += len(engine.state.batch[Keys.IMAGE]) * idist.get_world_size()

    def _log(self, engine: Trainer) -> None:
        seconds = self.epoch.value()
        volumes, waiting = self.volumes / seconds, self.waiting.value() / seconds
        engine.state.metrics |= {"volumes_per_second": volumes, "data_wait": waiting}
        logger.info(
            f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {volumes:.3g} volumes/s, "
            f"{waiting:.0%} of the time waiting for data"
        )


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

    def __init__(self, writer: SummaryWriter, evaluator: Evaluator, overwrite: bool = False) -> None:
        self.writer = writer
        self.evaluator: Any = evaluator
        self.overwrite = overwrite

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

    def __init__(
        self,
        validator: Evaluator,
        name: str,
        unit: str = "",
        compare: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.validator: Any = validator
        self.name, self.unit = name, unit
        self.compare, self.files = compare or {}, files or {}

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
