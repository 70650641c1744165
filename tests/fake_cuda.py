"""CUDA without a card: fake tensors that say they are on one, under the dispatcher's own rules of CUDA's mixed precision.

Fake tensors have shapes, data types and strides, so every operation finds those that it would have on a GPU.
``torch.autocast`` refuses where there is none, but the state that it sets is the thread's and can be set without it. The
backward pass is out of reach: autograd asks for the card's streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from scripts.planning.allocations import AllocationTracker
from scripts.planning.fake_tensors import fake_tensors
from scripts.planning.operation_workspace import workspace


@contextmanager
def autocast_of_cuda(dtype: torch.dtype) -> Iterator[None]:
    """What ``torch.autocast("cuda", dtype)`` does where there is a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@contextmanager
def fake_card() -> Iterator[None]:
    """Every tensor that is made inside is fake, and on a GPU."""
    with fake_tensors(), torch.device("cuda"):
        yield


class CardMemory(AllocationTracker):
    """Counts what is allocated on the fake card, and not what stays on the host beside it."""

    def __init__(self) -> None:
        super().__init__("cuda")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        on_card = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"]
        for tensor in on_card:
            self._count(tensor.untyped_storage())
        self._note(workspace(func, args, result, "cuda") if on_card else 0)
        return result
