"""The data type of mixed precision."""

from __future__ import annotations

import torch

__all__ = ["autocast_dtype"]


def autocast_dtype(name: str) -> torch.dtype:
    """
    The data type that ``amp_dtype`` names.

    Raises:
        ValueError: for another name than ``"bfloat16"`` and ``"float16"``.
    """
    if name not in ("bfloat16", "float16"):
        raise ValueError(f"`amp_dtype` is {name!r}; it must be 'bfloat16' or 'float16'.")
    return getattr(torch, name)
