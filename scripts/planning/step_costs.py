"""What a training step and a reconstruction cost in memory and operations, found by running them on fake tensors.

The real network, loss and optimizer run under PyTorch's ``FakeTensorMode``: every operation takes place, in the order and
the data types of the real one, but no tensor has numbers. So a volume of any size takes a second and no memory, and the
result follows the code by itself.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scripts.planning.cuda_casting import autocast, casting_rules
from scripts.planning.operation_workspace import workspace
from scripts.planning.saved_tensors import LevelCost, LevelListener, SavedTensors
from scripts.training.losses import kl_divergence

__all__ = ["InferenceCost", "TrainingCost", "inference_cost", "training_cost"]

ALLOCATION = {"cpu": 64, "cuda": 512}  # bytes that the allocators round up to
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TrainingCost:
    """
    Cost of one training step, after the first one. All but ``flops`` are bytes.

    Args:
        parameters: of the network, its buffers, their average, and the discriminator's.
        gradients: of all trained parameters.
        optimizer_state: of all optimizers.
        saved_activations: what forward pass and loss keep for the backward pass, parameters apart.
        levels: the same per level, from the image to the latent and back.
        peak: most that is alive at one time, everything included.
        peak_phase: when that is: ``"forward"``, ``"loss"``, ``"backward"``, ``"discriminator"`` or ``"optimizer"``.
        convolution: input and result of the largest convolution: libraries may need as much again to reorder them.
        flops: operations of forward and backward pass, a multiplication and an addition counted as two.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    saved_activations: int
    levels: tuple[LevelCost, ...]
    peak: int
    peak_phase: str
    convolution: int
    flops: int


@dataclass(frozen=True)
class InferenceCost:
    """
    Cost of reconstructing volumes without gradients: ``parameters``, ``peak``, ``convolution`` in bytes, ``flops``. See
    :py:class:`TrainingCost`.
    """

    parameters: int
    peak: int
    convolution: int
    flops: int


def training_cost(
    network: nn.Module,
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = torch.bfloat16,
    device: str = "cuda",
    loss: Loss = F.l1_loss,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    accumulates: bool = False,
    discriminator: nn.Module | None = None,
    averaged: bool = False,
) -> TrainingCost:
    """
    Cost of a step of :py:class:`scripts.training.AutoencoderTrainer`. Nothing is computed or allocated.

    Args:
        network: MONAI's ``AutoencoderKL`` or one with its interface (``encoder.blocks``, ``decoder.blocks``, ``forward``
            returning the reconstruction, ``z_mu`` and ``z_sigma``). It is not changed, and may be on the ``meta`` device.
        spatial_size: of the volume or patch, voxels.
        batch_size: volumes per step.
        amp_dtype: data type of mixed precision, None for none.
        device: ``"cuda"`` or ``"cpu"``, whose casting rules, optimizer and allocator are followed. No such device is needed.
        loss: of reconstruction and image, ``BxCxHxWxD`` in float32.
        optimizer: makes the optimizer from parameters.
        accumulates: gradients of an earlier batch are there while the batch runs (gradient accumulation).
        discriminator: adversarial training with MONAI's ``PatchDiscriminator`` or one with its interface.
        averaged: an average of the weights lies beside them.
    """
    _check_device(device)
    with _fake_tensors():
        network = _fake_copy(network)
        judge = None if discriminator is None else _fake_copy(discriminator)
        step = _TrainingStep(network, judge, loss, optimizer, device, amp_dtype)
        step.prepare(accumulates, averaged)
        image = _image(network, batch_size, spatial_size)
        saved = SavedTensors(step.parameters)
        levels = LevelListener(network, saved)
        with _AllocationTracker(device) as tracker, casting_rules(device), levels.listening():
            tracker.track(step.tensors(), image)
            step.run(image, tracker, saved)
            gradients = sum(p.grad.nbytes for p in step.parameters if p.grad is not None)
    return TrainingCost(
        parameters=step.nbytes_of_modules(),
        gradients=gradients,
        optimizer_state=step.nbytes_of_optimizers(),
        saved_activations=saved.nbytes,
        levels=levels.costs(),
        peak=tracker.peak,
        peak_phase=tracker.peak_phase,
        convolution=tracker.convolution,
        flops=tracker.flops,
    )


def inference_cost(
    network: nn.Module,
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = torch.bfloat16,
    device: str = "cuda",
) -> InferenceCost:
    """
    Cost of ``network.reconstruct`` of whole volumes without gradients, as ``ReconstructionInferer``
    runs it. The arguments are those of :py:func:`training_cost`.
    """
    _check_device(device)
    with _fake_tensors(), torch.no_grad():
        network = _fake_copy(network).eval()
        image = _image(network, batch_size, spatial_size)
        with _AllocationTracker(device) as tracker, casting_rules(device):
            tracker.track(network.state_dict(), image)
            with autocast(amp_dtype):
                reconstruction = network.reconstruct(image).to(image.dtype)  # type: ignore[operator]
            del reconstruction
    return InferenceCost(_nbytes(network.state_dict()), tracker.peak, tracker.convolution, tracker.flops)


