"""The queue in front of the engine, as clients see it: comments while they wait, 503 without room, fair turns."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import openai
import pytest

from engine.base import EngineOverloaded
from engine.mock import Fault, MockEngine
from engine.queue.admission import QueuedEngine
from gateway.access.keys import KeySpec, make_key, split_key
from gateway.components import build_engines
from gateway.errors import from_engine
from gateway.settings.config import parse_config
from tests.support.app import HELLO, KEY_ID, Gateway, Start
from tests.support.frames import chunks
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

COMMENT = re.compile(rb": queued position=(\d+) wait_s=(\d+)\n\n")


class Queue:
    """A gateway whose engines stand behind queues, and those engines."""

    def __init__(self) -> None:
        self.inner: list[MockEngine] = []
        self.gateway: Gateway

    def build(self, **options: Any) -> MockEngine:
        """Return an engine behind a queue. The gateway under test calls for a mock, and uses no more than an Engine."""
        self.inner.append(MockEngine(reply="one two", max_num_seqs=options.pop("slots", 1)))
        return cast(MockEngine, QueuedEngine(self.inner[-1], **options))

    @property
    def engine(self) -> MockEngine:
        return self.inner[-1]

    async def until_waiting(self, requests: int) -> None:
        queued = cast(QueuedEngine, self.gateway.engine.current)
        await until(lambda: queued.queued_requests == requests)

    @contextlib.asynccontextmanager
    async def occupied(self) -> AsyncIterator[httpx.Response]:
        """Hold the engine's only slot inside the block."""
        self.engine.faults.append(Fault(at_token=1))
        async with self.gateway.stream() as response:
            pieces = response.aiter_raw()
            await anext(pieces)
            yield response

    async def metrics(self, name: str) -> dict[tuple[str, ...], float]:
        return await self.gateway.samples(name)


@pytest.fixture
def queue(serve: Start) -> Any:
    """Open a gateway whose engine runs one sequence at a time, or `slots`."""

    async def open_queue(**options: Any) -> Queue:
        opened = Queue()
        opened.gateway = await serve(mock=lambda: opened.build(**options))
        return opened

    return open_queue


async def key_of(gateway: Gateway, **spec: Any) -> dict[str, str]:
    """Make a key. Returns the header that presents it."""
    _, key = await gateway.services.keys.create(KeySpec(name="test", **spec))
    return {"Authorization": f"Bearer {key}"}


async def test_waiting_stream_is_told_its_position_every_second(queue: Any) -> None:
    line: Queue = await queue()
    async with line.occupied() as blocker:
        first = asyncio.create_task(line.gateway.chat(stream=True))
        await line.until_waiting(1)
        async with line.gateway.stream() as response:
            raw = b""
            pieces = response.aiter_raw()
            while len(COMMENT.findall(raw)) < 2:
                raw += await anext(pieces)
            comments = COMMENT.findall(raw)
            assert COMMENT.sub(b"", raw) == b""
            assert [position for position, _ in comments] == [b"2", b"2"]
            assert int(comments[1][1]) >= int(comments[0][1]) >= 1
            assert response.status_code == 200
            assert "x-ratelimit-remaining-tokens" in response.headers
            await blocker.aclose()
            raw += b"".join([piece async for piece in pieces])

    text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in chunks(raw))
    assert text == "one two"
    assert chunks((await first).content)


async def test_openai_sdk_waits_through_the_comments(queue: Any) -> None:
    line: Queue = await queue()

    async def ask() -> str:
        async with openai.AsyncOpenAI(
            api_key=line.gateway.key, base_url=f"{line.gateway.url}/v1", max_retries=0
        ) as client:
            stream = await client.chat.completions.create(
                model="shannon-chat", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            heard.set()
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    heard = asyncio.Event()
    async with line.occupied():
        asked = asyncio.create_task(ask())
        await heard.wait()  # the status came with the first comment

    assert await asked == "one two"


async def test_whole_answer_just_waits(queue: Any) -> None:
    line: Queue = await queue()
    async with line.occupied():
        waiting = asyncio.create_task(line.gateway.chat())
        await line.until_waiting(1)

    assert (await waiting).json()["choices"][0]["message"]["content"] == "one two"


@pytest.mark.parametrize("stream", [True, False])
async def test_full_queue_is_503_with_retry_after(queue: Any, stream: bool) -> None:
    line: Queue = await queue(max_queued_requests=0)
    async with line.occupied():
        response = await line.gateway.chat(stream=stream)

    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "The server is overloaded. Try again shortly.",
        "type": "server_error",
        "param": None,
        "code": "server_overloaded",
    }
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert response.headers["x-should-retry"] == "true"
    assert await line.metrics("shannon_queue_rejections_total") == {("main", "full"): 1}
    (row,) = await line.gateway.services.ledger.totals(KEY_ID)
    assert row["errors"] == {"server_overloaded": 1}


