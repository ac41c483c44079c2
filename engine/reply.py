"""What replicas answer: the bytes of a stream as deltas and token counts, vectors, tokens. No I/O.

Every frame is parsed once. Leaves out what only decorates a stream: roles, fingerprints, other servers' extensions.
What is not OpenAI's protocol fails with AttemptFailed, an error in the stream as `engine.wire` says.
"""

from __future__ import annotations

import array
import base64
import sys
from typing import Any

import orjson

from engine.base import (
    Delta,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    TokenLogprob,
    ToolCallDelta,
)
from engine.pool import AttemptFailed
from engine.wire import refuse

_MAX_LINE_BYTES = 4 * 2**20
"""A line of a stream that is longer is not a frame. The longest sane one has logprobs of a whole answer."""
_FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


class Frames:
    """Cuts a stream of server-sent events, arriving in pieces of any size, into the payloads of its data lines."""

    def __init__(self) -> None:
        self.done = False
        """[DONE] was seen."""
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads of the lines that `data` completes; comments and other fields are dropped."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            raise AttemptFailed("sent a line without end")
        payloads = []
        for line in lines:
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    self.done = True
                    break
                payloads.append(payload)
        return payloads


class Reply:
    """The answer to one generation, as one replica streams it. Keeps `prepared.usage` up to date.

    A server that tells the usage with every frame is taken at its word. Else frames with content are counted, one
    token each, and the usage is marked as estimated until the server tells the sum at the end.
    """

    def __init__(self, prepared: Prepared, request: GenerationRequest, *, estimated: bool) -> None:
        """`estimated` tells that the prompt is. What an attempt before this one spent is forgotten."""
        self.started = False
        """A token has been generated."""
        self._unfinished = set(range(prepared.n))
        self._prepared = prepared
        self._request = request
        self._read_choice = self._read_delta if request.prompt is None else self._read_text
        self._tokens = [0] * prepared.n
        self._reasoning = [0] * prepared.n
        self._guessed: set[int] = set()
        self._prompt_told = False
        prepared.usage.prompt_tokens = prepared.usage.completion_tokens = prepared.usage.reasoning_tokens = 0
        self._estimated = estimated

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason."""
        return not self._unfinished

    def read_all(self, payloads: list[bytes]) -> tuple[list[Delta], AttemptFailed | InvalidRequest | None]:
        """Count all these frames; return what they add, and the failure that ended them."""
        deltas: list[Delta] = []
        try:
            for payload in payloads:
                deltas += self.read(payload)
        except (AttemptFailed, InvalidRequest) as failure:
            return deltas, failure
        return deltas, None

    def read(self, payload: bytes) -> list[Delta]:
        """Return what one frame adds, perhaps nothing. Raises AttemptFailed, InvalidRequest."""
        try:
            frame = orjson.loads(payload)
            if frame.get("error"):
                refuse(500, frame, self._request)
            deltas = []
            choices, told = frame.get("choices"), frame.get("usage")
            if told and (read_count(told, "prompt_tokens") is None or read_count(told, "completion_tokens") is None):
                told = None
            for choice in choices or ():
                delta = self._read_choice(choice)
                self._count(delta, told)
                if delta.text or delta.finish_reason or delta.reasoning or delta.tool_calls or delta.logprobs:
                    self.started = True
                    deltas.append(delta)
            if told and not choices:
                self._sum_up(told)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise AttemptFailed(f"sent a frame that is not OpenAI's ({type(error).__name__})") from error
        return deltas

    def _read_delta(self, choice: dict[str, Any]) -> Delta:
        given = choice.get("delta") or {}
        calls, logprobs = given.get("tool_calls"), choice.get("logprobs")
        stop = choice.get("stop_reason")  # vLLM tells it, as a string or a token's id
        return Delta(
            _text(given.get("content")),
            self._index(choice),
            self._finish(choice),
            _chat_logprobs(logprobs) if logprobs else None,
            _text(given.get("reasoning_content") or given.get("reasoning")),
            [_tool_call(position, call) for position, call in enumerate(calls)] if calls else (),
            stop if isinstance(stop, str) else None,
        )

    def _read_text(self, choice: dict[str, Any]) -> Delta:
        logprobs = choice.get("logprobs")
        logprobs = _bare_logprobs(logprobs) if logprobs else None
        return Delta(_text(choice.get("text")), self._index(choice), self._finish(choice), logprobs)

    def _index(self, choice: dict[str, Any]) -> int:
        index = choice.get("index", 0)
        if not 0 <= index < self._prepared.n:
            raise IndexError
        return int(index)

    def _finish(self, choice: dict[str, Any]) -> FinishReason | None:
        reason = choice.get("finish_reason")
        if reason is None:
            return None
        if reason in ("error", "abort"):  # vLLM's core gave up on the request by itself
            raise AttemptFailed(f"finished with {reason!r}")
        self._unfinished.discard(self._index(choice))
        return _FINISH_REASONS.get(reason, "stop")

    def _count(self, delta: Delta, told: dict[str, Any] | None) -> None:
        """Count one choice's frame. The usage that rides on it is the choice's own."""
        index, usage = delta.index, self._prepared.usage
        if told:
            usage.prompt_tokens = told["prompt_tokens"]
            self._prompt_told = True
            self._tokens[index] = told["completion_tokens"]
            self._guessed.discard(index)
            if details := told.get("completion_tokens_details"):
                self._reasoning[index] = read_count(details, "reasoning_tokens") or 0
                usage.reasoning_tokens = sum(self._reasoning)
        elif delta.text or delta.reasoning or delta.tool_calls or delta.logprobs:
            self._tokens[index] += len(delta.logprobs) if delta.logprobs else 1
            self._guessed.add(index)
            if not self._prompt_told:
                usage.prompt_tokens = self._prepared.prompt_tokens
        usage.completion_tokens = sum(self._tokens)
        usage.estimated = bool(self._guessed) or (self._estimated and not self._prompt_told)

    def _sum_up(self, told: dict[str, Any]) -> None:
        """Take the last frame's usage, which is of all choices together."""
        usage = self._prepared.usage
        usage.prompt_tokens, usage.completion_tokens = told["prompt_tokens"], told["completion_tokens"]
        usage.cached_tokens = read_count(told.get("prompt_tokens_details"), "cached_tokens") or 0
        thought = read_count(told.get("completion_tokens_details"), "reasoning_tokens")
        usage.reasoning_tokens = usage.reasoning_tokens if thought is None else thought
        usage.estimated = False


