"""The Python of the bundle. Configs say ``scripts.<module>.<name>``, so every module that they name is imported."""

from . import (
    autoencoderkl,
    checkpoints,
    config,
    data,
    inferer,
    metrics,
    picture,
    report,
    sample_data,
    sampling,
    trainer,
    transforms,
    weights,
)

__all__ = [
    "autoencoderkl",
    "checkpoints",
    "config",
    "data",
    "inferer",
    "metrics",
    "picture",
    "report",
    "sample_data",
    "sampling",
    "trainer",
    "transforms",
    "weights",
]
