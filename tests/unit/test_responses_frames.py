"""Events of a response: their order, what each repeats, and that they build up the object that is kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from engine.base import Delta, TokenLogprob, ToolCallDelta, Usage
from gateway.errors import BadRequest, Cancelled, RateLimitExceeded, Unavailable
from gateway.exchange import encoder
from gateway.exchange.events import Event, EventType, ShannonEvent
from gateway.exchange.frames.responses import ResponseFrames
from tests.support.app import NOW

pytestmark = pytest.mark.anyio

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, reasoning_tokens=1)
FIELDS: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": NOW,
    "model": "shannon-chat",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def make_frames(*, events: bool = True) -> ResponseFrames:
    return ResponseFrames(FIELDS, USAGE, lambda: NOW, events=events)


def event(event_type: EventType, *, deferrable: bool = False) -> ShannonEvent:
    return ShannonEvent(event_type, "Ryogoku", "Working.", NOW, {}, deferrable)


def call(index: int, *arguments: str) -> list[Delta]:
    """Return a call in pieces, the first of which names it."""
    first = ToolCallDelta(index, f"call_{index}", f"function_{index}", "")
    return [Delta("", tool_calls=[first])] + [
        Delta("", tool_calls=[ToolCallDelta(index, arguments=a)]) for a in arguments
    ]


def read(raw: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream; each must say in both places what it is, and be one that SDKs know."""
    events = []
    for number, frame in enumerate(raw.decode().split("\n\n")[:-1]):
        name, data = frame.split("\n")
        fields = orjson.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        assert fields["sequence_number"] == number
        assert "error" not in fields, "SDKs raise on it"
        STREAM_EVENT.validate_python(fields)
        events.append(fields)
    return events


async def replay(*events: Event) -> AsyncGenerator[Event, None]:
    for item in events:
        yield item


async def stream(*events: Event, frames: ResponseFrames | None = None) -> list[dict[str, Any]]:
    chunks = encoder.stream(replay(*events), frames or make_frames())
    return read(b"".join([chunk async for chunk in chunks]))


async def collect(*events: Event, frames: ResponseFrames | None = None) -> dict[str, Any]:
    chunks = encoder.collect(replay(*events), frames or make_frames())
    body: dict[str, Any] = orjson.loads(b"".join([chunk async for chunk in chunks]))
    Response.model_validate(body)
    return body


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


