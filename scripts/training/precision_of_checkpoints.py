"""The precision of a resumed run: that of its checkpoint, on any processor."""

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
    The precision of the newest checkpoint that records one, so that a run continues as it began, on another processor too.
    Where none records it (there is none, or all are of an older version), the default of the device.

    Args:
        ckpt_dir: folder of the checkpoints.
        device: where the run continues.
    """
    for path in find_checkpoints(ckpt_dir):
        record = _record(path)
        if record is not None:
            return Precision(str(device), **record, reason=f"that of {path}, from which the run is resumed")
        logger.info(f"{path} does not record its precision")
    return choose_precision(device)


def _record(path: Path) -> dict[str, Any] | None:
    """The two entries of the precision; None where they are missing. The rest is checked when the checkpoint is loaded."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: no tensor is read
        amp, amp_dtype = content["precision"]["amp"], content["precision"]["amp_dtype"]
    except Exception:  # a damaged archive raises errors of any type; they are reported when it is loaded
        return None
    return {"amp": amp, "amp_dtype": amp_dtype} if isinstance(amp, bool) and amp_dtype in LOWER_PRECISIONS else None
