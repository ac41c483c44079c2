"""Streams that can be resumed: their frames, numbered and kept in the store for a while.

A log has one writer, which numbers the frames and stores them in batches; the newest also stay in its memory. A
reader replays it behind a number of its own and follows it to its end, on any gateway: in the writer's process from
memory, elsewhere by asking the store every few milliseconds. It gets every frame exactly once and in order, or fails.
A writer holds a lease: without it, its gateway is gone. A writer that was superseded learns it from its next batch.
While the store is away frames wait in memory, up to the log's bound, and readers wait for them. Raises LogGone,
LogClosed, LogOrphaned and StoreUnavailable, none of which is for clients.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, NamedTuple

from gateway.durable.log_writer import LEAST_ROOM_BYTES, Account, LogWriter, Reader
from gateway.errors import StoreUnavailable, WritesRefused
from gateway.store import layout
from gateway.store.client import Command, Lane, Script
from gateway.store.pieces import PIECE_BYTES
from gateway.store.stored_bytes import StoredBytes

LEASE_S = 6.0
RENEW_S = 2.0
"""How often leases are renewed, so that one lives through two failures."""
PRESENT_S = 5.0
"""How long a reader that asks the store counts as there after it has asked."""
PATIENCE_S = 10.0
"""How long a reader waits for a store that is away."""
MAX_NUMBER = 2**52
"""Numbers that clients name stay below: as much again is left to count on, before numbers are no longer exact."""
_RETRY_S = 0.25
_LEAST_WAIT_S, _MOST_WAIT_S = 0.02, 0.25

_READ = Script("log_read", reads=True)
_PRESENT, _LEAVE, _CLOSE = (Script(f"log_{name}", when_full=True) for name in ("present", "leave", "close"))
_OPEN, _ATTACH = Script("log_queue", "log_open"), Script("log_queue", "log_open", when_full=True)
_RENEW = Script("log_queue", "log_renew", when_full=True)


class LogGone(Exception):
    """There is no such log any more, or not for this owner, or not as far back. The message says which."""


class LogOrphaned(Exception):
    """The gateway that wrote the log is gone, and everything it stored has been read."""


class LogRefused(Exception):
    """The API key that would pay for the log has no room for another."""


class LogClosed(Exception):
    """The log was closed. The message says why."""


class Opened(NamedTuple):
    """What became of opening a log."""

    how: str
    """`opened`, `taken over`, or `attached` to another writer's."""
    process: str
    """The one that writes it."""
    number: int
    """Of its last frame."""
    since: int
    """Number before the first frame of what is unfinished."""
    running: str
    """Job id that the previous writer was running when it disappeared, as that writer recorded it."""
    queue: list[str]


class Renewal(NamedTuple):
    """What others have done to a log since its writer looked."""

    reader: str
    reader_left_s: float
    """How long the newest reader still counts as there."""
    closed: str
    """Why it was closed, if it was."""
    queue: list[str]
    """What has come to the queue, or the beginning of it."""
    more: bool
    """There is more of it."""


