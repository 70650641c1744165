"""What a generator is told of the volume that it makes: one vector of size, spacing and what ``condition_keys`` name.

Numbers are standardised, words become classes, and each value may be missing.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["Conditions"]

SUMMARY_WIDTH = 80  # characters for the classes of a condition
LEAST_DEVIATION = 1e-6  # of a number; below it the number is the same in all volumes and says nothing
logger = logging.getLogger(__name__)


class Conditions:
    """
    Conditions and the values that training saw of them.

    The vector of a volume is: 1; the logarithms of its size and of its spacing along each axis, standardised; for each key
    that is a number the standardised value and 1, for each that is a word a 1 at its class. A missing value is zeros, and so
    is the whole vector of a volume of which nothing is said.

    Args:
        description: plain JSON, as :py:meth:`learn` makes it: ``geometry`` (numbers) and ``keys`` (numbers or classes by
            name).
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.description = dict(description)

    @classmethod
    def learn(
        cls,
        condition_keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        sizes: Sequence[Sequence[int]],
        spacings: Sequence[Sequence[float]],
    ) -> Conditions:
        """
        What the training volumes have.

        Args:
            condition_keys: names of the conditions to use.
            values: the conditions of each volume by name; what is missing is left out.
            sizes: spatial size of each volume, voxels.
            spacings: spacing of each volume, mm.

        Raises:
            ValueError: for a key that no volume has, that is a number in some volumes and a word in others, or that has
                another word for every volume, as a name has.
        """
        known = sorted({key for each in values for key in each})
        keys = {}
        for key in condition_keys:
            present = [each[key] for each in values if key in each]
            if not present:
                raise ValueError(
                    f"`condition_keys` names {key!r}, which no training volume has; they have {', '.join(known) or 'none'}. "
                    "Conditions are columns of participants.tsv or keys in dataset.json, noted by `encoding`: after a "
                    "change there run it again, which takes no time for latents that are there."
                )
            numbers = [value for value in present if _is_number(value)]
            if 0 < len(numbers) < len(present):
                word = next(value for value in present if not _is_number(value))
                raise ValueError(
                    f"`condition_keys` names {key!r}, which is a number in {len(numbers)} volumes and a word in "
                    f"{len(present) - len(numbers)} ({word!r}). Make it a number or n/a in all of them, or a word in all of "
                    "them, in participants.tsv or dataset.json, and run `encoding` again."
                )
            keys[key] = _number(present) if numbers else _classes(key, present)
        along_axes = [axis for rows in (sizes, spacings) for axis in zip(*rows)]
        geometry = [_number([math.log(value) for value in along]) for along in along_axes]
        return cls({"geometry": geometry, "keys": keys})

    def __len__(self) -> int:
        """Length of the vector."""
        keys = self.description["keys"].values()
        return 1 + len(self.description["geometry"]) + sum(len(key["classes"]) if "classes" in key else 2 for key in keys)

    @property
    def keys(self) -> list[str]:
        """Names of the conditions."""
        return list(self.description["keys"])

    def summary(self) -> list[str]:
        """Each condition and what was seen of it, in words."""
        return [f"{key} ({_seen(values)})" for key, values in self.description["keys"].items()]

    @property
    def entries(self) -> list[tuple[Any, ...]]:
        """What each number of the vector says: a name, and its class or how it is standardised."""
        geometry, keys = self.description["geometry"], self.description["keys"]
        found: list[tuple[Any, ...]] = [("",)]  # which no condition is called
        for i, number in enumerate(geometry):
            axis = i % (len(geometry) // 2)
            found.append((f"{'spacing' if i >= len(geometry) // 2 else 'size'} along axis {axis}", *_standard(number)))
        for key, seen in keys.items():
            if "classes" in seen:
                found += [(key, name) for name in seen["classes"]]
            else:
                found += [(key, *_standard(seen)), (key,)]
        return found

    def standardised_as(self, before: Conditions) -> Conditions:
        """
        The same conditions, with the numbers standardised as earlier ones were where these say anything of the numbers:
        where they varied, and the mean is at most a standard deviation outside of what they were.
        """
        geometry = list(map(_as_before, self.description["geometry"], before.description["geometry"]))
        earlier = before.description["keys"]
        keys = {key: _as_before(seen, earlier.get(key, {})) for key, seen in self.description["keys"].items()}
        return Conditions({"geometry": geometry, "keys": keys})

    def vector(self, values: Mapping[str, Any], size: Sequence[int], spacing: Sequence[float]) -> torch.Tensor:
        """
        The vector of a volume.

        Args:
            values: conditions by name. What is missing, or is a class that training did not see, counts as unknown.
            size: spatial size, voxels. Instead of one beyond what training saw, the network is told the nearest that it saw.
            spacing: mm, ditto.
        """
        found = [1.0]
        for number, length in zip(self.description["geometry"], [*size, *spacing]):
            found.append(_standardised(number, min(max(math.log(length), number["lowest"]), number["highest"])))
        for key, seen in self.description["keys"].items():
            value = values.get(key)
            if "classes" in seen:
                found += [float(str(value) == name) for name in seen["classes"]]
            else:
                found += [_standardised(seen, value), 1.0] if _is_number(value) else [0.0, 0.0]
        return torch.tensor(found)

    def nothing(self) -> torch.Tensor:
        """The vector of a volume of which nothing is said."""
        return torch.zeros(len(self))

    def drawn(
        self,
        values: Mapping[str, Any],
        size: Sequence[int],
        spacing: Sequence[float],
        dropout: float,
        random: np.random.Generator,
    ) -> torch.Tensor:
        """
        The vector of a training volume: with the probability ``dropout`` nothing is said of it, and otherwise each condition
        is left out by itself with that probability. So the generator learns what to do when it is told little, and
        guidance has something to compare with.
        """
        chances = random.random(1 + len(self.keys))
        if chances[0] < dropout:
            return self.nothing()
        told = {key: values[key] for key, chance in zip(self.keys, chances[1:]) if key in values and chance >= dropout}
        return self.vector(told, size, spacing)

    def checked(self, requested: Mapping[str, Any]) -> dict[str, Any]:
        """
        What a user asks for, in the form that training saw.

        Raises:
            ValueError: for a condition or a class that training did not see, for a number that is none, and for one that is
                further outside than a standard deviation. One that is less far outside is warned of.
        """
        found = {}
        for key, value in requested.items():
            if key not in self.description["keys"]:
                names = ", ".join(self.keys) or "none (`condition_keys` was empty)"
                raise ValueError(f"`conditions` names {key!r}; this generator was trained with the conditions {names}.")
            if value is None:
                continue
            seen = self.description["keys"][key]
            found[key] = _checked_class(key, value, seen) if "classes" in seen else _checked_number(key, value, seen)
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values)),
        "lowest": float(min(values)),
        "highest": float(max(values)),
    }


