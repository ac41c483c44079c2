"""Events of a workflow: tokens (`engine.base.Delta`) and Shannon events, in the order they happen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from engine.base import Delta

ORCHESTRATOR = "orchestrator"
"""The agent id of events about the workflow as a whole."""

EventType = Literal[
    "WORKFLOW_STARTED",
    "AGENT_STARTED",
    "AGENT_COMPLETED",
    "AGENT_THINKING",
    "TOOL_INVOKED",
    "TOOL_OBSERVATION",
    "PROGRESS",
    "DATA_PROCESSING",
    "WORKFLOW_COMPLETED",
    "ERROR_OCCURRED",
]


@dataclass(slots=True)
class ShannonEvent:
    """One step of a workflow, in the fields that clients see. `timestamp` is Unix time in whole seconds."""

    type: EventType
    agent_id: str
    message: str
    timestamp: int
    payload: dict[str, Any] = field(default_factory=dict)
    deferrable: bool = False
    """May wait for the next frame: set where one is sure to follow soon. Not sent."""


Event = Delta | ShannonEvent
