"""Inference from exported files: TorchScript (``.ts``), torch.export (``.pt2``) and ONNX (``.onnx``).

An exported file is a program. Run those that you made yourself or whose maker you trust.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

SUFFIXES = (".ts", ".pt2", ".onnx")


class ExportedNetwork(nn.Module):
    """
    A :py:class:`scripts.autoencoderkl.Reconstructor` from the file that it was exported to.

    Args:
        path: path of the file; its suffix gives the format.
        device: where to run it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for another suffix than ``.ts``, ``.pt2`` and ``.onnx``.
    """

    def __init__(self, path: str, device: str) -> None:
        super().__init__()
        self.device, suffix = torch.device(device), Path(path).suffix
        if suffix not in SUFFIXES:
            raise ValueError(f"{path} is no exported network; its name must end in {', '.join(SUFFIXES)}.")
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no exported network at {path}. Export one, or set `weights` to its path.")
        if suffix == ".ts":
            self.run: Any = torch.jit.load(path, map_location=self.device)
        elif suffix == ".pt2":
            module = move_to_device_pass(torch.export.load(path), self.device).module()
            self.run = lambda x: module(x)  # the module itself would be registered, and refuses `eval()`
        else:
            self.run = _onnx_session(path, self.device)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions of images ``BxCxHxWxD``, with the batch size and the number of channels that were exported."""
        return self.run(x.as_subclass(Tensor).to(self.device)).to(x.device)


def refuse_latents() -> None:
    """A ValueError, in place of encoding and decoding, which an exported file cannot do."""
    raise ValueError("an exported file makes no latents: leave out inference_exported.json.")


def _onnx_session(path: str, device: torch.device) -> Any:
    import onnxruntime  # an optional dependency

    providers = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    session = onnxruntime.InferenceSession(path, providers=[*providers, "CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])
