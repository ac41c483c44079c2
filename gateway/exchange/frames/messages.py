"""Anthropic's messages on the wire: content blocks one after the other, and errors in that protocol's shape.

Delta frames are cut from byte templates made once per block. Shannon events ride in a field `shannon_events` on the
first and the last frames and on pings, which clients of this protocol pass over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from engine.base import Delta, FinishReason, ToolCallDelta, Usage
from gateway.errors import GatewayError, Overloaded
from gateway.exchange.answers import Answer, make_call_id
from gateway.exchange.encoder import event_fields
from gateway.exchange.events import ShannonEvent

Kind = Literal["thinking", "text", "tool_use"]

_STOP_REASONS: dict[FinishReason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS: dict[Kind, tuple[str, str]] = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


@dataclass(slots=True)
class _Block:
    """An open content block. `head` is a delta frame up to its text."""

    kind: Kind
    index: int
    head: bytes = b""
    pieces: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        type_, name = _DELTAS[self.kind]
        fields = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
        self.head = b"event: content_block_delta\ndata: " + fields % (self.index, type_.encode(), name.encode())


class MessageFrames:
    """The frames of one message. `usage` returns the tokens so far, including running generations."""

    def __init__(self, message_id: str, model_id: str, usage: Callable[[], Usage], *, events: bool) -> None:
        self._fields = {"id": message_id, "type": "message", "role": "assistant", "model": model_id}
        self._usage = usage
        self._events_wanted = events
        self._waiting: list[ShannonEvent] = []
        self._started = False
        self._blocks = 0
        self._text: _Block | None = None
        """The text or thinking that is being said."""
        self._calls: dict[int, _Block] = {}
        """Open calls by their number."""
        self._called = False
        self._finish_reason: FinishReason | None = None
        self._stop_sequence: str | None = None

    def open(self) -> bytes:
        return b""

    def add_event(self, event: ShannonEvent) -> bytes:
        """Return a frame for `event` and those held back, or nothing when they may ride on a later frame."""
        if not self._events_wanted:
            return b""
        self._waiting.append(event)
        if event.deferrable or self._finish_reason is not None:
            return b""
        return self._start() or self._ping()

    def add_delta(self, delta: Delta) -> bytes:
        """Return the frames for `delta`."""
        out = self._start()
        if self._waiting and self._finish_reason is None:
            out += self._ping()
        if delta.reasoning:
            out += self._say("thinking", delta.reasoning)
        if delta.text:
            out += self._say("text", delta.text)
        for piece in delta.tool_calls:
            out += self._call(piece)
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._stop_sequence = delta.stop_reason or self._stop_sequence
        return out

    def close(self) -> bytes:
        """Return the last frames."""
        out = self._start() + self._end_blocks()
        delta = _stop(self._finish_reason, self._stop_sequence, called=self._called)
        last = {"delta": delta, "usage": usage_fields(self._usage()), **self._riding()}
        return out + _frame("message_delta", last) + _frame("message_stop", {})

    def body(self, answers: dict[int, Answer], events: list[ShannonEvent]) -> bytes:
        answer = answers.get(0) or Answer()
        content: list[dict[str, Any]] = []
        if answer.reasonings:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.texts:
            content.append({"type": "text", "text": answer.text})
        for call in answer.tool_calls:
            function = call["function"]
            arguments = _object(function["arguments"]) or {}  # cut off by the length
            content.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
        stop = _stop(answer.finish_reason, answer.stop_reason, called=bool(answer.calls))
        body = self._fields | {"content": content, **stop, "usage": usage_fields(self._usage())}
        if self._events_wanted:
            body["shannon_events"] = [event_fields(event) for event in events]
        return orjson.dumps(body)

    def _start(self) -> bytes:
        """Return the first frame, unless it has been sent."""
        if self._started:
            return b""
        self._started = True
        usage = usage_fields(self._usage()) | {"output_tokens": 0}
        message: dict[str, Any] = self._fields | {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _frame("message_start", {"message": message, **self._riding()})

    def _ping(self) -> bytes:
        return _frame("ping", self._riding())

    def _riding(self) -> dict[str, Any]:
        events, self._waiting = self._waiting, []
        return {"shannon_events": [event_fields(event) for event in events]} if events else {}

    def _say(self, kind: Kind, text: str) -> bytes:
        block, out = self._text, b""
        if block is None or block.kind != kind:
            empty = {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
            out = self._end_blocks()
            block = self._text = self._new(kind)
            out += self._block_start(block, empty)
        return out + block.head + orjson.dumps(text) + b"}}\n\n"

    def _call(self, piece: ToolCallDelta) -> bytes:
        block, out = self._calls.get(piece.index), b""
        if block is None:
            out = self._end_blocks(whole_calls_only=True)
            block = self._calls[piece.index] = self._new("tool_use")
            self._called = True
            fields = {"id": piece.id or make_call_id(), "name": piece.name or "", "input": {}}
            out += self._block_start(block, fields)
        if not piece.arguments:
            return out
        block.pieces.append(piece.arguments)
        return out + block.head + orjson.dumps(piece.arguments) + b"}}\n\n"

    def _new(self, kind: Kind) -> _Block:
        self._blocks += 1
        return _Block(kind, self._blocks - 1)

    def _block_start(self, block: _Block, fields: dict[str, Any]) -> bytes:
        return _frame("content_block_start", {"index": block.index, "content_block": {"type": block.kind, **fields}})

    def _end_blocks(self, *, whole_calls_only: bool = False) -> bytes:
        """Return the frames that end the open blocks. A call whose arguments are not whole yet may stay open: where
        calls come mingled, there is more to come."""
        ending = [] if self._text is None else [self._text]
        self._text = None
        for number, block in list(self._calls.items()):
            if not whole_calls_only or _object("".join(block.pieces)) is not None:
                ending.append(self._calls.pop(number))
        return b"".join(_frame("content_block_stop", {"index": block.index}) for block in ending)


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Return Anthropic's usage object, in which what the prefix cache served stands beside the input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def error_body(error: GatewayError) -> bytes:
    """Return Anthropic's error object as JSON."""
    kind = "overloaded_error" if isinstance(error, Overloaded) else _ERROR_TYPES.get(error.status, "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": str(error)}})


def render_error(error: GatewayError, in_stream: bool) -> bytes:
    """Return an error in Anthropic's shape."""
    return b"event: error\ndata: %b\n\n" % error_body(error) if in_stream else error_body(error)


def _frame(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **fields}))


def _stop(finish_reason: FinishReason | None, stop_sequence: str | None, *, called: bool) -> dict[str, Any]:
    """The stop reason of a message. OpenAI's finish reason of a forced call is "stop"; here it is a tool use."""
    if finish_reason == "stop" and stop_sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_sequence}
    if finish_reason == "stop" and called:
        finish_reason = "tool_calls"
    return {"stop_reason": _STOP_REASONS[finish_reason or "stop"], "stop_sequence": None}


def _object(text: str) -> dict[str, Any] | None:
    """Return the arguments of a call, or None where they are not whole."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
