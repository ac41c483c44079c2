"""Frames of a chat completion: which event rides on which frame, and that a stream opens and closes as it should."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest

from engine.base import Delta, TokenLogprob, Usage
from gateway.exchange import encoder
from gateway.exchange.events import Event, EventType, ShannonEvent
from gateway.exchange.frames.chat import ChatFrames
from tests.support.app import NOW
from tests.support.frames import chunks

pytestmark = pytest.mark.anyio

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
USAGE_FIELDS = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def event(event_type: EventType, *, deferrable: bool = False) -> ShannonEvent:
    return ShannonEvent(event_type, "Ryogoku", "Working.", NOW, {"role": "generalist"}, deferrable)


async def replay(*events: Event) -> AsyncGenerator[Event, None]:
    for item in events:
        yield item


async def stream(*events: Event, include_usage: bool = False, with_events: bool = True) -> list[dict[str, Any]]:
    frames = ChatFrames("chatcmpl-1", NOW, "shannon-chat", USAGE, include_usage=include_usage, events=with_events)
    return chunks(b"".join([data async for data in encoder.stream(replay(*events), frames)]))


async def collect(*events: Event, with_events: bool = True) -> dict[str, Any]:
    frames = ChatFrames("chatcmpl-1", NOW, "shannon-chat", USAGE, include_usage=False, events=with_events)
    parts = encoder.collect(replay(*events), frames)
    body: dict[str, Any] = orjson.loads(b"".join([part async for part in parts]))
    return body


def types(frame: dict[str, Any]) -> list[str]:
    return [entry["type"] for entry in frame.get("shannon_events", [])]


async def test_deferrable_events_ride_on_the_first_and_the_last_frame() -> None:
    frames = await stream(
        event("WORKFLOW_STARTED", deferrable=True),
        event("AGENT_STARTED", deferrable=True),
        Delta("one"),
        Delta(" two", finish_reason="stop"),
        event("AGENT_COMPLETED", deferrable=True),
        event("WORKFLOW_COMPLETED", deferrable=True),
    )

    assert [types(frame) for frame in frames] == [
        ["WORKFLOW_STARTED", "AGENT_STARTED"],
        [],
        [],
        ["AGENT_COMPLETED", "WORKFLOW_COMPLETED"],
    ]


async def test_urgent_event_has_a_frame_of_its_own() -> None:
    frames = await stream(Delta("one"), event("TOOL_INVOKED"), Delta(" two", finish_reason="stop"))

    assert [frame["choices"][0]["delta"] for frame in frames] == [
        {"role": "assistant", "content": ""},
        {"content": "one"},
        {},
        {"content": " two"},
        {},
    ]
    assert types(frames[2]) == ["TOOL_INVOKED"]
    assert frames[2]["choices"][0]["finish_reason"] is None


async def test_first_frame_has_the_role_though_an_event_comes_before_the_first_token() -> None:
    frames = await stream(event("AGENT_THINKING"), Delta("one", finish_reason="stop"))

    assert frames[0]["choices"][0]["delta"]["role"] == "assistant"
    assert types(frames[0]) == ["AGENT_THINKING"]
    assert all("role" not in frame["choices"][0]["delta"] for frame in frames[1:])


async def test_event_after_the_finish_reason_rides_on_the_finish_frame() -> None:
    frames = await stream(Delta("one", finish_reason="stop"), event("PROGRESS"))

    assert len(frames) == 3
    assert types(frames[2]) == ["PROGRESS"]
    assert frames[2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("include_usage", [False, True])
async def test_events_can_be_left_out(include_usage: bool) -> None:
    events: list[Event] = [event("AGENT_STARTED"), Delta("one", finish_reason="stop"), event("AGENT_COMPLETED")]

    frames = await stream(*events, include_usage=include_usage, with_events=False)

    assert all("shannon_events" not in frame for frame in frames)
    assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames if frame["choices"]) == "one"
    assert "shannon_events" not in await collect(*events, with_events=False)


async def test_usage_rides_on_the_last_choice_frame_only() -> None:
    frames = await stream(
        Delta("a", 0, "stop"),
        Delta("b", 1, "length"),
    )

    assert [frame.get("usage") for frame in frames[:-1]] == [None] * (len(frames) - 1)
    assert frames[-1]["usage"] == USAGE_FIELDS
    assert frames[-1]["choices"] == [{"index": 1, "delta": {}, "finish_reason": "length"}]


async def test_interleaved_choices_keep_their_roles_and_reasons_apart() -> None:
    frames = await stream(Delta("a", 0), Delta("x", 1), Delta("b", 0, "stop"), Delta("y", 1, "length"))

    for index, content, reason in ((0, "ab", "stop"), (1, "xy", "length")):
        mine = [frame["choices"][0] for frame in frames if frame["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == content
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + [reason]


async def test_text_survives_every_character() -> None:
    text = 'quote " backslash \\ newline \n tab \t nul \0 snowman ☃ emoji 🗼 separator \u2028'
    frames = await stream(Delta(text), Delta("", finish_reason="stop"))

    assert frames[1]["choices"][0]["delta"]["content"] == text


async def test_logprobs_have_openais_shape() -> None:
    entry = TokenLogprob("hé", -0.25, [104, 195, 169], (TokenLogprob("ha", -1.5, [104, 97]),))
    fields = {
        "content": [
            {
                "token": "hé",
                "logprob": -0.25,
                "bytes": [104, 195, 169],
                "top_logprobs": [{"token": "ha", "logprob": -1.5, "bytes": [104, 97]}],
            }
        ],
        "refusal": None,
    }

    frames = await stream(Delta("hé", logprobs=[entry]), Delta("", finish_reason="stop"))
    body = await collect(Delta("hé", logprobs=[entry]), Delta("hé", finish_reason="stop", logprobs=[entry]))

    assert frames[1]["choices"][0]["logprobs"] == fields
    assert body["choices"][0]["logprobs"]["content"] == fields["content"] * 2  # type: ignore[operator]


async def test_last_delta_with_logprobs_and_a_reason_still_has_a_finish_frame() -> None:
    entry = TokenLogprob("a", 0.0, [97])
    frames = await stream(Delta("a", finish_reason="length", logprobs=[entry]))

    assert frames[-2]["choices"][0]["delta"] == {"content": "a"}
    assert frames[-2]["choices"][0]["finish_reason"] is None
    assert frames[-1]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length"}


async def test_collected_body_joins_deltas_by_choice() -> None:
    body = await collect(Delta("x", 1), Delta("a", 0), Delta("y", 1, "length"), Delta("b", 0, "stop"))

    assert [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in body["choices"]] == [
        (0, "ab", "stop"),
        (1, "xy", "length"),
    ]
    assert body["usage"] == USAGE_FIELDS


async def test_collected_body_lists_all_events_in_order() -> None:
    body = await collect(event("AGENT_STARTED", deferrable=True), Delta("a", 0, "stop"), event("AGENT_COMPLETED"))

    assert types(body) == ["AGENT_STARTED", "AGENT_COMPLETED"]
    assert body["shannon_events"][0] == {
        "type": "AGENT_STARTED",
        "agent_id": "Ryogoku",
        "message": "Working.",
        "timestamp": NOW,
        "payload": {"role": "generalist"},
    }


async def test_source_is_closed_when_the_stream_is_left() -> None:
    closed = False

    async def events() -> AsyncGenerator[Event, None]:
        nonlocal closed
        try:
            yield Delta("one")
            yield Delta(" two")
        finally:
            closed = True

    frames = ChatFrames("chatcmpl-1", NOW, "shannon-chat", USAGE, include_usage=False, events=True)
    data = encoder.stream(events(), frames)
    await anext(data)
    await data.aclose()

    assert closed
