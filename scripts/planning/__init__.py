"""The planner: what a configuration needs in memory before it runs, and which factors suit a volume and a GPU.

- ``plans`` reads a config into a plan: a new key that affects memory is read there.
- ``training_costs`` runs one step of the trainer on fake tensors, ``inference_costs`` one reconstruction, ``slab_costs`` a
  run in slabs; ``allocations`` and ``saved_tensors`` count what they allocate and keep, ``costs`` adds the margin.
- ``estimates`` is for autoencoders, ``generator_estimates`` for generators; ``recommendations`` ranks factors.
- ``self_test`` runs every preset, ``tables`` prints; the command line is ``scripts/__main__.py``.
"""

from scripts.planning.estimates import estimate_memory
from scripts.planning.recommendations import recommend_downsample_factors
from scripts.planning.training_costs import log_estimate

__all__ = [
    "estimate_memory",
    "log_estimate",
    "recommend_downsample_factors",
]
