"""The memory of this machine, and the processes of a run under ``torchrun`` that share it and its work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import ignite.distributed as idist
import torch

MIB, GIB = 2**20, 2**30  # bytes
Item = TypeVar("Item")


def total_memory(device: str | torch.device) -> int | None:
    """Bytes that a device has, of the host for any but a CUDA device; None where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _pages("SC_PHYS_PAGES")


def free_memory() -> int | None:
    """Bytes of the host that no process uses; None where the system does not say."""
    return _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int | None:
    if name not in getattr(os, "sysconf_names", ()):  # no such table on Windows, and no free pages in that of macOS
        return None
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


def processes_on_host() -> int:
    """Processes of a distributed run on this machine, as ``torchrun`` tells them; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_of(items: Sequence[Item]) -> list[Item]:
    """Those of ``items`` that are for this process."""
    return list(items[idist.get_rank() :: idist.get_world_size()])


def merged(results: dict[str, Any]) -> dict[str, Any]:
    """The results of all processes in one dictionary, the same in each of them."""
    shares = cast("list[dict[str, Any]]", idist.all_gather(results))
    return {key: result for share in shares for key, result in share.items()}
