"""Limits per API key and model: room is reserved before a generation and what it did not use is given back after.

The promise: in any 60 s, over any number of gateways, never more requests or tokens than the limit. A reservation is
the exact prompt plus the most the completion may take, so concurrent requests can't slip past. The arithmetic is in
lua/window.lua and runs inside the store. While the store is away a share of the two per-minute limits is enforced
per process (concurrent and daily ones are not), or nothing is let in, as configured. Fails with RateLimitExceeded,
BadRequest (could never fit) and Unavailable.
"""

from __future__ import annotations

import datetime
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.auth import Principal
from gateway.catalog import ModelSpec
from gateway.config import LimiterSettings
from gateway.errors import BadRequest, RateLimitExceeded, StoreUnavailable, Unavailable
from gateway.metrics import Metrics
from gateway.store import Script, Store

LEASE_S = 900
"""A running request that its gateway never settled stops counting as running after this."""
WINDOW_S = 61
"""One second more than the promise: see lua/window.lua."""

_RESERVE = Script("window", "reserve")
_WORDS = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "concurrent": "concurrent requests",
    "daily_tokens": "tokens per day",
}


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one key may do with one model. 0 means no limit of that kind."""

    requests_per_minute: int
    tokens_per_minute: int
    concurrent_requests: int = 0
    concurrent_requests_of_key: int = 0
    tokens_per_day: int = 0

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest generation that could ever be admitted."""
        return min(self.tokens_per_minute, self.tokens_per_day or self.tokens_per_minute)


@dataclass(slots=True)
class Standing:
    """Where a caller stands: the figures of the six headers. Resets are Unix seconds."""

    allowance: Allowance
    remaining_requests: int
    remaining_tokens: int
    reset_requests: int
    reset_tokens: int
    local: bool = False
    """Decided by this process alone, while the store was away."""

    def headers(self) -> dict[str, str]:
        """Return the X-RateLimit headers; remaining figures never show as negative."""
        headers = {
            "X-RateLimit-Limit-Requests": str(self.allowance.requests_per_minute),
            "X-RateLimit-Remaining-Requests": str(max(0, self.remaining_requests)),
            "X-RateLimit-Reset-Requests": _rfc3339(self.reset_requests),
            "X-RateLimit-Limit-Tokens": str(self.allowance.tokens_per_minute),
            "X-RateLimit-Remaining-Tokens": str(max(0, self.remaining_tokens)),
            "X-RateLimit-Reset-Tokens": _rfc3339(self.reset_tokens),
        }
        if self.local:
            headers["X-Shannon-Limits"] = "local"
        return headers


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room taken for one generation. `bucket` is the window's second, 0 where the store was not asked."""

    standing: Standing
    bucket: int
    tokens: int


@dataclass(slots=True)
class _LocalWindow:
    """The sliding window of one key and model in this process, for when the store is away."""

    buckets: deque[list[int]] = field(default_factory=deque)
    """[second, requests, tokens], oldest first."""

    def take(self, requests: int, tokens: int, share: Allowance, now: float) -> tuple[str, float]:
        """Take room, or return (what is exceeded, seconds to wait)."""
        second = int(now)
        while self.buckets and self.buckets[0][0] + WINDOW_S <= second:
            self.buckets.popleft()
        for kind, column, wanted, limit in (
            ("requests", 1, requests, share.requests_per_minute),
            ("tokens", 2, tokens, share.tokens_per_minute),
        ):
            over = self.spent(column) + wanted - limit
            for bucket in self.buckets if over > 0 else ():
                over -= bucket[column]
                if over <= 0:
                    return kind, bucket[0] + WINDOW_S - now
        if not self.buckets or self.buckets[-1][0] != second:
            self.buckets.append([second, 0, 0])
        self.buckets[-1][1] += requests
        self.buckets[-1][2] += tokens
        return "", 0.0

    def spent(self, column: int) -> int:
        return sum(bucket[column] for bucket in self.buckets)


def standing_of(allowance: Allowance, figures: list[Any]) -> Standing:
    """Read the four figures that the scripts end with."""
    remaining_requests, remaining_tokens, reset_requests, reset_tokens = map(int, figures)
    return Standing(allowance, remaining_requests, remaining_tokens, reset_requests, reset_tokens)


def keys_of(key_id: str, model_id: str, day: str) -> list[str]:
    """Return the store keys of one API key's limits on one model: window, running twice, day budget."""
    head = f"sh:{{k:{key_id}}}:"
    return [f"{head}w:{model_id}", f"{head}run:{model_id}", f"{head}run", f"{head}day:{day}"]


def allowance_of(principal: Principal, model: ModelSpec) -> Allowance:
    """Return the model's limits with the key's own in their place, where it has any."""
    limits = model.settings.limits
    own = principal.limits.get(model.id, {})
    return Allowance(
        requests_per_minute=own.get("requests_per_minute", limits.requests_per_minute),
        tokens_per_minute=own.get("tokens_per_minute", limits.tokens_per_minute),
        concurrent_requests=own.get("concurrent_requests", limits.concurrent_requests or 0),
        concurrent_requests_of_key=principal.max_concurrent_requests or 0,
        tokens_per_day=principal.tokens_per_day or 0,
    )


