"""The report of an evaluation: one HTML file that needs no other files and no internet connection."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.evaluation.pictures import PLANES
from scripts.layers.factors import by

__all__ = ["render_report"]

TEMPLATE = "report.html.jinja"
KEY_FIGURES = ("psnr", "foreground_psnr", "ssim")  # in large type at the top, if they were measured


@dataclass(frozen=True)
class Column:
    """
    How the report shows a metric.

    Args:
        label: name in the table.
        form: of its values, as in ``format``.
        meaning: a line for the legend.
        unit: printed after a value outside of the table.
    """

    label: str
    form: str = ".4g"
    meaning: str = ""
    unit: str = ""


COLUMNS = {
    "psnr": Column("PSNR", ".2f", "peak signal-to-noise ratio, dB; higher is better", "dB"),
    "foreground_psnr": Column("foreground PSNR", ".2f", "the same over the voxels that are not air", "dB"),
    "ssim": Column("SSIM", ".4f", "structural similarity; 1 for equal volumes; needs at least 11 voxels along each axis"),
    "ms_ssim": Column("MS-SSIM", ".4f", "the same at five scales; needs at least 176 voxels along each axis"),
    "mae": Column("MAE", ".4f", "mean absolute error, of the intensity window; lower is better"),
    "mae_file_units": Column("MAE, file units", ".4g", "the same in the units of the file, which for CT are HU"),
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


def render_report(evaluation: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Mapping[str, bytes]]]) -> str:
    """
    Make the report.

    Args:
        evaluation: the content of ``metrics.json``, see :py:class:`scripts.evaluation.EvaluationSaver`.
        pictures: for the volumes that are shown, in their order, the panels of ``pictures.draw_panels``.

    Returns:
        HTML. The volumes with the lowest PSNR come first in the table.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "by": partial(by, sign=" \N{MULTIPLICATION SIGN} "),
        "data_uri": _data_uri,
        "range": _range,
    }
    known = [metric for metric in COLUMNS if metric in evaluation["mean"]]
    metrics = list(dict.fromkeys([*known, *evaluation["mean"]]))
    factors = evaluation["total_downsample_factor"]
    network = evaluation["network"]
    return environment.get_template(TEMPLATE).render(
        evaluation=evaluation,
        volumes=dict(sorted(evaluation["volumes"].items(), key=lambda item: _psnr(item[1]))),
        pictures=pictures,
        columns={metric: COLUMNS.get(metric, Column(metric)) for metric in metrics},
        key_figures=[metric for metric in KEY_FIGURES if metric in metrics],
        extents={name: _extents(evaluation["volumes"][name]) for name in pictures},
        voxels_per_value=math.prod(factors) * network["in_channels"] / network["latent_channels"],
        made=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _psnr(volume: Mapping[str, Any]) -> float:
    value = volume["metrics"].get("psnr")
    return math.inf if value is None else value


def _extents(volume: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Width and height of each plane in mm, so that voxels that are not cubes are shown with their true shape."""
    millimetres = [size * spacing for size, spacing in zip(volume["shape"], volume["spacing"])]
    across = [[size for i, size in enumerate(millimetres) if i != axis] for axis in range(len(PLANES))]
    return {plane: (round(width, 1), round(height, 1)) for plane, (width, height) in zip(PLANES, across)}


def _number(value: float | None, form: str) -> str:
    return "\N{EN DASH}" if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


def _range(volume: Mapping[str, Any]) -> str:
    """The intensity window of each channel."""
    windows = zip(volume["intensity_low"], volume["intensity_high"])
    return ", ".join(f"{_number(low, '.5g')} to {_number(high, '.5g')}" for low, high in windows)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
