"""One request and its answer, as an ASGI application sees them (spec version 2.3).

`receive` hands out the body as it comes, and then the client's departure. What ends a body before its end is raised
once, by the `receive` that would have returned it; later calls wait for the departure. `send` writes the answer in
HTTP/1.1, or for a client of HTTP/1.0 without chunks.
"""

from __future__ import annotations

import asyncio
import logging
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Scope

from gateway.errors import GatewayError, InternalError
from gateway.serving.request_head import Head

if TYPE_CHECKING:
    from gateway.serving.connection import Connection

log = logging.getLogger(__name__)

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BAD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}


class Exchange:
    """One request and its response. The connection passes in the body, and learns how the response ended."""

    def __init__(self, connection: Connection, head: Head, scope: Scope) -> None:
        self._connection = connection
        self._scope = scope
        self._no_chunks = head.minor == 0
        self._head_only = head.method == "HEAD"
        self._expects_continue = head.expects_continue
        self._happened = asyncio.Event()
        self.content = bytearray()
        """Of the body; it has come and was not asked for yet."""
        self.complete = False
        """All of the body has come."""
        self._complete_told = False
        self._fault: GatewayError | None = None
        self._client_left = False
        self._lost = False
        self.started = False
        self.answered = False
        self.persistent = head.persistent
        """The connection may stay open after the answer."""
        self._chunked = False
        self._left_bytes: int | None = None
        """Of an answer with a length."""

    def extend(self, content: bytes, complete: bool) -> None:
        """Add what came of the body."""
        self.content += content
        self.complete = complete
        self._happened.set()

    def fail(self, fault: GatewayError) -> None:
        """Note that the rest of the body can't be read."""
        self._fault = fault
        self._happened.set()

    def leave(self, *, lost: bool) -> None:
        """Note that the client will send no more. Unless the connection is `lost`, it may still read."""
        self._client_left = True
        self._lost = lost
        self._happened.set()

    async def run(self, app: ASGIApp) -> None:
        """Run the application. The connection ends where the application does not end the answer."""
        try:
            await app(self._scope, self.receive, self.send)
            if not self.started and not self._client_left:
                raise RuntimeError("The application returned without an answer.")
        except Exception:
            log.exception("request failed")
            if not self.started:
                await self._send_error(InternalError())
        finally:
            if not self.answered and not self._lost:
                self._connection.break_off(cut=self.started and not self._chunked and self._left_bytes is None)

    async def _send_error(self, error: GatewayError) -> None:
        body = error.body()
        headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers()
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    async def receive(self) -> Message:
        """Return the next piece of the body, or the departure. Raises what ended the body, once."""
        while not self._lost and not self.answered:
            if self.content or (self.complete and not self._complete_told):
                content = bytes(self.content)
                self.content.clear()
                self._complete_told = self.complete
                self._connection.read_on()
                return {"type": "http.request", "body": content, "more_body": not self._complete_told}
            if self._fault is not None:
                fault, self._fault = self._fault, None
                raise fault
            if self._client_left:
                break
            if self._expects_continue:
                self._expects_continue = False
                if not self.started and not self.complete:
                    self._connection.write(_CONTINUE)
            self._connection.read_on()
            self._happened.clear()
            await self._happened.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Write a part of the answer. Raises RuntimeError for one that is out of order or has a bad header."""
        connection = self._connection
        if connection.flow.write_paused and not self._lost:
            await connection.flow.drain()
        if self._lost:
            return
        kind = message["type"]
        if self.answered or kind != ("http.response.body" if self.started else "http.response.start"):
            raise RuntimeError(f"unexpected ASGI message {kind!r}")
        if not self.started:
            connection.write(self._start(message))
            return
        content = message.get("body", b"")
        ends = not message.get("more_body", False)
        if self._left_bytes is not None:
            self._left_bytes -= len(content)
            if self._left_bytes < 0 or (ends and self._left_bytes > 0 and not self._head_only):
                raise RuntimeError("The answer does not have the length of its Content-Length.")
        if self._chunked:
            content = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
            content = content + b"0\r\n\r\n" if ends else content
        if content and not self._head_only:
            connection.write(content)
        if ends:
            self.answered = True
            self._happened.set()
            connection.end_answer()

    def _start(self, message: Message) -> bytes:
        """Return the answer's head."""
        status: int = message["status"]
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        self.persistent = self.persistent and self.complete and self._connection.persistent
        for name, value in [*self._connection.default_headers, *message.get("headers", ())]:
            if _NAME.fullmatch(name) is None or _BAD_VALUE.search(value) is not None:
                raise RuntimeError(f"The answer's header {name!r} is malformed.")
            lower = name.lower()
            if lower == b"connection":  # the only option of ours
                self.persistent = self.persistent and b"close" not in value.lower()
                continue
            if lower == b"transfer-encoding":
                continue
            if lower == b"content-length":
                self._left_bytes = int(value)
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.persistent:
            lines.append(b"connection: close\r\n")
        if status < 200 or status in (204, 304):
            self._head_only = True
        if self._left_bytes is None and not self._head_only and not self._no_chunks:
            self._chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        self.started = True
        return b"".join(lines)