def merge(deltas: list[Delta]) -> list[Delta]:
    """Return one delta per choice."""
    merged = []
    for index in sorted({delta.index for delta in deltas}):
        own = [delta for delta in deltas if delta.index == index]
        logprobs = [entry for delta in own for entry in delta.logprobs or ()]
        merged.append(
            Delta(
                "".join(delta.text for delta in own),
                index,
                next((delta.finish_reason for delta in reversed(own) if delta.finish_reason), None),
                logprobs or None,
                "".join(delta.reasoning for delta in own),
                [call for delta in own for call in delta.tool_calls],
                own[-1].stop_reason,
            )
        )
    return merged


def is_tokens(answer: Any) -> bool:
    """Tell vLLM's answer to /tokenize from those of other servers that have a route of this name."""
    if read_count(answer, "count") is None or not isinstance(answer.get("tokens"), list):
        return False
    return all(type(token_id) is int for token_id in answer["tokens"])


def read_count(fields: Any, name: str) -> int | None:
    """Return the count that is there under a name, or None."""
    count = fields.get(name) if isinstance(fields, dict) else None
    return count if type(count) is int and count >= 0 else None


def read_vectors(answer: Any, wanted: int) -> tuple[list[list[float]], int | None]:
    """Return the vectors of an embedding answer, in order of the inputs, and the tokens that they cost if it tells.

    Raises AttemptFailed.
    """
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        vectors = [_vector(row["embedding"]) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise AttemptFailed("sent something else than embeddings", elsewhere=False) from error
    if len(vectors) != wanted:
        raise AttemptFailed("sent another number of embeddings", elsewhere=False)
    return vectors, read_count(answer.get("usage"), "prompt_tokens")


def _vector(embedding: Any) -> list[float]:
    if isinstance(embedding, str):  # base64 of little-endian float32
        floats = array.array("f", base64.b64decode(embedding, validate=True))
        if sys.byteorder == "big":
            floats.byteswap()
        return floats.tolist()
    return [float(value) for value in embedding]


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError


def _tool_call(position: int, call: dict[str, Any]) -> ToolCallDelta:
    function = call.get("function") or {}
    index, name = int(call.get("index", position)), function.get("name")
    return ToolCallDelta(index, call.get("id"), _text(name) or None, _text(function.get("arguments")))


def _chat_logprobs(given: dict[str, Any]) -> list[TokenLogprob] | None:
    return [_logprob(entry) for entry in given["content"]] if given.get("content") else None


def _logprob(entry: dict[str, Any]) -> TokenLogprob:
    token = _text(entry["token"])
    top = tuple(_logprob(other) for other in entry.get("top_logprobs") or ())
    return TokenLogprob(token, float(entry["logprob"]), entry.get("bytes") or list(token.encode()), top)


def _bare_logprobs(given: dict[str, Any]) -> list[TokenLogprob] | None:
    """Convert the older form of completions: parallel lists, and a map of the best alternatives."""
    tokens = given.get("tokens") or []
    tops = given.get("top_logprobs") or [None] * len(tokens)
    entries = []
    for token, logprob, top in zip(tokens, given["token_logprobs"], tops, strict=True):
        best = tuple(_logprob({"token": other, "logprob": value}) for other, value in (top or {}).items())
        entries.append(TokenLogprob(_text(token), float(logprob or 0.0), list(token.encode()), best))
    return entries or None
