"""The replicas of a remote engine: which one a request goes to, when to leave one alone, when to try another.

RULES is the one table of what can go wrong with a request at a replica, and of what that means for both. Its principle:
a failed request alone proves nothing about a replica, because the request may be the reason. Two things do:

    a probe          of the replica, after `breaker_failures` failures in a row: if it fails too, the breaker opens
    another replica  that served the same request: `breaker_failures` times in a row, and the breaker opens

A replica whose breaker is open gets no requests, for a time that doubles. A probe that succeeds makes it half open: it
gets one request at a time while others are well, until a request has succeeded there. A busy replica is not left
alone; it gets a smaller share of the requests, twice as small with each sign that it is busy, and back to its full
share over time.

`Pool` chooses the replica with the least load, or the one that a conversation is kept to. `Attempts` says where a
request may be tried next, and with which error it has failed permanently. Does no I/O, and does not know the load that
others put on the same replicas. Raises the errors of `engine.base`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from engine.base import EngineError, EngineOverloaded, EngineUnavailable
from engine.breaker import Breaker

log = logging.getLogger(__name__)

Choice = Literal["least_loaded", "sticky"]
Outcome = Literal["declined", "overloaded", "slow", "failed", "unreachable", "stalled"]

_BACKOFF_S = 0.1
"""Pause before a retry on the only replica; doubles. A restarted server listens within seconds."""
_UNEVEN_FACTOR, _UNEVEN_REQUESTS = 2, 8
"""A conversation leaves its replica if that has more than this factor times the lowest load, plus this number."""
_MAX_WEIGHT = 16.0
"""A busy replica keeps a sixteenth of an idle one's share, so that its recovery is noticed."""
_HALVING_S = 5.0
"""Half-life of a busy replica's lower share, unless it sent Retry-After."""
_MAX_HALVING_S = 60.0
_LOG_EVERY_S = 60.0
"""Interval of log lines for a repeated failure."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Consequences of an outcome for the request and for the replica."""

    others: Literal["all", "one"]
    """Other replicas to try; "one" if the request itself may cause the failure."""
    again: bool
    """Whether the same replica is tried again if it is the only one."""
    evidence: Literal["none", "doubt", "proof"]
    """Against the replica: "doubt" counts towards a probe, "proof" also if another replica serves the request."""
    busy: bool
    """Whether the replica gets a smaller share for some time."""


RULES: dict[Outcome, Rule] = {
    # It answers, but not to this: a status as for a wrong key, URL or model.
    "declined": Rule(others="all", again=False, evidence="proof", busy=False),
    # It says that it has no room.
    "overloaded": Rule(others="all", again=False, evidence="none", busy=True),
    # No token came in time: its queue may be long.
    "slow": Rule(others="all", again=False, evidence="doubt", busy=True),
    # A 500, or an answer that is none.
    "failed": Rule(others="one", again=False, evidence="proof", busy=False),
    # Nothing listens, the connection broke, it does not speak HTTP, or a proxy says so.
    "unreachable": Rule(others="all", again=True, evidence="proof", busy=False),
    # Silence after the first token.
    "stalled": Rule(others="all", again=False, evidence="proof", busy=False),
}
"""Not listed: a served request, which clears all doubt; an invalid request and one whose client disconnected, which are
no evidence."""


