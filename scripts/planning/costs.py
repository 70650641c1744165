"""What operations need, counted while they run: memory, what is kept for the backward pass, floating-point operations."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scripts.bundle.machine import GIB
from scripts.layers.factors import by, padded_size

UNIT = {"cpu": 64, "cuda": 512}  # bytes that the allocators round up to
CONTEXT = {"cuda": 0.6, "cpu": 0.5}  # GiB: CUDA's context and libraries; the process before the first step
FRAGMENTATION = 0.12  # share of the peak that an allocator holds and cannot use, and that other operations need beside it
aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """
    What one operation needs. Sizes are in bytes.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        parameters: networks, their buffers and the average of their weights.
        peak: largest amount in use at one time, everything included.
        needed: peak and margin: what PyTorch does not allocate (``CONTEXT``), what its allocator cannot use
            (``FRAGMENTATION``), and ``convolution``.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        flops: operations, a multiplication and an addition counted as two.
        in_slabs: whether it works in slabs, with the same result, where memory is short.
        gradients: gradients of all trained parameters.
        optimizer_state: state of all optimizers.
        saved_activations: what forward pass and loss keep for the backward pass, parameters apart.
        levels: the same for each level of an autoencoder, from the image to the latent and back.
    """

    device: str
    parameters: int
    peak: int
    needed: int
    convolution: int
    flops: int
    in_slabs: bool = False
    gradients: int = 0
    optimizer_state: int = 0
    saved_activations: int = 0
    levels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """
    What a configuration needs.

    Args:
        spatial_size: size of the training patch, or of a generator's volumes, voxels.
        volume_size: size of the volume that is reconstructed or decoded, voxels.
        batch_size: patches or latents per training step.
        downsample_factor: total factor of the autoencoder along each axis.
        latent_shape: shape of one patch's latent, channels first.
        voxels_per_latent: voxels (times image channels) for each number of the latent.
        parameters: number of parameters of the network.
        costs: by name: ``"training"`` (a step) and ``"reconstruction"`` of an autoencoder, ``"training"``, ``"sampling"``
            (a step of the solver with guidance), ``"encoding"`` (a plane of a spatial condition) and ``"decoding"`` of a
            generator.
    """

    spatial_size: tuple[int, ...]
    volume_size: tuple[int, ...]
    batch_size: int
    downsample_factor: tuple[int, ...]
    latent_shape: tuple[int, ...]
    voxels_per_latent: float
    parameters: int
    costs: Mapping[str, Cost]

    @classmethod
    def of(cls, network: nn.Module, autoencoder: Any, spatial_size: Sequence[int], **parts: Any) -> Estimate:
        """
        That of a network.

        Args:
            network: network that is trained.
            autoencoder: autoencoder that makes the latents.
            spatial_size: see above.
            parts: the remaining fields.
        """
        factors = autoencoder.total_downsample_factor
        latent = autoencoder.latent_shape(padded_size(spatial_size, factors))
        return cls(
            spatial_size=tuple(spatial_size),
            downsample_factor=factors,
            latent_shape=latent,
            voxels_per_latent=math.prod(factors) * autoencoder.arguments["in_channels"] / latent[0],
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            **parts,
        )

    @property
    def needed(self) -> int:
        """Bytes of the operation that needs most, margin included; those that work in slabs only where there is no other."""
        return max(self.costs.values(), key=lambda cost: (not cost.in_slabs, cost.needed)).needed

    def fits(self, memory_gb: float) -> bool:
        """Whether ``memory_gb`` GiB are enough for everything that does not work in slabs."""
        return self.needed <= memory_gb * GIB


class AllocationTracker(TorchDispatchMode):
    """
    A context that counts the storages that are allocated and freed in it, fake or real, and operations.

    ``peak`` is the largest number of bytes allocated at one time.

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

    def track(self, *tensors: Any) -> None:
        """Count tensors that exist before the first operation."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and self.only in (None, tensor.device.type):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.nbytes)

    def cost(self, parameters: int, **parts: Any) -> Cost:
        """
        What has been counted.

        Args:
            parameters: bytes of the networks.
            parts: further fields of the cost.
        """
        needed = int(self.peak * (1 + FRAGMENTATION)) + self.convolution + int(CONTEXT[self.device] * GIB)
        return Cost(self.device, parameters, self.peak, needed, self.convolution, self.flops, **parts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # FlopCounterMode would count the same, but its hooks keep gradients in memory longer than a step does
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        self.track(result)
        if func is aten.mse_loss.default and result.dim() == 0:
            self.peak = max(self.peak, self.nbytes + args[0].nbytes)  # squared errors are there before their mean is taken
        if func is aten.convolution.default:
            self.convolution = max(self.convolution, args[0].nbytes + result.nbytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
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


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """
    A context that counts what a forward pass in it keeps for the backward pass, on any device, fake or not. A storage counts
    once.

    Args:
        apart: tensors that are not counted, such as parameters.
    """

    def __init__(self, apart: Sequence[torch.Tensor] = ()) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self.counting = True
        self.known = {tensor.untyped_storage()._cdata for tensor in apart}
        self.block: nn.Module | None = None
        self.kept: Counter[nn.Module | None] = Counter()
        self.level_of: dict[nn.Module | None, str] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.kept.total()

    @property
    def levels(self) -> dict[str, int]:
        """Bytes of each level of the watched network, in the order of the forward pass, and of the rest."""
        levels = dict.fromkeys([*self.level_of.values(), "other"], 0)
        for block, nbytes in self.kept.items():
            levels[self.level_of.get(block, "other")] += nbytes
        return levels

    def attach(self, trainer: Trainer) -> None:
        """Count only what forward pass and loss of the last iteration of the first epoch keep."""
        self.counting = False
        last = Events.ITERATION_STARTED(once=trainer.state.epoch_length)
        trainer.add_event_handler(last, setattr, self, "counting", True)
        trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, setattr, self, "counting", False)

    def watch(self, network: Any) -> None:
        """
        Tell the levels of encoder and decoder apart. A level is a sequence of blocks with the same finest grid; that of a
        block is the finer one of its input's and its result's.

        Args:
            network: with ``encoder.blocks`` and ``decoder.blocks``, as MONAI's ``AutoencoderKL``; it keeps its hooks.
        """
        for part in ("encoder", "decoder"):
            for block in getattr(network, part).blocks:
                block.register_forward_pre_hook(self._enter)
                block.register_forward_hook(partial(self._leave, part))

    def _enter(self, block: nn.Module, _: Any) -> None:
        self.block = block

    def _leave(self, part: str, block: nn.Module, args: Any, result: torch.Tensor) -> None:
        self.block = None
        self.level_of[block] = f"{part} {by(map(max, zip(args[0].shape[2:], result.shape[2:])))}"

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if self.counting and storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept[self.block] += storage.nbytes()
        return tensor


def nbytes_of(tensors: Any) -> int:
    """Bytes of all tensors in nested lists, tuples and dictionaries."""
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))
