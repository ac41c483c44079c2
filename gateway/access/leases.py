"""Open reservations and running requests of this process, and the renewal of their leases in the store.

A lease says until when a reservation, or a running request, counts without a word from its gateway. It is short, so
that what a killed gateway held is soon free again, and renewed by lua/hold.lua while a generation runs. When the
store comes back after it was away, everything under way is reported to it again: it may know nothing of what was
reserved meanwhile, and may have given back what was reserved before.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gateway.access.allowance import Allowance, Amounts, day_number, encoded, limit_keys
from gateway.errors import StoreUnavailable
from gateway.store.client import Store
from gateway.store.script import Command, Script

_HOLD = Script("window", "reservation", "hold", when_full=True)
_FREE = Script("free", when_full=True)
_AT_ONCE = 64
"""Reservations in one call of the script."""
_CALLS_AT_ONCE = 16


@dataclass(slots=True)
class Held:
    """A reservation that is not settled. `second` is its bucket on the store's clock."""

    id: str
    key_id: str
    model_id: str
    allowance: Allowance
    second: int
    amounts: Amounts
    pending: bool
    """Whether the store does not know it, as far as this process knows."""
    uncertain: bool
    """Whether a command that makes it may still be on the way to the store."""
    renewed_at: float = field(default_factory=time.monotonic)

    @property
    def counted(self) -> Amounts:
        """All of it, as long as it is not settled."""
        return self.amounts


@dataclass(slots=True)
class _Running:
    """A request that counts as running."""

    key_id: str
    model_id: str
    allowance: Allowance
    renewed_at: float = field(default_factory=time.monotonic)


_Batch = tuple[Command, list[Held], list[str]]
"""A call of the script, and the reservations and requests that it is about."""


