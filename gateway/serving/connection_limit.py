"""How many clients may be connected, and whose connection is closed where that is too many.

Each connection takes a file descriptor. Where none is left, accepting a client fails, and so does everything else:
the store, engines, probes. The bound is below that, and connections are in two groups:

    waiting    no request of a known key runs: new, idle, half a request sent, or an answer without a key
    working    a request of a known key runs

At the bound, a new connection takes the place of the one that has been waiting longest. Clients without a key can't
close working connections. An eighth of the bound is never given to working ones: there probes are answered, and clients
get an error that there is no room. One key gets at most three times as many of the other places as stay free, so that
there is always room for another key. Raises Overloaded and RateLimitExceeded.
"""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter, OrderedDict
from typing import Protocol

from gateway.clock import Clock
from gateway.errors import Overloaded, RateLimitExceeded
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_CLIENT_SHARE = 2
"""Clients get one of so many descriptors. A stream to a remote engine takes another one for each client."""
_WAITING_SHARE = 8
_PER_FREE_PLACE = 3
"""One key alone gets three quarters of the places; two get three sevenths each, and a seventh stays free."""
_WARN_EVERY_S = 60.0


class Closable(Protocol):
    """A connection that can be closed at once."""

    def abort(self) -> None: ...


class ConnectionLimit:
    """The open connections of one server, `most` at once."""

    def __init__(self, most: int, metrics: Metrics, clock: Clock = time.monotonic) -> None:
        self._most = most
        self._metrics = metrics
        metrics.connections.set_function(lambda: self.open)
        self._clock = clock
        self._waiting: OrderedDict[Closable, None] = OrderedDict()
        """The one that has been waiting longest is first."""
        self._working: dict[Closable, str] = {}
        """By the id of the key."""
        self._of_key: Counter[str] = Counter()
        self._most_working = most - max(1, most // _WAITING_SHARE)
        self._warned_at: float | None = None

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._waiting) + len(self._working)

    def add(self, connection: Closable) -> None:
        """Count a new connection, and close another one if that makes too many."""
        if self.open >= self._most:
            longest, _ = self._waiting.popitem(last=False)  # there is one: not all may be working
            longest.abort()
            self._metrics.connections_closed.inc()
            self._warn()
        self._waiting[connection] = None

    def discard(self, connection: Closable) -> None:
        """Forget a connection that is closed."""
        self.end(connection)
        self._waiting.pop(connection, None)

    def begin(self, connection: Closable, key_id: str) -> None:
        """Note that a request of a known key runs. Raises Overloaded, and RateLimitExceeded if the key has too many."""
        if connection not in self._waiting:
            return
        free = self._most_working - len(self._working)
        if free == 0:
            raise Overloaded("The server has too many connections. Try again shortly.")
        if self._of_key[key_id] >= free * _PER_FREE_PLACE:
            raise RateLimitExceeded(
                f"This API key has requests on {self._of_key[key_id]} connections, and others need the rest. "
                "Wait until some have ended.",
                code="too_many_connections",
                retry_after_s=1.0,
            )
        del self._waiting[connection]
        self._working[connection] = key_id
        self._of_key[key_id] += 1

    def end(self, connection: Closable) -> None:
        """Note that no request runs any more."""
        key_id = self._working.pop(connection, None)
        if key_id is not None:
            self._waiting[connection] = None
            self._of_key[key_id] -= 1
            if not self._of_key[key_id]:
                del self._of_key[key_id]

    def _warn(self) -> None:
        now = self._clock()
        if self._warned_at is None or now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            log.warning("%d clients are connected, as many as may be: those that wait longest are closed", self._most)


def most_connections(wanted: int) -> int:
    """The number of clients that may be connected: `wanted`, or half of the files that this process may open.

    Raises the soft limit of open files as far as that helps: common defaults are 1024 and, for the hard limit, more
    than 500,000.
    """
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted * _CLIENT_SHARE
    if _is_less(files, needed):
        files = hard if _is_less(hard, needed) else needed
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    if not _is_less(files, needed):
        return wanted
    log.info("at most %d clients may be connected: this process may open %d files", files // _CLIENT_SHARE, files)
    return max(_WAITING_SHARE, files // _CLIENT_SHARE)


def _is_less(limit: int, number: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < number
