"""One generation, streamed as it comes, between the lifecycle events of a single agent.

The events are sent in the first and last frames, so plain chat costs no extra frames. Engine errors pass through.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from engine.base import GenerationRequest
from gateway.clock import Clock
from gateway.conversations.sessions import Session
from gateway.exchange.events import ORCHESTRATOR, Event, EventType, ShannonEvent
from gateway.meter import Meter

AGENT_ID = "Ryogoku"
"""Agents are named after stations of Tokyo's Yamanote line and its neighbours; this one is the field's oldest."""


async def chat(request: GenerationRequest, meter: Meter, session: Session, clock: Clock) -> AsyncGenerator[Event, None]:
    """Yield the deltas of one generation of `request`, behind the session's history, and store the turn."""

    def event(event_type: EventType, agent_id: str, message: str, **payload: object) -> ShannonEvent:
        return ShannonEvent(event_type, agent_id, message, int(clock()), payload, deferrable=True)

    model_id = meter.model.id
    prepared = await meter.prepare(request, session)
    await session.opened()
    yield event("WORKFLOW_STARTED", ORCHESTRATOR, f"{model_id} has started.", model=model_id)
    yield event("AGENT_STARTED", AGENT_ID, f"{AGENT_ID} is answering.", role="generalist")
    async with contextlib.aclosing(meter.generate(prepared)) as deltas:
        async for delta in deltas:
            session.note(delta)
            yield delta
    spent = {"prompt_tokens": prepared.usage.prompt_tokens, "completion_tokens": prepared.usage.completion_tokens}
    yield event("AGENT_COMPLETED", AGENT_ID, f"{AGENT_ID} has answered.", role="generalist", **spent)
    yield event("WORKFLOW_COMPLETED", ORCHESTRATOR, f"{model_id} has finished.", model=model_id)
    await session.end_turn(request.messages)
