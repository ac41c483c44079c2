"""One request's account: room reserved with the limits, and entries in the ledger.

A request is counted once, whatever it does. Everything that was opened is settled once, and the last settlement ends
the request's lease. Raises what `Limits.reserve` and `recheck` raise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from engine.base import Usage
from gateway.access.allowance import Amounts, Standing, allowance_of
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Limits, Reservation
from gateway.errors import BadRequest, GatewayError, RateLimitExceeded

_CHECK_EVERY_S = 1.0
"""How old the last check of the caller's key may be when something is reserved."""


@dataclass(slots=True)
class Outcome:
    """How an operation ended: with an error, aborted, or well."""

    failure: GatewayError | None = None
    aborted: bool = True


class Account:
    """What one request has reserved and spent."""

    def __init__(self, request_id: str, principal: Principal, model: ModelSpec, limits: Limits, ledger: Ledger) -> None:
        self.standing: Standing | None = None
        """The caller's standing with its limits when this request last learned it."""
        self.recheck: Callable[[], Awaitable[None]] | None = None
        """Raises if the caller may not use the model any more. Called before operations that did not begin with the
        request."""
        self.limited: Callable[[ModelSpec, RateLimitExceeded], None] = lambda model, error: None
        """Called when the limits refuse the request."""
        self.worked = False
        """Whether the request counts even if it is refused, because processing it is expensive."""
        self.whole = False
        """Whether the request's end is noted as a whole, so that operations note neither failures nor aborts."""
        self.allowance = allowance_of(principal, model)
        self._request_id = request_id
        self._principal = principal
        self._model = model
        self._limits = limits
        self._ledger = ledger
        self._checked_at = time.monotonic()
        self._counted = False  # by the limits
        self._noted = False  # by the ledger
        self._failure: GatewayError | None = None
        """The last one in the ledger. A refusal may pass several places that note it."""
        self._aborted = False
        self._leased = False
        self._open = 0
        self._first = asyncio.Lock()

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the largest generation that the limits could ever admit, None for no limit."""
        return self.allowance.most().get("tokens") if self._limits.enabled else None

    def open(self, operations: int = 1) -> None:
        """Keep the request's lease until as many operations have ended, see `settle`."""
        self._open += operations

    @property
    def idle(self) -> bool:
        """Whether the request has a lease, and nothing that will end it."""
        return self._leased and not self._open

    async def check(self) -> None:
        """Raise if the caller may not use the model any more."""
        if self.recheck is not None:
            await self.recheck()
            self._checked_at = time.monotonic()

    async def count(self) -> None:
        """Count the request, unless it is counted."""
        if not self._counted:
            await self.reserve({})

    async def reserve(self, amounts: Amounts) -> Reservation:
        """Reserve `amounts`, and count the request if it is not counted."""
        if self._counted:
            return await self._reserve({"requests": 0} | amounts)
        async with self._first:  # of several at once, one counts the request
            return await self._reserve({"requests": 0 if self._counted else 1} | amounts)

    async def _reserve(self, wanted: Amounts) -> Reservation:
        try:
            if time.monotonic() - self._checked_at >= _CHECK_EVERY_S:
                await self.check()
            return await self._take(wanted)
        except GatewayError as error:
            if isinstance(error, BadRequest) and self.worked:
                error = await self._pay(error)
            elif not isinstance(error, RateLimitExceeded) and not error.extra_headers and self.standing is None:
                self.standing = await self._limits.peek(self._principal, self._model)
            await self._note_failure(error)
            raise error

    async def _take(self, wanted: Amounts) -> Reservation:
        try:
            reservation = await self._limits.reserve(
                self._principal,
                self._model,
                self._request_id,
                wanted,
                left=self._give_back,
                allowance=self.allowance,
            )
        except RateLimitExceeded as error:
            self.limited(self._model, error)
            raise
        self._counted = self._leased = True
        self.standing = reservation.standing
        return reservation

    async def refuse(self, failure: GatewayError) -> GatewayError:
        """Note a request that is refused before it ran, and return the client's error."""
        if self.worked and isinstance(failure, BadRequest):
            failure = await self._pay(failure)
        else:
            self.standing = await self._limits.peek(self._principal, self._model)
        await self._note_failure(failure)
        return failure

    async def charge(self, failure: GatewayError) -> None:
        """Count and note a request that is refused after some work. Raises RateLimitExceeded in place of `failure`."""
        failure = await self._pay(failure)
        await self._note_failure(failure)
        if isinstance(failure, RateLimitExceeded):
            raise failure

    async def _pay(self, failure: GatewayError) -> GatewayError:
        """Count a request that is to be refused, unless it is counted. Returns the client's error, which is
        RateLimitExceeded or Unavailable if the limits have no room even for that."""
        if not self._counted:
            try:
                await self._take({"requests": 1})
            except GatewayError as error:
                return error
        return failure

    async def _note_failure(self, failure: GatewayError) -> None:
        if not self.whole:
            await self.settle(Outcome(failure, aborted=False))

    async def settle(
        self,
        outcome: Outcome,
        usage: Usage | None = None,
        reservation: Reservation | None = None,
        *,
        ended: int = 0,
    ) -> None:
        """Write `usage` to the ledger, and give back what a reservation holds beyond it. `ended` operations end."""
        self._open -= ended
        entry = self._entry(outcome.failure)
        if usage is not None:
            entry.prompt_tokens = usage.prompt_tokens
            entry.cached_tokens = usage.cached_tokens
            entry.completion_tokens = usage.completion_tokens
        if reservation is not None:
            self._release(reservation, entry, ran=usage is not None)
        self._close(entry, aborted=outcome.aborted)
        # The ledger has the entry before the await: a cancellation from here on changes nothing.
        standing = await self._ledger.settle(entry)
        if standing is not None and self._limits.enabled:
            self.standing = standing

    def _give_back(self, reservation: Reservation) -> None:
        """Settle room that was reserved for a caller who has left, or was refused by this process."""
        if reservation.refused:
            entry = self._empty_entry()
            self._release(reservation, entry, ran=False)
        else:
            self._counted = True
            entry = self._entry(None)
            self._release(reservation, entry, ran=False)
            self._close(entry, aborted=True)
        self._ledger.settle(entry)

    def _empty_entry(self) -> Entry:
        return Entry(key_id=self._principal.key_id, model_id=self._model.id, allowance=self.allowance)

    def _entry(self, failure: GatewayError | None) -> Entry:
        entry = self._empty_entry()
        entry.requests = 0 if self._noted else 1
        self._noted = True
        if failure is not None and not self.whole and failure is not self._failure:
            entry.error = failure.code
            self._failure = failure
        return entry

    def _release(self, reservation: Reservation, entry: Entry, *, ran: bool) -> None:
        """Give back with `entry`, which holds what was spent, what a reservation held beyond that.

        Of a generation that did not run only the request counts.
        """
        amounts = reservation.amounts
        entry.bucket = reservation.bucket
        entry.reserved = amounts
        if ran:
            entry.counted = amounts | {"tokens": entry.spent}
        elif not reservation.refused:
            entry.counted = {"requests": amounts.get("requests", 0)}
        if reservation.id:
            released = self._limits.release(reservation, entry.counted)
            entry.reservation, entry.second = reservation.id, reservation.second
            entry.uncertain, entry.pending = released.uncertain, released.pending

    def _close(self, entry: Entry, *, aborted: bool) -> None:
        """Note in `entry` what ends with it: the request, if it was aborted, and its lease, if nothing else is open."""
        if aborted and not self._aborted and not self.whole:
            self._aborted = True
            entry.aborted_requests = 1
        if not self._open:
            entry.lease = self._request_id
            self._leased = False
            self._limits.end(self._request_id)
