"""Tables of a verb's results, printed for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_NARROWEST = 160  # characters, so that no figure is cut where the terminal is narrower


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str]) -> None:
    """Prints a table, never narrower than its figures. words: the columns that stand at the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, _NARROWEST)).print(table)
