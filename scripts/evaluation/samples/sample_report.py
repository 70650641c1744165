"""What an evaluation of samples leaves behind: its numbers as JSON and as CSV, and a report to look at."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bundle.text_table import summary_table
from scripts.evaluation.html_pages import Column, extents, render_page
from scripts.evaluation.pictures import Panels
from scripts.evaluation.results import write_results
from scripts.evaluation.samples.sample_sets import CONDITION
from scripts.evaluation.viewer import View

__all__ = ["write_report"]

TEMPLATE = Path(__file__).with_name("sample_report.html.jinja")
LABELS = {
    "samples": ("samples", "of the generator, with sizes, spacings and conditions of the held-out volumes"),
    "held_out": ("held-out volumes", "decoded latents that training did not see: what samples should be like"),
    "training": ("training volumes", "decoded latents of the training half: as near to the held-out ones as samples can be"),
    "training_mean": ("mean of training", "the mean of the training latents of the held-out volume's size, decoded"),
    "covariance_gaussian": (
        "Gaussian, covariance",
        "random sums of training latents, with their mean and full covariance; a generator must be much better",
    ),
    "gaussian": ("Gaussian", "independent values with the deviation of each channel: noise"),
}
MMD = (
    "squared maximum mean discrepancy to the held-out volumes, Gaussian kernel, unbiased: about 0 for the same distribution"
)
P = "share of random divisions that differ as much as these two sets; below 0.05 they are not of one distribution"
COARSE = "on coarse latents (size, position, shape)"
CHANNELS = "on mean and deviation of each latent channel over the volume (how much detail of each kind there is)"
LOCAL = "on local means, deviations and edges of decoded volumes (what tissue looks like)"
SLICES = "on features of slices in three planes by a network trained on photographs (what they look like)"
COLUMNS = {
    "number": Column("number", "d", "volumes of the set"),
    "mmd2_coarse": Column("MMD², coarse", ".4f", f"{MMD}; {COARSE}"),
    "p_coarse": Column("p", ".3f", P),
    "mmd2_channels": Column("MMD², channels", ".4f", f"{MMD}; {CHANNELS}"),
    "p_channels": Column("p", ".3f", P),
    "mmd2_local": Column("MMD², local", ".4f", f"{MMD}; {LOCAL}"),
    "p_local": Column("p", ".3f", P),
    "mmd2_slices": Column("MMD², slices", ".4f", f"{MMD}; {SLICES}"),
    "p_slices": Column("p", ".3f", P),
    "ms_ssim": Column(
        "pairwise MS-SSIM", ".3f", "how alike the volumes of a set are; above the held-out ones' is too little variety"
    ),
    "nearest": Column(
        "distance to training",
        ".3f",
        "median over the set of the distance to the nearest training latent, in deviations",
    ),
    "close": Column(
        "closer than held-out",
        ".1%",
        "share closer to a training latent than 95 % of held-out ones are; 5 % is to be expected",
    ),
    "spectrum": Column("spectrum, dB", ".2f", "mean difference of the power spectrum from the held-out volumes'"),
    "fine_detail": Column(
        "fine detail, dB", "+.2f", "power in the upper half of frequencies: less is blurred, more is noisy"
    ),
    "grid_energy": Column(
        "grid energy",
        ".3f",
        "how much the detail varies with the position in the latent's blocks; above the held-out ones' is blocky",
    ),
    "psnr": Column("PSNR", ".2f", "to the held-out volume whose conditions the sample has, both decoded, dB"),
    "ssim": Column("SSIM", ".4f", "structural similarity to the held-out volume whose conditions the sample has"),
}
OF_CONDITION = {  # the beginning of a column's name; {} is the condition
    "obeyed_": Column(
        "{} obeyed",
        ".1%",
        "share nearest to the mean training volume of its {}; held-out volumes say how well that tells classes apart",
    ),
    "explained_by_other_": Column(
        "explained by another's {}",
        ".3f",
        "the same with the label map of another volume of the set; what all have in common",
    ),
    "explained_": Column(
        "explained by {}",
        ".3f",
        "share of a volume's variance that its label map explains, over the voxels that have a label",
    ),
    "dice_": Column("Dice, {}", ".3f", "of a network that was trained to segment decoded training volumes"),
    "step_": Column("step at {}", ".4f", "mean difference of neighbouring voxels across the border of the label"),
    "inside_mae_": Column("MAE in {}", ".4f", "mean absolute difference from the held-out volume where the label is"),
}
WIDTH, HEIGHT = 640, 220  # of the chart of spectra
logger = logging.getLogger(__name__)


def write_report(
    evaluation: Mapping[str, Any],
    pictures: Mapping[int, Panels],
    views: Mapping[int, View],
    output_dir: Path,
) -> None:
    """
    Write ``metrics.json``, ``metrics.csv`` and ``report.html``, and log the numbers.

    Args:
        evaluation: the content of ``metrics.json``, see :py:class:`scripts.evaluation.SampleEvaluation`.
        pictures: panels of the samples that are shown, by their index.
        views: for those of them of which all slices are shown, the sample and its nearest training volume.
        output_dir: the folder; it is made.
    """
    logger.info(f"samples beside real volumes and Gaussians:\n{summary_table(evaluation['sets'])}")
    if evaluation["left_out"]:
        logger.info(evaluation["left_out"])
    rows = [{"set": name, **row} for name, row in evaluation["sets"].items()]
    write_results(output_dir, rows, evaluation, _page(evaluation, pictures, views))


def _page(evaluation: Mapping[str, Any], pictures: Mapping[int, Panels], views: Mapping[int, View]) -> str:
    shown = [sample for sample in evaluation["samples"] if sample["index"] in pictures]
    return render_page(
        TEMPLATE,
        evaluation=evaluation,
        labels={name: _label(name) for name in evaluation["sets"]},
        columns={metric: _column(metric) for metric in evaluation["sets"]["samples"]},
        spatial=[metric for metric in evaluation["sets"]["samples"] if metric.startswith(("explained_", "psnr"))],
        shown=shown,
        pictures=pictures,
        views=views,
        extents={sample["index"]: extents(sample["size"], sample["spacing"]) for sample in shown},
        chart=_chart(evaluation["spectra"]),
    )


def _label(name: str) -> tuple[str, str]:
    if name in LABELS:
        return LABELS[name]
    key = name.removeprefix(CONDITION)
    return f"{key} itself", f"the condition {key} of the held-out volumes as it is, decoded"


def _column(metric: str) -> Column:
    if metric in COLUMNS:
        return COLUMNS[metric]
    start = next(start for start in OF_CONDITION if metric.startswith(start))
    column, condition = OF_CONDITION[start], metric.removeprefix(start)
    return replace(column, label=column.label.format(condition), meaning=column.meaning.format(condition))


def _chart(spectra: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Lines of the differences from the held-out spectrum, in pixels, and the range of the vertical axis in dB."""
    real = spectra["held_out"]
    lines = {
        name: [(band, a - b) for band, (a, b) in enumerate(zip(each, real)) if a is not None and b is not None]
        for name, each in spectra.items()
        if name != "held_out"
    }
    limit = max(1.0, *(math.ceil(abs(value)) for line in lines.values() for _, value in line))
    places = {
        name: " ".join(
            f"{(band + 0.5) / len(real) * WIDTH:.1f},{(1 - value / limit) * HEIGHT / 2:.1f}" for band, value in line
        )
        for name, line in lines.items()
    }
    return {"lines": places, "limit": limit, "width": WIDTH, "height": HEIGHT}
