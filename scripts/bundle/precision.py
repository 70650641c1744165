"""Which precision a run computes in: one that is fast on its device, unless the user chooses another."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ignite.distributed as idist
import torch

PREFERENCE = ("float32", "float16", "bfloat16")  # where processes differ, all use the first that one of them chose
BFLOAT16_CAPABILITY = (8, 0)  # of GPUs with units for it
logger = logging.getLogger(__name__)


def autocast_dtype(name: str) -> torch.dtype:
    """The data type that ``amp_dtype`` names, ``"bfloat16"`` or ``"float16"``; a ValueError for another name."""
    if name not in ("bfloat16", "float16"):
        raise ValueError(f"`amp_dtype` is {name!r}; it must be 'bfloat16' or 'float16'.")
    return getattr(torch, name)


def computing_dtype(amp: bool, amp_dtype: str) -> str:
    """The data type that a run computes in: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    return amp_dtype if amp else "float32"


@dataclass(frozen=True)
class Precision:
    """
    The precision of a run on a device, such as ``"cuda:0"``, and why it was chosen. Where ``amp`` is off, ``amp_dtype`` is
    the one to use if it is switched on.
    """

    device: str
    amp: bool
    amp_dtype: str
    reason: str

    @property
    def name(self) -> str:
        """The data type that is computed in."""
        return computing_dtype(self.amp, self.amp_dtype)

    def log(self, amp: bool, amp_dtype: str) -> None:
        """Log in one line which precision a run with these settings has and why; warn when it is slow on the device."""
        used = computing_dtype(amp, amp_dtype)
        configured = "" if used == self.name else f", as configured; the default here is {self.name}"
        logger.info(f"precision: {used} on {self.device}{configured}: {self.reason}")
        if cost := _cost(self.device, used):
            logger.warning(f"{used} is slow on {self.device}: {cost}")


def choose_precision(device: str | torch.device) -> Precision:
    """
    The default precision of a device.

    - A GPU: bfloat16 from compute capability 8.0 on, which has units for it, otherwise float16 (with a gradient scaler).
    - A CPU: bfloat16 where oneDNN has convolutions in it, which on x86 is from AVX-512 on; otherwise float32.
    - Any other device: float32.

    The processes of a distributed run agree: where their devices differ, all use a precision that is fast on each of them.
    """
    device = torch.device(device)
    name, reason = "float32", f"mixed precision is used on CUDA and CPU only, not on {device.type}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = "bfloat16" if capability >= BFLOAT16_CAPABILITY else "float16"
        reason = f"the GPU has compute capability {capability[0]}.{capability[1]}"
    elif device.type == "cpu":
        name = "bfloat16" if has_convolutions("bfloat16") else "float32"
        fast = "fast" if name == "bfloat16" else "no fast"
        reason = f"the processor has {fast} bfloat16 convolutions ({torch.backends.cpu.get_cpu_capability()})"
    chosen = idist.all_gather(PREFERENCE.index(name))
    common = PREFERENCE[int(min(chosen))]  # type: ignore[type-var,arg-type]
    if common != name:
        reason = f"it is fast in every process of the run; this process by itself would use {name}"
    return Precision(str(device), common != "float32", "float16" if common == "float16" else "bfloat16", reason)


def has_convolutions(name: str) -> bool:
    """
    Whether oneDNN has convolutions in a lower precision on this processor, by what PyTorch asks before it calls oneDNN. It
    follows ``ONEDNN_MAX_CPU_ISA``, which the processor's flags do not. Where it is no, PyTorch runs a slow reference loop.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    return bool(getattr(torch.ops.mkldnn, supported[name])())


def _cost(device: str, name: str) -> str:
    """Why a precision is slow on a device; empty where it is not."""
    kind = torch.device(device).type
    if kind == "cuda" and name == "bfloat16" and torch.cuda.get_device_capability(device) < BFLOAT16_CAPABILITY:
        return "the GPU has no units for it; `--amp_dtype float16` is faster."
    if kind == "cpu" and name != "float32" and not has_convolutions(name):
        return "the processor has no fast convolutions in it, and a step takes several hundred times as long as in float32."
    if kind == "cpu" and name == "float16":
        return "a step takes 20 times as long as in bfloat16 (measured with AMX)."
    return ""
