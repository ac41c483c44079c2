"""The clients whose jobs this process runs: their leases, and when they are closed or left to another gateway.

A client is looked at when its lease is due, and when another gateway pokes this process because it wrote to the
client's log. Errors of the store are not raised: the next look tries again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from gateway.durable.event_log import LEASE_S, RENEW_S, EventLogs, Renewal
from gateway.durable.job_queue import ClientQueue
from gateway.durable.log_writer import Reader
from gateway.errors import StoreUnavailable, Unavailable
from gateway.exchange.drain import Drain
from gateway.settings.config import JobSettings
from gateway.store import layout
from gateway.store.client import Lane
from gateway.store.stored_bytes import StoredBytes

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_S = 0.05
_GIVE_AWAY_S = 2.0
_POKED_AT_ONCE = 1000
_POKES_S = 60


class JobClients:
    """The clients of one process, by the id of their event log."""

    def __init__(self, settings: JobSettings, logs: EventLogs, store: Lane, drain: Drain) -> None:
        self.process = secrets.token_hex(8)
        self.queued = StoredBytes(store, "jobs", settings.max_queued_bytes_per_key)
        self.queues: dict[str, ClientQueue] = {}
        self.readers: dict[str, Reader] = {}
        """The newest stream of each client in this process."""
        self._settings = settings
        self._logs = logs
        self._store = store
        self._drain = drain
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._renewed_at = 0.0

    async def poke(self, process: str, log_id: str) -> None:
        """Make a process look at a client's log at once."""
        queue = self.queues.get(log_id)
        if process == self.process and queue is not None:
            self.spawn(self.look(queue))
            return
        key = layout.process(process, "pokes")
        with suppress(StoreUnavailable):
            await self._store.run_in_order([("SADD", key, log_id), ("EXPIRE", key, _POKES_S)])

    def watch(self) -> None:
        """Look after the clients for as long as there are any."""
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Look after the clients several times a second."""
        loop = asyncio.get_running_loop()
        while self.queues or self.readers:
            await asyncio.sleep(_LOOK_S)
            now = loop.time()
            for queue in list(self.queues.values()):
                reason = queue.reason_to_close(now, reading=queue.writer.log_id in self.readers)
                if reason == "left":
                    self.spawn(self._close_if_left(queue))
                elif reason is not None:
                    self.spawn(self._close(queue, reason))
                elif self._drain.draining and not queue.busy:
                    self.spawn(self._give_away(queue))
            if self._drain.draining:
                for log_id, reader in self.readers.items():
                    if log_id not in self.queues:
                        reader.stop("shutdown")
            if self.queues:
                await self._look_where_due(now)

    async def _look_where_due(self, now: float) -> None:
        due = set(self.queues) if now - self._renewed_at >= RENEW_S else set()
        if due:
            self._renewed_at = now
        with suppress(StoreUnavailable):
            due |= set(await self._store.run("SPOP", layout.process(self.process, "pokes"), _POKED_AT_ONCE))
        await asyncio.gather(*(self.look(queue) for log_id in due if (queue := self.queues.get(log_id))))

    async def look(self, queue: ClientQueue) -> None:
        """Renew the lease on a client's log, and act on what other gateways wrote to it."""
        queue.look_again = True
        if queue.looking:
            return
        queue.looking = True
        try:
            while queue.look_again and not queue.closing:
                queue.look_again = False
                version, finished = queue.version, queue.finished
                renewal = await self._logs.renew(queue.writer, self.ttl_s, known=len(queue.waiting))
                if queue.closing:
                    return
                if renewal is None:
                    await self._close(queue, "lost")
                elif renewal.closed:
                    await self._close(queue, renewal.closed)
                else:
                    if version == queue.version:
                        self._note_reader(queue, renewal)
                    queue.add(renewal.queue)
                    await self._count(queue)
                    # Where the queue got shorter while it was read, its end may have been missed.
                    queue.look_again = queue.look_again or renewal.more or finished != queue.finished
        except StoreUnavailable:
            return  # the next look is due soon
        except Exception:  # the leases of all other clients depend on the task that looks
            log.exception("the jobs of a client could not be checked")
        finally:
            queue.looking = False

    async def _count(self, queue: ClientQueue) -> None:
        """Store how many bytes wait in a client's queue, because submitting only adds to the number."""
        size_bytes = sum(queue.bytes.values())
        if size_bytes:
            await self.queued.note(queue.writer.owner, queue.writer.log_id, size_bytes, self.ttl_s)
        elif queue.counted_bytes:
            await self.queued.release(queue.writer.owner, queue.writer.log_id)
        queue.counted_bytes = size_bytes

    def _note_reader(self, queue: ClientQueue, renewal: Renewal) -> None:
        if renewal.reader == queue.local_reader:
            return
        queue.remote_until = asyncio.get_running_loop().time() + renewal.reader_left_s
        if (reader := self.readers.get(queue.writer.log_id)) is not None:
            reader.stop("replaced")

    async def _close_if_left(self, queue: ClientQueue) -> None:
        """Cancel a client's jobs, unless its stream is now on another gateway."""
        await self.look(queue)
        now = asyncio.get_running_loop().time()
        if not queue.looking and queue.reason_to_close(now, reading=queue.writer.log_id in self.readers) == "left":
            await self._close(queue, "left")

    async def _close(self, queue: ClientQueue, reason: str) -> None:
        """Cancel a client's jobs, and end its stream."""
        if queue.closing:
            return
        queue.closing = True
        reader = self._forget(queue)
        if not queue.writer.lost:
            with suppress(StoreUnavailable):
                await self._logs.close_log(queue.writer.log_id, reason, queue.writer)
        await queue.cancel()
        self._end(queue, reader, reason)
        if reason != "lost":
            await self._forget_bytes(queue)

    async def _give_away(self, queue: ClientQueue) -> None:
        """Release a client and its waiting jobs to the next gateway that opens its stream."""
        if queue.closing:
            return
        queue.closing = True
        reader = self._forget(queue)
        await queue.stop(Unavailable("The server shut down before the job was done."))
        await queue.writer.flush(_GIVE_AWAY_S)
        while queue.looking:  # a lease that is being renewed would outlive this
            await asyncio.sleep(_LOOK_S / 10)
        with suppress(StoreUnavailable):
            await self._logs.renew(queue.writer, self.ttl_s, lease_s=0)
        self._end(queue, reader, "shutdown")

    def _forget(self, queue: ClientQueue) -> Reader | None:
        """Remove a client. Returns its stream in this process."""
        del self.queues[queue.writer.log_id]
        return self.readers.get(queue.writer.log_id)

    async def _forget_bytes(self, queue: ClientQueue) -> None:
        """Release the bytes of a log and a queue that are closed and not handed over."""
        with suppress(StoreUnavailable):
            await self.queued.release(queue.writer.owner, queue.writer.log_id)
            await self._logs.release_bytes(queue.writer)

    def _end(self, queue: ClientQueue, reader: Reader | None, reason: str) -> None:
        if reader is not None:
            reader.stop(reason)
        queue.writer.lost = True
        self._logs.release(queue.writer)

    @property
    def ttl_s(self) -> float:
        return self._settings.resume_s + LEASE_S

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Leave all clients to other gateways, and end what runs."""
        if self._watcher is not None:
            self._watcher.cancel()
        await asyncio.gather(*(self._give_away(queue) for queue in list(self.queues.values())))
        for reader in list(self.readers.values()):
            reader.stop("shutdown")
        await asyncio.gather(*self._tasks, return_exceptions=True)
