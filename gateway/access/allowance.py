"""What a key may do with a model, and where it stands: the figures of limits, without the store that keeps them."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from typing import Any

from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec

WINDOW_S = 61
"""One second more than the promise: see lua/window.lua."""
DAY_S = 86_400


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


def standing_of(allowance: Allowance, figures: list[Any]) -> Standing:
    """Read the four figures that the scripts return."""
    remaining_requests, remaining_tokens, reset_requests, reset_tokens = map(int, figures)
    return Standing(allowance, remaining_requests, remaining_tokens, reset_requests, reset_tokens)


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


def limit_keys(key_id: str, model_id: str, unix_s: float) -> list[str]:
    """Return the store keys of one API key's limits on one model.

    They are the window, the running requests of the model and of the key, the open reservations, their leases, and the
    budgets of the day that `unix_s` falls on, with the day before in front of it and the day after behind it: which of
    them counts is decided by the store's clock.
    """
    head = f"sh:{{k:{key_id}}}:"
    days = [f"{head}day:{day_of(unix_s + offset * DAY_S)}" for offset in (-1, 0, 1)]
    return [f"{head}w:{model_id}", f"{head}run:{model_id}", f"{head}run", f"{head}open", f"{head}open:until", *days]


def day_number(unix_s: float) -> int:
    """Return the number of the day in UTC since 1970."""
    return int(unix_s // DAY_S)


def today() -> str:
    """Return the current day in UTC, as the ledger writes it."""
    return day_of(time.time())


def day_of(unix_s: float) -> str:
    """Return the day in UTC that a time falls on."""
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).date().isoformat()


def _rfc3339(unix_s: int) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
