"""Bounds on a request's body: told once to who reads it, and no end to who only waits for the client to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.errors import BadRequest, GatewayError, RequestTimeout, RequestTooLarge
from gateway.serving.middleware import RequestMiddleware
from gateway.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio

LEFT: Message = {"type": "http.disconnect"}
STARTED: Message = {"type": "http.response.start", "status": 200, "headers": []}
Reads = Callable[[Receive, Send], Awaitable[None]]


def piece(size_bytes: int, more: bool = True) -> Message:
    return {"type": "http.request", "body": b"x" * size_bytes, "more_body": more}


async def serve(
    read: Reads, came: Sequence[Message | Exception], method: str = "POST", **headers: str
) -> list[Message]:
    """Run an application that calls `read`, for a client that sends what `came`. Returns what it was answered."""
    left = list(came)
    sent: list[Message] = []

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        message = left.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive, send)

    options: dict[str, Any] = {"max_body_bytes": 1024, "allowed_hosts": [], "body_timeout_s": 0.05}
    middleware = RequestMiddleware(app, metrics=Metrics(), **options)
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/x", "scheme": "http", "headers": raw}
    await middleware(scope, receive, send)
    return sent


@pytest.mark.parametrize(
    ("came", "error"),
    [
        ([piece(600), piece(600), piece(9), LEFT], RequestTooLarge),
        ([piece(600), BadRequest("A chunk is longer than its size."), piece(9), LEFT], BadRequest),
    ],
)
async def test_reader_is_told_once_and_then_waits_for_the_departure(
    came: list[Message | Exception], error: type[GatewayError]
) -> None:
    async def read(receive: Receive, send: Send) -> None:
        await receive()
        with pytest.raises(error):
            await receive()
        assert await receive() == LEFT
        assert await receive() == LEFT

    await serve(read, [*came, LEFT])


async def test_announced_size_is_refused_before_a_byte_is_read() -> None:
    async def read(receive: Receive, send: Send) -> None:
        await receive()

    start, _ = await serve(read, [], content_length="1025")
    assert start["status"] == 413
    assert (b"connection", b"close") in start["headers"]


async def test_body_that_does_not_arrive_is_a_timeout() -> None:
    async def read(receive: Receive, send: Send) -> None:
        await receive()
        with pytest.raises(RequestTimeout):
            await receive()
        raise RequestTimeout("The request body did not arrive within 0.05 seconds.")

    start, _ = await serve(read, [piece(1)])
    assert start["status"] == 408


async def test_watcher_of_a_started_answer_sees_nothing_but_the_departure() -> None:
    async def read(receive: Receive, send: Send) -> None:
        await send(STARTED)
        assert await receive() == LEFT

    await serve(read, [piece(5000), BadRequest("no chunk"), piece(1, more=False), LEFT], content_length="5000")


async def test_head_has_no_body_whatever_the_route_sends() -> None:
    async def read(receive: Receive, send: Send) -> None:
        await send({**STARTED, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    start, body = await serve(read, [], method="HEAD")
    assert (b"content-length", b"5") in start["headers"]
    assert body["body"] == b""
