"""The writer and the readers of an event log. See `gateway.durable.event_log`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import GatewayError, StoreUnavailable
from gateway.store import layout
from gateway.store.client import Lane, Script
from gateway.store.pieces import PIECE_BYTES, split
from gateway.store.stored_bytes import StoredBytes

_BATCH_S = 0.02
"""How long frames wait for more, so that the store is not asked for each."""
_RETRY_S = 0.25
_RELEASE_S = 10.0
_WINDOW_BYTES = 65_536
"""Frames that are stored but stay in memory, so that readers in this process need not ask the store."""
_BATCH_BYTES = PIECE_BYTES // 2
"""Most bytes of frames in one entry of the log."""
LEAST_ROOM_BYTES = 262_144
"""What a log may take in the store at first. It doubles when it is used up, as long as its key has room."""
_NO_JOBS = 2**31
_APPEND, _NOTE = Script("log_append"), Script("log_append", when_full=True)
_RENEW = Script("log_queue", "log_renew", when_full=True)


@dataclass(eq=False, slots=True)
class Reader:
    """One stream's place in a log. `after` is the number of the last frame that it has."""

    log_id: str
    owner: str
    after: int = 0
    token: str = ""
    """Where only the newest reader of a log may continue: which one this is."""
    stopped: str = ""
    """Why it is to end."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    parts: list[str] = field(default_factory=list)
    """Those of the next frame that it has, if that comes in parts."""

    def stop(self, reason: str) -> None:
        """End the reading, between two frames."""
        self.stopped = self.stopped or reason
        self.wake.set()


@dataclass(frozen=True, slots=True)
class _Change:
    """What changes in the store with a frame: how many of the queue are done, and fields of the log."""

    number: int
    done: int
    fields: dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Account:
    """Where the bytes of a log are counted: to which API key, and how long it is kept."""

    bytes: StoredBytes
    key_id: str
    log_id: str
    ttl_s: float

    async def charge(self, size_bytes: int) -> bool:
        """Set the log's size, if the key has room for it. Returns whether it has. Raises StoreUnavailable."""
        return await self.bytes.charge(self.key_id, self.log_id, size_bytes, self.ttl_s)

    async def note(self, size_bytes: int) -> None:
        """Set the log's size to what is stored of it. Raises StoreUnavailable."""
        await self.bytes.note(self.key_id, self.log_id, size_bytes, self.ttl_s)