async def test_text_has_openais_events_in_openais_order() -> None:
    events = await stream(Delta("one"), Delta(" two", finish_reason="stop"))

    assert types(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    item_ids = {event["item_id"] for event in events if "item_id" in event}
    assert item_ids == {events[2]["item"]["id"]} == {events[-1]["response"]["output"][0]["id"]}
    assert [event["delta"] for event in events if "delta" in event] == ["one", " two"]
    assert events[6]["text"] == events[7]["part"]["text"] == "one two"
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["usage"] is None
    final = events[-1]["response"]
    assert (final["status"], final["completed_at"], final["error"], final["incomplete_details"]) == (
        *("completed", NOW),
        *(None, None),
    )
    assert final["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 5,
    }


async def test_text_survives_every_character() -> None:
    text = 'quote " backslash \\ newline \n\n tab \t nul \0 snowman ☃ emoji 🗼 separator \u2028'
    events = await stream(Delta(text, finish_reason="stop"))

    assert next(event["delta"] for event in events if "delta" in event) == text


async def test_thought_text_and_calls_are_items_one_after_the_other() -> None:
    events = await stream(
        Delta("", reasoning="hm"),
        Delta("Let me see."),
        *call(0, '{"a"', ":1}"),
        *call(1, "{}"),
        Delta("", finish_reason="tool_calls"),
    )

    assert types(events)[2:] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (output[2]["call_id"], output[2]["name"], output[2]["arguments"]) == ("call_0", "function_0", '{"a":1}')
    assert [event["output_index"] for event in events if event["type"].endswith("item.added")] == [0, 1, 2, 3]


async def test_whole_body_has_the_items_of_the_stream() -> None:
    deltas = [
        Delta("", reasoning="hm"),
        Delta("Let me see."),
        *call(0, '{"a"', ":1}"),
        Delta("", finish_reason="tool_calls"),
    ]
    events = await stream(*deltas)
    body = await collect(*deltas)

    def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [item | {"id": ""} for item in items]

    assert without_ids(body["output"]) == without_ids(events[-1]["response"]["output"])
    assert body["status"] == "completed"


async def test_mingled_calls_lose_nothing() -> None:
    first, second = call(0, '{"a":', "1}"), call(1, '{"b":', "2}")
    mingled = [delta for pair in zip(first, second, strict=True) for delta in pair]

    events = await stream(*mingled, Delta("", finish_reason="tool_calls"))

    assert [item["arguments"] for item in events[-1]["response"]["output"]] == ['{"a":1}', '{"b":2}']
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == [0, 1]


async def test_call_without_an_id_gets_one() -> None:
    body = await collect(Delta("", finish_reason="tool_calls", tool_calls=[ToolCallDelta(0, None, "look", "{}")]))

    assert body["output"][0]["call_id"].startswith("call_")


@pytest.mark.parametrize("in_stream", [False, True])
async def test_length_makes_the_response_and_its_last_item_incomplete(in_stream: bool) -> None:
    deltas = [Delta("", reasoning="hm"), Delta("one", finish_reason="length")]
    if in_stream:
        events = await stream(*deltas)
        assert events[-1]["type"] == "response.incomplete"
        response = events[-1]["response"]
    else:
        response = await collect(*deltas)

    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert "completed_at" not in response


@pytest.mark.parametrize("in_stream", [False, True])
async def test_empty_answer_is_an_empty_message(in_stream: bool) -> None:
    delta = Delta("", finish_reason="stop")
    response = (await stream(delta))[-1]["response"] if in_stream else await collect(delta)

    (item,) = response["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


async def test_deferrable_events_ride_on_the_second_and_the_last_event() -> None:
    events = await stream(
        event("WORKFLOW_STARTED", deferrable=True),
        Delta("one", finish_reason="stop"),
        event("WORKFLOW_COMPLETED", deferrable=True),
    )

    riding = {
        event["type"]: [one["type"] for one in event["shannon_events"]] for event in events if "shannon_events" in event
    }
    assert riding == {"response.in_progress": ["WORKFLOW_STARTED"], "response.completed": ["WORKFLOW_COMPLETED"]}


async def test_urgent_event_goes_out_at_once_on_an_event_that_sdks_know() -> None:
    frames = make_frames()
    first = read(frames.add_event(event("PROGRESS")))
    assert types(first) == ["created", "in_progress"]
    assert first[1]["shannon_events"][0]["type"] == "PROGRESS"

    frames.add_delta(Delta("one"))
    late = frames.add_event(event("TOOL_INVOKED"))
    assert late.startswith(b"event: response.in_progress\n")
    assert b"TOOL_INVOKED" in late
    assert b"PROGRESS" not in late


async def test_events_held_back_go_out_before_the_next_delta() -> None:
    events = await stream(Delta("one"), event("AGENT_STARTED", deferrable=True), Delta(" two", finish_reason="stop"))

    assert types(events)[4:8] == ["output_text.delta", "in_progress", "output_text.delta", "output_text.done"]
    assert events[5]["shannon_events"][0]["type"] == "AGENT_STARTED"


async def test_kept_object_lists_all_events_unless_they_are_off() -> None:
    events: list[Event] = [
        event("AGENT_STARTED", deferrable=True),
        Delta("one", finish_reason="stop"),
        event("AGENT_COMPLETED"),
    ]
    frames = make_frames()
    shown = await stream(*events, frames=frames)

    assert [one["type"] for one in frames.response()["shannon_events"]] == ["AGENT_STARTED", "AGENT_COMPLETED"]
    assert "shannon_events" not in shown[-1]["response"], "they ride beside it, each once"
    assert "shannon_events" not in await collect(*events, frames=make_frames(events=False))
    assert all("shannon_events" not in one for one in await stream(*events, frames=make_frames(events=False)))


async def test_logprobs_ride_with_their_text_and_stay_with_the_message() -> None:
    entry = TokenLogprob("hé", -0.25, [104, 195, 169], (TokenLogprob("ha", -1.5, [104, 97]),))
    fields = {
        "token": "hé",
        "logprob": -0.25,
        "bytes": [104, 195, 169],
        "top_logprobs": [{"token": "ha", "logprob": -1.5, "bytes": [104, 97]}],
    }
    events = await stream(
        Delta("", reasoning="hm", logprobs=[entry]),  # thought, not said
        Delta("hé", logprobs=[entry]),
        Delta("", finish_reason="stop", logprobs=[entry]),
    )

    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [event["logprobs"] for event in deltas] == [[fields], [fields]]
    assert events[-1]["response"]["output"][1]["content"][0]["logprobs"] == [fields, fields]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("The engine failed."), "server_error"),
        (RateLimitExceeded("Too many."), "rate_limit_exceeded"),
        (BadRequest("No."), "invalid_prompt"),
    ],
)
def test_failure_ends_the_stream_with_the_object_as_far_as_it_came(error: Exception, code: str) -> None:
    frames = make_frames()
    raw = frames.add_delta(Delta("one"))
    raw += frames.render_error(error, True)  # type: ignore[arg-type]

    last = read(raw)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": code, "message": str(error)}
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["output"][0]["content"][0]["text"] == "one"


def test_failure_before_anything_was_said_still_begins_with_created() -> None:
    events = read(make_frames().render_error(Unavailable("Gone."), True))

    assert types(events) == ["created", "in_progress", "failed"]


def test_failure_before_the_status_has_openais_shape() -> None:
    body = orjson.loads(make_frames().render_error(Unavailable("Gone."), False))

    assert body["error"]["code"] == "engine_unavailable"


def test_cancelled_response_says_so_and_keeps_what_was_said() -> None:
    frames = make_frames()
    raw = frames.add_delta(Delta("one"))
    raw += frames.render_error(Cancelled("Cancelled."), True)

    last = read(raw)[-1]
    assert last["type"] == "response.incomplete"
    assert (last["response"]["status"], last["response"]["error"]) == ("cancelled", None)
    assert frames.response()["output"][0]["content"][0]["text"] == "one"


async def test_failure_after_the_last_event_says_nothing_more() -> None:
    frames = make_frames()
    await stream(Delta("one", finish_reason="stop"), frames=frames)

    assert frames.render_error(Cancelled("Cancelled."), True) == b""
    assert frames.response()["status"] == "completed"


async def test_message_for_later_requests_has_whole_calls_only() -> None:
    frames = make_frames()
    await stream(Delta("So: "), *call(0, "{}"), *call(1, '{"cut'), Delta("", finish_reason="length"), frames=frames)

    assert frames.message() == {
        "role": "assistant",
        "content": "So: ",
        "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "function_0", "arguments": "{}"}}],
    }
