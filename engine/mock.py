"""A deterministic engine without a model: for tests, front-end benchmarks and trying configurations.

One word is one token. The reply to a request is a pure function of it, speed is a number, and faults are scripted
per generation. Embeddings are words hashed into buckets. It keeps the same books as vLLM (prompt tokens count once
the prompt is processed, tokens as they are made), so that accounting can be checked against it. Does not
handle sampling: temperature and the like change nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, TypeVar

from engine.base import (
    Delta,
    EngineDied,
    EngineError,
    EngineUnavailable,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    PoolingRequest,
    Prepared,
    Request,
    Task,
    TaskEngine,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    resolve_max_tokens,
)
from engine.messages import Message, texts_of

T = TypeVar("T")

_DIMENSIONS = 64
_MAX_ECHO = 262_144
"""Characters, or token ids."""
_PIECE_CHARS = 65_536
_LONG_CHARS = 262_144
"""Longer prompts are counted in a thread."""
_KEPT_REQUESTS = 1000
_YIELD_EVERY = 16  # tokens between two turns of the event loop when the speed is unlimited


@dataclass(frozen=True, slots=True)
class Fault:
    """Scripted failure of one generation, before token number `at_token` (0 is the first)."""

    at_token: int = 0
    error: EngineError | None = None
    """Error to raise; None hangs until the generation is aborted or the engine is killed."""


def _text(message: Message) -> str:
    return " ".join(texts_of(message))


def echo(request: GenerationRequest) -> str:
    """Return a reply that repeats the last message, or the prompt."""
    if request.messages:
        said = _text(request.messages[-1])
    elif isinstance(request.prompt, list):
        said = " ".join(_words_of_ids(request.prompt[:_MAX_ECHO]))
    else:
        said = request.prompt or ""
    return f"You said: {said[:_MAX_ECHO]}"


class MockEngine(TaskEngine):
    """An `Engine` whose tokens are words. `start` can be called again after `kill` or `close`."""

    tasks: ClassVar[tuple[Task, ...]] = ("generate", "embed")

    def __init__(
        self,
        *,
        reply: str | Callable[[GenerationRequest], str | list[Delta]] = echo,
        max_model_len: int = 1024,
        max_num_seqs: int | None = None,
        takes_images: bool = False,
        first_token_s: float = 0.0,
        token_s: float = 0.0,
        start_s: float = 0.0,
    ) -> None:
        """`reply` is the reply or a function of the request; the `_s` arguments are delays in seconds.

        A reply as deltas of one token each scripts reasoning and tool calls; the last one has the finish reason.
        """
        self._reply = reply
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.takes_images = takes_images
        self._vocabulary: list[str] = []  # words in the order they were first tokenized; the index is the token id
        self._ids: dict[str, int] = {}
        self._new_word = threading.Lock()
        self._first_token_s = first_token_s
        self._token_s = token_s
        self._start_s = start_s
        self._dead = asyncio.Event()
        self._frozen = False
        self.started = False
        self.faults: deque[Fault] = deque()
        """Consumed one per generation, in order."""
        self.requests: list[GenerationRequest] = []
        """The latest prepared requests, for tests."""
        self.counters = Usage()
        """Totals over all generations, like vLLM's Prometheus counters."""
        self.unfinished_requests = 0
        self.cpu_time: float | None = None
        """Result of `cpu_time_s`. None as for an engine without processes."""

    async def start(self) -> None:
        await asyncio.sleep(self._start_s)
        self._dead = asyncio.Event()  # a new one: generations of the old life must still see their death
        self._frozen = False
        self.started = True

    async def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        """Simulate a crash: running generations raise EngineDied, new ones EngineUnavailable."""
        self.started = False
        self._dead.set()

    def freeze(self) -> None:
        """Simulate a hang: stop responding without a crash."""
        self._frozen = True

    def cpu_time_s(self) -> float | None:
        return self.cpu_time

    async def check_health(self) -> None:
        if self._frozen:
            await self._dead.wait()
        if not self.started:
            raise EngineUnavailable()

    async def _prepare(self, request: Request) -> Prepared:
        if not self.started:
            raise EngineUnavailable()
        if isinstance(request, PoolingRequest):
            return await self._prepare_pooling(request)
        self.requests.append(request)
        del self.requests[: -1 if _is_long(request) else -_KEPT_REQUESTS]
        prompt_tokens = await _beside(request, lambda: _count(request))
        max_tokens = resolve_max_tokens(request, prompt_tokens, self.max_model_len)
        reply = self._reply if isinstance(self._reply, str) else self._reply(request)
        words = reply.split() if isinstance(reply, str) else reply
        return Prepared(
            request_id=request.request_id,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            n=request.n,
            payload=(request, words),
        )

    async def _prepare_pooling(self, request: PoolingRequest) -> Prepared:
        texts = [text if isinstance(text, str) else await self.detokenize(text) for text in request.inputs]
        tokens = await asyncio.to_thread(lambda: sum(map(_count_words, texts)))
        payload = (texts, getattr(request, "dimensions", None) or _DIMENSIONS)
        return Prepared(request_id=request.request_id, prompt_tokens=tokens, max_tokens=0, payload=payload)

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        texts, dimensions = prepared.payload
        self.unfinished_requests += 1
        try:
            await self._pause(self._first_token_s, self._dead)
        finally:
            self.unfinished_requests -= 1
        prepared.usage.prompt_tokens = prepared.prompt_tokens
        self.counters.prompt_tokens += prepared.prompt_tokens
        return await asyncio.to_thread(lambda: [_vector(text, dimensions) for text in texts])

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        if not self.started:
            raise EngineUnavailable()
        return await _beside(request, lambda: [self._id(word) for word in _prompt_words(request)])

    def _id(self, word: str) -> int:
        token_id = self._ids.get(word)
        if token_id is None:
            with self._new_word:
                token_id = self._ids.setdefault(word, len(self._vocabulary))
                if token_id == len(self._vocabulary):
                    self._vocabulary.append(word)
        return token_id

    async def detokenize(self, token_ids: list[int]) -> str:
        try:
            return " ".join(self._vocabulary[token_id] for token_id in token_ids)
        except IndexError:
            raise InvalidRequest("A token id is not in the vocabulary.", "tokens") from None

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        request, words = prepared.payload
        fault = self.faults.popleft() if self.faults else None
        dead = self._dead
        self.unfinished_requests += 1
        try:
            await self._pause(self._first_token_s, dead)
            for index in range(prepared.n):
                whole: list[Delta] = []
                for number, delta in enumerate(_deltas(words, prepared.max_tokens, request)):
                    if fault is not None and number == fault.at_token:
                        await _fail(fault, dead)
                    if number and (self._token_s or number % _YIELD_EVERY == 0 or self._frozen):
                        await self._pause(self._token_s, dead)
                    self._count(prepared, delta)
                    delta = replace(delta, index=index)
                    if request.stream:
                        yield delta
                        continue
                    whole.append(delta)
                    if delta.finish_reason:
                        yield _merged(whole)
        finally:
            self.unfinished_requests -= 1

    async def _pause(self, seconds: float, dead: asyncio.Event) -> None:
        await asyncio.sleep(seconds)
        if self._frozen:
            await dead.wait()
        if dead.is_set():
            raise EngineDied()

    def _count(self, prepared: Prepared, delta: Delta) -> None:
        if not prepared.usage.prompt_tokens:
            prepared.usage.prompt_tokens = prepared.prompt_tokens
            self.counters.prompt_tokens += prepared.prompt_tokens
        prepared.usage.completion_tokens += 1
        prepared.usage.reasoning_tokens += bool(delta.reasoning)
        self.counters.completion_tokens += 1


