"""One client's connection: the only place where bytes become requests, and where it is decided what closes it.

Heads are read by `gateway.serving.request_head`, bodies by `gateway.serving.request_body`; uvicorn's parsers are not
used. One request is served at a time. What comes behind it waits unparsed until its answer is complete, and reading
continues meanwhile, so that the client's departure is always seen. After a refusal, a body that was not read to its
end, an answer that broke off or a flood of pipelined bytes, the connection closes and nothing that follows is parsed.

Every state in which no request is running has a deadline that no byte sent can put off:

    state                                    deadline
    new, nothing or half a head sent         HEAD_TIMEOUT_S from the connection
    after an answer                          `server.idle_connection_s` from the answer; an empty line changes nothing
    half of a later head                     HEAD_TIMEOUT_S from its first byte
    body of a running request                `server.body_timeout_s` of waiting for it, kept by `serving.middleware`
    client reads nothing of what waits       WRITE_TIMEOUT_S for each MIN_READ_BYTES
    closing, until the client closes too     LINGER_S once everything is written

A client that closes its sending half has left, as a running request sees it; what is answered all the same is
still sent. Where too many clients are connected, `gateway.serving.connection_limit` closes those that have waited
longest. At the end of a shutdown, a request whose body is not complete is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
from http import HTTPStatus
from typing import Any

from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from gateway.errors import BadRequest, Unavailable
from gateway.serving.asgi import Exchange
from gateway.serving.connection_limit import ConnectionLimit
from gateway.serving.middleware import new_request_id
from gateway.serving.refused_heads import RefusedHeads
from gateway.serving.request_body import Body, body_of
from gateway.serving.request_head import MAX_HEAD_BYTES, Head, HeadReader, Refusal

__all__ = ["HEAD_TIMEOUT_S", "MAX_HEAD_BYTES", "WRITE_TIMEOUT_S", "Connection"]

HEAD_TIMEOUT_S = 60.0
"""From the connection, or the first byte of a later request, to the end of the head; what nginx allows."""

WRITE_TIMEOUT_S = 60.0
"""How long a client may take to read MIN_READ_BYTES of what waits for it; nginx allows as much. A stream that no client
reads would keep its place in the engine."""

MIN_READ_BYTES = 16_384
"""Fewer than this is no progress, unless it is all that waits: one byte a minute must not hold a connection."""

LINGER_S = 2.0
"""How long a connection is read, and what comes dropped, after the last answer was written. Closing at once would
reset it, and the client could lose the answer (RFC 9112, 9.6)."""

MAX_UNREAD_BYTES = 65_536
"""Content of a body that waits for the application; reading pauses above."""

MAX_PIPELINED_BYTES = 65_536
"""Bytes that may wait behind a running request. More of them are dropped, and the connection closes after the answer;
to pause reading would hide that the client has left."""


class Connection(asyncio.Protocol):
    """One HTTP connection of a client. Built by uvicorn's server, which asks for `shutdown` at its end."""

    transport: asyncio.Transport
    flow: FlowControl

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limit: ConnectionLimit,
        refused: RefusedHeads,
    ) -> None:
        if not config.loaded:
            config.load()
        self._app = config.loaded_app
        self._idle_timeout_s = config.timeout_keep_alive
        self._server_state = server_state
        self._app_state = app_state
        self._limit = limit
        self._refused = refused
        self._loop = _loop or asyncio.get_event_loop()
        self._context = contextvars.copy_context()
        """Of every request: one must not see what another has set."""
        self._buffer = bytearray()
        """Has come and was not parsed yet."""
        self._reader = HeadReader()
        self._new = True
        """No request has come yet."""
        self._exchange: Exchange | None = None
        self._body: Body | None = None
        self.persistent = True
        """Another request may follow the running one."""
        self._deaf = False
        """What comes is dropped."""
        self._closing = False
        self._at_end = False
        """The client sends no more."""
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of every answer: the date."""
        return self._server_state.default_headers

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream is all we get
        self.transport = transport
        self.flow = FlowControl(transport)
        self._server = get_local_addr(transport)
        self._client = get_remote_addr(transport)
        self._server_state.connections.add(self)  # type: ignore[arg-type]  # of the kinds that uvicorn knows
        self._expect_by(HEAD_TIMEOUT_S)
        self._limit.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._deaf:
            self._buffer += data
            self._advance()

    def eof_received(self) -> bool:
        self._at_end = True
        if self._exchange is not None:
            self._exchange.leave(lost=False)
        else:
            self._advance()  # closes, unless a whole request is left
        return not self._closing

    def connection_lost(self, exc: Exception | None) -> None:
        self._server_state.connections.discard(self)
        self._limit.discard(self)
        self._stop_deadline()
        self._stop_watching()
        self._deaf = self._closing = True
        if self._exchange is not None:
            self._exchange.leave(lost=True)
        self.flow.resume_writing()

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_watching()
        self.flow.resume_writing()

    # What the limit of connections calls

    def abort(self) -> None:
        """Close at once, to make room for another client."""
        self.transport.abort()

    # What uvicorn's server calls

    def shutdown(self) -> None:
        """Close once the running request, if there is one, is answered. It fails if its body is not complete."""
        self.persistent = False
        if self._exchange is None:
            self._close()
        elif not self._exchange.complete:
            self._drop_what_comes()
            self._exchange.fail(Unavailable("The server shut down before the request was complete.", retry_after_s=1.0))

    # What the exchange calls

    def write(self, data: bytes) -> None:
        """Send bytes of an answer."""
        self.transport.write(data)

    def read_on(self) -> None:
        """Go on with the body of the running request."""
        if not self._deaf:
            self._advance()
        if not self._closing and not self.transport.is_closing():
            self.flow.resume_reading()

    def end_answer(self) -> None:
        """Go on to the next request, or close."""
        exchange = self._exchange
        assert exchange is not None
        self._server_state.total_requests += 1
        self._end_exchange()
        if not exchange.persistent or not exchange.complete or not self.persistent:
            if exchange.complete and not self._buffer and not self._deaf:
                self._close()  # nothing is on its way that a reset could answer
            else:
                self._linger()
            return
        self.flow.resume_reading()
        self._reader = HeadReader()
        self._expect_by(self._idle_timeout_s)
        if self._buffer:
            self._loop.call_soon(self._advance, context=self._context)
        elif self._at_end:
            self._close()

    def break_off(self, *, cut: bool) -> None:
        """Close in the middle of an answer. `cut` resets the connection: its end would look like the answer's."""
        self._end_exchange()
        if cut:
            self.transport.abort()
        else:
            self._linger()

    def _end_exchange(self) -> None:
        self._exchange = self._body = None
        self._limit.end(self)

    def _hold(self, key_id: str) -> None:
        """Keep the connection until the request of this key is answered. Raises what the limit raises."""
        self._limit.begin(self, key_id)

    # From bytes to requests

    def _advance(self) -> None:
        """Parse as much of what has come as the present state allows."""
        while not self._deaf:
            try:
                if self._exchange is None:
                    begun = self._reader.begun
                    head = self._reader.take(self._buffer)
                    if head is None:
                        self._await_head(begun)
                        return
                    self._begin(head)
                elif self._exchange.complete:
                    self._hold_pipelined()
                    return
                elif not self._take_body(self._exchange):
                    return
            except Refusal as refusal:
                self._refuse(refusal)

    def _await_head(self, begun: bool) -> None:
        if self._at_end:
            self._close()
        elif self._reader.begun and not begun and not self._new:
            self._expect_by(HEAD_TIMEOUT_S)

    def _begin(self, head: Head) -> None:
        self._new = False
        self._stop_deadline()
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1" if head.minor else "1.0",
            "server": self._server,
            "client": self._client,
            "scheme": "http",
            "root_path": "",
            "headers": head.headers,
            "state": self._app_state | {"hold_connection": self._hold},
            "method": head.method,
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query,
        }
        self._body = body_of(head)
        self._exchange = Exchange(self, head, scope)
        self._exchange.complete = self._body.complete
        if self._at_end:
            self._exchange.leave(lost=False)
        task = self._loop.create_task(self._exchange.run(self._app), context=self._context.copy())
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def _take_body(self, exchange: Exchange) -> bool:
        """Hand on what has come of the body. Returns whether it is complete."""
        assert self._body is not None
        if len(exchange.content) > MAX_UNREAD_BYTES:
            self.flow.pause_reading()
            return False
        if self._buffer:
            content = self._body.take(self._buffer)
            if content or self._body.complete:
                exchange.extend(content, self._body.complete)
        return self._body.complete

    def _hold_pipelined(self) -> None:
        if len(self._buffer) > MAX_PIPELINED_BYTES:
            self._drop_what_comes()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what is no request, or fail the request whose body is broken."""
        self._drop_what_comes()
        error = BadRequest(refusal.message, code=refusal.code)
        if self._exchange is not None:
            self.flow.pause_reading()  # until the application has seen it, and asks for more
            self._exchange.fail(error)
            return
        request_id = new_request_id()
        self._refused.record(refusal.status, error, request_id, self._client[0] if self._client else None)
        lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}", "connection: close"]
        body = error.body()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": request_id}
        headers |= error.headers()
        lines += [f"{name.lower()}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self._linger()

    def _drop_what_comes(self) -> None:
        self._deaf = True
        self.persistent = False
        self._buffer.clear()

    # Deadlines and closing

    def _expect_by(self, seconds: float) -> None:
        self._stop_deadline()
        self._deadline = self._loop.call_later(seconds, self._end_late)

    def _end_late(self) -> None:
        if self._reader.begun:
            self._refuse(Refusal("The request's headers did not arrive in time.", 408, "request_timeout"))
        else:
            self._close()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _linger(self) -> None:
        """Close the sending half, and the rest once the client has closed or LINGER_S are over."""
        if self._closing:
            return
        self._drop_what_comes()
        self._closing = True
        if self._at_end or self.transport.is_closing():
            self._close()
            return
        self.flow.resume_reading()
        self.transport.write_eof()
        self._see_off(None)

    def _close(self) -> None:
        """Close once what waits is written."""
        self._drop_what_comes()
        self._closing = True
        self.transport.close()
        self._see_off(None)

    def _see_off(self, waiting_bytes: int | None) -> None:
        """End the connection when all is written and LINGER_S are over, or when the client does not read."""
        self._stop_deadline()
        left_bytes = self.transport.get_write_buffer_size()
        if waiting_bytes is not None and (left_bytes == 0 or left_bytes > waiting_bytes - MIN_READ_BYTES):
            self.transport.abort()
            return
        wait_s = WRITE_TIMEOUT_S if left_bytes else LINGER_S
        self._deadline = self._loop.call_later(wait_s, self._see_off, left_bytes)

    def _watch_reader(self, waiting_bytes: int) -> None:
        """Look after a while how much the client has taken of what waits, to which nothing is added meanwhile."""
        self._stalled = self._loop.call_later(WRITE_TIMEOUT_S, self._end_if_stalled, waiting_bytes)

    def _end_if_stalled(self, waiting_bytes: int) -> None:
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes > waiting_bytes - MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._watch_reader(left_bytes)

    def _stop_watching(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
