"""The jobs of one client: run one after the other, in the order in which they were submitted.

The queue itself is in the store, with the job that runs at its head, so that it outlives its gateway. The gateway that
writes the client's log runs its jobs, and takes a job off the queue in one step with the event of its end.

No job runs twice. The log's writer is the fence: the store refuses what comes from a writer whose log another gateway
has taken over. A job runs only after the store has accepted that it starts, however long that takes. A gateway that did
not run for longer than its lease, by its own clock, asks the store whether it still has the log before the job
continues. Not handled: how a job is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import Context
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from gateway.access.auth import Principal
from gateway.durable.event_log import Opened
from gateway.durable.log_writer import LogWriter
from gateway.errors import GatewayError, StoreUnavailable, Unavailable
from gateway.exchange.background import Detached, told
from gateway.exchange.drain import Drain
from gateway.settings.config import JobSettings
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_REMEMBERED = 64
"""Finished jobs whose ids are known, longer than the store can take to drop them from the queue."""

JobEvent = tuple[str, dict[str, Any]]
"""Its name and its fields; that named `done` is the last."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job, with everything that any gateway needs to run it for its submitter."""

    id: str
    principal: Principal
    session_id: str | None
    request: dict[str, Any]
    session_incarnation: str = ""
    """That of the session when the job was submitted."""
    session_is_new: bool = False
    """The session began with this job."""

    def text(self) -> str:
        """The job as it is stored in the queue."""
        fields = asdict(self)
        models = self.principal.models
        fields["principal"]["models"] = None if models is None else sorted(models)
        return orjson.dumps(fields).decode()

    @classmethod
    def from_text(cls, text: str) -> Job:
        fields = orjson.loads(text)
        principal = fields["principal"]
        principal["models"] = None if principal["models"] is None else frozenset(principal["models"])
        return cls(**fields | {"principal": Principal(**principal)})


RunJob = Callable[[Job], AsyncGenerator[JobEvent, None]]


