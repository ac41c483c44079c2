"""Events to the wire: the frames of a chat completion stream as bytes, or one JSON body.

Frames are cut from byte templates made once per request, with orjson for the text: no object is built per token.
Errors pass through; `gateway.response` gives them their form.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import orjson

from engine.base import Delta, TokenLogprob, Usage
from gateway.events import Event, ShannonEvent

DONE = b"data: [DONE]\n\n"


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def event_fields(event: ShannonEvent) -> dict[str, Any]:
    """Return the fields of a Shannon event that clients see."""
    return {
        "type": event.type,
        "agent_id": event.agent_id,
        "message": event.message,
        "timestamp": event.timestamp,
        "payload": event.payload,
    }


def _logprob_fields(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": entry.bytes}


def logprobs_fields(entries: list[TokenLogprob]) -> dict[str, Any]:
    """Return OpenAI's logprobs object."""
    content = [_logprob_fields(entry) | {"top_logprobs": list(map(_logprob_fields, entry.top))} for entry in entries]
    return {"content": content, "refusal": None}


class ChatFrames:
    """The frames of one chat completion stream. `usage` is read when the last frames are made."""

    def __init__(
        self, completion_id: str, created: int, model_id: str, usage: Usage, *, include_usage: bool, events: bool
    ) -> None:
        fields = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model_id}
        self._head = b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['
        # With include_usage every frame but the usage frame says "usage": null, as OpenAI's do.
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._usage = usage
        self._include_usage = include_usage
        self._events_wanted = events
        self._events: list[ShannonEvent] = []
        self._content_heads: dict[int, bytes] = {}
        self._content_tail = b'},"finish_reason":null}]' + self._tail
        self._finish: bytes | None = None

    def add_event(self, event: ShannonEvent) -> bytes:
        """Return a frame for `event` and those held back, or nothing when they may ride on a later frame."""
        if not self._events_wanted:
            return b""
        self._events.append(event)
        if event.deferrable or self._finish is not None:
            return b""
        if not self._content_heads:
            return self._open(0)
        return self._frame(b'{"index":0,"delta":{},"finish_reason":null}')

    def add_delta(self, delta: Delta) -> bytes:
        """Return the frames for `delta`. A finish frame is held back until it is known what else must ride on it."""
        out = b""
        head = self._content_heads.get(delta.index)
        if head is None:
            out = self._open(delta.index)
            head = self._content_heads[delta.index]
        if self._finish is not None:
            out += self._flush_finish()
        if delta.logprobs is not None:
            fields = {"delta": {"content": delta.text}, "logprobs": logprobs_fields(delta.logprobs)}
            choice = b'{"index":%d,' % delta.index + orjson.dumps(fields)[1:-1] + b',"finish_reason":null}'
            out += self._frame(choice)
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

    def _open(self, index: int) -> bytes:
        """Return the first frame of a choice, which has the role."""
        self._content_heads[index] = self._head + b'{"index":%d,"delta":{"content":' % index
        return self._frame(b'{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null}' % index)

    def _flush_finish(self, tail: bytes | None = None) -> bytes:
        choice, self._finish = self._finish, None
        return self._frame(choice, tail) if choice is not None else b""

    def _frame(self, choice: bytes, tail: bytes | None = None) -> bytes:
        events = b""
        if self._events:
            events = b',"shannon_events":' + orjson.dumps([event_fields(event) for event in self._events])
            self._events.clear()
        return self._head + choice + b"]" + events + (tail or self._tail)


async def stream_chat(events: AsyncGenerator[Event, None], frames: ChatFrames) -> AsyncGenerator[bytes, None]:
    """Yield a chat completion stream as bytes, one or more whole frames at a time."""
    async with contextlib.aclosing(events):
        async for event in events:
            data = frames.add_delta(event) if isinstance(event, Delta) else frames.add_event(event)
            if data:
                yield data
    yield frames.close()


async def collect_chat(
    events: AsyncGenerator[Event, None],
    completion_id: str,
    created: int,
    model_id: str,
    usage: Usage,
    *,
    with_events: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield one chat completion as a JSON body, once the events have ended."""
    choices: dict[int, dict[str, Any]] = {}
    seen: list[dict[str, Any]] = []
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                _append(choices, event)
            else:
                seen.append(event_fields(event))
    body = {
        "id": completion_id,
        "object": "chat.completion",
        "created": created,
        "model": model_id,
        "choices": [choices[index] for index in sorted(choices)],
        "usage": usage_fields(usage),
    }
    if with_events:
        body["shannon_events"] = seen
    yield orjson.dumps(body)


def _append(choices: dict[int, dict[str, Any]], delta: Delta) -> None:
    choice = choices.get(delta.index)
    if choice is None:
        message = {"role": "assistant", "content": "", "refusal": None}
        choice = {"index": delta.index, "message": message, "logprobs": None, "finish_reason": None}
        choices[delta.index] = choice
    choice["message"]["content"] += delta.text
    if delta.logprobs is not None:
        fields = logprobs_fields(delta.logprobs)
        if choice["logprobs"] is None:
            choice["logprobs"] = fields
        else:
            choice["logprobs"]["content"] += fields["content"]
    choice["finish_reason"] = delta.finish_reason or choice["finish_reason"]
