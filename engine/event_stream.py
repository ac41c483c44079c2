"""The bytes of an answer as JSON frames: server-sent events in any of their spellings, or one JSON document. No I/O.

Servers differ in line ends (LF, CRLF, CR), in the space after the colon, in other fields between the data lines, in
comments, a byte order mark, blank lines that are missing, and frames that span several data lines. Some answer a
stream request with one JSON document, some put a JSON document on a line of its own to tell of an error. A frame is
handed over as soon as its JSON is whole, without waiting for the blank line behind it.

Raises AttemptFailed for frames that are not JSON. What is no stream at all, a page of HTML say, has no frames.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson

from engine.pool import AttemptFailed

_MAX_FRAME_BYTES = 32 * 2**20
"""The longest sane frame is a whole answer with the logprobs of every token."""
_MAX_ATTEMPTS = 64
"""So often a frame of several lines is parsed before its end is known, or long ones would take quadratic time."""
_BOM = b"\xef\xbb\xbf"


class Frames:
    """Cuts an answer, arriving in pieces of any size, into parsed frames."""

    def __init__(self) -> None:
        self.done = False
        """[DONE] was seen. What follows it is dropped."""
        self.is_document = False
        """The answer began with a JSON document instead of an event; it is complete."""
        self._line = bytearray()
        """A line whose end has not arrived."""
        self._frame = bytearray()
        """The data lines, or the JSON document, whose JSON is not whole yet."""
        self._attempts = 0
        self._in_document = False
        self._after_cr = False
        self._begun = False
        self._framed = False

    def feed(self, data: bytes) -> list[Any]:
        """Return the frames that `data` completes. Raises AttemptFailed."""
        if b"\r" in data or self._after_cr:
            if self._after_cr and data.startswith(b"\n"):
                data = data[1:]
            self._after_cr = data.endswith(b"\r") or (self._after_cr and not data)
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if len(self._line) + len(self._frame) + len(data) > _MAX_FRAME_BYTES:
            raise AttemptFailed("failed", "sent a frame without end")
        if b"\n" not in data:
            self._line += data
            return []
        *lines, rest = (bytes(self._line) + data).split(b"\n")
        self._line = bytearray(rest)
        frames: list[Any] = []
        for line in lines:
            if self.done:
                break
            frames += self._read_line(line)
        return frames

    def end(self) -> list[Any]:
        """Return the frames that the end of the answer completes: the last line may lack its own. Raises AttemptFailed.

        A frame that is cut off is none.
        """
        frames = self.feed(b"\n")
        return frames + self._try() if self._frame and not self.done else frames

    def _read_line(self, line: bytes) -> list[Any]:
        if not self._begun:
            line = line.removeprefix(_BOM)
            self._begun = bool(line)
        if self._in_document:
            return self._add(line)
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                self.done = True
                return []
            return self._add(data) if data else []
        if line.startswith(b"error:"):  # llama.cpp's own field
            error = _parse(line[6:].strip())
            return [{"error": error if isinstance(error, dict) else {}} | {"object": "error"}]
        if line.lstrip().startswith((b"{", b"[")) and not self._frame:
            self._in_document = True
            return self._add(line)
        if self._frame and not line.strip():
            frames = self._try()
            if not frames:
                raise AttemptFailed("failed", "sent a frame that is not JSON")
            return frames
        return []  # a comment, or another field

    def _add(self, data: bytes) -> list[Any]:
        """Add a line to the frame; return the frame if that makes it whole."""
        if self._frame:
            self._frame += b"\n"
        self._frame += data
        if not self._in_document and not self._frame.startswith((b"{", b"[", b"null")):
            raise AttemptFailed("failed", "sent a frame that is not JSON")
        if self._attempts < _MAX_ATTEMPTS and data.rstrip().endswith((b"}", b"]", b"null")):
            return self._try()
        return []

    def _try(self) -> list[Any]:
        """Return the frame if it is whole."""
        frame = _parse(bytes(self._frame))
        self._attempts += 1
        if frame is _BROKEN:
            return []
        self.is_document |= self._in_document and not self._framed
        self._framed = True
        self._frame.clear()
        self._attempts = 0
        self._in_document = False
        return [frame]


_BROKEN = object()


def _parse(data: bytes) -> Any:
    """Return the parsed JSON, or _BROKEN. Halves of surrogate pairs, which only Python's parser takes, are kept."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if b"\\u" in data:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(data)
        return _BROKEN
