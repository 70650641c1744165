"""What the reports share: HTML pages that need nothing else, neither a network nor a folder of pictures."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.evaluation.pictures import PLANES
from scripts.layers.factors import by

__all__ = ["Column", "extents", "render_page"]

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


def _number(value: float | None, form: str) -> str:
    return "\N{EN DASH}" if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


def _range(volume: Mapping[str, Any]) -> str:
    """The intensity window, of each channel."""
    windows = zip(volume["intensity_low"], volume["intensity_high"])
    return ", ".join(f"{_number(low, '.5g')} to {_number(high, '.5g')}" for low, high in windows)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
