"""A run: its budget, its agents side by side, its events in order, and that nothing outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.base import EngineDied, EngineOverloaded, GenerationRequest
from engine.messages import ToolCall
from engine.mock import Fault, MockEngine
from gateway.conversations.sessions import Session
from gateway.errors import BadRequest, Unavailable
from gateway.exchange.events import ShannonEvent
from gateway.workflows.agents import Agent, Prompt
from gateway.workflows.run import AGENTS_SHARE, Budget, OutOfBudget, Run, check_for_agents, conduct
from gateway.workflows.stations import STATIONS, stations
from tests.support.metered import Metered, metered
from tests.support.scripted_model import FakeTool, ScriptedModel, make_run, outcome_of
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio

CALL: ToolCall = {"id": "x", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}

NOTES = Prompt("notes", {"task": "What?"}, ["material"])


@pytest.fixture
async def over() -> AsyncIterator[Metered]:
    metered_engine = await metered(MockEngine(reply=ScriptedModel(), max_model_len=8192))
    yield metered_engine
    assert metered_engine.engine.unfinished_requests == 0


def test_budget_sets_aside_and_takes_back() -> None:
    budget = Budget(10.0, 100, 2, 1)
    budget.take_tokens(60)
    with pytest.raises(OutOfBudget, match="100 tokens"):
        budget.take_tokens(41)
    budget.give_back_tokens(50)
    budget.take_tokens(90)
    assert budget.taken_tokens == 100


def test_budget_counts_tool_calls() -> None:
    budget = Budget(10.0, 100, 2, 1)
    budget.take_tool_call()
    budget.take_tool_call()
    with pytest.raises(OutOfBudget, match="2 tool calls"):
        budget.take_tool_call()


def test_budget_tells_the_time_left_of_a_share() -> None:
    clock = FakeClock(100.0)
    budget = Budget(10.0, 100, 2, 1, now=clock)
    clock.advance(6.0)
    assert (budget.left_s(), budget.left_s(0.5)) == (4.0, -1.0)


def test_stations_never_run_out_and_never_repeat() -> None:
    names = list(itertools.islice(stations(), 100))
    assert names[:2] == ["Ryogoku", "Tokyo"]
    assert names[len(STATIONS)] == "Ryogoku-2"
    assert len(set(names)) == 100


@pytest.mark.parametrize("fields", [{"n": 2}, {"tools": [{"type": "function"}]}, {"logprobs": True}])
def test_what_only_a_single_generation_can_give_is_refused(fields: dict[str, Any]) -> None:
    (param,) = fields
    with pytest.raises(BadRequest) as caught:
        check_for_agents(GenerationRequest(request_id="r", **fields))
    assert caught.value.param == param


async def test_conversation_is_what_the_session_remembers_and_the_client_says(over: Metered) -> None:
    session = Session(
        history=[
            [
                {"role": "system", "content": "Old rules."},
                {"role": "user", "content": "First?"},
                {"role": "assistant", "content": "One [1], two [2, 3].\n\n## Sources\n\n[1] A (https://a.example) - a"},
            ],
            [
                {"role": "user", "content": "Call it."},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "x", "content": "called"},
                {"role": "assistant", "content": "Called: a[1]."},
            ],
        ]
    )
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    asked = {"role": "user", "content": [{"type": "text", "text": "Second?"}, picture]}
    run = make_run(over.meter, session=session, messages=[{"role": "system", "content": "New rules."}, asked])

    assert run.question == "Second?"
    assert run.images == [picture]
    assert run.system_prompt == "New rules."
    assert run.earlier_turns == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One, two."},
        {"role": "user", "content": "Call it."},
        {"role": "assistant", "content": "Called: a[1]."},
    ]
    assert run.conversation.startswith("user: First?\nassistant: One, two.")


async def test_first_question_has_no_earlier_turns(over: Metered) -> None:
    run = make_run(over.meter)
    assert (run.earlier_turns, run.conversation, run.images, run.system_prompt) == ([], "(nothing)", [], "")
    alone = make_run(over.meter, messages=[{"role": "system", "content": "Only rules."}])
    assert alone.question == "Only rules."


@pytest.mark.parametrize(
    ("fields", "constrained"),
    [
        ({}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"choice": ["a"]}}, True),
    ],
)
async def test_run_knows_when_the_answer_is_bound(over: Metered, fields: dict[str, Any], constrained: bool) -> None:
    assert make_run(over.meter, **fields).constrained is constrained


async def test_context_is_text_or_json(over: Metered) -> None:
    assert make_run(over.meter, options={"context": "We sell tea."}).context == "We sell tea."
    assert make_run(over.meter, options={"context": {"sells": "tea"}}).context == '{"sells":"tea"}'
    assert make_run(over.meter).context == ""


async def test_gather_returns_results_in_order_and_keeps_to_the_places(over: Metered) -> None:
    run = make_run(over.meter, budget=Budget(60.0, 1000, 10, 2))
    running: list[int] = []
    most = 0

    async def job(number: int) -> int:
        nonlocal most
        running.append(number)
        most = max(most, len(running))
        await asyncio.sleep(0.001 * (5 - number))
        running.remove(number)
        return number

    assert await run.gather([lambda n=n: job(n) for n in range(5)]) == [0, 1, 2, 3, 4]  # type: ignore[misc]
    assert most == 2
    assert await run.gather([]) == []


async def test_gather_goes_on_without_what_runs_out_of_time(over: Metered) -> None:
    run = make_run(over.meter, budget=Budget(2.0, 1000, 10, 2))
    cancelled: list[str] = []

    async def hang(name: str) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(name)
            raise
        return name

    async def quick() -> str:
        return "quick"

    # The third waits for a place that never comes free.
    results = await run.gather([quick, lambda: hang("a"), lambda: hang("b"), lambda: hang("c")], share=0.02)

    assert results == ["quick", None, None, None]
    assert cancelled == ["a", "b"]
    assert run.left_s() > 0, "the share was for these jobs only"


async def test_gather_ends_all_jobs_when_one_fails_for_the_run(over: Metered) -> None:
    run = make_run(over.meter)
    cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise Unavailable("gone")

    with pytest.raises(Unavailable, match="gone"):
        await run.gather([hang, fail])
    assert cancelled.is_set()


async def test_gather_waits_for_what_a_job_needs_without_taking_a_place(over: Metered) -> None:
    run = make_run(over.meter, budget=Budget(60.0, 1000, 10, 1))
    done = [asyncio.Event() for _ in range(3)]
    order: list[int] = []

    async def job(number: int) -> None:
        order.append(number)
        done[number].set()

    async def ready(number: int) -> None:
        if number < 2:  # each needs the one behind it
            await done[number + 1].wait()

    await run.gather([lambda n=n: job(n) for n in range(3)], ready=ready)  # type: ignore[misc]
    assert order == [2, 1, 0]


async def test_waiting_for_something_that_never_ends_stops_with_the_time(over: Metered) -> None:
    run = make_run(over.meter, budget=Budget(0.1, 1000, 10, 1))

    async def job() -> int:
        return 1

    async def ready(number: int) -> None:
        await asyncio.Event().wait()

    assert await run.gather([job, job], ready=ready) == [None, None]


async def test_events_frame_what_a_workflow_sends(over: Metered) -> None:
    async def workflow(run: Run) -> None:
        async with Agent(run, "synthesis", "writer") as writer:
            await writer.speak(NOTES)
        run.result["sources"] = []

    outcome = await outcome_of(workflow, make_run(over.meter))

    assert [event.type for event in outcome.events] == [
        *("WORKFLOW_STARTED", "AGENT_STARTED", "AGENT_COMPLETED", "WORKFLOW_COMPLETED"),
    ]
    assert outcome.text == "Noted [99]."
    assert outcome.result == {"model": "shannon-chat", "sources": []}
    assert {event.timestamp for event in outcome.events} == {1_700_000_000}


async def test_events_wait_for_a_frame_until_something_has_run(over: Metered) -> None:
    """So that a refusal has its own status: a frame would send 200."""

    async def workflow(run: Run) -> None:
        async with Agent(run, "planner", "planner") as planner:
            await planner.write(NOTES, 10)

    outcome = await outcome_of(workflow, make_run(over.meter))
    assert [event.deferrable for event in outcome.events] == [True, True, False, True]


async def test_what_the_engine_would_refuse_is_refused_before_agents_run(over: Metered) -> None:
    started: list[Run] = []

    async def workflow(run: Run) -> None:
        started.append(run)

    for fields in ({"max_tokens": 9000}, {"n": 2}, {"messages": [{"role": "user", "content": "word " * 9000}]}):
        with pytest.raises(BadRequest):
            await outcome_of(workflow, make_run(over.meter, **fields))

    assert started == []
    assert [entry.error for entry in over.books.entries] == [
        *("context_length_exceeded", "invalid_request", "context_length_exceeded")
    ]
    assert sum(entry.requests for entry in over.books.entries) == 1, "one meter is one request"


async def test_request_is_counted_once_and_its_agents_are_summed(over: Metered) -> None:
    async def workflow(run: Run) -> None:
        for name in ("planner", "synthesis"):
            async with Agent(run, name, "writer") as agent:
                await agent.write(NOTES, 50)

    outcome = await outcome_of(workflow, make_run(over.meter))
    entries = over.books.entries

    assert sum(entry.requests for entry in entries) == 1
    assert over.meter.usage == over.engine.counters
    assert sum(entry.prompt_tokens for entry in entries) == over.engine.counters.prompt_tokens
    spent = [event.payload for event in outcome.of("AGENT_COMPLETED")]
    assert sum(payload["prompt_tokens"] for payload in spent) == over.engine.counters.prompt_tokens
    assert sum(payload["completion_tokens"] for payload in spent) == over.engine.counters.completion_tokens
    assert [entry.lease for entry in entries] == ["", "", "request-1"], "it stays one running request in between"


async def test_failed_generation_that_ends_nothing_is_no_failed_request(over: Metered) -> None:
    over.engine.faults.append(Fault(error=EngineOverloaded("full", retry_after_s=0.01)))

    async def workflow(run: Run) -> None:
        run.begun = True
        async with Agent(run, "planner", "planner") as planner:
            await planner.write(NOTES, 50)

    await outcome_of(workflow, make_run(over.meter))
    assert [(entry.error, entry.aborted_requests) for entry in over.books.entries] == [("", 0)] * 3


async def test_failure_that_ends_the_run_is_raised_and_noted(over: Metered) -> None:
    over.engine.faults.append(Fault(at_token=1, error=EngineDied("boom")))

    async def workflow(run: Run) -> None:
        async with Agent(run, "planner", "planner") as planner:
            await planner.write(NOTES, 50)

    with pytest.raises(Unavailable, match="boom"):
        await outcome_of(workflow, make_run(over.meter))
    assert [entry.error for entry in over.books.entries] == ["", "engine_unavailable"]


async def test_workflow_that_runs_out_of_budget_ends_with_an_error_for_clients(over: Metered) -> None:
    async def workflow(run: Run) -> None:
        raise OutOfBudget("the time of this run is used up")

    with pytest.raises(Unavailable, match="the time of this run is used up"):
        await outcome_of(workflow, make_run(over.meter))


async def test_fault_in_the_code_is_raised_and_noted(over: Metered) -> None:
    async def workflow(run: Run) -> None:
        raise KeyError("secret")

    with pytest.raises(KeyError):
        await outcome_of(workflow, make_run(over.meter))
    (entry,) = over.books.entries
    assert (entry.error, entry.requests, entry.aborted_requests) == ("internal_error", 1, 0)


async def _two_hanging_agents(run: Run) -> None:
    async def job(name: str) -> None:
        async with Agent(run, name, "researcher") as agent:
            await agent.write(NOTES, 50)
            await agent.use("web_search", query="x")

    await run.gather([lambda: job("Ueno"), lambda: job("Tabata")])


@pytest.mark.parametrize("taken", range(1, 14))
async def test_closing_leaves_nothing_behind(over: Metered, taken: int) -> None:
    """Wherever the client leaves: in a generation, in a tool call, or between them."""
    tool = FakeTool("web_search")
    tool.hangs = True
    over.engine._token_s = 0.001
    before = asyncio.all_tasks()
    run = make_run(over.meter, tool)
    events = conduct(_two_hanging_agents, run)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2), contextlib.aclosing(events):
            for _ in range(taken):
                await anext(events)

    assert over.engine.unfinished_requests == 0
    assert (tool.running, tool.cancelled) == (0, len(tool.calls))
    assert over.meter.usage == over.engine.counters
    assert sum(entry.aborted_requests for entry in over.books.entries) == (1 if taken > 1 else 0)
    assert sum(entry.requests for entry in over.books.entries) <= 1
    assert asyncio.all_tasks() == before


async def test_cancelling_the_reader_cancels_everything(over: Metered) -> None:
    tool = FakeTool("web_search")
    tool.hangs = True
    before = asyncio.all_tasks()
    run = make_run(over.meter, tool)

    async def read() -> None:
        async with contextlib.aclosing(conduct(_two_hanging_agents, run)) as events:
            async for _ in events:
                pass

    reader = asyncio.create_task(read())
    await until(lambda: tool.running == 2)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader

    assert (tool.running, tool.cancelled) == (0, 2)
    assert asyncio.all_tasks() == before


async def test_agents_stop_in_time_for_the_answer(over: Metered) -> None:
    clock = FakeClock()
    run = make_run(over.meter, FakeTool("web_search"), budget=Budget(10.0, 1000, 10, 2, now=clock))
    run.begun = True
    clock.advance(10 * AGENTS_SHARE)
    agent = Agent(run, "planner", "planner")
    with pytest.raises(OutOfBudget, match="time"):
        await agent.write(NOTES, 10)
    with pytest.raises(OutOfBudget, match="time"):
        await agent.use("web_search", query="x")

    text, _ = await agent.speak(NOTES)
    assert text, "the answer is written in any case"


async def test_events_of_one_agent_keep_their_order(over: Metered) -> None:
    async def workflow(run: Run) -> None:
        async def job(name: str) -> None:
            async with Agent(run, name, "researcher") as agent:
                for number in range(5):
                    agent.think(f"{number}")
                    await asyncio.sleep(0)

        await run.gather([lambda: job("Ueno"), lambda: job("Tabata")])

    outcome = await outcome_of(workflow, make_run(over.meter))
    for name in ("Ueno", "Tabata"):
        assert [event.message for event in outcome.of("AGENT_THINKING", name)] == list("01234")
    assert all(isinstance(event, ShannonEvent) for event in outcome.order)
