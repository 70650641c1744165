"""Checks the order of a trainer's handlers."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_order"]

ORDER = (  # the earlier one, the later one, and why
    ("InitialWeights", "BeforeAndAfter", "the weights at the start are validated"),
    ("InitialWeights", "TrainingProgress", "the bar starts where a resumed run goes on"),
    ("InitialWeights", "TrainingSaver", "checkpoints are removed unless the run is resumed"),
    ("LrScheduleHandler", "TrainingSaver", "a checkpoint holds the learning rate of the next step"),
    ("WeightAverage", "TrainingSaver", "a checkpoint holds the average after its step"),
    ("WeightAverage", "ValidationHandler", "validation uses the average after the last step"),
    ("Throughput", "ValidationHandler", "the time of validation is not counted as training"),
    ("ValidationHandler", "BeforeAndAfter", "the last epoch is validated once, and only if it has not been yet"),
    ("ValidationHandler", "TrainingSaver", "a checkpoint holds the best metric of its epoch"),
    ("BeforeAndAfter", "TrainingSaver", "a checkpoint holds the metric before the first step"),
    ("TrainingSaver", "StopOnSignal", "the checkpoint is written before the log names it"),
)


def check_order(handlers: Sequence[object]) -> None:
    """
    Check the order of a list of handlers. A subclass counts as its base class.

    Raises:
        ValueError: for two in the wrong order, with their names and the reason.
    """
    names = [[kind.__name__ for kind in type(handler).__mro__] for handler in handlers]
    for earlier, later, reason in ORDER:
        first_later = next((i for i, found in enumerate(names) if later in found), len(names))
        if any(earlier in found for found in names[first_later:]):
            raise ValueError(f"{earlier} must come before {later} in the list of handlers: {reason}.")
