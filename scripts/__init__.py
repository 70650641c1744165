"""The Python of the bundle, imported as ``scripts``. Configs name what a package re-exports, such as
``scripts.training.TrainingSaver``.

Imports between packages run one way: ``layers``, ``autoencoderkl``, ``bundle``, ``slabs``, ``data``, ``training``,
``diffusion``, ``planning``, ``inference``, ``evaluation``, each of those before it alone.
"""

from . import autoencoderkl, bundle, data, diffusion, evaluation, inference, layers, planning, slabs, training

__all__ = [
    "autoencoderkl",
    "bundle",
    "data",
    "diffusion",
    "evaluation",
    "inference",
    "layers",
    "planning",
    "slabs",
    "training",
]
