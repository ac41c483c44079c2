"""The replicas of a remote engine: which one a request goes to, when to leave one alone, when to try another.

A `Breaker` per replica opens after consecutive failures, for a time that doubles. Whoever probes the replica then
makes it half open: it gets one request at a time while others are well, until a request has succeeded there. `Pool`
chooses the replica with the fewest requests of ours, or the one that a conversation is kept to. `Attempts` says where
a request may be tried next, and with which error it has failed for good. Leaves out all I/O, and the load that others
put on the same replicas. Fails with the errors of `engine.base`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from engine.base import EngineOverloaded, EngineUnavailable

log = logging.getLogger(__name__)

Choice = Literal["least_loaded", "sticky"]

_BACKOFF_S = 0.1
"""Pause before the only replica is tried again; doubles. A server that was just restarted listens within seconds."""
_UNEVEN_FACTOR, _UNEVEN_REQUESTS = 2, 8
"""A conversation leaves its replica when that has more than so many times the least load, plus so many requests."""


class AttemptFailed(Exception):
    """One replica could not serve a request. The message is for the log; clients see what `Attempts` raises."""

    def __init__(
        self,
        reason: str,
        *,
        overloaded: bool = False,
        misconfigured: bool = False,
        elsewhere: bool = True,
        suspicious: bool = False,
        again: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.overloaded = overloaded
        """It lives, but has no room: no reason to open its breaker."""
        self.misconfigured = misconfigured
        """It will go on refusing until an operator mends something: its breaker opens at once."""
        self.elsewhere = elsewhere
        """Another replica may serve the request."""
        self.suspicious = suspicious
        """The request itself may have broken it: only one more replica is put at risk."""
        self.again = again
        """The same replica may serve it a moment later."""
        self.retry_after_s = retry_after_s


class Breaker:
    """When one replica is left alone. `clock` returns seconds."""

    def __init__(self, failures: int, open_s: float, max_open_s: float, clock: Callable[[], float]) -> None:
        """Open after `failures` in a row, for `open_s`, twice as long each time up to `max_open_s`."""
        self.state: Literal["closed", "open", "half_open"] = "closed"
        self.opened = asyncio.Event()
        """Set while open, for whoever probes."""
        self.on_trial = False
        """Half open, and a request is under way that will decide."""
        self._threshold = failures
        self._open_s = open_s
        self._max_open_s = max_open_s
        self._clock = clock
        self._failures = 0
        self._next_open_s = open_s
        self._until = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until an open breaker should be probed."""
        return max(0.0, self._until - self._clock())

    def fail(self) -> None:
        """Note a failed request. Those of an open breaker's past change nothing."""
        self._failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._failures >= self._threshold):
            self.open()

    def open(self) -> None:
        """Leave the replica alone for a while, from now."""
        self.state = "open"
        self.opened.set()
        self._until = self._clock() + self._next_open_s
        self._next_open_s = min(2 * self._next_open_s, self._max_open_s)

    def half_open(self) -> None:
        """Note that the replica answers a probe; of one that was never open there is nothing new in it."""
        if self.state == "open":
            self.state = "half_open"
            self.opened.clear()

    def answer(self) -> None:
        """Note a first token: enough to send more requests, but one failure opens it again."""
        if self.state == "half_open":
            self.state = "closed"
            self._failures = self._threshold - 1

    def succeed(self) -> None:
        """Note a request that was served to its end."""
        if self.state != "open":
            self.state = "closed"
            self._failures = 0
            self._next_open_s = self._open_s


@dataclass(eq=False)
class Replica:
    """One upstream server, and what has been learned about it. `url` ends with /v1."""

    url: str
    breaker: Breaker
    in_flight: int = 0
    """Requests of ours that it works on."""
    max_model_len: int | None = None
    is_vllm: bool = False
    tokenizes: bool = True
    """Has /tokenize, as far as we know."""
    refused: set[str] = field(default_factory=set)
    """Optional request fields that it does not take."""

    @property
    def root(self) -> str:
        """Where vLLM has the routes that OpenAI does not know."""
        return self.url.removesuffix("/v1")


