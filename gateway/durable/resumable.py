"""Chat completions whose stream can be resumed after it was cut, on any gateway.

The completion is made in the background and written to an event log; the client's own stream is the log's first
reader. So it continues when the client leaves, but not for longer than a log is kept: a stream that was not read for
that long is ended. One whose id was not sent yet ends with its client. An error is
kept as its frame. Raises NotFound, BadRequest, Overloaded and Unavailable.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from gateway.access.auth import Principal
from gateway.durable.event_log import (
    LEASE_S,
    RENEW_S,
    EventLogs,
    LogClosed,
    LogGone,
    LogOrphaned,
    LogRefused,
    split_frames,
)
from gateway.durable.log_writer import LogWriter, Reader
from gateway.errors import (
    BadRequest,
    Cancelled,
    GatewayError,
    NotFound,
    Overloaded,
    RateLimitExceeded,
    StoreUnavailable,
    Unavailable,
    from_store,
)
from gateway.exchange.background import Background, Detached, told
from gateway.exchange.drain import Drain
from gateway.exchange.response import render_openai
from gateway.settings.config import ResumeSettings
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

MAX_RESUMABLE = 1024
"""Resumable completions on their way at once in this process."""
_ID = re.compile(r"chatcmpl-[0-9a-f]{32}")
_CHECK_S = 2.0
"""How long the check whose stream it is may take. It fails after that."""
_AHEAD_S = 2.0
"""How long a client that says it has more than the store may wait for the store to catch up."""


@dataclass(slots=True)
class Announced:
    """A completion's id, and whether its client knows it."""

    id: str
    announced: bool = False
    asked: bool = True
    """The request itself wants it to be resumable, not only its key."""
    failed: bool = False
    """It ended before there was anything to resume."""

    def headers(self) -> dict[str, str]:
        """Return the header with the position at which the stream can be resumed; it is being sent."""
        if self.failed:
            return {}
        self.announced = True
        return {"X-Shannon-Resume": f"/v1/chat/completions/{self.id}/stream"}


@dataclass(eq=False, slots=True)
class _Live:
    """A completion on its way. `unread_s` is how long it has not been read."""

    writer: LogWriter
    exchange: Detached = field(default_factory=Detached)
    unread_s: float = 0.0


