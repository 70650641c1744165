"""Random requests to the planner: checks that every recommendation runs, keeps its budget, and trains.

    python -m benchmarks.planning_requests [--count 30] [--trained 3]

Each recommendation is written as an overlay, built, trained for a real step on a small volume, encoded and decoded, and
estimated again from the overlay. The first overlays also train with `fast_dev_run`, on the smallest patch.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import fire

from scripts.planning.config_keys import TRAIN
from scripts.planning.estimates import estimate_memory
from scripts.planning.recommendations import Recommendation, recommend_downsample_factors, write_overlay
from scripts.planning.self_test import Configuration, check_configuration

SIZES = (48, 64, 96, 100, 128, 180, 192, 256, 320, 384, 512)
SPACINGS = (None, 0.6, 0.8, 1.0, 2.0, 3.0, 5.0)
BUDGETS = (4, 8, 12, 16, 24)


def requests(count: int = 30, trained: int = 3) -> None:
    """
    Print how many recommendations were made, ran, and kept their budget.

    Args:
        count: number of requests.
        trained: number of overlays that train with `fast_dev_run`.
    """
    rng = random.Random(0)
    made, unanswered, checked = 0, 0, set()
    for number in range(count):
        edge, depth = rng.choice(SIZES), rng.choice(SIZES)
        through_plane = rng.choice(SPACINGS)
        spacing = None if through_plane is None else [0.8, 0.8, through_plane]
        memory_gb = rng.choice(BUDGETS)
        found = recommend_downsample_factors([edge, edge, depth], memory_gb=memory_gb, spacing=spacing, count=3)
        print(f"{edge}x{edge}x{depth}, spacing {spacing}, {memory_gb} GiB: {len(found)} recommendations", flush=True)
        unanswered += not found
        for recommendation in found:
            made += 1
            verify(recommendation, memory_gb, checked)
        if found and number < trained:
            train(found[0])
    print(
        f"{count} requests, {unanswered} without a fitting candidate, {made} recommendations: all run and keep their budget"
    )


def verify(recommendation: Recommendation, memory_gb: float, checked: set[str]) -> None:
    """Run a recommendation's network once, and estimate its overlay at full size."""
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "overlay.json"
        write_overlay(recommendation, overlay)
        assert estimate_memory(config_file=[TRAIN, str(overlay)]).fits(memory_gb), overlay.read_text()
        network = str({**recommendation.overlay, "patch_size": None})
        if network not in checked:
            result = check_configuration(Configuration((TRAIN, str(overlay))))
            assert result.error is None, f"{overlay.read_text()}\n{result.error}"
            checked.add(network)


def train(recommendation: Recommendation) -> None:
    """``fast_dev_run`` with the overlay, on the sample volumes and the smallest patch that its factors divide."""
    patch = [2 * factor for factor in recommendation.estimate.downsample_factor]
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "overlay.json"
        write_overlay(recommendation, overlay)
        command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str([TRAIN, str(overlay)])]
        options = {
            "output_dir": folder,
            "patch_size": str(patch),
            "fast_dev_run": "true",
            "device": "cpu",
            "num_workers": "0",
        }
        for key, value in options.items():
            command += [f"--{key}", value]
        subprocess.run(command, check=True, capture_output=True)
    print(f"  trained with {recommendation.overlay}", flush=True)


if __name__ == "__main__":
    fire.Fire(requests)
