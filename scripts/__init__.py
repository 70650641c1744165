"""The Python of the bundle, imported as ``scripts``. Configs name what a package re-exports, such as
``scripts.training.TrainingSaver``; a package is imported when it is first named.

Imports between packages run one way: ``layers``, ``autoencoderkl``, ``bundle``, ``slabs``, ``data``, ``training``,
``diffusion``, ``planning``, ``inference``, ``evaluation``, ``sharing``, each of those before it alone.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":  # a package that is not installed
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
