"""A deterministic engine without a model: for tests, front-end benchmarks and trying configurations.

One word is one token. The reply to a request is a pure function of it, speed is a number, and faults are scripted
per generation. It keeps the same books as vLLM (prompt tokens count once the prompt is processed, tokens as they are
made), so that accounting can be checked against it. Leaves out sampling: temperature and the like change nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from engine.base import (
    Delta,
    EngineDied,
    EngineError,
    EngineUnavailable,
    FinishReason,
    GenerationRequest,
    Prepared,
    TokenLogprob,
    Usage,
    resolve_max_tokens,
)

_YIELD_EVERY = 16  # tokens between two turns of the event loop when the speed is unlimited


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in one generation, before token number `at_token` (0 is the first)."""

    at_token: int = 0
    error: EngineError | None = None
    """Raised; None hangs instead, until the generation is aborted or the engine killed."""


def _text(message: dict[str, object]) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content)
    return str(content)


def echo(request: GenerationRequest) -> str:
    """Reply with what the last message says."""
    return f"You said: {_text(request.messages[-1])}"


class MockEngine:
    """An `Engine` that makes words. `start` can be called again after `kill` or `close`."""

    def __init__(
        self,
        *,
        reply: str | Callable[[GenerationRequest], str] = echo,
        max_model_len: int = 1024,
        first_token_s: float = 0.0,
        token_s: float = 0.0,
        start_s: float = 0.0,
    ) -> None:
        """`reply` is the answer or a function of the request; the `_s` arguments are seconds to wait."""
        self._reply = reply
        self.max_model_len = max_model_len
        self._first_token_s = first_token_s
        self._token_s = token_s
        self._start_s = start_s
        self._dead = asyncio.Event()
        self._frozen = False
        self.started = False
        self.faults: deque[Fault] = deque()
        """Consumed one per generation, in order."""
        self.requests: list[GenerationRequest] = []
        """Everything that was prepared, for tests to look at."""
        self.counters = Usage()
        """Totals over all generations, as vLLM's Prometheus counters would have them."""
        self.unfinished_requests = 0

    async def start(self) -> None:
        await asyncio.sleep(self._start_s)
        self._dead = asyncio.Event()  # a new one: generations of the old life must still see their death
        self._frozen = False
        self.started = True

    async def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        """Die: running generations raise EngineDied, new ones EngineUnavailable."""
        self.started = False
        self._dead.set()

    def freeze(self) -> None:
        """Stop answering without dying."""
        self._frozen = True

    async def check_health(self) -> None:
        if self._frozen:
            await self._dead.wait()
        if not self.started:
            raise EngineUnavailable("The engine is not running.")

    async def prepare(self, request: GenerationRequest) -> Prepared:
        if not self.started:
            raise EngineUnavailable("The engine is not running.")
        self.requests.append(request)
        prompt_tokens = sum(len(_text(message).split()) + 1 for message in request.messages)
        max_tokens = resolve_max_tokens(request, prompt_tokens, self.max_model_len)
        words = (self._reply if isinstance(self._reply, str) else self._reply(request)).split()
        return Prepared(
            request_id=request.request_id,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            n=request.n,
            payload=(request, words),
        )

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        request, words = prepared.payload
        fault = self.faults.popleft() if self.faults else None
        dead = self._dead
        self.unfinished_requests += 1
        try:
            await self._pause(self._first_token_s, dead)
            for index in range(prepared.n):
                pieces = _pieces(words, prepared.max_tokens, request.ignore_eos)
                whole: list[str] = []
                for number, (piece, finish_reason) in enumerate(pieces):
                    if fault is not None and number == fault.at_token:
                        await _fail(fault, dead)
                    if number and (self._token_s or number % _YIELD_EVERY == 0 or self._frozen):
                        await self._pause(self._token_s, dead)
                    self._count(prepared)
                    if request.stream:
                        yield Delta(piece, index, finish_reason, _logprobs([piece], request))
                        continue
                    whole.append(piece)
                    if finish_reason:
                        yield Delta("".join(whole), index, finish_reason, _logprobs(whole, request))
        finally:
            self.unfinished_requests -= 1

    async def _pause(self, seconds: float, dead: asyncio.Event) -> None:
        await asyncio.sleep(seconds)
        if self._frozen:
            await dead.wait()
        if dead.is_set():
            raise EngineDied("The engine failed during generation.")

    def _count(self, prepared: Prepared) -> None:
        if not prepared.usage.prompt_tokens:
            prepared.usage.prompt_tokens = prepared.prompt_tokens
            self.counters.prompt_tokens += prepared.prompt_tokens
        prepared.usage.completion_tokens += 1
        self.counters.completion_tokens += 1


async def _fail(fault: Fault, dead: asyncio.Event) -> None:
    if fault.error is not None:
        raise fault.error
    await dead.wait()
    raise EngineDied("The engine failed during generation.")


def _pieces(words: list[str], max_tokens: int, ignore_eos: bool) -> list[tuple[str, FinishReason | None]]:
    """Return (text, finish_reason) per token; all but the first word carry the space in front of them."""
    chosen = list(itertools.islice(itertools.cycle(words) if ignore_eos else words, max_tokens)) or [""]
    last: FinishReason = "length" if ignore_eos or len(words) > max_tokens else "stop"
    texts = [chosen[0], *(f" {word}" for word in chosen[1:])]
    return [(text, last if number == len(texts) else None) for number, text in enumerate(texts, 1)]


def _logprobs(pieces: list[str], request: GenerationRequest) -> list[TokenLogprob] | None:
    if not request.logprobs:
        return None
    return [TokenLogprob(piece, 0.0, list(piece.encode())) for piece in pieces]
