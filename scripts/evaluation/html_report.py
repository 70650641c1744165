"""The report of an evaluation: one HTML file that needs no other files and no internet connection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.evaluation.html_pages import Column, extents, render_page
from scripts.evaluation.viewer import View

__all__ = ["render_report"]

TEMPLATE = Path(__file__).with_name("report.html.jinja")
KEY_FIGURES = ("psnr", "foreground_psnr", "ssim")  # in large type at the top, where they were measured
COLUMNS = {
    "psnr": Column("PSNR", ".2f", "peak signal-to-noise ratio, dB; higher is better", "dB"),
    "foreground_psnr": Column("foreground PSNR", ".2f", "the same over the voxels that are not air", "dB"),
    "edge_psnr": Column("edge PSNR", ".2f", "the same over the tenth of the voxels with the largest gradients", "dB"),
    "ssim": Column("SSIM", ".4f", "structural similarity; 1 for equal volumes; needs at least 11 voxels along each axis"),
    "ms_ssim": Column("MS-SSIM", ".4f", "the same at five scales; needs at least 176 voxels along each axis"),
    "mae": Column("MAE", ".4f", "mean absolute error, of the intensity window; lower is better"),
    "mae_file_units": Column(
        "MAE, file units",
        ".4g",
        "the same in the units of the file, which for CT are HU; a mean over files of different units has no meaning",
    ),
    "sharpness": Column(
        "sharpness", ".3f", "mean difference of neighbouring voxels, relative to that of the image; less than 1 is blurred"
    ),
    "grid_energy": Column(
        "grid energy",
        ".3f",
        "how much the detail varies with the position in the latent's blocks; a value above that of the image means a block "
        "pattern or a checkerboard",
    ),
    "image_grid_energy": Column("image grid energy", ".3f", "that of the image"),
    "trilinear_psnr": Column("trilinear PSNR", ".2f", "that of shrinking by the same factor and enlarging again", "dB"),
}


def render_report(
    evaluation: Mapping[str, Any],
    pictures: Mapping[str, Mapping[str, Mapping[str, bytes]]],
    views: Mapping[str, View],
) -> str:
    """
    Make the report.

    Args:
        evaluation: the content of ``metrics.json``, see :py:class:`scripts.evaluation.EvaluationSaver`.
        pictures: for the volumes that are shown, in their order, the panels of ``pictures.draw_panels``.
        views: for those of them of which all slices are shown, image and reconstruction.

    Returns:
        HTML. The volumes with the lowest PSNR come first in the table.
    """
    known = [metric for metric in COLUMNS if metric in evaluation["mean"]]
    metrics = list(dict.fromkeys([*known, *evaluation["mean"]]))
    factors = evaluation["total_downsample_factor"]
    network = evaluation["network"]
    return render_page(
        TEMPLATE,
        evaluation=evaluation,
        volumes=dict(sorted(evaluation["volumes"].items(), key=lambda item: _psnr(item[1]))),
        pictures=pictures,
        views=views,
        columns={metric: COLUMNS.get(metric, Column(metric)) for metric in metrics},
        key_figures=[metric for metric in KEY_FIGURES if metric in metrics],
        extents={
            name: extents(evaluation["volumes"][name]["shape"], evaluation["volumes"][name]["spacing"]) for name in pictures
        },
        voxels_per_value=math.prod(factors) * network["in_channels"] / network["latent_channels"],
    )


def _psnr(volume: Mapping[str, Any]) -> float:
    value = volume["metrics"].get("psnr")
    return math.inf if value is None else value
