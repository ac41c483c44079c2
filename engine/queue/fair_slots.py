"""Slots and threads that API keys share fairly: slow work of one key never takes the last slot."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


class FairSlots:
    """A semaphore that is fair across keys.

    A free slot goes to the waiting key that holds the fewest, and among equals to the one that has waited longest.

    With `spare`, a key may take another slot only while it holds fewer than are free: alone it gets half of them, the
    next key half of the rest, and so on, so that a new key finds one immediately. Use it for work of unknown duration,
    such as a request to another server. Without it, a new key may have to wait for one piece of work to end; use it
    for short work.
    """

    def __init__(self, slots: int, *, spare: bool = True) -> None:
        self._free = slots
        self._spare = spare
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self._free

    @property
    def waiting(self) -> int:
        """Number of callers that wait for a slot."""
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def held_by(self, key_id: str) -> AsyncIterator[None]:
        """Hold a slot for a key. Cancellation releases the slot, or the place in the queue."""
        await self.take_for(key_id)
        try:
            yield
        finally:
            self.give_back(key_id)

    async def run_for(self, work: Coroutine[Any, Any, _T], key_id: str) -> _T:
        """Run `work` in a slot that it keeps until it ends, and return its result.

        Cancelling the caller does not cancel work that has started, so that cancelling and retrying gains nothing;
        work that has not started is dropped.
        """
        try:
            await self.take_for(key_id)
        except BaseException:
            work.close()
            raise
        running = asyncio.ensure_future(work)

        def on_end(done: asyncio.Future[_T]) -> None:
            self.give_back(key_id)
            if not done.cancelled():
                done.exception()  # retrieve it: the caller may have been cancelled

        running.add_done_callback(on_end)
        return await asyncio.shield(running)

    async def take_for(self, key_id: str) -> None:
        """Take a slot for a key; release it with `give_back`."""
        if key_id not in self._waiting and self._may_take(key_id):
            self._grant(key_id)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_id, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was granted at the same moment
                self.give_back(key_id)
            else:
                self._leave(key_id, turn)
            raise

    def _may_take(self, key_id: str) -> bool:
        return self._free > (self._held[key_id] if self._spare else 0)

    def _grant(self, key_id: str) -> None:
        self._free -= 1
        self._held[key_id] += 1

    def give_back(self, key_id: str) -> None:
        """Release a slot."""
        self._free += 1
        self._held[key_id] -= 1
        if not self._held[key_id]:
            del self._held[key_id]
        self._serve()

    def _leave(self, key_id: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(key_id)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[key_id]

    def _serve(self) -> None:
        while self._waiting:
            key_id = min(self._waiting, key=self._held.__getitem__)
            if not self._may_take(key_id):
                return
            turns = self._waiting[key_id]
            turn = turns.popleft()
            if turns:
                self._waiting.move_to_end(key_id)  # behind the keys that are still waiting
            else:
                del self._waiting[key_id]
            if not turn.done():  # otherwise its caller was cancelled and has not run since
                self._grant(key_id)
                turn.set_result(None)


class FairThreads:
    """Threads for short, bounded work, shared fairly by keys.

    Cancelling a caller does not stop work that has started: it keeps its slot until it ends, so that cancelling and
    retrying gains nothing. Work that has not started is dropped.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._slots = FairSlots(threads, spare=False)

    async def run_for(self, work: Callable[[], _T], key_id: str) -> _T:
        """Run `work` in a thread for a key and return its result. Raises what `work` raises."""
        loop = asyncio.get_running_loop()
        await self._slots.take_for(key_id)

        def on_end(_: Future[_T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(self._slots.give_back, key_id)

        try:
            running = self._executor.submit(work)
        except BaseException:  # no more threads, or the executor is shut down
            self._slots.give_back(key_id)
            raise
        running.add_done_callback(on_end)
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Shut the threads down. Work that has not started is cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)
