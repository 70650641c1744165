"""Temporary memory that single operations need besides their arguments and results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["workspace"]

aten = torch.ops.aten
BLOCK = 16  # channels of oneDNN's memory formats
STRIDED_PLANES = 125  # of the larger map, which oneDNN holds for the weights' gradient of a strided bfloat16 convolution


def workspace(func: Any, args: Any, result: Any, device: str) -> int:
    """
    Bytes of an operation's workspace.

    On the CPU, oneDNN copies the arguments and the result of a convolution into formats of its own. The number of copies was
    measured as the growth of a process around single convolutions (PyTorch 2.14.1, a processor with AVX-512 and AMX); it may
    differ elsewhere. cuDNN's workspace depends on the algorithm that it chooses and is not counted.

    Args:
        func: operation, as a ``TorchDispatchMode`` gets it.
        args: its positional arguments.
        result: its result.
        device: ``"cpu"`` or ``"cuda"``.
    """
    find = WORKSPACES.get(func)
    return 0 if find is None else find(args, result, device)


def _mse_loss(args: Any, result: torch.Tensor, device: str) -> int:
    """All squared errors, before their mean is taken."""
    return 0 if result.dim() else args[0].nbytes


def _convolution(args: Any, result: torch.Tensor, device: str) -> int:
    if device != "cpu":
        return 0
    x, transposed = _blocked(args[0]), args[6]
    y = _blocked(result)
    if transposed or _half(result):
        return max(x, 2 * y)
    return max(x + y - result.nbytes, y)


def _convolution_backward(args: Any, result: Any, device: str) -> int:
    if device != "cpu":
        return 0
    grad, x, stride, transposed = args[0], args[1], args[4], args[7]
    blocked_x, blocked_y = _blocked(x), _blocked(grad)
    strided = math.prod(stride) > 1
    for_weight = blocked_x + blocked_y
    if strided and _half(x):
        larger = grad if transposed else x
        for_weight += STRIDED_PLANES * _whole_blocks(larger.shape[1]) * larger[0, 0, 0].numel() * larger.itemsize
    if result[0] is None:
        return for_weight
    copies = 2 if _half(x) or (strided and not transposed) else 1
    return max(copies * blocked_x, blocked_y, for_weight)


def _half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _blocked(tensor: torch.Tensor) -> int:
    """Bytes of a copy whose channels fill whole blocks; a single channel is left as it is."""
    channels = tensor.shape[1]
    return tensor.nbytes if channels == 1 else tensor.nbytes // channels * _whole_blocks(channels)


def _whole_blocks(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


WORKSPACES: dict[Any, Callable[[Any, Any, str], int]] = {
    aten.mse_loss.default: _mse_loss,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
