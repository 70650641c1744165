"""The precision of a run that goes on: that of its checkpoint, on whatever processor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from scripts.bundle.precision import LOWER_PRECISIONS, Precision, choose_precision
from scripts.training.checkpoints import find_checkpoints

__all__ = ["resumed_precision"]

logger = logging.getLogger(__name__)


def resumed_precision(ckpt_dir: str, device: str | torch.device) -> Precision:
    """
    The precision of the newest checkpoint that says it, so that a run goes on as it began, on another processor too. Where
    none says it (there is none, or all are of an older version), it is what pays on the device.

    Args:
        ckpt_dir: folder of the checkpoints.
        device: where the run goes on.
    """
    for path in find_checkpoints(ckpt_dir):
        record = _record(path)
        if record is not None:
            return Precision(str(device), **record, reason=f"that of {path}, which the run goes on from")
        logger.info(f"{path} does not say its precision")
    return choose_precision(device)


def _record(path: Path) -> dict[str, Any] | None:
    """The two keys of the precision; None where they are not there. Whether the rest is whole is for who loads it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: no tensor is read
        amp, amp_dtype = content["precision"]["amp"], content["precision"]["amp_dtype"]
    except Exception:  # a damaged archive raises whatever the reader stumbles over, and whoever loads it says so
        return None
    return {"amp": amp, "amp_dtype": amp_dtype} if isinstance(amp, bool) and amp_dtype in LOWER_PRECISIONS else None
