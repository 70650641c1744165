"""What an evaluation writes: tables as CSV and as JSON, and a report, an HTML page that needs no other file."""

from __future__ import annotations

import csv
import datetime
import io
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.bundle.files import write_atomically
from scripts.evaluation.pictures import PLANES
from scripts.layers.factors import by
from scripts.planning.tables import table

FOLDER = Path(__file__).parent
logger = logging.getLogger(__name__)


def write_results(
    output_dir: Path, rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], template: str, **shown: Any
) -> None:
    """
    Write ``metrics.csv``, ``metrics.json`` and ``report.html``, each in one step.

    Args:
        output_dir: folder of the files; it is made.
        rows: rows of the table, all with the same columns.
        evaluation: content of ``metrics.json``.
        template: see :py:func:`render`.
        shown: what else the report shows.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rounded(rows))
    content = rounded(evaluation)
    page = render(template, evaluation=content, **shown)
    files = {"metrics.csv": table.getvalue(), "metrics.json": json.dumps(content, indent=2), "report.html": page}
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(text.encode(), output_dir / name)
    logger.info(f"report: {output_dir / 'report.html'}")


def rounded(content: Any) -> Any:
    """Content for JSON, its numbers with six digits, about as many as float32 has; None for those that are not finite."""
    if isinstance(content, float):
        return float(f"{content:.6g}") if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: rounded(value) for key, value in content.items()}
    return [rounded(value) for value in content] if isinstance(content, (list, tuple)) else content


def mean_of_finite(values: Iterable[float]) -> float:
    """The mean of those values that are finite; NaN without any."""
    defined = [value for value in values if math.isfinite(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def summary_table(sets: Mapping[str, Mapping[str, float | None]]) -> str:
    """The numbers of an evaluation, by set or codec, as a Markdown table with a row for each."""
    columns = rounded(sets).values()
    numbers = next(iter(columns))
    rows = [[name, *("-" if (v := column[name]) is None else f"{v:.4g}" for column in columns)] for name in numbers]
    return table(["", *sets], rows)


def render(template: str, **content: Any) -> str:
    """A page, of a template in this folder that extends ``page.html.jinja``, and of the names in it."""
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return ENVIRONMENT.get_template(template).render(made=made, **content)


def columns_of(names: Iterable[str], table: str) -> dict[str, dict[str, str]]:
    """
    How numbers are shown: ``label``, ``form`` (as in ``format``), ``meaning`` and ``unit`` of each.

    Args:
        names: names of the numbers.
        table: key in ``report_columns.json``, where a name that ends in ``_`` is the beginning of many, and ``{}`` the rest.
    """
    known = json.loads((FOLDER / "report_columns.json").read_text())[table]
    found = {}
    for name in names:
        starts = [start for start in known if name == start or (start.endswith("_") and name.startswith(start))]
        start = max(starts, key=len, default=name)
        described = {"label": name, "form": ".4g", "meaning": "", "unit": "", **known.get(start, {})}
        found[name] = {key: text.replace("{}", name.removeprefix(start)) for key, text in described.items()}
    return found


def extents(shape: Sequence[int], spacing: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Width and height of each plane in mm, so that voxels which are not cubes are shown in their shape."""
    x, y, z = (round(size * step, 1) for size, step in zip(shape, spacing))
    return dict(zip(PLANES, ((y, z), (x, z), (x, y))))


def _number(value: float | None, form: str) -> str:
    return "\N{EN DASH}" if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters |= {
    "by": partial(by, sign=" \N{MULTIPLICATION SIGN} "),
    "columns": columns_of,
    "extents": extents,
    "number": _number,
}
