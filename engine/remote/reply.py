"""Answers of replicas: the frames of a stream as deltas and token counts, vectors, tokens. No I/O.

Ignores what only decorates a stream: roles, fingerprints, other servers' extensions. A whole completion is read as a
stream of one frame. What is not OpenAI's protocol fails with AttemptFailed, an error in the stream as
`engine.remote.wire` says.
"""

from __future__ import annotations

import array
import base64
import math
import sys
from typing import Any

from engine.base import Delta, FinishReason, GenerationRequest, InvalidRequest, Prepared, TokenLogprob
from engine.remote.pool import AttemptFailed
from engine.remote.tool_call_pieces import CallPieces, tool_names
from engine.remote.wire import estimate_tokens, is_error, most_tokens, refuse

_LONGEST_TOKEN_CHARS = 32
"""A frame with more text has several tokens."""
_COUNTED_CONTEXTS = 2
"""Counts above this many context lengths are wrong. The context length in the settings may be below the server's."""
_NO_COUNT = 2**31
_GUESSED_CONTEXTS = 8
"""Limit on an estimated response, in context lengths. Estimates are high for servers that send one letter per frame."""
_LEAST_LOGPROB = -9999.0
"""vLLM's value for -inf, which JSON can't represent."""
_FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",  # Mistral's
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
}


class Reply:
    """The response of one replica to one generation. Keeps `prepared.usage` up to date.

    Usage that the server reports in every frame is used as it is. Otherwise tokens are estimated, at least one for each
    frame with content, and the usage is marked as estimated until the server reports the totals at the end. Counts that
    are impossible with a context of `context_tokens` are ignored; a response far longer than that fails.
    """

    def __init__(
        self, prepared: Prepared, request: GenerationRequest, *, estimated: bool, context_tokens: int = _NO_COUNT
    ) -> None:
        """`estimated`: the prompt token count is an estimate. Usage of earlier attempts is discarded."""
        self._context_tokens = context_tokens
        self.started = False
        """A token has been generated."""
        self.is_whole = False
        """The response is one document, not a stream; its usage is the total of all choices."""
        self._prepared = prepared
        self._request = request
        self._choices = [_Choice(request) for _ in range(prepared.n)]
        self._prompt_told = False
        self._estimated = estimated
        self.forget_usage()

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason."""
        return all(choice.finished for choice in self._choices)

    def forget_usage(self) -> int:
        """Reset the usage to zero. Returns the discarded tokens."""
        usage = self._prepared.usage
        spent = usage.prompt_tokens + usage.completion_tokens
        usage.prompt_tokens = usage.completion_tokens = usage.cached_tokens = usage.reasoning_tokens = 0
        return spent

    def read_all(self, frames: list[Any]) -> tuple[list[Delta], AttemptFailed | InvalidRequest | None]:
        """Read frames. Returns their deltas, and the failure that ended them if there is one."""
        deltas: list[Delta] = []
        try:
            for frame in frames:
                deltas += self.read(frame)
        except (AttemptFailed, InvalidRequest) as failure:
            return deltas, failure
        return deltas, None

    def read(self, frame: Any) -> list[Delta]:
        """The deltas of one frame, perhaps none. Raises AttemptFailed, InvalidRequest."""
        try:
            if is_error(frame):
                refuse(200, frame, self._request)
            choices, told = frame.get("choices") or (), self._told(frame.get("usage"))
            deltas = []
            for choice in choices:
                index = choice.get("index") or 0
                if not 0 <= index < len(self._choices):
                    raise IndexError
                delta = self._choices[index].read(choice, index)
                self._count(delta, self._choices[index], None if self.is_whole else told)
                if _says_something(delta):
                    self.started = True
                    deltas.append(delta)
            if told and (self.is_whole or not choices):
                self._sum_up(told)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = f"sent a frame that is not OpenAI's ({type(error).__name__})"
            raise AttemptFailed("failed", reason) from error
        return deltas

    def end(self) -> list[Delta]:
        """Return final deltas for choices without a finish reason, after the response has ended regularly."""
        deltas = []
        for index, choice in enumerate(self._choices):
            if self.started and not choice.finished:
                deltas.append(choice.read({"finish_reason": "stop"}, index))
        return deltas

    def _told(self, usage: Any) -> dict[str, Any] | None:
        """The usage object if it has both counts. Some servers report a prompt of 0 tokens when they don't count."""
        prompt, completion = read_count(usage, "prompt_tokens"), read_count(usage, "completion_tokens")
        most = _COUNTED_CONTEXTS * self._context_tokens
        if not prompt or completion is None or prompt > most or completion > most * len(self._choices):
            return None
        return dict(usage)

    def _count(self, delta: Delta, choice: _Choice, told: dict[str, Any] | None) -> None:
        """Count one choice's frame. The usage that rides on it is the choice's own."""
        usage = self._prepared.usage
        says = bool(delta.text or delta.reasoning or delta.tool_calls or delta.logprobs)
        if told and (told["completion_tokens"] or not (says or choice.tokens)):
            usage.prompt_tokens = told["prompt_tokens"]
            self._prompt_told = True
            choice.tokens, choice.guessed = told["completion_tokens"], False
            if details := told.get("completion_tokens_details"):
                choice.reasoning_tokens = min(read_count(details, "reasoning_tokens") or 0, choice.tokens)
                usage.reasoning_tokens = sum(choice.reasoning_tokens for choice in self._choices)
        elif says or delta.finish_reason:
            choice.guess(delta)
            if choice.tokens > _GUESSED_CONTEXTS * self._context_tokens:
                raise AttemptFailed("failed", "sent an answer without end")
            if not self._prompt_told:
                usage.prompt_tokens = self._prepared.prompt_tokens
        usage.completion_tokens = sum(choice.tokens for choice in self._choices)
        guessed = any(choice.guessed for choice in self._choices)
        usage.estimated = guessed or (self._estimated and not self._prompt_told)

    def _sum_up(self, told: dict[str, Any]) -> None:
        """Take the last frame's usage, which is of all choices together."""
        usage = self._prepared.usage
        if not told["completion_tokens"] and usage.completion_tokens:
            return  # it does not count
        usage.prompt_tokens, usage.completion_tokens = told["prompt_tokens"], told["completion_tokens"]
        usage.cached_tokens = min(
            read_count(told.get("prompt_tokens_details"), "cached_tokens") or 0, usage.prompt_tokens
        )
        thought = read_count(told.get("completion_tokens_details"), "reasoning_tokens")
        usage.reasoning_tokens = min(usage.reasoning_tokens if thought is None else thought, usage.completion_tokens)
        usage.estimated = False


