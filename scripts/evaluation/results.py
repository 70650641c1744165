"""What the savers of results share: the description of a volume, scores as JSON holds them, and the three files."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor

from scripts.bundle.files import write_atomically
from scripts.data.intensity_window import intensity_window

__all__ = ["describe", "finite", "flat_scores", "mean_of_finite", "write_results"]

logger = logging.getLogger(__name__)


def write_results(output_dir: Path, rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any], page: str) -> None:
    """
    Write ``metrics.csv``, ``metrics.json`` and ``report.html``, each in one step.

    Args:
        output_dir: folder of the files; it is made.
        rows: rows of the table, all with the same columns.
        content: content of ``metrics.json``.
        page: the report, HTML.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {"metrics.csv": table.getvalue(), "metrics.json": json.dumps(content, indent=2), "report.html": page}
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(text.encode(), output_dir / name)
    logger.info(f"report: {output_dir / 'report.html'}")


def describe(image: MetaTensor) -> dict[str, Any]:
    """Size, spacing and intensity window of a volume, for JSON."""
    window = intensity_window(image)
    return {
        "shape": list(image.shape[1:]),
        "spacing": [round(float(size), 4) for size in image.pixdim],
        "intensity_low": window["low"],
        "intensity_high": window["high"],
        "clipped": window["clipped"],
        "clipped_below": window["clipped_below"],
        "clipped_above": window["clipped_above"],
    }


def flat_scores(values: torch.Tensor) -> list[float]:
    """One score for each volume: the mean over channels, if a metric has one for each."""
    return values.flatten(1).mean(1).tolist()


def finite(value: float) -> float | None:
    """Rounded to six digits, about as many as float32 has; None if not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def mean_of_finite(values: Sequence[float]) -> float | None:
    """The mean of those values that are finite, rounded; None without any."""
    defined = [value for value in values if math.isfinite(value)]
    return finite(math.fsum(defined) / len(defined)) if defined else None
