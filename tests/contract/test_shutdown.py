"""SIGTERM: /ready fails at once, no generation starts, running ones finish or get an error, then the process ends."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from engine.mock import Fault, MockEngine
from tests.support.app import HELLO, Gateway, Start
from tests.support.frames import data_lines
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


async def ended(gateway: Gateway, within_s: float = 5) -> None:
    assert gateway.serving is not None
    async with asyncio.timeout(within_s):
        await asyncio.shield(gateway.serving)


async def test_running_stream_finishes_while_new_requests_are_refused(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002, max_model_len=4096))
    async with gateway.stream(ignore_eos=True, max_tokens=300) as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        terminate()
        await until(lambda: gateway.services.drain.draining)

        ready = await gateway.client.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {"ready": False, "draining": True, "engines": {"main": "ready"}}
        assert (await gateway.client.get("/health")).status_code == 200
        for stream in (False, True):
            refused = await gateway.chat(stream=stream)
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "server_error"
            assert refused.json()["error"]["code"] == "engine_unavailable"
            assert "shutting down" in refused.json()["error"]["message"]
            assert refused.headers["x-should-retry"] == "true"
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["retry-after-ms"] == "1000"
            assert refused.headers["connection"] == "close"  # a retry may reach another replica

        raw += b"".join([piece async for piece in pieces])

    assert raw.endswith(b"data: [DONE]\n\n")
    assert gateway.mock.counters.completion_tokens == 300
    await ended(gateway)
    assert gateway.server is not None
    assert gateway.server.exit_code == 0
    assert gateway.engine.state == "closed"


async def test_running_whole_completion_finishes(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.005))
    request = asyncio.create_task(gateway.chat(ignore_eos=True, max_tokens=20))
    await until(lambda: gateway.mock.counters.completion_tokens > 0)

    terminate()

    response = await request
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 20
    await ended(gateway)


async def test_stream_that_outlasts_the_timeout_ends_with_an_error_frame(serve: Start) -> None:
    gateway = await serve(server={"drain_timeout_s": 0.05})
    gateway.mock.faults.append(Fault(at_token=2))  # hangs after two tokens
    async with gateway.stream() as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        terminate()
        raw += b"".join([piece async for piece in pieces])

    *frames, last = data_lines(raw)
    assert json.loads(last)["error"] == {
        "message": "The server shut down before the response was complete.",
        "type": "server_error",
        "param": None,
        "code": "engine_unavailable",
    }
    assert [json.loads(frame)["choices"][0]["delta"].get("content") for frame in frames] == ["", "You", " said:"]
    assert gateway.mock.unfinished_requests == 0
    await ended(gateway)
    assert b"shannon_streams_open 0.0" in gateway.services.metrics.render()
    spent = gateway.spent()
    assert (spent.prompt_tokens, spent.completion_tokens) == (3, 2)
    assert b'shannon_tokens_total{kind="completion",model="shannon-chat"} 2.0' in gateway.services.metrics.render()


@pytest.mark.parametrize("stream", [False, True])
async def test_request_that_outlasts_the_timeout_unsent_has_a_real_status(serve: Start, stream: bool) -> None:
    gateway = await serve(server={"drain_timeout_s": 0.05})
    gateway.mock.faults.append(Fault())  # hangs before the first token
    request = asyncio.create_task(gateway.chat(stream=stream))
    await until(lambda: gateway.mock.unfinished_requests == 1)

    terminate()

    response = await request
    assert response.status_code == 503
    assert response.headers["x-should-retry"] == "true"
    assert "shut down" in response.json()["error"]["message"]
    await ended(gateway)


async def test_idle_server_ends_at_once(serve: Start) -> None:
    gateway = await serve(server={"drain_timeout_s": 3600})
    await gateway.chat()

    terminate()

    await ended(gateway, within_s=2)


async def test_interrupt_from_the_keyboard_drains_too(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002))
    async with gateway.stream(ignore_eos=True, max_tokens=50) as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        signal.raise_signal(signal.SIGINT)
        raw += b"".join([piece async for piece in pieces])

    assert raw.endswith(b"data: [DONE]\n\n")
    await ended(gateway)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_interrupts_what_still_runs(serve: Start, number: signal.Signals) -> None:
    """It ends as after the timeout: clients get an error frame, the ledger gets the usage, everything is closed."""
    gateway = await serve(server={"drain_timeout_s": 3600})
    gateway.mock.faults.append(Fault(at_token=2))
    async with gateway.stream() as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        signal.raise_signal(number)
        await until(lambda: gateway.services.drain.draining)
        signal.raise_signal(number)
        raw += b"".join([piece async for piece in pieces])

    assert "shut down" in json.loads(data_lines(raw)[-1])["error"]["message"]
    await ended(gateway, within_s=5)
    assert gateway.engine.state == "closed"
    assert b'shannon_tokens_total{kind="completion",model="shannon-chat"} 2.0' in gateway.services.metrics.render()


async def test_third_signal_ends_without_waiting(serve: Start) -> None:
    gateway = await serve(server={"drain_timeout_s": 3600})
    gateway.mock.faults.append(Fault(at_token=1))
    async with gateway.stream() as response:
        await anext(response.aiter_raw())
        terminate()
        await until(lambda: gateway.services.drain.draining)
        terminate()
        await until(lambda: gateway.services.drain.hurried)
        terminate()

        await ended(gateway, within_s=5)


async def test_reader_that_has_stalled_does_not_hold_up_the_shutdown(serve: Start) -> None:
    gateway = await serve(
        server={"drain_timeout_s": 0.05},
        mock=lambda: MockEngine(reply="x" * 4000, token_s=0.0001, max_model_len=100_000),
    )
    body = {"messages": HELLO, "stream": True, "ignore_eos": True, "max_tokens": 90_000}
    _, writer = await gateway.post_by_hand(json.dumps(body).encode())
    await until(gateway.writes_are_paused)

    terminate()
    try:
        await ended(gateway, within_s=8)
    finally:
        writer.transport.abort()


async def test_body_that_arrives_after_the_signal_is_refused(serve: Start) -> None:
    gateway = await serve()
    body = json.dumps({"messages": HELLO}).encode()
    reader, writer = await gateway.post_by_hand(body[:5], announced_bytes=len(body))
    await until(lambda: gateway.requests_in_progress() == 1)

    terminate()
    await until(lambda: gateway.services.drain.draining)
    writer.write(body[5:])
    status = await reader.readline()
    writer.close()

    assert status.startswith(b"HTTP/1.1 503 ")
    assert gateway.mock.requests == []


@pytest.mark.parametrize("expects", [b"", b"Expect: 100-continue\r\n"], ids=["half a body", "expecting"])
async def test_request_whose_body_is_not_complete_at_the_end_is_told(serve: Start, expects: bytes) -> None:
    gateway = await serve(server={"drain_timeout_s": 0.05})
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n".encode()
    writer.write(head + expects + b"Content-Length: 100\r\n\r\n" + (b"" if expects else b"{"))
    await until(lambda: gateway.requests_in_progress() == 1)

    terminate()
    answer = (await asyncio.wait_for(reader.read(), 5)).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    writer.close()

    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert b"shut down before the request was complete" in answer
    await ended(gateway)
