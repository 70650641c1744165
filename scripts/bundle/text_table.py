"""Tables in the log and on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["summary_table", "table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def summary_table(sets: Mapping[str, Mapping[str, float | None]]) -> str:
    """The numbers of an evaluation, by set or codec, as a Markdown table with a row for each."""
    numbers = next(iter(sets.values()))
    rows = [[name, *("-" if (v := row[name]) is None else f"{v:.4g}" for row in sets.values())] for name in numbers]
    return table(["", *sets], rows)
