"""The planner: what a configuration needs in memory before it runs, and which factors suit a volume and a GPU.

``plans`` reads a config, ``step_costs`` counts what a step needs on fake tensors, ``estimates`` adds the margin,
``factor_candidates`` lists the factors that could suit a volume, ``recommendations`` estimates and ranks them, and
``self_test`` runs every preset.
"""

from scripts.planning.estimates import estimate_memory
from scripts.planning.recommendations import recommend_downsample_factors
from scripts.planning.training_start import log_estimate

__all__ = [
    "estimate_memory",
    "log_estimate",
    "recommend_downsample_factors",
]