class AttemptFailed(Exception):
    """One replica could not serve a request. The message is for the log; clients receive the error of `Attempts`."""

    def __init__(
        self,
        outcome: Outcome,
        reason: str,
        *,
        error: EngineError | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`error` is for clients if all replicas fail the same; `retry_after_s` is from the replica."""
        super().__init__(reason)
        self.outcome = outcome
        self.error = error
        self.retry_after_s = retry_after_s

    @property
    def rule(self) -> Rule:
        return RULES[self.outcome]


class ReplicaBreaker(Breaker):
    """When one replica is left alone. Failures are doubts or proofs; a probe decides about doubts and ends the time."""

    def __init__(self, failures: int, open_s: float, max_open_s: float, clock: Callable[[], float]) -> None:
        super().__init__(failures, open_s, max_open_s, clock)
        self.needs_probe = asyncio.Event()
        """Set while open or suspected."""
        self.on_trial = False
        """Half open, and a request is under way that will decide."""
        self._doubts = 0

    @property
    def suspected(self) -> bool:
        """Whether a probe has to find out if the replica is healthy."""
        return self.state != "open" and self.needs_probe.is_set()

    def doubt(self) -> None:
        """Record a failed request, which may be the request's own fault. No effect while open."""
        self._doubts += 1
        if self.state == "half_open" or (self.state == "closed" and self._doubts >= self._threshold):
            self.needs_probe.set()

    def fail(self) -> None:
        """Record a failed request that another replica served."""
        self._failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._failures >= self._threshold):
            self.open()

    def clear(self) -> None:
        """Record that a suspected replica answers its probe."""
        if self.state != "open":
            self._doubts = 0
            self.needs_probe.clear()

    def open(self) -> None:
        super().open()
        self.needs_probe.set()

    def half_open(self) -> None:
        """Record a successful probe. No effect unless the breaker is open."""
        if self.state == "open":
            self.state = "half_open"
            self._doubts = self._failures = 0
            self.needs_probe.clear()

    def answer(self) -> None:
        """Record a first token: enough to send more requests, but one failure is enough to act again."""
        if self.state == "half_open":
            self.state = "closed"
            self._doubts = self._failures = self._threshold - 1

    def succeed(self) -> None:
        """Record a request that was served to its end."""
        if self.state != "open":
            super().succeed()
            self._doubts = 0
            self.needs_probe.clear()


@dataclass(eq=False)
class Replica:
    """One server and its state. `url` ends with /v1."""

    url: str
    breaker: ReplicaBreaker
    in_flight: int = 0
    """Requests of this gateway in progress there."""
    max_model_len: int | None = None
    is_vllm: bool = False
    lists_model: bool = True
    tokenizer: Literal["answers", "fails", "missing"] = "answers"
    """State of its /tokenize."""
    refused: set[str] = field(default_factory=set)
    """Optional request fields that it rejects."""
    discarded_tokens: int = 0
    """Prompt and completion tokens of discarded attempts, which no key is charged for."""
    _weight: float = 1.0
    _weighed_at_s: float = 0.0
    _halving_s: float = _HALVING_S
    _logged: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By outcome: time of the last log line, and the number of failures since."""

    @property
    def root(self) -> str:
        """URL prefix of vLLM's routes outside /v1."""
        return self.url.removesuffix("/v1")

    @property
    def weight(self) -> float:
        """Factor on its load: 1, or more while it is busy."""
        age_s = self.breaker.clock() - self._weighed_at_s
        return max(1.0, self._weight * math.exp2(-age_s / self._halving_s))

    @property
    def load(self) -> float:
        """Requests in progress, weighted by how busy it is."""
        return self.weight * (self.in_flight + 1) - 1

    def note_busy(self, retry_after_s: float | None) -> None:
        """Halve its share of the requests. The share recovers over a time of the order of `retry_after_s`."""
        self._weight = min(2 * self.weight, _MAX_WEIGHT)
        self._weighed_at_s = self.breaker.clock()
        self._halving_s = _HALVING_S if retry_after_s is None else min(max(retry_after_s, 1.0), _MAX_HALVING_S)

    def log_failure(self, outcome: str, reason: str) -> None:
        """Log a failure, at most once per `_LOG_EVERY_S` and outcome."""
        now = self.breaker.clock()
        since, unlogged = self._logged.get(outcome, (now - _LOG_EVERY_S, 0))
        if now - since < _LOG_EVERY_S:
            self._logged[outcome] = since, unlogged + 1
            log.debug("replica %s %s", self.url, reason)
            return
        more = f" ({unlogged} more since the last such line)" if unlogged else ""
        log.warning("replica %s %s%s", self.url, reason, more)
        self._logged[outcome] = now, 0


@runtime_checkable
class Replicated(Protocol):
    """An engine with replicas."""

    @property
    def replicas(self) -> list[Replica]: ...


