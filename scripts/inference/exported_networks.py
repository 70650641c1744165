"""Inference from exported files: TorchScript (``.ts``), torch.export (``.pt2``) and ONNX (``.onnx``).

An exported file is a program. Run those that you made yourself or whose maker you trust.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch.export.passes import move_to_device_pass

__all__ = ["SUFFIXES", "ExportedNetwork", "refuse_latents"]

Run = Callable[[torch.Tensor], torch.Tensor]


class ExportedNetwork(nn.Module):
    """
    A :py:class:`scripts.autoencoderkl.Reconstructor` from the file that it was exported to.

    Args:
        path: of the file; its suffix gives the format.
        device: where to run it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for another suffix than ``.ts``, ``.pt2`` and ``.onnx``.
    """

    def __init__(self, path: str, device: str) -> None:
        super().__init__()
        suffix = Path(path).suffix
        if suffix not in LOADERS:
            raise ValueError(f"{path} is no exported network; its name must end in {', '.join(LOADERS)}.")
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no exported network at {path}. Export one, or set `weights` to its path.")
        self.device = torch.device(device)
        self.run = LOADERS[suffix](path, self.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: image of shape ``BxCxHxWxD``, with the batch size and the number of channels that were exported.

        Returns:
            reconstruction of the same shape, on the device of ``x``.
        """
        plain = x.as_subclass(torch.Tensor).to(self.device)
        return self.run(plain).to(x.device)


def refuse_latents() -> None:
    """
    Raise an error in place of encoding and decoding, which an exported file cannot do.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "an exported file computes the whole reconstruction and no latents. Encode and decode with the weights: leave out "
        "inference_exported.json."
    )


def _load_torchscript(path: str, device: torch.device) -> Run:
    return torch.jit.load(path, map_location=device)


def _load_program(path: str, device: torch.device) -> Run:
    program = torch.export.load(path)
    module = move_to_device_pass(program, device).module()
    return lambda x: module(x)  # the module itself would be registered, and refuses `eval()`


def _load_onnx(path: str, device: torch.device) -> Run:
    import onnxruntime  # an optional dependency

    providers = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    session = onnxruntime.InferenceSession(path, providers=[*providers, "CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])


LOADERS: dict[str, Callable[[str, torch.device], Run]] = {
    ".ts": _load_torchscript,
    ".pt2": _load_program,
    ".onnx": _load_onnx,
}
SUFFIXES = tuple(LOADERS)
