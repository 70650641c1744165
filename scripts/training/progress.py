"""What a run tells the person who waits for it: the factors at the start, progress, the numbers before and after."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events
from ignite.metrics import Average
from monai.engines import Evaluator, Trainer
from monai.handlers import from_engine
from monai.utils.enums import CommonKeys as Keys
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from scripts.autoencoderkl import AutoencoderKL
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["BeforeAndAfter", "Throughput", "TrainingProgress", "log_factors"]

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
    levels = ", ".join(_by(factors) for factors in network.downsample_factors) or "none"
    share = math.prod(patch_size) * network.arguments["in_channels"] / math.prod(latent)
    logger.info(
        f"downsample factors: initial {_by(network.initial_downsample_factor)}, per level {levels}, "
        f"total {_by(network.total_downsample_factor)}; a patch of {_by(patch_size)} has a latent of "
        f"{latent[0]} channels x {_by(latent[1:])}, {share:.3g} voxels per latent value"
    )


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)


class TrainingProgress:
    """
    Trainer handler that shows one progress bar over all iterations (epoch, losses, time left), and logs the mean losses of
    every epoch. All processes of a distributed run need it, because they share the means; the first shows the bar.
    """

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
        self.bar = tqdm(
            total=total,
            initial=engine.state.iteration,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=idist.get_rank() > 0,
        )

    def _advance(self, engine: ResumableTrainer) -> None:
        if self.bar.update():  # it was redrawn; reading the losses makes a GPU wait
            losses = {name: f"{engine.state.output[0][name].item():.3g}" for name in engine.loss_names}
            self.bar.set_postfix({"epoch": f"{engine.state.epoch}/{engine.state.max_epochs}", **losses})

    def _log(self, engine: ResumableTrainer) -> None:
        losses = ", ".join(f"{name} {engine.state.metrics[name]:.4g}" for name in engine.loss_names)
        logger.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {losses}")

    def _close(self, engine: ResumableTrainer, error: BaseException | None = None) -> None:
        self.bar.close()
        if error is not None:
            raise error  # ignite swallows an exception that has a handler


class Throughput:
    """
    Trainer handler that logs after every epoch how many volumes were trained on per second, by all processes, and the share
    of the time that was spent waiting for data: a large one means that the loader is too slow. It must come before
    validation in the list.

    Args:
        summary_writer: where to add both as curves, at the epoch as step.
    """

    def __init__(self, summary_writer: SummaryWriter | None = None) -> None:
        self.summary_writer = summary_writer

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._wait)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._receive)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)

    def _start(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.volumes = 0

    def _wait(self) -> None:
        self.asked = time.perf_counter()

    def _receive(self, engine: Trainer) -> None:
        self.waited += time.perf_counter() - self.asked
        self.volumes += len(engine.state.batch[Keys.IMAGE]) * idist.get_world_size()

    def _log(self, engine: Trainer) -> None:
        seconds = time.perf_counter() - self.started
        values = {"volumes_per_second": self.volumes / seconds, "data_wait": self.waited / seconds}
        engine.state.metrics |= values
        logger.info(
            f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {values['volumes_per_second']:.3g} volumes/s, "
            f"{values['data_wait']:.0%} of the time waiting for data"
        )
        if self.summary_writer is not None:
            for name, value in values.items():
                self.summary_writer.add_scalar(name, value, engine.state.epoch)


class BeforeAndAfter:
    """
    Trainer handler that validates before the first step and after the last, and says at the end what training gained:
    PSNR before and after, that of trilinear shrinking by the same factor, and where the picture and the weights are.

    Args:
        validator: the validation engine, with the metrics ``psnr`` and ``trilinear_psnr``.
        picture: path of the picture that validation draws.
        weights: path of the best weights.
    """

    def __init__(self, validator: Evaluator, picture: str, weights: str) -> None:
        self.validator = validator
        self.picture = picture
        self.weights = weights

    def attach(self, engine: Trainer) -> None:
        self.validator.state_dict_user_keys.append("psnr_before")  # checkpoints hold it
        engine.add_event_handler(Events.STARTED, self._validate_before)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._validate_last_epoch)
        engine.add_event_handler(Events.COMPLETED, self._report)

    def _validate_before(self, engine: Trainer) -> None:
        if engine.state.iteration > 0:  # resumed
            return
        self.validator.run()
        state: Any = self.validator.state
        state.psnr_before = state.metrics["psnr"]
        logger.info(f"before the first step: validation PSNR {state.psnr_before:.2f} dB")
        # an untrained network is not the best one, and the next validation is the first
        self.validator.state.best_metric = self.validator.state.best_metric_epoch = -1
        self.validator.state.epoch = 0

    def _validate_last_epoch(self, engine: Trainer) -> None:
        if engine.state.epoch == engine.state.max_epochs and self.validator.state.epoch != engine.state.epoch:
            self.validator.run(engine.state.epoch)

    def _report(self, engine: Trainer) -> None:
        if self.validator.state.epoch != engine.state.epoch:  # resumed after the last epoch
            self.validator.run(engine.state.epoch)
        state: Any = self.validator.state
        lines = ["training is complete"]
        if hasattr(state, "psnr_before"):
            lines.append(f"validation PSNR before the first step: {state.psnr_before:.2f} dB")
        lines += [
            f"validation PSNR at the end:            {state.metrics['psnr']:.2f} dB "
            f"(best {state.best_metric:.2f} dB at epoch {state.best_metric_epoch})",
            f"trilinear shrinking, same factor:      {state.metrics['trilinear_psnr']:.2f} dB",
            f"picture: {self.picture}",
            f"weights: {self.weights}",
        ]
        logger.info("\n  ".join(lines))
