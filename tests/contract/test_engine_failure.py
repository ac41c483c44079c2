"""A dead or frozen engine: streams get an error, /ready fails, and the engine is restarted or given up."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.mock import Fault, MockEngine
from tests.support.app import Gateway, Start
from tests.support.frames import data_lines
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


class Engines:
    """Builds engines; all but the first start only once `rebuilt` is set."""

    def __init__(self) -> None:
        self.rebuilt = asyncio.Event()
        self._first = True

    def __call__(self) -> MockEngine:
        if self._first:
            self._first = False
            return MockEngine(reply="one two three")
        return _Waiting(self.rebuilt)


class _Waiting(MockEngine):
    def __init__(self, gate: asyncio.Event) -> None:
        super().__init__(reply="four five six")
        self._gate = gate

    async def start(self) -> None:
        await self._gate.wait()
        await super().start()


async def break_under_a_stream(gateway: Gateway, how: str) -> bytes:
    """Kill or freeze the engine under a stream that has one token, and return all that its client got."""
    gateway.mock.faults.append(Fault(at_token=1))
    broken = gateway.mock
    async with gateway.stream() as response:
        pieces = response.aiter_raw()
        raw = b""
        while b'"one"' not in raw:
            raw += await anext(pieces)
        getattr(broken, how)()
        raw += b"".join([piece async for piece in pieces])
    assert broken.unfinished_requests == 0
    return raw


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_broken_engine_is_reported_and_replaced(serve: Start, how: str) -> None:
    engines = Engines()
    gateway = await serve(mock=engines, engine_stall_s=0.1)

    raw = await break_under_a_stream(gateway, how)

    assert json.loads(data_lines(raw)[-1])["error"] == {
        "message": "The engine failed during generation.",
        "type": "server_error",
        "param": None,
        "code": "engine_unavailable",
    }
    assert b"[DONE]" not in raw

    await until(lambda: len(gateway.mocks) == 2)
    ready = await gateway.client.get("/ready")
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "draining": False, "engines": {"main": "restarting"}}
    assert (await gateway.client.get("/health")).status_code == 200
    assert await gateway.samples("shannon_engine_ready") == {("main",): 0}
    for stream in (False, True):
        refused = await gateway.chat(stream=stream)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert refused.json()["error"]["message"] == ("The engine is restarting after a failure. Try again shortly.")
        assert refused.headers["x-should-retry"] == "true"
        assert 1 <= int(refused.headers["retry-after"]) <= 120

    engines.rebuilt.set()
    await until(lambda: gateway.engine.state == "ready")

    assert (await gateway.client.get("/ready")).status_code == 200
    assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == "four five six"
    assert await gateway.metered() == gateway.spent()


async def test_all_streams_of_a_dead_engine_are_told(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002, max_model_len=4096))
    first = gateway.mock

    async def stream() -> bytes:
        async with gateway.stream(ignore_eos=True, max_tokens=3000) as response:
            return await response.aread()

    streams = [asyncio.create_task(stream()) for _ in range(8)]
    await until(lambda: first.unfinished_requests == 8 and first.counters.completion_tokens > 30)

    first.kill()

    for raw in await asyncio.gather(*streams):
        assert raw.count(b'data: {"error":') == 1
        assert json.loads(data_lines(raw)[-1])["error"]["code"] == "engine_unavailable"
    assert first.unfinished_requests == 0
    assert await gateway.metered() == gateway.spent()


async def test_engine_that_fails_too_often_ends_the_process(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply="one two"), max_engine_restarts=1)
    await break_under_a_stream(gateway, "kill")
    await until(lambda: gateway.engine.state == "ready")

    await break_under_a_stream(gateway, "kill")

    assert gateway.serving is not None
    assert gateway.server is not None
    async with asyncio.timeout(5):
        await asyncio.shield(gateway.serving)
    assert len(gateway.mocks) == 2
    assert gateway.engine.failed.is_set()
    assert str(gateway.engine.failure) == "Engine main failed 2 times in 600 s."
    assert gateway.server.exit_code == 1


async def test_failed_engine_refuses_requests(start: Start) -> None:
    gateway = await start(max_engine_restarts=0)
    gateway.mock.kill()
    await until(gateway.engine.failed.is_set)

    response = await gateway.chat()

    assert response.status_code == 503
    assert response.json()["error"]["message"] == "The engine has failed."
    assert (await gateway.client.get("/ready")).json()["engines"] == {"main": "failed"}
    assert (await gateway.client.get("/health")).status_code == 200


async def test_idle_engine_that_dies_is_replaced(start: Start) -> None:
    gateway = await start()
    gateway.mock.kill()
    await until(lambda: len(gateway.mocks) == 2 and gateway.engine.state == "ready")

    assert (await gateway.chat()).status_code == 200
