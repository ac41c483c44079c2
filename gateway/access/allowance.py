"""Limits of a key on a model, and its standing: the figures, without the store that keeps them."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from typing import Any

from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.settings.config import LimitSettings
from gateway.store import layout

WINDOW_S = 61
"""One second more than the promise: see lua/window.lua."""
DAY_S = 86_400


_PER_MINUTE = "_per_minute"
DIMENSIONS = tuple(name.removesuffix(_PER_MINUTE) for name in LimitSettings.model_fields if name.endswith(_PER_MINUTE))
"""What is limited per minute: `requests`, `tokens`, and whatever else `LimitSettings` names. The store knows each by
the first letter of its name."""

_SETTINGS = [(name, name + _PER_MINUTE) for name in DIMENSIONS]

Amounts = dict[str, int]
"""Amounts by dimension. A dimension that is not in it is 0."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """Limits of one key on one model. 0 means no limit.

    `per_minute` has the name and the limit of every dimension that has a limit.
    """

    per_minute: tuple[tuple[str, int], ...] = ()
    concurrent_requests: int = 0
    concurrent_requests_of_key: int = 0
    tokens_per_day: int = 0

    @classmethod
    def of(cls, **limits: int) -> Allowance:
        """Build an allowance from limits under the names of their settings, as in `of(requests_per_minute=60)`."""
        per_minute = tuple([(name, limit) for name, setting in _SETTINGS if (limit := limits.pop(setting, 0))])
        return cls(per_minute, **limits)

    def fields(self) -> dict[str, int]:
        """The arguments of `of`."""
        fields = asdict(self)
        return {name + _PER_MINUTE: limit for name, limit in fields.pop("per_minute")} | fields

    def most(self) -> Amounts:
        """The most that one generation may take of every dimension that has a limit."""
        most = dict(self.per_minute)
        if self.tokens_per_day and "tokens" in most:
            most["tokens"] = min(most["tokens"], self.tokens_per_day)
        return most

    def limited(self, amounts: Amounts) -> Amounts:
        """The amounts of the dimensions that have a limit."""
        return {name: amounts.get(name, 0) for name, _ in self.per_minute}


@dataclass(slots=True)
class Standing:
    """Where a caller stands: the figures of the X-RateLimit headers, by dimension. Resets are Unix seconds."""

    allowance: Allowance
    remaining: Amounts = field(default_factory=dict)
    resets: Amounts = field(default_factory=dict)
    local: bool = False
    """Decided by this process alone, while the store was away."""

    def headers(self) -> dict[str, str]:
        """The X-RateLimit headers. Remaining amounts are never negative."""
        headers: dict[str, str] = {}
        for name, limit in self.allowance.per_minute:
            of_limit, of_remaining, of_reset = _header_names(name)
            headers[of_limit] = str(limit)
            headers[of_remaining] = str(max(0, self.remaining[name]))
            headers[of_reset] = _rfc3339(self.resets[name])
        if self.local:
            headers["X-Shannon-Limits"] = "local"
        return headers


@cache
def _header_names(dimension: str) -> list[str]:
    return [f"X-RateLimit-{kind}-{dimension.title()}" for kind in ("Limit", "Remaining", "Reset")]


def standing_of(allowance: Allowance, figures: list[Any]) -> Standing:
    """Read what the scripts return: the remaining amount and the reset of each dimension, one after the other."""
    standing = Standing(allowance)
    numbers = iter(figures)
    for name, _ in allowance.per_minute:
        standing.remaining[name], standing.resets[name] = int(next(numbers)), int(next(numbers))
    return standing


@lru_cache(1024)
def encoded_limits(per_minute: tuple[tuple[str, int], ...]) -> str:
    """Write the limits of an allowance as the scripts read them."""
    return encoded(per_minute)


def encoded(amounts: Iterable[tuple[str, int]]) -> str:
    """Write amounts as the scripts read them: "r1 t500"."""
    return " ".join([f"{name[0]}{amount}" for name, amount in amounts])


def allowance_of(principal: Principal, model: ModelSpec) -> Allowance:
    """The model's limits, with the key's own in their place where it has any."""
    limits: dict[str, int] = {name: limit for name, limit in vars(model.settings.limits).items() if limit}
    limits.update(principal.limits.get(model.id, {}))
    return Allowance.of(
        **limits,
        concurrent_requests_of_key=principal.max_concurrent_requests or 0,
        tokens_per_day=principal.tokens_per_day or 0,
    )


def limit_keys(key_id: str, model_id: str, unix_s: float) -> list[str]:
    """The store's keys of one API key's limits on one model.

    The last three are the budgets of the day before `unix_s`, of its day and of the day after. Which of them counts is
    decided by the store's clock.
    """
    return layout.limits(key_id, model_id, [day_of(unix_s + offset * DAY_S) for offset in (-1, 0, 1)])


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