class _Choice:
    """State of one choice: its tokens and its unfinished parts."""

    def __init__(self, request: GenerationRequest) -> None:
        self.finished = False
        self.tokens = 0
        self.reasoning_tokens = 0
        self.guessed = False
        """Some of `tokens` is an estimate."""
        self._is_chat = request.prompt is None
        self._is_forced = isinstance(request.tool_choice, dict)
        self._calls = CallPieces(tool_names(request.tools))
        self._halves: dict[str, str] = {}
        """By field, the first half of a surrogate pair without its second half."""

    def read(self, choice: dict[str, Any], index: int) -> Delta:
        """Return the delta of a frame. Raises AttemptFailed, and any error of invalid types."""
        return self._read_chat(choice, index) if self._is_chat else self._read_text(choice, index)

    def guess(self, delta: Delta) -> None:
        """Estimate the tokens of a frame without usage: one, or by its length if it is too long for one token.

        A finish reason alone counts as none, because not every server has a token for it.
        """
        says = bool(delta.text or delta.reasoning or delta.tool_calls or delta.logprobs)
        self.guessed = self.guessed or says or not self.tokens
        if not says:
            return
        if delta.logprobs:
            self.tokens += len(delta.logprobs)
            return
        calls = "".join(f"{call.name or ''}{call.arguments}" for call in delta.tool_calls)
        text = delta.text + delta.reasoning + calls
        self.tokens += 1 if len(text) <= _LONGEST_TOKEN_CHARS else estimate_tokens(text)

    def _read_chat(self, choice: dict[str, Any], index: int) -> Delta:
        given = (choice["delta"] if "delta" in choice else choice.get("message")) or {}
        logprobs, stop = choice.get("logprobs"), choice.get("stop_reason")
        pieces = given.get("tool_calls") or given.get("function_call")
        calls = self._calls.add(pieces) if pieces else []
        reason = self._finish_reason(choice)
        if reason is not None:
            calls += self._calls.finish(cut=reason == "length")
            reason = self._with_calls(reason)
        return Delta(
            self._whole_text("content", given.get("content") or given.get("refusal")),
            index,
            reason,
            _chat_logprobs(logprobs) if logprobs else None,
            self._whole_text("reasoning", given.get("reasoning_content") or given.get("reasoning")),
            calls or (),
            stop if isinstance(stop, str) else None,  # vLLM sends it, as a string or a token's id
        )

    def _read_text(self, choice: dict[str, Any], index: int) -> Delta:
        logprobs = choice.get("logprobs")
        logprobs = _bare_logprobs(logprobs) if logprobs else None
        return Delta(self._whole_text("text", choice.get("text")), index, self._finish_reason(choice), logprobs)

    def _finish_reason(self, choice: dict[str, Any]) -> FinishReason | None:
        """Return the finish reason once. Some servers repeat it; an empty string is none."""
        reason = choice.get("finish_reason")
        if reason in ("error", "abort"):  # vLLM's core gave up on the request by itself
            raise AttemptFailed("failed", f"finished with {reason!r}")
        if self.finished or not reason:
            return None
        self.finished = True
        return _FINISH_REASONS.get(reason, "stop") if isinstance(reason, str) else "stop"

    def _with_calls(self, reason: FinishReason) -> FinishReason:
        """Return the finish reason, corrected for tool calls. With a named `tool_choice` OpenAI sends "stop"."""
        if reason == "stop" and self._calls and self._calls.are_whole() and not self._is_forced:
            return "tool_calls"
        return "stop" if reason == "tool_calls" and not self._calls else reason

    def _whole_text(self, name: str, given: Any) -> str:
        """Return the text of a field, a string or a list of parts. Half a surrogate pair waits for the other."""
        text = _joined(given)
        if text.isascii() and not self._halves:
            return text
        text = self._halves.pop(name, "") + text
        if text and "\ud800" <= text[-1] <= "\udbff":
            self._halves[name] = text[-1]
            text = text[:-1]
        return _clean(text)


