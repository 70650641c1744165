"""The precision of a resumed run: that of its checkpoint, on any processor."""

from __future__ import annotations

import contextlib

import torch

from scripts.bundle.precision import Precision, choose_precision
from scripts.training.checkpoints import find_checkpoints

__all__ = ["resumed_precision"]


def resumed_precision(ckpt_dir: str, device: str | torch.device) -> Precision:
    """
    The precision of the newest checkpoint, so that a run continues as it began, on another processor too. Without a
    checkpoint, the default of the device.

    Args:
        ckpt_dir: folder of the checkpoints.
        device: device on which the run continues.
    """
    for path in find_checkpoints(ckpt_dir):
        with contextlib.suppress(Exception):  # a damaged file raises any; it is reported when it is loaded
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: no tensor is read
            return Precision(str(device), **content["precision"], reason=f"that of {path}, from which the run is resumed")
    return choose_precision(device)
