"""An Engine as one caller may use it: the same protocol, bound to a Principal and a model, limited and counted.

Every generation of a request goes through one Meter, however many a workflow makes. `generate` reserves before it
starts and settles exactly once, on every way out: finished, failed, client gone, server draining. The tenet behind
it: the ledger equals the engine's own counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator

from engine.base import Delta, EngineError, GenerationRequest, Prepared, Usage
from gateway.auth import Principal
from gateway.catalog import ModelSpec
from gateway.errors import GatewayError, from_engine
from gateway.limits import Limits, Reservation, Standing, allowance_of
from gateway.metrics import Metrics
from gateway.sessions import Session, prepare_with_history
from gateway.usage import Entry, Ledger


class Meter:
    """See the module. `usage` is the sum over the request's generations so far."""

    def __init__(
        self,
        request_id: str,
        principal: Principal,
        model: ModelSpec,
        limits: Limits,
        ledger: Ledger,
        metrics: Metrics,
    ) -> None:
        self.principal = principal
        self.model = model
        self.usage = Usage()
        self.standing: Standing | None = None
        """Where the caller stands with its limits, as far as this request has seen."""
        self._request_id = request_id
        self._allowance = allowance_of(principal, model)
        self._limits = limits
        self._ledger = ledger
        self._metrics = metrics
        self._counted = False  # by the limits
        self._noted = False  # by the ledger
        self._aborted = False
        self._running = 0

    def headers(self) -> dict[str, str]:
        """Return the X-RateLimit headers."""
        return self.standing.headers() if self.standing is not None else {}

    async def prepare(self, request: GenerationRequest, session: Session | None = None) -> Prepared:
        """Count the prompt, behind the session's history if there is one. Raises what engines raise, for clients.

        A completion that names no maximum is bounded by what the limit could ever admit.
        """
        most = self._allowance.most_tokens if self._limits.enabled else None
        request = dataclasses.replace(request, max_total_tokens=most)
        engine = self.model.engine
        try:
            if session is None or not session.history:
                return await engine.prepare(request)
            return await prepare_with_history(engine.prepare, request, session, engine.max_model_len)
        except EngineError as error:
            failure = from_engine(error)
            self.standing = await self._limits.peek(self.principal, self.model)
            await self._settle_failure(failure)
            raise failure from error

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Reserve, yield the engine's deltas, settle. Raises what `Limits.reserve` and engines raise."""
        reservation = await self._reserve(prepared)
        started = time.perf_counter()
        first_at = 0.0
        failure: GatewayError | None = None
        aborted = True
        self._running += 1
        try:
            async with contextlib.aclosing(self.model.engine.generate(prepared)) as deltas:
                async for delta in deltas:
                    if not first_at:
                        first_at = time.perf_counter()
                        self._metrics.first_token(self.model.id, first_at - started)
                    yield delta
            aborted = False
        except EngineError as error:
            aborted = False
            failure = from_engine(error)
            raise failure from error
        finally:
            self._running -= 1
            streaming_s = time.perf_counter() - first_at if first_at else 0.0
            await self._settle(prepared, reservation, failure, aborted, streaming_s)

    async def _reserve(self, prepared: Prepared) -> Reservation:
        tokens = prepared.prompt_tokens + prepared.n * prepared.max_tokens
        requests = 0 if self._counted else 1
        try:
            reservation = await self._limits.reserve(
                self.principal, self.model, self._request_id, requests=requests, tokens=tokens
            )
        except GatewayError as error:
            if not error.extra_headers and self.standing is None:
                self.standing = await self._limits.peek(self.principal, self.model)
            await self._settle_failure(error)
            raise
        self._counted = True
        self.standing = reservation.standing
        return reservation

    async def _settle(
        self,
        prepared: Prepared,
        reservation: Reservation,
        failure: GatewayError | None,
        aborted: bool,
        streaming_s: float,
    ) -> None:
        usage = prepared.usage
        unused = reservation.tokens - usage.prompt_tokens - usage.completion_tokens
        self.usage.add(usage)
        self._metrics.tokens(self.model.id, usage)
        self._metrics.generation(
            self.model.id,
            queue_s=prepared.queue_s,
            unused_tokens=unused,
            tokens=usage.completion_tokens,
            streaming_s=streaming_s,
        )
        entry = self._entry(failure)
        entry.prompt_tokens = usage.prompt_tokens
        entry.cached_tokens = usage.cached_tokens
        entry.completion_tokens = usage.completion_tokens
        entry.bucket = reservation.bucket
        entry.refund = unused
        if aborted and not self._aborted:
            self._aborted = True
            entry.aborted_requests = 1
        if not self._running:
            entry.lease = self._request_id
        await self._write(entry)

    async def _settle_failure(self, failure: GatewayError) -> None:
        """Note a request that failed before it reached the engine."""
        await self._write(self._entry(failure))

    def _entry(self, failure: GatewayError | None) -> Entry:
        entry = Entry(key_id=self.principal.key_id, model_id=self.model.id, allowance=self._allowance)
        entry.requests = 0 if self._noted else 1
        self._noted = True
        if failure is not None:
            entry.error = failure.code
        return entry

    async def _write(self, entry: Entry) -> None:
        # Taken before the await: a cancellation from here on changes nothing.
        settled = self._ledger.settle(entry)
        standing = await asyncio.shield(settled)
        if standing is not None and self._limits.enabled:
            self.standing = standing