class Limits:
    """The limits of all keys and models."""

    def __init__(self, settings: LimiterSettings, store: Store, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._local: dict[tuple[str, str], _LocalWindow] = {}

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
        *,
        requests: int,
        tokens: int,
        left: Callable[[Reservation], None] | None = None,
    ) -> Reservation:
        """Take room for one generation of the request `member`.

        `requests` is 1 for the request's first generation, then 0. `left` gets the reservation if the caller is
        cancelled while the store makes it. Raises RateLimitExceeded with the standing's headers, BadRequest when the
        limit could never admit it, Unavailable when the store is away and that closes.
        """
        allowance = allowance_of(principal, model)
        if not self.enabled:
            now_s = int(time.time())
            standing = Standing(allowance, allowance.requests_per_minute, allowance.tokens_per_minute, now_s, now_s)
            return Reservation(standing, 0, tokens)
        most = allowance.most_tokens
        if tokens > most:
            raise BadRequest(
                f"This request needs {tokens} tokens (prompt and max_tokens together), but the API key's limit for "
                f"{model.id!r} is {most}. It can never be admitted: shorten the prompt or lower max_tokens.",
                "max_tokens",
                "tokens_exceed_limit",
            )
        try:
            return await self._ask(principal, model, member, allowance, requests, tokens, left)
        except StoreUnavailable:
            return self._take_locally(principal, model, allowance, requests, tokens)

    async def peek(self, principal: Principal, model: ModelSpec) -> Standing | None:
        """Return where the caller stands, without taking anything; None when nobody knows."""
        if not self.enabled:
            return None
        try:
            return (await self._ask(principal, model, "", allowance_of(principal, model), 0, 0)).standing
        except StoreUnavailable:
            allowance = allowance_of(principal, model)
            window = self._local.get((principal.key_id, model.id), _LocalWindow())
            return self._local_standing(allowance, self._share(allowance), window)

    async def _ask(
        self,
        principal: Principal,
        model: ModelSpec,
        member: str,
        allowance: Allowance,
        requests: int,
        tokens: int,
        left: Callable[[Reservation], None] | None = None,
    ) -> Reservation:
        def unheard(answer: Any) -> None:
            if left is None:
                return
            if isinstance(answer, Exception):
                left(Reservation(Standing(allowance, 0, 0, 0, 0), 0, 0))  # perhaps made: its lease must not stay
            elif not answer[0]:
                left(Reservation(standing_of(allowance, answer[2:6]), int(answer[1]), tokens))

        arguments = [
            member,
            requests,
            tokens,
            allowance.requests_per_minute,
            allowance.tokens_per_minute,
            allowance.concurrent_requests,
            allowance.concurrent_requests_of_key,
            allowance.tokens_per_day,
            LEASE_S * 1000,
        ]
        keys = keys_of(principal.key_id, model.id, today())
        answer = await self._store.run_heard(_RESERVE.call(keys, arguments), unheard)
        standing = standing_of(allowance, answer[2:6])
        if answer[0]:
            raise self._exceeded(answer[0], model, standing, int(answer[6]) / 1000)
        return Reservation(standing, int(answer[1]), tokens)

    def _take_locally(
        self, principal: Principal, model: ModelSpec, allowance: Allowance, requests: int, tokens: int
    ) -> Reservation:
        if self._settings.on_store_failure == "closed":
            raise Unavailable("Limits can't be checked at the moment. Try again shortly.", retry_after_s=1.0)
        self._metrics.limited_locally.inc()
        share = self._share(allowance, tokens)
        now = time.time()
        window = self._local.setdefault((principal.key_id, model.id), _LocalWindow())
        refused, wait_s = window.take(requests, tokens, share, now)
        standing = self._local_standing(allowance, share, window)
        if refused:
            raise self._exceeded(refused, model, standing, wait_s)
        return Reservation(standing, 0, tokens)

    def _share(self, allowance: Allowance, tokens: int = 0) -> Allowance:
        """Return this process's part of a limit, with room for a request of `tokens` in any case."""
        replicas = self._settings.replicas
        requests_share = max(1, allowance.requests_per_minute // replicas)
        return Allowance(requests_share, max(tokens, allowance.tokens_per_minute // replicas))

    @staticmethod
    def _local_standing(allowance: Allowance, share: Allowance, window: _LocalWindow) -> Standing:
        reset = math.ceil(time.time()) + WINDOW_S
        remaining = share.requests_per_minute - window.spent(1), share.tokens_per_minute - window.spent(2)
        return Standing(allowance, *remaining, reset, reset, local=True)

    def _exceeded(self, kind: str, model: ModelSpec, standing: Standing, retry_after_s: float) -> RateLimitExceeded:
        self._metrics.limited(model.id, kind)
        error = RateLimitExceeded(
            f"Rate limit reached for {model.id!r}: {_WORDS[kind]}. Try again in {retry_after_s:.3f} s.",
            retry_after_s=retry_after_s,
        )
        error.extra_headers = standing.headers()
        return error


def today() -> str:
    """Return the current day in UTC, as the ledger writes it."""
    return day_of(time.time())


def day_of(unix_s: float) -> str:
    """Return the day in UTC that a time falls on."""
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).date().isoformat()


def _rfc3339(unix_s: int) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
