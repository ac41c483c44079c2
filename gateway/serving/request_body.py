"""The body of an HTTP/1.1 request: where it ends, and what of it is content (RFC 9112, 6 and 7.1).

Both kinds take content off the front of a connection's bytes and never more than their own. `Refusal` is raised where
the framing is broken; what follows can't be distinguished from a request then.
"""

from __future__ import annotations

import re
from typing import Protocol

from gateway.serving.request_head import MAX_FIELDS, Head, Refusal, check_trailer, has_fault

MAX_CHUNKS = 65_536
"""Chunks of one body. Each costs about a microsecond, however small it is."""
MAX_CHUNK_LINE_BYTES = 256
"""Of a chunk's size and its extensions, which are ignored."""
MAX_TRAILER_BYTES = 8_192

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]{0,255};[\t -~\x80-\xff]{0,255})?\r\n")


class Body(Protocol):
    """Where a request's body is in the bytes that follow its head."""

    complete: bool

    def take(self, buffer: bytearray) -> bytes:
        """Remove what has come of the body from `buffer`, and return its content. Raises Refusal."""


def body_of(head: Head) -> Body:
    """Return the body that a head announces."""
    return _ChunkedBody() if head.chunked else _MeasuredBody(head.length)


class _MeasuredBody:
    """A body of Content-Length bytes; none is a length of 0."""

    def __init__(self, length: int) -> None:
        self._left_bytes = length
        self.complete = length == 0

    def take(self, buffer: bytearray) -> bytes:
        content = bytes(buffer[: self._left_bytes])
        del buffer[: self._left_bytes]
        self._left_bytes -= len(content)
        self.complete = self._left_bytes == 0
        return content


class _ChunkedBody:
    """A body in chunks."""

    def __init__(self) -> None:
        self.complete = False
        self._left_bytes = 0
        """Of the present chunk."""
        self._in_chunk = False
        """Its content or the line break behind it is still to come."""
        self._last = False
        """The chunk of size 0 has come, and the trailer is next."""
        self._chunks = 0

    def take(self, buffer: bytearray) -> bytes:
        pieces: list[bytes] = []
        at = 0
        while not self.complete:
            if self._last:
                next_at = self._take_trailer(buffer, at)
            elif self._in_chunk:
                piece = bytes(buffer[at : at + self._left_bytes])
                pieces.append(piece)
                self._left_bytes -= len(piece)
                at += len(piece)
                next_at = self._take_break(buffer, at)
            else:
                next_at = self._take_line(buffer, at)
            if next_at is None:
                break
            at = next_at
        del buffer[:at]
        return b"".join(pieces)

    def _take_line(self, buffer: bytearray, at: int) -> int | None:
        match = _CHUNK_LINE.match(buffer, at, at + MAX_CHUNK_LINE_BYTES)
        if match is None:
            if len(buffer) - at >= MAX_CHUNK_LINE_BYTES or buffer.find(b"\n", at) >= 0:
                raise Refusal("A chunk does not begin with its size in hexadecimal digits and CRLF.")
            return None
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise Refusal(f"The request's body has more than {MAX_CHUNKS} chunks.")
        self._left_bytes = int(match[1], 16)
        self._last = self._left_bytes == 0
        self._in_chunk = not self._last
        return match.end()

    def _take_break(self, buffer: bytearray, at: int) -> int | None:
        if self._left_bytes > 0 or len(buffer) < at + 2:
            if self._left_bytes == 0 and bytes(buffer[at:]) not in (b"", b"\r"):
                raise Refusal("A chunk is longer than its size.")
            return None
        if buffer[at : at + 2] != b"\r\n":
            raise Refusal("A chunk is longer than its size.")
        self._in_chunk = False
        return at + 2

    def _take_trailer(self, buffer: bytearray, at: int) -> int | None:
        if buffer.startswith(b"\r\n", at):
            self.complete = True
            return at + 2
        end = buffer.find(b"\r\n\r\n", at, at + MAX_TRAILER_BYTES)
        if has_fault(buffer, at, len(buffer) if end < 0 else end + 2):
            raise Refusal("The request's trailer has a control character, or a line break that is not CRLF.")
        if end >= 0:
            section = bytes(buffer[at:end])
            if section.count(b"\r\n") >= MAX_FIELDS:
                raise Refusal(f"The request's trailer has more than {MAX_FIELDS} fields.")
            check_trailer(section)
            self.complete = True
            return end + 4
        if len(buffer) - at >= MAX_TRAILER_BYTES:
            raise Refusal(f"The request's trailer is larger than the limit of {MAX_TRAILER_BYTES} bytes.")
        return None
