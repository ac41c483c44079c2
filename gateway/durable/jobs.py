"""Submit and stream: a client's one stream of events, and the jobs that are submitted for it by other requests.

A client is an id of its own choice under an API key; to other keys it does not exist. Opening its stream registers
it: the gateway that does writes the client's event log and runs its jobs. The stream itself is a reader of that log,
so it can be dropped and taken up again on any gateway; a newer stream takes the place of an older one. Nobody reading
for `resume_s` means that the client has left: its running job is cancelled and those that wait are dropped. A client
whose gateway is gone, or drains, is taken over by the gateway that its stream comes to.

What one gateway does for a client of another (submit, leave) is written to the store; a poke saves the other from
waiting until it looks there by itself. Fails with NotFound, RateLimitExceeded, Unavailable and StoreUnavailable.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from gateway.access.auth import Principal
from gateway.durable.event_log import (
    LEASE_S,
    RENEW_S,
    EventLogs,
    LogClosed,
    LogGone,
    LogOrphaned,
    LogRefused,
    Opened,
    Renewal,
)
from gateway.durable.job_queue import ClientQueue, Job, RunJob, event_frame
from gateway.durable.log_writer import Reader, log_keys
from gateway.errors import GatewayError, NotFound, RateLimitExceeded, StoreUnavailable, Unavailable, from_store
from gateway.exchange.drain import Drain
from gateway.settings.config import JobSettings
from gateway.store.client import Lane, Script
from gateway.store.stored_bytes import StoredBytes
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_S = 0.05
_GIVE_AWAY_S = 2.0
_AHEAD = 1000
"""Events that a client may have that are not stored yet. One that names a later number has the log of another time."""
_POKED_AT_ONCE = 1000
_POKES_S = 60
_SUBMIT = Script("job_submit")

Renew = Callable[[Principal], Awaitable[Principal]]
"""Returns a caller as it is now. Raises GatewayError if its key is no longer good."""


class Jobs:
    """See the module."""

    def __init__(self, settings: JobSettings, logs: EventLogs, store: Lane, drain: Drain, metrics: Metrics) -> None:
        self._settings = settings
        self._logs = logs
        self._store = store
        self._queued = StoredBytes(store, "jobs", settings.max_queued_bytes_per_key)
        self._drain = drain
        self._metrics = metrics
        self._process = secrets.token_hex(8)
        self._queues: dict[str, ClientQueue] = {}
        self._readers: dict[str, Reader] = {}
        """The newest stream of each client in this process."""
        self._streams: set[Reader] = set()
        """All that are open or on their way, older ones of a client included."""
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._renewed_at = 0.0

    async def stream(
        self, principal: Principal, client_id: str, after: int | None, run: RunJob, renew: Renew
    ) -> AsyncGenerator[bytes, None]:
        """Register the client, and yield its events behind number `after`, or those of its unfinished jobs.

        `renew` is asked before the client is registered again. Raises what that does, RateLimitExceeded, and
        Unavailable while the store is away.
        """
        reader = Reader(_log_id(principal, client_id), principal.key_id, after or 0, secrets.token_hex(8))
        self._check_room(reader)
        try:
            opened = await self._attach(reader, run)
            resumed = opened.how != "opened" and reader.after <= opened.number + _AHEAD
            if after is None:
                reader.after = opened.since
            elif not resumed:
                reader.after = opened.number
            yield _hello(reader, client_id, resumed)
            while not reader.stopped:
                lost = False
                try:
                    async with aclosing(self._logs.read(reader)) as frames:
                        async for frame in frames:
                            yield frame
                except LogGone:
                    lost = True
                except LogClosed as closed:
                    if str(closed) == "closed":
                        reader.stop("closed")
                except LogOrphaned:
                    pass
                if not reader.stopped:
                    await renew(principal)
                    opened = await self._attach(reader, run)
                    if lost or opened.how == "opened":
                        reader.after = opened.number
                        yield _hello(reader, client_id, resumed=False)
            yield event_frame("end", {"reason": reader.stopped})
        except LogRefused:
            raise RateLimitExceeded(
                "The streams of this API key keep as many bytes as 'resume.max_bytes_per_key' allows. Close one first.",
                code="too_many_streams",
                retry_after_s=self._ttl_s,
            ) from None
        except StoreUnavailable as error:
            raise from_store(error) from None
        finally:
            self._detach(reader)

    def _check_room(self, reader: Reader) -> None:
        most = self._settings.max_streams_per_key
        clients = {other.log_id for other in self._streams if other.owner == reader.owner}
        if len(clients) >= most and reader.log_id not in clients:
            raise RateLimitExceeded(
                f"This API key has {most} streams of jobs open, which is as many as it may. Close one first.",
                code="too_many_streams",
                retry_after_s=1.0,
            )
        self._streams.add(reader)

    async def _attach(self, reader: Reader, run: RunJob) -> Opened:
        """Make `reader` the stream of its client, and this process the one that runs its jobs if there is no other."""
        # A client that leaves meanwhile must not leave a log behind that nobody writes.
        attaching = self._spawn(self._attach_in_turn(reader, run))
        try:
            return await asyncio.shield(attaching)
        except asyncio.CancelledError:
            attaching.add_done_callback(_log_unexpected)
            raise

    async def _attach_in_turn(self, reader: Reader, run: RunJob) -> Opened:
        self._drain.admit()
        async with self._opening.setdefault(reader.log_id, asyncio.Lock()):
            held = self._queues.get(reader.log_id)
            opened, writer = await self._logs.open(
                reader,
                process=self._process,
                held=None if held is None else held.writer,
                max_bytes=self._settings.max_log_bytes,
                ttl_s=self._ttl_s,
                payer=reader.owner,
            )
            queue = self._queues.get(reader.log_id)
            if writer is not None:
                if queue is not None:  # its log was closed, or another gateway's for a while
                    queue.closing = True
                    self._spawn(queue.cancel())
                now = asyncio.get_running_loop().time()
                queue = ClientQueue(writer, self._settings, run, self._drain, self._metrics, now)
                self._queues[reader.log_id] = queue
            if queue is not None:
                if writer is None:
                    opened = opened._replace(number=queue.writer.last, since=queue.since)
                queue.local_reader = reader.token
                queue.version += 1
            older = self._readers.get(reader.log_id)
            if older is not None and older is not reader:
                older.stop("replaced")
            if not reader.stopped:  # else it has left again
                self._readers[reader.log_id] = reader
            if self._watcher is None or self._watcher.done():
                self._watcher = asyncio.create_task(self._watch())
            if writer is not None and queue is not None:
                queue.take_over(opened)
                if opened.queue:
                    self._spawn(self._look(queue))  # for the rest of them
        if opened.process != self._process:
            await self._poke(opened.process, reader.log_id)
        return opened

    def _detach(self, reader: Reader) -> None:
        reader.stop("left")
        self._streams.discard(reader)
        if self._readers.get(reader.log_id) is reader:
            del self._readers[reader.log_id]
            if reader.log_id not in self._queues:
                self._spawn(self._tell_left(reader))

    async def _tell_left(self, reader: Reader) -> None:
        with suppress(StoreUnavailable):
            process = await self._logs.leave(reader)
            if process is not None:
                await self._poke(process, reader.log_id)

    async def submit(self, client_id: str, job: Job) -> int:
        """Put a job at the end of its client's queue. Returns how many are before it.

        Raises NotFound while the client has no stream, RateLimitExceeded when its queue is full, StoreUnavailable.
        """
        self._drain.admit()
        key_id, log_id = job.principal.key_id, _log_id(job.principal, client_id)
        log, _, queue = log_keys(log_id)
        most, text = self._settings.max_queued_per_client, job.text()
        size_bytes = len(text.encode())
        if not await self._queued.add(key_id, log_id, size_bytes, self._ttl_s):
            raise RateLimitExceeded(
                f"The jobs of this API key that wait take as many bytes as 'jobs.max_queued_bytes_per_key' allows, "
                f"{self._queued.most_bytes}. Wait until one is done.",
                code="job_queue_full",
                retry_after_s=1.0,
            )
        outcome, before, process = await self._store.run(*_SUBMIT.call([log, queue], [text, most]))
        if outcome != "queued":
            await self._queued.take(key_id, log_id, size_bytes, self._ttl_s)
        if outcome == "absent":
            raise _not_connected(client_id)
        if outcome == "full":
            raise RateLimitExceeded(
                f"The client {client_id!r} has {most} jobs, which is as many as it may. Wait until one is done.",
                code="job_queue_full",
                retry_after_s=1.0,
            )
        await self._poke(process, log_id)
        return int(before)

    async def holds(self, job: Job) -> bool:
        """Return whether a job that runs here is still this gateway's. Raises StoreUnavailable if that is unknown."""
        for queue in self._queues.values():
            if queue.waiting and queue.waiting[0] is job:
                return not queue.closing and await queue.writer.holds()
        return False

    async def leave(self, principal: Principal, client_id: str) -> None:
        """Close a client's stream, on whichever gateway it is, and cancel its jobs.

        Raises NotFound and StoreUnavailable.
        """
        log_id = _log_id(principal, client_id)
        process = await self._logs.close_log(log_id, "closed")
        if process is None:
            raise _not_connected(client_id)
        await self._poke(process, log_id)

    async def _poke(self, process: str, log_id: str) -> None:
        """Have a process look at a client's log at once."""
        queue = self._queues.get(log_id)
        if process == self._process and queue is not None:
            self._spawn(self._look(queue))
            return
        key = _pokes_key(process)
        with suppress(StoreUnavailable):
            await self._store.run_in_order([("SADD", key, log_id), ("EXPIRE", key, _POKES_S)])

    async def _watch(self) -> None:
        """Look after the clients of this process, several times a second while there are any."""
        loop = asyncio.get_running_loop()
        while self._queues or self._readers:
            await asyncio.sleep(_LOOK_S)
            now = loop.time()
            for queue in list(self._queues.values()):
                reason = queue.reason_to_close(now, reading=queue.writer.log_id in self._readers)
                if reason == "left":
                    self._spawn(self._close_if_left(queue))
                elif reason is not None:
                    self._spawn(self._close(queue, reason))
                elif self._drain.draining and not queue.busy:
                    self._spawn(self._give_away(queue))
            if self._drain.draining:
                for log_id, reader in self._readers.items():
                    if log_id not in self._queues:
                        reader.stop("shutdown")
            if self._queues:
                await self._look_where_due(now)

    async def _look_where_due(self, now: float) -> None:
        due = set(self._queues) if now - self._renewed_at >= RENEW_S else set()
        if due:
            self._renewed_at = now
        with suppress(StoreUnavailable):
            due |= set(await self._store.run("SPOP", _pokes_key(self._process), _POKED_AT_ONCE))
        await asyncio.gather(*(self._look(queue) for log_id in due if (queue := self._queues.get(log_id))))

    async def _look(self, queue: ClientQueue) -> None:
        """Renew the lease on a client's log, and see to what others have done to it."""
        queue.look_again = True
        if queue.looking:
            return
        queue.looking = True
        try:
            while queue.look_again and not queue.closing:
                queue.look_again = False
                version, finished = queue.version, queue.finished
                renewal = await self._logs.renew(queue.writer, self._ttl_s, known=len(queue.waiting))
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
        except Exception:  # the leases of all other clients hang on the task that looks
            log.exception("the jobs of a client can't be looked after")
        finally:
            queue.looking = False

    async def _count(self, queue: ClientQueue) -> None:
        """Say how many bytes wait in a client's queue: those who submit only ever add."""
        size_bytes = sum(queue.bytes.values())
        if size_bytes:
            await self._queued.note(queue.writer.owner, queue.writer.log_id, size_bytes, self._ttl_s)
        elif queue.counted_bytes:
            await self._queued.release(queue.writer.owner, queue.writer.log_id)
        queue.counted_bytes = size_bytes

    def _note_reader(self, queue: ClientQueue, renewal: Renewal) -> None:
        if renewal.reader == queue.local_reader:
            return
        queue.remote_until = asyncio.get_running_loop().time() + renewal.reader_left_s
        if (reader := self._readers.get(queue.writer.log_id)) is not None:
            reader.stop("replaced")

    async def _close_if_left(self, queue: ClientQueue) -> None:
        """Cancel a client's jobs, unless its stream is on another gateway by now."""
        await self._look(queue)
        now = asyncio.get_running_loop().time()
        if not queue.looking and queue.reason_to_close(now, reading=queue.writer.log_id in self._readers) == "left":
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
        """Leave a client to the gateway that its stream comes to next, with the jobs that wait."""
        if queue.closing:
            return
        queue.closing = True
        reader = self._forget(queue)
        await queue.stop(Unavailable("The server shut down before the job was done."))
        await queue.writer.flush(_GIVE_AWAY_S)
        while queue.looking:  # a lease that is being renewed would outlive this
            await asyncio.sleep(_LOOK_S / 10)
        with suppress(StoreUnavailable):
            await self._logs.renew(queue.writer, self._ttl_s, lease_s=0)
        self._end(queue, reader, "shutdown")

    def _forget(self, queue: ClientQueue) -> Reader | None:
        """Take a client out of the books. Returns its stream in this process."""
        del self._queues[queue.writer.log_id]
        return self._readers.get(queue.writer.log_id)

    async def _forget_bytes(self, queue: ClientQueue) -> None:
        """Give back the room of a log and a queue that are closed for good."""
        with suppress(StoreUnavailable):
            await self._queued.release(queue.writer.owner, queue.writer.log_id)
            await self._logs.release_bytes(queue.writer)

    def _end(self, queue: ClientQueue, reader: Reader | None, reason: str) -> None:
        if reader is not None:
            reader.stop(reason)
        queue.writer.lost = True
        self._logs.release(queue.writer)

    @property
    def _ttl_s(self) -> float:
        return self._settings.resume_s + LEASE_S

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Leave all clients to other gateways, and end what runs."""
        if self._watcher is not None:
            self._watcher.cancel()
        await asyncio.gather(*(self._give_away(queue) for queue in list(self._queues.values())))
        for reader in list(self._readers.values()):
            reader.stop("shutdown")
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _log_unexpected(attaching: asyncio.Task[Opened]) -> None:
    """Log what an attempt to attach failed with, unless it is what its client, who has left, would have been told."""
    error = None if attaching.cancelled() else attaching.exception()
    if error is not None and not isinstance(error, GatewayError | StoreUnavailable | LogRefused):
        log.error("a client's stream could not be opened", exc_info=error)


def _log_id(principal: Principal, client_id: str) -> str:
    return f"{principal.key_id}:{client_id}"


def _pokes_key(process: str) -> str:
    return f"sh:{{p:{process}}}:pokes"


def _hello(reader: Reader, client_id: str, resumed: bool) -> bytes:
    """Return the event that a stream begins with. It has the number of the last one, from which to go on."""
    frame = event_frame("open", {"client_id": client_id, "resumed": resumed})
    return b"id: %d\n%b" % (reader.after, frame)


def _not_connected(client_id: str) -> NotFound:
    return NotFound(
        f"No stream is open for the client {client_id!r} under this API key. Open "
        f"GET /api/v1/chat/stream/{client_id} first.",
        "client_id",
        "client_not_connected",
    )
