"""An idle connection is closed, whatever was sent on it before, with a key and without."""

from __future__ import annotations

import asyncio
import contextlib
import re

import pytest

from gateway.serving.connection import Connection
from tests.support.app import KEY, Gateway, Start
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

SHORT_S = 0.3
"""Every bound of the test, but for the second that an idle connection has: settings are whole seconds."""
DRIBBLE_S = 0.05
"""Between two bytes of a client that wants to be waited for."""
WITHIN_S = 20.0
"""Only a connection that is kept for ever takes longer."""

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
KNOWN = POST + b"Authorization: Bearer " + KEY.encode() + b"\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
STATES: dict[str, tuple[bytes, bytes]] = {
    "nothing sent": (b"", b""),
    "empty line": (b"\r\n", b""),
    "half an empty line": (b"\r", b""),
    "dribble of empty lines": (b"", b"\r\n"),
    "half a method": (b"GE", b""),
    "half a head": (HEALTH[:-2], b""),
    "dribbling method": (b"", b"G"),
    "dribbling target": (b"GET /", b"a"),
    "dribbling header": (HEALTH[:-2] + b"X: ", b"a"),
    "dribbling headers": (HEALTH[:-2], b"X: y\r\n"),
    "half an old head": (b"GET /health\r", b""),
    "after an answer": (HEALTH, b""),
    "empty line after an answer": (HEALTH + b"\r\n", b""),
    "half an empty line after an answer": (HEALTH + b"\r", b""),
    "dribble of empty lines after an answer": (HEALTH, b"\r\n"),
    "half a head after an answer": (HEALTH + HEALTH[:-2], b""),
    "dribbling head after an answer": (HEALTH + HEALTH[:-2] + b"X: ", b"a"),
    "after several answers": (HEALTH * 5, b""),
    "after a refusal": (b"NONSENSE\r\n\r\n", b""),
    "dribble after a refusal": (b"NONSENSE\r\n\r\n", b"a"),
    "after an answer that closes": (b"GET /health HTTP/1.0\r\n\r\n", b"a"),
    "no body, no key": (POST + b"Content-Length: 10\r\n\r\n", b""),
    "no body, key": (KNOWN + b"Content-Length: 10\r\n\r\n", b""),
    "dribbling body, no key": (POST + b"Content-Length: 100000\r\n\r\n", b"a"),
    "dribbling body, key": (KNOWN + b"Content-Length: 100000\r\n\r\n", b"a"),
    "dribbling body, key, expecting": (KNOWN + b"Expect: 100-continue\r\nContent-Length: 100000\r\n\r\n", b"a"),
    "dribbling body of a GET": (HEALTH[:-2] + b"Content-Length: 100000\r\n\r\n", b"a"),
    "dribbling chunks, no key": (POST + CHUNKED, b"1\r\na\r\n"),
    "dribbling chunks, key": (KNOWN + CHUNKED, b"1\r\na\r\n"),
    "dribbling chunk size, key": (KNOWN + CHUNKED, b"0"),
    "dribbling trailer, key": (KNOWN + CHUNKED + b"0\r\nX: ", b"a"),
    "dribbling chunks, other route": (KNOWN.replace(b"/v1/chat/completions", b"/admin/keys") + CHUNKED, b"1\r\na\r\n"),
    "unknown route": (POST.replace(b"/v1/", b"/nowhere/") + b"Content-Length: 100000\r\n\r\n", b"a"),
    "upgrade": (HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"a"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_TIMEOUT_S", "WRITE_TIMEOUT_S", "LINGER_S"):
        monkeypatch.setattr(f"gateway.serving.connection.{name}", SHORT_S)


def connections(gateway: Gateway) -> set[Connection]:
    assert gateway.server is not None
    found: set[Connection] = gateway.server.server_state.connections  # type: ignore[assignment]
    return found


async def connect(gateway: Gateway, **options: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), **options)


async def hold_open(gateway: Gateway, begin: bytes, dribble: bytes) -> None:
    """Keep a connection as long as the server lets us."""
    reader, writer = await connect(gateway)

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(begin)
            while dribble:
                await asyncio.sleep(DRIBBLE_S)
                writer.write(dribble)
                await writer.drain()

    sending = asyncio.create_task(send())
    try:
        with contextlib.suppress(ConnectionError):
            await reader.read()
    finally:
        sending.cancel()
        writer.close()


async def test_connection_in_any_state_is_closed(serve: Start) -> None:
    gateway = await serve(server={"idle_connection_s": 1, "body_timeout_s": SHORT_S})
    held = {name: asyncio.create_task(hold_open(gateway, *state)) for name, state in STATES.items()}
    await asyncio.wait(held.values(), timeout=WITHIN_S)
    still_open = [name for name, task in held.items() if not task.done()]
    for task in held.values():
        task.cancel()

    assert still_open == []


async def test_first_byte_of_a_new_connection_does_not_put_off_its_deadline(serve: Start) -> None:
    gateway = await serve()
    await gateway.client.aclose()
    _, writer = await connect(gateway)
    await until(lambda: bool(connections(gateway)))
    (connection,) = connections(gateway)
    deadline = connection._deadline
    writer.write(b"G")
    await until(lambda: connection._reader.begun)

    assert connection._deadline is deadline
    writer.close()


@pytest.mark.parametrize("reads_bytes", [0, 1])
async def test_reader_without_a_key_that_takes_nothing_is_cut_off(serve: Start, reads_bytes: int) -> None:
    """One that takes a byte now and then is no better."""
    gateway = await serve(server={"idle_connection_s": 1})
    page = (await gateway.client.get("/")).text
    (path,) = re.findall(r'"(/web/[^"]+/markdown-it\.js)"', page)
    await gateway.client.aclose()
    reader, writer = await connect(gateway, limit=2**10)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 600)
    await until(gateway.writes_are_paused)

    async def read_a_little() -> None:
        while await reader.read(reads_bytes):
            await asyncio.sleep(DRIBBLE_S)

    reading = asyncio.create_task(read_a_little())
    await until(lambda: not connections(gateway), within_s=WITHIN_S)
    reading.cancel()
    writer.transport.abort()


@pytest.mark.parametrize("answers", [1, 40])
async def test_unread_answers_do_not_keep_an_idle_connection(serve: Start, answers: int) -> None:
    """They wait in buffers that are not full enough to stop the server."""
    gateway = await serve(server={"idle_connection_s": 1})
    reader, writer = await connect(gateway, limit=2**10)  # which stops reading by itself, after twice as much
    assert not reader.at_eof()
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * answers)

    await until(lambda: not connections(gateway), within_s=WITHIN_S)
    writer.transport.abort()


async def test_client_with_half_of_its_connection_closed_is_let_go(serve: Start) -> None:
    gateway = await serve()
    for begin in (b"", HEALTH, HEALTH[:-2], HEALTH + HEALTH[:-2], KNOWN + b"Content-Length: 10\r\n\r\n"):
        reader, writer = await connect(gateway)
        writer.write(begin)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), WITHIN_S)
        await until(lambda: gateway.requests_in_progress() == 0)
        writer.close()
