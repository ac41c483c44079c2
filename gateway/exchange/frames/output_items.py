"""The output items of a response, in the Responses API's form."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.base import TokenLogprob
from gateway.exchange.frames.chat import logprobs_fields

Kind = Literal["reasoning", "message", "function_call"]

_PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
DELTAS: dict[Kind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}
"""What the events about an item's text are called, up to their last word."""


@dataclass(slots=True)
class OutputItem:
    """One output item. A message and a reasoning item have one part each."""

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    head: bytes = b""
    """A delta frame up to its text."""
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.kind]}_{secrets.token_hex(24)}"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def place(self) -> dict[str, Any]:
        """The fields that locate events."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.index}
        return place if self.kind == "function_call" else place | {"content_index": 0}

    def part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprob_fields(self.logprobs)}

    def fields(self) -> dict[str, Any]:
        """Return the item in OpenAI's form."""
        head: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return head | {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [self.part()] if self.pieces or self.status != "in_progress" else []
        if self.kind == "reasoning":
            return head | {"summary": [], "content": content}
        return head | {"role": "assistant", "content": content}


def logprob_fields(entries: list[TokenLogprob]) -> list[dict[str, Any]]:
    """Return logprobs in OpenAI's form."""
    fields: list[dict[str, Any]] = logprobs_fields(entries)["content"]
    return fields
