"""An engine as one caller may use it: bound to a Principal and a model, limited and counted.

All generations of a request go through one Meter. Each reserves room before it starts and is settled exactly once,
however it ends: finished, failed, client gone, server draining. The ledger therefore equals the engine's counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from engine.base import (
    Delta,
    EngineError,
    EngineOverloaded,
    GenerationRequest,
    PoolingRequest,
    Prepared,
    QueuePosition,
    Request,
    Usage,
)
from engine.messages import Message
from gateway.access.account import Account, Outcome
from gateway.access.allowance import Amounts, Standing
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Ledger
from gateway.access.limits import Limits, Reservation
from gateway.access.prompt_size import takes_work
from gateway.conversations.fitting import fit, fit_first
from gateway.conversations.sessions import Session
from gateway.errors import GatewayError, InternalError, from_engine
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Tracing

_R = TypeVar("_R", GenerationRequest, PoolingRequest)


@dataclass(slots=True)
class _Progress:
    """Timing and finish reasons of one generation. Times are time.perf_counter()."""

    started: float
    first_at: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)

    @property
    def first_token_s(self) -> float | None:
        return self.first_at - self.started if self.first_at else None

    @property
    def streaming_s(self) -> float:
        return time.perf_counter() - self.first_at if self.first_at else 0.0


class Meter:
    """Limits, counts and times the generations of one request. `usage` is the sum of those that are settled."""

    def __init__(
        self,
        request_id: str,
        principal: Principal,
        model: ModelSpec,
        limits: Limits,
        ledger: Ledger,
        metrics: Metrics,
        cache_salt: str | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.request_id = request_id
        self.principal = principal
        self.model = model
        self.account = Account(request_id, principal, model, limits, ledger)
        self.tracing = tracing or Tracing()
        self.usage = Usage()
        self.first_token_at: float | None = None
        """time.perf_counter() at the first token of the request."""
        self._queue_s = 0.0
        self._finish_reason: str | None = None
        self._metrics = metrics
        self._cache_salt = cache_salt
        self._running: dict[int, Prepared] = {}
        self._reserved: dict[int, Reservation] = {}
        """Room reserved ahead, by the generation that it is for."""

    @property
    def standing(self) -> Standing | None:
        """The caller's standing with its limits when this request last learned it."""
        return self.account.standing

    def headers(self) -> dict[str, str]:
        """The X-RateLimit headers."""
        standing = self.account.standing
        return standing.headers() if standing is not None else {}

    def spent(self) -> Usage:
        """The usage so far, including that of running generations."""
        total = dataclasses.replace(self.usage)
        for prepared in self._running.values():
            total.add(prepared.usage)
        return total

    def facts(self) -> dict[str, Any]:
        """The access log's fields: sums over the request's generations, and the last finish reason."""
        usage = self.spent() if self._running else self.usage
        return {
            "model": self.model.id,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reason": self._finish_reason,
            "queue_ms": round(self._queue_s * 1000, 1),
        }

    @property
    def waiting(self) -> QueuePosition | None:
        """Position in the engine's queue, or None once any generation of this request has been admitted."""
        positions = [prepared.waiting for prepared in self._running.values()]
        return None if None in positions else next(iter(positions), None)

    async def prepare(self, request: Request, session: Session | None = None) -> Prepared:
        """Count the prompt, behind the session's history if there is one. Raises what engines raise, for clients.

        A completion without a maximum is bounded by the most that the limits could ever admit.
        """
        try:
            if isinstance(request, PoolingRequest):
                return await fit(self.model, self._marked(request, request.inputs))
            history = session.history if session is not None else ()
            return await fit(self.model, self._marked_generation(request, history), session)
        except EngineError as error:
            raise await self._refusal(error) from error

    async def prepare_first(self, requests: Iterable[GenerationRequest]) -> Prepared:
        """Prepare the first of `requests` that fits. Raises what `prepare` raises for the last one."""
        try:
            return await fit_first(self.model, map(self._marked_generation, requests))
        except EngineError as error:
            raise await self._refusal(error) from error

    def _marked_generation(
        self, request: GenerationRequest, history: Iterable[list[Message]] = ()
    ) -> GenerationRequest:
        texts = chain([request.prompt], request.messages, *history)
        return self._marked(request, texts, max_total_tokens=self.account.most_tokens)

    def _marked(self, request: _R, texts: Iterable[Any] = (), **fields: Any) -> _R:
        """The request with the fields that only the server may set. `texts` are tokenized for it."""
        account, principal = self.account, self.principal
        account.worked = account.worked or takes_work(texts)
        return dataclasses.replace(
            request, cache_salt=self._cache_salt, flow=principal.key_id, priority=principal.priority, **fields
        )

    @contextlib.asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Treat everything in the block as one request, however many generations it makes, and note how it ends.

        The first generation, or `count`, counts it. A generation that fails is no failed request unless it ends the
        block.
        """
        outcome = Outcome()
        self.account.whole = True
        self.account.open()
        try:
            yield
            outcome.aborted = False
        except GatewayError as error:
            outcome = Outcome(error, aborted=False)
            raise
        except Exception:
            outcome = Outcome(InternalError(), aborted=False)
            raise
        finally:
            self.account.whole = False
            await self.account.settle(outcome, ended=1)

    @contextlib.asynccontextmanager
    async def free(self) -> AsyncIterator[None]:
        """Count the request, unless it is counted, for an operation that costs no tokens. Note how it ends.

        Raises what `Limits.reserve` raises, and for clients what engines raise in the block.
        """
        await self.account.count()
        outcome = Outcome()
        self.account.open()
        try:
            with self._noting(outcome):
                yield
        finally:
            await self.account.settle(outcome, ended=1)

    def note_work(self) -> None:
        """Have the request count even if it is refused, because processing it is expensive."""
        self.account.worked = True

    async def count(self) -> None:
        """Count the request, unless it is counted. Called ahead of expensive work.

        Raises what `Limits.reserve` raises.
        """
        await self.account.count()

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Reserve, yield the engine's deltas, settle. Raises what `Limits.reserve` and engines raise."""
        async with (
            self._metered(prepared) as progress,
            contextlib.aclosing(self.model.engine.generate(prepared)) as deltas,
        ):
            async for delta in deltas:
                if not progress.first_at:
                    progress.first_at = time.perf_counter()
                    self.first_token_at = self.first_token_at or progress.first_at
                    self._metrics.first_token(self.model.id, progress.first_at - progress.started)
                if delta.finish_reason:
                    self._finish_reason = delta.finish_reason
                    progress.finish_reasons.append(delta.finish_reason)
                yield delta

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        """Reserve, run a pooling task, settle. Raises what `generate` raises."""
        async with self._metered(prepared):
            return await self.model.engine.pool(prepared)

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """The prompt's token ids. Costs no tokens. Raises what `generate` raises."""
        async with self.free():
            return await self.model.engine.tokenize(self._marked(request))

    async def detokenize(self, token_ids: list[int]) -> str:
        """The text of token ids. Costs no tokens. Raises what `generate` raises."""
        async with self.free():
            return await self.model.engine.detokenize(token_ids)

    @contextlib.asynccontextmanager
    async def reserved(self, several: list[Prepared]) -> AsyncIterator[None]:
        """Reserve room for several generations at once, all or none, to be generated in the block.

        Room of generations that did not begin is given back. Raises what `Limits.reserve` raises.
        """
        account = self.account
        whole = await account.reserve(_most(several))
        account.open(len(several))
        requests = whole.amounts.get("requests", 0)
        for prepared in several:
            part = {"requests": requests} | _most([prepared])
            self._reserved[id(prepared)] = dataclasses.replace(whole, amounts=part)
            requests = 0
        try:
            yield
        finally:
            left = [self._reserved.pop(id(prepared)) for prepared in several if id(prepared) in self._reserved]
            if left:
                amounts = {name: sum(part.amounts[name] for part in left) for name in left[0].amounts}
                room = dataclasses.replace(whole, amounts=amounts)
                await account.settle(Outcome(), reservation=room, ended=len(left))

    @contextlib.asynccontextmanager
    async def _metered(self, prepared: Prepared) -> AsyncIterator[_Progress]:
        prepared.recheck = self.account.check
        reservation = self._reserved.pop(id(prepared), None)
        if reservation is None:
            reservation = await self.account.reserve(_most([prepared]))
            self.account.open()
        progress, outcome = _Progress(time.perf_counter()), Outcome()
        self._running[id(prepared)] = prepared
        try:
            with self._noting(outcome), self.tracing.generation(prepared, self.model.id) as span:
                prepared.trace_headers = span.headers
                try:
                    yield progress
                finally:
                    span.generated(prepared, progress.finish_reasons, progress.first_token_s)
        finally:
            del self._running[id(prepared)]
            self._add(prepared, reservation, progress)
            await self.account.settle(outcome, prepared.usage, reservation, ended=1)

    @contextlib.contextmanager
    def _noting(self, outcome: Outcome) -> Iterator[None]:
        """Note in `outcome` how the block ends. Raises engines' errors for clients."""
        try:
            yield
            outcome.aborted = False
        except GatewayError as error:  # the caller may not use the model any more
            outcome.failure, outcome.aborted = error, False
            raise
        except EngineError as error:
            outcome.failure, outcome.aborted = from_engine(error), False
            if isinstance(error, EngineOverloaded):
                self._metrics.queue_rejected(self.model.settings.engine, error.reason)
            raise outcome.failure from error

    def _add(self, prepared: Prepared, reservation: Reservation, progress: _Progress) -> None:
        """Add a generation to the request's sums and to the metrics."""
        usage = prepared.usage
        self.usage.add(usage)
        self._queue_s += prepared.queue_s
        self._metrics.tokens(self.model.id, usage)
        self._metrics.generation(
            self.model.id,
            queue_s=prepared.queue_s,
            unused_tokens=reservation.tokens - usage.prompt_tokens - usage.completion_tokens,
            tokens=usage.completion_tokens,
            streaming_s=progress.streaming_s,
        )

    @contextlib.asynccontextmanager
    async def noting_refusal(self) -> AsyncIterator[None]:
        """Note a request that is refused in the block, ahead of its first generation. Raises for clients."""
        try:
            yield
        except (EngineError, GatewayError) as error:
            raise await self._refusal(error) from error.__cause__
        except asyncio.CancelledError:
            await self.leave()
            raise

    async def leave(self) -> None:
        """End a request that was counted, if it left before its first generation."""
        if self.account.idle:
            await self.account.settle(Outcome())

    async def _refusal(self, error: EngineError | GatewayError) -> GatewayError:
        """Note a request that is refused before it ran, and return the client's error."""
        return await self.account.refuse(from_engine(error) if isinstance(error, EngineError) else error)


def _most(several: list[Prepared]) -> Amounts:
    """The most that generations may take. Each dimension in it is limited if a limit per minute is set for it."""
    return {"tokens": sum(prepared.prompt_tokens + prepared.n * prepared.max_tokens for prepared in several)}
