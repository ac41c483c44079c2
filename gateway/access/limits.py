"""Limits per API key and model: room is reserved before a generation, and unused room is given back after it.

The promise: in any 60 s, over any number of gateways, never more requests or tokens than the limit. A reservation is
the exact prompt plus the most the completion may take, so concurrent requests can't slip past. The arithmetic is in
lua/window.lua and lua/reservation.lua and runs inside the store. While the store is away each process enforces a share
of every limit, beginning with what it saw of the store last, or nothing is let in, as configured.

Every reservation has an id, under which the store keeps it until it is settled. The store refuses one that arrives
after its gateway gave up waiting, and charges what was spent without it when it is settled. Raises RateLimitExceeded,
BadRequest (could never fit) and Unavailable.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.access.allowance import (
    DIMENSIONS,
    Allowance,
    Amounts,
    Standing,
    allowance_of,
    day_number,
    encoded,
    encoded_limits,
    limit_keys,
    standing_of,
)
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.leases import Held, Leases
from gateway.access.local_limits import LocalLimits
from gateway.errors import (
    BadRequest,
    GatewayError,
    RateLimitExceeded,
    StoreUnavailable,
    Unavailable,
    WritesRefused,
    from_store,
)
from gateway.settings.config import LimiterSettings
from gateway.store.client import Store
from gateway.store.script import Script
from gateway.telemetry.metrics import Metrics

LEASE_S = 120
"""What a gateway that is gone had under way stops counting after this; a gateway that lives renews it. Longer than a
window, so that only a day's budget has anything to be given back."""
_LATE_S = 1.0
"""A reservation is refused this long after its gateway stopped waiting for it: as much as their clocks may differ from
what the gateway believes."""
_FORGET_S = 60.0

_RESERVE = Script("window", "reservation", "reserve", when_full=True)
_WORDS = {"concurrent": "concurrent requests", "daily_tokens": "tokens per day"} | {
    name: f"{name} per minute" for name in DIMENSIONS
}
_NAMES = {name[0]: name for name in DIMENSIONS}


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room taken for one generation. `bucket` is the window's second, 0 where the store did not make it."""

    standing: Standing
    bucket: int
    amounts: Amounts
    """What was reserved."""
    id: str = ""
    second: int = 0
    """The second on the store's clock in which it was made, by the store or by this process alone."""
    made: bool = True
    """False where only the store might know of it, because its answer was not heard."""
    refused: bool = False
    """Whether its caller was refused. Then nothing of it counts."""

    @property
    def tokens(self) -> int:
        return self.amounts.get("tokens", 0)


@dataclass(frozen=True, slots=True)
class Release:
    """How a reservation stood when it was released."""

    uncertain: bool = False
    """Whether a command that makes it may still reach the store."""
    pending: bool = False
    """Whether the store does not know it, so that `Limits.charged` is to be called when it does."""


