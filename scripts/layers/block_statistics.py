"""Statistics of blocks of images that a linear shortcut is fitted with: principal components and ridge regression."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

__all__ = ["LeastSquares", "alignments", "principal_components", "ridge_regression"]

# Candidate ridge strengths, as a number of observations of features with unit variance
RIDGES = (1e5, 3e4, 1e4, 3e3, 1e3, 300.0, 100.0)
LEFT_OUT = 4  # one image in so many is held out, to choose the strength


def principal_components(blocks: torch.Tensor, waves: torch.Tensor, count: int) -> torch.Tensor:
    """
    Directions along which blocks vary most around zero. Large blocks have more values than there are blocks to learn from,
    so their covariance is mixed with that of independent waves, each with the amplitude that it has in the blocks. The waves
    count as much as one block for each value of a block.

    Args:
        blocks: number x values of a block.
        waves: number x values of a block, orthonormal.
        count: how many components.

    Returns:
        values of a block x count, orthonormal.
    """
    strength = (blocks @ waves.t()).square().mean(0).sqrt()
    rows = torch.cat([blocks, math.sqrt(blocks.shape[1]) * strength[:, None] * waves])
    return torch.svd_lowrank(rows, q=min(count + 16, *rows.shape), niter=4)[2][:, :count]


def ridge_regression(
    start: torch.Tensor, images: Iterable[Iterable[tuple[torch.Tensor, torch.Tensor]]]
) -> tuple[torch.Tensor, int]:
    """
    Least squares with a ridge penalty on the distance of the weights from ``start``. Its strength is the one with the
    smallest error on held-out images.

    Args:
        start: features x targets.
        images: for each, its observations in pieces: features x number, and targets x number.

    Returns:
        the weights, features x targets, and the number of observations.
    """
    fitted, left_out = LeastSquares(start), LeastSquares(start)
    for i, observations in enumerate(images):
        equations = left_out if i % LEFT_OUT == LEFT_OUT - 1 else fitted
        for features, targets in observations:
            equations.add(features, targets)
    ridge = min(RIDGES, key=lambda ridge: left_out.error(fitted.solution(ridge)))
    left_out.add_all(fitted)
    return left_out.solution(ridge), left_out.number


class LeastSquares:
    """
    Ridge regression from data that comes in pieces.

    Args:
        start: the weights from which the penalty measures the distance, features x targets.
    """

    def __init__(self, start: torch.Tensor) -> None:
        self.start = start
        self.gram = start.new_zeros(len(start), len(start))
        self.product = torch.zeros_like(start)
        self.number = 0

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Add observations, features x number and targets x number."""
        self.gram += features @ features.t()
        self.product += features @ (targets - self.start.t() @ features).t()
        self.number += features.shape[1]

    def add_all(self, other: LeastSquares) -> None:
        """Add the observations of another one with the same start."""
        self.gram += other.gram
        self.product += other.product
        self.number += other.number

    def solution(self, ridge: float) -> torch.Tensor:
        """The weights. The penalty counts as ``ridge`` observations, of features with unit variance, that fit the start."""
        regularised = self.gram + ridge * torch.eye(len(self.gram), device=self.gram.device)
        return self.start + torch.linalg.solve(regularised, self.product)

    def error(self, weights: torch.Tensor) -> float:
        """Sum of squared errors of the weights, minus that of the start."""
        change = weights - self.start
        return (change * (self.gram @ change - 2 * self.product)).sum().item()


def alignments(x: torch.Tensor, factors: Sequence[int]) -> Iterator[torch.Tensor]:
    """``x``, and ``x`` from half a block on along axes with three blocks or more, to have further blocks of the image."""
    starts = [(0, f // 2) if f > 1 and n >= 3 * f else (0,) for n, f in zip(x.shape[2:], factors)]
    for start in itertools.product(*starts):
        shifted = x
        for axis, (first, f) in enumerate(zip(start, factors), 2):
            shifted = shifted.narrow(axis, first, x.shape[axis] - (f if first else 0))
        yield shifted
