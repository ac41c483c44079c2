"""Markdown tables out of values that strangers wrote: what stands in a cell is text, never markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_CELL_CHARS = 200
# A cell must not end, a link or an image must not begin, and nothing must be set in code or as HTML.
_ESCAPED = str.maketrans(
    {"|": r"\|", "[": r"\[", "]": r"\]", "`": "'", "<": "‹", ">": "›", "*": r"\*", "_": r"\_", "\\": r"\\", "#": r"\#"}
)


def cell(text: object, max_chars: int = MAX_CELL_CHARS) -> str:
    """Return a value as it may stand in a cell, or anywhere on a line of Markdown; a dash for nothing."""
    line = " ".join(str(text).split())
    if len(line) > max_chars:
        line = line[: max_chars - 1].rstrip() + "…"
    # An address would become a link by itself, and show as what it is not.
    return line.translate(_ESCAPED).replace("://", ":\u200b//") or "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """Return a table of cells; columns from `numbers_from` on are set to the right."""
    right = len(header) if numbers_from is None else numbers_from
    rule = ["---" if number < right else "---:" for number in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