class EventLogs:
    """The logs that this process writes, and the reading of all."""

    def __init__(self, store: Lane, most_bytes_per_key: int = 2**50) -> None:
        self._store = store
        self._bytes = StoredBytes(store, "logs", most_bytes_per_key)
        self._writers: dict[str, LogWriter] = {}

    async def open(
        self,
        reader: Reader,
        *,
        process: str,
        max_bytes: int,
        ttl_s: float,
        held: LogWriter | None = None,
        payer: str = "",
    ) -> tuple[Opened, LogWriter | None]:
        """Become the writer of a log, with `reader` as its reader, or only a reader where there is a writer.

        `held` is the writer that this process has already, `payer` the API key to which the log's bytes count. Raises
        LogRefused and StoreUnavailable.
        """
        token = secrets.token_hex(8)
        times_ms = [round(seconds * 1000) for seconds in (LEASE_S, PRESENT_S, ttl_s)]
        arguments = [reader.owner, token, process, reader.token, reader.after, *times_ms]
        arguments += ["" if held is None else held.token, PIECE_BYTES]
        began = asyncio.get_running_loop().time()
        keys = layout.log(reader.log_id)
        try:
            opened = Opened(*await self._store.run(*_OPEN.call(keys, [*arguments, 1])))
        except WritesRefused:
            opened = Opened(*await self._store.run(*_ATTACH.call(keys, [*arguments, 0])))
            if opened.how == "refused":
                raise
        if opened.how == "attached":
            return opened, None
        writer = LogWriter(
            self._store,
            reader.log_id,
            reader.owner,
            token,
            opened.number,
            max_bytes=max_bytes,
            ttl_s=ttl_s,
            lease_s=LEASE_S,
        )
        writer.held_until = began + LEASE_S
        if payer:
            account = Account(self._bytes, payer, reader.log_id, ttl_s)
            if not await account.charge(min(LEAST_ROOM_BYTES, max_bytes)):
                await self.forget(reader.log_id)
                raise LogRefused("the key has no room for another log")
            writer.count(account)
        self._writers[reader.log_id] = writer
        return opened, writer

    def release(self, writer: LogWriter) -> None:
        """Let go of a writer. Readers that it has keep it until they have everything."""
        if self._writers.get(writer.log_id) is writer:
            del self._writers[writer.log_id]
        for reader in writer.readers:
            reader.wake.set()

    async def last(self, reader: Reader) -> tuple[str, int]:
        """Return a log's state and the number of its last frame. Raises LogGone and StoreUnavailable."""
        state, last, _, _ = await self._ask(reader, MAX_NUMBER, 0)
        if state == "gone":
            raise LogGone("there is no such log")
        writer = self._writers.get(reader.log_id)
        return state, last if writer is None else writer.last

    async def read(self, reader: Reader) -> AsyncGenerator[bytes, None]:
        """Yield the frames behind `reader.after`, several at a time, until the log ends or the reader is stopped.

        Raises what ended the log, LogGone, LogClosed, LogOrphaned, and StoreUnavailable once patience is at its end.
        """
        writer: LogWriter | None = None
        wait_s = _LEAST_WAIT_S
        try:
            while True:
                stopped = reader.stopped
                if writer is None and (writer := self._writers.get(reader.log_id)) is not None:
                    if writer.owner != reader.owner:
                        raise LogGone("there is no such log")
                    writer.readers.add(reader)
                frames = writer.frames_after(reader.after) if writer is not None else None
                if writer is not None and frames:
                    reader.after = writer.last
                    reader.parts = []
                    yield frames
                if stopped:
                    return  # but what is at hand has been sent
                if writer is not None and frames is not None:
                    if not frames and not await self._more_to_come(writer, reader):
                        return
                    continue
                frames, ended = await self._fetch(reader)
                wait_s = _LEAST_WAIT_S if frames else min(wait_s * 1.5, _MOST_WAIT_S)
                if frames:
                    yield frames
                elif ended:
                    return
                else:
                    await _wait(reader, wait_s)
        finally:
            if writer is not None:
                writer.readers.discard(reader)

    async def _more_to_come(self, writer: LogWriter, reader: Reader) -> bool:
        """Wait for a writer in this process. Returns whether to look again; raises what ended the log."""
        if writer.failure is not None:
            raise writer.failure
        if writer.ended or self._writers.get(reader.log_id) is not writer:
            return False
        await reader.wake.wait()
        reader.wake.clear()
        return True

    async def _fetch(self, reader: Reader) -> tuple[bytes, bool]:
        """The stored frames for a reader, and whether the log is complete."""
        state, _, closed, entries = await self._ask_patiently(reader)
        if state == "gone":
            raise LogGone("it is gone")
        if state == "closed":
            raise LogClosed(closed)
        if state == "replaced":
            reader.stop("replaced")
            return b"", True
        frames: list[str] = []
        for first, last, place, parts, text in entries:
            if first > reader.after + 1 or (parts and place != len(reader.parts)):
                raise LogGone("its oldest frames are gone")
            if parts:
                reader.parts.append(text)
                if place + 1 < parts:
                    continue
                frames += reader.parts
            else:
                frames += [f"{frame}\n\n" for frame in text.split("\n\n")[reader.after + 1 - first : -1]]
            reader.after, reader.parts = last, []
        if state == "orphaned" and not entries:
            raise LogOrphaned
        return "".join(frames).encode(), state == "ended" and not entries

    async def _ask_patiently(self, reader: Reader) -> list[Any]:
        until = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            try:
                return await self._ask(reader, reader.after, len(reader.parts))
            except StoreUnavailable:
                if asyncio.get_running_loop().time() > until or reader.stopped:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _ask(self, reader: Reader, number: int, parts: int) -> list[Any]:
        keys, present_ms = layout.log(reader.log_id), round(PRESENT_S * 1000)
        arguments = [reader.owner, number, parts, PIECE_BYTES // 2, reader.token, present_ms]
        answer: list[Any] = await self._store.run(*_READ.call(keys[:2], arguments))
        *found, due = answer
        if due:
            with suppress(WritesRefused):  # reading continues
                await self._store.run(*_PRESENT.call(keys[:1], [reader.owner, reader.token, present_ms]))
        return found

    async def renew(
        self, writer: LogWriter, ttl_s: float, *, known: int = 0, lease_s: float = LEASE_S
    ) -> Renewal | None:
        """Renew the lease on a log, or give it away with 0 s, and return what others did to it; None if it is lost.

        `known` is how much of the queue is. Raises StoreUnavailable.
        """
        began = writer.clock()
        arguments = [writer.token, round(lease_s * 1000), round(ttl_s * 1000), known, PIECE_BYTES]
        commands: list[Command] = [_RENEW.call(layout.log(writer.log_id), arguments)]
        if writer.account is not None:
            commands.append(self._bytes.renewal(writer.account.key_id, writer.log_id, ttl_s))
        answer, *_ = await self._store.run_in_order(commands)
        if not answer:
            writer.lost = True
            return None
        writer.held_until = began + lease_s
        reader, left_ms, closed, queue, more = answer
        return Renewal(reader, left_ms / 1000, closed, queue, bool(more))

    async def leave(self, reader: Reader) -> str | None:
        """Note that a reader has left. Returns the process that writes the log. Raises StoreUnavailable."""
        process: str | None = await self._store.run(*_LEAVE.call(layout.log(reader.log_id)[:1], [reader.token]))
        return process

    async def close_log(self, log_id: str, reason: str, writer: LogWriter | None = None) -> str | None:
        """Close a log, as its writer or for a caller entitled to it.

        Returns the process that writes it, None if there is no such log. Raises StoreUnavailable.
        """
        token, keep_ms = ("", 0) if writer is None else (writer.token, round(PRESENT_S * 1000))
        process: str | None = await self._store.run(*_CLOSE.call(layout.log(log_id), [token, reason, keep_ms]))
        return process

    async def release_bytes(self, writer: LogWriter) -> None:
        """Stop counting the bytes of a log that is closed."""
        if writer.account is not None:
            await self._bytes.release(writer.account.key_id, writer.log_id)

    async def forget(self, log_id: str) -> None:
        """Remove a log whose id was not sent."""
        await self._store.run("DEL", *layout.log(log_id))


async def _wait(reader: Reader, seconds: float) -> None:
    if not reader.stopped:
        reader.wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await reader.wake.wait()


def split_frames(chunk: bytes) -> list[bytes]:
    """Return the frames of a chunk one by one."""
    return [frame + b"\n\n" for frame in chunk.split(b"\n\n")[:-1]]
