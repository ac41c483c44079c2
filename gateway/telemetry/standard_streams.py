"""Standard input, output and error that can fail without stopping the process.

A pipe that is not read makes its writer wait, and a gateway writes its log on the event loop: one log collector that
hangs would stop every request. So a stream here waits a moment at most, then loses lines and counts them. A disk that
is full and a reader that is gone are no errors either. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import Any

_GRACE_S = 0.05
"""How long a write waits for a reader that is merely slow; once in `_REST_S`."""
_REST_S = 1.0
_PIECE_BYTES = select.PIPE_BUF
"""A pipe that can be written to takes this much without waiting."""


class LossyStream(io.TextIOBase):
    """A text stream to a file descriptor that never waits for long and never raises. Has no buffer."""

    def __init__(self, stream: Any) -> None:
        """Take the place of `stream`. Raises OSError where it has no file descriptor."""
        stream.flush()
        self._fd: int = stream.fileno()
        self._encoding: str = stream.encoding or "utf-8"
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._no_grace_until = 0.0
        self._torn = False
        """The last write was broken off within a line."""
        self._lost_lines = 0

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Write, or lose, `text`. Returns its length."""
        data = text.encode(self._encoding, "backslashreplace")
        if self._torn:
            data = b"\n" + data
        place = 0
        try:
            while place < len(data) and self._takes():
                place += os.write(self._fd, data[place : place + _PIECE_BYTES])
        except OSError:  # the disk is full, or the reader is gone
            pass
        if place < len(data):
            self._lost_lines += data.count(b"\n", place)
            self._torn = self._torn or place > 0
        elif data:
            self._torn = False
        return len(text)

    def take_lost_lines(self) -> int:
        """The number of lines lost since the last call, once the stream can be written again. 0 until then."""
        if not self._lost_lines or not self._poll.poll(0):
            return 0
        lost, self._lost_lines = self._lost_lines, 0
        return lost

    def _takes(self) -> bool:
        """Whether a piece can be written without waiting."""
        if self._poll.poll(0):
            return True
        now = time.monotonic()
        if now < self._no_grace_until:
            return False
        self._no_grace_until = now + _REST_S
        return bool(self._poll.poll(_GRACE_S * 1000))


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Have everything that is printed or logged by this process go through streams that never stop it."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        with contextlib.suppress(OSError):  # it is not a file, as in a test
            setattr(sys, name, LossyStream(getattr(sys, name)))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def prepare_streams() -> None:
    """Have standard streams that a command can print anything to.

    Streams that the process was started without are opened: the next file or socket would take their numbers. What an
    encoding does not have is escaped.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Let what was printed and could not be written go nowhere, instead of being tried again at the end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