def _classes(key: str, values: Sequence[Any]) -> dict[str, Any]:
    counts = Counter(str(value) for value in values)
    if len(values) > 2 and len(counts) == len(values):
        raise ValueError(
            f"`condition_keys` names {key!r}, which has another value for each of the {len(values)} volumes that have one: "
            "that names volumes instead of describing them. Leave it out."
        )
    return {"classes": {name: counts[name] for name in sorted(counts)}}


def _seen(values: Mapping[str, Any]) -> str:
    if "classes" not in values:
        return f"{values['lowest']:g} to {values['highest']:g}"
    counts = ", ".join(f"{name} in {count}" for name, count in values["classes"].items())
    return textwrap.shorten(counts, SUMMARY_WIDTH, placeholder=" ...")


def _standard(number: Mapping[str, float]) -> tuple[float, float]:
    return number["mean"], number["deviation"]


def _as_before(seen: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    if "mean" not in seen or not before.get("deviation", 0) > LEAST_DEVIATION:
        return dict(seen)
    if max(before["lowest"] - seen["mean"], seen["mean"] - before["highest"]) > before["deviation"]:
        return dict(seen)
    return {**seen, "mean": before["mean"], "deviation": before["deviation"]}


def _standardised(seen: Mapping[str, float], value: Any) -> float:
    return (value - seen["mean"]) / seen["deviation"] if seen["deviation"] > LEAST_DEVIATION else 0.0


def _checked_class(key: str, value: Any, seen: Mapping[str, Any]) -> str:
    name = str(value).lower() if isinstance(value, bool) else str(value)
    if name not in seen["classes"]:
        raise ValueError(
            f"`conditions` asks for {key} {value!r}; it must be one that training saw: {', '.join(seen['classes'])}."
        )
    return name


def _checked_number(key: str, value: Any, seen: Mapping[str, float]) -> float:
    if not _is_number(value):
        raise ValueError(f"`conditions` asks for {key} {value!r}; it must be a number.")
    outside = max(seen["lowest"] - value, value - seen["highest"])
    words = f"`conditions` asks for {key} {value:g}; training saw {seen['lowest']:g} to {seen['highest']:g}"
    if outside > seen["deviation"]:
        low, high = seen["lowest"] - seen["deviation"], seen["highest"] + seen["deviation"]
        raise ValueError(f"{words}; it must be from {low:.4g} to {high:.4g}, beyond which a generator knows nothing.")
    if outside > 0:
        logger.warning(f"{words}: expect less of what lies outside")
    return float(value)
