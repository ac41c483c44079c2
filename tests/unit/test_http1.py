"""The transport under remote engines: framing, connections used again, and every way that an answer can break."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from engine.remote.http1 import Http1Transport
from engine.remote.tls import make_context
from tests.support.raw_server import CHUNKED, OK, Server, client, raw, served
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    "pieces",
    [
        (OK,),
        tuple(OK[at : at + 1] for at in range(len(OK))),
        (CHUNKED, b"1\r\no\r\n", b"1\r\nk\r\n", b"0\r\n\r\n"),
        (CHUNKED + b"1\r\no\r\n1\r\nk\r\n0\r\nx-trailer: 1\r\n\r\n",),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + OK,),
    ],
    ids=["whole", "by the byte", "chunked", "trailer", "hints before"],
)
async def test_any_framing_is_read_and_the_connection_used_again(pieces: tuple[bytes, ...]) -> None:
    async with served(raw(*pieces)) as server, client() as http:
        for _ in range(3):
            response = await http.post(server.url, content=b"body")
            assert (response.status_code, response.text) == (200, "ok")
            assert "link" not in response.headers

        assert server.connections == 1


async def test_body_may_end_with_its_connection() -> None:
    async with served(raw(b"HTTP/1.0 200 OK\r\n\r\nto the", b" end", close=True)) as server, client() as http:
        for _ in range(2):
            assert (await http.get(server.url)).text == "to the end"

        assert server.connections == 2


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",),
        (CHUNKED, b"5\r\nhal"),
        (b"HTTP/1.1 200 OK\r\nContent-Le",),
        (b"",),
        (b"SSH-2.0-OpenSSH\r\n",),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",),
        (CHUNKED, b"zz\r\n"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",),
    ],
    ids=["short", "short chunk", "short head", "nothing", "ssh", "huge head", "bad chunk", "upgrade"],
)
async def test_broken_answer_is_a_protocol_error(pieces: tuple[bytes, ...]) -> None:
    async with served(raw(*pieces, close=True)) as server, client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(server.url)

        assert server.requests == 1, "a request that may have had an effect is not sent again"


async def test_second_answer_is_nobodys() -> None:
    async with served(raw(OK + OK), raw(OK.replace(b"ok", b"me"))) as server, client() as http:
        assert (await http.get(server.url)).text == "ok"
        assert (await http.get(server.url)).text == "me"


async def test_connection_that_died_while_idle_is_replaced() -> None:
    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        writer.close()

    async with served(answer_and_close, raw(OK)) as server, client() as http:
        for _ in range(2):
            assert (await http.get(server.url)).text == "ok"

        assert (server.connections, server.requests) == (2, 2)


async def test_connection_that_dies_under_a_request_before_any_answer_is_replaced_once() -> None:
    async with served(raw(OK), raw(close=True), raw(close=True)) as server, client() as http:
        await http.get(server.url)
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(server.url)

        assert (server.connections, server.requests) == (2, 3)


async def test_connection_that_says_close_is_not_used_again() -> None:
    closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    async with served(raw(closing)) as server, client() as http:
        for _ in range(2):
            await http.get(server.url)

        assert server.connections == 2


async def test_old_connection_is_not_used_again() -> None:
    async with served(raw(OK)) as server, client(keepalive_s=0.0) as http:
        for _ in range(2):
            await http.get(server.url)

        assert server.connections == 2


async def test_leaving_a_stream_closes_its_connection() -> None:
    gone = asyncio.Event()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"1\r\na\r\n")
        assert await reader.read(1) == b""
        gone.set()

    async with served(stream) as server, client() as http:
        async with http.stream("GET", server.url) as response:
            assert await anext(response.aiter_raw()) == b"a"

        await asyncio.wait_for(gone.wait(), 5)


async def test_cancelled_request_closes_its_connection() -> None:
    async with served(hang) as server, client() as http:
        task = asyncio.create_task(http.get(server.url))
        await until(lambda: server.requests == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        transport = http._transport
        assert isinstance(transport, Http1Transport)
        await until(lambda: not transport.connections)


async def test_slow_reader_makes_the_server_wait_in_the_end() -> None:
    most_waiting = 0
    transport = Http1Transport(None, keepalive_s=60.0)

    def waiting() -> int:
        return sum(connection.waiting_bytes for connection in transport.connections)

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most_waiting
        writer.write(CHUNKED)
        for _ in range(1000):
            writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            await writer.drain()
            most_waiting = max(most_waiting, waiting())
        writer.write(b"0\r\n\r\n")

    http = httpx.AsyncClient(transport=transport, timeout=None)
    async with served(flood) as server, http, http.stream("GET", server.url) as response:
        await until(lambda: waiting() > 16 * 2**20)
        received = sum([len(chunk) async for chunk in response.aiter_raw()])

    assert received == 65_536_000
    assert most_waiting < 18 * 2**20


@pytest.mark.parametrize("begun", [False, True])
async def test_closing_the_transport_ends_what_runs(begun: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if begun:
            writer.write(CHUNKED + b"1\r\na\r\n")
        await hang(reader, writer)

    async with served(answer) as server, client() as http:
        task = asyncio.create_task(http.get(server.url))
        await until(lambda: server.requests == 1)
        transport = http._transport
        assert isinstance(transport, Http1Transport)
        await transport.aclose()

        with pytest.raises(httpx.ReadError):
            await task
        with pytest.raises(httpx.ConnectError):
            await http.get(server.url)


async def test_refused_connection_is_a_connect_error() -> None:
    async with client() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get("http://127.0.0.1:9/")
        with pytest.raises(httpx.ConnectError):
            await http.get("http://no-such-host.invalid/")


async def test_many_requests_run_at_once() -> None:
    async with served(raw(OK)) as server, client() as http:
        answers = await asyncio.gather(*(http.get(server.url) for _ in range(200)))

        assert {answer.text for answer in answers} == {"ok"}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_certificates_are_checked_against_the_given_authority(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=upstream", "-addext", "subjectAltName=IP:127.0.0.1,DNS:upstream.test"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    command += ["-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(certificate, key)

    async with served(raw(OK), context=own) as server:
        async with client(context=make_context(True, None)) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(server.url)
        for context in (make_context(True, str(certificate)), make_context(False, None)):
            async with client(context=context) as http:
                assert (await http.get(server.url)).text == "ok"
        checked = make_context(True, str(certificate))
        transport = Http1Transport(checked, keepalive_s=60.0, resolve=resolving("127.0.0.1"))
        async with httpx.AsyncClient(transport=transport, timeout=10) as http:
            assert (await http.get(server.url.replace("127.0.0.1", "upstream.test"))).text == "ok"
            with pytest.raises(httpx.ConnectError):
                await http.get(server.url.replace("127.0.0.1", "other.test"))


# Names


def resolving(*addresses: str) -> Callable[[str, int], Awaitable[list[str]]]:
    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolve


async def test_addresses_of_a_name_are_dialled_in_turn() -> None:
    async with served(raw(OK)) as server:
        transport = Http1Transport(None, keepalive_s=60.0, resolve=resolving("127.0.0.9", "::1", "127.0.0.1"))
        async with httpx.AsyncClient(transport=transport, timeout=10) as http:
            assert (await http.get(server.url.replace("127.0.0.1", "a.test"))).text == "ok"


async def test_address_that_takes_no_connections_leaves_time_for_the_next() -> None:
    with socket.socket() as deaf, contextlib.ExitStack() as waiting:
        deaf.bind(("127.0.0.2", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        for _ in range(4):  # fill its queue, so that the kernel answers no more
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.2", port))
        server = Server([raw(OK)])
        listening = await asyncio.start_server(server.serve, "127.0.0.1", port)
        transport = Http1Transport(None, keepalive_s=60.0, resolve=resolving("127.0.0.2", "127.0.0.1"))
        timeout = httpx.Timeout(10, connect=0.4)
        async with httpx.AsyncClient(transport=transport, timeout=timeout) as http:
            assert (await http.get(f"http://a.test:{port}/")).text == "ok"
        listening.close()
        for task in server.tasks:
            task.cancel()


@pytest.mark.parametrize("addresses", [[], ["127.0.0.9"]], ids=["none", "refusing"])
async def test_name_without_an_address_that_answers_is_no_connection(addresses: list[str]) -> None:
    transport = Http1Transport(None, keepalive_s=60.0, resolve=resolving(*addresses))
    async with httpx.AsyncClient(transport=transport, timeout=10) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get("http://a.test:9/")
