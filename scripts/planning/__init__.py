"""The planner: what a configuration needs in memory before it runs, and which factors suit a volume and a GPU.

- ``estimates`` has the results, and the margin that is added to what was counted.
- ``fake_tensors`` runs networks without memory, and counts what operations allocate, keep and compute.
- ``training_costs`` makes one step of the trainer, ``inference_costs`` one reconstruction, in one pass or in slabs.
- ``autoencoder_estimates`` reads the config of an autoencoder: a new key that affects memory is read there.
- ``generator_estimates`` is for generators, ``recommendations`` ranks factors.
- ``self_test`` runs every preset, ``tables`` prints; the command line is ``scripts/__main__.py``.
"""

from scripts.planning.autoencoder_estimates import estimate_memory
from scripts.planning.recommendations import recommend_downsample_factors
from scripts.planning.training_costs import log_estimate
