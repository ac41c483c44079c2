"""How much there is to tokenize in a prompt, before it is: whether a request that is refused has cost something."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

WORK_BYTES = 32_768
"""A request of more than this takes work before it runs, some 10 ms of parsing and tokenizing. Refused after that, it
counts as a request; smaller ones are refused for nothing."""


def takes_work(texts: Iterable[Any]) -> bool:
    """Tell whether texts, lists of token ids and messages have more than WORK_BYTES together, of characters or ids."""
    left = WORK_BYTES
    for text in texts:
        left -= _chars(text)
        if left < 0:
            return True
    return False


def _chars(text: Any) -> int:
    if isinstance(text, dict):
        return sum(map(_chars, text.values()))
    if isinstance(text, list):
        return sum(map(_chars, text)) if text and not isinstance(text[0], int) else 4 * len(text)
    return len(text) if isinstance(text, str) else 0
