"""The ledger: what every key spent on every model on every day, exactly once, whatever the store does.

Every generation ends in one `Entry`. Entries of this process carry rising numbers and are applied in order by
lua/settle.lua, which ignores a number it has seen: sending one again, after a timeout that may or may not have
reached the store, changes nothing. While the store is away entries go to a journal on disk; when it is back the
journal is replayed first. A journal left behind by a killed gateway is replayed by the next one in the same data
directory. The journal survives the process, not the loss of power: it is not fsynced.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from gateway.access.allowance import (
    DAY_S,
    Allowance,
    Amounts,
    Standing,
    day_number,
    day_of,
    encoded,
    encoded_limits,
    limit_keys,
    standing_of,
    today,
)
from gateway.errors import StoreRefused, StoreUnavailable
from gateway.store import layout
from gateway.store.client import Lane, Store
from gateway.store.script import Command, Script

log = logging.getLogger(__name__)

KEEP_DAYS = 400
_SETTLE = Script("window", "reservation", "settle", when_full=True)
_LIST = Script("list", when_full=True)
_BATCH = 128
_REPLAYED_AT_ONCE = 32
"""Fewer: after an outage all gateways replay at once, and the server does nothing else meanwhile."""
_MISSED = -1
_ROWS = 32
"""Rows of usage that are read at once: the store does nothing else meanwhile."""
_RETRY_S = 0.1


@dataclass(slots=True, kw_only=True)
class Entry:
    """One generation's (or failed request's) line in the ledger, and what it gives back to its limits."""

    key_id: str
    model_id: str
    allowance: Allowance
    day: str = field(default_factory=today)
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    aborted_requests: int = 0
    error: str = ""
    """Error code, where it ended with one."""
    lease: str = ""
    """Request whose lease ends with this."""
    bucket: int = 0
    """Second of the store's window that holds what was reserved; 0 where the store made no reservation."""
    reserved: Amounts = field(default_factory=dict)
    """What of the reservation ends with this."""
    counted: Amounts = field(default_factory=dict)
    """What of that counts against the limits."""
    reservation: str = ""
    """Id of the reservation that this settles, or a part of it."""
    second: int = 0
    """When that was made, on the store's clock: the bucket and the day that count it if the store does not have it."""
    uncertain: bool = False
    """Whether a command that makes the reservation may still reach the store, which then refuses it."""
    pending: bool = False
    """Whether the store did not know the reservation."""
    number: int = 0

    @property
    def spent(self) -> int:
        """Tokens that count against limits."""
        return self.prompt_tokens + self.completion_tokens

    @classmethod
    def from_journal(cls, line: bytes) -> Entry:
        """Read a journal's line, as this release or an older one wrote it."""
        fields = orjson.loads(line)
        fields["allowance"] = Allowance.of(**fields["allowance"])
        requests, refund = fields.pop("held_requests", 0), fields.pop("refund", None)
        entry = cls(**fields)
        if refund is not None:  # written before the amounts were
            entry.reserved = {"requests": requests, "tokens": refund + entry.spent}
            entry.counted = {"requests": requests, "tokens": entry.spent}
        return entry

    def journal(self) -> dict[str, Any]:
        """What `from_journal` reads, before it is JSON."""
        return asdict(self) | {"allowance": self.allowance.fields()}

    def command(self, process: str, after: int = 0) -> Command:
        """Return the call of lua/settle.lua that applies this entry of a gateway process.

        `after` is the number of the same key's entry in front of it, which must have been applied.
        """
        now = time.time()
        # What is given back goes to the day it was taken from, which may have ended since.
        reserved_at = self.bucket or self.second or int(now)
        keys = limit_keys(self.key_id, self.model_id, reserved_at)
        keys += layout.ledger(self.key_id, f"{self.day}:{self.model_id}")
        limits = self.allowance
        arguments: list[Any] = [process, self.number, after, self.lease, self.reservation]
        refund = {name: amount - self.counted.get(name, 0) for name, amount in self.reserved.items()}
        arguments += [self.bucket or self.second, encoded(refund.items()), encoded(self.counted.items())]
        arguments += [int(self.uncertain), encoded_limits(limits.per_minute), limits.tokens_per_day]
        arguments += [day_number(reserved_at), f"{self.day}:{self.model_id}", KEEP_DAYS]
        arguments.append(day_of(now - KEEP_DAYS * DAY_S))
        for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "aborted_requests"):
            if amount := getattr(self, name):
                arguments += [name, amount]
        if self.error:
            arguments += [f"error:{self.error}", 1]
        return _SETTLE.call(keys, arguments)


