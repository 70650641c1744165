"""The page of a comparison: one HTML file that needs no other files and no internet connection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.evaluation.html_pages import Column, extents, render_page
from scripts.evaluation.html_report import COLUMNS
from scripts.evaluation.pictures import ERROR_GAIN

__all__ = ["SHOWN", "columns_of", "render_comparison"]

TEMPLATE = Path(__file__).with_name("comparison.html.jinja")
SHOWN = ("psnr", "foreground_psnr", "ssim", "sharpness", "grid_energy")  # in the log


def columns_of(codecs: Mapping[str, Mapping[str, Any]]) -> dict[str, Column]:
    """The metrics of a comparison, those that the report knows first, and how they are shown."""
    found = next(iter(codecs.values()))["metrics"]
    metrics = dict.fromkeys([*(metric for metric in COLUMNS if metric in found), *found])
    return {metric: COLUMNS.get(metric, Column(metric)) for metric in metrics}


def render_comparison(comparison: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Make the page.

    Args:
        comparison: the content of ``metrics.json``, see :py:class:`scripts.evaluation.ComparisonSaver`.
        pictures: for the volumes that are shown, in their order, the panels of ``pictures.draw_panels`` by codec.

    Returns:
        HTML. In a cell, the value of the block-wise cosine transform is below that of the codec.
    """
    volumes = comparison["volumes"]
    return render_page(
        TEMPLATE,
        comparison=comparison,
        columns=columns_of(comparison["codecs"]),
        pictures=pictures,
        gain=ERROR_GAIN,
        extents={name: extents(volumes[name]["shape"], volumes[name]["spacing"]) for name in pictures},
    )
