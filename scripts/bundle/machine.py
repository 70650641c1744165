"""The memory of this machine, and how many processes of a run share it."""

from __future__ import annotations

import os

import torch

__all__ = ["GIB", "MIB", "free_memory", "processes_on_host", "total_memory"]

MIB, GIB = 2**20, 2**30  # bytes


def total_memory(device: str | torch.device) -> int | None:
    """Bytes that a device has, of the host for any but a CUDA device; None where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _pages("SC_PHYS_PAGES")


def free_memory() -> int | None:
    """Bytes of the host that no process uses; None where the system does not say."""
    return _pages("SC_AVPHYS_PAGES")


def processes_on_host() -> int:
    """Processes of a distributed run on this machine, as ``torchrun`` tells them; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _pages(name: str) -> int | None:
    if name not in getattr(os, "sysconf_names", ()):  # no such table on Windows, and no free pages in that of macOS
        return None
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
