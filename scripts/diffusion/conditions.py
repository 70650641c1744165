"""Conditions of a volume as one vector: its size, its spacing, and what ``condition_keys`` name.

Numbers are standardised, words become classes, and each value may be missing.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from scripts.bundle.json_files import Must, PositiveInt

LEAST_DEVIATION = 1e-6  # of a number; below it the number is the same in all volumes and says nothing
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Volume:
    """
    What is known of a volume.

    Args:
        size: voxels along each axis.
        spacing: mm along each axis.
        conditions: values by name; what is missing is left out.
    """

    size: Sequence[int]
    spacing: Sequence[float]
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NumberCondition:
    """A condition that is a number, and what training saw of it."""

    mean: float
    deviation: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> NumberCondition:
        """That of the values of the training volumes."""
        return cls(float(np.mean(values)), float(np.std(values)), float(min(values)), float(max(values)))

    def __str__(self) -> str:
        return f"{self.lowest:g} to {self.highest:g}"

    def entries(self, key: str) -> list[tuple[Any, ...]]:
        """See :py:attr:`Conditions.entries`."""
        return [(key, self.mean, self.deviation), (key,)]

    def standardised(self, value: float) -> float:
        """The value in deviations from the mean; 0 where all training volumes have the same."""
        return (value - self.mean) / self.deviation if self.deviation > LEAST_DEVIATION else 0.0

    def vector(self, value: Any) -> list[float]:
        """The standardised value and 1; zeros for one that is missing."""
        return [self.standardised(value), 1.0] if _is_number(value) else [0.0, 0.0]

    def checked(self, key: str, value: Any) -> float:
        """See :py:meth:`Conditions.checked`."""
        if not _is_number(value):
            raise ValueError(f"`conditions` asks for {key} {value!r}; it must be a number.")
        outside = max(self.lowest - value, value - self.highest)
        words = f"`conditions` asks for {key} {value:g}; training saw {self}"
        if outside > self.deviation:
            raise ValueError(f"{words}, and at most {self.deviation:.3g} more or less can be asked for.")
        if outside > 0:
            logger.warning(f"{words}: expect less of what lies outside")
        return float(value)

    def standardised_as(self, before: Any) -> NumberCondition:
        """With mean and deviation of ``before`` where they say anything of these numbers."""
        if not isinstance(before, NumberCondition) or before.deviation <= LEAST_DEVIATION:
            return self
        far = max(before.lowest - self.mean, self.mean - before.highest) > before.deviation
        return self if far else replace(self, mean=before.mean, deviation=before.deviation)


@dataclass(frozen=True)
class ClassCondition:
    """A condition that is a word, and how many training volumes have each."""

    classes: Annotated[dict[str, PositiveInt], Must("the number of volumes of each class", len)]

    def __str__(self) -> str:
        return ", ".join(f"{name} in {count}" for name, count in self.classes.items())

    def entries(self, key: str) -> list[tuple[Any, ...]]:
        """See :py:attr:`Conditions.entries`."""
        return [(key, name) for name in self.classes]

    def vector(self, value: Any) -> list[float]:
        """A 1 at the class; zeros for one that is missing or that training did not see."""
        return [float(value is not None and str(value) == name) for name in self.classes]

    def checked(self, key: str, value: Any) -> str:
        """See :py:meth:`Conditions.checked`."""
        name = str(value).lower() if isinstance(value, bool) else str(value)
        if name not in self.classes:
            raise ValueError(f"`conditions` asks for {key} {value!r}; training saw {', '.join(self.classes)}.")
        return name


@dataclass(frozen=True)
class Conditions:
    """
    Conditions and the values that training saw of them.

    The vector of a volume is: 1; the logarithms of its size and of its spacing along each axis, standardised; for each key
    that is a number the standardised value and 1, for each that is a word a 1 at its class. A missing value is zeros, and so
    is the whole vector without conditions.

    Args:
        geometry: logarithm of the size along each axis, and then that of the spacing.
        keys: conditions by name.
    """

    geometry: list[NumberCondition]
    keys: dict[str, NumberCondition | ClassCondition]

    @classmethod
    def learn(cls, condition_keys: Sequence[str], volumes: Sequence[Volume]) -> Conditions:
        """
        Those of the training volumes.

        Args:
            condition_keys: names of the conditions to use.
            volumes: the training volumes.

        Raises:
            ValueError: for a key that no volume has, that is a number in some volumes and a word in others, or that has
                another word for every volume, as a name has.
        """
        along_axes = [axis for name in ("size", "spacing") for axis in zip(*(getattr(each, name) for each in volumes))]
        geometry = [NumberCondition.of([math.log(value) for value in along]) for along in along_axes]
        return cls(geometry, {key: _learned(key, volumes) for key in condition_keys})

    def __len__(self) -> int:
        """Length of the vector."""
        return len(self.entries)

    def summary(self) -> list[str]:
        """Each condition and what was seen of it, in words."""
        return [f"{key} ({seen})" for key, seen in self.keys.items()]

    @property
    def entries(self) -> list[tuple[Any, ...]]:
        """What each number of the vector says: a name, and its class or how it is standardised."""
        axes = len(self.geometry) // 2
        places = [f"{name} along axis {axis}" for name in ("size", "spacing") for axis in range(axes)]
        found: list[tuple[Any, ...]] = [("",)]  # which no condition is called
        found += [(place, seen.mean, seen.deviation) for place, seen in zip(places, self.geometry)]
        return found + [entry for key, seen in self.keys.items() for entry in seen.entries(key)]

    def standardised_as(self, before: Conditions) -> Conditions:
        """
        The same conditions, with the numbers standardised as earlier ones were where these say anything of the numbers:
        where they varied, and the mean is at most a standard deviation outside of what they were.
        """
        geometry = [now.standardised_as(then) for now, then in zip(self.geometry, before.geometry)]
        numbers = {key: now for key, now in self.keys.items() if isinstance(now, NumberCondition)}
        standardised = {key: now.standardised_as(before.keys.get(key)) for key, now in numbers.items()}
        return Conditions(geometry, {**self.keys, **standardised})

    def vector(self, volume: Volume) -> Tensor:
        """
        The vector of a volume. A condition that is missing, or a class that training did not see, counts as unknown; instead
        of a size or spacing beyond what training saw, the nearest that it saw is given.
        """
        found = [1.0]
        for seen, length in zip(self.geometry, [*volume.size, *volume.spacing]):
            found.append(seen.standardised(min(max(math.log(length), seen.lowest), seen.highest)))
        for key, condition in self.keys.items():
            found += condition.vector(volume.conditions.get(key))
        return torch.tensor(found)

    def null_vector(self) -> Tensor:
        """The vector without conditions, for the unconditional estimate of classifier-free guidance."""
        return torch.zeros(len(self))

    def with_dropout(self, volume: Volume, dropout: float, random: np.random.Generator) -> Tensor:
        """
        The vector of a training volume: with the probability ``dropout`` it is the null vector, and otherwise each condition
        is left out by itself with that probability.
        """
        chances = random.random(1 + len(self.keys))
        if chances[0] < dropout:
            return self.null_vector()
        kept = {key: volume.conditions.get(key) for key, chance in zip(self.keys, chances[1:]) if chance >= dropout}
        return self.vector(replace(volume, conditions=kept))

    def checked(self, requested: Mapping[str, Any]) -> dict[str, Any]:
        """
        What a user asks for, in the form that training saw.

        Raises:
            ValueError: for a condition or a class that training did not see, a word for a number, and a number that is
                further outside than a standard deviation. One that is less far outside is warned of.
        """
        for key in requested.keys() - self.keys.keys():
            names = ", ".join(self.keys) or "none"
            raise ValueError(f"`conditions` names {key!r}; this generator was trained with the conditions {names}.")
        return {key: self.keys[key].checked(key, value) for key, value in requested.items() if value is not None}


def _learned(key: str, volumes: Sequence[Volume]) -> NumberCondition | ClassCondition:
    """What the training volumes have of a key."""
    values = [volume.conditions[key] for volume in volumes if key in volume.conditions]
    numbers = [value for value in values if _is_number(value)]
    words = [str(value) for value in values if not _is_number(value)]
    if not values:
        known = ", ".join(sorted({name for volume in volumes for name in volume.conditions})) or "none"
        raise ValueError(f"`condition_keys` names {key!r}, which no training latent has; they have {known}.")
    if numbers and words:
        raise ValueError(f"{key!r} is a number in {len(numbers)} volumes and a word in {len(words)} ({words[0]!r}).")
    counts = Counter(words)
    if len(counts) == len(values) > 2:
        raise ValueError(f"`condition_keys` names {key!r}, which names volumes: it has another value for each.")
    return NumberCondition.of(numbers) if numbers else ClassCondition({name: counts[name] for name in sorted(counts)})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
