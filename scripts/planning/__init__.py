"""The planner: what a configuration needs in memory before it runs, and which factors suit a volume and a GPU.

- ``config_keys`` reads a config into a plan: a new key that affects memory is read there.
- ``training_costs`` runs one step of the trainer on fake tensors, ``inference_costs`` one reconstruction; ``allocations``,
  ``saved_tensors``, ``operation_workspace`` and ``cuda_casting`` count what they allocate and keep.
- ``estimates`` adds the margin, ``savings`` lists changes that would save memory, ``training_start`` logs an estimate.
- ``factor_candidates`` lists the factors that could suit a volume, ``recommendations`` estimates and ranks them.
- ``self_test`` runs every preset, ``tables`` prints; the command line is ``scripts/__main__.py``.
"""

from scripts.planning.estimates import estimate_memory
from scripts.planning.recommendations import recommend_downsample_factors
from scripts.planning.training_start import log_estimate

__all__ = [
    "estimate_memory",
    "log_estimate",
    "recommend_downsample_factors",
]