class _TrainingStep:
    """One step of :py:class:`scripts.training.AutoencoderTrainer`, as far as memory is concerned."""

    def __init__(
        self,
        network: nn.Module,
        discriminator: nn.Module | None,
        loss: Loss,
        optimizer: Callable[..., torch.optim.Optimizer],
        device: str,
        amp_dtype: torch.dtype | None,
    ) -> None:
        self.network, self.discriminator, self.loss, self.amp_dtype = network.train(), discriminator, loss, amp_dtype
        self.modules = [network] if discriminator is None else [network, discriminator]
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.optimizers = [optimizer(module.parameters()) for module in self.modules]
        for group in itertools.chain.from_iterable(o.param_groups for o in self.optimizers):
            if group.get("foreach", True) is None:  # PyTorch's choice, which it does not see on a fake device
                group["foreach"] = device == "cuda" and not group.get("fused")

    def prepare(self, accumulates: bool, averaged: bool) -> None:
        """Let the optimizers make their state, as the first step does, and copy the weights for their average."""
        self.average = [torch.empty_like(tensor) for tensor in self.network.state_dict().values()] if averaged else []
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()
            if not accumulates:
                optimizer.zero_grad(set_to_none=True)

    def run(self, image: torch.Tensor, tracker: _AllocationTracker, saved: SavedTensors) -> None:
        with saved:
            tracker.phase = "forward"
            with autocast(self.amp_dtype):
                reconstruction, z_mu, z_sigma = self.network(image)
            tracker.phase = "loss"
            loss = self.loss(reconstruction.float(), image) + kl_divergence(z_mu, z_sigma)
            if self.discriminator is not None:
                self.discriminator.requires_grad_(False)
                loss = loss + self._opinion(reconstruction)
        tracker.phase = "backward"
        loss.backward()
        if self.discriminator is not None:
            tracker.phase = "discriminator"
            self.discriminator.requires_grad_(True)
            (self._opinion(image) + self._opinion(reconstruction.detach())).backward()
        tracker.phase = "optimizer"
        for module, optimizer in zip(self.modules, self.optimizers):
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()

    def _opinion(self, image: torch.Tensor) -> torch.Tensor:
        """A squared error of the discriminator's last map."""
        with autocast(self.amp_dtype):
            maps = self.discriminator(image)  # type: ignore[misc]
        return maps[-1].float().square().mean()

    def tensors(self) -> list[Any]:
        """Everything that is alive when the step starts."""
        gradients = [p.grad for p in self.parameters]
        return [self.average, [m.state_dict() for m in self.modules], gradients, [dict(o.state) for o in self.optimizers]]

    def nbytes_of_modules(self) -> int:
        return _nbytes(self.average) + sum(_nbytes(module.state_dict()) for module in self.modules)

    def nbytes_of_optimizers(self) -> int:
        return sum(_nbytes(dict(optimizer.state)) for optimizer in self.optimizers)


class _AllocationTracker(TorchDispatchMode):
    """
    Follows the storages that come into being and go, as an allocator would.

    ``peak`` is the most that was alive at one time, ``peak_phase`` the value of ``phase`` at that moment.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.alive: dict[int, weakref.ref] = {}
        self.nbytes = self.peak = self.convolution = self.flops = 0
        self.phase = self.peak_phase = "forward"

    def track(self, *tensors: Any) -> None:
        """Count tensors that are there before the first operation."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self._note(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # FlopCounterMode would count the same, but its hooks keep gradients alive for longer than they are
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self._note(workspace(func, args, result, self.device))
        if func is torch.ops.aten.convolution.default:
            self.convolution = max(self.convolution, args[0].nbytes + result.nbytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        unit = ALLOCATION[self.device]
        nbytes = -(-storage.nbytes() // unit) * unit

        def free(_: Any) -> None:
            del self.alive[key]
            self.nbytes -= nbytes

        self.alive[key] = weakref.ref(storage, free)
        self.nbytes += nbytes

    def _note(self, beside: int) -> None:
        if self.nbytes + beside > self.peak:
            self.peak, self.peak_phase = self.nbytes + beside, self.phase


def _fake_tensors() -> Any:
    """Fake tensors, which PyTorch keeps private: whoever is inside makes them instead of real ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)  # a loss may hold tensors of its own


def _fake_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module``, from whatever device, with fake parameters and buffers. Made inside ``_fake_tensors``."""
    memo: dict[int, Any] = {}
    attributes = (value for part in module.modules() for value in vars(part).values())
    plain = (value for value in attributes if isinstance(value, torch.Tensor))  # attention blocks have one
    for tensor in itertools.chain(module.parameters(), module.buffers(), plain):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def _image(network: nn.Module, batch_size: int, spatial_size: Sequence[int]) -> torch.Tensor:
    encoder: Any = network.encoder
    return torch.empty(batch_size, encoder.in_channels, *spatial_size, dtype=next(network.parameters()).dtype)


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))


def _check_device(device: str) -> None:
    if device not in ALLOCATION:
        raise ValueError(f"`device` is {device!r}; it must be one of {', '.join(ALLOCATION)}.")
