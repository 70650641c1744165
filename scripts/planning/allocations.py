"""Counts the memory that tensor operations allocate and free, and their floating-point operations."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scripts.planning.costs import Cost

__all__ = ["AllocationTracker", "nbytes_of"]

UNIT = {"cpu": 64, "cuda": 512}  # bytes that the allocators round up to
aten = torch.ops.aten


class AllocationTracker(TorchDispatchMode):
    """
    A context that counts the storages that are allocated and freed in it, fake or real.

    ``peak`` is the largest number of bytes allocated at one time, and ``peak_phase`` the value of ``phase`` at that moment.

    Args:
        device: ``"cuda"`` or ``"cpu"``, whose allocator is imitated.
        only: type of the device whose tensors are counted; None for all.

    Raises:
        ValueError: for another device.
    """

    def __init__(self, device: str, only: str | None = None) -> None:
        if device not in UNIT:
            raise ValueError(f"`device` is {device!r}; it must be one of {', '.join(UNIT)}.")
        super().__init__()
        self.device, self.only = device, only
        self.alive: dict[int, weakref.ref] = {}
        self.nbytes = self.peak = self.convolution = self.flops = 0
        self.phase = self.peak_phase = "forward"

    def track(self, *tensors: Any) -> None:
        """Count tensors that exist before the first operation."""
        self._count(tensors)
        self._note(0)

    def cost(self, parameters: int, **parts: Any) -> Cost:
        """
        What has been counted.

        Args:
            parameters: bytes of the networks.
            parts: further fields of the cost.
        """
        counted = {name: getattr(self, name) for name in ("device", "peak", "peak_phase", "convolution", "flops")}
        return Cost(parameters=parameters, **counted, **parts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # FlopCounterMode would count the same, but its hooks keep gradients in memory longer than a step does
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        self._count(result)
        # squared errors are all there before their mean is taken
        self._note(args[0].nbytes if func is aten.mse_loss.default and result.dim() == 0 else 0)
        if func is aten.convolution.default:
            self.convolution = max(self.convolution, args[0].nbytes + result.nbytes)
        return result

    def _count(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and self.only in (None, tensor.device.type):
                self._count_storage(tensor.untyped_storage())

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        unit = UNIT[self.device]
        nbytes = -(-storage.nbytes() // unit) * unit

        def free(_: Any) -> None:
            del self.alive[key]
            self.nbytes -= nbytes

        self.alive[key] = weakref.ref(storage, free)
        self.nbytes += nbytes

    def _note(self, beside: int) -> None:
        if self.nbytes + beside > self.peak:
            self.peak, self.peak_phase = self.nbytes + beside, self.phase


def nbytes_of(tensors: Any) -> int:
    """Bytes of all tensors in nested lists, tuples and dictionaries."""
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))
