"""The bytes of an answer as JSON frames: server-sent events in any of their spellings, or one JSON document. No I/O.

Servers differ in line ends (LF, CRLF, CR), in the space after the colon, in other fields between the data lines, in
comments, a byte order mark, blank lines that are missing, and frames that span several data lines. Some answer a
stream request with one JSON document, some put a JSON document on a line of its own to report an error. A frame is
handed over as soon as its JSON is whole, without waiting for the blank line behind it.

Frames that are not JSON are an AttemptFailed, and end the answer. What is no stream at all, a page of HTML say, has no
frames.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import orjson

from engine.remote.pool import AttemptFailed

_MAX_FRAME_BYTES = 32 * 2**20
"""The longest valid frame is a whole response with the logprobs of every token."""
_MAX_ATTEMPTS = 64
"""Limit on attempts to parse a frame of several lines before its end, so that time stays linear."""
_BOM = b"\xef\xbb\xbf"


class Frames:
    """Splits a response, received in chunks of any size, into parsed frames."""

    def __init__(self) -> None:
        self.done = False
        """[DONE] has been received. Anything after it is ignored."""
        self.is_document = False
        """The response started with a complete JSON document instead of an event."""
        self._line = bytearray()
        """An incomplete line."""
        self._frame = bytearray()
        """Incomplete JSON: data lines or a document."""
        self._attempts = 0
        self._in_document = False
        self._after_cr = False
        self._is_error = False
        """The type of the next event is `error`."""
        self._begun = False
        self._framed = False

    def read(self, data: bytes) -> tuple[list[Any], AttemptFailed | None]:
        """Return the frames that `data` completes, and a failure if there is one. Empty `data` is the end."""
        frames: list[Any] = []
        try:
            frames.extend(self._cut(data) if data else self._close())
        except AttemptFailed as failure:
            return frames, failure
        return frames, None

    def feed(self, data: bytes) -> list[Any]:
        """Return the frames that `data` completes. Raises AttemptFailed."""
        return list(self._cut(data))

    def end(self) -> list[Any]:
        """Return the frames that the end of the response completes. Raises AttemptFailed.

        The last line may lack its line end. An incomplete frame is dropped.
        """
        return list(self._close())

    def _cut(self, data: bytes) -> Iterator[Any]:
        if b"\r" in data or self._after_cr:
            if self._after_cr and data.startswith(b"\n"):
                data = data[1:]
                self._after_cr = False
            self._after_cr = data.endswith(b"\r") or (self._after_cr and not data)
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if len(self._line) + len(self._frame) + len(data) > _MAX_FRAME_BYTES:
            raise AttemptFailed("failed", "sent a frame without end")
        if b"\n" not in data:
            self._line += data
            return
        *lines, rest = (bytes(self._line) + data).split(b"\n")
        self._line = bytearray(rest)
        for line in lines:
            if self.done:
                break
            yield from self._read_line(line)

    def _close(self) -> Iterator[Any]:
        yield from self._cut(b"\n")
        if self._frame and not self.done:
            yield from self._try()

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
        if line.startswith(b"event:"):
            self._is_error = line[6:].strip() == b"error"
            return []
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
        """Add a line to the frame. Returns the frame if it is complete."""
        if self._frame:
            self._frame += b"\n"
        self._frame += data
        if not self._in_document and not self._frame.startswith((b"{", b"[", b"null")):
            raise AttemptFailed("failed", "sent a frame that is not JSON")
        if self._attempts < _MAX_ATTEMPTS and data.rstrip().endswith((b"}", b"]", b"null")):
            return self._try()
        return []

    def _try(self) -> list[Any]:
        """Return the frame if its JSON is complete."""
        frame = _parse(bytes(self._frame))
        self._attempts += 1
        if frame is _BROKEN:
            return []
        self.is_document |= self._in_document and not self._framed
        self._framed = True
        self._frame.clear()
        self._attempts = 0
        self._in_document = False
        if self._is_error and not (isinstance(frame, dict) and frame.get("error")):
            frame = {"object": "error", "error": frame if isinstance(frame, dict) else {}}
        self._is_error = False
        return [frame]


_BROKEN = object()


def _parse(data: bytes) -> Any:
    """Return the parsed JSON, or _BROKEN. Half surrogate pairs, NaN and Infinity are accepted, which needs Python's
    parser."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if b"\\u" in data or b"Infinity" in data or b"NaN" in data:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(data)
        return _BROKEN
