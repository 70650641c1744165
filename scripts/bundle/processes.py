"""Sharing out work among the processes of a run under ``torchrun``, and collecting the results. One process has them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import ignite.distributed as idist
import torch

__all__ = ["merged", "share_of"]

Item = TypeVar("Item")


def share_of(items: Sequence[Item]) -> list[Item]:
    """Those of ``items`` that are for this process."""
    return list(items[idist.get_rank() :: idist.get_world_size()])


def merged(results: dict[str, Any]) -> dict[str, Any]:
    """The results of all processes in one dictionary, the same in each of them."""
    if idist.get_world_size() == 1:
        return dict(results)
    shares: list[Any] = [None] * idist.get_world_size()
    torch.distributed.all_gather_object(shares, results)
    return {key: result for share in shares for key, result in share.items()}