async def test_wait_that_grew_too_long_is_503(queue: Any) -> None:
    line: Queue = await queue(max_wait_s=0.02)
    async with line.occupied():
        response = await line.gateway.chat()

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "server_overloaded"
    assert await line.metrics("shannon_queue_rejections_total") == {("main", "timeout"): 1}


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_the_queue_costs_nothing(queue: Any, stream: bool) -> None:
    line: Queue = await queue()
    async with line.occupied():
        waiting = asyncio.create_task(line.gateway.chat(stream=stream))
        await line.until_waiting(1)
        assert await line.metrics("shannon_queue_depth") == {("main",): 1}
        assert (await line.metrics("shannon_queue_longest_wait_seconds"))[("main",)] > 0

        waiting.cancel()

        await line.until_waiting(0)
        assert await line.metrics("shannon_queue_depth") == {("main",): 0}
    await until(lambda: line.gateway.requests_in_progress() == 0)

    assert (line.engine.counters.prompt_tokens, line.engine.counters.completion_tokens) == (3, 1)
    (row,) = await line.gateway.services.ledger.totals(KEY_ID)
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (2, 3, 1)
    left = int((await line.gateway.chat()).headers["x-ratelimit-remaining-tokens"])
    assert left == 200_000 - 4 - 5, "what was reserved went back"


async def test_keys_take_turns(queue: Any) -> None:
    line: Queue = await queue()
    other = await key_of(line.gateway)
    order: list[str] = []

    async def ask(name: str, headers: dict[str, str] | None = None) -> None:
        body = {"messages": [{"role": "user", "content": name}]}
        await line.gateway.client.post("/v1/chat/completions", json=body, headers=headers)
        order.append(name)

    async with line.occupied():
        asked = []
        for number, (name, headers) in enumerate([("a1", None), ("a2", None), ("a3", None), ("b1", other)], 1):
            asked.append(asyncio.create_task(ask(name, headers)))
            await line.until_waiting(number)
    await asyncio.gather(*asked)

    assert order.index("b1") < 2


async def test_priority_of_a_key_decides_who_goes_first(queue: Any) -> None:
    line: Queue = await queue()
    order: list[str] = []

    async def ask(name: str, headers: dict[str, str]) -> None:
        await line.gateway.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": name}]}, headers=headers
        )
        order.append(name)

    async with line.occupied():
        asked = []
        for number, priority in enumerate(("low", "normal", "high"), 1):
            asked.append(asyncio.create_task(ask(priority, await key_of(line.gateway, priority=priority))))
            await line.until_waiting(number)
    await asyncio.gather(*asked)

    assert order == ["high", "normal", "low"]


async def test_clients_can_not_choose_their_priority(queue: Any) -> None:
    line: Queue = await queue()
    response = await line.gateway.chat(priority=-5)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"


async def test_wait_is_part_of_the_time_in_the_queue(queue: Any) -> None:
    line: Queue = await queue()
    async with line.occupied():
        waiting = asyncio.create_task(line.gateway.chat())
        await line.until_waiting(1)
        await until(lambda: cast(QueuedEngine, line.gateway.engine.current).longest_wait_s > 0.02)
    await waiting

    assert (await line.metrics("shannon_queue_time_seconds_sum"))[("shannon-chat",)] > 0.02


async def test_those_who_wait_for_an_engine_that_dies_are_told(queue: Any) -> None:
    line: Queue = await queue()
    broken = line.engine
    async with line.occupied():
        waiting = [asyncio.create_task(line.gateway.chat(stream=stream)) for stream in (True, False)]
        await line.until_waiting(2)
        broken.freeze()  # it must not be asked again meanwhile
        broken.kill()
        answers = await asyncio.gather(*waiting)

    for response in answers:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
    await until(lambda: len(line.inner) == 2 and line.gateway.engine.state == "ready")
    assert (await line.gateway.chat()).status_code == 200


@pytest.mark.parametrize(("predicted_s", "told_s"), [(None, 1), (0.01, 1), (7.5, 7.5), (1000, 120)])
def test_retry_after_is_one_that_sdks_obey(predicted_s: float | None, told_s: float) -> None:
    assert from_engine(EngineOverloaded("9 wait", predicted_s)).retry_after_s == told_s


@pytest.mark.parametrize(("priority", "value"), [("high", -1), ("normal", 0), ("low", 1)])
async def test_configured_key_has_a_priority_as_well(start: Start, priority: str, value: int) -> None:
    key = make_key()
    gateway = await start(
        config={"keys": [{"name": "own", "key_env": "OWN", "priority": priority}]}, environment={"OWN": key}
    )
    await gateway.client.post(
        "/v1/chat/completions", json={"messages": HELLO}, headers={"Authorization": f"Bearer {key}"}
    )
    await gateway.chat()

    asked = [(request.flow, request.priority) for request in gateway.mock.requests]
    assert asked == [(split_key(key)[0], value), (KEY_ID, 0)]


async def test_key_of_an_unknown_priority_is_refused(gateway: Gateway) -> None:
    response = await gateway.client.post("/admin/keys", json={"name": "ci", "priority": "urgent"})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"


async def test_deployment_decides_about_the_queue() -> None:
    def engine_of(**admission: Any) -> Any:
        engines: dict[str, Any] = {"main": {"kind": "mock", "args": {"max_num_seqs": 4}, "admission": admission}}
        models = {"shannon-chat": {"description": "General chat completion"}}
        return build_engines(parse_config({"engines": engines, "models": models}))["main"].current

    assert isinstance(engine_of(), QueuedEngine)
    assert isinstance(engine_of(enabled=False), MockEngine)
    settings = {"policy": "fifo", "max_in_flight": 2, "in_flight_per_key": 1, "max_queued_requests": 5, "max_wait_s": 9}
    assert isinstance(engine_of(**settings), QueuedEngine)
