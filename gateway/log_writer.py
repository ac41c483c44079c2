"""The two ends of an event log: who writes it, and one stream's place in it. See `gateway.event_log`."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from gateway.errors import GatewayError, StoreUnavailable
from gateway.store import Script, Store

_BATCH_S = 0.02
"""How long frames wait for more, so that the store is not asked for each."""
_RETRY_S = 0.25
_RELEASE_S = 10.0
_WINDOW_BYTES = 65_536
"""Frames that are stored but stay in memory, so that readers in this process need not ask the store."""
_APPEND = Script("log_append")


@dataclass(eq=False, slots=True)
class Reader:
    """One stream's place in a log. `after` is the number of the last frame that it has."""

    log_id: str
    owner: str
    after: int = 0
    token: str = ""
    """Where only the newest reader of a log may go on: which one this is."""
    stopped: str = ""
    """Why it is to end."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self, reason: str) -> None:
        """End the reading, between two frames."""
        self.stopped = self.stopped or reason
        self.wake.set()


class LogWriter:
    """The writing end of a log. `readers` are those in this process."""

    def __init__(
        self, store: Store, log_id: str, owner: str, token: str, last: int, *, max_bytes: int, ttl_s: float
    ) -> None:
        self.log_id = log_id
        self.owner = owner
        """Who may read it: a tenant, or a key."""
        self.token = token
        self.last = last
        """Number of the newest frame."""
        self.ended = False
        self.lost = False
        """Another writer has the log, or it is gone, or the store was away for too long: nothing more is stored."""
        self.failure: GatewayError | None = None
        """Raised to readers at the end, in place of it."""
        self.readers: set[Reader] = set()
        self._store = store
        self._max_bytes = max_bytes
        self._ttl_ms = round(ttl_s * 1000)
        self._stored = last
        self._frames: deque[bytes] = deque()
        self._first = last + 1
        self._bytes = self._unstored_bytes = 0
        self._fields: dict[str, str | int] = {}
        self._done = 0
        self._urgent = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    def append(self, frame: bytes, *, done: int = 0, **fields: str | int) -> None:
        """Add a frame, which gets the next number as its SSE id.

        With it, `done` of the queue are taken from its head and `fields` of the log are set.
        """
        self.last += 1
        numbered = b"id: %d\n%b" % (self.last, frame)
        self._frames.append(numbered)
        self._bytes += len(numbered)
        self._unstored_bytes += len(numbered)
        self._fields |= fields
        self._done += done
        self._start_flusher()
        if self._unstored_bytes > _WINDOW_BYTES:
            self._urgent.set()
        if self._bytes > self._max_bytes:
            self._trim()
        self._wake()

    def end(self, failure: GatewayError | None = None) -> None:
        """Say that no more frames come. A failure is for readers in this process, and before the first frame."""
        self.ended = True
        self.failure = failure
        if failure is None:
            self._fields["ended"] = 1
            self._start_flusher()
        self._wake()

    def frames_after(self, number: int) -> bytes | None:
        """Return the frames behind `number`, or None when some of them are no longer in memory."""
        start = number + 1 - self._first
        if start < 0:
            return None
        return b"".join([self._frames[index] for index in range(start, len(self._frames))])

    async def flush(self, timeout_s: float) -> None:
        """Wait until what was appended is stored, or can't be, or time is up."""
        if self._flusher is not None:
            self._urgent.set()
            await asyncio.wait([self._flusher], timeout=timeout_s)

    async def release(self, timeout_s: float = _RELEASE_S) -> None:
        """Store the rest, and give up what is not stored within the time."""
        await self.flush(timeout_s)
        self.lost = True
        if self._flusher is not None:
            self._flusher.cancel()

    def _wake(self) -> None:
        for reader in self.readers:
            reader.wake.set()

    def _start_flusher(self) -> None:
        if not self.lost and self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while (self._stored < self.last or self._fields) and not self.lost:
                if not self._urgent.is_set():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_BATCH_S):
                            await self._urgent.wait()
                self._urgent.clear()
                if not self.lost:
                    await self._store_batch()
        finally:
            self._flusher = None

    async def _store_batch(self) -> None:
        """Store what is in memory only. Sent again it is the same batch, which the store knows by its numbers."""
        first, last = self._stored + 1, self.last
        frames = [self._frames[index] for index in range(first - self._first, len(self._frames))]
        fields, self._fields = self._fields, {}
        done, self._done = self._done, 0
        pairs = [part for pair in fields.items() for part in pair]
        text = b"".join(frames).decode()
        self._unstored_bytes = 0
        arguments = [self.token, first, last, text, self._max_bytes, self._ttl_ms, done, *pairs]
        while not self.lost:
            try:
                kept = await self._store.run(*_APPEND.call(log_keys(self.log_id), arguments))
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_S)
                continue
            self.lost = self.lost or not kept  # it may have lost frames meanwhile
            self._stored = last
            self._trim()
            return

    def _trim(self) -> None:
        """Drop the oldest frames from memory: stored ones over the window, and any over the log's bound."""
        while self._frames and (
            self._bytes > self._max_bytes or (self._bytes > _WINDOW_BYTES and self._first <= self._stored)
        ):
            # Over the log's bound and not stored: a gap in the log would be worse than its end.
            self.lost = self.lost or self._first > self._stored
            self._bytes -= len(self._frames.popleft())
            self._first += 1


def log_keys(log_id: str) -> list[str]:
    """Return the keys of a log: itself, its entries, its queue."""
    head = f"sh:{{l:{log_id}}}"
    return [head, f"{head}:e", f"{head}:q"]
