"""A bounded number of slots that API keys share fairly: one key's slow work never takes the last of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


class FairSlots:
    """A semaphore that serves keys in turns.

    A free slot goes to the waiting key that holds the fewest, and of equals to the one that has waited longest.

    With `spare`, a key may take another slot only while it holds fewer than are free: alone it gets half of them, the
    next key half of the rest, and so on, so that a newcomer finds one at once. That is for work whose length others
    control, such as an answer from a foreign server. Without it a newcomer may have to wait for one piece of work to
    end, which is for work that is short and bounded.
    """

    def __init__(self, slots: int, *, spare: bool = True) -> None:
        self._free = slots
        self._spare = spare
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def free(self) -> int:
        """Free slots."""
        return self._free

    @property
    def waiting(self) -> int:
        """Callers that wait for a slot."""
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def held_by(self, key_id: str) -> AsyncIterator[None]:
        """Hold a slot for a key. A caller that is cancelled gives it back, or up its place."""
        await self.take_for(key_id)
        try:
            yield
        finally:
            self.give_back(key_id)

    async def run_for(self, work: Coroutine[Any, Any, _T], key_id: str) -> _T:
        """The result of `work`, in a slot that it keeps until it ends.

        A caller that is cancelled leaves at once. Work that has begun continues without it, so that leaving and coming
        back gains nothing; work that has not begun never does.
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
                done.exception()  # the caller may have left

        running.add_done_callback(on_end)
        return await asyncio.shield(running)

    async def take_for(self, key_id: str) -> None:
        """Take a slot for a key, to be given back with `give_back`."""
        if key_id not in self._waiting and self._may_take(key_id):
            self._grant(key_id)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_id, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was granted in the same moment
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
        """Give back a slot that was taken."""
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
                self._waiting.move_to_end(key_id)  # it has had its turn
            else:
                del self._waiting[key_id]
            if not turn.done():  # else its caller was cancelled, and has not run since
                self._grant(key_id)
                turn.set_result(None)


class FairThreads:
    """Threads for short, bounded work, shared fairly by keys.

    A caller that is cancelled leaves at once. Work of its that has begun keeps its slot until it ends, so that leaving
    and coming back gains nothing; work that has not begun never does.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._slots = FairSlots(threads, spare=False)

    async def run_for(self, work: Callable[[], _T], key_id: str) -> _T:
        """The result of `work`, run in a thread for a key. Raises what it raises."""
        loop = asyncio.get_running_loop()
        await self._slots.take_for(key_id)

        def on_end(_: Future[_T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._slots.give_back, key_id)

        try:
            running = self._executor.submit(work)
        except BaseException:  # there are no more threads, or the executor is shut down
            self._slots.give_back(key_id)
            raise
        running.add_done_callback(on_end)
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Let the threads end. Work that has not begun is cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)