class Pool:
    """The replicas of an engine, and the choice among them."""

    def __init__(self, replicas: list[Replica], choice: Choice = "least_loaded") -> None:
        self.replicas = replicas
        self._choice = choice

    def choose(self, affinity: str = "", excluded: Collection[Replica] = ()) -> Replica | None:
        """Return the replica for a request, or None if there is none.

        Sticky choice is rendezvous hashing over the available replicas: a conversation keeps its replica while that is
        available and not much more loaded than another, and only the conversations of a lost replica move.
        """
        usable = [r for r in self.replicas if r.breaker.state != "open" and r not in excluded]
        free = [r for r in usable if not r.breaker.on_trial and not r.breaker.suspected] or usable
        if not free:
            return None
        chosen = min(free, key=lambda replica: (replica.load, random.random()))
        if affinity and self._choice == "sticky":
            kept = max(free, key=lambda replica: _score(affinity, replica.url))
            if kept.load <= _UNEVEN_FACTOR * chosen.load + _UNEVEN_REQUESTS:
                chosen = kept
        return chosen

    def check(self) -> None:
        """Raise EngineUnavailable if every breaker is open."""
        if all(replica.breaker.state == "open" for replica in self.replicas):
            raise _unavailable()

    @contextlib.contextmanager
    def occupy(self, replica: Replica) -> Iterator[None]:
        """Count a request at `replica`. For a half-open breaker it is the trial."""
        trial = replica.breaker.state == "half_open" and not replica.breaker.on_trial
        replica.breaker.on_trial |= trial
        replica.in_flight += 1
        try:
            yield
        finally:
            replica.in_flight -= 1
            if trial:
                replica.breaker.on_trial = False


class Attempts:
    """The attempts of one request: at most `retries` retries, on different replicas unless there is only one."""

    def __init__(self, pool: Pool, affinity: str, retries: int) -> None:
        self._pool = pool
        self._affinity = affinity
        self._left = retries + 1
        self._tried: list[Replica] = []
        self._failures: list[tuple[Replica, AttemptFailed]] = []
        self._unproven: list[tuple[Replica, bool]] = []
        """Replicas that failed the request, and whether after a first token; the success of another is evidence."""

    async def next(self) -> Replica:
        """Return the next replica to try. Raises the error for the client if there is none left."""
        last = self._failures[-1][1] if self._failures else None
        if self._left > 0:
            if last is not None and last.rule.again and len(self._pool.replicas) == 1:
                self._tried.clear()
                await asyncio.sleep(_BACKOFF_S * 2 ** (len(self._failures) - 1))
            replica = self._pool.choose(self._affinity, self._tried)
            if replica is not None:
                self._left -= 1
                self._tried.append(replica)
                return replica
        raise self._verdict() from last

    def fail(self, replica: Replica, failure: AttemptFailed, *, late: bool = False) -> None:
        """Record a failed attempt; `late` means after the first token."""
        self._failures.append((replica, failure))
        if failure.rule.evidence == "proof":
            self._unproven.append((replica, late))
        if failure.rule.others == "one":
            first = sum(failure.rule.others == "one" for _, failure in self._failures) == 1
            self._left = min(self._left, 1) if first else 0
        blame(replica, failure)

    def succeed(self, replica: Replica, *, begun_only: bool = False) -> None:
        """Note that the request is served by `replica`: those that failed with it before are at fault.

        With `begun_only` there is a first token only, which proves nothing against those that came as far.
        """
        proven = [(other, late) for other, late in self._unproven if not (late and begun_only)]
        self._unproven = [pair for pair in self._unproven if pair not in proven]
        for other, _ in proven:
            if other is not replica:
                other.breaker.fail()

    def _verdict(self) -> EngineError:
        failures = [failure for _, failure in self._failures]
        overloads = [failure for failure in failures if failure.outcome == "overloaded"]
        if overloads:
            waits_s = [failure.retry_after_s for failure in overloads if failure.retry_after_s is not None]
            message = "The servers of this model have no room at the moment. Try again shortly."
            return EngineOverloaded(message, min(waits_s, default=None))
        errors = [failure.error for failure in failures if failure.error is not None]
        if errors and len(errors) == len(failures):
            return errors[-1]
        if failures and all(failure.outcome in ("declined", "failed") for failure in failures):
            return EngineUnavailable("The servers of this model answer, but could not serve this request.")
        return _unavailable()


def blame(replica: Replica, failure: AttemptFailed) -> None:
    """Log a failure, and apply its rule to the replica."""
    replica.log_failure(failure.outcome, str(failure))
    if failure.rule.busy:
        replica.note_busy(failure.retry_after_s)
    if failure.rule.evidence != "none":
        replica.breaker.doubt()


def _unavailable() -> EngineUnavailable:
    return EngineUnavailable("No server of this model can answer at the moment. Try again shortly.")


def _score(affinity: str, url: str) -> bytes:
    """Return the rendezvous weight of a replica for a conversation, the same in every process."""
    return hashlib.blake2b(url.encode(), key=hashlib.sha256(affinity.encode()).digest(), digest_size=8).digest()
