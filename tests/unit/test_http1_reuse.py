"""When a connection to an upstream is used again, and that no byte of one answer ever becomes part of another."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import httpx
import pytest

from engine.remote.http1 import Http1Transport
from tests.support.raw_server import CHUNKED, OK, client, raw, served
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

MIB = 2**20
ME = OK.replace(b"ok", b"me")


def sized(size: int, chunk_bytes: int | None) -> bytes:
    """Return an answer whose body has so many bytes, by its length or in chunks."""
    body = b"x" * size
    if chunk_bytes is None:
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (size, body)
    pieces = [body[at : at + chunk_bytes] for at in range(0, size, chunk_bytes)]
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def settled(transport: Http1Transport, size: int) -> bool:
    """Return whether all of a body, or as much as fits, has arrived."""
    waiting = sum(connection.waiting_bytes for connection in transport.connections)
    return waiting == size or waiting > 16 * MIB


@pytest.mark.parametrize("reads", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("chunk_bytes", [None, 65_536, 262_144 + 1], ids=["length", "chunks", "odd chunks"])
@pytest.mark.parametrize("size", [0, 1, 16 * MIB - 1, 16 * MIB, 16 * MIB + 1, 16 * MIB + 65_536, 17 * MIB])
async def test_body_of_any_length_leaves_no_paused_connection(size: int, chunk_bytes: int | None, reads: bool) -> None:
    async with served(raw(sized(size, chunk_bytes)), raw(OK)) as server:
        transport = Http1Transport(None, keepalive_s=60.0)
        response = await transport.handle_async_request(httpx.Request("POST", server.url, content=b"a"))
        if reads:
            assert len(await response.aread()) == size
        else:
            await until(lambda: settled(transport, size))
        await response.aclose()

        for _ in range(2):
            asked = transport.handle_async_request(httpx.Request("POST", server.url, content=b"b"))
            response = await asyncio.wait_for(asked, 10)
            assert await response.aread() == b"ok"
            await response.aclose()
        assert server.requests == 3
        await transport.aclose()


@pytest.mark.parametrize("status", [200, 400, 503])
@pytest.mark.parametrize(
    "leftover",
    [b"X", b"\0", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"HTTP/1.1 200", b"0\r\n\r\n"],
    ids=["byte", "nul", "answer", "begun answer", "chunk"],
)
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
async def test_byte_behind_an_answer_closes_the_connection(status: int, leftover: bytes, together: bool) -> None:
    answer = OK.replace(b"200", b"%d" % status)
    pieces = (answer + leftover,) if together else (answer, leftover)
    transport = Http1Transport(None, keepalive_s=60.0)
    async with served(raw(*pieces), raw(ME)) as server, httpx.AsyncClient(transport=transport, timeout=10) as http:
        assert (await http.get(server.url)).text == "ok"
        await until(lambda: not any(connection.reusable for connection in transport.connections))
        assert (await http.get(server.url)).text == "me"

        assert server.connections == 2


async def test_bytes_that_only_the_kernel_has_close_the_connection() -> None:
    sent = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await writer.drain()
        await sent.wait()
        writer.write(OK.replace(b"2\r\n", b"4\r\n").replace(b"ok", b"evil"))

    transport = Http1Transport(None, keepalive_s=60.0)
    async with served(answer, raw(ME)) as server, httpx.AsyncClient(transport=transport, timeout=10) as http:
        assert (await http.get(server.url)).text == "ok"
        (connection,) = transport.connections
        assert connection._transport is not None
        connection._transport.pause_reading()  # as if this loop had not come to it yet
        sent.set()
        await until(lambda: not connection.is_silent())

        assert (await http.get(server.url)).text == "me"


@pytest.mark.parametrize(
    ("answer", "reused"),
    [
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\ncontent-length: 2\r\n\r\nok", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\n", True),
        (CHUNKED + b"2;name=value;x\r\nok\r\n0;last\r\ntrailer: 1\r\nx-request-id: 2\r\n\r\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20 + OK, True),
    ],
    ids=["1.0", "1.0 keep-alive", "close", "204", "304", "extensions and trailers", "many 100"],
)
async def test_answer_says_whether_its_connection_is_used_again(answer: bytes, reused: bool) -> None:
    async with served(raw(answer)) as server, client() as http:
        for _ in range(2):
            response = await http.post(server.url, content=b"body")
            assert response.text in ("ok", "")
            assert "trailer" not in response.headers

        assert server.connections == (1 if reused else 2)


async def test_answer_to_head_has_no_body_and_ends_its_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    async with served(raw(head), raw(head + b"ok"), raw(OK)) as server, client() as http:
        for _ in range(2):
            response = await http.head(server.url)
            assert (response.status_code, response.content) == (200, b"")
        assert (await http.get(server.url)).text == "ok"

        assert server.connections == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok!",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2x\r\n\r\nok",
        b"HTTP/1.1 99999 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
    ids=["both framings", "two lengths", "negative", "odd", "status"],
)
async def test_framing_in_doubt_is_a_protocol_error(answer: bytes) -> None:
    async with served(raw(answer), raw(OK)) as server, client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(server.url)
        assert (await http.get(server.url)).text == "ok"

        assert server.connections == 2


@pytest.mark.parametrize("part", ["value", "trailer", "extension", "hints"])
async def test_head_and_trailer_without_end_are_bounded(part: str) -> None:
    begin, piece = {
        "value": (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 4096),
        "trailer": (CHUNKED + b"2\r\nok\r\n0\r\nx: ", b"y" * 4096),
        "extension": (CHUNKED + b"2;x=", b"y" * 4096),
        "hints": (b"", b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" * 100),
    }[part]

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        while True:
            writer.write(piece)
            await writer.drain()

    async with served(endless) as server, client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(http.get(server.url), 10)


# Requests that the server does not read, or not twice


@dataclass
class Deaf:
    """A server that answers as soon as it has a request's head, and reads no further."""

    answer: bytes
    close: bool
    requests: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            writer.write(self.answer)
            await writer.drain()
            if not self.close:
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                await asyncio.Event().wait()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.mark.parametrize("close", [False, True], ids=["open", "closing"])
async def test_answer_before_the_request_was_sent_is_read_and_ends_the_connection(close: bool) -> None:
    deaf = Deaf(OK.replace(b"200", b"413"), close)
    tasks: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(deaf.serve(reader, writer)))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    async with client() as http:
        for number in range(1, 4):
            response = await asyncio.wait_for(http.post(url, content=b"x" * (32 * MIB)), 10)
            assert (response.status_code, response.text) == (413, "ok")
            assert deaf.requests == number
    listening.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_long_request_is_sent_whole() -> None:
    body = bytes(range(256)) * (8 * 4096)
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        received.append(await reader.readexactly(length))
        writer.write(OK)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with client() as http:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
        assert (await http.post(url, content=body)).text == "ok"
    listening.close()

    assert received == [body]


