"""An answer put together from its deltas: what a client gets whole, and what a session remembers of a turn."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace

import orjson

from engine.base import Delta, FinishReason, TokenLogprob
from engine.messages import Message, ToolCall


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """One choice."""

    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    calls: dict[int, _Call] = field(default_factory=dict)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Take in the next delta of this choice."""
        if delta.text:
            self.texts.append(delta.text)
        if delta.reasoning:
            self.reasonings.append(delta.reasoning)
        for piece in delta.tool_calls:
            call = self.calls.get(piece.index)
            if call is None:
                call = self.calls[piece.index] = _Call(piece.id or make_call_id(), piece.name or "")
            call.arguments.append(piece.arguments)
        if delta.logprobs is not None:
            self.logprobs = self.logprobs if self.logprobs is not None else []
            self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason or self.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        return "".join(self.reasonings)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls in OpenAI's form."""
        return [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.arguments)},
            }
            for _, call in sorted(self.calls.items())
        ]

    def message(self) -> Message:
        """Return the answer as an assistant's message."""
        message: Message = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        if self.calls:
            message["tool_calls"] = self.tool_calls
        return message

    def remembered(self) -> Message:
        """The answer as a message for later requests, without calls that were cut off."""
        whole = {index: call for index, call in self.calls.items() if _is_object("".join(call.arguments) or "{}")}
        return replace(self, calls=whole).message()


def make_call_id() -> str:
    """Return an id for a tool call whose engine gives it none: clients match results by it."""
    return f"call_{secrets.token_hex(12)}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False
