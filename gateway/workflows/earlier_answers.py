"""What earlier answers of a conversation mean to the agents of a new run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gateway.workflows.prompting import replaced, without_control_tokens

_HEADING = "\n\n## Sources\n\n"
_ENTRY = re.compile(r"\[\d{1,4}\] [^\n]*")
_MARKERS = re.compile(r" ?\[\d{1,3}(?:, \d{1,3})*\]")
_MAX_ENTRIES = 1000
"""A longer list is not this server's: no run reads so many sources. 8 MiB have room for a million entries."""


def without_sources(answer: str) -> str:
    """Return an answer without its list of sources and the numbers that refer to it: a new run has other numbers.

    Control tokens of chat templates go as well.
    """
    if _entries(answer):
        answer = replaced(_MARKERS, "", answer.rpartition(_HEADING)[0]).rstrip()
    return without_control_tokens(answer)


def listed_addresses(answer: str) -> Iterator[str]:
    """Yield the web addresses in the list of sources that an answer ends with: `[1] Title (address) - domain`."""
    for entry in _entries(answer):
        address = entry.rpartition(") - ")[0].rpartition(" (")[2]
        if address.startswith(("http://", "https://")):
            yield address


def _entries(answer: str) -> list[str]:
    """Return the entries of an answer's list of sources, none where it has no such list."""
    _, heading, listed = answer.rpartition(_HEADING)
    listed = listed.rstrip() if heading else ""
    entries: list[str] = []
    at = 0
    while len(entries) < _MAX_ENTRIES and (entry := _ENTRY.match(listed, at)):
        entries.append(entry[0])
        if entry.end() == len(listed):
            return entries
        if not listed.startswith("\n\n", entry.end()):
            break
        at = entry.end() + 2
    return []