class ResumableStreams:
    """The resumable streams of this process."""

    def __init__(self, settings: ResumeSettings, logs: EventLogs, drain: Drain, metrics: Metrics) -> None:
        self._settings = settings
        self._logs = logs
        self._metrics = metrics
        self._background = Background(drain)
        self._live: set[_Live] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._process = secrets.token_hex(8)
        self._reading: Counter[str] = Counter()
        """Streams that are resumed, by key."""

    def wants(self, principal: Principal, asked: bool | None) -> bool:
        """Whether a stream is to be resumable, as its request or its key has it. Raises BadRequest."""
        if asked and not self._settings.enabled:
            raise BadRequest("This server offers no resumable streams. Leave 'resumable' out.", "resumable")
        if asked is None:
            return self._settings.enabled and principal.key_id in self._settings.keys
        return asked

    async def stream(
        self, principal: Principal, completion: Announced, chunks: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """Make a completion in the background, and yield its numbered frames as they come."""
        reader = Reader(completion.id, principal.tenant)
        try:
            live = await self._open(reader, principal)
        except RateLimitExceeded:
            completion.failed = True
            if completion.asked:
                await chunks.aclose()
                raise
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
            return
        except GatewayError:
            completion.failed = True
            raise
        self._background.start(live.exchange, lambda: self._make(live, chunks))
        try:
            async with aclosing(self._follow(reader)) as frames:
                async for frame in frames:
                    yield frame
        except GatewayError:
            completion.failed = True
            raise
        finally:
            if not completion.announced:
                live.exchange.interrupt(Cancelled("The client left before it knew the completion's id."))

    async def _open(self, reader: Reader, principal: Principal) -> _Live:
        if len(self._background) >= MAX_RESUMABLE:
            raise Overloaded("Too many resumable completions are being made. Try again shortly.")
        try:
            _, writer = await self._logs.open(
                reader,
                process=self._process,
                max_bytes=self._settings.max_bytes,
                ttl_s=self._ttl_s,
                payer=principal.key_id,
            )
        except LogRefused:
            raise RateLimitExceeded(
                "The resumable streams of this API key keep as many bytes as 'resume.max_bytes_per_key' allows. Leave "
                "'resumable' out, or wait until earlier ones are no longer kept.",
                "resumable",
                "too_many_streams",
                self._ttl_s,
            ) from None
        except StoreUnavailable as error:
            raise from_store(error, "A resumable stream can't be kept at the moment.") from None
        assert writer is not None  # the id is unique
        live = _Live(writer)
        self._live.add(live)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        return live

    @property
    def _ttl_s(self) -> float:
        return self._settings.ttl_s + LEASE_S

    async def _make(self, live: _Live, chunks: AsyncGenerator[bytes, None]) -> None:
        try:
            failure = await self._write(live, chunks)
            if failure is not None and live.writer.last:
                self._metrics.error(failure.code)
                self._metrics.stream_failure(failure.code)
                log.log(failure.log_level, "resumable completion ended with %s: %s", failure.code, failure)
                live.writer.append(render_openai(failure, True))
                failure = None
            live.writer.end(failure)
            if failure is None:
                await live.writer.release()
            else:  # only those who get the failure now know of it; they cancel this task
                live.writer.lost = True
                await asyncio.shield(self._forget(live.writer))
        finally:
            self._live.discard(live)
            self._logs.release(live.writer)

    async def _write(self, live: _Live, chunks: AsyncGenerator[bytes, None]) -> GatewayError | None:
        """Write the frames to the log. Returns what cut them short."""
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    for frame in split_frames(chunk):
                        live.writer.append(frame)
        except asyncio.CancelledError:
            if live.exchange.reason is None:
                raise
            return live.exchange.reason
        except Exception as error:
            return told(error)
        return None

    async def _forget(self, writer: LogWriter) -> None:
        try:
            await self._logs.forget(writer.log_id)
            await self._logs.release_bytes(writer)
        except StoreUnavailable:
            log.debug("the empty log of %s is left to run out", writer.log_id)

    async def resume(self, principal: Principal, completion_id: str, after: int) -> AsyncGenerator[bytes, None]:
        """Return the frames of a completion behind number `after`, until it ends.

        Raises NotFound, for another tenant's just as for none, BadRequest, RateLimitExceeded and StoreUnavailable.
        """
        if not _ID.fullmatch(completion_id):
            raise _not_found(completion_id)
        reader = Reader(completion_id, principal.tenant, after)
        with self._place(principal):
            await self._find(reader)
        return self._follow_in_place(principal, reader)

    @contextmanager
    def _place(self, principal: Principal) -> Iterator[None]:
        """Count a stream of a key. Raises RateLimitExceeded where the key has as many as it may."""
        most = self._settings.max_streams_per_key
        if self._reading[principal.key_id] >= most:
            raise RateLimitExceeded(
                f"This API key has {most} resumed streams open, which is as many as it may. Close one first.",
                code="too_many_streams",
                retry_after_s=1.0,
            )
        self._reading[principal.key_id] += 1
        try:
            yield
        finally:
            self._reading[principal.key_id] -= 1
            if not self._reading[principal.key_id]:
                del self._reading[principal.key_id]

    async def _follow_in_place(self, principal: Principal, reader: Reader) -> AsyncGenerator[bytes, None]:
        with self._place(principal):
            async with aclosing(self._follow(reader)) as frames:
                async for frame in frames:
                    yield frame

    async def _find(self, reader: Reader) -> None:
        """Wait a moment until the stream has the event behind which it is to be read. Raises as `resume` does."""
        completion_id, after = reader.log_id, reader.after
        deadline = asyncio.get_running_loop().time() + _AHEAD_S
        try:
            # Only an answer of the store shows whose log it is. Whatever comes in its place grants nothing.
            async with asyncio.timeout(_CHECK_S):
                found = await self._logs.last(reader)
            while found[1] < after and found[0] == "running" and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(_AHEAD_S / 20)
                async with asyncio.timeout(_CHECK_S):
                    found = await self._logs.last(reader)
        except LogGone:
            raise _not_found(completion_id) from None
        except (StoreUnavailable, TimeoutError) as error:
            failure = error if isinstance(error, StoreUnavailable) else StoreUnavailable()
            raise from_store(failure, "The stream can't be read at the moment.") from None
        if found[1] < after:
            raise BadRequest(
                f"The stream {completion_id!r} has {found[1]} events so far, none with the number {after}.",
                "starting_after",
            )

    async def _follow(self, reader: Reader) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._logs.read(reader)) as frames:
                async for frame in frames:
                    yield frame
        except LogGone:
            raise NotFound(
                f"The events of {reader.log_id!r} behind number {reader.after} are no longer kept.",
                "starting_after",
                "events_expired",
            ) from None
        except (LogOrphaned, LogClosed):
            raise Unavailable("The server that was making this completion is gone.", code="server_gone") from None
        except StoreUnavailable as error:
            raise from_store(error, "The stream can't be read at the moment.") from None

    async def _watch(self) -> None:
        """Renew the leases of what is being made, and end what is not read."""
        while self._live:
            await asyncio.sleep(RENEW_S)
            await asyncio.gather(*(self._renew(live) for live in list(self._live)))

    async def _renew(self, live: _Live) -> None:
        read = bool(live.writer.readers)
        try:
            renewal = await self._logs.renew(live.writer, self._ttl_s)
        except StoreUnavailable:
            return
        read = read or (renewal is not None and renewal.reader_left_s > 0)
        live.unread_s = 0.0 if read else live.unread_s + RENEW_S
        if live.unread_s >= self._settings.ttl_s:
            live.exchange.interrupt(Cancelled("The stream was not resumed in time."))

    async def close(self) -> None:
        """End what is still being made."""
        await self._background.close(Unavailable())
        if self._watcher is not None:
            self._watcher.cancel()


def _not_found(completion_id: str) -> NotFound:
    return NotFound(
        f"There is no stream of {completion_id[:64]!r} to resume: it was not resumable, or it ended too long ago.",
        "completion_id",
        "stream_not_found",
    )
