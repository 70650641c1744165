"""Networks on PyTorch's fake tensors: every operation is run, but tensors have neither values nor memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["fake_copy", "fake_image", "fake_tensors"]


def fake_tensors() -> Any:
    """A context, private to PyTorch, in which every tensor that is made is fake."""
    return FakeTensorMode(allow_non_fake_inputs=True)  # a loss may hold tensors of its own


def fake_copy(module: nn.Module, device: str = "cpu") -> nn.Module:
    """
    A copy of ``module``, on any device, with fake parameters and buffers on ``device``, which need not exist. To be called
    inside :py:func:`fake_tensors`.
    """
    memo: dict[int, Any] = {}
    attributes = (value for part in module.modules() for value in vars(part).values())
    plain = (value for value in attributes if isinstance(value, torch.Tensor))  # attention blocks have one
    for tensor in itertools.chain(module.parameters(), module.buffers(), plain):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def fake_image(network: nn.Module, batch_size: int, spatial_size: Sequence[int]) -> torch.Tensor:
    """A batch of volumes for ``network``. To be called inside :py:func:`fake_tensors`."""
    encoder: Any = network.encoder
    return torch.empty(batch_size, encoder.in_channels, *spatial_size, dtype=next(network.parameters()).dtype)