@runtime_checkable
class Replicated(Protocol):
    """An engine whose work is done by replicas."""

    @property
    def replicas(self) -> list[Replica]: ...


class Pool:
    """All replicas of an engine."""

    def __init__(self, replicas: list[Replica], choice: Choice = "least_loaded") -> None:
        self.replicas = replicas
        self._choice = choice

    def choose(self, affinity: str = "", excluded: Collection[Replica] = ()) -> Replica | None:
        """Return the replica for a request, or None when there is none to try.

        Sticky choice is rendezvous hashing over the replicas that are well: a conversation keeps its replica for as
        long as that is well and not much more loaded than another, and only the conversations of a lost one move.
        """
        usable = [r for r in self.replicas if r.breaker.state != "open" and r not in excluded]
        free = [r for r in usable if not r.breaker.on_trial] or usable
        if not free:
            return None
        chosen = min(free, key=lambda replica: (replica.in_flight, random.random()))
        if affinity and self._choice == "sticky":
            kept = max(free, key=lambda replica: _score(affinity, replica.url))
            if kept.in_flight <= _UNEVEN_FACTOR * chosen.in_flight + _UNEVEN_REQUESTS:
                chosen = kept
        return chosen

    @contextlib.contextmanager
    def occupy(self, replica: Replica) -> Iterator[None]:
        """Count a request of ours at `replica`; at a half-open one it is the trial."""
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
    """Where one request may be tried: at no replica twice, unless there is only one, and `retries` times more."""

    def __init__(self, pool: Pool, affinity: str, retries: int) -> None:
        self._pool = pool
        self._affinity = affinity
        self._left = retries + 1
        self._tried: list[Replica] = []
        self._failures: list[AttemptFailed] = []

    async def next(self) -> Replica:
        """Return the replica to try now. Raises EngineOverloaded, EngineUnavailable when there is none left."""
        last = self._failures[-1] if self._failures else None
        if self._left > 0 and (last is None or last.elsewhere):
            if last is not None and last.again and len(self._pool.replicas) == 1:
                self._tried.clear()
                await asyncio.sleep(_BACKOFF_S * 2 ** (len(self._failures) - 1))
            replica = self._pool.choose(self._affinity, self._tried)
            if replica is not None:
                self._left -= 1
                self._tried.append(replica)
                return replica
        raise self._verdict() from last

    def fail(self, replica: Replica, failure: AttemptFailed) -> None:
        """Note that the request has failed at `replica`."""
        self._failures.append(failure)
        if failure.suspicious:
            first = sum(failure.suspicious for failure in self._failures) == 1
            self._left = min(self._left, 1) if first else 0
        blame(replica, failure)

    def _verdict(self) -> EngineOverloaded | EngineUnavailable:
        overloads = [failure for failure in self._failures if failure.overloaded]
        if overloads:
            waits_s = [failure.retry_after_s for failure in overloads if failure.retry_after_s is not None]
            message = "The servers of this model have no room at the moment. Try again shortly."
            return EngineOverloaded(message, min(waits_s, default=None))
        return EngineUnavailable("No server of this model can answer at the moment. Try again shortly.")


def blame(replica: Replica, failure: AttemptFailed) -> None:
    """Log a failure, and let the breaker of the replica know."""
    log.warning("replica %s %s", replica.url, failure)
    if failure.overloaded:
        return
    if failure.misconfigured and replica.breaker.state != "open":
        replica.breaker.open()
    else:
        replica.breaker.fail()


def _score(affinity: str, url: str) -> bytes:
    """Return the weight of a replica for a conversation, the same in every process."""
    return hashlib.blake2b(url.encode(), key=hashlib.sha256(affinity.encode()).digest(), digest_size=8).digest()
