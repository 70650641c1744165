"""The planner: what a configuration needs in memory before it runs, and which factors suit a volume and a GPU.

Its parts: :py:mod:`scripts.plans` reads a config, :py:mod:`scripts.memory` counts what a step needs on fake tensors,
:py:mod:`scripts.estimates` adds the margin, :py:mod:`scripts.candidates` lists the factors that could suit a volume, and
:py:mod:`scripts.recommendations` estimates and ranks them.
"""

from __future__ import annotations

from scripts.estimates import estimate_memory
from scripts.recommendations import recommend_downsample_factors

__all__ = ["estimate_memory", "recommend_downsample_factors"]