class Spending(Protocol):
    """What counts against limits: an entry of the ledger, or a reservation as it stands."""

    @property
    def key_id(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def allowance(self) -> Allowance: ...
    @property
    def second(self) -> int: ...
    @property
    def counted(self) -> Amounts: ...


Taker = Callable[[Reservation], None]


class Limits:
    """The limits of all keys and models."""

    _end: Callable[[str], None] = staticmethod(lambda member: None)

    def __init__(self, settings: LimiterSettings, store: Store, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._local = LocalLimits()
        self._leases = Leases(store, lambda: LEASE_S, self.charged)
        self._end = self._leases.end
        self._forgot_at = time.monotonic()

    def close(self) -> None:
        """Stop renewing leases."""
        self._leases.close()

    def enforce(self, settings: LimiterSettings) -> None:
        """Go by `settings` from now on; what has been spent counts on."""
        self._settings = settings

    @property
    def enabled(self) -> bool:
        return self._settings.enabled

    async def reserve(
        self,
        principal: Principal,
        model: ModelSpec,
        member: str,
        wanted: Amounts,
        *,
        left: Taker | None = None,
        allowance: Allowance | None = None,
    ) -> Reservation:
        """Take room for one generation of the request `member`. `allowance` is that of the principal, if it is known.

        `requests` are 1 for the request's first generation, then 0. `left` gets a reservation that is to be settled
        though the caller does not get it: it was cancelled while the store made it, or is refused although the store
        may have made it. Raises RateLimitExceeded with the standing's headers, BadRequest when the limit could
        never admit it, Unavailable when the store is away and that closes.
        """
        allowance = allowance or allowance_of(principal, model)
        if not self.enabled:
            now_s = int(time.time())
            limits = dict(allowance.per_minute)
            return Reservation(Standing(allowance, limits, dict.fromkeys(limits, now_s)), 0, wanted)
        for name, most in allowance.most().items():
            if wanted.get(name, 0) > most:
                raise _never(name, wanted[name], most, model)
        # Without tokens there is nothing to settle, and the request is forgotten with the window.
        reservation_id = self._leases.new_id() if wanted.get("tokens") else ""
        asked = _Wanted(principal, model, member, allowance, allowance.limited(wanted), reservation_id)
        try:
            reservation = await self._ask(asked, left)
        except StoreUnavailable as error:
            reservation = self._take_locally(asked, error, left)
        if allowance.concurrent_requests or allowance.concurrent_requests_of_key:
            self._leases.begin(member, principal.key_id, model.id, allowance)
        return reservation

    async def peek(self, principal: Principal, model: ModelSpec) -> Standing | None:
        """The caller's standing, with nothing reserved. None if it is unknown."""
        if not self.enabled:
            return None
        allowance = allowance_of(principal, model)
        try:
            return (await self._ask(_Wanted(principal, model, "", allowance, {}, ""))).standing
        except StoreUnavailable:
            return self._local_standing(principal.key_id, model.id, allowance, {})

    def release(self, reservation: Reservation, counted: Amounts) -> Release:
        """Take a reservation, or a part of one, off the books of this process. `counted` of it still counts."""
        if not reservation.made:
            return Release(uncertain=True)
        held = self._leases.release(reservation.id, reservation.amounts)
        if held is None:  # made while limits were off
            return Release()
        unused = {name: amount - counted.get(name, 0) for name, amount in reservation.amounts.items()}
        self._local.window(held.key_id, held.model_id).add(held.second, unused, pending=held.pending, sign=-1)
        self._note_day(held, -unused["tokens"])
        return Release(held.uncertain or held.pending, held.pending)

    def charged(self, spending: Spending) -> None:
        """Count as known to the store what it has now charged."""
        second, tokens = spending.second, spending.counted.get("tokens", 0)
        self._local.window(spending.key_id, spending.model_id).charged(second, spending.counted)
        if spending.allowance.tokens_per_day and day_number(second) == day_number(self._now()):
            day = self._local.day(spending.key_id, self._now())
            tokens = min(tokens, day.pending)
            day.pending -= tokens
            day.known += tokens

    def end(self, member: str) -> None:
        """Note that a request runs no more."""
        self._end(member)

    def _now(self) -> float:
        return self._store.state.time_s()

    async def _ask(self, wanted: _Wanted, left: Taker | None = None) -> Reservation:
        """Ask the store, again if it finds that the question is late. Raises StoreUnavailable and RateLimitExceeded."""
        answer = await self._question(wanted, left)
        if answer[0] == "late":  # but the answer came in time: the store's clock is another one than believed
            answer = await self._question(wanted, left)
            if answer[0] == "late":
                raise StoreUnavailable("the store considers every reservation late", sent=True)
        reservation = self._reservation(wanted, answer)
        self._note(wanted, answer, reservation)
        if answer[0]:
            kind = _NAMES.get(answer[0], answer[0])
            raise self._exceeded(kind, wanted.model, reservation.standing, int(answer[2]) / 1000)
        return reservation

    async def _question(self, wanted: _Wanted, left: Taker | None) -> Any:
        def unheard(answer: Any) -> None:
            if left is None:
                return
            if isinstance(answer, Exception):  # perhaps made
                left(self._unmade(wanted))
            elif not answer[0]:
                reservation = self._reservation(wanted, answer)
                self._note(wanted, answer, reservation)
                left(reservation)

        now = self._now()
        key_id, allowance = wanted.principal.key_id, wanted.allowance
        deadline_s = now + self._store.timeout_s + _LATE_S
        pending = self._local.window(key_id, wanted.model.id).pending(allowance, now)
        pending_today = self._local.day(key_id, now).pending if allowance.tokens_per_day else 0
        arguments = [
            wanted.id,
            wanted.member,
            encoded(wanted.amounts.items()),
            encoded_limits(allowance.per_minute),
            encoded(pending.items()),
            allowance.concurrent_requests,
            allowance.concurrent_requests_of_key,
            allowance.tokens_per_day,
            round(LEASE_S * 1000),
            round(deadline_s * 1000) if any(wanted.amounts.values()) else 0,
            day_number(now),
            pending_today,
        ]
        command = _RESERVE.call(limit_keys(key_id, wanted.model.id, now), arguments)
        answer = await self._store.run_heard(command, unheard)
        if answer[0] == "late":
            self._store.state.set_clock(int(answer[3]) / 1000)
        return answer

    def _reservation(self, wanted: _Wanted, answer: list[Any]) -> Reservation:
        second = int(answer[1])
        standing = standing_of(wanted.allowance, answer[5:])
        return Reservation(standing, second, wanted.amounts, wanted.id, second)

    def _unmade(self, wanted: _Wanted, *, refused: bool = False) -> Reservation:
        """What is settled in place of a reservation that the store may have made, or will make."""
        second = int(self._now())
        return Reservation(
            Standing(wanted.allowance), 0, wanted.amounts, wanted.id, second, made=False, refused=refused
        )

    def _note(self, wanted: _Wanted, answer: list[Any], reservation: Reservation) -> None:
        """Take note of what the store answered, for when it is away."""
        now, key_id = self._now(), wanted.principal.key_id
        window = self._local.window(key_id, wanted.model.id)
        if not answer[0]:
            window.add(reservation.second, wanted.amounts, pending=False)
            self._hold(wanted, reservation, pending=False, uncertain=False)
        window.note(reservation.standing, now)
        if wanted.allowance.tokens_per_day:
            self._local.day(key_id, now).known = int(answer[4])
        if time.monotonic() - self._forgot_at > _FORGET_S:
            self._forgot_at = time.monotonic()
            self._local.forget_idle(now)

    def _hold(self, wanted: _Wanted, reservation: Reservation, *, pending: bool, uncertain: bool) -> None:
        if not wanted.id:
            return
        self._leases.hold(
            Held(
                id=wanted.id,
                key_id=wanted.principal.key_id,
                model_id=wanted.model.id,
                allowance=wanted.allowance,
                second=reservation.second,
                amounts=dict(wanted.amounts),
                pending=pending,
                uncertain=uncertain,
            )
        )

    def _note_day(self, held: Held, tokens: int) -> None:
        now = self._now()
        if held.allowance.tokens_per_day and day_number(held.second) == day_number(now):
            day = self._local.day(held.key_id, now)
            if held.pending:
                day.pending = max(0, day.pending + tokens)
            else:
                day.known = max(0, day.known + tokens)

    def _take_locally(self, wanted: _Wanted, error: StoreUnavailable, left: Taker | None) -> Reservation:
        """Take room without the store. Raises RateLimitExceeded, and Unavailable where that closes."""
        now = self._now()
        refusal = self._refusal(wanted, error, now)
        if refusal is not None:
            if error.sent and wanted.id and left is not None:
                left(self._unmade(wanted, refused=True))
            raise refusal
        key_id, model_id, allowance = wanted.principal.key_id, wanted.model.id, wanted.allowance
        second = int(now)
        self._local.window(key_id, model_id).add(second, wanted.amounts, pending=True)
        if allowance.tokens_per_day:
            self._local.day(key_id, now).pending += wanted.amounts["tokens"]
        standing = self._local_standing(key_id, model_id, allowance, wanted.amounts)
        reservation = Reservation(standing, 0, wanted.amounts, wanted.id, second)
        self._hold(wanted, reservation, pending=True, uncertain=error.sent)
        return reservation

    def _refusal(self, wanted: _Wanted, error: StoreUnavailable, now: float) -> GatewayError | None:
        """The error that refuses a generation while the store is away, else None."""
        if self._settings.on_store_failure == "closed":
            return self._closed(error)
        self._metrics.limited_locally.inc()
        key_id, model, allowance = wanted.principal.key_id, wanted.model, wanted.allowance
        running = self._leases.running(key_id, model.id)
        replicas = self._settings.replicas
        found = self._local.refusal(key_id, model.id, allowance, wanted.amounts, running, replicas, now)
        if found is None:
            return None
        standing = self._local_standing(key_id, model.id, allowance, wanted.amounts)
        return self._exceeded(found.kind, model, standing, found.wait_s)

    @staticmethod
    def _closed(error: StoreUnavailable) -> Unavailable:
        if isinstance(error, WritesRefused):
            return from_store(error)
        return Unavailable("Limits can't be checked at the moment. Try again shortly.", retry_after_s=1.0)

    def _local_standing(self, key_id: str, model_id: str, allowance: Allowance, taken: Amounts) -> Standing:
        return self._local.standing(key_id, model_id, allowance, taken, self._settings.replicas, self._now())

    def _exceeded(self, kind: str, model: ModelSpec, standing: Standing, retry_after_s: float) -> RateLimitExceeded:
        self._metrics.limited(model.id, kind)
        error = RateLimitExceeded(
            f"Rate limit reached for {model.id!r}: {_WORDS[kind]}. Try again in {retry_after_s:.3f} s.",
            retry_after_s=retry_after_s,
        )
        error.extra_headers = standing.headers()
        return error


def _never(name: str, amount: int, limit: int, model: ModelSpec) -> BadRequest:
    """The error of a request that the limit could never admit."""
    of, param, remedy = "", None, f"send fewer {name}."
    if name == "tokens":
        of, param, remedy = " (prompt and max_tokens together)", "max_tokens", "shorten the prompt or lower max_tokens."
    return BadRequest(
        f"This request needs {amount} {name}{of}, but the API key's limit for {model.id!r} is {limit}. It can never be "
        f"admitted: {remedy}",
        param,
        f"{name}_exceed_limit",
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked for. Without an id, only the caller's standing is."""

    principal: Principal
    model: ModelSpec
    member: str
    allowance: Allowance
    amounts: Amounts
    id: str
