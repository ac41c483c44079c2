"""The size in memory and the depth of JSON text, from its characters, before any of it is parsed.

A parser holds the GIL until it is done, and 8 MiB of empty lists take it 700 ms and 200 MB. What is here is linear,
works on pieces, and lets other threads run between two pieces. Text that is not JSON gets some figure; parsers refuse
it. Raises BadRequest, which names the field of the body that holds too much, and with
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

from gateway.errors import BadRequest

MAX_DEPTH = 128
"""Levels of arrays and objects. orjson writes at most 254; Python's own JSON parser, which chat templates use,
overflows at about 990."""
MAX_DIGITS = 4300
"""Digits of a number; Python converts no longer ones."""

_PIECE_BYTES = 65_536
"""A piece takes at most some 2 ms."""
_MOST_TIMES = 8.5
_FREE_BYTES = 2 * 2**20
"""A body may take so many times its own size when it is parsed, and 2 MiB more: with the body itself, 10 times.
The history of an agent with many short tool calls takes 8 times."""

# Bytes that CPython on 64 bits allocates, as measured.
_OBJECT_BYTES = 200  # of up to five fields
_FIELD_BYTES = 50  # each one more
_ARRAY_BYTES = 72
_POINTER_BYTES = 14  # of an element of an array, and of a list that a parser makes the array of
_STRING_BYTES = 64  # two or more characters; shorter ones exist once
_NUMBER_BYTES = 32  # three or more digits; smaller ones exist once
_KEPT_NAMES = 1024
"""orjson makes about twice as many different names once, and any others again and again."""
_LONG_CHARS = 1024
_WIDE = 4
"""Bytes of a character, all over a string, where one is outside Unicode's first plane."""

_STRUCTURE = b'{}[],:" \t\n\r'
_STEPS = bytes(1 if byte in b"{[" else 255 if byte in b"}]" else byte for byte in range(256))
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{}[]")
_DIGITS = re.compile(rb"[0-9]+")


def check_size(body: bytes) -> None:
    """Raise BadRequest where `body`, parsed, would take many times its own size in memory."""
    figures = _Figures(wide=_is_wide(body))
    most = _MOST_TIMES * len(body) + _FREE_BYTES
    for number, piece in enumerate(pieces_of(body), 1):
        figures.add(piece)
        if figures.parsed_bytes > most:
            if _unclosed(body):
                raise BadRequest("The request body is not valid JSON: its brackets don't match.")
            name = _field_at(body, number - 1) or _field_at(body, number)
            where = f", in '{name}'" if name else ""
            raise BadRequest(
                f"The request body holds too many values for its size{where}. Send fewer and longer ones.",
                name,
                "too_many_values",
            )


def check_nesting(text: str) -> str:
    """Return `text`, JSON that may be cut short, if every parser can take it. Raises ValueError."""
    if len(text) <= MAX_DIGITS and text.count("{") + text.count("[") <= MAX_DEPTH:
        return text
    outside = list(chain.from_iterable(piece.outside for piece in pieces_of(text.encode())))
    if max(accumulate(_steps(outside)), default=0) > MAX_DEPTH:
        raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep")
    if max(map(len, _DIGITS.findall(b'"'.join(outside))), default=0) > MAX_DIGITS:
        raise ValueError(f"must hold no number of more than {MAX_DIGITS} digits")
    return text


def is_shallow(value: Any, most: int = MAX_DEPTH) -> bool:
    """Whether a parsed value is nested at most `most` levels deep."""
    level = [value]
    for _ in range(most + 1):
        level = [one for one in level if isinstance(one, (dict, list))]
        if not level:
            return True
        level = list(chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level))
    return False


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of JSON text, split at the quotes of its strings. `start` is where it begins in the text."""

    start: int
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
    objects: int = 0
    fields: int = 0
    names: set[bytes] = field(default_factory=set)
    long_names: int = 0

    def add(self, piece: Piece) -> None:
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


def pieces_of(text: bytes) -> Iterator[Piece]:
    """Yield the pieces of JSON text. Each escaped quote or backslash is replaced by two other characters."""
    if b"\\" in text:  # without those, every other quote ends a string
        text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    inside = False
    for start in range(0, len(text), _PIECE_BYTES):
        parts = text[start : start + _PIECE_BYTES].split(b'"')
        yield Piece(start, parts, inside)
        inside ^= not len(parts) % 2
        time.sleep(0)  # gives the GIL to other threads now, and not after 5 ms


def _unclosed(body: bytes) -> int:
    """The number of arrays and objects in `body` that are not closed. Negative if more are closed than opened."""
    return sum(sum(_steps(piece.outside)) for piece in pieces_of(body))


def _steps(outside: list[bytes]) -> array[int]:
    """Return 1 for each bracket that opens, -1 for each that closes."""
    return array("b", b"".join(outside).translate(_STEPS, _NO_BRACKETS))


def _field_at(body: bytes, pieces: int) -> str | None:
    """Return the body's field that its first `pieces` pieces end in, or None where there is none."""
    depth, name, text = 0, b"", b""
    for _, piece in zip(range(pieces), pieces_of(body), strict=False):
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
