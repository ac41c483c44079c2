"""Many connections do not stop other clients: their requests continue, and new requests and probes are answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import httpx
import pytest

from engine.mock import MockEngine
from tests.support.app import HELLO, KEY, Gateway, Start
from tests.support.gateway_process import serve as serve_process
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

MOST = 16
OTHER_KEY = "another-key-of-somebody-else"
UNLIMITED = {"limits": {"enabled": False}}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


async def connect(gateway: Gateway, *parts: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"".join(parts))
    return reader, writer


def endless() -> MockEngine:
    return MockEngine(token_s=0.02, max_model_len=8192)


async def open_streams(gateway: Gateway, stack: contextlib.AsyncExitStack, count: int) -> list[httpx.Response]:
    """Return streams of chats that run for as long as the test, each on a connection of its own."""
    streams = []
    for _ in range(count):
        opened = gateway.stream(ignore_eos=True, max_tokens=4000)
        streams.append(await stack.enter_async_context(opened))
    return streams


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"GET /he",
        HEALTH,
        b"NONSENSE\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n",
    ],
    ids=["silent", "half a head", "idle", "refused", "no key"],
)
async def test_flood_without_a_key_keeps_nobody_out(serve: Start, begin: bytes) -> None:
    gateway = await serve(mock=endless, server={"max_connections": MOST}, config=UNLIMITED)
    async with contextlib.AsyncExitStack() as stack:
        streams = await open_streams(gateway, stack, 5)
        frames = [stream.aiter_lines() for stream in streams]
        flood = []
        for _ in range(5):
            flood += [await connect(gateway, begin) for _ in range(2 * MOST)]
            async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.client.headers) as client:
                assert (await client.get("/ready")).status_code == 200
                answer = await client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})
                assert answer.status_code == 200
            for lines in frames:
                assert [await anext(lines) for _ in range(20)]
        assert gateway.server is not None
        assert len(gateway.server.server_state.connections) <= MOST + 1  # one may be about to close
        for _, writer in flood:
            writer.transport.abort()


async def test_key_that_takes_too_many_connections_leaves_room_for_others(serve: Start) -> None:
    config = UNLIMITED | {"keys": [{"name": "other", "key_env": "OTHER"}]}
    server = {"max_connections": MOST}
    gateway = await serve(mock=endless, server=server, config=config, environment={"OTHER": OTHER_KEY})
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\nContent-Length: 99\r\n\r\n{"
    uploads = [await connect(gateway, half % KEY.encode()) for _ in range(11)]  # of 14; three stay free
    await until(lambda: gateway.requests_in_progress() == len(uploads))
    refused = await gateway.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_connections")
    assert refused.headers["retry-after"]
    for path in ("/health", "/ready", "/metrics"):
        assert (await gateway.client.get(path)).status_code == 200
    others = {"Authorization": f"Bearer {OTHER_KEY}"}
    assert (await gateway.client.get("/v1/models", headers=others)).status_code == 200
    for _, writer in uploads:
        writer.close()
    await until(lambda: gateway.requests_in_progress() == 0)
    assert (await gateway.chat()).status_code == 200


async def test_connection_is_held_only_while_a_request_of_its_key_runs(serve: Start) -> None:
    gateway = await serve(server={"max_connections": MOST}, config=UNLIMITED)
    request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n"
    held = []
    for _ in range(3 * MOST):
        reader, writer = await connect(gateway, request)
        held.append((reader, writer))
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
    first, _ = held[0]
    await asyncio.wait_for(first.read(), 5)  # the oldest is closed
    for _, writer in held:
        writer.close()


def test_clients_leave_files_to_the_rest_of_the_process(tmp_path: Path) -> None:
    tree = {"engines": {"main": {"kind": "mock"}}, "limits": {"enabled": False}}
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(serve_process(tmp_path, tree, module="tests.support.few_files"))
        gateway.wait_until_ready()
        host, port = gateway.url.removeprefix("http://").split(":")
        for _ in range(300):
            stack.enter_context(socket.create_connection((host, int(port))))
        assert gateway.ready()
        assert gateway.chat(messages=HELLO).status_code == 200
        assert gateway.metric("shannon_connections") <= 64
        assert gateway.metric("shannon_store_failures_total") == 0
    assert "Too many open files" not in gateway.log.read_text()
    assert "Traceback" not in gateway.log.read_text()
