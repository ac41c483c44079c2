"""The models with agents over HTTP: accounting, limits, departures, sessions, options, and other protocols."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest

from engine.base import Delta, EngineDied
from engine.mock import Fault
from gateway.tools.base import Toolbox
from tests.support.agent_models import AGENTS, content, place
from tests.support.app import Start
from tests.support.event_grammar import check_events
from tests.support.frames import chunks
from tests.support.rate_limits import assert_six, remaining
from tests.support.scripted_model import steps, text_of
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


# Whole requests


@pytest.mark.parametrize("workflow", AGENTS)
async def test_streamed_and_whole_say_the_same_and_cost_what_the_engine_counted(start: Start, workflow: str) -> None:
    here = await place(start, workflow)
    whole = (await here.gateway.chat()).json()
    spent = here.gateway.spent()
    assert whole["usage"]["prompt_tokens"] == spent.prompt_tokens
    assert whole["usage"]["completion_tokens"] == spent.completion_tokens
    completed = [event["payload"] for event in whole["shannon_events"] if event["type"] == "AGENT_COMPLETED"]
    assert sum(payload["prompt_tokens"] for payload in completed) == spent.prompt_tokens
    assert sum(payload["completion_tokens"] for payload in completed) == spent.completion_tokens

    frames = chunks((await here.gateway.chat(stream=True)).content)
    assert content(frames) == whole["choices"][0]["message"]["content"]
    assert frames[-1]["usage"] == whole["usage"]
    row = await here.ledger()
    assert (row["requests"], row["aborted_requests"], row["errors"]) == (2, 0, {})
    await here.settled()


async def test_answer_streams_while_it_is_made(serve: Start) -> None:
    here = await place(serve, "standard_research", token_s=0.003, scripts={"answer": "word " * 200})
    seen_early = False
    async with here.gateway.stream() as response:
        async for piece in response.aiter_raw():
            seen_early = seen_early or (b'"content":"word"' in piece and here.gateway.mock.unfinished_requests > 0)
    assert seen_early


async def test_six_agents_take_less_than_twice_the_time_of_one(serve: Start) -> None:
    count = 1
    here = await place(
        serve,
        "complex",
        token_s=0.004,
        scripts={"complex_plan": lambda _: steps(*([] for _ in range(count))), "complex_step": "word " * 200},
    )

    async def timed() -> float:
        started = time.perf_counter()
        body = (await here.gateway.chat()).json()
        roles = [event["payload"]["role"] for event in body["shannon_events"] if event["type"] == "AGENT_STARTED"]
        assert roles.count("analyst") == count
        return time.perf_counter() - started

    one_s = await timed()
    count = 6
    assert await timed() < 2 * one_s


# Departures


@pytest.mark.parametrize("workflow", AGENTS)
@pytest.mark.parametrize("frames", [1, 4, 9, 16, 25])
async def test_leaving_a_stream_aborts_everything(serve: Start, workflow: str, frames: int) -> None:
    here = await place(serve, workflow, token_s=0.002)
    async with here.gateway.stream() as response:
        seen = 0
        async for line in response.aiter_lines():
            seen += line.startswith("data: {")
            if seen >= frames:
                break

    await here.settled()
    assert (await here.ledger())["requests"] == 1
    before = here.gateway.spent()
    assert (await here.gateway.chat()).status_code == 200, "it serves on"
    assert here.gateway.spent() != before
    await here.settled()


@pytest.mark.parametrize("workflow", AGENTS[:4])
async def test_leaving_cancels_tool_calls(serve: Start, workflow: str) -> None:
    here = await place(serve, workflow)
    here.search.hangs = True
    request = asyncio.create_task(here.gateway.chat(stream=True))
    await until(lambda: here.search.running > 0)
    running = here.search.running
    request.cancel()

    await here.settled()
    assert here.search.cancelled == running
    row = await here.ledger()
    assert (row["requests"], row["aborted_requests"]) == (1, 1)


async def test_leaving_a_whole_answer_aborts_everything(serve: Start) -> None:
    here = await place(serve, "deep_research", token_s=0.003)
    request = asyncio.create_task(here.gateway.chat())
    await until(lambda: here.gateway.mock.unfinished_requests > 3)
    request.cancel()
    await here.settled()


async def test_books_balance_under_a_crowd_that_comes_and_goes(serve: Start) -> None:
    here = await place(serve, "standard_research", token_s=0.001)

    async def visit(number: int) -> None:
        try:
            async with asyncio.timeout(0.02 * number if number % 2 else None):
                await here.gateway.chat(stream=number % 3 == 0)
        except TimeoutError:
            pass

    await asyncio.gather(*(visit(number) for number in range(12)))
    await here.settled()
    row = await here.ledger()
    assert row["requests"] <= 12
    assert row["aborted_requests"] <= 6


async def test_silent_tools_do_not_silence_the_stream(serve: Start) -> None:
    here = await place(serve, "standard_research", server={"keepalive_s": 0.01})
    here.search.hangs = True
    async with here.gateway.stream() as response:
        async for piece in response.aiter_raw():
            if b": keepalive" in piece:
                break
    await here.settled()


# Limits


async def test_refused_at_the_start_with_the_status_that_it_deserves(start: Start) -> None:
    limits = {"tokens_per_minute": 4000, "requests_per_minute": 20}
    here = await place(start, "quick_research", settings={"limits": limits})
    responses = [await here.gateway.chat(stream=True)]
    while responses[-1].status_code == 200:
        responses.append(await here.gateway.chat(stream=len(responses) % 2 == 0))

    refused = responses[-1]
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert_six(refused)
    assert 0 < int(refused.headers["retry-after"]) <= 61
    assert remaining(refused)[0] == remaining(responses[-2])[0], "a refused request is not counted"
    row = await here.ledger()
    assert row["requests"] == len(responses)
    assert row["errors"] == {"rate_limit_exceeded": 1}
    assert here.search.calls.count({"query": "query 1"}) == len(responses) - 1
    await here.settled()


async def test_too_many_requests_are_refused_before_anything_runs(start: Start) -> None:
    here = await place(start, "complex", settings={"limits": {"requests_per_minute": 1}})
    assert (await here.gateway.chat()).status_code == 200
    spent = here.gateway.spent()
    refused = await here.gateway.chat(stream=True)
    assert refused.status_code == 429
    assert_six(refused)
    assert here.gateway.spent() == spent


async def test_limit_reached_on_the_way_is_waited_for_or_done_without(start: Start) -> None:
    """Never a 429 in the middle: what was found is sent as it is, when the window would open too late."""
    budget = {"seconds": 5}
    here = await place(
        start, "standard_research", settings={"limits": {"tokens_per_minute": 1100}, "budget": budget},
    )  # fmt: skip
    response = await here.gateway.chat(stream=True)
    frames = chunks(response.content)
    events = [event for frame in frames for event in frame.get("shannon_events", [])]

    assert response.status_code == 200
    assert frames[-1]["choices"][0]["finish_reason"] == "length"
    assert content(frames).startswith("The limits of this API key left no room to write an answer.")
    assert "## Part 1?" in content(frames)
    assert "## Sources" in content(frames)
    check_events(events)
    row = await here.ledger()
    assert (row["requests"], row["errors"]) == (1, {})
    assert row["prompt_tokens"] + row["completion_tokens"] <= 1100
    await here.settled()


async def test_agents_take_turns_where_their_reservations_do_not_fit_together(start: Start) -> None:
    """Each sets aside more than it spends; what it gives back lets the next one in, long before the window moves."""
    limits = {"tokens_per_minute": 2600}
    here = await place(
        start,
        "complex",
        token_s=0.001,
        settings={"limits": limits, "defaults": {"max_tokens": 300}, "budget": {"seconds": 30}},
        scripts={"complex_plan": steps(*([] for _ in range(8)))},
    )
    object.__setattr__(here.gateway.services, "tools", Toolbox())
    started = time.monotonic()
    body = (await here.gateway.chat()).json()
    waits = [event for event in body["shannon_events"] if "wait_s" in event["payload"]]

    assert body["choices"][0]["message"]["content"] == "All is done."
    assert waits, "eight steps of 500 tokens and more do not fit at once"
    assert time.monotonic() - started < 30
    assert body["usage"]["total_tokens"] < 2600


async def test_deep_research_fits_the_limits_that_it_is_shipped_with(start: Start) -> None:
    limits = {"tokens_per_minute": 100_000, "requests_per_minute": 10}
    here = await place(
        start, "academic_research", settings={"limits": limits, "defaults": {"max_tokens": 8192}},
        scripts={"notes": "word " * 280},
    )  # fmt: skip
    here.fetch.pages = {f"https://query-{n}.example/page": "word " * 3000 for n in range(9)}
    body = (await here.gateway.chat()).json()
    assert not [event for event in body["shannon_events"] if "wait_s" in event["payload"]]
    assert body["usage"]["total_tokens"] < 100_000
    check_events(body["shannon_events"])


async def test_concurrent_requests_are_counted_while_agents_are_between_generations(serve: Start) -> None:
    here = await place(serve, "standard_research", settings={"limits": {"concurrent_requests": 1}})
    here.search.hangs = True
    first = asyncio.create_task(here.gateway.chat(stream=True))
    await until(lambda: here.search.running == 3)
    refused = await here.gateway.chat()
    assert refused.status_code == 429
    assert "concurrent" in refused.json()["error"]["message"]
    first.cancel()
    await here.settled()
    here.search.hangs = False
    assert (await here.gateway.chat()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workflow", ["ads_research", "analytics"])
async def test_answer_that_asks_no_model_is_a_request_all_the_same(start: Start, workflow: str, stream: bool) -> None:
    here = await place(start, workflow, settings={"limits": {"requests_per_minute": 2}})
    responses = [await here.gateway.chat(stream=stream) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert [remaining(response)[0] for response in responses] == [1, 0, 0]
    for response in responses:
        assert_six(response)
    assert b"configured" in responses[0].content
    assert here.gateway.spent().completion_tokens == 0
    refused = await here.gateway.chat(stream=stream, response_format={"type": "json_object"})
    assert refused.status_code == 400
    assert_six(refused)


async def test_answers_that_ask_no_model_hold_no_place(start: Start) -> None:
    here = await place(start, "analytics", settings={"limits": {"concurrent_requests": 1}})
    responses = [await here.gateway.chat() for _ in range(20)]
    assert {response.status_code for response in responses} == {200}


# Failures


async def test_dead_engine_on_the_way_ends_the_stream_with_a_clean_error(serve: Start) -> None:
    here = await place(serve, "standard_research", token_s=0.001)
    async with here.gateway.stream() as response:
        assert response.status_code == 200
        raw = b""
        async for piece in response.aiter_raw():
            raw += piece
            if b"TOOL_OBSERVATION" in raw and here.gateway.mock.started:
                here.gateway.mock.faults.extend([Fault(error=EngineDied("boom"))] * 9)
    *_, last = [line for line in raw.split(b"\n\n") if line]
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
    assert b"[DONE]" not in raw
    await here.settled()
    assert (await here.ledger())["errors"] == {"engine_unavailable": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_dead_engine_at_the_start_has_its_status(start: Start, stream: bool) -> None:
    here = await place(start, "deep_research")
    here.gateway.mock.faults.append(Fault(error=EngineDied("boom")))
    response = await here.gateway.chat(stream=stream)
    assert response.status_code == 503
    assert_six(response)
    assert response.json()["error"]["code"] == "engine_unavailable"


async def test_fault_of_ours_tells_nothing(start: Start) -> None:
    def explode(request: object) -> str:
        raise RuntimeError("secret /etc/path")

    here = await place(start, "standard_research", scripts={"notes": explode})
    for stream in (False, True):
        response = await here.gateway.chat(stream=stream)
        assert b"secret" not in response.content
        assert b"internal_error" in response.content
    assert here.gateway.mock.unfinished_requests == 0


# What clients may send


@pytest.mark.parametrize(
    ("workflow", "fields", "param"),
    [
        ("complex", {"n": 2}, "n"),
        ("complex", {"logprobs": True}, "logprobs"),
        ("deep_research", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("deep_research", {"max_tokens": 20_000}, "max_tokens"),
        ("deep_research", {"shannon_options": {"tools": ["nothing"]}}, "shannon_options.tools"),
        ("deep_research", {"shannon_options": {"max_iterations": 9}}, "shannon_options.max_iterations"),
        ("deep_research", {"shannon_options": {"research_strategy": "academic"}}, "shannon_options.research_strategy"),
        ("complex", {"shannon_options": {"research_strategy": "quick"}}, "shannon_options.research_strategy"),
        ("chat", {"shannon_options": {"context": "x"}}, "shannon_options"),
        ("complex", {"shannon_options": {"context": {"x": "y" * 20_000}}}, "shannon_options.context"),
    ],
)
async def test_what_a_model_can_not_do_is_refused_by_name(
    start: Start, workflow: str, fields: dict[str, Any], param: str
) -> None:
    here = await place(start, workflow)
    response = await here.gateway.chat(stream=True, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert_six(response)
    assert here.gateway.spent().prompt_tokens == 0


async def test_options_hold(start: Start) -> None:
    here = await place(start, "academic_research")
    options = {"research_strategy": "standard", "max_iterations": 0, "tools": [], "context": {"sells": "tea"}}
    body = (await here.gateway.chat(shannon_options=options)).json()
    assert body["choices"][0]["message"]["content"].startswith("No sources were consulted")
    assert here.search.calls == []
    assert '{"sells":"tea"}' in here.model.texts("answer")[0]
    assert (await here.gateway.chat(shannon_options={"tools": ["web_search", "web_fetch"]})).status_code == 200
    assert here.search.calls


@pytest.mark.parametrize("workflow", AGENTS)
@pytest.mark.parametrize("tools", [[], None])
async def test_json_answers_stay_json(start: Start, workflow: str, tools: list[str] | None) -> None:
    bound = '{"value": [1, 99], "see": "https://made.up/"}'
    here = await place(start, workflow, scripts={"answer": bound, "complex_answer": bound, "complex_step": ""})
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    options = {} if tools is None else {"shannon_options": {"tools": tools}}
    for bind in ({"response_format": schema}, {"structured_outputs": {"json": {"type": "object"}}}):
        whole = (await here.gateway.chat(**bind, **options)).json()
        assert whole["choices"][0]["message"]["content"] == bound
        assert content(chunks((await here.gateway.chat(stream=True, **bind, **options)).content)) == bound
    named = whole["shannon_events"][-1]["payload"]["sources"]
    assert bool(named) is (tools is None and workflow != "complex")


async def test_openai_sdk_gets_answer_events_and_usage(serve: Start) -> None:
    here = await place(serve, "deep_research")
    async with openai.AsyncOpenAI(base_url=f"{here.gateway.url}/v1", api_key=here.gateway.key) as client:
        stream = await client.chat.completions.create(
            model="shannon-chat",
            messages=[{"role": "user", "content": "What is it?"}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"shannon_options": {"max_iterations": 1}},
        )
        said, events, usage = "", [], None
        async for chunk in stream:
            said += chunk.choices[0].delta.content or "" if chunk.choices else ""
            events += (chunk.model_extra or {}).get("shannon_events", [])
            usage = chunk.usage or usage
    check_events(events)
    assert "## Sources" in said
    assert usage is not None
    assert usage.prompt_tokens == here.gateway.spent().prompt_tokens


# Sessions and other protocols


async def test_session_remembers_the_answer_and_the_next_run_sees_it(start: Start) -> None:
    here = await place(start, "standard_research")
    headers = {"X-Session-ID": "talk"}
    body = {"messages": [{"role": "user", "content": "What is it?"}]}
    first = await here.gateway.client.post("/v1/chat/completions", json=body, headers=headers)
    said = first.json()["choices"][0]["message"]["content"]
    stored = (await here.gateway.client.get("/v1/sessions/talk")).json()["messages"]
    assert [message["content"] for message in stored] == ["What is it?", said]

    body["messages"][0]["content"] = "And why?"
    await here.gateway.client.post("/v1/chat/completions", json=body, headers=headers)
    asked = [request for kind, request in here.model.asked if kind == "answer"][-1]
    assert [message["content"] for message in asked.messages[1:3]] == [
        *("What is it?", "## Findings\n\nIt is so, and so, but not so.")
    ]
    assert "user: What is it?" in here.model.texts("plan")[-1]
    assert "Question: And why?" in text_of(asked)


async def test_responses_api_runs_agents_and_remembers(start: Start) -> None:
    here = await place(start, "standard_research")
    post = here.gateway.client.post
    first = (await post("/v1/responses", json={"model": "shannon-chat", "input": "What is it?"})).json()
    assert first["status"] == "completed"
    assert "## Sources" in first["output"][0]["content"][0]["text"]
    check_events(first["shannon_events"])
    assert first["usage"]["input_tokens"] == here.gateway.spent().prompt_tokens

    fields = {"input": "And why?", "previous_response_id": first["id"], "shannon_options": {"max_iterations": 0}}
    second = await post("/v1/responses", json=fields | {"stream": True})
    assert b"response.completed" in second.content
    asked = [request for kind, request in here.model.asked if kind == "answer"][-1]
    assert asked.messages[1]["content"] == "What is it?"
    await here.settled()


async def test_cancelled_response_aborts_its_agents(serve: Start) -> None:
    here = await place(serve, "deep_research")
    here.search.hangs = True
    post = here.gateway.client.post
    made = (await post("/v1/responses", json={"input": "What is it?", "background": True})).json()
    await until(lambda: here.search.running > 0)
    cancelled = (await post(f"/v1/responses/{made['id']}/cancel")).json()
    assert cancelled["status"] == "cancelled"
    await here.settled()
    assert here.search.cancelled == len(here.search.calls)


async def test_messages_api_runs_agents(start: Start) -> None:
    here = await place(start, "quick_research")
    body = {"model": "shannon-chat", "max_tokens": 100, "messages": [{"role": "user", "content": "What is it?"}]}
    whole = (await here.gateway.client.post("/v1/messages", json=body)).json()
    assert "## Sources" in whole["content"][0]["text"]
    streamed = await here.gateway.client.post("/v1/messages", json=body | {"stream": True})
    assert streamed.content.rstrip().endswith(b'data: {"type":"message_stop"}')
    await here.settled()


async def test_thoughts_of_a_reasoning_model_are_its_answers_only(start: Start) -> None:
    def thinking(text: str) -> list[Delta]:
        return [Delta("", reasoning="hm "), Delta(text)]

    here = await place(
        start,
        "quick_research",
        scripts={"answer": lambda request: thinking("It is so [1]."), "plan": lambda request: thinking("no json")},
    )
    body = (await here.gateway.chat()).json()
    message = body["choices"][0]["message"]
    assert message["reasoning_content"] == "hm "
    assert message["content"].startswith("It is so [1].")


async def test_stop_and_length_end_the_answer_as_they_do_in_chat(start: Start) -> None:
    here = await place(start, "complex", scripts={"complex_answer": "one two three four"})
    body = (await here.gateway.chat(max_completion_tokens=2)).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"] == "one two"
    request = here.gateway.mock.requests[-1]
    assert (request.max_tokens, request.default_max_tokens) == (None, 2)


async def test_wrong_key_and_wrong_model_are_refused_as_ever(start: Start) -> None:
    here = await place(start, "complex")
    refused = await here.gateway.client.post(
        "/v1/chat/completions", json={"messages": []}, headers={"Authorization": "Bearer sk-no"}
    )
    assert refused.status_code == 401
    assert isinstance(refused, httpx.Response)
