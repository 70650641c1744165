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
PLAIN = (0.0, 1.0)  # mean and deviation of an entry that is not standardised
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Volume:
    """What is known of a volume: voxels and mm along each axis, and conditions by name, without those that are missing."""

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
        return cls(float(np.mean(values)), float(np.std(values)), float(min(values)), float(max(values)))

    def __str__(self) -> str:
        return f"{self.lowest:g} to {self.highest:g}"

    def checked(self, key: str, value: Any) -> float:
        if not _is_number(value):
            raise ValueError(f"`conditions` asks for {key} {value!r}; it must be a number.")
        outside = max(self.lowest - value, value - self.highest)
        words = f"`conditions` asks for {key} {value:g}; training saw {self}"
        if outside > self.deviation:
            raise ValueError(f"{words}, and at most {self.deviation:.3g} more or less can be asked for.")
        if outside > 0:
            logger.warning(f"{words}: expect less of what lies outside")
        return float(value)


@dataclass(frozen=True)
class ClassCondition:
    """A condition that is a word, and how many training volumes have each."""

    classes: Annotated[dict[str, PositiveInt], Must("the number of volumes of each class", len)]

    def __str__(self) -> str:
        return ", ".join(f"{name} in {count}" for name, count in self.classes.items())

    def checked(self, key: str, value: Any) -> str:
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
        The conditions that keys name, as training volumes have them.

        Raises:
            ValueError: for a key that no volume has, that is a number in some and a word in others, or another word in each.
        """
        along_axes = zip(*([*volume.size, *volume.spacing] for volume in volumes))
        geometry = [NumberCondition.of([math.log(value) for value in along]) for along in along_axes]
        return cls(geometry, {key: _learned(key, volumes) for key in condition_keys})

    def __len__(self) -> int:
        return len(self.entries)

    def summary(self) -> list[str]:
        """Each condition and what was seen of it, in words."""
        return [f"{key} ({seen})" for key, seen in self.keys.items()]

    @property
    def entries(self) -> dict[tuple[Any, ...], tuple[float, float]]:
        """
        Mean and deviation that standardise each number of the vector, by what it says: ``()`` that there are conditions,
        ``(i,)`` a size or spacing, ``(key,)`` a number, ``(key, None)`` that the number is known, ``(key, name)`` a class.
        """
        found: dict[tuple[Any, ...], tuple[float, float]] = {(): PLAIN}
        found |= {(i,): (seen.mean, seen.deviation) for i, seen in enumerate(self.geometry)}
        for key, seen in self.keys.items():
            if isinstance(seen, NumberCondition):
                found |= {(key,): (seen.mean, seen.deviation), (key, None): PLAIN}
            else:
                found |= {(key, name): PLAIN for name in seen.classes}
        return found

    def standardised_as(self, before: Conditions) -> Conditions:
        """The same, with numbers standardised as before where these varied and the mean is within a deviation of them."""
        geometry = list(map(_standardised_as, self.geometry, before.geometry))
        return Conditions(geometry, {key: _standardised_as(now, before.keys.get(key)) for key, now in self.keys.items()})

    def vector(self, volume: Volume) -> Tensor:
        """
        The vector of a volume. A class that training did not see counts as missing, and of sizes and spacings beyond those
        of training the nearest one is given.
        """
        values: dict[tuple[Any, ...], float] = {(): 1.0}
        for i, (seen, length) in enumerate(zip(self.geometry, [*volume.size, *volume.spacing])):
            values[(i,)] = min(max(math.log(length), seen.lowest), seen.highest)
        for key, value in volume.conditions.items():
            values |= {(key,): value, (key, None): 1.0} if _is_number(value) else {(key, str(value)): 1.0}
        return torch.tensor([_standardised(values.get(entry), *scale) for entry, scale in self.entries.items()])

    def with_dropout(self, volume: Volume, dropout: float, random: np.random.Generator) -> Tensor:
        """The vector of a training volume: with a probability zeros, and else each condition is left out with it."""
        chances = random.random(1 + len(self.keys))
        if chances[0] < dropout:
            return torch.zeros(len(self))
        left_out = {key for key, chance in zip(self.keys, chances[1:]) if chance < dropout}
        kept = {key: value for key, value in volume.conditions.items() if key not in left_out}
        return self.vector(replace(volume, conditions=kept))

    def checked(self, requested: Mapping[str, Any]) -> dict[str, Any]:
        """
        What a user asks for, in the form that training saw.

        Raises:
            ValueError: for a condition or a class that training did not see, a word for a number, and a number more than a
                standard deviation outside of what it saw. One that is less far outside is warned of.
        """
        for key in requested.keys() - self.keys.keys():
            names = ", ".join(self.keys) or "none"
            raise ValueError(f"`conditions` names {key!r}; this generator was trained with the conditions {names}.")
        return {key: self.keys[key].checked(key, value) for key, value in requested.items() if value is not None}


def _learned(key: str, volumes: Sequence[Volume]) -> NumberCondition | ClassCondition:
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


def _standardised_as(now: Any, before: Any) -> Any:
    if not (isinstance(now, NumberCondition) and isinstance(before, NumberCondition)) or before.deviation <= LEAST_DEVIATION:
        return now
    far = max(before.lowest - now.mean, now.mean - before.highest) > before.deviation
    return now if far else replace(now, mean=before.mean, deviation=before.deviation)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _standardised(value: float | None, mean: float, deviation: float) -> float:
    """The value in deviations from the mean; 0 for one that is missing or that all training volumes have."""
    return 0.0 if value is None or deviation <= LEAST_DEVIATION else (value - mean) / deviation
