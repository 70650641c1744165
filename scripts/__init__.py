"""The Python of the bundle, imported as ``scripts``. Configs name what a package re-exports, such as
``scripts.training.TrainingSaver``.

Imports between packages run one way: ``layers``, ``autoencoderkl``, ``bundle``, ``data``, ``training``, ``evaluation``,
``planning``, ``inference``, ``generation``, each of those before it alone.
"""

from . import autoencoderkl, bundle, data, evaluation, generation, inference, layers, planning, training

__all__ = ["autoencoderkl", "bundle", "data", "evaluation", "generation", "inference", "layers", "planning", "training"]
