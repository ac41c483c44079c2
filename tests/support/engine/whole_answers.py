"""Generations of an engine, put together from their deltas.

Example:

    @both_ways
    async def test_weather(engine: EmbeddedEngine, stream: bool) -> None:
        choices, usage = await say(engine, HELLO, stream=stream)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.base import Delta, Usage
from engine.local.embedded import EmbeddedEngine
from tests.support.engine.demo_requests import request

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@dataclass
class Said:
    """One choice, put together from its deltas."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    finish_reason: str | None = None
    logprobs: int = 0
    deltas: int = 0

    def add(self, delta: Delta) -> None:
        assert self.finish_reason is None, "nothing comes after the reason"
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.finish_reason = delta.finish_reason
        self.logprobs += len(delta.logprobs or ())
        self.deltas += bool(delta.text or delta.reasoning or delta.tool_calls)
        for call in delta.tool_calls:
            if call.index not in self.calls:
                assert call.id
                assert call.name
                self.calls[call.index] = {"id": call.id, "name": call.name, "arguments": ""}
            else:
                assert call.id is None, "a call has its id once"
            self.calls[call.index]["arguments"] += call.arguments

    def arguments(self, index: int = 0) -> Any:
        return json.loads(self.calls[index]["arguments"])

    @property
    def names(self) -> list[str]:
        return [self.calls[index]["name"] for index in sorted(self.calls)]


async def say(engine: EmbeddedEngine, messages: Any, **fields: Any) -> tuple[dict[int, Said], Usage]:
    """Generate, and return the choices and what they cost."""
    prepared = await engine.prepare(request(messages, **({"default_max_tokens": 200} | fields)))
    choices: dict[int, Said] = {}
    async for delta in engine.generate(prepared):
        choices.setdefault(delta.index, Said()).add(delta)
    assert engine.unfinished_requests == 0
    return choices, prepared.usage
