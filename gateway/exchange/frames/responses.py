"""OpenAI's Responses on the wire: a response object, and the events that build it up in order.

The object is kept as it grows, so that it can be shown, stored or cut off at any moment. Delta frames are cut from
byte templates made once per output item; everything else is rare. Shannon events ride in a field `shannon_events` on
`response.in_progress` and on the last event: SDKs know both, and no event type is added that they would not.
"""

from __future__ import annotations

from typing import Any, Literal

import orjson

from engine.base import Delta, TokenLogprob, ToolCallDelta, Usage
from engine.messages import Message
from gateway.clock import Clock
from gateway.errors import BadRequest, Cancelled, GatewayError, RateLimitExceeded
from gateway.exchange.answers import Answer, make_call_id
from gateway.exchange.encoder import event_fields
from gateway.exchange.events import ShannonEvent
from gateway.exchange.frames.output_items import DELTAS, Kind, OutputItem, logprob_fields

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

RUNNING = ("queued", "in_progress")
"""Statuses that are not final."""


class ResponseFrames:
    """The frames of one response. `fields` are those of the response object that stay as they are."""

    def __init__(self, fields: dict[str, Any], usage: Usage, clock: Clock, *, events: bool) -> None:
        self.status: Status = "in_progress"
        self.finished = False
        """The last frame, or the whole body, has been made: everything that the engine had to say is in it."""
        self._fields = fields
        self._usage = usage
        self._clock = clock
        self._events_wanted = events
        self._seen: list[ShannonEvent] = []
        self._waiting: list[ShannonEvent] = []
        self._sequence = 0
        self._items: list[OutputItem] = []
        self._text: OutputItem | None = None
        """The message or reasoning that is being said."""
        self._calls: dict[int, OutputItem] = {}
        """Open calls by their number."""
        self._finish_reason: str | None = None
        self._error: dict[str, Any] | None = None
        self._completed_at: int | None = None

    def open(self) -> bytes:
        return b""

    def add_event(self, event: ShannonEvent) -> bytes:
        """Return a frame for `event` and those held back, or nothing when they may ride on a later frame."""
        if not self._events_wanted:
            return b""
        self._seen.append(event)
        self._waiting.append(event)
        if event.deferrable or self._finish_reason is not None:
            return b""
        return self._start() or self._progress()

    def add_delta(self, delta: Delta) -> bytes:
        """Return the frames for `delta`."""
        out = self._start()
        if self._waiting and self._finish_reason is None:
            out += self._progress()
        if delta.reasoning:
            out += self._say("reasoning", delta.reasoning, None)
        # Tokens that make no text yet still have their logprobs, but not those that were thought or called with.
        if delta.text or (delta.logprobs and not delta.reasoning and not delta.tool_calls):
            out += self._say("message", delta.text, delta.logprobs)
        for piece in delta.tool_calls:
            out += self._call(piece)
        self._finish_reason = delta.finish_reason or self._finish_reason
        return out

    def close(self) -> bytes:
        """Return the last frames."""
        out = self._start()
        if not self._items:
            out += self._add("message")
        out += self._end_items()
        self._finish()
        return out + self._last_event(f"response.{self.status}")

    def body(self, answers: dict[int, Answer], events: list[ShannonEvent]) -> bytes:
        answer = answers.get(0) or Answer()
        if self._events_wanted:
            self._seen = events
        if answer.reasonings:
            self._new("reasoning").pieces = answer.reasonings
        if answer.texts or not (answer.calls or answer.reasonings):
            item = self._new("message")
            item.pieces, item.logprobs = answer.texts, answer.logprobs or []
        for call in answer.calls.values():
            self._new("function_call", call.id, call.name).pieces = call.arguments
        self._finish_reason = answer.finish_reason
        for item in self._items:
            item.status = self._final_status(item)
        self._finish()
        return orjson.dumps(self.response())

    def response(self) -> dict[str, Any]:
        """Return the response object as it stands."""
        final = self.status not in RUNNING
        cut = self.status == "incomplete"
        fields = self._fields | {
            "status": self.status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [item.fields() for item in self._items] if final else [],
            "usage": _usage(self._usage) if final else None,
        }
        if self._completed_at is not None:
            fields["completed_at"] = self._completed_at
        if final and self._events_wanted:
            fields["shannon_events"] = [event_fields(event) for event in self._seen]
        return fields

    def message(self) -> Message:
        """The answer as a message for later requests."""
        # A call that the length cut off would keep templates from reading what comes after it.
        calls = [item for item in self._items if item.kind == "function_call" and _is_object(item.text or "{}")]
        text = "".join(item.text for item in self._items if item.kind == "message")
        message: Message = {"role": "assistant", "content": text or (None if calls else "")}
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.text or "{}"},
                }
                for call in calls
            ]
        return message

    def stop(self, error: GatewayError | None) -> None:
        """Note that the response ended before its time, by `error`, or because it was no longer wanted."""
        if self.status not in RUNNING:
            return
        self.status = "cancelled" if error is None or isinstance(error, Cancelled) else "failed"
        if self.status == "failed":
            assert error is not None
            self._error = {"code": _error_code(error), "message": str(error)}
        for item in self._items:
            if item.status == "in_progress":
                item.status = "incomplete"

    def render_error(self, error: GatewayError, in_stream: bool) -> bytes:
        """Return the bytes of an error: the end of the stream, or a whole body in OpenAI's shape."""
        if not in_stream:
            return error.body()
        if self.finished:
            return b""  # everything has been said
        opening = self._start()
        self.stop(error)
        # There is no event for a cancelled response; SDKs take any of the final ones and read the status.
        return opening + self._last_event("response.failed" if self.status == "failed" else "response.incomplete")

    def _finish(self) -> None:
        self.finished = True
        self.status = "incomplete" if self._finish_reason == "length" else "completed"
        if self.status == "completed":
            self._completed_at = int(self._clock())

    def _start(self) -> bytes:
        """Return the first two frames, unless they have been sent."""
        if self._sequence:
            return b""
        return self._event("response.created", response=self._shown()) + self._progress()

    def _progress(self) -> bytes:
        return self._event("response.in_progress", response=self._shown(), **self._riding())

    def _last_event(self, name: str) -> bytes:
        return self._event(name, response=self._shown(), **self._riding())

    def _shown(self) -> dict[str, Any]:
        """Return the response object for an event. The Shannon events ride beside it, each once."""
        fields = self.response()
        fields.pop("shannon_events", None)
        return fields

    def _riding(self) -> dict[str, Any]:
        events, self._waiting = self._waiting, []
        return {"shannon_events": [event_fields(event) for event in events]} if events else {}

    def _say(self, kind: Kind, text: str, logprobs: list[TokenLogprob] | None) -> bytes:
        item, out = self._text, b""
        if item is None or item.kind != kind:
            out = self._end_items() + self._add(kind)
            item = self._text
            assert item is not None
        item.pieces.append(text)
        tail = b""
        if kind == "message":
            tail = b',"logprobs":[]'
            if logprobs:
                item.logprobs += logprobs
                tail = b',"logprobs":' + orjson.dumps(logprob_fields(logprobs))
        return out + self._delta(item, text, tail)

    def _call(self, piece: ToolCallDelta) -> bytes:
        item, out = self._calls.get(piece.index), b""
        if item is None:
            out = self._end_items(calls="whole")
            item = self._new("function_call", piece.id or "", piece.name or "")
            self._calls[piece.index] = item
            out += self._event("response.output_item.added", output_index=item.index, item=item.fields())
        if not piece.arguments:
            return out
        item.pieces.append(piece.arguments)
        return out + self._delta(item, piece.arguments, b"")

    def _delta(self, item: OutputItem, text: str, tail: bytes) -> bytes:
        if not item.head:
            name = f"{DELTAS[item.kind]}.delta"
            fields = orjson.dumps({"type": name, **item.place})[:-1]
            item.head = b"event: %b\ndata: %b" % (name.encode(), fields) + b',"delta":'
        self._sequence += 1
        return item.head + orjson.dumps(text) + tail + b',"sequence_number":%d}\n\n' % (self._sequence - 1)

    def _new(self, kind: Kind, call_id: str = "", name: str = "") -> OutputItem:
        if kind == "function_call":
            call_id = call_id or make_call_id()
        self._items.append(OutputItem(kind, len(self._items), call_id, name))
        return self._items[-1]

    def _add(self, kind: Kind) -> bytes:
        """Open a message or reasoning."""
        item = self._text = self._new(kind)
        added = self._event("response.output_item.added", output_index=item.index, item=item.fields())
        return added + self._event("response.content_part.added", **item.place, part=item.part())

    def _end_items(self, calls: Literal["all", "whole"] = "all") -> bytes:
        """Return the frames that end what is open. `whole` leaves calls open whose arguments are not complete yet:
        where calls come mingled, there is more to come.
        """
        out = b""
        if self._text is not None:
            out += self._end(self._text)
            self._text = None
        for number, call in list(self._calls.items()):
            if calls == "all" or _is_object(call.text):
                out += self._end(call)
                del self._calls[number]
        return out

    def _end(self, item: OutputItem) -> bytes:
        item.status = self._final_status(item)
        whole: dict[str, Any] = {"arguments" if item.kind == "function_call" else "text": item.text}
        if item.kind == "message":
            whole["logprobs"] = logprob_fields(item.logprobs)
        out = self._event(f"{DELTAS[item.kind]}.done", **item.place, **whole)
        if item.kind != "function_call":
            out += self._event("response.content_part.done", **item.place, part=item.part())
        return out + self._event("response.output_item.done", output_index=item.index, item=item.fields())

    def _final_status(self, item: OutputItem) -> Literal["completed", "incomplete"]:
        """Return the status of an item that ends now: of the last one, the length may have cut something off."""
        is_last = item.index == len(self._items) - 1
        return "incomplete" if is_last and self._finish_reason == "length" else "completed"

    def _event(self, name: str, **fields: Any) -> bytes:
        data = orjson.dumps({"type": name, **fields, "sequence_number": self._sequence})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _usage(usage: Usage) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.estimated:
        fields["estimated"] = True
    return fields


def _error_code(error: GatewayError) -> str:
    """Return one of the few codes that a response object may have."""
    if isinstance(error, RateLimitExceeded):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, BadRequest) else "server_error"


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False
