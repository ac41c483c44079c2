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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from engine.base import (
    Delta,
    EmbeddingRequest,
    EngineError,
    EngineOverloaded,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    QueuePosition,
    Usage,
)
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Allowance, Amounts, Limits, Reservation, Standing, allowance_of
from gateway.access.prompt_size import takes_work
from gateway.conversations.sessions import Session, prepare_with_history
from gateway.errors import BadRequest, GatewayError, InternalError, RateLimitExceeded, from_engine
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Tracing

_CHECK_EVERY_S = 1.0
"""How old the last check of the caller's key may be when a generation begins."""
_NOTHING = Reservation(Standing(Allowance()), 0, {})
_Request = TypeVar("_Request", GenerationRequest, EmbeddingRequest)


@dataclass(slots=True)
class _Course:
    """How one generation goes; times are by time.perf_counter."""

    started: float
    first_at: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)

    @property
    def first_token_s(self) -> float | None:
        return self.first_at - self.started if self.first_at else None


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
        cache_salt: str | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.principal = principal
        self.model = model
        self.tracing = tracing or Tracing()
        self.usage = Usage()
        self.standing: Standing | None = None
        """Where the caller stands with its limits, as far as this request has seen."""
        self.request_id = request_id
        self.recheck: Callable[[], Awaitable[None]] | None = None
        """Raises where the caller may not use the model any more. Asked before what did not begin with the request:
        generations that waited for admission, and later ones."""
        self._checked_at = time.monotonic()
        self.first_token_at: float | None = None
        """When the first of all its tokens came, by time.perf_counter."""
        self.limited: Callable[[ModelSpec, RateLimitExceeded], None] = lambda model, error: None
        """Called when the limits refuse the request."""
        self.worked = False
        """The request is so large that it counts even if it is refused."""
        self._queue_s = 0.0
        self._finish_reason: str | None = None
        self._allowance = allowance_of(principal, model)
        self._limits = limits
        self._ledger = ledger
        self._metrics = metrics
        self._cache_salt = cache_salt
        self._counted = False  # by the limits
        self._noted = False  # by the ledger
        self._failure: GatewayError | None = None
        """The last one that the ledger has: a refusal may pass several places that note it."""
        self._leased = False
        self._aborted = False
        self._first = asyncio.Lock()
        self._whole: Prepared | None = None
        """Stands for the whole request while `counted` holds it."""
        self._running: dict[int, Prepared] = {}
        self._reserved: dict[int, Reservation] = {}
        """Room taken ahead, by the generation that it is for."""

    def headers(self) -> dict[str, str]:
        """Return the X-RateLimit headers."""
        return self.standing.headers() if self.standing is not None else {}

    def spent(self) -> Usage:
        """Return the usage so far, with that of generations that still run."""
        total = dataclasses.replace(self.usage)
        for prepared in self._running.values():
            total.add(prepared.usage)
        return total

    def facts(self) -> dict[str, Any]:
        """Return what the access log tells of the request's generations; of several, their sum and the last reason."""
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
        """Where the request stands in the engine's queue, while none of its generations is further."""
        running = (prepared for prepared in self._running.values() if prepared is not self._whole)
        positions = [prepared.waiting for prepared in running]
        return None if None in positions else next(iter(positions), None)

    async def prepare(self, request: GenerationRequest, session: Session | None = None) -> Prepared:
        """Count the prompt, behind the session's history if there is one. Raises what engines raise, for clients.

        A completion that names no maximum is bounded by what the limit could ever admit.
        """
        most = self._allowance.limit("tokens") if self._limits.enabled else None
        request = dataclasses.replace(self._marked(request), max_total_tokens=most)
        history = session.history if session is not None else []
        self.worked = self.worked or takes_work(chain([request.prompt], request.messages, *history))
        engine = self.model.engine
        try:
            request = self._capped(request)
            most_input = self.model.settings.max_input_tokens
            if most_input is None and (session is None or not session.history):
                prepared = await engine.prepare(request)
            else:
                prepared = await prepare_with_history(engine, request, session or Session(), most_input)
        except EngineError as error:
            raise await self._refusal(error) from error
        prepared.request = request
        return prepared

    async def prepare_first(self, requests: Iterable[GenerationRequest]) -> Prepared:
        """Prepare the first of `requests` that fits the context and leaves room for its answer; the last must fit.

        For prompts that can be had in several lengths, longest first. Raises what `prepare` raises of the last one.
        """
        most = self._allowance.limit("tokens") if self._limits.enabled else None
        most_input = self.model.settings.max_input_tokens
        failure: EngineError | None = None
        for request in requests:
            self.worked = self.worked or takes_work(chain([request.prompt], request.messages))
            try:
                request = self._capped(dataclasses.replace(self._marked(request), max_total_tokens=most))
                prepared = await self.model.engine.prepare(request)
            except EngineError as error:
                failure = error
                if isinstance(error, InvalidRequest) and error.code == "context_length_exceeded":
                    continue
                break
            wanted = request.max_tokens or request.default_max_tokens or 1
            leaves_room = prepared.max_tokens >= min(wanted, self.model.engine.max_model_len // 4)
            if leaves_room and (most_input is None or prepared.prompt_tokens <= most_input):
                prepared.request = request
                return prepared
            what = "The conversation leaves no room for an answer."
            failure = InvalidRequest(what, "messages", "context_length_exceeded")
        assert failure is not None
        raise await self._refusal(failure) from failure

    @contextlib.asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Hold everything in here to be one request, however many generations it makes, and note how it ends.

        The first generation, or `count`, counts it; a generation that fails without ending it is no failed request.
        """
        self._whole = whole = _free(self.request_id)
        self._running[id(whole)] = whole
        failure: GatewayError | None = None
        aborted = True
        try:
            yield
            aborted = False
        except GatewayError as error:
            aborted, failure = False, error
            raise
        except Exception:
            aborted, failure = False, InternalError("The server had an error while processing your request.")
            raise
        finally:
            self._whole = None
            del self._running[id(whole)]
            await self._settle(whole, _NOTHING, failure, aborted, 0.0)

    def note_work(self) -> None:
        """Have the request count even if it is refused: there is work ahead."""
        self.worked = True

    async def count(self) -> None:
        """Count the request, if no generation has yet: before it does anything else that costs somebody.

        Raises what `Limits.reserve` raises.
        """
        if not self._counted:
            await self._reserve([_free(self.request_id)])

    def _capped(self, request: GenerationRequest) -> GenerationRequest:
        """Hold the completion to the model's maximum. Raises InvalidRequest when the client asks for more."""
        most = self.model.settings.max_output_tokens
        if most is None:
            return request
        if request.max_tokens is not None and request.max_tokens > most:
            raise InvalidRequest(
                f"{request.max_tokens_param} is too large: {request.max_tokens}. This model supports at most {most} "
                f"completion tokens, whereas you provided {request.max_tokens}.",
                request.max_tokens_param,
                "invalid_value",
            )
        return dataclasses.replace(request, default_max_tokens=min(request.default_max_tokens or most, most))

    def _marked(self, request: _Request) -> _Request:
        """Return the request with what only the server may decide."""
        principal = self.principal
        return dataclasses.replace(
            request, cache_salt=self._cache_salt, flow=principal.key_id, priority=principal.priority
        )

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Reserve, yield the engine's deltas, settle. Raises what `Limits.reserve` and engines raise."""
        async with (
            self._metered(prepared) as course,
            contextlib.aclosing(self.model.engine.generate(prepared)) as deltas,
        ):
            async for delta in deltas:
                if not course.first_at:
                    course.first_at = time.perf_counter()
                    self.first_token_at = self.first_token_at or course.first_at
                    self._metrics.first_token(self.model.id, course.first_at - course.started)
                if delta.finish_reason:
                    self._finish_reason = delta.finish_reason
                    course.finish_reasons.append(delta.finish_reason)
                yield delta

    @contextlib.asynccontextmanager
    async def reserved(self, several: list[Prepared]) -> AsyncIterator[None]:
        """Take room for several generations at once, all or none, to be generated in here.

        What was not generated is given back. Raises what `Limits.reserve` raises.
        """
        whole = await self._reserve(several)
        requests = whole.amounts.get("requests", 0)
        for prepared in several:
            self._reserved[id(prepared)] = dataclasses.replace(whole, amounts=_wanted(requests, [prepared]))
            requests = 0
        try:
            yield
        finally:
            left = [self._reserved.pop(id(prepared)) for prepared in several if id(prepared) in self._reserved]
            if left:
                amounts = {name: sum(one.amounts[name] for one in left) for name in left[0].amounts}
                room = dataclasses.replace(whole, amounts=amounts)
                await self._settle(_free(self.request_id), room, None, True, 0.0)

    async def prepare_embedding(self, request: EmbeddingRequest) -> Prepared:
        """Count the inputs. Raises what engines raise, for clients."""
        self.worked = self.worked or takes_work(request.inputs)
        try:
            prepared = await self.model.engine.prepare(self._marked(request))
        except EngineError as error:
            raise await self._refusal(error) from error
        prepared.request = request
        return prepared

    async def embed(self, prepared: Prepared) -> list[list[float]]:
        """Reserve, embed, settle. Raises what `generate` raises."""
        async with self._metered(prepared):
            return await self.model.engine.embed(prepared)

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the prompt's token ids: a request that costs no tokens. Raises what `generate` raises."""
        async with self._metered(_free(self.request_id)):
            return await self.model.engine.tokenize(self._marked(request))

    async def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of token ids: a request that costs no tokens. Raises what `generate` raises."""
        async with self._metered(_free(self.request_id)):
            return await self.model.engine.detokenize(token_ids)

    @contextlib.asynccontextmanager
    async def _metered(self, prepared: Prepared) -> AsyncIterator[_Course]:
        prepared.recheck = self._check
        reservation = self._reserved.pop(id(prepared), None) or await self._reserve([prepared])
        course = _Course(time.perf_counter())
        failure: GatewayError | None = None
        aborted = True
        self._running[id(prepared)] = prepared
        try:
            with self.tracing.generation(prepared, self.model.id) as span:
                prepared.trace_headers = span.headers
                try:
                    yield course
                finally:
                    span.generated(prepared, course.finish_reasons, course.first_token_s)
            aborted = False
        except GatewayError as error:  # the caller may not use the model any more
            aborted, failure = False, error
            raise
        except EngineError as error:
            aborted = False
            failure = from_engine(error)
            if isinstance(error, EngineOverloaded):
                self._metrics.queue_rejected(self.model.settings.engine, error.reason)
            raise failure from error
        finally:
            del self._running[id(prepared)]
            streaming_s = time.perf_counter() - course.first_at if course.first_at else 0.0
            await self._settle(prepared, reservation, failure, aborted, streaming_s)

    async def _check(self) -> None:
        if self.recheck is not None:
            await self.recheck()
            self._checked_at = time.monotonic()

    async def _reserve(self, several: list[Prepared]) -> Reservation:
        if self._counted:
            return await self._take(_wanted(0, several))
        async with self._first:  # of several at once, one counts the request
            return await self._take(_wanted(0 if self._counted else 1, several))

    async def _take(self, wanted: Amounts) -> Reservation:
        try:
            if time.monotonic() - self._checked_at >= _CHECK_EVERY_S:
                await self._check()
            reservation = await self._limits.reserve(
                self.principal, self.model, self.request_id, wanted, left=self._give_back
            )
        except GatewayError as error:
            if isinstance(error, RateLimitExceeded):
                self.limited(self.model, error)
            elif isinstance(error, BadRequest) and self.worked:
                error = await self._paid(error)
            elif not error.extra_headers and self.standing is None:
                self.standing = await self._limits.peek(self.principal, self.model)
            await self._settle_failure(error)
            raise error
        self._counted = self._leased = True
        self.standing = reservation.standing
        return reservation

    def _give_back(self, reservation: Reservation) -> None:
        """Settle room that was taken for a generation whose caller had left by then, or was refused without it."""
        if reservation.refused:
            entry = Entry(key_id=self.principal.key_id, model_id=self.model.id, allowance=self._allowance)
            self._release(reservation, entry)
        else:
            self._counted = True
            entry = self._entry(None)
            self._release(reservation, entry)
            self._close(entry, aborted=True)
        self._ledger.settle(entry)

    def _release(self, reservation: Reservation, entry: Entry) -> None:
        """Give back with `entry`, which holds what was spent, what a reservation held beyond that."""
        entry.bucket = reservation.bucket
        entry.reserved = reservation.amounts
        entry.counted = {} if reservation.refused else reservation.amounts | {"tokens": entry.spent}
        if reservation.id:
            released = self._limits.release(reservation, entry.counted)
            entry.reservation, entry.second = reservation.id, reservation.second
            entry.uncertain, entry.pending = released.uncertain, released.pending

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
        self._queue_s += prepared.queue_s
        self._metrics.tokens(self.model.id, usage)
        if reservation.tokens:
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
        self._release(reservation, entry)
        self._close(entry, aborted=aborted)
        await self._write(entry)

    def _close(self, entry: Entry, *, aborted: bool) -> None:
        """Note in `entry` what ends with it: the request, if it was aborted, and its lease, if nothing else runs."""
        if aborted and not self._aborted and self._whole is None:
            self._aborted = True
            entry.aborted_requests = 1
        if not self._running and not self._reserved:
            entry.lease = self.request_id
            self._leased = False
            self._limits.end(self.request_id)

    @contextlib.asynccontextmanager
    async def noting_refusal(self) -> AsyncIterator[None]:
        """Note a request that is refused in here, ahead of its first generation. Raises for clients."""
        try:
            yield
        except (EngineError, GatewayError) as error:
            raise await self._refusal(error) from error.__cause__
        except asyncio.CancelledError:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Give back the place of a request that was counted, if it ended before its first generation."""
        if self._leased and not self._running:
            await self._settle(_free(self.request_id), _NOTHING, None, True, 0.0)

    async def _refusal(self, error: EngineError | GatewayError) -> GatewayError:
        """Note a request that was refused before it ran, and return what the client is told."""
        failure = from_engine(error) if isinstance(error, EngineError) else error
        if self.worked and isinstance(failure, BadRequest):
            failure = await self._paid(failure)
        else:
            self.standing = await self._limits.peek(self.principal, self.model)
        await self._settle_failure(failure)
        return failure

    async def charge(self, failure: GatewayError) -> None:
        """Count and note a request that was refused after some work. Raises RateLimitExceeded in its place."""
        failure = await self._paid(failure)
        await self._settle_failure(failure)
        if isinstance(failure, RateLimitExceeded):
            raise failure

    async def _paid(self, failure: GatewayError) -> GatewayError:
        """Count a request that is to be refused, if it is not counted. Returns what its client is told: where the
        limits have no room even for that, RateLimitExceeded or Unavailable."""
        if self._counted:
            return failure
        try:
            reservation = await self._limits.reserve(
                self.principal, self.model, self.request_id, {"requests": 1}, left=self._give_back
            )
        except GatewayError as error:
            if isinstance(error, RateLimitExceeded):
                self.limited(self.model, error)
            return error
        self._counted = self._leased = True
        self.standing = reservation.standing
        return failure

    async def _settle_failure(self, failure: GatewayError) -> None:
        """Note a request that failed before it reached the engine."""
        if self._whole is None:
            entry = self._entry(failure)
            self._close(entry, aborted=False)
            await self._write(entry)

    def _entry(self, failure: GatewayError | None) -> Entry:
        entry = Entry(key_id=self.principal.key_id, model_id=self.model.id, allowance=self._allowance)
        entry.requests = 0 if self._noted else 1
        self._noted = True
        if failure is not None and self._whole is None and failure is not self._failure:
            entry.error = failure.code
            self._failure = failure
        return entry

    async def _write(self, entry: Entry) -> None:
        # Taken before the await: a cancellation from here on changes nothing.
        standing = await self._ledger.settle(entry)
        if standing is not None and self._limits.enabled:
            self.standing = standing


def _wanted(requests: int, several: list[Prepared]) -> Amounts:
    """What generations may take at most. Every limit per minute whose dimension is in it is enforced."""
    return {
        "requests": requests,
        "tokens": sum(prepared.prompt_tokens + prepared.n * prepared.max_tokens for prepared in several),
    }


def _free(request_id: str) -> Prepared:
    return Prepared(request_id=request_id, prompt_tokens=0, max_tokens=0)
