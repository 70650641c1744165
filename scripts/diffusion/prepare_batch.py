"""From latents to what the network sees of them: normalised, mixed with noise, with a time and a vector of conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from monai.engines.utils import DiffusionPrepareBatch
from monai.utils.enums import CommonKeys as Keys

from scripts.bundle.json_files import Must, checked
from scripts.diffusion.flow import FlowTarget, RectifiedFlow
from scripts.diffusion.network import NUM_TIMESTEPS
from scripts.diffusion.statistics import LatentStatistics

__all__ = ["FlowPrepareBatch"]

Dropout = Annotated[float, Must("at least 0 and below 1", lambda share: 0 <= share < 1)]
Prepared = tuple[torch.Tensor, FlowTarget, tuple[()], dict[str, torch.Tensor]]


class FlowPrepareBatch(DiffusionPrepareBatch):
    """
    MONAI's ``DiffusionPrepareBatch`` for a rectified flow on batches of :py:class:`LatentCollate`. MONAI's draws whole
    timesteps, all equally likely, and takes the noise for the target. Here the time, the noise and the conditions that are
    left out of an item depend on the item's seed alone.

    Args:
        statistics: statistics of the latents.
        flow: flow that is learned.
        condition_dropout: see :py:meth:`Conditions.with_dropout`; at least 0 and below 1. Each spatial condition is left out
            with this probability too, and all of them with the null vector.

    Raises:
        ValueError: for another ``condition_dropout``.
    """

    def __init__(self, statistics: LatentStatistics, flow: RectifiedFlow, condition_dropout: float) -> None:
        super().__init__(num_train_timesteps=NUM_TIMESTEPS)
        self.statistics, self.flow = statistics, flow
        self.condition_dropout: float = checked(condition_dropout, Dropout, "condition_dropout")

    def __call__(  # type: ignore[override]
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> Prepared:
        """
        Args:
            batchdata: batch of :py:class:`LatentCollate`.
            device: where to put it.
            non_blocking: whether the copy to a GPU may go on in the background.
            kwargs: further arguments of ``Tensor.to``.

        Returns:
            the noisy latents, the :py:class:`FlowTarget`, no arguments, and the keyword arguments of the network.
        """
        num_values = (batchdata["mask"].flatten(1).sum(1) * batchdata[Keys.IMAGE].shape[1]).tolist()  # without padding
        times, vectors, given = [], [], []
        for seed, volume, count, present in zip(batchdata["seed"], batchdata["volume"], num_values, batchdata["given"]):
            random = np.random.default_rng(seed)
            times.append(self.flow.draw_time(count, random))
            vector = self.statistics.conditions.with_dropout(volume, self.condition_dropout, random)
            vectors.append(vector)
            kept = torch.from_numpy(random.random(len(present)) >= self.condition_dropout)
            given.append(present * kept * vector.any())  # nothing is given with the null vector
        return self._prepared(
            {**batchdata, "given": torch.stack(given)}, times, vectors, device=device, non_blocking=non_blocking, **kwargs
        )

    def at_time(self, batchdata: Mapping[str, Any], time: float, device: torch.device) -> Prepared:
        """The same at a given time and with all conditions, for validation."""
        vectors = [self.statistics.conditions.vector(volume) for volume in batchdata["volume"]]
        return self._prepared(batchdata, [time] * len(vectors), vectors, device=device)

    def _prepared(
        self, batchdata: Mapping[str, Any], times: list[float], vectors: list[torch.Tensor], **to: Any
    ) -> Prepared:
        names = Keys.IMAGE, "noise", "mask", "extent", "spatial", "given"
        image, noise, mask, extent, spatial, given = (batchdata[name].to(**to) for name in names)
        target = FlowTarget(self.statistics.normalised(image), torch.tensor(times).to(**to), mask)
        noisy = self.flow.add_noise(target.clean, noise, target.times)
        arguments = {"time": target.times, "context": torch.stack(vectors).to(**to), "extent": extent}
        if self.statistics.spatial:
            arguments["spatial"] = self.statistics.spatial_input(spatial, given)
        return noisy, target, (), arguments
