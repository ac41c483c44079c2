"""Limits as one process can enforce them alone, while the store is away.

It begins with what it saw of the store last: its own reservations, by the second, and what others had taken, which
counts until the store said that it would be gone. Of the room that is left each of `replicas` processes may take an
equal share, and one request at least. Reservations that the store does not know yet are kept apart as `pending`: they
are reported to it with every question until it has charged them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from gateway.access.allowance import DAY_S, WINDOW_S, Allowance, Amounts, Standing, day_number


class LocalWindow:
    """The sliding window of one key and model, as this process knows it. Times are on the store's clock."""

    def __init__(self) -> None:
        self._known: dict[int, Amounts] = {}
        """Second -> amounts of this process that the store has."""
        self._pending: dict[int, Amounts] = {}
        """The same, of which the store does not know."""
        self._others: Amounts = {}
        self._others_until: Amounts = {}

    def add(self, second: int, amounts: Amounts, *, pending: bool, sign: int = 1) -> None:
        """Count `amounts`; with a `sign` of -1, count them no longer."""
        buckets = self._pending if pending else self._known
        bucket = buckets.setdefault(second, {})
        for name, amount in amounts.items():
            bucket[name] = max(0, bucket.get(name, 0) + sign * amount)

    def charged(self, second: int, amounts: Amounts) -> None:
        """Count as known to the store what was pending."""
        waiting = self._pending.get(second)
        if waiting is not None:
            moved = {name: min(amount, waiting.get(name, 0)) for name, amount in amounts.items()}
            self.add(second, moved, pending=True, sign=-1)
            self.add(second, moved, pending=False)

    def note(self, standing: Standing, now: float) -> None:
        """Take over the store's figures. They include what was reported to it as pending."""
        self._forget(now)
        latest = int(now) + 2 * WINDOW_S
        for name, limit in standing.allowance.per_minute:
            self._others_until[name] = min(standing.resets[name], latest)
            own = self._sum(self._known, name, now) + self._sum(self._pending, name, now)
            self._others[name] = max(0, limit - standing.remaining[name] - own)

    def pending(self, allowance: Allowance, now: float) -> Amounts:
        """The amounts in the window that the store does not know."""
        if not self._pending:
            return {}
        self._forget(now)
        return {name: self._sum(self._pending, name, now) for name, _ in allowance.per_minute}

    def wait_s(self, name: str, wanted: int, limit: int, replicas: int, now: float) -> float:
        """Seconds until `wanted` more of a dimension fit, 0 if they fit now."""
        if wanted == 0 or self._fits(name, wanted, limit, replicas, now):
            return 0.0
        ends = {second + WINDOW_S for second in (*self._known, *self._pending)} | {self._others_until.get(name, 0)}
        for end in sorted(ends):
            if end > now and self._fits(name, wanted, limit, replicas, end):
                return end - now
        return float(WINDOW_S)

    def remaining(self, name: str, wanted: int, limit: int, replicas: int, now: float) -> int:
        """How much of a dimension this process may still take, if its share has room for `wanted`."""
        return self._share(name, wanted, limit, replicas, now) - self._sum(self._pending, name, now)

    def idle(self, now: float) -> bool:
        """Whether nothing in it counts any more."""
        self._forget(now)
        return not self._known and not self._pending and max(self._others_until.values(), default=0) <= now

    def _fits(self, name: str, wanted: int, limit: int, replicas: int, now: float) -> bool:
        return self.remaining(name, wanted, limit, replicas, now) >= wanted

    def _share(self, name: str, wanted: int, limit: int, replicas: int, now: float) -> int:
        others = self._others.get(name, 0) if self._others_until.get(name, 0) > now else 0
        return share_of(limit - others - self._sum(self._known, name, now), wanted, replicas)

    @staticmethod
    def _sum(buckets: dict[int, Amounts], name: str, now: float) -> int:
        return sum(bucket.get(name, 0) for second, bucket in buckets.items() if _counts(second, now))

    def _forget(self, now: float) -> None:
        for buckets in (self._known, self._pending):
            for second in [second for second in buckets if not _counts(second, now)]:
                del buckets[second]


def _counts(second: int, now: float) -> bool:
    """Whether a second is in the window. One far ahead is of a clock that was set back, see lua/window.lua."""
    return now - WINDOW_S < second <= now + WINDOW_S


def share_of(room: int, wanted: int, replicas: int) -> int:
    """Return a process's share of the room that is left: at least one request, where there is room for it."""
    return max(min(wanted, room), room // replicas)


@dataclass(slots=True)
class LocalDay:
    """Tokens of one key on one day, as this process knows them."""

    number: int = 0
    known: int = 0
    pending: int = 0

    def at(self, now: float) -> LocalDay:
        """Return it as it is at a time: a new day begins empty."""
        if (number := day_number(now)) != self.number:
            self.number, self.known, self.pending = number, 0, 0
        return self


@dataclass(slots=True)
class Refused:
    """What is exceeded, and in how long there may be room."""

    kind: str
    wait_s: float


@dataclass(slots=True)
class LocalLimits:
    """All windows and days that this process knows, and the requests that it has running."""

    windows: dict[tuple[str, str], LocalWindow] = field(default_factory=lambda: defaultdict(LocalWindow))
    days: dict[str, LocalDay] = field(default_factory=lambda: defaultdict(LocalDay))

    def window(self, key_id: str, model_id: str) -> LocalWindow:
        return self.windows[key_id, model_id]

    def day(self, key_id: str, now: float) -> LocalDay:
        return self.days[key_id].at(now)

    def refusal(
        self,
        key_id: str,
        model_id: str,
        allowance: Allowance,
        wanted: Amounts,
        running: tuple[int, int],
        replicas: int,
        now: float,
    ) -> Refused | None:
        """The limit that refuses a generation, else None.

        `running` is how many requests this process has running of the model and of the key.
        """
        window = self.window(key_id, model_id)
        waits = [
            Refused(name, window.wait_s(name, wanted.get(name, 0), limit, replicas, now))
            for name, limit in allowance.per_minute
        ]
        limits = (allowance.concurrent_requests, allowance.concurrent_requests_of_key)
        for limit, count in zip(limits, running, strict=True):
            if limit and wanted.get("requests") and count >= max(1, limit // replicas):
                waits.append(Refused("concurrent", 1.0))
        if allowance.tokens_per_day:
            day, tokens = self.day(key_id, now), wanted.get("tokens", 0)
            if day.pending + tokens > share_of(allowance.tokens_per_day - day.known, tokens, replicas):
                waits.append(Refused("daily_tokens", DAY_S - now % DAY_S))
        worst = max(waits, key=lambda refused: refused.wait_s)
        return worst if worst.wait_s > 0 else None

    def standing(
        self, key_id: str, model_id: str, allowance: Allowance, taken: Amounts, replicas: int, now: float
    ) -> Standing:
        """The caller's standing after `taken` was taken."""
        window = self.window(key_id, model_id)
        reset = int(now) + 1 + WINDOW_S
        remaining = {
            name: window.remaining(name, 1 if name == "requests" else taken.get(name, 0), limit, replicas, now)
            for name, limit in allowance.per_minute
        }
        return Standing(allowance, remaining, dict.fromkeys(remaining, reset), local=True)

    def forget_idle(self, now: float) -> None:
        """Drop what does not count any more."""
        for of in [of for of, window in self.windows.items() if window.idle(now)]:
            del self.windows[of]
        for key_id in [key_id for key_id, day in self.days.items() if day.number != day_number(now)]:
            del self.days[key_id]
