"""A client that leaves stops its generation at once, and what it cost is in the books to the token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import pytest

from engine.mock import Fault, MockEngine
from tests.support.app import HELLO, Gateway, Start
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ENDLESS = {"ignore_eos": True, "max_tokens": 1000}
"""Two seconds at the speed below: long enough to leave in the middle."""
PROMPTLY_S = 0.5


def endless_engine() -> MockEngine:
    return MockEngine(token_s=0.002, max_model_len=4096)


async def assert_aborted_and_settled(gateway: Gateway) -> None:
    await until(lambda: gateway.mock.unfinished_requests == 0, within_s=PROMPTLY_S)
    await until(lambda: gateway.requests_in_progress() == 0)
    spent = gateway.spent()
    assert await gateway.metered() == spent
    assert await gateway.samples("shannon_streams_open") == {(): 0}
    assert gateway.spent() == spent, "nothing is made after the abort"


@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_a_stream_aborts_its_generation(serve: Start, n: int) -> None:
    gateway = await serve(mock=endless_engine)
    async with gateway.stream(n=n, **ENDLESS) as response:
        await anext(response.aiter_raw())
        assert gateway.mock.unfinished_requests == 1

    await assert_aborted_and_settled(gateway)
    assert 0 < gateway.spent().completion_tokens < 1000
    assert gateway.spent().prompt_tokens == 3


async def test_leaving_before_the_first_token_aborts_its_generation(serve: Start) -> None:
    gateway = await serve(mock=endless_engine)
    gateway.mock.faults.append(Fault())  # hangs
    request = asyncio.create_task(gateway.chat(stream=True))
    await until(lambda: gateway.mock.unfinished_requests == 1)

    request.cancel()

    await assert_aborted_and_settled(gateway)
    assert gateway.spent().prompt_tokens == 0, "an unprocessed prompt costs nothing"


async def test_leaving_a_silent_stream_aborts_its_generation(serve: Start) -> None:
    gateway = await serve(mock=endless_engine, server={"keepalive_s": 0.01})
    gateway.mock.faults.append(Fault(at_token=1))  # hangs after one token
    async with gateway.stream() as response:
        async for piece in response.aiter_raw():
            if b": keepalive" in piece and gateway.mock.counters.completion_tokens:
                break

    await assert_aborted_and_settled(gateway)
    assert gateway.spent().completion_tokens == 1


async def test_leaving_a_whole_completion_aborts_its_generation(serve: Start) -> None:
    gateway = await serve(mock=endless_engine)
    request = asyncio.create_task(gateway.chat(**ENDLESS))
    await until(lambda: gateway.mock.counters.completion_tokens > 2)

    request.cancel()

    await assert_aborted_and_settled(gateway)
    assert gateway.spent().completion_tokens < 1000
    assert (await gateway.samples("shannon_requests_total"))[("/v1/chat/completions", "499")] == 1


async def test_leaving_with_a_full_socket_aborts_its_generation(serve: Start) -> None:
    """A client that stops reading and then leaves: the server is stuck in a send when it happens."""
    gateway = await serve(mock=lambda: MockEngine(reply="x" * 4000, token_s=0.0001, max_model_len=100_000))
    body = {"messages": HELLO, "stream": True, "ignore_eos": True, "max_tokens": 90_000}
    _, writer = await gateway.post_by_hand(json.dumps(body).encode())
    await until(gateway.writes_are_paused)
    assert gateway.mock.unfinished_requests == 1

    writer.transport.abort()

    await assert_aborted_and_settled(gateway)
    assert gateway.spent().completion_tokens < 90_000


async def test_reader_that_stays_and_reads_nothing_is_left(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place in the engine is somebody else's by then."""
    monkeypatch.setattr("gateway.serving.connection.WRITE_TIMEOUT_S", 0.3)
    gateway = await serve(mock=lambda: MockEngine(reply="x" * 4000, token_s=0.0001, max_model_len=100_000))
    body = {"messages": HELLO, "stream": True, "ignore_eos": True, "max_tokens": 90_000}
    _, writer = await gateway.post_by_hand(json.dumps(body).encode())
    await until(gateway.writes_are_paused)

    await assert_aborted_and_settled(gateway)
    assert gateway.spent().completion_tokens < 90_000
    writer.transport.abort()


async def test_reader_that_is_slow_is_waited_for(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.serving.connection.WRITE_TIMEOUT_S", 1.0)
    gateway = await serve(mock=lambda: MockEngine(reply="x" * 4000, max_model_len=100_000))
    body = {"messages": HELLO, "stream": True, "ignore_eos": True, "max_tokens": 2_000}
    reader, writer = await gateway.post_by_hand(json.dumps(body).encode())
    await until(gateway.writes_are_paused)
    read = b""
    while b"[DONE]" not in read[-200:]:
        piece = await asyncio.wait_for(reader.read(2**17), 5)
        assert piece, "the server has left"
        read += piece
        await asyncio.sleep(0.005)
    writer.transport.abort()

    assert read.count(b"x" * 4000) == 2_000


async def test_leaving_during_the_upload_is_no_server_error(serve: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gateway = await serve()
    _, writer = await gateway.post_by_hand(b'{"messages": [', announced_bytes=1000)
    await until(lambda: gateway.requests_in_progress() == 1)

    writer.close()
    await until(lambda: gateway.requests_in_progress() == 0)

    assert await gateway.samples("shannon_requests_total") == {("/v1/chat/completions", "499"): 1}
    assert "Traceback" not in caplog.text
    assert gateway.mock.requests == []


async def test_books_balance_under_a_crowd_that_comes_and_goes(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.001, max_model_len=4096))

    async def visit(number: int) -> None:
        fields = {"ignore_eos": True, "max_tokens": 40, "n": 1 + number % 2}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01 + 0.004 * number if number % 3 else None):
                if number % 4 == 0:
                    await gateway.chat(**fields)
                    return
                async with gateway.stream(**fields) as response:
                    pieces = 0
                    async for _ in response.aiter_raw():
                        pieces += 1
                        if number % 5 == 0 and pieces == 3:
                            return

    await asyncio.gather(*(visit(number) for number in range(40)))

    await assert_aborted_and_settled(gateway)
    assert gateway.spent().completion_tokens > 0


async def test_gateway_serves_on_after_departures(serve: Start) -> None:
    gateway = await serve(mock=endless_engine)
    for _ in range(3):
        async with gateway.stream(**ENDLESS) as response:
            await anext(response.aiter_raw())

    assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == "You said: hello there"
    await assert_aborted_and_settled(gateway)
