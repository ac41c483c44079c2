"""JSON text into values, if it will take no more memory and levels than it should: told before any of it is parsed.

A parser holds the GIL until it is done, and 8 MiB of empty lists take it 700 ms and 200 MB. What looks at the text
before is linear, works on pieces, and lets other threads run between two pieces. Text that is not JSON gets some
figure; parsers refuse it. Fails with BadRequest, which names the field of the body that holds too much, and with
ValueError.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import orjson
from pydantic_core import from_json

from gateway.errors import BadRequest

LARGE_BYTES = 262_144
"""Longer bodies are looked at before they are parsed, and worked on beside the event loop: up to here everything takes
some milliseconds."""
MAX_DEPTH = 128
"""Levels of arrays and objects. orjson writes at most 254; Python's own JSON parser, which chat templates use,
overflows at about 990."""
MAX_DIGITS = 4300
"""Digits of a number; Python converts no longer ones."""

_PIECE_BYTES = 65_536
"""A piece takes at most some 2 ms."""
_MOST_TIMES = 8.5
_FREE_BYTES = 4 * 2**20
_MOST_TIMES_BY_ORJSON = 5.5
"""A body may take so many times its own size when it is parsed, and 4 MiB more: with the body itself 10 times of 8 MiB.
The history of an agent with many short tool calls takes 8 times. orjson keeps a form of its own beside the result."""

# Bytes that CPython on 64 bits allocates, as measured.
_OBJECT_BYTES = 200  # of up to five fields
_FIELD_BYTES = 50  # each one more
_ARRAY_BYTES = 72
_POINTER_BYTES = 14  # of an element of an array, and of a list that a parser makes the array of
_STRING_BYTES = 64  # two or more characters; shorter ones exist once
_NUMBER_BYTES = 32  # three or more digits; smaller ones exist once
_KEPT_NAMES = 1024
"""Parsers make some more different names than this once, and any others again and again."""
_LONG_CHARS = 1024
_WIDE = 4
"""Bytes of a character, all over a string, where one is outside Unicode's first plane."""

_STRUCTURE = b'{}[],:" \t\n\r'
_STEPS = bytes(1 if byte in b"{[" else 255 if byte in b"}]" else byte for byte in range(256))
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{}[]")
_NUMBERS = bytes(ord("0") if chr(byte).isdecimal() else ord("e") if byte in b"eE" else byte for byte in range(256))
_DIGITS = re.compile(rb"[0-9]+")


def load(body: bytes) -> Any:
    """Return what a body says in JSON. Raises BadRequest."""
    try:
        if len(body) <= LARGE_BYTES or _check_size(body).odd_numbers:
            return orjson.loads(body)
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        # Without its cause, which may hold the body once more.
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None


def _check_size(body: bytes) -> _Figures:
    """Raise BadRequest where `body`, parsed, would take many times its own size in memory."""
    figures = _Figures(wide=_is_wide(body))
    for number, piece in enumerate(_pieces(body), 1):
        figures.add(piece)
        times = _MOST_TIMES_BY_ORJSON if figures.odd_numbers else _MOST_TIMES
        if figures.parsed_bytes > times * len(body) + _FREE_BYTES:
            if _unclosed(body):
                raise BadRequest("The request body is not valid JSON: its brackets don't match.")
            name = _field_at(body, number)
            where = f", in '{name}'" if name else ""
            raise BadRequest(
                f"The request body holds too many values for its size{where}. Send fewer and longer ones.",
                name,
                "too_many_values",
            )
    return figures


def check_nesting(text: str) -> str:
    """Return `text`, JSON that may be cut short, if every parser can take it. Raises ValueError."""
    if len(text) <= MAX_DIGITS and text.count("{") + text.count("[") <= MAX_DEPTH:
        return text
    outside = list(chain.from_iterable(piece.outside for piece in _pieces(text.encode())))
    if max(accumulate(_steps(outside)), default=0) > MAX_DEPTH:
        raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep")
    if max(map(len, _DIGITS.findall(b'"'.join(outside))), default=0) > MAX_DIGITS:
        raise ValueError(f"must hold no number of more than {MAX_DIGITS} digits")
    return text


