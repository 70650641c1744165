"""What TensorBoard draws of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["lr_and_losses"]


def lr_and_losses(optimizer: torch.optim.Optimizer) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """
    An ``output_transform`` for MONAI's ``TensorBoardStatsHandler``: the learning rate, and every loss in the output of a
    :py:class:`scripts.training.ResumableTrainer`.

    Args:
        optimizer: whose learning rate is drawn, as ``lr``.
    """

    def transform(output: list[dict[str, Any]]) -> dict[str, Any]:
        losses = {name: value for name, value in output[0].items() if name.endswith("loss")}
        return {"lr": optimizer.param_groups[0]["lr"], **losses}

    return transform