async def test_request_is_sent_twice_at_most_however_many_connections_are_stale() -> None:
    second_requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal second_requests
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.BrokenBarrierError):
            await reader.readuntil(b"\r\n\r\n")
            await together.wait()
            writer.write(OK)
            await reader.readuntil(b"\r\n\r\n")
            second_requests += 1
        writer.transport.abort()

    together = asyncio.Barrier(5)
    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    async with client() as http:
        await asyncio.gather(*(http.get(url) for _ in range(5)))
        again = asyncio.create_task(http.get(url))
        await until(lambda: together.n_waiting == 1)

        assert second_requests == 1, "then on a new connection, not on the next stale one"
        await together.abort()
        with contextlib.suppress(httpx.HTTPError):
            await again
    listening.close()


async def test_request_that_a_server_has_worked_on_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.remote.http1._STALE_S", -1.0)  # any time is long
    async with served(raw(OK), raw(close=True), raw(OK)) as server, client() as http:
        await http.get(server.url)
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(server.url)

        assert server.requests == 2


# Answers that two parsers may read in two ways


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 205 Reset Content\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nok",
        b"\r\n" + OK,
        b"\n\n" + OK,
        b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
    ids=["gzip", "list", "twice", "1.0", "trailer", "205", "upgrade", "CRLF before", "LF before", "2.0"],
)
async def test_answer_of_doubtful_framing_is_read_and_ends_its_connection(answer: bytes) -> None:
    async with served(raw(answer), raw(OK)) as server, client() as http:
        assert (await http.get(server.url)).text == "ok"
        assert (await http.get(server.url)).text == "ok"

        assert server.connections == 2


_HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        *(OK.replace(b"\r\n", b"\n"), _HEAD + b"a: b\ncontent-length: 2\r\n\r\nok", OK[:-4] + b"\nok"),
        *(_HEAD + b"a: b\r\n c: d\r\ncontent-length: 2\r\n\r\nok", _HEAD + b"content-length:\r\n 2\r\n\r\nok"),
        *(_HEAD + b"content-length : 2\r\n\r\nok", _HEAD + b"transfer-encoding : chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        *(_HEAD + b"a: \0\r\ncontent-length: 2\r\n\r\nok", _HEAD + b"a: b\rc\r\ncontent-length: 2\r\n\r\nok"),
        *(_HEAD + b"content-length: 2, 2\r\n\r\nok", _HEAD + b"content-length: +2\r\n\r\nok"),
        *(CHUNKED + b"2\nok\r\n0\r\n\r\n", CHUNKED + b"2\r\nok\n0\r\n\r\n", CHUNKED + b"2\r\nok0\r\n\r\n"),
        *(
            CHUNKED + b"2 \r\nok\r\n0\r\n\r\n",
            CHUNKED + b"0x2\r\nok\r\n0\r\n\r\n",
            CHUNKED + b"2;a\nb\r\nok\r\n0\r\n\r\n",
        ),
        *(CHUNKED + b"2\r\nok\r\n0\r\na: b\n\r\n", CHUNKED + b"2\r\nok\r\n0\r\ncontent-length: 5\r\n\r\n"),
    ],
)
async def test_answer_that_is_not_strictly_http_never_lends_its_connection(answer: bytes) -> None:
    """httptools refuses all of these; its compatible successor has to, too."""
    async with served(raw(answer), raw(ME)) as server, client() as http:
        with contextlib.suppress(httpx.RemoteProtocolError):
            await http.get(server.url)
        assert (await http.get(server.url)).text == "me"

        assert server.connections == 2
