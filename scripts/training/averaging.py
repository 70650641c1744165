"""The moving average of the weights, which validation and ``model.pt`` use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """
    A ``multi_avg_fn`` for PyTorch's ``AveragedModel``. The share that a step keeps grows with the run, up to ``decay``, so
    that the first weights soon have no influence and short runs gain from the average too. ``decay`` is in [0, 1); 0 is no
    average.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`ema_decay` is {decay!r}; it must be at least 0 and below 1.")

    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor | int) -> None:
        steps = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    return average
