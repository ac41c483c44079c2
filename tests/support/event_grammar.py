"""The grammar of Shannon events: what clients may rely on, whichever model made them.

    events    = WORKFLOW_STARTED  body  [ WORKFLOW_COMPLETED ]      both of the orchestrator, first and last
    body      = events of agents, mixed, and PROGRESS | DATA_PROCESSING of the orchestrator
    one agent = AGENT_STARTED  ( AGENT_THINKING | PROGRESS | call )*  ( AGENT_COMPLETED | ERROR_OCCURRED )
    call      = TOOL_INVOKED ... TOOL_OBSERVATION                   of the same tool and number; calls may overlap

A sub-agent is named after a station and lives once; the fixed ones may come again after they ended. An agent that
ends by ERROR_OCCURRED may leave calls without an observation; the stream goes on without it. Every type has its fields
of payload, and no others.

Example:

    check_events(body["shannon_events"])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gateway.workflows.stations import STATIONS

ORCHESTRATOR = "orchestrator"
FIXED = {"planner", "synthesis", "citation", "coverage", "verification"}
FIELDS = {"type", "agent_id", "message", "timestamp", "payload"}
# By type: fields that are always there, and those that may be.
PAYLOADS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "WORKFLOW_STARTED": ({"model": str}, {}),
    "AGENT_STARTED": ({"role": str}, {}),
    "AGENT_THINKING": (
        {"role": str},
        {
            "sub_questions": list,
            "steps": list,
            "step": int,
            "attempt": int,
            "covered": int,
            "gaps": list,
            "round": int,
            "sources": list,
        },
    ),
    "TOOL_INVOKED": ({"role": str, "tool": str, "call": int, "params": dict}, {}),
    "TOOL_OBSERVATION": ({"role": str, "tool": str, "call": int, "success": bool, "sources": list}, {}),
    "PROGRESS": (
        {},
        {
            "role": str,
            "step": int,
            "steps": int,
            "wait_s": float,
            "done": int,
            "total": int,
            "failed": int,
            "sources": int,
        },
    ),
    "DATA_PROCESSING": ({}, {"turns": int, "tools": list, "sources": int, "claims": list}),
    "AGENT_COMPLETED": ({"role": str, "prompt_tokens": int, "completion_tokens": int}, {}),
    "ERROR_OCCURRED": ({"role": str, "prompt_tokens": int, "completion_tokens": int}, {}),
    "WORKFLOW_COMPLETED": (
        {"model": str},
        {"sources": list, "steps_failed": list, "ads": list, "reports": list, "figures_removed": int},
    ),
}
_SOURCE = {"number": int, "title": str, "url": str, "domain": str}


def check_events(events: Sequence[dict[str, Any]], *, completed: bool = True) -> None:
    """Raise AssertionError unless `events` follow the grammar; `completed` False is for a stream that was cut."""
    assert events, "there are no events"
    types = [event["type"] for event in events]
    assert types[0] == "WORKFLOW_STARTED", "the first event starts the workflow"
    assert types.count("WORKFLOW_STARTED") == 1, "a workflow starts once"
    assert types.count("WORKFLOW_COMPLETED") == (types[-1] == "WORKFLOW_COMPLETED"), "nothing follows the end"
    assert not completed or types[-1] == "WORKFLOW_COMPLETED", "the last event completes the workflow"
    agents: dict[str, _Agent] = {}
    before = 0
    for event in events:
        _check_fields(event)
        assert event["timestamp"] >= before, "time runs forward"
        before = event["timestamp"]
        agent_id, event_type = event["agent_id"], event["type"]
        if agent_id == ORCHESTRATOR:
            allowed = ("WORKFLOW_STARTED", "WORKFLOW_COMPLETED", "PROGRESS", "DATA_PROCESSING")
            assert event_type in allowed, f"{event_type} of the orchestrator"
        else:
            assert not event_type.startswith("WORKFLOW_"), f"{event_type} of {agent_id}"
            agents.setdefault(agent_id, _Agent(agent_id)).take(event)
    if completed:
        open_agents = [agent.id for agent in agents.values() if agent.running]
        assert not open_agents, f"agents without an end: {open_agents}"


class _Agent:
    """One agent's part of the grammar."""

    def __init__(self, agent_id: str) -> None:
        station = re.sub(r"-\d+$", "", agent_id)
        assert agent_id in FIXED or station in STATIONS, f"{agent_id} is neither a station nor a fixed role"
        self.id = agent_id
        self.running = False
        self.lives = 0
        self.role = ""
        self.calls: dict[int, str] = {}

    def take(self, event: dict[str, Any]) -> None:
        event_type, payload = event["type"], event["payload"]
        if event_type == "AGENT_STARTED":
            assert not self.running, f"{self.id} starts twice"
            assert self.lives == 0 or self.id in FIXED, f"{self.id} comes again"
            self.running, self.role = True, payload["role"]
            self.lives += 1
            return
        assert self.running, f"{event_type} of {self.id}, which is not running"
        assert payload.get("role") == self.role, f"{self.id} changes its role"
        if event_type == "TOOL_INVOKED":
            assert payload["call"] not in self.calls
            self.calls[payload["call"]] = payload["tool"]
        elif event_type == "TOOL_OBSERVATION":
            assert self.calls.pop(payload["call"], None) == payload["tool"], "an observation answers a call"
        elif event_type == "AGENT_COMPLETED":
            assert not self.calls, f"{self.id} completes with calls open"
            self.running = False
        elif event_type == "ERROR_OCCURRED":
            self.calls.clear()
            self.running = False
        else:
            assert event_type in ("AGENT_THINKING", "PROGRESS"), f"{event_type} of {self.id}"


def _check_fields(event: dict[str, Any]) -> None:
    assert event.keys() == FIELDS, event
    assert event["type"] in PAYLOADS, f"unknown type {event['type']}"
    assert isinstance(event["message"], str), event
    assert event["message"], event
    assert isinstance(event["timestamp"], int)
    always, perhaps = PAYLOADS[event["type"]]
    payload = event["payload"]
    assert always.keys() <= payload.keys() <= always.keys() | perhaps.keys(), event
    for name, value in payload.items():
        expected = (always | perhaps)[name]
        number = expected is float and isinstance(value, int)
        assert isinstance(value, expected) or number, f"{event['type']}.{name} is a {type(value).__name__}"
    if event["type"] == "WORKFLOW_COMPLETED":
        for source in payload.get("sources", []):
            assert {name: type(value) for name, value in source.items()} == _SOURCE, source
    assert "error" not in _keys({name: value for name, value in payload.items() if name != "params"})


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in _keys(inner)}
    return {key for inner in value for key in _keys(inner)} if isinstance(value, list) else set()
