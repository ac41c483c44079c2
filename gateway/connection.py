"""uvicorn's HTTP/1.1 connection, with bounds on a head, its size and how long it may take, and on who does not read.

The parser gathers a header until its end, however far that is and whenever it comes, before anybody is asked for a
key. Bodies are bounded by `gateway.middleware`, a body that stalls by the route that reads it, and a connection that
is idle between two requests by uvicorn.
"""

from __future__ import annotations

import asyncio

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536
"""What uvicorn's other parser allows; common proxies take 8 to 32 KiB. The packet that a head begins in comes on top,
so that one with a body in front of it is not counted."""

HEAD_TIMEOUT_S = 60.0
"""From the connection, or the first byte of a later request, to the end of the head; what nginx allows."""

WRITE_TIMEOUT_S = 60.0
"""How long a client may take none of what waits for it; nginx allows as much. Else a stream that nobody reads would
keep its place in the engine."""


class Connection(HttpToolsProtocol):
    """See the module."""

    _late: asyncio.TimerHandle | None = None
    _got_on = False
    """The last packet had some of a body, or a beginning or an end: the parser gathers nothing older than it."""
    _gathered_bytes = 0
    _stalled: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._got_on = False
        super().data_received(data)
        self._gathered_bytes = 0 if self._got_on else self._gathered_bytes + len(data)
        if self._gathered_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"The request's headers are larger than the limit of {MAX_HEAD_BYTES} bytes."
            self._refuse(b"431 Request Header Fields Too Large", message, "headers_too_large")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def _watch_reader(self, waiting_bytes: int) -> None:
        """Look after a while whether the client has taken any of what waits, to which nothing is added meanwhile."""
        self._stalled = self.loop.call_later(WRITE_TIMEOUT_S, self._end_if_stalled, waiting_bytes)

    def _end_if_stalled(self, waiting_bytes: int) -> None:
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes < waiting_bytes:
            self._watch_reader(left_bytes)
        else:
            self._stalled = None
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def on_message_begin(self) -> None:
        self._got_on = True
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._got_on = True
        self._stop_timer()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def on_body(self, body: bytes) -> None:
        self._got_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._got_on = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; uvicorn's own words would be plain text."""
        self._refuse(b"400 Bad Request", msg, "invalid_http")

    def _refuse(self, status: bytes, message: str, code: str) -> None:
        """Close the connection, with a word unless an answer is on its way."""
        if self.cycle is None or self.cycle.response_complete:
            fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            body = orjson.dumps({"error": fields})
            self.transport.write(
                b"HTTP/1.1 %b\r\nx-should-retry: false\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)
            )
        self.transport.close()
