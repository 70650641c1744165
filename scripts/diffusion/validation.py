"""How far the network is off, on latents that training never sees: at fixed noise and fixed times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.inferers import SimpleInferer

from scripts.bundle.precision import autocast_dtype
from scripts.diffusion.flow import RectifiedFlow, channel_means

__all__ = ["FlowEvaluator", "FlowInferer", "averages"]

NUM_TIMES = 8  # at the middle of as many equal parts of 0 to 1
NUM_BINS = NUM_BANDS = 4


class FlowInferer(SimpleInferer):
    """
    MONAI's ``SimpleInferer`` with mixed precision on any device.

    Args:
        amp: whether to use mixed precision.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
    """

    def __init__(self, amp: bool, amp_dtype: str) -> None:
        super().__init__()
        self.amp, self.dtype = amp, autocast_dtype(amp_dtype)

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The network's estimate from noisy latents ``BxCxHxWxD``, in float32."""
        with torch.no_grad(), torch.autocast(inputs.device.type, self.dtype, enabled=self.amp):
            return super().__call__(inputs, network, *args, **kwargs).float()


class FlowEvaluator(SupervisedEvaluator):
    """
    MONAI's ``SupervisedEvaluator`` that looks at each latent at eight times, with the noise that its file has always.
    ``engine.state.output`` is a list of one dict of means:

    - ``loss``: as in training, but with all times equally frequent;
    - ``loss_t_0_25`` to ``loss_t_75_100``: its parts, by time in percent (100 is noise);
    - ``unexplained_band_1`` to ``unexplained_band_4``: by quarter of the channels, the leading ones first, the mean square
      error of the estimated clean latent in units of the channels' variances. Predicting the mean gives 1.

    Args:
        flow: flow that is learned.
        kwargs: arguments of ``SupervisedEvaluator``; ``prepare_batch`` is a :py:class:`FlowPrepareBatch`.
    """

    LOSS_BY_TIME = tuple(f"loss_t_{100 * i // NUM_BINS}_{100 * (i + 1) // NUM_BINS}" for i in range(NUM_BINS))
    BY_BAND = tuple(f"unexplained_band_{i + 1}" for i in range(NUM_BANDS))
    PARTS = LOSS_BY_TIME + BY_BAND

    def __init__(self, *, flow: RectifiedFlow, **kwargs: Any) -> None:
        super().__init__(decollate=False, **kwargs)
        self.flow = flow

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:  # type: ignore[override]
        losses, unexplained = [], []
        variance = engine.prepare_batch.statistics.amplitude.to(engine.state.device).square()
        for step in range(NUM_TIMES):
            time = (step + 0.5) / NUM_TIMES
            noisy, target, args, kwargs = engine.prepare_batch.at_time(batchdata, time, engine.state.device)
            with engine.mode(engine.network):
                estimate = engine.inferer(noisy, engine.network, *args, **kwargs)
            losses.append(self.flow.loss(estimate, target))
            unexplained.append(channel_means((estimate - target.clean).square(), target.mask).mean(0) / variance)
        output = {"loss": torch.stack(losses).mean()}
        for name, part in zip(self.LOSS_BY_TIME, torch.stack(losses).chunk(NUM_BINS)):
            output[name] = part.mean()
        per_channel = torch.stack(unexplained).mean(0)
        for i, name in enumerate(self.BY_BAND):
            first, after = (len(per_channel) * j // NUM_BANDS for j in (i, i + 1))
            output[name] = per_channel[first : max(after, first + 1)].mean()
        engine.state.output = [output]
        return engine.state.output


def averages(*names: str) -> dict[str, Average]:
    """Ignite's means over the validation latents of parts of the evaluator's output."""
    return {name: Average(output_transform=from_engine(name, first=True)) for name in names}