async def _beside(request: GenerationRequest, work: Callable[[], T]) -> T:
    """Run `work`, in a thread if the prompt is long."""
    return await asyncio.to_thread(work) if _is_long(request) else work()


def _is_long(request: GenerationRequest) -> bool:
    if request.prompt is not None:
        return len(request.prompt) > _LONG_CHARS
    return sum(len(_text(message)) for message in request.messages) > _LONG_CHARS


def _prompt_words(request: GenerationRequest) -> Iterator[str]:
    """Yield the prompt as tokens: each message's role, then its words."""
    if request.prompt is None:
        for message in request.messages:
            yield f"<{message['role']}>"
            yield from _words(_text(message))
    elif isinstance(request.prompt, str):
        yield from _words(request.prompt)
    else:
        yield from _words_of_ids(request.prompt)


def _words_of_ids(token_ids: list[int]) -> Iterator[str]:
    return (f"<{token_id}>" for token_id in token_ids)


def _count(request: GenerationRequest) -> int:
    """Count the tokens that `_prompt_words` yields."""
    if request.prompt is None:
        return sum(1 + _count_words(_text(message)) for message in request.messages)
    return _count_words(request.prompt) if isinstance(request.prompt, str) else len(request.prompt)


def _count_words(text: str) -> int:
    return sum(map(len, _word_lists(text)))


