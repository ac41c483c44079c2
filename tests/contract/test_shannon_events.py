"""`shannon_events` ride on frames that exist anyway, can be switched off, and never look like an error."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.app import HELLO, NOW, Gateway
from tests.support.frames import chunks

pytestmark = pytest.mark.anyio

FIELDS = {"type", "agent_id", "message", "timestamp", "payload"}
TYPES = {
    *("WORKFLOW_STARTED", "WORKFLOW_COMPLETED", "AGENT_STARTED", "AGENT_COMPLETED", "AGENT_THINKING"),
    *("TOOL_INVOKED", "TOOL_OBSERVATION", "PROGRESS", "DATA_PROCESSING", "ERROR_OCCURRED"),
}


async def frames_of(gateway: Gateway, **fields: Any) -> list[dict[str, Any]]:
    return chunks((await gateway.chat(stream=True, **fields)).content)


@pytest.mark.parametrize("n", [1, 2])
async def test_events_ride_on_the_first_and_the_last_frame(gateway: Gateway, n: int) -> None:
    frames = await frames_of(gateway, n=n)

    with_events = [number for number, frame in enumerate(frames) if "shannon_events" in frame]
    assert with_events == [0, len(frames) - 1]
    assert [event["type"] for event in frames[0]["shannon_events"]] == ["WORKFLOW_STARTED", "AGENT_STARTED"]
    assert [event["type"] for event in frames[-1]["shannon_events"]] == ["AGENT_COMPLETED", "WORKFLOW_COMPLETED"]
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"


async def test_events_ride_on_the_finish_frame_when_usage_has_its_own(gateway: Gateway) -> None:
    frames = await frames_of(gateway, stream_options={"include_usage": True})

    with_events = [number for number, frame in enumerate(frames) if "shannon_events" in frame]
    assert with_events == [0, len(frames) - 2]


async def test_events_add_no_frames(gateway: Gateway) -> None:
    without = await gateway.client.post(
        "/v1/chat/completions", json={"messages": HELLO, "stream": True}, headers={"X-Shannon-Events": "off"}
    )

    assert len(chunks(without.content)) == len(await frames_of(gateway))


async def test_event_has_the_documented_fields(gateway: Gateway) -> None:
    events = [event for frame in await frames_of(gateway) for event in frame.get("shannon_events", [])]

    assert len(events) == 4
    for event in events:
        assert event.keys() == FIELDS
        assert event["type"] in TYPES
        assert event["timestamp"] == NOW
        assert isinstance(event["payload"], dict)
        assert event["message"]
    assert {event["agent_id"] for event in events if event["type"].startswith("AGENT_")} == {"Ryogoku"}


async def test_whole_body_carries_the_same_events(gateway: Gateway) -> None:
    body = (await gateway.chat()).json()

    assert [event["type"] for event in body["shannon_events"]] == [
        *("WORKFLOW_STARTED", "AGENT_STARTED", "AGENT_COMPLETED", "WORKFLOW_COMPLETED"),
    ]
    assert all(event.keys() == FIELDS for event in body["shannon_events"])


@pytest.mark.parametrize("value", ["off", "OFF"])
async def test_header_switches_events_off(gateway: Gateway, value: str) -> None:
    for stream in (True, False):
        response = await gateway.client.post(
            "/v1/chat/completions", json={"messages": HELLO, "stream": stream}, headers={"X-Shannon-Events": value}
        )
        assert b"shannon_events" not in response.content
        assert b"hello" in response.content


@pytest.mark.parametrize("value", ["on", "", "yes"])
async def test_other_values_leave_events_on(gateway: Gateway, value: str) -> None:
    response = await gateway.client.post(
        "/v1/chat/completions", json={"messages": HELLO}, headers={"X-Shannon-Events": value}
    )

    assert len(response.json()["shannon_events"]) == 4


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    if isinstance(value, list):
        return {key for inner in value for key in keys_of(inner)}
    return set()


async def test_no_event_has_a_key_named_error(gateway: Gateway) -> None:
    """The OpenAI SDKs raise on any stream object that has one."""
    frames = await frames_of(gateway, stream_options={"include_usage": True})
    body = (await gateway.chat()).json()

    assert "error" not in keys_of(frames)
    assert "error" not in keys_of(body)
