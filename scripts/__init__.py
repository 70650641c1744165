"""The Python of the bundle. Configs say ``scripts.<module>.<name>``, so every module that they name is imported."""

from . import (
    adversary,
    autoencoderkl,
    checkpoints,
    config,
    data,
    inferer,
    losses,
    metrics,
    picture,
    report,
    sample_data,
    sampling,
    signals,
    trainer,
    transforms,
    weights,
)

__all__ = [
    "adversary",
    "autoencoderkl",
    "checkpoints",
    "config",
    "data",
    "inferer",
    "losses",
    "metrics",
    "picture",
    "report",
    "sample_data",
    "sampling",
    "signals",
    "trainer",
    "transforms",
    "weights",
]
