"""
Convolutions that stay in float32 where bfloat16 fails.

PyTorch 2.14.1 goes wrong in two cases of a bfloat16 convolution on the CPU:

- on processors with AMX the result is NaN when it has one voxel along the last axis;
- on processors with AVX-512, parts of the gradient of a 3D convolution's weights are whatever the memory held before when
  the map is smaller than the kernel along the first axis (seen for 2 voxels and a kernel of 3; 2, 3 or 4 and a kernel of 5).

Under the CPU's autocast in bfloat16, and only there, such a convolution runs in float32 here. In the first case so does one
whose input has one voxel (the backward pass computes the gradient of the input, which has the input's size). Such maps are
small. All other convolutions are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


def bfloat16_fails(
    x: torch.Tensor, kernel_size: Sequence[int] = (1,), stride: Sequence[int] = (1,), padding: Sequence[int] = (0,)
) -> bool:
    """
    Whether autocast would run a convolution of ``x`` in bfloat16 where that can go wrong.

    Args:
        x: ``BxCxHxWxD`` (or 1D, 2D).
        kernel_size: of the convolution along each axis.
        stride: ditto.
        padding: ditto, on each side.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False  # before the size is read, which would make it a constant in exported networks
    first, last = x.shape[2], x.shape[-1]
    if last == 1 or last + 2 * padding[-1] - kernel_size[-1] < stride[-1]:
        return True
    return x.dim() == 5 and torch.is_grad_enabled() and first < kernel_size[0]


def run_in_float32(convolution: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """``convolution(x, *arguments)`` without autocast, and its result in the type that autocast would give."""
    with torch.autocast("cpu", enabled=False):
        return convolution(x.float(), *arguments).bfloat16()


def keep_in_float32(module: nn.Module) -> None:
    """
    Let all convolutions in ``module`` stay in float32 where bfloat16 fails. They keep their parameters and names. Transposed
    ones have no groups and no dilation.

    Args:
        module: changed in place.
    """
    for layer in module.modules():
        layer.__class__ = REPLACEMENTS.get(type(layer), type(layer))


class _InFloat32WhereNeeded(nn.Module):
    """A convolution, transposed or not, that stays in float32 where bfloat16 fails."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what follows, in this form alone
            if self._fails(input):
                return run_in_float32(self.convolve, input)  # type: ignore[arg-type]
        return self.convolve(input)  # type: ignore[operator]

    @torch.jit.unused
    def _fails(self, x: torch.Tensor) -> bool:
        layer: Any = self
        if layer.transposed:  # the backward pass computes a map of its input's size
            return bfloat16_fails(x, (layer.kernel_size[0] - layer.stride[0] + 1, 1))
        return bfloat16_fails(x, layer.kernel_size, layer.stride, layer.padding)


# One for each type of layer: TorchScript reads no type from a variable.
class Conv1d(_InFloat32WhereNeeded, nn.Conv1d):
    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class Conv2d(_InFloat32WhereNeeded, nn.Conv2d):
    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class Conv3d(_InFloat32WhereNeeded, nn.Conv3d):
    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class ConvTranspose1d(_InFloat32WhereNeeded, nn.ConvTranspose1d):  # type: ignore[misc]
    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose1d(x, self.weight, self.bias, self.stride, self.padding, self.output_padding)  # type: ignore


class ConvTranspose2d(_InFloat32WhereNeeded, nn.ConvTranspose2d):  # type: ignore[misc]
    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding, self.output_padding)  # type: ignore


class ConvTranspose3d(_InFloat32WhereNeeded, nn.ConvTranspose3d):  # type: ignore[misc]
    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose3d(x, self.weight, self.bias, self.stride, self.padding, self.output_padding)  # type: ignore


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    layer.__bases__[1]: layer for layer in (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
