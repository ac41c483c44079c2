"""Filters of answers over text that may be long: an answer that was not streamed, or notes in place of one.

A filter takes some microseconds per character, and one that looks figures up a millisecond per line. So long text goes
through in short pieces, and others run in between. What a filter returns does not depend on where its text is cut.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_PIECE_CHARS = 128
_TURN_S = 0.01
"""How long a filter runs before others do."""


async def filtered(text: str, through: Callable[[str], str]) -> str:
    """The part of `text` that a filter has passed so far."""
    if len(text) <= _PIECE_CHARS:
        return through(text)
    out: list[str] = []
    began = time.monotonic()
    for start in range(0, len(text), _PIECE_CHARS):
        out.append(through(text[start : start + _PIECE_CHARS]))
        if time.monotonic() - began > _TURN_S:
            await asyncio.sleep(0)
            began = time.monotonic()
    return "".join(out)
