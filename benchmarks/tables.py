"""Tables of the benchmarks, printed row by row as they are measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

__all__ = ["print_table"]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, row by row."""
    for row in itertools.chain([header, ["---"] * len(header)], rows):
        print(f"| {' | '.join(row)} |", flush=True)
