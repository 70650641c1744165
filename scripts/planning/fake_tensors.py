"""Networks on PyTorch's fake tensors: every operation is run, in the data types of a device that need not be there, but
tensors have neither values nor memory."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

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
