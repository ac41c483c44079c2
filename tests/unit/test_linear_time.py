"""Work on text from outside grows with its length and not faster: every compiled pattern of agents and tools is fed
growing bait, and so is the code around them."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Iterator

import pytest
from pydantic import ValidationError

import gateway.tools
import gateway.workflows
from gateway.serving.request_head import HeadReader, Refusal
from gateway.tools.documents import read_document
from gateway.tools.json_arguments import arguments_model
from gateway.tools.passages import passages
from gateway.tools.robots import allows, parse
from gateway.workflows.addresses import Addresses
from gateway.workflows.citations import AnswerFilter, Sources
from gateway.workflows.earlier_answers import without_sources
from gateway.workflows.excerpts import excerpt
from gateway.workflows.figure_filter import FigureFilter
from gateway.workflows.figures import Figures
from gateway.workflows.prompting import fenced
from gateway.workflows.tables import cell, plain_line

_UNITS = [
    *(
        " ",
        "\n",
        "\t",
        "\r\n",
        "1",
        "a",
        "A",
        "-",
        ".",
        ",",
        ":",
        "#",
        "*",
        "_",
        "`",
        "(",
        ")",
        "[",
        "]",
        "【",
        "<",
        ">",
        '"',
        "'",
    ),
    *("/", "@", "%", "|", "~", "=", "!", "$", "&", "\\", "{", "漢", "é", "\u00a0", "\u200b", "R", "0"),
    *(
        "a.",
        "1,",
        "1 ",
        "a-",
        ". ",
        "- ",
        "> ",
        "[1",
        "[R1",
        "(a",
        "h",
        "http://",
        "www.",
        "10.1/",
        "<meta ",
        "charset=",
        "&#5",
        "```\n",
    ),
    *(
        "a b ",
        "1.1",
        "a\n",
        "\n\n",
        " \n",
        "title:",
        "---\n",
        "R1, ",
        "reports ",
        "top ",
        "1 000",
        "a1",
        "_a",
        "one ",
        "a hundred ",
    ),
    *(
        "\n\n## Sources\n\n[1] x",
        "[1] ",
        "\n\n[1] ",
        "## ",
        "=\n",
        "<a ",
        "e.g",
        "1h 1m ",
        "JPY",
        "12:",
        "2024-",
        "May ",
        "a@a",
    ),
]
_BEGINNINGS = ("", "[", ".")
_CHARS = 8000
_ENOUGH_S = 0.01
"""What takes less for the larger bait is not looked at more closely."""


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
    started = time.process_time()
    work(text)
    return time.process_time() - started


def grows_too_fast(work: Callable[[str], object], begin: str, unit: str, chars: int, end: str = "\n\0") -> bool:
    """Return whether four times the text takes much more than four times the time."""
    small, large = (f"{begin}{unit * (size // len(unit))}{end}" for size in (chars // 4, chars))
    if _took(work, large) < _ENOUGH_S:
        return False
    ratios = [_took(work, large) / max(_took(work, small), _ENOUGH_S / 20) for _ in range(3)]
    return min(ratios) > 9  # linear is 4, quadratic 16


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_takes_linear_time(name: str) -> None:
    pattern = PATTERNS[name]
    ways: tuple[Callable[[str], object], ...] = (pattern.search, pattern.fullmatch)
    baits = [(begin, unit) for begin in _BEGINNINGS for unit in _UNITS]
    ends = ("\0", "\n\0")
    assert not [bait for bait in baits for way in ways for end in ends if grows_too_fast(way, *bait, _CHARS, end)]


def test_growth_is_noticed() -> None:
    """So that the tests before prove something."""
    assert grows_too_fast(
        re.compile(r"\n\n## Sources(?:\n\n\[\d+\] [^\n]*)+\s*$").search, "\n\n## Sources\n\n[1] ", " ", _CHARS
    )
    assert grows_too_fast(re.compile(r"[ \t]+\n").search, "", " ", _CHARS, "\0")


def _answer(text: str) -> str:
    answer_filter = AnswerFilter(Sources(), "https://named.example/x")
    return answer_filter(text) + answer_filter.flush()


def _token_by_token(text: str) -> str:
    answer_filter = AnswerFilter(Sources())
    return "".join(answer_filter(text[at : at + 5]) for at in range(0, len(text), 5)) + answer_filter.flush()


def _sentences(text: str) -> str:
    figures = FigureFilter(Figures())
    return figures(text) + figures.flush()


def _figures(text: str) -> None:
    Figures().add_all(text)


def _conform(text: str) -> None:
    schema = {"type": "object", "properties": {"x": {"pattern": "^(a+)+$"}}, "patternProperties": {"(y|y)*z": {}}}
    with contextlib.suppress(ValidationError):
        arguments_model(schema).model_validate({"x": text, text: 1})


WORKS: dict[str, tuple[Callable[[str], object], int]] = {
    "answers": (_answer, 4_000),
    "answers, token by token": (_token_by_token, 4_000),
    "earlier answers": (without_sources, 40_000),
    "addresses": (Addresses, 40_000),
    "fences": (lambda text: fenced("x", text), 40_000),
    "lines": (plain_line, 40_000),
    "cells": (cell, 40_000),
    "sentences": (_sentences, 4_000),
    "figures": (_figures, 8_000),
    "excerpts": (lambda text: excerpt(text, text, 3000), 20_000),
    "passages": (passages, 20_000),
    "Markdown": (lambda text: read_document(f"# x\n{text}".encode(), "markdown"), 20_000),
    "front matter": (lambda text: read_document(f"---\ntitle: {text}\n---\nx".encode(), "markdown"), 20_000),
    "robots.txt": (lambda text: allows(parse(text), text), 20_000),
    "arguments": (_conform, 8_000),
}
_BAITS = (
    "user-agent: x\n",
    "allow: /\n",
    "user-agent: *\nallow: /*a*b*c\n",
    "===\n",
    "](",
    "![",
    "//a/",
    "https://a/(",
    "- a\n    ```\n",
)


@pytest.mark.parametrize("name", WORKS)
def test_work_takes_linear_time(name: str) -> None:
    work, chars = WORKS[name]
    assert not [unit for unit in (*_UNITS, *_BAITS) if grows_too_fast(work, "", unit, chars)]


def _byte_by_byte(text: str) -> None:
    reader, buffer = HeadReader(), bytearray()
    for byte in text.encode():
        buffer.append(byte)
        if reader.take(buffer) is not None:
            break


@pytest.mark.parametrize("begin", ["", "GET /", "GET / HTTP/1.1\r\nHost: x", "GET / HTTP/1.1\r\nHost: x\r\n"])
@pytest.mark.parametrize("unit", ["a", "a: b\r\n", "%2F"])
def test_head_that_comes_byte_by_byte_takes_linear_time(begin: str, unit: str) -> None:
    def read(text: str) -> None:
        with contextlib.suppress(Refusal):
            _byte_by_byte(text)

    assert not grows_too_fast(read, begin, unit, 60_000, end="")


def test_a_robots_txt_of_many_groups_keeps_rules_for_us_only() -> None:
    text = "".join(f"user-agent: {n}\n" for n in range(15_000)) + "disallow: /x\n" * 15_000
    assert parse(text) == []
    assert len(parse(f"user-agent: *\n{text}")) <= 5000