class LogWriter:
    """The writing end of a log. `readers` are those in this process.

    Its token fences it: the store refuses everything from a writer whose log another one has taken over. By its own
    clock it knows until when no other gateway can have taken over.
    """

    def __init__(
        self,
        store: Lane,
        log_id: str,
        owner: str,
        token: str,
        last: int,
        *,
        max_bytes: int,
        ttl_s: float,
        lease_s: float,
        clock: Callable[[], float] | None = None,
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
        self.held_until = 0.0
        """When the lease ends, by `clock`."""
        self.account: Account | None = None
        self.clock = clock or asyncio.get_running_loop().time
        self._lease_s = lease_s
        self._store = store
        self._max_bytes = max_bytes
        self._room_bytes = max_bytes
        self._written_bytes = 0
        self._ttl_ms = round(ttl_s * 1000)
        self._stored = last
        self._frames: deque[bytes] = deque()
        self._first = last + 1
        self._bytes = self._unstored_bytes = 0
        self._changes: deque[_Change] = deque()
        self._urgent = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    def count(self, account: Account) -> None:
        """Count the log's bytes from now on. Its room is small until it needs more."""
        self.account = account
        self._room_bytes = min(LEAST_ROOM_BYTES, self._max_bytes)

    async def confirm(self) -> bool:
        """Renew the lease. Returns whether the log is still this writer's. Raises StoreUnavailable."""
        began = self.clock()
        arguments = [self.token, round(self._lease_s * 1000), self._ttl_ms, _NO_JOBS, 0]
        if not await self._store.run(*_RENEW.call(layout.log(self.log_id), arguments)):
            self.lost = True
            self._wake()
            return False
        self.held_until = began + self._lease_s
        return not self.lost

    async def holds(self) -> bool:
        """Whether no other gateway has the log, asking the store if the lease has ended. Raises StoreUnavailable."""
        if self.lost or self.clock() < self.held_until:
            return not self.lost
        return await self.confirm()

    async def stored(self) -> bool:
        """Wait until what was appended so far is stored. Returns False if it can't be."""
        number = self.last
        while self._stored < number and not self.lost:
            self._start_flusher()
            if self._flusher is not None:
                self._urgent.set()
                await asyncio.wait([self._flusher])
        return not self.lost

    def append(self, frame: bytes, *, done: int = 0, **fields: str | int) -> None:
        """Add a frame, which gets the next number as its SSE id.

        With it, `done` of the queue are taken from its head and `fields` of the log are set.
        """
        self.last += 1
        numbered = b"id: %d\n%b" % (self.last, frame)
        self._frames.append(numbered)
        self._bytes += len(numbered)
        self._unstored_bytes += len(numbered)
        if fields or done:
            self._changes.append(_Change(self.last, done, fields))
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
            self._changes.append(_Change(self.last, 0, {"ended": 1}))
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
        if self.account is not None:
            with suppress(StoreUnavailable):
                await self.account.note(min(self._written_bytes, self._room_bytes))

    def _wake(self) -> None:
        for reader in self.readers:
            reader.wake.set()

    def _start_flusher(self) -> None:
        if not self.lost and self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while (self._stored < self.last or self._changes) and not self.lost:
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
        """Store what is in memory only, or as much of it as makes a batch.

        Sent again it is the same batch, which the store knows by its numbers.
        """
        first = self._stored + 1
        frames: list[bytes] = []
        size = 0
        for index in range(first - self._first, len(self._frames)):
            size += len(self._frames[index])
            if frames and size > _BATCH_BYTES:
                size -= len(self._frames[index])
                break
            frames.append(self._frames[index])
        last = first + len(frames) - 1
        done = 0
        fields: dict[str, str | int] = {}
        while self._changes and self._changes[0].number <= last:
            change = self._changes.popleft()
            done += change.done
            fields |= change.fields
        pairs = [part for pair in fields.items() for part in pair]
        parts = split(b"".join(frames).decode(), _BATCH_BYTES)
        self._unstored_bytes = self._bytes_from(last + 1)
        for place, part in enumerate(parts):
            of = len(parts) if len(parts) > 1 else 0
            if not await self._store_part([first, last, part], [done, place, of, *pairs], len(part.encode())):
                return
        self._stored = last
        self._trim()

    async def _store_part(self, frames: list[Any], changes: list[Any], size: int) -> bool:
        """Store a batch or a part of one. Returns False if it can't be."""
        while not self.lost:
            try:
                await self._make_room(size)
                arguments = [self.token, *frames, self._room_bytes, self._ttl_ms, *changes]
                script = _APPEND if size else _NOTE
                kept = await self._store.run(*script.call(layout.log(self.log_id), arguments))
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_S)
                continue
            self._written_bytes += size
            self.lost = self.lost or not kept  # it may have lost frames meanwhile
            return True
        return False

    async def _make_room(self, size: int) -> None:
        if self.account is None:
            return
        while self._room_bytes < self._max_bytes and self._written_bytes + size > self._room_bytes:
            more = min(2 * self._room_bytes, self._max_bytes)
            if not await self.account.charge(more):
                return  # the oldest frames go instead
            self._room_bytes = more

    def _bytes_from(self, number: int) -> int:
        start = max(0, number - self._first)
        return sum(len(self._frames[index]) for index in range(start, len(self._frames)))

    def _trim(self) -> None:
        """Drop the oldest frames from memory: stored ones over the window, and any over the log's bound."""
        while self._frames and (
            self._bytes > self._max_bytes or (self._bytes > _WINDOW_BYTES and self._first <= self._stored)
        ):
            # Over the log's bound and not stored: a gap in the log would be worse than its end.
            self.lost = self.lost or self._first > self._stored
            self._bytes -= len(self._frames.popleft())
            self._first += 1
