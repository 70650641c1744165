"""CUDA without a card: fake tensors that say they are on one, under the dispatcher's own rules of CUDA's mixed precision.

Fake tensors have shapes, data types and strides, so every operation finds those that it would have on a GPU.
``torch.autocast`` refuses where there is none, but the state that it sets is the thread's and can be set without it. The
backward pass is out of reach: autograd asks for the card's streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scripts.planning.fake_tensors import fake_tensors


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
