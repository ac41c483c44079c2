"""Events to the wire, whatever the protocol: a stream of frames, or one JSON body.

An `Encoder` is one protocol's form of one response; `gateway.exchange.frames` holds them. Errors pass through;
`gateway.exchange.response` gives them their form.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from engine.base import Delta, Usage
from gateway.exchange.answers import Answer
from gateway.exchange.events import Event, ShannonEvent

DONE = b"data: [DONE]\n\n"


class Encoder(Protocol):
    """The frames of one response, and its whole body. Each method returns bytes ready to send, perhaps none."""

    def open(self) -> bytes:
        """The frames before all others."""

    def add_event(self, event: ShannonEvent) -> bytes:
        """Return the frames for `event`."""

    def add_delta(self, delta: Delta) -> bytes:
        """Return the frames for `delta`."""

    def close(self) -> bytes:
        """Return the last frames."""

    def body(self, answers: dict[int, Answer], events: list[ShannonEvent]) -> bytes:
        """Return the whole response as JSON. `answers` are the choices by index."""


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object. `estimated` appears if an upstream did not report it."""
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
    if usage.estimated:
        fields["estimated"] = True
    return fields


def event_fields(event: ShannonEvent) -> dict[str, Any]:
    """Return the fields of a Shannon event that clients see."""
    return {
        "type": event.type,
        "agent_id": event.agent_id,
        "message": event.message,
        "timestamp": event.timestamp,
        "payload": event.payload,
    }


async def stream(events: AsyncGenerator[Event, None], encoder: Encoder) -> AsyncGenerator[bytes, None]:
    """Yield a stream as bytes, one or more whole frames at a time."""
    opening = encoder.open()
    async with contextlib.aclosing(events):
        async for event in events:
            data = encoder.add_delta(event) if isinstance(event, Delta) else encoder.add_event(event)
            if data:
                yield opening + data
                opening = b""
    yield opening + encoder.close()


async def collect(events: AsyncGenerator[Event, None], encoder: Encoder) -> AsyncGenerator[bytes, None]:
    """Yield the response as one JSON body, once the events have ended."""
    answers: dict[int, Answer] = {}
    seen: list[ShannonEvent] = []
    async with contextlib.aclosing(events):
        async for event in events:
            if not isinstance(event, Delta):
                seen.append(event)
                continue
            if (answer := answers.get(event.index)) is None:
                answer = answers[event.index] = Answer()
            answer.add(event)
    yield encoder.body(dict(sorted(answers.items())), seen)
