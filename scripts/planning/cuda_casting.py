"""CUDA's rules of mixed precision, applied on the CPU: what a step would cast on a GPU, without one."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

__all__ = ["autocast", "casting_rules"]

# Operations that CUDA's autocast runs in float32 and the CPU's does not:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32, and ATen/autocast_mode.h
FLOAT32_ON_CUDA = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus layer_norm
rms_norm group_norm norm cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss hinge_embedding_loss kl_div
l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp interpolate
""".split()  # noqa: SIM905
FLOAT32_RESULT_ON_CUDA = ("prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum", "vector_norm", "matrix_norm")


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


def casting_rules(device: str) -> contextlib.AbstractContextManager:
    """A context in which :py:func:`autocast` casts as on ``device``, ``"cuda"`` or ``"cpu"``."""
    return _CudaCasting() if device == "cuda" else contextlib.nullcontext()


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in ``dtype``, None for none, of fake tensors, which are on the CPU."""
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
