"""Muon, an optimizer whose steps have equal singular values, for convolutions and on every processor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration: they bring singular values to between 0.7 and 1.2 in few steps
ITERATIONS = 5


class Muon(Optimizer):
    """
    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) for weights of layers, each as a matrix of output
    channels x everything else, and AdamW for biases, norms and weights with one channel. Steps of both have the size of
    AdamW's (Liu et al., https://arxiv.org/abs/2502.16982), so one learning rate serves both.

    :py:class:`torch.optim.Muon` takes nothing but matrices. It and ``timm.optim.Muon``, which takes convolutions, compute in
    bfloat16; with AVX2 alone a step of the default network takes the latter 1.2 s of one core, and this one, in float32,
    0.04 s.

    Args:
        params: parameters of the network.
        lr: learning rate.
        momentum: share of earlier gradients, with Nesterov's look ahead.
        betas: AdamW's decay rates of the mean gradient and of its mean square.
        eps: AdamW's term that keeps the denominator from zero.
        weight_decay: share of a parameter, times the learning rate, by which it shrinks at each step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 5e-4,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Change the parameters by their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    is_matrix = parameter.ndim > 1 and min(parameter.shape[:2]) > 1
                    change = self._by_muon if is_matrix else self._by_adam
                    change(parameter, parameter.grad, self.state[parameter], group)

    @staticmethod
    def _by_muon(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        matrix = grad.lerp(average, group["momentum"]).flatten(1)
        # the root mean square of an orthogonal matrix is 1 / sqrt(its longer side), and that of AdamW's steps about 0.2
        size = 0.2 * math.sqrt(max(matrix.shape))
        parameter.add_(orthogonalised(matrix).view_as(parameter), alpha=-group["lr"] * size)

    @staticmethod
    def _by_adam(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = (1 - beta ** state["step"] for beta in group["betas"])
        mean = state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
        square = state["exp_avg_sq"].lerp_(grad * grad, 1 - group["betas"][1])
        parameter.addcdiv_(mean, square.div(second).sqrt_().add_(group["eps"]), value=-group["lr"] / first)


def orthogonalised(matrix: Tensor) -> Tensor:
    """
    A matrix with the same singular vectors, and singular values of about 1, by Newton and Schulz's iteration, in float32.
    Each of its steps multiplies the matrix by a polynomial of its products of rows. These are multiplied with each other
    first, and the matrix, much longer than high where it belongs to a convolution, only once with the result.
    """
    tall = len(matrix) > matrix.shape[1]
    x = (matrix.t() if tall else matrix).float()
    x = x / x.norm().clamp(min=1e-7)
    products = x @ x.t()
    identity = torch.eye(len(x), device=x.device)
    whole = identity
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(ITERATIONS):
        polynomial = torch.addmm(cubic * products, products, products, alpha=quintic).add_(identity, alpha=linear)
        whole = polynomial @ whole
        products = polynomial @ products @ polynomial
    x = whole @ x
    return x.t() if tall else x