def is_shallow(value: Any, most: int = MAX_DEPTH) -> bool:
    """Tell whether a parsed value is nested at most `most` levels deep."""
    level = [value]
    for _ in range(most + 1):
        level = [one for one in level if isinstance(one, (dict, list))]
        if not level:
            return True
        level = list(chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level))
    return False


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of JSON text, split at the quotes of its strings."""

    parts: list[bytes]
    inside: bool
    """The first part is in a string, the end of one that began in an earlier piece."""

    @property
    def outside(self) -> list[bytes]:
        """The parts between strings, the first of which may be the rest of another piece's last."""
        return self.parts[self.inside :: 2]

    @property
    def strings(self) -> list[bytes]:
        return self.parts[not self.inside :: 2]


@dataclass(slots=True)
class _Figures:
    """What has been counted so far."""

    wide: bool
    parsed_bytes: float = 0
    odd_numbers: bool = False
    """Some may be beyond 64 bits, where pydantic's parser makes integers that orjson can't write, or infinity."""
    objects: int = 0
    fields: int = 0
    names: set[bytes] = field(default_factory=set)
    long_names: int = 0

    def add(self, piece: _Piece) -> None:
        """Count a piece."""
        outside, strings = b'"'.join(piece.outside), piece.strings
        objects, arrays, commas = outside.count(b"{"), outside.count(b"["), outside.count(b",")
        behind = piece.parts[2 - piece.inside :: 2]
        names = [name for name, rest in zip(strings, behind, strict=False) if rest.lstrip()[:1] == b":"]
        if len(self.names) <= _KEPT_NAMES:
            self.names.update(names)
        lengths, name_lengths = list(map(len, strings)), list(map(len, names))
        long_names = len(names) - name_lengths.count(0) - name_lengths.count(1)
        long_strings = len(lengths) - lengths.count(0) - lengths.count(1) - long_names
        self.objects += objects
        self.fields += len(names)
        self.long_names += long_names
        numbers = outside.translate(_NUMBERS, b"+-")
        self.odd_numbers = self.odd_numbers or b"0" * 19 in numbers or b"e000" in numbers
        elements = max(0, commas - len(names) + objects) + arrays
        scalar_chars = len(outside.translate(None, _STRUCTURE))
        self.parsed_bytes += (
            _OBJECT_BYTES * objects
            + _FIELD_BYTES * max(0, len(names) - 5 * (objects + 1))
            + _ARRAY_BYTES * arrays
            + _POINTER_BYTES * elements
            + _STRING_BYTES * long_strings
            + (_STRING_BYTES * long_names if len(self.names) > _KEPT_NAMES else 0)
            + _NUMBER_BYTES * min(scalar_chars / 3, elements + len(names))
            + self._text_bytes(strings, sum(lengths) - sum(name_lengths))
        )

    def _text_bytes(self, strings: list[bytes], chars: int) -> int:
        long_chars = sum(len(text) for text in strings if len(text) > _LONG_CHARS)
        short_chars = max(0, chars - long_chars)
        if self.wide and any(map(_is_wide, strings)):
            short_chars *= _WIDE
        return long_chars * (_WIDE if self.wide else 1) + short_chars


def _is_wide(text: bytes) -> bool:
    return not text.isascii() or b"\\u" in text


def _pieces(text: bytes) -> Iterator[_Piece]:
    if b"\\" in text:  # without escapes, every other quote ends a string
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    inside = False
    for start in range(0, len(text), _PIECE_BYTES):
        parts = text[start : start + _PIECE_BYTES].split(b'"')
        yield _Piece(parts, inside)
        inside ^= not len(parts) % 2
        time.sleep(0)  # whoever waits for the GIL gets it now, and not after 5 ms


def _unclosed(body: bytes) -> int:
    """Return how many arrays and objects of `body` are not closed; less than 0 where more are closed than opened."""
    return sum(sum(_steps(piece.outside)) for piece in _pieces(body))


def _steps(outside: list[bytes]) -> array[int]:
    """Return 1 for each bracket that opens, -1 for each that closes."""
    return array("b", b"".join(outside).translate(_STEPS, _NO_BRACKETS))


def _field_at(body: bytes, pieces: int) -> str | None:
    """Return the body's field that the last of so many pieces is in, or None where there is none."""
    depth, name, text = 0, b"", b""
    for _, piece in zip(range(pieces), _pieces(body), strict=False):
        steps = _steps(piece.outside)
        if depth + min(accumulate(steps), default=0) > 1:  # it is in the same field all over
            depth += sum(steps)
            continue
        for position, part in enumerate(piece.parts):
            if position % 2 != piece.inside:
                text = text + part if position == 0 else part
                continue
            if depth == 1 and part.lstrip()[:1] == b":":
                name = text
            depth += sum(_steps([part]))
    return name[:64].decode(errors="replace") or None
