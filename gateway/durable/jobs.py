"""Submit and stream: a client's one stream of events, and the jobs that are submitted for it by other requests.

A client is an id of its own choice under an API key. Other keys can't see it. Opening its stream registers the client:
the gateway that opens it writes the client's event log and runs its jobs. The stream is a reader of that log, so it can
be dropped and resumed on any gateway. A newer stream replaces an older one. If no stream reads for `resume_s`, the
client has left: its running job is cancelled and its waiting jobs are dropped. If the client's gateway is gone or
drains, the gateway that its stream comes to next takes over.

What one gateway does for a client of another (submit, leave) is written to the store. A poke makes the other gateway
look there at once. Raises NotFound, RateLimitExceeded, Unavailable and StoreUnavailable.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import TypeVar
from weakref import WeakValueDictionary

from gateway.access.auth import Principal
from gateway.durable.event_log import (
    EventLogs,
    LogClosed,
    LogGone,
    LogOrphaned,
    LogRefused,
    Opened,
)
from gateway.durable.job_clients import JobClients
from gateway.durable.job_queue import ClientQueue, Job, RunJob, event_frame
from gateway.durable.log_writer import Reader
from gateway.errors import GatewayError, NotFound, RateLimitExceeded, StoreUnavailable, from_store
from gateway.exchange.drain import Drain
from gateway.settings.config import JobSettings
from gateway.store import layout
from gateway.store.client import Lane, Script
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

_AHEAD = 1000
"""How far a client's last event id may be ahead of the stored one. Behind a larger gap, the id is of an older log."""
_SUBMIT = Script("job_submit")

Renew = Callable[[Principal], Awaitable[Principal]]
"""Returns a caller as it is now. Raises GatewayError if its key is no longer good."""


class Jobs:
    """Streams of events, and the jobs that are submitted for them."""

    def __init__(self, settings: JobSettings, logs: EventLogs, store: Lane, drain: Drain, metrics: Metrics) -> None:
        self._settings = settings
        self._logs = logs
        self._store = store
        self._drain = drain
        self._metrics = metrics
        self._clients = JobClients(settings, logs, store, drain)
        self._streams: set[Reader] = set()
        """All that are open or about to be, including older ones of a client."""
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def close(self) -> None:
        """Leave all clients to other gateways, and end what runs."""
        await self._clients.close()

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
                retry_after_s=self._clients.ttl_s,
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
        # A client that leaves meanwhile must not leave a log without a writer.
        attaching = self._clients.spawn(self._attach_in_turn(reader, run))
        try:
            return await asyncio.shield(attaching)
        except asyncio.CancelledError:
            attaching.add_done_callback(_log_unexpected)
            raise

    async def _attach_in_turn(self, reader: Reader, run: RunJob) -> Opened:
        self._drain.admit()
        async with self._opening.setdefault(reader.log_id, asyncio.Lock()):
            held = self._clients.queues.get(reader.log_id)
            opened, writer = await self._logs.open(
                reader,
                process=self._clients.process,
                held=None if held is None else held.writer,
                max_bytes=self._settings.max_log_bytes,
                ttl_s=self._clients.ttl_s,
                payer=reader.owner,
            )
            queue = self._clients.queues.get(reader.log_id)
            if writer is not None:
                if queue is not None:  # its log was closed, or another gateway's for a while
                    queue.closing = True
                    self._clients.spawn(queue.cancel())
                now = asyncio.get_running_loop().time()
                queue = ClientQueue(writer, self._settings, run, self._drain, self._metrics, now)
                self._clients.queues[reader.log_id] = queue
            if queue is not None:
                if writer is None:
                    opened = opened._replace(number=queue.writer.last, since=queue.since)
                queue.local_reader = reader.token
                queue.version += 1
            older = self._clients.readers.get(reader.log_id)
            if older is not None and older is not reader:
                older.stop("replaced")
            if not reader.stopped:  # else it has left again
                self._clients.readers[reader.log_id] = reader
            self._clients.watch()
            if writer is not None and queue is not None:
                queue.take_over(opened)
                if opened.queue:
                    self._clients.spawn(self._clients.look(queue))  # for the rest of them
        if opened.process != self._clients.process:
            await self._clients.poke(opened.process, reader.log_id)
        return opened

    def _detach(self, reader: Reader) -> None:
        reader.stop("left")
        self._streams.discard(reader)
        if self._clients.readers.get(reader.log_id) is reader:
            del self._clients.readers[reader.log_id]
            if reader.log_id not in self._clients.queues:
                self._clients.spawn(self._tell_left(reader))

    async def _tell_left(self, reader: Reader) -> None:
        with suppress(StoreUnavailable):
            process = await self._logs.leave(reader)
            if process is not None:
                await self._clients.poke(process, reader.log_id)

    async def submit(self, client_id: str, job: Job) -> int:
        """Put a job at the end of its client's queue. Returns how many are before it.

        Raises NotFound while the client has no stream, RateLimitExceeded when its queue is full, StoreUnavailable.
        """
        self._drain.admit()
        key_id, log_id = job.principal.key_id, _log_id(job.principal, client_id)
        log, _, queue = layout.log(log_id)
        most, text = self._settings.max_queued_per_client, job.text()
        size_bytes = len(text.encode())
        if not await self._clients.queued.add(key_id, log_id, size_bytes, self._clients.ttl_s):
            raise RateLimitExceeded(
                f"The jobs of this API key that wait take as many bytes as 'jobs.max_queued_bytes_per_key' allows, "
                f"{self._clients.queued.most_bytes}. Wait until one is done.",
                code="job_queue_full",
                retry_after_s=1.0,
            )
        outcome, before, process = await self._store.run(*_SUBMIT.call([log, queue], [text, most]))
        if outcome != "queued":
            await self._clients.queued.take(key_id, log_id, size_bytes, self._clients.ttl_s)
        if outcome == "absent":
            raise _not_connected(client_id)
        if outcome == "full":
            raise RateLimitExceeded(
                f"The client {client_id!r} has {most} jobs, which is as many as it may. Wait until one is done.",
                code="job_queue_full",
                retry_after_s=1.0,
            )
        await self._clients.poke(process, log_id)
        return int(before)

    async def holds(self, job: Job) -> bool:
        """Whether a job that runs here is still this gateway's. Raises StoreUnavailable if that is unknown."""
        for queue in self._clients.queues.values():
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
        await self._clients.poke(process, log_id)


def _log_unexpected(attaching: asyncio.Task[Opened]) -> None:
    """Log the error of an attempt to attach, unless it would have been the error of its client, who has left."""
    error = None if attaching.cancelled() else attaching.exception()
    if error is not None and not isinstance(error, GatewayError | StoreUnavailable | LogRefused):
        log.error("a client's stream could not be opened", exc_info=error)


def _log_id(principal: Principal, client_id: str) -> str:
    return f"{principal.key_id}:{client_id}"


def _hello(reader: Reader, client_id: str, resumed: bool) -> bytes:
    """Return the event that a stream begins with. It has the number of the last one, from which to continue."""
    frame = event_frame("open", {"client_id": client_id, "resumed": resumed})
    return b"id: %d\n%b" % (reader.after, frame)


def _not_connected(client_id: str) -> NotFound:
    return NotFound(
        f"No stream is open for the client {client_id!r} under this API key. Open "
        f"GET /api/v1/chat/stream/{client_id} first.",
        "client_id",
        "client_not_connected",
    )
