"""The chat workflow: one generation between the lifecycle events of one agent, aborted when it is left."""

from __future__ import annotations

import pytest

from engine.base import Delta, EngineDied, GenerationRequest
from engine.mock import Fault, MockEngine
from gateway.conversations.sessions import Session
from gateway.errors import BadRequest, Unavailable
from gateway.exchange.events import Event, ShannonEvent
from gateway.workflows.chat import chat
from tests.support.app import HELLO, NOW
from tests.support.metered import metered

pytestmark = pytest.mark.anyio

REQUEST = GenerationRequest(request_id="r1", messages=HELLO, stream=True)


async def run(engine: MockEngine, seen: list[Event] | None = None) -> list[Event]:
    seen = [] if seen is None else seen
    async for item in chat(REQUEST, (await metered(engine)).meter, Session(), lambda: NOW + 0.9):
        seen.append(item)
    return seen


def names(events: list[Event]) -> list[str]:
    return [item.type if isinstance(item, ShannonEvent) else item.text for item in events]


async def test_deltas_come_between_lifecycle_events() -> None:
    events = await run(MockEngine(reply="one two"))

    assert names(events) == [
        *("WORKFLOW_STARTED", "AGENT_STARTED"),
        *("one", " two"),
        *("AGENT_COMPLETED", "WORKFLOW_COMPLETED"),
    ]


async def test_events_may_wait_for_a_frame_that_exists_anyway() -> None:
    events = [item for item in await run(MockEngine()) if isinstance(item, ShannonEvent)]

    assert all(event.deferrable for event in events)
    assert {event.timestamp for event in events} == {NOW}


async def test_completed_agent_says_what_was_spent() -> None:
    completed = (await run(MockEngine(reply="one two")))[-2]

    assert isinstance(completed, ShannonEvent)
    assert completed.agent_id == "Ryogoku"
    assert completed.payload == {"role": "generalist", "prompt_tokens": 3, "completion_tokens": 2}


async def test_refused_request_yields_nothing() -> None:
    seen: list[Event] = []
    with pytest.raises(BadRequest):
        await run(MockEngine(max_model_len=2), seen)

    assert seen == []


async def test_engine_failure_passes_through() -> None:
    engine = MockEngine(reply="one two")
    engine.faults.append(Fault(at_token=1, error=EngineDied("boom")))
    seen: list[Event] = []
    with pytest.raises(Unavailable, match="boom"):
        await run(engine, seen)

    assert names(seen) == ["WORKFLOW_STARTED", "AGENT_STARTED", "one"]


async def test_leaving_the_workflow_aborts_the_generation() -> None:
    engine = MockEngine(reply="one two three")
    events = chat(REQUEST, (await metered(engine)).meter, Session(), lambda: NOW)
    while not isinstance(await anext(events), Delta):
        pass
    assert engine.unfinished_requests == 1

    await events.aclose()

    assert engine.unfinished_requests == 0
    assert engine.counters.completion_tokens == 1
