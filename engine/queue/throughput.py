"""Measured throughput of an engine, the basis of predictions about its queue.

The prediction itself is in `engine.queue.fair_queue`. Raises nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_MEASURED = 64
"""Number of finished requests in the averages."""


class Pace:
    """How long requests hold their slots and what they cost, by those that finished last and those that run."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._finished: deque[tuple[float, int]] = deque()
        self._slot_s = 0.0
        self._cost = 0
        self._running = 0
        self._slots = 0
        self._since = 0.0  # sum over all that run: slots times the time of admission

    def start(self, slots: int) -> float:
        """Note that a request takes slots. Returns the time."""
        now = self._clock()
        self._running += 1
        self._slots += slots
        self._since += slots * now
        return now

    def finish(self, slots: int, started_at: float, cost: int) -> None:
        """Note that a request has given its slots back."""
        self._running -= 1
        self._slots -= slots
        self._since = self._since - slots * started_at if self._running else 0.0
        slot_s = slots * (self._clock() - started_at)
        self._finished.append((slot_s, cost))
        self._slot_s += slot_s
        self._cost += cost
        if len(self._finished) > _MEASURED:
            slot_s, cost = self._finished.popleft()
            self._slot_s -= slot_s
            self._cost -= cost

    def slot_s(self) -> float:
        """Return the slot-seconds of a request: the mean of the finished, or the mean so far of the running if more.

        The latter changes at once when requests become longer. Nothing is known, and 0.0 returned, before any ran.
        """
        finished = self._slot_s / len(self._finished) if self._finished else 0.0
        running = (self._slots * self._clock() - self._since) / self._running if self._running else 0.0
        return max(0.0, finished, running)

    def cost(self) -> float:
        """Return the mean cost of a request."""
        return max(1.0, self._cost / len(self._finished)) if self._finished else 1.0
