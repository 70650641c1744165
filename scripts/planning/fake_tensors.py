"""Networks on PyTorch's fake tensors, and what they allocate and keep: every operation is run, in the data types of a device
that need not be there, but tensors have neither values nor memory. The two counters count real tensors as well."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from scripts.layers.factors import by

UNIT = {"cpu": 64, "cuda": 512}  # bytes that the allocators round up to
aten = torch.ops.aten
# Operations that CUDA's autocast runs in float32 and the CPU's does not:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32, and ATen/autocast_mode.h
FLOAT32_ON_CUDA = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus layer_norm
rms_norm group_norm norm cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss hinge_embedding_loss kl_div
l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp interpolate
""".split()  # noqa: SIM905
FLOAT32_RESULT_ON_CUDA = ("prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum", "vector_norm", "matrix_norm")


def fake_tensors() -> Any:
    """A context, private to PyTorch, in which every tensor that is made is fake."""
    return FakeTensorMode(allow_non_fake_inputs=True)  # a loss may hold tensors of its own


def fake_copy(module: nn.Module, device: str = "cpu") -> nn.Module:
    """A copy of a module on any device, with fake parameters and buffers on ``device``, which need not exist. To be called
    inside :py:func:`fake_tensors`."""
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


def casting_rules(device: str) -> contextlib.AbstractContextManager:
    """A context in which :py:func:`autocast` casts as on ``device``, ``"cuda"`` or ``"cpu"``."""
    return _CudaCasting() if device == "cuda" else contextlib.nullcontext()


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in ``dtype``, None for none, of fake tensors, which are on the CPU."""
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


class _CudaCasting(TorchFunctionMode):
    """Runs in float32 what CUDA's autocast does; the CPU's autocast casts the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if not torch.is_autocast_enabled("cpu") or name not in (*FLOAT32_ON_CUDA, *FLOAT32_RESULT_ON_CUDA):
            return func(*args, **kwargs)
        if name in FLOAT32_ON_CUDA:
            args, kwargs = tree_map_only(torch.Tensor, _to_float32, (args, kwargs))
        elif args[0].dtype in (torch.bfloat16, torch.float16):
            kwargs = {"dtype": torch.float32, **kwargs}
        with autocast(None):
            return func(*args, **kwargs)


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class AllocationTracker(TorchDispatchMode):
    """
    A context that counts the storages that are allocated and freed in it, fake or real, and operations. ``peak`` is the
    largest number of bytes allocated at one time.

    Args:
        device: ``"cuda"`` or ``"cpu"``, whose allocator is imitated.
        only: type of the device whose tensors are counted; None for all.
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
    A context that counts the bytes that a forward pass in it keeps for the backward pass (``nbytes``), on any device, fake
    or not, and those of each level of a network that it watches (``levels``). A storage counts once.

    Args:
        apart: tensors that are not counted, such as parameters.
    """

    def __init__(self, apart: Sequence[torch.Tensor] = ()) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self.counting = True
        self.known = {tensor.untyped_storage()._cdata for tensor in apart}
        self.nbytes = self.before_block = 0
        self.levels: dict[str, int] = {}

    def attach(self, trainer: Trainer) -> None:
        """Count only what forward pass and loss of the last iteration of the first epoch keep."""
        self.counting = False
        last = Events.ITERATION_STARTED(once=trainer.state.epoch_length)
        trainer.add_event_handler(last, setattr, self, "counting", True)
        trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, setattr, self, "counting", False)

    def watch(self, network: Any) -> None:
        """Tell the levels of an autoencoder apart, which keeps the hooks. A level is a sequence of blocks with the same
        finest grid; that of a block is the finer one of its input's and its result's."""
        for part in ("encoder", "decoder"):
            for block in getattr(network, part).blocks:
                block.register_forward_pre_hook(self._enter)
                block.register_forward_hook(partial(self._leave, part))

    def _enter(self, *_: Any) -> None:
        self.before_block = self.nbytes

    def _leave(self, part: str, block: nn.Module, args: Any, result: torch.Tensor) -> None:
        level = f"{part} {by(map(max, zip(args[0].shape[2:], result.shape[2:])))}"
        self.levels[level] = self.levels.get(level, 0) + self.nbytes - self.before_block

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if self.counting and storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.nbytes += storage.nbytes()
        return tensor


def nbytes_of(tensors: Any) -> int:
    """Bytes of all tensors in nested lists, tuples and dictionaries."""
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))
