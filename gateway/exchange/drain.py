"""Shutting down without cutting anyone off: no new generations, running ones may finish, the rest get an error.

Knows which exchanges run; knows nothing of sockets or signals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from gateway.errors import GatewayError, Unavailable


class Interruptible(Protocol):
    """A running exchange that can be ended with an error for its client."""

    def interrupt(self, reason: GatewayError) -> None: ...


class Drain:
    """The exchanges of one app, and whether new ones may start."""

    def __init__(self) -> None:
        self.draining = False
        self.hurried = False
        self._wait: asyncio.Timeout | None = None
        self._running: set[Interruptible] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self) -> None:
        """Raise Unavailable once draining has begun. The client is to connect again: perhaps to another replica."""
        if self.draining:
            error = Unavailable(
                "The server is shutting down. Try again; another replica may answer.", retry_after_s=1.0
            )
            error.extra_headers["Connection"] = "close"
            raise error

    @contextmanager
    def track(self, exchange: Interruptible) -> Iterator[None]:
        """Count `exchange` as running inside the block."""
        self._running.add(exchange)
        self._idle.clear()
        try:
            yield
        finally:
            self._running.discard(exchange)
            if not self._running:
                self._idle.set()

    async def run(self, timeout_s: float) -> int:
        """Stop admission, wait up to `timeout_s`, interrupt what still runs. Returns how many were interrupted."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s) as self._wait:
                await self._idle.wait()
        except TimeoutError:
            rest = list(self._running)
            for exchange in rest:
                exchange.interrupt(Unavailable())
            await self._idle.wait()
            return len(rest)
        finally:
            self._wait = None
        return 0

    def hurry(self) -> None:
        """Interrupt now what still runs. The exchanges end as they do after the timeout: with an error, and settled."""
        self.hurried = True
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(asyncio.get_running_loop().time())
