"""A circuit breaker: something that failed is left alone for a while, and then tried by one caller."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal


class Breaker:
    """Opens after `failures` in a row, for `open_s`, and twice as long each time up to `max_open_s`.

    While open, `admits` is False for everyone until the time is over, and then True for one caller, whose result
    decides. `clock` returns seconds.
    """

    def __init__(
        self,
        failures: int,
        open_s: float,
        max_open_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: Literal["closed", "open", "half_open"] = "closed"
        self.clock = clock
        self._threshold = failures
        self._open_s = open_s
        self._max_open_s = open_s if max_open_s is None else max_open_s
        self._failures = 0
        self._next_open_s = open_s
        self._until = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until an open breaker may be tried."""
        return max(0.0, self._until - self.clock())

    def admits(self) -> bool:
        """Whether the caller may try. If the breaker is open, only one caller may for each time that is over."""
        if self.state == "open":
            if self.wait_s > 0:
                return False
            self._until = self.clock() + self._next_open_s  # for all callers but this one
        return True

    def open(self) -> None:
        """Leave it alone, from now."""
        self.state = "open"
        self._until = self.clock() + self._next_open_s
        self._next_open_s = min(2 * self._next_open_s, self._max_open_s)

    def fail(self) -> None:
        """Record a failure."""
        self._failures += 1
        if self._failures >= self._threshold:
            self.open()

    def succeed(self) -> None:
        """Record a success."""
        self.state = "closed"
        self._failures = 0
        self._next_open_s = self._open_s
