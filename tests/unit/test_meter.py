"""The meter: each generation is settled exactly once, with what the engine spent, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engine.base import Delta, EngineDied, EngineOverloaded, GenerationRequest, Usage
from engine.mock import Fault, MockEngine
from gateway.errors import BadRequest, Overloaded, Unavailable
from tests.support.app import HELLO
from tests.support.metered import Metered, metered
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def begin(over: Metered, **fields: Any) -> AsyncGenerator[Delta, None]:
    request = GenerationRequest(request_id="r1", messages=HELLO, stream=True, **fields)
    return over.meter.generate(await over.meter.prepare(request))


async def generate(over: Metered, **fields: Any) -> list[Delta]:
    return [delta async for delta in await begin(over, **fields)]


def settled(over: Metered) -> list[tuple[int, int, str]]:
    """Return prompt tokens, completion tokens and error of each entry in the books."""
    return [(entry.prompt_tokens, entry.completion_tokens, entry.error) for entry in over.books.entries]


async def test_finished_generation_is_settled_once() -> None:
    over = await metered(MockEngine(reply="one two three"))
    deltas = await generate(over)

    assert [delta.text for delta in deltas] == ["one", " two", " three"]
    assert settled(over) == [(3, 3, "")]
    assert over.meter.usage == Usage(3, 3)
    assert over.books.entries[0].model_id == "shannon-chat"
    assert over.books.entries[0].key_id == "TestKey00001"


async def test_closed_generation_is_settled_once_with_what_was_spent() -> None:
    over = await metered(MockEngine(reply="one two three"))
    async with contextlib.aclosing(await begin(over)) as deltas:
        await anext(deltas)
        assert settled(over) == []

    assert settled(over) == [(3, 1, "")]
    assert over.engine.unfinished_requests == 0


async def test_cancelled_generation_is_settled_once_with_what_was_spent() -> None:
    over = await metered(MockEngine(reply="one two three"))
    over.engine.faults.append(Fault(at_token=2))  # hangs
    task = asyncio.create_task(generate(over))
    await until(lambda: over.engine.counters.completion_tokens == 2)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert settled(over) == [(3, 2, "")]


async def test_failed_generation_is_settled_once_with_what_was_spent() -> None:
    over = await metered(MockEngine(reply="one two three"))
    over.engine.faults.append(Fault(at_token=2, error=EngineDied("boom")))
    with pytest.raises(Unavailable, match="boom"):
        await generate(over)

    assert settled(over) == [(3, 2, "engine_unavailable")]


async def test_generation_that_never_left_the_queue_is_settled_at_nothing() -> None:
    over = await metered(MockEngine())
    over.engine.faults.append(Fault(error=EngineOverloaded("full")))
    with pytest.raises(Overloaded):
        await generate(over)

    assert settled(over) == [(0, 0, "server_overloaded")]
    assert over.metrics.first_tokens == []


async def test_refused_request_is_settled_at_nothing() -> None:
    over = await metered(MockEngine(max_model_len=3))
    with pytest.raises(BadRequest, match="maximum context length"):
        await generate(over)

    assert settled(over) == [(0, 0, "context_length_exceeded")]


async def test_closing_twice_settles_once() -> None:
    over = await metered(MockEngine(reply="one two"))
    deltas = await begin(over)
    await anext(deltas)
    await deltas.aclose()
    await deltas.aclose()

    assert len(over.books.entries) == 1


async def test_usage_is_the_sum_over_generations() -> None:
    over = await metered(MockEngine(reply="one two"))
    await generate(over)
    await generate(over, n=2)

    assert settled(over) == [(3, 2, ""), (3, 4, "")]
    assert over.meter.usage == over.engine.counters == Usage(6, 6)


async def test_generations_of_one_request_count_as_one_request() -> None:
    over = await metered(MockEngine())
    await generate(over)
    await generate(over)

    assert [entry.requests for entry in over.books.entries] == [1, 0]


async def test_aborts_are_noted_but_failures_are_not_aborts() -> None:
    over = await metered(MockEngine(reply="one two"))
    await generate(over)
    over.engine.faults.append(Fault(error=EngineDied("boom")))
    with pytest.raises(Unavailable):
        await generate(over)
    deltas = await begin(over)
    await anext(deltas)
    await deltas.aclose()

    assert [entry.aborted_requests for entry in over.books.entries] == [0, 0, 1]


async def test_time_to_first_token_is_taken_once_per_generation() -> None:
    over = await metered(MockEngine(reply="one two three"))
    await generate(over)
    await generate(over)

    assert over.metrics.first_tokens == ["shannon-chat", "shannon-chat"]
