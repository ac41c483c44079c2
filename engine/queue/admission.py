"""The queue in front of an engine: what does not fit into its batch waits here, where it can be fair.

`QueuedEngine` is an `Engine` around another. It lets as many sequences through as the engine runs at once; the rest
wait in a `FairQueue`, by flow and class of priority. Past it, the engine's own queue stays empty. A request that is
cancelled while it waits costs nothing; one for which there is room passes without a turn of the event loop.

It lives and dies with one engine: closing it fails those that wait with EngineUnavailable. Refuses with
EngineOverloaded, at once where there is no place or no hope, else after `max_wait_s`. A request that waited is asked
for its `recheck` before it runs; what that raises is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Literal

from engine.base import Delta, Engine, EngineUnavailable, PoolingRequest, Prepared, Request
from engine.queue.fair_queue import FairQueue, Ticket
from engine.wrapper import EngineWrapper

Policy = Literal["fair", "fifo"]


def spare_slots(slots: int) -> int:
    """Return the number of slots that one flow leaves free for others: an eighth, and at least one of several."""
    return min(slots - 1, max(1, slots // 8))


class QueuedEngine(EngineWrapper):
    """An engine with a fair queue in front of it."""

    def __init__(
        self,
        engine: Engine,
        *,
        policy: Policy = "fair",
        max_queued_requests: int = 1024,
        max_wait_s: float = 300.0,
        in_flight_per_flow: int | None = None,
        max_in_flight: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_in_flight` None means as many sequences as the engine runs at once, or no limit if that is unknown.

        `in_flight_per_flow` None leaves `spare_slots` to others while others are active, so that a new flow does not
        wait for a long generation of a busy one; a flow that is alone may use the whole batch. `fifo` is for
        comparison: one queue for all, without priority classes and limits per flow.
        """
        self._engine = engine
        self._fair = policy == "fair"
        self._max_queued_requests = max_queued_requests
        self._max_wait_s = max_wait_s
        self._in_flight_per_flow = in_flight_per_flow
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._queue: FairQueue | None = None

    @property
    def wrapped(self) -> Engine:
        """The engine behind the queue."""
        return self._engine

    @property
    def unfinished_requests(self) -> int:
        return self._engine.unfinished_requests + self.queued_requests

    @property
    def queued_requests(self) -> int:
        """Requests that wait for admission."""
        return self._queue.waiting if self._queue is not None else 0

    @property
    def longest_wait_s(self) -> float:
        """Seconds since the oldest waiting request arrived."""
        since = self._queue.waiting_since() if self._queue is not None else None
        return 0.0 if since is None else self._clock() - since

    async def start(self) -> None:
        await self._engine.start()
        slots = self._max_in_flight or self._engine.max_num_seqs
        spare = spare_slots(slots) if self._in_flight_per_flow is None and slots is not None else 0
        self._queue = FairQueue(
            slots=slots,
            flow_slots=self._in_flight_per_flow,
            spare_slots=spare,
            max_waiting=self._max_queued_requests,
            max_wait_s=self._max_wait_s,
            clock=self._clock,
            fair=self._fair,
        )

    async def prepare(self, request: Request) -> Prepared:
        prepared = await self._engine.prepare(request)
        prepared.flow, prepared.priority = request.flow, request.priority
        if isinstance(request, PoolingRequest):
            prepared.n = len(request.inputs)
        return prepared

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        queue = self._open()
        ticket = queue.enter(prepared)
        try:
            if ticket.admitted_at is None:
                await self._wait(queue, ticket)
            async with contextlib.aclosing(self._engine.generate(prepared)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            queue.leave(ticket)

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        queue = self._open()
        ticket = queue.enter(prepared)
        try:
            if ticket.admitted_at is None:
                await self._wait(queue, ticket)
            return await self._engine.pool(prepared)
        finally:
            queue.leave(ticket)

    def _open(self) -> FairQueue:
        if self._queue is None:
            raise EngineUnavailable()
        return self._queue

    async def _wait(self, queue: FairQueue, ticket: Ticket) -> None:
        ticket.turn = asyncio.get_running_loop().create_future()
        prepared = ticket.prepared
        prepared.waiting = ticket
        try:
            async with asyncio.timeout(self._max_wait_s):
                await ticket.turn
        except TimeoutError:
            if ticket.admitted_at is None:  # it may have been its turn in the very same moment
                raise queue.overdue(ticket) from None
        finally:
            prepared.waiting = None
            prepared.queue_s += self._clock() - ticket.entered_at
        if ticket.admitted_at is None:  # woken by close
            raise EngineUnavailable()
        if prepared.recheck is not None:
            await prepared.recheck()

    async def close(self) -> None:
        queue, self._queue = self._queue, None
        for ticket in queue.waiters() if queue is not None else ():
            if ticket.turn is not None and not ticket.turn.done():
                ticket.turn.set_result(None)
        await self._engine.close()
