"""Work that continues without a client: counted by the drain as a running exchange, and ended when the app closes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from engine.base import EngineError
from gateway.errors import GatewayError, InternalError, from_engine
from gateway.exchange.drain import Drain

log = logging.getLogger(__name__)


class Detached:
    """One piece of work that no client waits for, as the drain sees it. `task` does it."""

    def __init__(self, task: asyncio.Task[Any] | None = None) -> None:
        self.task = task
        self.reason: GatewayError | None = None
        self._begun = task is not None

    def interrupt(self, reason: GatewayError) -> None:
        """End the work; the first reason counts."""
        if self.reason is None:
            self.reason = reason
            if self._begun and self.task is not None:
                self.task.cancel()

    def begin(self) -> None:
        """Note that the task runs. Work that was interrupted before that begins all the same, to end in its own way."""
        self._begun = True
        if self.reason is not None and self.task is not None:
            self.task.cancel()


class Background:
    """The detached work of one kind."""

    def __init__(self, drain: Drain) -> None:
        self._drain = drain
        self._running: set[Detached] = set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, exchange: Detached, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` as `exchange`."""

        async def run() -> None:
            exchange.begin()
            with self._drain.track(exchange), suppress(asyncio.CancelledError):
                await work()

        exchange.task = asyncio.create_task(run())
        self._running.add(exchange)
        exchange.task.add_done_callback(lambda _: self._running.discard(exchange))

    async def close(self, reason: GatewayError) -> None:
        """End all of it, and wait until it has."""
        running = list(self._running)
        for exchange in running:
            exchange.interrupt(reason)
        await asyncio.gather(*(exchange.task for exchange in running if exchange.task), return_exceptions=True)


def told(error: Exception) -> GatewayError:
    """The client's error for `error`."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, EngineError):
        return from_engine(error)
    log.error("request failed", exc_info=error)
    return InternalError()
