"""OpenAI's legacy completions on the wire: bare text, no roles, no events."""

from __future__ import annotations

from typing import Any

import orjson

from engine.base import Delta, TokenLogprob, Usage
from gateway.exchange.answers import Answer
from gateway.exchange.encoder import DONE, usage_fields
from gateway.exchange.events import ShannonEvent


class CompletionFrames:
    """The frames of one completion. `echo` is each choice's prompt where the client wants it back."""

    def __init__(
        self,
        completion_id: str,
        created: int,
        model_id: str,
        usage: Usage,
        *,
        include_usage: bool,
        echo: dict[int, str],
    ) -> None:
        self._fields = {"id": completion_id, "object": "text_completion", "created": created, "model": model_id}
        self._head = b"data: " + orjson.dumps(self._fields)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._usage = usage
        self._include_usage = include_usage
        self._echo = dict(echo)
        self._offsets: dict[int, int] = {}

    def open(self) -> bytes:
        return b""

    def add_event(self, event: ShannonEvent) -> bytes:
        return b""  # this protocol has no place for them

    def add_delta(self, delta: Delta) -> bytes:
        text = self._echo.pop(delta.index, "") + delta.text
        if not text and delta.finish_reason is None and delta.logprobs is None:
            return b""
        logprobs = b"null"
        if delta.logprobs is not None:
            offset = self._offsets.setdefault(delta.index, len(text) - len(delta.text))
            logprobs = orjson.dumps(_logprobs(delta.logprobs, offset))
            self._offsets[delta.index] = offset + len(delta.text)
        choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}]'
        fields = (delta.index, orjson.dumps(text), logprobs, orjson.dumps(delta.finish_reason))
        return self._head + choice % fields + self._tail

    def close(self) -> bytes:
        """Return the usage, which here always has a frame of its own if it was asked for, and the end."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(usage_fields(self._usage)) + b"}\n\n" + DONE

    def body(self, answers: dict[int, Answer], events: list[ShannonEvent]) -> bytes:
        choices = [
            {
                "index": index,
                "text": self._echo.get(index, "") + answer.text,
                "logprobs": None if answer.logprobs is None else _logprobs(answer.logprobs, 0),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in answers.items()
        ]
        return orjson.dumps(self._fields | {"choices": choices, "usage": usage_fields(self._usage)})


def _logprobs(entries: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """Return the legacy logprobs object; `offset` is the position of the first token in the text."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{top.token: top.logprob for top in entry.top} or None for entry in entries],
        "text_offset": offsets,
    }
