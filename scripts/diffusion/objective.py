"""What the network is trained and validated on: noisy latents with a time and conditions, drawn or fixed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator
from monai.engines.utils import PrepareBatch
from monai.handlers import from_engine
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from scripts.bundle.precision import autocast_dtype
from scripts.diffusion.flow import FlowTarget, RectifiedFlow, channel_means
from scripts.diffusion.statistics import LatentStatistics

NUM_TIMES = 8  # of validation, at the middle of as many equal parts of 0 to 1
NUM_BINS = NUM_BANDS = 4
Prepared = tuple[Tensor, FlowTarget, tuple[()], dict[str, Tensor]]


class FlowPrepareBatch(PrepareBatch):
    """
    What MONAI's ``DiffusionPrepareBatch`` is for diffusion, for a rectified flow on batches of :py:class:`LatentCollate`.
    The time, the noise and the conditions that are left out of an item depend on the item's seed alone.

    Args:
        statistics: statistics of the latents.
        flow: flow that is learned.
        condition_dropout: probability with which all conditions are left out, and otherwise each of them by itself.
    """

    def __init__(self, statistics: LatentStatistics, flow: RectifiedFlow, condition_dropout: float) -> None:
        self.statistics, self.flow, self.condition_dropout = statistics, flow, condition_dropout

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> Prepared:
        """
        Returns:
            the noisy latents, the :py:class:`FlowTarget`, no arguments, and the keyword arguments of the network.
        """
        num_values = (batchdata["mask"].flatten(1).sum(1) * batchdata[Keys.IMAGE].shape[1]).tolist()  # without padding
        times, vectors, given = [], [], []
        for seed, volume, count, present in zip(batchdata["seed"], batchdata["volume"], num_values, batchdata["given"]):
            random = np.random.default_rng(seed)
            times.append(self.flow.draw_time(count, random))
            vectors.append(self.statistics.conditions.with_dropout(volume, self.condition_dropout, random))
            kept = torch.from_numpy(random.random(len(present)) >= self.condition_dropout)
            given.append(present * kept * vectors[-1].any())  # nothing is given with the null vector
        batch = {**batchdata, "given": torch.stack(given)}
        return self._prepared(batch, times, vectors, device=device, non_blocking=non_blocking, **kwargs)

    def at_time(self, batchdata: Mapping[str, Any], time: float, device: torch.device) -> Prepared:
        """The same at a given time and with all conditions, for validation."""
        vectors = [self.statistics.conditions.vector(volume) for volume in batchdata["volume"]]
        return self._prepared(batchdata, [time] * len(vectors), vectors, device=device)

    def _prepared(self, batchdata: Mapping[str, Any], times: list[float], vectors: list[Tensor], **to: Any) -> Prepared:
        names = Keys.IMAGE, "noise", "mask", "extent", "spatial", "given"
        image, noise, mask, extent, spatial, given = (batchdata[name].to(**to) for name in names)
        target = FlowTarget(self.statistics.normalised(image), torch.tensor(times).to(**to), mask)
        noisy = self.flow.add_noise(target.clean, noise, target.times)
        arguments = {"time": target.times, "context": torch.stack(vectors).to(**to), "extent": extent}
        if self.statistics.spatial:
            arguments["spatial"] = self.statistics.spatial_input(spatial, given)
        return noisy, target, (), arguments


class FlowEvaluator(SupervisedEvaluator):
    """
    MONAI's ``SupervisedEvaluator`` for latents at eight times, with the noise that a file has always, in mixed precision on
    any device. Its metrics are means of

    - ``loss``, the key metric: as in training, but with all times equally frequent;
    - ``loss_t_0_25`` to ``loss_t_75_100``: its parts, by time in percent (100 is noise);
    - ``unexplained_band_1`` to ``unexplained_band_4``: by quarter of the channels, the leading ones first, the mean square
      error of the estimated clean latent in units of the channels' variances. Predicting the mean gives 1.

    Args:
        flow: flow that is learned.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
        kwargs: arguments of ``SupervisedEvaluator``; ``prepare_batch`` is a :py:class:`FlowPrepareBatch`.
    """

    LOSS_BY_TIME = tuple(f"loss_t_{100 * i // NUM_BINS}_{100 * (i + 1) // NUM_BINS}" for i in range(NUM_BINS))
    BY_BAND = tuple(f"unexplained_band_{i + 1}" for i in range(NUM_BANDS))

    def __init__(self, *, flow: RectifiedFlow, amp_dtype: str, **kwargs: Any) -> None:
        names = "loss", *self.LOSS_BY_TIME, *self.BY_BAND
        metrics: dict[str, Any] = {name: Average(from_engine(name, first=True)) for name in names}
        kwargs |= {"key_val_metric": {"loss": metrics.pop("loss")}, "additional_metrics": metrics}
        super().__init__(metric_cmp_fn=operator.lt, decollate=False, **kwargs)
        self.flow, self.dtype = flow, autocast_dtype(amp_dtype)

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> list[dict[str, Tensor]]:  # type: ignore[override]
        losses, unexplained, device = [], [], engine.state.device
        variance = engine.prepare_batch.statistics.amplitude.to(device).square()
        for step in range(NUM_TIMES):
            noisy, target, args, kwargs = engine.prepare_batch.at_time(batchdata, (step + 0.5) / NUM_TIMES, device)
            with engine.mode(engine.network), torch.autocast(device.type, self.dtype, enabled=self.amp):
                estimate = engine.inferer(noisy, engine.network, *args, **kwargs).float()
            losses.append(self.flow.loss(estimate, target))
            unexplained.append(channel_means((estimate - target.clean).square(), target.mask).mean(0) / variance)
        by_time, by_channel = torch.stack(losses), torch.stack(unexplained).mean(0)
        bands = itertools.pairwise(len(by_channel) * i // NUM_BANDS for i in range(NUM_BANDS + 1))
        parts = {
            "loss": by_time,
            **dict(zip(self.LOSS_BY_TIME, by_time.chunk(NUM_BINS))),
            **{name: by_channel[first : max(after, first + 1)] for name, (first, after) in zip(self.BY_BAND, bands)},
        }
        return [{name: part.mean() for name, part in parts.items()}]
