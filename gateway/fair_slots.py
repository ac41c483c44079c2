"""The slots of `engine.queue.fair_slots`, taken for the key that the current task works for.

`working_for` names the key that the current task works for; tasks that are started in it inherit the name. Work that
belongs to no key (indexing, the gateway's own requests) shares one name, the empty one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import TypeVar

from engine.queue import fair_slots

_T = TypeVar("_T")

_key_id: ContextVar[str] = ContextVar("key_id", default="")


@contextlib.contextmanager
def working_for(key_id: str) -> Iterator[None]:
    """Attribute the slots that are taken in here to a key. Not for generators: their consumer would inherit it."""
    token = _key_id.set(key_id)
    try:
        yield
    finally:
        _key_id.reset(token)


class FairSlots(fair_slots.FairSlots):
    """Slots for the current task's key."""

    def held(self) -> AbstractAsyncContextManager[None]:
        """Hold a slot. A caller that is cancelled gives it back, or up its place."""
        return self.held_by(_key_id.get())

    async def take(self) -> str:
        """Take a slot, to be given back under the id that is returned."""
        key_id = _key_id.get()
        await self.take_for(key_id)
        return key_id


class FairThreads(fair_slots.FairThreads):
    """Threads for the current task's key."""

    async def run(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, run in a thread. Raises what it raises."""
        return await self.run_for(work, _key_id.get())
