"""Waits without sleeping: for a condition, or by a clock that the test moves.

Example:

    await until(lambda: server.started)
    clock = FakeClock()
    clock.advance(60.0)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class FakeClock:
    """A clock that only moves when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for a condition that has no event of its own. Raises TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)
