"""The reports of an evaluation and of a comparison: HTML pages that need no other file and no network."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.evaluation.pictures import ERROR_GAIN, PLANES
from scripts.layers.factors import by

__all__ = ["Column", "columns_of", "extents", "render_comparison", "render_page", "render_report"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Column:
    """
    How the report shows a metric.

    Args:
        label: name in the table.
        form: of its values, as in ``format``.
        meaning: a line for the legend.
        unit: behind a value that stands alone.
    """

    label: str
    form: str = ".4g"
    meaning: str = ""
    unit: str = ""


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


def columns_of(metrics: Iterable[str]) -> dict[str, Column]:
    """How metrics are shown, those that the report knows first."""
    metrics = list(metrics)
    ordered = dict.fromkeys([*(metric for metric in COLUMNS if metric in metrics), *metrics])
    return {metric: COLUMNS.get(metric, Column(metric)) for metric in ordered}


def render_report(
    evaluation: Mapping[str, Any],
    pictures: Mapping[str, Mapping[str, Mapping[str, bytes]]],
    views: Mapping[str, Any],
) -> str:
    """
    Make the report.

    Args:
        evaluation: the content of ``metrics.json``, see :py:class:`scripts.evaluation.EvaluationSaver`.
        pictures: for the volumes that are shown, in their order, the panels of ``pictures.draw_panels``.
        views: for those of them of which all slices are shown, their ``viewer.View``.

    Returns:
        HTML. The volumes with the lowest PSNR come first in the table.
    """
    columns = columns_of(evaluation["mean"])
    factors = evaluation["total_downsample_factor"]
    network = evaluation["network"]
    return render_page(
        FOLDER / "report.html.jinja",
        evaluation=evaluation,
        volumes=dict(sorted(evaluation["volumes"].items(), key=lambda item: _psnr(item[1]))),
        pictures=pictures,
        views=views,
        columns=columns,
        key_figures=[metric for metric in KEY_FIGURES if metric in columns],
        extents={
            name: extents(evaluation["volumes"][name]["shape"], evaluation["volumes"][name]["spacing"]) for name in pictures
        },
        voxels_per_value=math.prod(factors) * network["in_channels"] / network["latent_channels"],
    )


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
        FOLDER / "comparison.html.jinja",
        comparison=comparison,
        columns=columns_of(next(iter(comparison["codecs"].values()))["metrics"]),
        pictures=pictures,
        gain=ERROR_GAIN,
        extents={name: extents(volumes[name]["shape"], volumes[name]["spacing"]) for name in pictures},
    )


def render_page(template: Path, **content: Any) -> str:
    """
    Make a page.

    Args:
        template: file that extends ``page.html.jinja``.
        content: names in the template; ``made`` is the time.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, FOLDER]),
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
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template.name).render(made=made, **content)


def extents(shape: Sequence[int], spacing: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Width and height of each plane in mm, so that voxels which are not cubes are shown in their shape."""
    millimetres = [size * step for size, step in zip(shape, spacing)]
    across = [[size for i, size in enumerate(millimetres) if i != axis] for axis in range(len(PLANES))]
    return {plane: (round(width, 1), round(height, 1)) for plane, (width, height) in zip(PLANES, across)}


def _psnr(volume: Mapping[str, Any]) -> float:
    value = volume["metrics"].get("psnr")
    return math.inf if value is None else value


def _number(value: float | None, form: str) -> str:
    return "\N{EN DASH}" if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


def _range(volume: Mapping[str, Any]) -> str:
    """The intensity window, of each channel."""
    windows = zip(volume["intensity_low"], volume["intensity_high"])
    return ", ".join(f"{_number(low, '.5g')} to {_number(high, '.5g')}" for low, high in windows)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