class ClientQueue:
    """The jobs of one client, run one after the other. What runs is counted by the drain, job by job."""

    def __init__(
        self, writer: LogWriter, settings: JobSettings, run: RunJob, drain: Drain, metrics: Metrics, now: float
    ) -> None:
        self.writer = writer
        self.waiting: deque[Job] = deque()
        """In order; the first is the one that runs."""
        self.finished = 0
        """Jobs that are over."""
        self.closing = False
        self.local_reader = ""
        """Token of the newest reader that this process has had."""
        self.version = 0
        """Raised by each such reader."""
        self.remote_until = now
        """Until when a reader in another process counts as there, on the loop's clock."""
        self.looking = self.look_again = False
        """Whether the store is being asked what is new, and whether it is to be asked once more after that."""
        self.bytes: dict[str, int] = {}
        """Size of each job in the queue."""
        self.counted_bytes = 0
        """Size of the queue as the key's account has it."""
        self._settings = settings
        self._run = run
        self._drain = drain
        self._metrics = metrics
        self._marks: dict[str, int] = {}
        """Number before the first event of each job, so that a new stream can show unfinished ones whole."""
        self._remembered: deque[str] = deque(maxlen=_REMEMBERED)
        self._left_at: float | None = now
        self._idle_since: float | None = now
        self._worker: asyncio.Task[None] | None = None
        self._exchange: Detached | None = None

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._worker is not None

    @property
    def since(self) -> int:
        """Number before the first event of the oldest unfinished job."""
        return self._marks[self.waiting[0].id] if self.waiting else self.writer.last

    def take_over(self, opened: Opened) -> None:
        """Go on where another gateway was when it went: the job that it was at is lost."""
        texts = list(opened.queue)
        if texts and opened.running and (job := Job.from_text(texts[0])).id == opened.running:
            del texts[0]
            self.waiting.append(job)
            self._finish(job, Unavailable("The server that ran this job is gone.", code="server_gone"))
        self.add(texts)

    def add(self, texts: list[str]) -> None:
        """Take note of jobs that came to the queue, each once."""
        for text in texts:
            job = Job.from_text(text)
            if job.id not in self._marks and job.id not in self._remembered:
                self.bytes[job.id] = len(text.encode())
                self._marks[job.id] = self.writer.last
                self.waiting.append(job)
                self._tell("queued", job, {"position": len(self.waiting) - 1})
        if self.waiting and self._worker is None and not self.closing:
            # In a context of its own: jobs are no part of whichever request made this client's queue known.
            self._worker = asyncio.create_task(self._work(), context=Context())

    def reason_to_close(self, now: float, reading: bool) -> str | None:
        """Return why the queue is to be closed, if it is. `reading` says whether a reader is in this process."""
        if reading or now < self.remote_until:
            self._left_at = None
        elif self._left_at is None:
            self._left_at = now
        if self.waiting:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._left_at is not None and now - self._left_at >= self._settings.resume_s:
            return "left"
        if self._idle_since is not None and now - self._idle_since >= self._settings.max_idle_s:
            return "idle"
        return "lost" if self.writer.lost else None

    async def cancel(self) -> None:
        """Cancel the running job without sending an event, and start no other."""
        self.closing = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def stop(self, reason: GatewayError) -> None:
        """End the running job with `reason`, and start no other; those that wait stay in the queue."""
        self.closing = True
        if self._worker is not None:
            if self._exchange is not None:
                self._exchange.interrupt(reason)
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self.waiting and not self.closing and not self._drain.draining:
                job = self.waiting[0]
                outcome = await self._run_tracked(job)
                if outcome is None:
                    return  # the log is another gateway's, and the job with it
                self._finish(job, outcome)
        finally:
            self._worker = None

    async def _run_tracked(self, job: Job) -> GatewayError | dict[str, Any] | None:
        """Run a job. Returns the fields of its `done`, or what cut it short, or None if it is no longer ours."""
        task = asyncio.current_task()
        assert task is not None
        self._exchange = exchange = Detached(task)
        done: dict[str, Any] = {}
        try:
            with self._drain.track(exchange):
                self._tell("started", job, {}, running=job.id)
                if not await self._may_start():
                    return None
                async with aclosing(self._run(job)) as events:
                    async for name, fields in events:
                        if not await self._may_continue():
                            return None
                        if name == "done":
                            done = fields
                        else:
                            self._tell(name, job, fields)
        except asyncio.CancelledError:
            if exchange.reason is None:
                raise
            task.uncancel()
            return exchange.reason
        except Exception as error:
            return told(error)
        finally:
            self._exchange = None
        return done

    async def _may_start(self) -> bool:
        """Wait until the store knows that the job starts. Returns False if the log is another gateway's."""
        if not await self.writer.stored():
            return False
        while True:
            try:
                return await self.writer.holds()
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_S)

    async def _may_continue(self) -> bool:
        """Return False if the log is another gateway's. While the store is away no gateway can have taken it over."""
        try:
            return await self.writer.holds()
        except StoreUnavailable:
            return True

    def _finish(self, job: Job, outcome: GatewayError | dict[str, Any]) -> None:
        self.waiting.popleft()
        self._marks.pop(job.id, None)
        self._remembered.append(job.id)
        self.bytes.pop(job.id, None)
        self.finished += 1
        since = self.since if self.waiting else self.writer.last + 1
        name, fields = "done", outcome
        if isinstance(outcome, GatewayError):
            self._metrics.error(outcome.code)
            log.log(outcome.log_level, "job ended with %s: %s", outcome.code, outcome)
            name, fields = "error", error_fields(outcome)
        assert isinstance(fields, dict)
        self._tell(name, job, fields, done=1, running="", since=since)

    def _tell(self, name: str, job: Job, fields: dict[str, Any], *, done: int = 0, **more: str | int) -> None:
        self.writer.append(event_frame(name, {"job_id": job.id} | fields), done=done, **more)


def error_fields(error: GatewayError) -> dict[str, Any]:
    """Return the fields of an `error` event."""
    fields: dict[str, Any] = orjson.loads(error.body())
    if error.retry_after_s is not None:
        fields["retry_after_s"] = error.retry_after_s
    return fields


def event_frame(name: str, fields: dict[str, Any]) -> bytes:
    """Return an event as a frame of a stream, without its number."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(fields))
