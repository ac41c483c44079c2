"""Work on text from outside grows with its length and not faster: every compiled pattern of agents and tools is fed
growing bait, and so is the code around them."""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Iterator

import pytest

import gateway.tools
import gateway.workflows

_UNITS = [
    *(" ", "\n", "\t", "\r\n", "1", "a", "A", "-", ".", ",", ":", "#", "*", "_", "`", "(", ")", "[", "]", "【", "<", ">", '"', "'"),
    *("/", "@", "%", "|", "~", "=", "!", "$", "&", "\\", "{", "漢", "é", "\u00a0", "\u200b", "R", "0"),
    *("a.", "1,", "1 ", "a-", ". ", "- ", "> ", "[1", "[R1", "(a", "h", "http://", "www.", "10.1/", "<meta ", "charset=", "&#5", "```\n"),
    *("a b ", "1.1", "a\n", "\n\n", " \n", "title:", "---\n", "R1, ", "reports ", "top ", "1 000", "a1", "_a", "one ", "a hundred "),
    *("\n\n## Sources\n\n[1] x", "[1] ", "\n\n[1] ", "## ", "=\n", "<a ", "e.g", "1h 1m ", "JPY", "12:", "2024-", "May ", "a@a"),
]  # fmt: skip
_ENDS = ("", "\0", "x", "\n", ")", "]", ">")
_SECONDS = 0.02
"""A pattern that takes less for the larger bait is not looked at more closely."""


def _patterns() -> Iterator[tuple[str, re.Pattern[str]]]:
    for package in (gateway.tools, gateway.workflows):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith(("leash", "reader_process")):
                continue  # programs
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
                    yield f"{module.name}.{name}", value


PATTERNS = dict(_patterns())


def _took(work: Callable[[str], object], text: str) -> float:
    best = float("inf")
    for _ in range(2):
        started = time.process_time()
        work(text)
        best = min(best, time.process_time() - started)
    return best


def grows_too_fast(work: Callable[[str], object], unit: str, end: str, chars: int) -> bool:
    """Return whether twice the text takes much more than twice the time."""
    small, large = (unit * (size // len(unit)) + end for size in (chars, 4 * chars))
    long_s = _took(work, large)
    return long_s > _SECONDS and long_s > 8 * max(_took(work, small), _SECONDS / 16)


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_takes_linear_time(name: str) -> None:
    pattern = PATTERNS[name]
    ways: list[Callable[[str], object]] = [pattern.search, pattern.fullmatch, lambda text: pattern.sub("", text)]
    slow = [
        (unit, end, number)
        for unit in _UNITS
        for end in _ENDS
        for number, way in enumerate(ways)
        if grows_too_fast(way, unit, end, 2500)
    ]
    assert not slow