def _words(text: str) -> Iterator[str]:
    return chain.from_iterable(_word_lists(text))


def _word_lists(text: str) -> Iterator[list[str]]:
    """Yield the words of a text, some at a time: all of them at once would take many times its size."""
    begun: list[str] = []  # of a word that continues in the next piece
    for start in range(0, len(text), _PIECE_CHARS):
        piece = text[start : start + _PIECE_CHARS]
        goes_on = start + _PIECE_CHARS < len(text) and not piece[-1].isspace()
        words = piece.split()
        if begun and piece[0].isspace():
            words.insert(0, "".join(begun))
            begun = []
        elif begun and len(words) == 1 and goes_on:
            begun.append(words.pop())
        elif begun:
            words[0] = "".join([*begun, words[0]])
            begun = []
        if words and goes_on:
            begun = [words.pop()]
        yield words


def _vector(text: str, dimensions: int) -> list[float]:
    """Return a unit vector: words hashed into buckets, so that texts with common words have similar vectors."""
    vector = [0.0] * dimensions
    for word in text.lower().split() or [""]:
        vector[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % dimensions] += 1.0
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


async def _fail(fault: Fault, dead: asyncio.Event) -> None:
    if fault.error is not None:
        raise fault.error
    await dead.wait()
    raise EngineDied()


def _deltas(reply: Sequence[str | Delta], max_tokens: int, request: GenerationRequest) -> list[Delta]:
    """Return one delta per token, at most `max_tokens`; every word but the first starts with a space."""
    chosen = list(itertools.islice(itertools.cycle(reply) if request.ignore_eos and reply else reply, max_tokens))
    deltas = [
        one if isinstance(one, Delta) else Delta(f" {one}" if number else one) for number, one in enumerate(chosen)
    ] or [Delta("")]
    if request.logprobs:
        deltas = [replace(one, logprobs=[TokenLogprob(one.text, 0.0, list(one.text.encode()))]) for one in deltas]
    last: FinishReason = "length" if request.ignore_eos or len(reply) > max_tokens else "stop"
    deltas[-1] = replace(deltas[-1], finish_reason=deltas[-1].finish_reason or last)
    return deltas


def _merged(deltas: list[Delta]) -> Delta:
    """Join the deltas of one choice, with complete tool calls."""
    calls: dict[int, ToolCallDelta] = {}
    for call in (call for delta in deltas for call in delta.tool_calls):
        known = calls.get(call.index, ToolCallDelta(call.index))
        calls[call.index] = ToolCallDelta(
            call.index, known.id or call.id, known.name or call.name, known.arguments + call.arguments
        )
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        tool_calls=tuple(calls.values()),
        logprobs=logprobs if deltas[-1].logprobs is not None else None,
    )
