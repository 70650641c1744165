"""The planner's estimates against the memory that real training steps on the CPU need, each in a separate process.

    python -m benchmarks.planning
    python -m benchmarks.planning --kind generators

Prints the table of docs/planning.md in Markdown. It runs on Linux, where a process can read its own memory use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import fire
import torch

from benchmarks.machine import described
from benchmarks.networks import MONAI, build_with, total_factors
from benchmarks.planning_step import saved_in_a_generator_step, saved_in_a_step
from benchmarks.tables import print_table
from scripts.bundle.config import ROOT
from scripts.bundle.machine import MIB
from scripts.bundle.precision import choose_precision
from scripts.layers.factors import by
from scripts.planning.generator_estimates import GeneratorPlan, estimate_generator, plan_generator
from scripts.planning.training_costs import TrainingCost, training_cost

# glibc keeps freed blocks of up to 32 MiB; returned at once, they show what is in use
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Row:
    """A network of :py:mod:`benchmarks.networks` with further arguments, and the settings of its training step."""

    name: str
    size: tuple[int, ...]
    amp: bool = True  # where it is this processor's default
    batch_size: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def amp_dtype_here(self) -> torch.dtype | None:
        return torch.bfloat16 if self.amp and choose_precision("cpu").amp else None

    def build(self) -> torch.nn.Module:
        return build_with(self.name, **self.arguments)

    @property
    def factors(self) -> tuple[int, ...]:
        return total_factors(self.build())

    def smallest(self) -> Row:
        return replace(self, size=tuple(2 * factor for factor in self.factors), batch_size=1)

    def estimate(self) -> TrainingCost:
        dtype = self.amp_dtype_here
        return training_cost(self.build(), self.size, batch_size=self.batch_size, amp_dtype=dtype, device="cpu")

    def step(self) -> int:
        """Bytes that a real step saves."""
        return saved_in_a_step(self.build(), self.size, self.batch_size, self.amp_dtype_here)


@dataclass(frozen=True)
class GeneratorRow:
    """A generator of ``train_diffusion.json`` on the latents of a preset, with config keys that it changes."""

    preset: str
    size: tuple[int, ...]  # of the volumes
    amp: bool = True  # where it is this processor's default
    batch_size: int = 1
    keys: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> GeneratorPlan:
        config, preset = (str(ROOT / "configs" / name) for name in ("train_diffusion.json", f"presets/{self.preset}.json"))
        keys = {"batch_size": self.batch_size, **self.keys, **({} if self.amp else {"amp": False})}
        return plan_generator(config, self.size, preset, device="cpu", **keys)

    def smallest(self) -> GeneratorRow:
        return replace(self, size=(64, 64, 64), batch_size=1)

    def estimate(self) -> TrainingCost:
        return estimate_generator(self.plan(), "cpu").training

    def step(self) -> int:
        """Bytes that a real step saves."""
        return saved_in_a_generator_step(self.plan())


ATTENTION = {"attention_levels": (False, False, True), "use_flash_attention": True}
SHORTCUT = {"linear_shortcut": True}
LEAN_PRESET = {"channels": (64, 128, 256), "norm_num_groups": 1, "latent_channels": 64, "linear_shortcut": True}
THICK = {"initial_downsample_factor": [2, 2, 1], "downsample_factors": [[2, 2, 1], [2, 2, 2]]}
ROWS = {
    "MONAI's network": Row(MONAI, (80, 80, 80)),
    "4x": Row("[2,2]", (80, 80, 80)),
    "4x, without AMP": Row("[2,2]", (64, 64, 64), amp=False),
    "4x, checkpointing": Row("[2,2]", (80, 80, 80), arguments={"use_checkpoint": True}),
    "8x": Row("initial 2, [2,2]", (160, 160, 160)),
    "8x, batch 3, without AMP": Row("initial 2, [2,2]", (96, 96, 96), amp=False, batch_size=3),
    "8x, linear shortcut, batch 3": Row("initial 2, [2,2]", (112, 112, 112), batch_size=3, arguments=SHORTCUT),
    "16x (conv)": Row("initial 2 (conv), [4,2]", (160, 160, 160)),
    "16x, attention at the last level": Row(
        "initial 2, [4,2]",
        (160, 160, 160),
        arguments=ATTENTION,
    ),
    "16x lean": Row("initial 4, [2,2]", (256, 256, 256)),
    "16x_lean, the preset": Row("initial 4, [2,2]", (256, 256, 256), arguments=LEAN_PRESET),
    "32x (conv)": Row("initial 4 (conv), [4,2]", (256, 256, 256)),
    "32x, without AMP": Row("initial 4, [4,2]", (256, 256, 256), amp=False),
    "64x": Row("initial 4, [4,2]", (320, 320, 320), arguments={"initial_downsample_factor": 8}),
    "thick slices": Row("initial 2, [2,2]", (192, 192, 64), arguments=THICK),
    "thick slices (conv), without AMP": Row(
        "initial 2 (conv), [4,2]", (160, 160, 48), amp=False, arguments={**THICK, "initial_mode": "conv"}
    ),
}


GENERATORS = {
    "generator, 16x": GeneratorRow("16x", (512, 512, 512)),
    "generator, 16x, channels 128, 256, 256": GeneratorRow("16x", (256, 256, 256), keys={"channels": [128, 256, 256]}),
    "generator, 8x, velocity, batch 2, without AMP": GeneratorRow(
        "8x", (192, 192, 160), amp=False, batch_size=2, keys={"prediction": "v"}
    ),
}


def main(kind: str = "all") -> None:
    """
    Print the table.

    Args:
        kind: ``"all"``, or ``"generators"`` for their rows alone.
    """
    print(f"{described('cpu', choose_precision('cpu').name + ' unless the row says otherwise')}:\n")
    header = ["", "size", "batch", "saved: estimated", "counted", "off by", "peak: estimated", "measured", "off by"]
    rows = {"all": ROWS | GENERATORS, "generators": GENERATORS}[kind]
    print_table(header, ([name, *compare(name, row)] for name, row in rows.items()))


def compare(name: str, row: Row | GeneratorRow) -> list[str]:
    """The cells of a row: estimate, measurement, and the relative error of the estimate."""
    estimate = row.estimate()
    saved, peak = measure(name)
    cells = [by(row.size), str(row.batch_size)]
    for guess, found in ((estimate.saved_activations, saved), (estimate.peak, peak)):
        cells += [f"{guess / MIB:.0f} MiB", f"{found / MIB:.0f} MiB", f"{guess / found - 1:+.1%}"]
    return cells


def measure(name: str) -> tuple[int, int]:
    """Bytes saved and growth of the peak, in a separate process."""
    command = [sys.executable, "-m", "benchmarks.planning_step", repr(name)]  # fire reads literals
    process = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    saved, peak = process.stdout.split()[-2:]
    return int(saved), int(peak)


if __name__ == "__main__":
    fire.Fire(main)
