"""A transport for httpx: HTTP/1.1 on asyncio's own protocols, parsed by httptools.

For streams that come a token per chunk. httpx's own transport takes 65 us for each (h11 and anyio, both in Python),
this one 17, of which the system call is most. Connections are kept for a few seconds and used again; one that the
server closes meanwhile is noticed at once, and one that breaks under a request before any answer is replaced, once.
There is no bound on their number. What has arrived of a response, but was not read, is at hand without waiting in the
extension `arrived`. Leaves out proxies, HTTP/2, upgrades, request bodies that come in pieces, and HEAD.
Fails with httpx's exceptions. Leaving a response before its end closes the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import cast

import httptools
import httpx

_MAX_HEAD_BYTES = 65_536
_HIGH_WATER_BYTES = 16 * 2**20
"""What may wait to be read before the server is made to wait. An engine generates no slower for it, so a sane answer
is taken in whole: what stayed in the kernel's buffers could not be counted when the reader leaves."""
_Origin = tuple[str, str, int]


class Http1Transport(httpx.AsyncBaseTransport):
    """See the module."""

    def __init__(self, context: ssl.SSLContext | None, *, keepalive_s: float, max_idle: int = 64) -> None:
        """`context` is for https; at most `max_idle` connections are kept per server, for `keepalive_s` each."""
        self._context = context
        self._keepalive_s = keepalive_s
        self._max_idle = max_idle
        self._idle: dict[_Origin, list[_Connection]] = {}
        self.connections: set[_Connection] = set()
        """All that are open."""
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response when its head is there."""
        url = request.url
        origin = (url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80))
        content = await request.aread()
        lines = [b"%b %b HTTP/1.1" % (request.method.encode(), url.raw_path)]
        lines += [b"%b: %b" % header for header in request.headers.raw]
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        while True:
            connection = self._take(origin)
            fresh = connection is None
            if connection is None:
                connection = await self._connect(origin, request.extensions.get("timeout", {}).get("connect"))
            try:
                await connection.ask(head, content)
            except httpx.RemoteProtocolError:
                connection.abort()
                if fresh or connection.answering:
                    raise
            except BaseException:
                connection.abort()
                raise
            else:
                break
        body = _Body(connection, self, origin)
        extensions = {"arrived": connection.take}
        return httpx.Response(connection.status, headers=connection.headers, stream=body, extensions=extensions)

    def _take(self, origin: _Origin) -> _Connection | None:
        """Return a connection that is still good, the one used last."""
        now = asyncio.get_running_loop().time()
        idle = self._idle.get(origin, [])
        while idle:
            connection = idle.pop()
            if connection.reusable and now - connection.idle_since < self._keepalive_s:
                return connection
            connection.abort()
        return None

    def give_back(self, connection: _Connection, origin: _Origin) -> None:
        """Keep a connection whose response has ended, if it can be used again; else close it."""
        idle = self._idle.setdefault(origin, [])
        if connection.reusable and len(idle) < self._max_idle and not self._closed:
            connection.idle_since = asyncio.get_running_loop().time()
            idle.append(connection)
        else:
            connection.abort()

    async def _connect(self, origin: _Origin, timeout_s: float | None) -> _Connection:
        scheme, host, port = origin
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self.connections), host, port, ssl=self._context if scheme == "https" else None
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout("no connection in time") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        if self._closed:
            connection.abort()
            raise httpx.ConnectError("the transport was closed")
        return connection

    async def aclose(self) -> None:
        """Break every connection; whoever reads from one gets httpx.ReadError."""
        self._closed = True
        for connection in tuple(self.connections):
            connection.abort(httpx.ReadError("the transport was closed"))
        self._idle.clear()
        await asyncio.sleep(0)  # their last callbacks


class _Connection(asyncio.Protocol):
    """One connection, and the response that comes on it now."""

    def __init__(self, connections: set[_Connection]) -> None:
        """`connections` is where it is found for as long as it is open."""
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: httpx.TransportError | None = None
        self.closed = False
        self.idle_since = 0.0
        self._reset()
        self._complete = True

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._head_complete = False
        self._chunks: list[bytes] = []
        self.waiting_bytes = 0
        """Arrived and not read."""
        self._complete = False
        self._keeps_alive = False
        self.answering = False
        """Some of the answer has arrived."""
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    def reusable(self) -> bool:
        """The response has ended, and the server lets the connection be used again."""
        return self._complete and self._keeps_alive and self._error is None

    async def ask(self, head: bytes, content: bytes) -> None:
        """Send a request and wait for the head of its response."""
        self._reset()
        if self._transport is not None and not self.closed:
            self._transport.write(head + content)
        while not self._head_complete:
            await self._wait()

    async def read(self) -> bytes:
        """Return what has arrived of the body, at least a byte; nothing at its end."""
        while not self._chunks:
            if self._complete:
                return b""
            await self._wait()
        return self.take()

    def take(self) -> bytes:
        """Return what has arrived of the body and was not read."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self.waiting_bytes > _HIGH_WATER_BYTES and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self.waiting_bytes = 0
        return data

    async def _wait(self) -> None:
        """Wait until something has happened."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self, error: httpx.TransportError | None = None) -> None:
        """Close the connection now. Idempotent."""
        self._error = self._error or error
        if self._transport is not None and not self.closed:
            self._transport.abort()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._complete:  # nothing was asked
            self.abort(httpx.RemoteProtocolError("an answer to no request"))
            return
        self.answering = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort(httpx.RemoteProtocolError(f"not HTTP ({type(error).__name__})"))
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._connections.discard(self)
        framed = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self.headers)
        if self._head_complete and not framed and error is None and self._error is None:
            self._complete = True  # a body may end with its connection
        self._error = self._error or httpx.RemoteProtocolError("the connection was lost")
        self._wake()

    # httptools' calls

    def on_message_begin(self) -> None:
        if self._complete:  # a second answer
            raise ValueError
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _MAX_HEAD_BYTES:
            raise ValueError
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._head_complete = self.status >= 200  # those before are not the answer yet

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        before, self.waiting_bytes = self.waiting_bytes, self.waiting_bytes + len(body)
        if before <= _HIGH_WATER_BYTES < self.waiting_bytes and self._transport is not None:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._complete = self._head_complete
        self._keeps_alive = self._parser.should_keep_alive()


class _Body(httpx.AsyncByteStream):
    """The body of a response, in pieces as they arrive."""

    def __init__(self, connection: _Connection, transport: Http1Transport, origin: _Origin) -> None:
        self._connection: _Connection | None = connection
        self._transport = transport
        self._origin = origin

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while connection is not None and (data := await connection.read()):
            yield data

    async def aclose(self) -> None:
        """Give the connection back, or close it where the response has not ended. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport.give_back(connection, self._origin)


def make_context(verify: bool, ca_file: str | None) -> ssl.SSLContext:
    """Return what checks servers' certificates. Raises OSError when the authority's file can't be read."""
    context = ssl.create_default_context(cafile=ca_file) if ca_file else httpx.create_ssl_context(trust_env=False)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(NotImplementedError):
        context.set_alpn_protocols(["http/1.1"])
    return context
