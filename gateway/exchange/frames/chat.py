"""OpenAI's chat completions on the wire.

Frames are cut from byte templates made once per request, with orjson for the text: no object is built per token.
"""

from __future__ import annotations

from typing import Any

import orjson

from engine.base import Delta, TokenLogprob, ToolCallDelta, Usage
from gateway.exchange.answers import Answer, make_call_id
from gateway.exchange.encoder import DONE, event_fields, usage_fields
from gateway.exchange.events import ShannonEvent


def _logprob_fields(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": entry.bytes}


def logprobs_fields(entries: list[TokenLogprob]) -> dict[str, Any]:
    """Return OpenAI's logprobs object."""
    content = [_logprob_fields(entry) | {"top_logprobs": list(map(_logprob_fields, entry.top))} for entry in entries]
    return {"content": content, "refusal": None}


class ChatFrames:
    """The frames of one chat completion. `usage` is read when the last ones are made."""

    def __init__(
        self, completion_id: str, created: int, model_id: str, usage: Usage, *, include_usage: bool, events: bool
    ) -> None:
        self._fields = {"id": completion_id, "object": "chat.completion", "created": created, "model": model_id}
        fields = self._fields | {"object": "chat.completion.chunk"}
        self._head = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['
        # With include_usage every frame but the usage frame says "usage": null, as OpenAI's do.
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._usage = usage
        self._include_usage = include_usage
        self._events_wanted = events
        self._events: list[ShannonEvent] = []
        self._content_heads: dict[int, bytes] = {}
        self._called: set[tuple[int, int]] = set()
        """Calls that have begun, by choice and number."""
        self._content_tail = b'},"finish_reason":null}]' + self._tail
        self._finish: bytes | None = None

    def open(self) -> bytes:
        return b""

    def add_event(self, event: ShannonEvent) -> bytes:
        """Return a frame for `event` and those held back, or nothing when they may ride on a later frame."""
        if not self._events_wanted:
            return b""
        self._events.append(event)
        if event.deferrable or self._finish is not None:
            return b""
        if not self._content_heads:
            return self._open_choice(0)
        return self._frame(b'{"index":0,"delta":{},"finish_reason":null}')

    def add_delta(self, delta: Delta) -> bytes:
        """Return the frames for `delta`. A finish frame is held back until it is known what else must ride on it."""
        out = b""
        head = self._content_heads.get(delta.index)
        if head is None:
            out = self._open_choice(delta.index)
            head = self._content_heads[delta.index]
        if self._finish is not None:
            out += self._flush_finish()
        if delta.logprobs is not None or delta.reasoning or delta.tool_calls:
            out += self._rich_frame(delta)
        elif self._events and delta.text:
            choice = b'{"index":%d,"delta":{"content":%b},"finish_reason":null}'
            out += self._frame(choice % (delta.index, orjson.dumps(delta.text)))
        elif delta.text:
            out += head + orjson.dumps(delta.text) + self._content_tail
        if delta.finish_reason is not None:
            reason = orjson.dumps(delta.finish_reason)
            self._finish = b'{"index":%d,"delta":{},"finish_reason":%b}' % (delta.index, reason)
        return out

    def close(self) -> bytes:
        """Return the last frames. The usage rides on the finish frame or has a frame of its own, never both."""
        usage = b',"usage":' + orjson.dumps(usage_fields(self._usage)) + b"}\n\n"
        if not self._include_usage:
            return self._flush_finish(usage) + DONE
        return self._flush_finish() + self._head + b"]" + usage + DONE

    def body(self, answers: dict[int, Answer], events: list[ShannonEvent]) -> bytes:
        body = self._fields | {
            "choices": [_choice(index, answer) for index, answer in answers.items()],
            "usage": usage_fields(self._usage),
        }
        if self._events_wanted:
            body["shannon_events"] = [event_fields(event) for event in events]
        return orjson.dumps(body)

    def _open_choice(self, index: int) -> bytes:
        """Return the first frame of a choice, which has the role."""
        self._content_heads[index] = self._head + b'{"index":%d,"delta":{"content":' % index
        return self._frame(b'{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null}' % index)

    def _rich_frame(self, delta: Delta) -> bytes:
        fields: dict[str, Any] = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.text or not (delta.reasoning or delta.tool_calls):
            fields["content"] = delta.text
        if delta.tool_calls:
            fields["tool_calls"] = [self._call_fields(delta.index, call) for call in delta.tool_calls]
        logprobs = {} if delta.logprobs is None else {"logprobs": logprobs_fields(delta.logprobs)}
        choice = {"index": delta.index, "delta": fields, **logprobs, "finish_reason": None}
        return self._frame(orjson.dumps(choice))

    def _call_fields(self, index: int, call: ToolCallDelta) -> dict[str, Any]:
        """Return a piece of a call of choice `index`. The first one has an id and a name, whatever the engine gives."""
        if (index, call.index) in self._called:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        self._called.add((index, call.index))
        function = {"name": call.name or "", "arguments": call.arguments}
        return {"index": call.index, "id": call.id or make_call_id(), "type": "function", "function": function}

    def _flush_finish(self, tail: bytes | None = None) -> bytes:
        choice, self._finish = self._finish, None
        return self._frame(choice, tail) if choice is not None else b""

    def _frame(self, choice: bytes, tail: bytes | None = None) -> bytes:
        events = b""
        if self._events:
            events = b',"shannon_events":' + orjson.dumps([event_fields(event) for event in self._events])
            self._events.clear()
        return self._head + choice + b"]" + events + (tail or self._tail)


def _choice(index: int, answer: Answer) -> dict[str, Any]:
    message = answer.message() | {"refusal": None}
    if answer.reasonings:
        message["reasoning_content"] = answer.reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": None if answer.logprobs is None else logprobs_fields(answer.logprobs),
        "finish_reason": answer.finish_reason,
    }
