"""The response that owns a generation: when the status is sent, what is sent after it, and that it cleans up.

Driven through ASGI by hand, so that a slow client, a departure and a drain come at exact moments.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.types import Message

from engine.base import EngineDied
from gateway.errors import Unavailable
from gateway.exchange.drain import Drain
from gateway.exchange.response import KEEPALIVE, GenerationResponse
from gateway.telemetry.metrics import Metrics
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

NEVER_S = 3600.0
SOON_S = 0.01


class Client:
    """The far end of an exchange. Refuses, as uvicorn does, messages that come out of order."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.complete = False
        self.refused: list[str] = []
        self.reading = asyncio.Event()
        """Cleared while the client reads nothing: sends then wait, as they do on a full socket."""
        self.reading.set()
        self._left = asyncio.Event()
        self._sent_body = False

    async def send(self, message: Message) -> None:
        await self.reading.wait()
        if self.complete or (message["type"] == "http.response.start") == bool(self.status):
            self.refused.append(message["type"])
            raise RuntimeError(f"unexpected message {message['type']}")
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message["body"]
            self.complete = not message["more_body"]

    async def receive(self) -> Message:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self._left.set()


class Source:
    """A generator of frames that is fed by hand and remembers that it was closed."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.closed = False

    @property
    def taken(self) -> bool:
        """Whether everything that was put has been read."""
        return self._queue.empty()

    def put(self, *items: bytes | Exception | None) -> None:
        """Add frames, an exception to raise, or None for the end."""
        for item in items:
            self._queue.put_nowait(item)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


class Exchange:
    """A response on its way to a client."""

    def __init__(self, *, stream: bool = True, keepalive_s: float = NEVER_S) -> None:
        self.client = Client()
        self.source = Source()
        self.drain = Drain()
        self.metrics = Metrics()
        self.response = GenerationResponse(
            self.source.frames(), stream=stream, drain=self.drain, metrics=self.metrics, keepalive_s=keepalive_s
        )
        self.task = asyncio.ensure_future(self.response({"type": "http"}, self.client.receive, self.client.send))

    async def opened(self) -> None:
        await until(lambda: b"shannon_streams_open 1.0" in self.metrics.render())

    async def finished(self) -> None:
        async with asyncio.timeout(5):
            await self.task


def error_in(frame: bytes) -> dict[str, Any]:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    error: dict[str, Any] = json.loads(frame[6:])["error"]
    return error


async def test_status_waits_for_the_first_frame() -> None:
    exchange = Exchange()
    await exchange.opened()
    assert exchange.client.status == 0

    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")

    assert exchange.client.status == 200
    assert exchange.client.headers["content-type"] == "text/event-stream; charset=utf-8"
    exchange.source.put(None)
    await exchange.finished()
    assert exchange.client.body == b"data: 1\n\n"
    assert exchange.client.complete


async def test_body_announces_its_length() -> None:
    exchange = Exchange(stream=False)
    exchange.source.put(b'{"a":', b"1}", None)
    await exchange.finished()

    assert exchange.client.status == 200
    assert exchange.client.headers == {"content-type": "application/json", "content-length": "7"}
    assert exchange.client.body == b'{"a":1}'


@pytest.mark.parametrize("stream", [True, False])
async def test_failure_before_the_first_frame_has_its_real_status(stream: bool) -> None:
    exchange = Exchange(stream=stream)
    exchange.source.put(EngineDied())
    await exchange.finished()

    assert exchange.client.status == 503
    assert exchange.client.headers["content-type"] == "application/json"
    assert exchange.client.headers["content-length"] == str(len(exchange.client.body))
    assert exchange.client.headers["retry-after"] == "5"
    assert json.loads(exchange.client.body)["error"]["code"] == "engine_unavailable"


async def test_failure_after_the_first_frame_is_one_error_frame() -> None:
    exchange = Exchange()
    exchange.source.put(b"data: 1\n\n", EngineDied())
    await exchange.finished()

    first, error = exchange.client.body.split(b"\n\n", 1)
    assert first == b"data: 1"
    assert error_in(error)["message"] == "The engine failed during generation."
    assert exchange.client.complete
    assert exchange.source.closed


@pytest.mark.parametrize("stream", [True, False])
async def test_unexpected_failure_tells_nothing_of_its_cause(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange(stream=stream)
    exchange.source.put(KeyError("secret detail"))
    await exchange.finished()

    assert exchange.client.status == 500
    assert json.loads(exchange.client.body)["error"] == {
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "secret detail" in caplog.text, "the operator sees the cause"


@pytest.mark.parametrize("stream", [True, False])
async def test_departure_closes_the_source_and_sends_nothing_more(stream: bool) -> None:
    exchange = Exchange(stream=stream)
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.source.taken and bool(exchange.client.body) is stream)
    sent = exchange.client.body

    exchange.client.leave()
    await exchange.finished()

    assert exchange.source.closed
    assert exchange.client.body == sent
    assert not exchange.client.complete


async def test_departure_while_the_socket_is_full_closes_the_source() -> None:
    exchange = Exchange()
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")
    exchange.client.reading.clear()
    exchange.source.put(b"data: 2\n\n")
    await until(lambda: exchange.source.taken)

    exchange.client.leave()
    await exchange.finished()

    assert exchange.source.closed


@pytest.mark.parametrize("started", [False, True])
async def test_interrupted_stream_is_told_the_reason(started: bool) -> None:
    exchange = Exchange()
    await exchange.opened()
    if started:
        exchange.source.put(b"data: 1\n\n")
        await until(lambda: exchange.client.body != b"")

    exchange.response.interrupt(Unavailable("Shutting down."))
    await exchange.finished()

    assert exchange.source.closed
    assert exchange.client.status == (200 if started else 503)
    assert b"Shutting down." in exchange.client.body
    assert exchange.client.body.count(b'"error"') == 1


async def test_foreign_cancellation_passes_through_after_closing_the_source() -> None:
    exchange = Exchange()
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")

    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task

    assert exchange.source.closed


@pytest.mark.parametrize(
    "end",
    [
        lambda exchange: exchange.source.put(None),
        lambda exchange: exchange.source.put(EngineDied("x")),
        lambda exchange: exchange.client.leave(),
        lambda exchange: exchange.response.interrupt(Unavailable("x")),
    ],
    ids=["finished", "failed", "left", "interrupted"],
)
async def test_stream_is_counted_open_until_it_ends(end: Callable[[Exchange], None]) -> None:
    exchange = Exchange()
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")
    assert b"shannon_streams_open 1.0" in exchange.metrics.render()

    end(exchange)
    await exchange.finished()

    assert b"shannon_streams_open 0.0" in exchange.metrics.render()
    assert await exchange.drain.run(timeout_s=0) == 0


async def test_silence_before_the_first_frame_is_broken_by_a_comment() -> None:
    exchange = Exchange(keepalive_s=SOON_S)
    await until(lambda: exchange.client.body.count(KEEPALIVE) >= 2)
    assert exchange.client.status == 200

    exchange.source.put(b"data: 1\n\n", None)
    await exchange.finished()

    assert exchange.client.body.replace(KEEPALIVE, b"") == b"data: 1\n\n"


async def test_failure_after_a_comment_is_an_error_frame() -> None:
    exchange = Exchange(keepalive_s=SOON_S)
    await until(lambda: KEEPALIVE in exchange.client.body)
    exchange.source.put(EngineDied())
    await exchange.finished()

    assert error_in(exchange.client.body.replace(KEEPALIVE, b""))["code"] == "engine_unavailable"


async def test_whole_body_is_never_preceded_by_a_comment() -> None:
    exchange = Exchange(stream=False, keepalive_s=SOON_S)
    with pytest.raises(TimeoutError):
        await until(lambda: exchange.client.status != 0, within_s=5 * SOON_S)
    exchange.source.put(b"{}", None)
    await exchange.finished()

    assert exchange.client.body == b"{}"


async def test_comments_do_not_pile_up_behind_a_stalled_client() -> None:
    exchange = Exchange(keepalive_s=SOON_S)
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")
    exchange.client.reading.clear()
    with pytest.raises(TimeoutError):
        await until(lambda: exchange.client.complete, within_s=10 * SOON_S)

    exchange.source.put(b"data: 2\n\n", None)
    exchange.client.reading.set()
    await exchange.finished()

    assert exchange.client.body.count(KEEPALIVE) <= 3
    assert exchange.client.body.replace(KEEPALIVE, b"") == b"data: 1\n\ndata: 2\n\n"
    assert exchange.client.refused == []


async def test_nothing_is_sent_after_the_error_frame_of_a_stalled_stream() -> None:
    exchange = Exchange(keepalive_s=SOON_S)
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")
    exchange.client.reading.clear()
    exchange.source.put(EngineDied())
    await until(lambda: exchange.source.closed)
    with pytest.raises(TimeoutError):
        await until(lambda: exchange.client.complete, within_s=5 * SOON_S)

    exchange.client.reading.set()
    await exchange.finished()
    await asyncio.sleep(0)

    assert error_in(exchange.client.body.replace(KEEPALIVE, b"").split(b"\n\n", 1)[1])
    assert exchange.client.complete
    assert exchange.client.refused == []


async def test_departure_while_the_error_frame_waits_ends_the_exchange_quietly() -> None:
    exchange = Exchange()
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")
    exchange.client.reading.clear()
    exchange.source.put(EngineDied())
    await until(lambda: exchange.source.closed)

    exchange.client.leave()
    await exchange.finished()

    assert b"error" not in exchange.client.body


async def test_interruption_while_the_error_frame_waits_changes_nothing() -> None:
    exchange = Exchange()
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")
    exchange.client.reading.clear()
    exchange.source.put(EngineDied())
    await until(lambda: exchange.source.closed)

    exchange.response.interrupt(Unavailable("Shutting down."))
    await asyncio.sleep(0)
    exchange.client.reading.set()
    await exchange.finished()

    assert exchange.client.body.count(b'"error"') == 1
    assert exchange.client.complete


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_interruption_ends_though_the_client_does_not_take_the_end(stream: bool) -> None:
    exchange = Exchange(stream=stream)
    exchange.client.reading.clear()
    exchange.source.put(None)
    await until(lambda: exchange.source.closed)

    assert await asyncio.wait_for(exchange.drain.run(timeout_s=0), timeout=3) == 1
    exchange.client.reading.set()
    await exchange.finished()

    assert not exchange.client.complete


async def test_end_that_the_client_takes_late_is_no_failure() -> None:
    exchange = Exchange()
    exchange.client.reading.clear()
    exchange.source.put(None)
    await until(lambda: exchange.source.closed)
    draining = asyncio.create_task(exchange.drain.run(timeout_s=0))
    await until(lambda: exchange.response.reason is not None)
    exchange.client.reading.set()

    assert await asyncio.wait_for(draining, timeout=3) == 1
    assert exchange.client.complete
    assert exchange.client.body == b""


async def test_interruption_ends_though_the_client_reads_nothing() -> None:
    exchange = Exchange()
    exchange.source.put(b"data: 1\n\n")
    await until(lambda: exchange.client.body != b"")
    exchange.client.reading.clear()

    assert await asyncio.wait_for(exchange.drain.run(timeout_s=0), timeout=3) == 1

    assert exchange.source.closed
