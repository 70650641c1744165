"""Which volumes of an evaluation are kept for the report: those with the largest errors, and those that the user names."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from scripts.bundle.processes import merged

__all__ = ["WorstVolumes"]

Kept = TypeVar("Kept")


class WorstVolumes(Generic[Kept]):
    """
    Something that is made of volumes and takes memory, of few of them.

    Args:
        count: of how many, those with the largest errors.
        named: names of volumes that are kept in any case.
    """

    def __init__(self, count: int, named: Sequence[str]) -> None:
        self.count, self.named = count, named
        self._worst: list[tuple[float, str]] = []  # a heap, the smallest error on top
        self._kept: dict[str, tuple[float, Kept]] = {}

    def add(self, name: str, error: float, make: Callable[[], Kept]) -> None:
        """Keep what ``make`` returns, if the volume is named or among the worst so far."""
        if len(self._worst) < self.count:
            heapq.heappush(self._worst, (error, name))
        elif self._worst and error > self._worst[0][0]:
            _, better = heapq.heapreplace(self._worst, (error, name))
            if better not in self.named:
                self._kept.pop(better, None)
        elif name not in self.named:
            return
        self._kept[name] = (error, make())

    def of_all_processes(self) -> dict[str, Kept]:
        """What is kept, the worst volume first."""
        found: dict[str, tuple[float, Kept]] = merged(self._kept)
        names = sorted(found, key=lambda name: -found[name][0])
        return {name: found[name][1] for name in names if name in names[: self.count] or name in self.named}
