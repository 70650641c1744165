"""From latents to what the network sees of them: normalised, mixed with noise, with a time and a vector of conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.engines.utils import DiffusionPrepareBatch
from monai.utils.enums import CommonKeys as Keys

from scripts.diffusion.flow import FlowTarget, RectifiedFlow
from scripts.diffusion.latent_space import LatentSpace
from scripts.diffusion.latent_unet import NUM_TIMESTEPS

__all__ = ["FlowPrepareBatch"]

Prepared = tuple[torch.Tensor, FlowTarget, tuple[()], dict[str, torch.Tensor]]


class FlowPrepareBatch(DiffusionPrepareBatch):
    """
    MONAI's ``DiffusionPrepareBatch`` for a rectified flow on batches of :py:class:`LatentCollate`. MONAI's draws whole
    timesteps, all equally likely, and takes the noise for the target. Here the time, the noise and the conditions that are
    left out of an item depend on the item's seed alone.

    Args:
        space: of the latents.
        flow: that is learned.
        condition_dropout: see :py:meth:`Conditions.drawn`; 0 to 1.

    Raises:
        ValueError: for another ``condition_dropout``.
    """

    def __init__(self, space: LatentSpace, flow: RectifiedFlow, condition_dropout: float) -> None:
        super().__init__(num_train_timesteps=NUM_TIMESTEPS)
        if (
            isinstance(condition_dropout, bool)
            or not isinstance(condition_dropout, (int, float))
            or not 0 <= condition_dropout < 1
        ):
            raise ValueError(f"`condition_dropout` is {condition_dropout!r}; it must be at least 0 and below 1.")
        self.space, self.flow, self.condition_dropout = space, flow, condition_dropout

    def __call__(  # type: ignore[override]
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> Prepared:
        """
        Args:
            batchdata: of :py:class:`LatentCollate`.
            device: where to put it.
            non_blocking: whether the copy to a GPU may go on in the background.
            kwargs: further arguments of ``Tensor.to``.

        Returns:
            the noisy latents, the :py:class:`FlowTarget`, no arguments, and the keyword arguments of the network.
        """
        times, vectors = [], []
        for seed, volume, num_values in zip(batchdata["seed"], map(json.loads, batchdata["volume"]), _num_values(batchdata)):
            random = np.random.default_rng(seed)
            times.append(self.flow.drawn_time(num_values, random))
            conditions, size, spacing = volume["conditions"], volume["size"], volume["spacing"]
            vectors.append(self.space.conditions.drawn(conditions, size, spacing, self.condition_dropout, random))
        return self._prepared(batchdata, times, vectors, device, non_blocking, **kwargs)

    def at_time(self, batchdata: Mapping[str, Any], time: float, device: torch.device) -> Prepared:
        """The same at a given time and with all conditions, for validation."""
        volumes = map(json.loads, batchdata["volume"])
        vectors = [self.space.conditions.vector(each["conditions"], each["size"], each["spacing"]) for each in volumes]
        return self._prepared(batchdata, [time] * len(vectors), vectors, device, False)

    def _prepared(
        self,
        batchdata: Mapping[str, Any],
        times: list[float],
        vectors: list[torch.Tensor],
        device: str | torch.device | None,
        non_blocking: bool,
        **kwargs: Any,
    ) -> Prepared:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, non_blocking=non_blocking, **kwargs)

        clean = self.space.normalised(moved(batchdata[Keys.IMAGE]))
        target = self.flow.target(clean, moved(batchdata["noise"]), moved(torch.tensor(times)), moved(batchdata["mask"]))
        told = {"context": moved(torch.stack(vectors)), "extent": moved(batchdata["extent"])}
        return target.noisy, target, (), {"timesteps": NUM_TIMESTEPS * target.times, **told}


def _num_values(batchdata: Mapping[str, Any]) -> list[float]:
    """Values of each latent, without its padding."""
    return (batchdata["mask"].flatten(1).sum(1) * batchdata[Keys.IMAGE].shape[1]).tolist()
