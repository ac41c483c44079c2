"""Markdown tables of untrusted values: a cell is text, never markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gateway.workflows.link_syntax import begins_address, is_below_domain

MAX_CELL_CHARS = 200
HIDDEN = "\u200b"
"""Breaks what would become a link by itself, without a trace for people."""
# A cell must not end, a link or an image must not begin, and nothing must be set in code or as HTML.
_ESCAPED = str.maketrans(
    {"|": r"\|", "[": r"\[", "]": r"\]", "`": "'", "<": "‹", ">": "›", "*": r"\*", "_": r"\_", "\\": r"\\", "#": r"\#"}
)
_NAME = re.compile(r"(?<![\w-])[\w-]++(?:\.[\w-]++)+")
BARE = str.maketrans("[]<>`", "()‹›'")
_ENTITY = re.compile(r"&(?=#?[A-Za-z0-9]{1,32};)")
_LINKED = re.compile(r"://|//|(?<=@)(?=\w)|\bwww\b(?=\.)", re.I)


def cell(text: object, max_chars: int = MAX_CELL_CHARS) -> str:
    """A value as text for a cell, or anywhere on a line of Markdown. A dash for none."""
    line = " ".join(str(text).split())
    if len(line) > max_chars:
        line = line[: max_chars - 1].rstrip() + "…"
    return _unlinked(line.translate(_ESCAPED)) or "-"


def plain_line(text: str) -> str:
    """Return text as one line that is neither markup nor an address, as people read it without Markdown as well."""
    return _unlinked(" ".join(text.split()).translate(BARE))


def _unlinked(line: str) -> str:
    """Return a line in which no address becomes a link by itself, and none is spelled with entities."""
    line = _NAME.sub(_unlinked_name, _ENTITY.sub("&amp;", line))
    return _LINKED.sub(lambda found: f":{HIDDEN}//" if found[0] == "://" else _broken(found[0]), line)


def _unlinked_name(found: re.Match[str]) -> str:
    """Return a host's name so that it is no link, if what follows makes it an address or it is below a domain."""
    name, behind = found[0], found.string[found.end() : found.end() + 2]
    if not (is_below_domain(name) or (behind and begins_address(name, behind[0], behind[1:]) and behind[0] in ":/?#")):
        return name
    above, _, ending = name.rpartition(".")
    return f"{above}.{HIDDEN}{ending}"


def _broken(found: str) -> str:
    return f"/{HIDDEN}/" if found == "//" else f"{found}{HIDDEN}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """Return a table of cells; columns from `numbers_from` on are set to the right."""
    right = len(header) if numbers_from is None else numbers_from
    rule = ["---" if number < right else "---:" for number in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
