"""A transport for httpx: HTTP/1.1 on asyncio's protocols, parsed by httptools.

Written for streams with one token per chunk. `tests.bench.remote_client` measures the CPU time of a `RemoteEngine` with
three clients. aiohttp takes 1.01 times this one's CPU time per streamed token and 1.33 times per answer of one token;
httpx's own transport (h11 and anyio) takes 2.2 and 7.0 times. aiohttp is not used because of the short answers, and
because it reuses connections after doubtful framing: it did so after 6 of 11 such responses, and took bytes that
arrived late after one response for the next response.

The number of connections is not limited. The `arrived` extension of a response returns buffered, unread body bytes
without waiting.

A connection is kept for a few seconds and reused only if all of this holds:

    request           sent completely
    response          ended by its own framing, and allows keep-alive; its body may be unread
    framing           unambiguous for every parser: a length, or `Transfer-Encoding: chunked` alone
    following bytes   none, neither received nor in the kernel's buffer
    reading           not paused

Otherwise it is closed, so that no byte of one response can become part of another. If the server closed a reused
connection at the moment the request was sent, the request is sent once more on a new connection.

Host names are resolved by the given function or by the system. The addresses of a name share the connect timeout.

Not handled: proxies, HTTP/2, upgrades, streamed request bodies, and timeouts other than for connecting; the caller sets
a timeout around each call. Raises httpx's exceptions. Closing a response before its end closes the connection.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import cast

import httptools
import httpx

_MAX_HEAD_BYTES = 65_536
"""Most bytes without any of a body: a head, trailers, chunk extensions. httptools would collect them for ever."""
_WRITE_BYTES = 65_536
"""A request is sent in pieces of this size, so that sending stops when a server refuses it before it has read it."""
_STALE_S = 1.0
"""If a server closed an idle connection before it received the request, this shows within a round trip. If it closes
the connection later, it has processed the request, which is not sent again."""
_HIGH_WATER_BYTES = 16 * 2**20
"""What may wait to be read before the server is made to wait. An engine generates no slower for it, so a sane answer
is taken in whole: what stayed in the kernel's buffers could not be counted when the reader leaves."""
_Origin = tuple[str, str, int]
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a host in the order to connect to. Raises OSError."""


class Http1Transport(httpx.AsyncBaseTransport):
    """Sends requests and keeps idle connections for reuse, by the rules of the module's docstring."""

    def __init__(
        self,
        context: ssl.SSLContext | None,
        *,
        keepalive_s: float,
        max_idle: int = 64,
        resolve: Resolve | None = None,
    ) -> None:
        """`context` is for https; at most `max_idle` connections are kept per server, for `keepalive_s` each."""
        self._context = context
        self._resolve = resolve
        self._keepalive_s = keepalive_s
        self._max_idle = max_idle
        self._idle: dict[_Origin, list[_Connection]] = {}
        self.connections: set[_Connection] = set()
        """All that are open."""
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response once its head has arrived."""
        url = request.url
        origin = (url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80))
        content = await request.aread()
        lines = [b"%b %b HTTP/1.1" % (request.method.encode(), url.raw_path)]
        lines += [b"%b: %b" % header for header in request.headers.raw]
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        bodiless = request.method == "HEAD"
        connection = self._take(origin)
        if connection is not None and not await self._ask_again(connection, head, content, bodiless):
            connection = None
        if connection is None:
            connection = await self._connect(origin, request.extensions.get("timeout", {}).get("connect"))
            await self._ask(connection, head, content, bodiless)
        body = _Body(connection, self, origin)
        extensions = {"arrived": connection.take}
        return httpx.Response(connection.status, headers=connection.headers, stream=body, extensions=extensions)

    async def _ask(self, connection: _Connection, head: bytes, content: bytes, bodiless: bool) -> None:
        try:
            await connection.ask(head, content, bodiless=bodiless)
        except BaseException:
            connection.abort()
            raise

    async def _ask_again(self, connection: _Connection, head: bytes, content: bytes, bodiless: bool) -> bool:
        """Ask on a connection that was used before. Return False if the server had closed it before it saw this."""
        now = asyncio.get_running_loop().time
        began = now()
        try:
            await self._ask(connection, head, content, bodiless)
        except httpx.RemoteProtocolError:
            if connection.answering or now() - began > _STALE_S:
                raise
            return False
        return True

    def _take(self, origin: _Origin) -> _Connection | None:
        """Return a connection that is still good, the one used last."""
        now = asyncio.get_running_loop().time()
        idle = self._idle.get(origin, [])
        while idle:
            connection = idle.pop()
            if connection.reusable and now - connection.idle_since < self._keepalive_s and connection.is_silent():
                return connection
            connection.abort()
        return None

    def give_back(self, connection: _Connection, origin: _Origin) -> None:
        """Keep a connection whose response has ended, if it can be used again; else close it."""
        idle = self._idle.setdefault(origin, [])
        if connection.reusable and len(idle) < self._max_idle and not self._closed:
            connection.take()  # what the reader left
            connection.idle_since = asyncio.get_running_loop().time()
            idle.append(connection)
        else:
            connection.abort()

    async def _connect(self, origin: _Origin, timeout_s: float | None) -> _Connection:
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._dial(origin, timeout_s)
        except TimeoutError as error:
            raise httpx.ConnectTimeout("no connection in time") from error
        except (OSError, UnicodeError) as error:  # the latter from names that are none
            raise httpx.ConnectError(str(error)) from error
        if self._closed:
            connection.abort()
            raise httpx.ConnectError("the transport was closed")
        return connection

    async def _dial(self, origin: _Origin, timeout_s: float | None) -> _Connection:
        """Return a connection to the first address that takes one. Raises OSError, TimeoutError."""
        scheme, host, port = origin
        context = self._context if scheme == "https" else None
        loop = asyncio.get_running_loop()
        until = None if timeout_s is None else loop.time() + timeout_s
        addresses = [host] if self._resolve is None else await self._resolve(host, port)
        failure: OSError = OSError("the name has no address")
        for number, address in enumerate(addresses):
            share_s = None if until is None else (until - loop.time()) / (len(addresses) - number)
            make = partial(_Connection, self.connections)
            try:
                async with asyncio.timeout(share_s):
                    name = host if context is not None else None
                    _, connection = await loop.create_connection(make, address, port, ssl=context, server_hostname=name)
                    return connection
            except OSError as error:  # TimeoutError is one
                failure = error
        raise failure

    async def aclose(self) -> None:
        """Close every connection; pending reads raise httpx.ReadError."""
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
        self._may_write = True
        self._paused = False
        self.closed = False
        self.idle_since = 0.0
        self._reset()
        self._complete = True

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._bodiless = False
        self._bytes_without_body = 0
        self._head_complete = False
        self._sent = False
        """The server has all of the request."""
        self._chunks: list[bytes] = []
        self.waiting_bytes = 0
        """Arrived and not read."""
        self._complete = False
        self._keeps_alive = False
        self._is_plain = True
        """Nothing of the answer's framing could be read in another way."""
        self.answering = False
        """Some of the answer has arrived."""
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent; see the module."""
        ended = self._complete and self._keeps_alive and self._sent
        return ended and not self._paused and self._error is None and not self.closed

    def is_silent(self) -> bool:
        """Whether the kernel has nothing of the server's either: no byte, no end, no error."""
        if self._transport is None or self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    async def ask(self, head: bytes, content: bytes, *, bodiless: bool = False) -> None:
        """Send a request and wait for the head of its response, which has no body behind it if it is `bodiless`."""
        self._reset()
        self._bodiless = bodiless
        self._write(head + content[:_WRITE_BYTES])
        left = memoryview(content)[_WRITE_BYTES:]
        while left and not (self._head_complete and self.status >= 300):
            if self._may_write:
                self._write(left[:_WRITE_BYTES])
                left = left[_WRITE_BYTES:]
            else:
                await self._wait()
        while not self._head_complete:
            await self._wait()
        assert self._transport is not None
        self._sent = not left and self._transport.get_write_buffer_size() == 0

    def _write(self, data: bytes | memoryview) -> None:
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    async def read(self) -> bytes:
        """The next bytes of the body, none at its end."""
        while not self._chunks:
            if self._complete:
                return b""
            await self._wait()
        return self.take()

    def take(self) -> bytes:
        """The buffered, unread bytes of the body."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self.waiting_bytes = 0
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()
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
            self.abort(httpx.RemoteProtocolError("a response without a request"))
            return
        if not self.answering:
            self._is_plain = data[:5] == b"HTTP/"[: len(data)]  # httptools skips empty lines
        self.answering = True
        self._bytes_without_body += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort(httpx.RemoteProtocolError(f"not HTTP ({type(error).__name__})"))
        if self._bytes_without_body > _MAX_HEAD_BYTES and not self._complete:
            self.abort(httpx.RemoteProtocolError("a head or trailer without end"))
        self._wake()

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._connections.discard(self)
        if self._head_complete and not self._is_framed() and error is None and self._error is None:
            self._complete = True  # a body may end with its connection
        self._error = self._error or httpx.RemoteProtocolError("the connection was lost")
        self._wake()

    def _is_framed(self) -> bool:
        """Whether the response itself says where it ends."""
        return any(
            name.lower() == b"content-length"
            or (name.lower() == b"transfer-encoding" and value.lower().rstrip().endswith(b"chunked"))
            for name, value in self.headers
        )

    def _is_plainly_framed(self) -> bool:
        """Whether every parser sees the same end of the response, by its head."""
        fields = [(name.lower(), value) for name, value in self.headers]
        codings = [value.strip().lower() for name, value in fields if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or self._parser.get_http_version() != "1.1"):
            return False
        return self.status != 205 and not any(name == b"upgrade" for name, _ in fields)

    # httptools' calls

    def on_message_begin(self) -> None:
        if self._complete:  # a second answer
            raise ValueError
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_complete:  # trailers are not used
            self.headers.append((name, value))
        elif name.lower() in (b"transfer-encoding", b"content-length"):
            self._is_plain = False

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._head_complete = self.status >= 200  # those before are not the answer yet
        self._is_plain = self._is_plain and self._is_plainly_framed()
        if self._bodiless and self._head_complete:  # httptools does not know, and would wait for the body
            self._complete = True

    def on_body(self, body: bytes) -> None:
        if self._bodiless:
            return
        self._bytes_without_body = 0
        self._chunks.append(body)
        self.waiting_bytes += len(body)
        if self.waiting_bytes > _HIGH_WATER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._complete = self._head_complete
        self._keeps_alive = not self._bodiless and self._is_plain and self._parser.should_keep_alive()


class _Body(httpx.AsyncByteStream):
    """The body of a response, in chunks as they arrive."""

    def __init__(self, connection: _Connection, transport: Http1Transport, origin: _Origin) -> None:
        self._connection: _Connection | None = connection
        self._transport = transport
        self._origin = origin

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while connection is not None and (data := await connection.read()):
            yield data

    async def aclose(self) -> None:
        """Return the connection for reuse, or close it if the response has not ended. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport.give_back(connection, self._origin)
