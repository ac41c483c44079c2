"""Bounds before the body: an endless header does not fill memory, half a header does not keep a connection."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from engine.mock import MockEngine
from gateway.serving.connection import MAX_HEAD_BYTES
from tests.support.app import Gateway, Start

pytestmark = pytest.mark.anyio

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
ENDLESS = 64 * MAX_HEAD_BYTES
"""Far more than lies in the buffers between a client and a server that has stopped to read."""


async def send(gateway: Gateway, begin: bytes, piece: bytes) -> tuple[int, bytes]:
    """Send `piece` again and again until the server has closed. Returns the bytes sent, and the answer."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = asyncio.create_task(reader.read())
    sent = 0
    with contextlib.suppress(ConnectionError):
        writer.write(begin)
        while sent < ENDLESS and not answer.done():
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
    writer.close()
    with contextlib.suppress(ConnectionError):
        return sent, await answer
    return sent, b""


@pytest.mark.parametrize(
    ("begin", "piece"),
    [(HEAD + b"X-A: ", b"a" * 4096), (HEAD, b"X-A: a\r\n" * 512), (b"GET /", b"a" * 4096)],
    ids=["one header", "many headers", "url"],
)
async def test_endless_head_ends_with_the_connection(serve: Start, begin: bytes, piece: bytes) -> None:
    gateway = await serve()
    sent, answer = await send(gateway, begin, piece)

    assert sent < ENDLESS
    if answer:  # it is lost where the client was still sending
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 "), head
        assert json.loads(body)["error"]["code"] == "headers_too_large"
    assert (await gateway.chat()).status_code == 200


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET  / HTP\r\n\r\n"], ids=["tls", "no HTTP"])
async def test_what_is_no_http_is_refused_in_the_usual_shape(serve: Start, junk: bytes) -> None:
    gateway = await serve()
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(junk)
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()

    assert head.startswith(b"HTTP/1.1 400 "), head
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_http"
    assert error["message"]


async def test_endless_trailers_end_with_the_connection(serve: Start) -> None:
    gateway = await serve()
    begin = HEAD + f"Authorization: Bearer {gateway.key}\r\n".encode() + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: "
    sent, _ = await send(gateway, begin, b"a" * 4096)

    assert sent < ENDLESS
    assert (await gateway.chat()).status_code == 200


async def test_head_within_the_bound_is_read_whatever_the_packets(serve: Start) -> None:
    gateway = await serve()
    padding = "a" * (MAX_HEAD_BYTES - 2000)
    response = await gateway.client.get("/v1/models", headers={"X-Padding": padding})
    assert response.status_code == 200

    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "padding": "x" * (4 * MAX_HEAD_BYTES)}).encode()
    for _ in range(3):  # on one connection: a body is not counted, nor what came before it
        assert (await gateway.client.post("/v1/chat/completions", content=body)).status_code == 200


@pytest.mark.parametrize(
    "begin", [b"", HEAD, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + HEAD], ids=["nothing", "half", "later"]
)
async def test_head_that_does_not_come_ends_with_the_connection(
    serve: Start, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr("gateway.serving.connection.HEAD_TIMEOUT_S", 0.2)
    gateway = await serve()
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(begin)
    answered = await asyncio.wait_for(reader.read(), 20)
    writer.close()

    assert answered.startswith(b"HTTP/1.1 200 ") == begin.startswith(b"GET /health")
    assert (await gateway.chat()).status_code == 200


async def test_answer_may_take_longer_than_a_head(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.serving.connection.HEAD_TIMEOUT_S", 0.05)
    gateway = await serve(mock=lambda: MockEngine(token_s=0.05))

    assert (await gateway.chat(max_tokens=4)).status_code == 200
