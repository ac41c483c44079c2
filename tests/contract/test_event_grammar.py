"""Every model's events follow one grammar, streamed and whole; and the grammar does refuse what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from engine.mock import MockEngine
from gateway.tools.base import Toolbox
from tests.support.app import ROOT, Gateway, Start
from tests.support.event_grammar import PAYLOADS, check_events
from tests.support.frames import chunks
from tests.support.scripted_model import FakeFetch, FakeSearch, ScriptedModel, steps

pytestmark = pytest.mark.anyio

WORKFLOWS = (
    *("chat", "quick_research", "standard_research", "deep_research", "academic_research", "complex"),
    *("ads_research", "analytics"),  # here without their tools; with them in tests of their own
)
Events = list[dict[str, Any]]


async def gateway_with(start: Start, workflow: str, model: ScriptedModel, *tools: Any) -> Gateway:
    """Open a gateway whose default model runs `workflow`."""
    models = {"shannon-chat": {"description": "The one under test", "workflow": workflow}}
    gateway = await start(mock=lambda: MockEngine(reply=model, max_model_len=16_384), config={"models": models})
    object.__setattr__(gateway.services, "tools", Toolbox(tools, backoff_s=0.0))
    return gateway


async def events_of(gateway: Gateway, *, stream: bool, **fields: Any) -> Events:
    response = await gateway.chat(stream=stream, **fields)
    assert response.status_code == 200, response.text
    if not stream:
        events: Events = response.json()["shannon_events"]
        return events
    return [event for frame in chunks(response.content) for event in frame.get("shannon_events", [])]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workflow", WORKFLOWS)
async def test_events_follow_the_grammar(start: Start, workflow: str, stream: bool) -> None:
    gateway = await gateway_with(start, workflow, ScriptedModel(), FakeSearch(), FakeFetch())
    check_events(await events_of(gateway, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workflow", WORKFLOWS)
async def test_events_follow_the_grammar_when_little_works(start: Start, workflow: str, stream: bool) -> None:
    search, fetch = FakeSearch(), FakeFetch()
    fetch.failing = {f"https://query-{n}.example/page" for n in range(1, 9)} | {"https://common.example/page"}
    model = ScriptedModel(plan="no json", complex_plan=steps([], [1]), complex_step="", claims="no json")
    gateway = await gateway_with(start, workflow, model, search, fetch)
    check_events(await events_of(gateway, stream=stream))


async def test_all_ten_types_are_used(start: Start) -> None:
    seen: set[str] = set()
    for workflow, model in (
        ("academic_research", ScriptedModel()),
        ("complex", ScriptedModel(complex_plan=steps([], [1]), complex_step="")),
    ):
        gateway = await gateway_with(start, workflow, model, FakeSearch(), FakeFetch())
        seen |= {event["type"] for event in await events_of(gateway, stream=True)}
    assert seen == PAYLOADS.keys()
    assert len(seen) == 10


def test_readme_names_every_field_of_every_payload() -> None:
    readme = (ROOT / "docs/agents.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| [^|]+ \|([^|]*)\|([^|]*)\|$", readme, re.M)
    told = {
        kind: tuple(set(re.findall(r"`([a-z_]+)`", re.sub(r"\(.*?\)", "", cell))) for cell in cells)
        for kind, *cells in rows
    }

    assert told == {kind: (set(always), set(perhaps)) for kind, (always, perhaps) in PAYLOADS.items()}


@pytest.mark.parametrize("workflow", WORKFLOWS)
async def test_events_can_be_switched_off(start: Start, workflow: str) -> None:
    gateway = await gateway_with(start, workflow, ScriptedModel(), FakeSearch(), FakeFetch())
    gateway.client.headers["X-Shannon-Events"] = "off"
    for stream in (False, True):
        response = await gateway.chat(stream=stream)
        assert b"shannon_events" not in response.content
        assert response.status_code == 200
    frames = chunks(response.content)
    assert frames[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)


async def test_frames_of_an_agent_model_are_those_of_chat(start: Start) -> None:
    gateway = await gateway_with(start, "deep_research", ScriptedModel(), FakeSearch(), FakeFetch())
    frames = chunks((await gateway.chat(stream=True)).content)

    assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [frame["choices"][0]["finish_reason"] for frame in frames[:-1]] == [None] * (len(frames) - 1)
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"
    assert [event["type"] for event in frames[-1]["shannon_events"]] == ["WORKFLOW_COMPLETED"]
    assert "usage" in frames[-1]
    assert all("error" not in frame for frame in frames)
    assert len({frame["id"] for frame in frames}) == 1


def good() -> Events:
    """Return a small stream that is right."""
    spent = {"prompt_tokens": 1, "completion_tokens": 1}
    call = {"role": "researcher", "tool": "web_search", "call": 1}
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("WORKFLOW_STARTED", "orchestrator", {"model": "m"}),
        ("AGENT_STARTED", "Ueno", {"role": "researcher"}),
        ("TOOL_INVOKED", "Ueno", {**call, "params": {"error": "an argument's own name"}}),
        ("TOOL_OBSERVATION", "Ueno", {**call, "success": True, "sources": []}),
        ("AGENT_COMPLETED", "Ueno", {"role": "researcher", **spent}),
        ("PROGRESS", "orchestrator", {"done": 1, "total": 1}),
        ("WORKFLOW_COMPLETED", "orchestrator", {"model": "m", "sources": []}),
    ]
    return [
        {"type": kind, "agent_id": agent, "message": "x", "timestamp": 7, "payload": payload}
        for kind, agent, payload in rows
    ]


def test_grammar_takes_what_is_right() -> None:
    check_events(good())
    check_events(good()[:3], completed=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda events: events.pop(0),
        lambda events: events.pop(),
        lambda events: events.append(events[5]),
        lambda events: events.insert(1, events[0]),
        lambda events: events.pop(1),
        lambda events: events.pop(2),
        lambda events: events.pop(3),
        lambda events: events.pop(4),
        lambda events: events.insert(5, events[1]),
        lambda events: events.insert(5, events[3]),
        lambda events: events[1].update(agent_id="Shibuya"),
        lambda events: [event.update(agent_id="Berlin") for event in events[1:5]],
        lambda events: events[2].update(timestamp=6),
        lambda events: events[2].update(type="TOOL_CALLED"),
        lambda events: events[2].update(message=""),
        lambda events: events[2].update(more=1),
        lambda events: events[3]["payload"].update(call=2),
        lambda events: events[3]["payload"].pop("success"),
        lambda events: events[3]["payload"].update(error="x"),
        lambda events: events[5]["payload"].update(done="1"),
        lambda events: events[6]["payload"]["sources"].append({"number": 1}),
    ],
)
def test_grammar_refuses_what_is_wrong(spoil: Callable[[Events], object]) -> None:
    events = good()
    spoil(events)
    with pytest.raises(AssertionError):
        check_events(events)