def _says_something(delta: Delta) -> bool:
    return bool(delta.text or delta.finish_reason or delta.reasoning or delta.tool_calls or delta.logprobs)


def merge(deltas: list[Delta]) -> list[Delta]:
    """Join deltas into one per choice."""
    merged = []
    choices: dict[int, list[Delta]] = {}
    for delta in deltas:
        choices.setdefault(delta.index, []).append(delta)
    for index, own in sorted(choices.items()):
        logprobs = [entry for delta in own for entry in delta.logprobs or ()]
        merged.append(
            Delta(
                "".join(delta.text for delta in own),
                index,
                next((delta.finish_reason for delta in reversed(own) if delta.finish_reason), None),
                logprobs or None,
                "".join(delta.reasoning for delta in own),
                [call for delta in own for call in delta.tool_calls],
                next((delta.stop_reason for delta in reversed(own) if delta.stop_reason), None),
            )
        )
    return merged


def read_tokens(answer: Any) -> list[int] | None:
    """Return the token ids of a /tokenize response of vLLM, or None if it is a different response."""
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or read_count(answer, "count") != len(tokens):
        return None
    return tokens if set(map(type, tokens)) <= {int} else None


def read_count(fields: Any, name: str) -> int | None:
    """Return the token count in a field, or None if it is missing or invalid."""
    count = fields.get(name) if isinstance(fields, dict) else None
    return count if type(count) is int and 0 <= count < _NO_COUNT else None


def read_vectors(answer: Any, inputs: list[str | list[int]]) -> tuple[list[list[float]], int | None]:
    """Return the vectors of an embedding answer, in order of `inputs`, and their tokens if the answer has them.

    Raises AttemptFailed.
    """
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        vectors = [_vector(row["embedding"]) for row in rows]
        indices = [row["index"] for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise AttemptFailed("failed", "sent something other than embeddings") from error
    if len(vectors) != len(inputs):
        raise AttemptFailed("failed", "sent a wrong number of embeddings")
    if indices != list(range(len(inputs))) or len({len(vector) for vector in vectors}) > 1:
        raise AttemptFailed("failed", "sent embeddings that don't belong to the inputs")
    told = read_count(answer.get("usage"), "prompt_tokens")
    return vectors, told if told and told <= most_tokens(inputs) else None


def _vector(embedding: Any) -> list[float]:
    if isinstance(embedding, str):  # base64 of little-endian float32
        floats = array.array("f", base64.b64decode(embedding, validate=True))
        if sys.byteorder == "big":
            floats.byteswap()
        vector = floats.tolist()
    else:
        vector = [float(value) for value in embedding]
    if not vector or not math.isfinite(sum(vector)):
        raise ValueError
    return vector


def _joined(value: Any) -> str:
    """Return a text, or the joined text parts of a list."""
    if isinstance(value, list):
        return "".join(_joined(part.get("text")) for part in value if part.get("type", "text") == "text")
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return _clean(value or "")
    raise TypeError


def _clean(text: str) -> str:
    """Return text that can be encoded: surrogate pairs joined, single surrogates replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _chat_logprobs(given: dict[str, Any]) -> list[TokenLogprob] | None:
    return [_logprob(entry) for entry in given["content"]] if given.get("content") else None


def _logprob(entry: dict[str, Any]) -> TokenLogprob:
    token = _text(entry["token"])
    top = tuple(_logprob(other) for other in entry.get("top_logprobs") or ())
    return TokenLogprob(token, _probability(entry["logprob"]), _bytes(entry.get("bytes")) or list(token.encode()), top)


def _probability(value: Any) -> float:
    """Return a log probability, or a logit, limited to what JSON can represent."""
    logprob = _LEAST_LOGPROB if value is None else float(value)
    return min(max(logprob, _LEAST_LOGPROB), -_LEAST_LOGPROB) if logprob == logprob else _LEAST_LOGPROB


def _bytes(value: Any) -> list[int] | None:
    is_right = isinstance(value, list) and all(type(byte) is int and 0 <= byte < 256 for byte in value)
    return value if is_right else None


def _bare_logprobs(given: dict[str, Any]) -> list[TokenLogprob] | None:
    """Convert the format of /v1/completions: parallel lists, and a map of the most likely alternatives."""
    tokens = given.get("tokens") or []
    tops = given.get("top_logprobs") or [None] * len(tokens)
    entries = []
    for token, logprob, top in zip(tokens, given["token_logprobs"], tops, strict=True):
        best = tuple(_logprob({"token": other, "logprob": value}) for other, value in (top or {}).items())
        text = _text(token)
        entries.append(TokenLogprob(text, _probability(logprob or 0.0), list(text.encode()), best))
    return entries or None