class Ledger:
    """Writes entries, and reads totals back."""

    def __init__(self, store: Store, data_dir: Path) -> None:
        self._store = store
        self._data_dir = data_dir
        self._process = uuid.uuid4().hex[:12]
        self._number = 0
        self._listed: set[str] = set()
        self._waiting: list[tuple[Entry, asyncio.Future[Standing | None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._journal: IO[bytes] | None = None
        self._replayer: asyncio.Task[None] | None = None
        self._adopter: asyncio.Task[None] | None = None
        self._closing = False
        self.on_charged: Callable[[Entry], None] = lambda entry: None
        """Called when the store has applied an entry of a reservation that it did not know."""
        store.on_back.append(self._listed.clear)  # it may have lost the list

    async def start(self) -> None:
        """Begin to replay what earlier gateways left behind."""
        self._adopter = asyncio.create_task(self._adopt_all())

    async def close(self) -> None:
        """Write what is waiting; what the store does not take stays in the journal."""
        await self._store.answered()  # what was reserved for callers who have left is given back then
        self._closing = True
        while self._writer is not None and not self._writer.done():
            await self._writer
        for task in (self._adopter, self._replayer):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._journal is not None:
            path = self._journal_path
            with contextlib.suppress(StoreUnavailable, OSError, ValueError):  # it stays for the next gateway
                if self._store.available:
                    async for _ in self._replay(path, self._process):
                        pass
                    path.unlink()
            self._journal.close()
        for entry, _ in self._waiting:
            self._set_aside(entry, "neither the store nor the disk takes")

    @property
    def _journal_path(self) -> Path:
        return self._data_dir / f"ledger-{self._process}.jsonl"

    @property
    def journal_bytes(self) -> int:
        """Size of the journals in the data directory: this gateway's, and those left behind or not readable."""
        sizes = 0
        for path in self._data_dir.glob("ledger-*.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # replayed meanwhile
                sizes += path.stat().st_size
        return sizes

    def settle(self, entry: Entry) -> asyncio.Future[Standing | None]:
        """Take `entry`; it is safe from here on. The result is the standing after it, None if the store is away."""
        self._number += 1
        entry.number = self._number
        result: asyncio.Future[Standing | None] = asyncio.get_running_loop().create_future()
        if self._journal is not None:
            self._append(entry)
            result.set_result(None)
            return result
        self._waiting.append((entry, result))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        return result

    async def _write(self) -> None:
        """Send entries in order, all that wait at once; order is what makes the numbers mean anything."""
        stuck = False
        while self._waiting:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            try:
                answers = await self._send([entry for entry, _ in batch], self._process, self._store)
            except StoreUnavailable:
                self._waiting = batch + self._waiting
                try:
                    self._turn_to_journal()
                except OSError as error:
                    if not stuck:
                        log.error("usage stays in memory until the store is back, as no journal can be made: %s", error)
                    stuck = True
                    if not self._closing:
                        await asyncio.sleep(_RETRY_S)
                        continue
                return
            except Exception as error:  # whatever it is, those who wait must not wait for ever
                answers = [self._set_aside(entry, f"can't be sent ({error!r})") for entry, _ in batch]
            for (entry, result), answer in zip(batch, answers, strict=True):
                if not result.done():
                    result.set_result(standing_of(entry.allowance, answer[1:]))

    async def _send(self, entries: list[Entry], process: str, lane: Lane) -> list[Any]:
        commands, last = [], dict[str, int]()
        for entry in entries:
            # The first of a key is behind entries that were all answered.
            commands.append(entry.command(process, last.get(entry.key_id, 0)))
            last[entry.key_id] = entry.number
        answers = await lane.try_in_order(commands)
        if any(not isinstance(answer, StoreRefused) and answer[0] == _MISSED for answer in answers):
            raise StoreUnavailable("the store missed an entry; all are sent again")
        answers = [
            self._set_aside(entry, f"the store refuses ({answer})") if isinstance(answer, StoreRefused) else answer
            for entry, answer in zip(entries, answers, strict=True)
        ]
        if process == self._process:
            for entry in entries:
                if entry.pending:
                    self.on_charged(entry)
        if unlisted := {entry.key_id for entry in entries} - self._listed:
            await self._store.run(*_LIST.call([layout.API_KEYS_WITH_USAGE], sorted(unlisted)))
            self._listed |= unlisted
        return answers

    def _set_aside(self, entry: Entry, reason: str) -> list[int]:
        """Leave an entry to the log: it must not hold up all that follow. Returns an answer.

        It is not sent again: its number counts as applied where the script broke off half-way.
        """
        self._store.metrics.usage_refused.inc()
        # orjson refuses integers beyond 64 bits.
        log.error("usage that %s: %s", reason, json.dumps(entry.journal(), separators=(",", ":")))
        return [0, *(figure for _, limit in entry.allowance.per_minute for figure in (limit, 0))]

    def _turn_to_journal(self) -> None:
        """Put what waits into a journal, and all that comes until the store is back. Raises OSError."""
        for _, result in self._waiting:
            if not result.done():
                result.set_result(None)
        self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._journal_path
        unlocked = path.with_suffix(".new")
        journal = unlocked.open("ab", buffering=0)
        fcntl.flock(journal, fcntl.LOCK_EX)
        unlocked.rename(path)  # seen by others only now that it is locked
        self._journal = journal
        self._replayer = asyncio.create_task(self._replay_when_back(path))
        waiting, self._waiting = self._waiting, []
        for entry, _ in waiting:
            self._append(entry)
        log.warning("usage goes to %s until the store is back", path.name)

    def _append(self, entry: Entry) -> None:
        assert self._journal is not None
        line = orjson.dumps(entry.journal()) + b"\n"
        end = os.fstat(self._journal.fileno()).st_size
        try:
            if self._journal.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._journal.truncate(end)  # half a line would spoil the next
            self._set_aside(entry, f"the journal can't take ({error})")

    async def _replay_when_back(self, path: Path) -> None:
        done, said = 0, ""
        while True:
            await asyncio.sleep(_RETRY_S)
            if not self._store.available:
                continue
            try:
                async for reached in self._replay(path, self._process, done):
                    done = reached
            except StoreUnavailable:
                continue
            except Exception as error:  # of any kind, because only this task replays it
                if str(error) != said:
                    said = str(error)
                    log.error("the journal %s can't be replayed yet: %r", path.name, error)
                continue
            # No await since the last line was read: nothing was appended in between.
            assert self._journal is not None
            self._journal.close()
            self._journal = None
            with contextlib.suppress(OSError):  # what is replayed again counts once
                path.unlink()
            log.warning("the journal is replayed, %d bytes", done)
            return

    async def _replay(self, path: Path, process: str, start: int = 0) -> AsyncGenerator[int, None]:
        """Apply a journal from byte `start` on. Yields how far it is. Raises StoreUnavailable; continue
        from where it got: a store that fails now and then would otherwise see the same entries again and again.

        It takes the patient lane: a batch that is slow on a busy server would open the breaker of the limits, again and
        again.
        """
        with path.open("rb") as lines:
            lines.seek(start)
            while True:
                batch = [line for line in (lines.readline() for _ in range(_REPLAYED_AT_ONCE)) if line.endswith(b"\n")]
                if not batch:
                    return
                await self._send([Entry.from_journal(line) for line in batch], process, self._store.patient)
                start += sum(map(len, batch))
                yield start

    async def _adopt_all(self) -> None:
        """Replay the journals of gateways that are gone, as soon as the store can be had."""
        for path in sorted(self._data_dir.glob("ledger-*.jsonl")):
            done: int | None = 0
            while done is not None and (done := await self._adopt(path, done)) is not None:
                await asyncio.sleep(_RETRY_S)

    async def _adopt(self, path: Path, done: int) -> int | None:
        """Replay one journal from byte `done` on. Returns up to where it got, None where nothing is left to do.

        A gateway that lives holds a lock on its own, and keeps it.
        """
        try:
            with path.open("r+b") as journal:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                async for reached in self._replay(path, path.stem.removeprefix("ledger-"), done):
                    done = reached
                path.unlink()
        except StoreUnavailable:
            return done
        except (BlockingIOError, FileNotFoundError):
            return None
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:  # another user's, or damaged
            log.error("the journal %s can't be read and stays where it is: %r", path.name, error)
            return None
        log.warning("replayed the journal that an earlier gateway left: %s", path.name)
        return None

    async def key_ids(self) -> list[str]:
        """Return the ids of all keys that ever spent anything. Raises StoreUnavailable."""
        return sorted(await self._store.patient.run("SMEMBERS", layout.API_KEYS_WITH_USAGE))

    async def totals(self, key_id: str) -> list[dict[str, Any]]:
        """Return usage of one key: one dict per day and model, in order. Raises StoreUnavailable."""
        days = sorted(await self._store.patient.run("SMEMBERS", layout.usage_days(key_id)))
        rows: list[Any] = []
        for start in range(0, len(days), _ROWS):
            asked: list[Command] = [("HGETALL", layout.usage(key_id, day)) for day in days[start : start + _ROWS]]
            rows += await self._store.patient.run_in_order(asked)
        return [_row(day, row) for day, row in zip(days, rows, strict=True) if row]


def _pairs(flat: Any) -> Iterator[tuple[str, int]]:
    """Read HGETALL's answer: a pipeline that sends raw commands gets it flat."""
    items = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
    for name, amount in items:
        yield str(name), int(amount)


def _row(day: str, flat: Any) -> dict[str, Any]:
    date, _, model_id = day.partition(":")
    row: dict[str, Any] = {"date": date, "model": model_id, "requests": 0, "prompt_tokens": 0, "cached_tokens": 0}
    row |= {"completion_tokens": 0, "aborted_requests": 0, "errors": {}}
    for name, amount in _pairs(flat):
        if name.startswith("error:"):
            row["errors"][name.removeprefix("error:")] = amount
        else:
            row[name] = amount
    return row