class Leases:
    """The reservations and the running requests of this process."""

    def __init__(self, store: Store, lease_s: Callable[[], float], on_charged: Callable[[Held], None]) -> None:
        """`on_charged` is called when the store has taken over a reservation that was made without it."""
        self._store = store
        self._lease_s = lease_s
        self._on_charged = on_charged
        self._process = uuid.uuid4().hex[:8]
        self._numbers = itertools.count(1)
        self._held: dict[str, Held] = {}
        self._running: dict[str, _Running] = {}
        self._counts: dict[tuple[str, str], int] = {}
        """Running requests by (key, model), and by (key, '')."""
        self._timer: asyncio.TimerHandle | None = None
        self._renewals: set[asyncio.Task[None]] = set()
        store.on_back.append(self._report_all)

    def close(self) -> None:
        """Stop renewing."""
        if self._timer is not None:
            self._timer.cancel()
        for renewal in self._renewals:
            renewal.cancel()

    def new_id(self) -> str:
        """Return an id that no other reservation has."""
        return f"{self._process}:{next(self._numbers)}"

    def hold(self, held: Held) -> None:
        """Take note of a reservation."""
        self._held[held.id] = held
        self._keep_renewing()

    def release(self, reservation_id: str, amounts: Amounts) -> Held | None:
        """Take part of a reservation, or all of it, off the books. Returns the reservation, None if it is not there."""
        held = self._held.get(reservation_id)
        if held is not None:
            for name, amount in amounts.items():
                held.amounts[name] = held.amounts.get(name, 0) - amount
            if held.amounts["tokens"] <= 0:
                del self._held[reservation_id]
        return held

    def begin(self, member: str, key_id: str, model_id: str, allowance: Allowance) -> None:
        """Count a request as running."""
        if member not in self._running:
            self._running[member] = _Running(key_id, model_id, allowance)
            for of in ((key_id, model_id), (key_id, "")):
                self._counts[of] = self._counts.get(of, 0) + 1
            self._keep_renewing()

    def end(self, member: str) -> None:
        """Count a request as running no more."""
        running = self._running.pop(member, None)
        if running is not None:
            for of in ((running.key_id, running.model_id), (running.key_id, "")):
                self._counts[of] -= 1
                if not self._counts[of]:
                    del self._counts[of]

    def running(self, key_id: str, model_id: str) -> tuple[int, int]:
        """The numbers of running requests of a model and of a key in this process."""
        return self._counts.get((key_id, model_id), 0), self._counts.get((key_id, ""), 0)

    @property
    def _renew_s(self) -> float:
        return self._lease_s() / 4

    def _keep_renewing(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._renew_s, self._renew)

    def _renew(self) -> None:
        self._timer = None
        if not self._held and not self._running:
            return
        self._keep_renewing()
        due = time.monotonic() - self._renew_s
        self._start(
            [held for held in self._held.values() if held.renewed_at <= due],
            [member for member, running in self._running.items() if running.renewed_at <= due],
            restore=False,
        )

    def _report_all(self) -> None:
        for held in self._held.values():
            held.uncertain = True  # this report may reach the store after the reservation is settled
        self._start(list(self._held.values()), list(self._running), restore=True)

    def _start(self, several: list[Held], members: list[str], *, restore: bool) -> None:
        if several or members:
            renewal = asyncio.create_task(self._send(several, members, restore))
            self._renewals.add(renewal)
            renewal.add_done_callback(self._renewals.discard)

    async def _send(self, several: list[Held], members: list[str], restore: bool) -> None:
        batches = list(self._batches(several, members, restore))
        for start in range(0, len(batches), _CALLS_AT_ONCE):
            part = batches[start : start + _CALLS_AT_ONCE]
            try:
                await self._store.run_in_order([command for command, _, _ in part])
                self._note(part, restore)
                if restore:
                    await self._free_ended(part)
            except StoreUnavailable:
                return  # everything is reported again when it is back

    def _note(self, batches: list[_Batch], restore: bool) -> None:
        now = time.monotonic()
        for _, reported, members in batches:
            for held in reported:
                held.renewed_at = now
                if held.pending and restore and held.id in self._held:
                    held.pending = False
                    self._on_charged(held)
            for member in members:
                if member in self._running:
                    self._running[member].renewed_at = now

    async def _free_ended(self, batches: list[_Batch]) -> None:
        """Free requests that ended while they were reported as running. Raises StoreUnavailable."""
        commands = [
            _FREE.call([command[3], command[4]], ended)
            for command, _, members in batches
            if (ended := [member for member in members if member not in self._running])
        ]
        if commands:
            await self._store.run_in_order(commands)

    def _batches(self, several: list[Held], members: list[str], restore: bool) -> Iterable[_Batch]:
        """Return the calls of the script, each with the reservations and the requests that it is about."""
        groups: dict[tuple[str, str, Allowance], tuple[list[Held], list[str]]] = {}
        for held in several:
            if held.id not in self._held:  # it was settled since the report was begun
                continue
            groups.setdefault((held.key_id, held.model_id, held.allowance), ([], []))[0].append(held)
        for member in members:
            running = self._running.get(member)
            if running is None:  # it has ended since the report was begun
                continue
            groups.setdefault((running.key_id, running.model_id, running.allowance), ([], []))[1].append(member)
        now = self._store.state.time_s()
        for (key_id, model_id, allowance), (reservations, requests) in groups.items():
            keys = limit_keys(key_id, model_id, now)
            for start in range(0, max(len(reservations), len(requests)), _AT_ONCE):
                part, rest = reservations[start : start + _AT_ONCE], requests[start : start + _AT_ONCE]
                arguments: list[Any] = [round(self._lease_s() * 1000), day_number(now), allowance.tokens_per_day]
                arguments += [allowance.concurrent_requests, allowance.concurrent_requests_of_key, int(restore)]
                arguments.append(len(part))
                for held in part:
                    arguments += [held.id, held.second, encoded(held.amounts.items())]
                yield _HOLD.call(keys, [*arguments, *rest]), part, rest
