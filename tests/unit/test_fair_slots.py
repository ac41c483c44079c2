"""Slots that keys share: nobody takes the last, nobody is passed over, and nobody who leaves keeps one."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest

from gateway.fair_slots import FairSlots, FairThreads, working_for
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


class Crowd:
    """Callers that hold a slot until they are told to go, by key."""

    def __init__(self, slots: FairSlots) -> None:
        self._slots = slots
        self.served: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._holding: dict[asyncio.Event, str] = {}
        """What each holder waits for, and its key; the longest holder first."""

    @property
    def held(self) -> Counter[str]:
        return Counter(self._holding.values())

    async def come(self, key_id: str, callers: int = 1) -> None:
        with working_for(key_id):
            self.tasks += [asyncio.create_task(self._hold(key_id)) for _ in range(callers)]
        await asyncio.sleep(0)

    async def _hold(self, key_id: str) -> None:
        async with self._slots.held():
            self.served.append(key_id)
            go = asyncio.Event()
            self._holding[go] = key_id
            try:
                await go.wait()
            finally:
                del self._holding[go]

    async def release(self, holders: int = 1) -> None:
        """Have those go that have held a slot for longest, and wait until the next ones hold it."""
        for go in list(self._holding)[:holders]:
            go.set()
        for _ in range(5):
            await asyncio.sleep(0)

    async def disperse(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def crowds() -> AsyncIterator[Callable[..., Crowd]]:
    made: list[Crowd] = []

    def gather(slots: int, *, spare: bool = True) -> Crowd:
        made.append(Crowd(FairSlots(slots, spare=spare)))
        return made[-1]

    yield gather
    for crowd in made:
        await crowd.disperse()


async def test_each_further_key_finds_a_slot_though_those_before_want_all(crowds: Callable[..., Crowd]) -> None:
    crowd = crowds(16)
    for key_id in "abcde":
        await crowd.come(key_id, 100)

    assert crowd.held == {"a": 8, "b": 4, "c": 2, "d": 1, "e": 1}


async def test_a_single_slot_is_given_out(crowds: Callable[..., Crowd]) -> None:
    crowd = crowds(1)
    await crowd.come("a", 2)
    assert crowd.held == {"a": 1}

    await crowd.release()

    assert crowd.served == ["a", "a"]


async def test_free_slot_goes_to_the_key_that_holds_fewest(crowds: Callable[..., Crowd]) -> None:
    crowd = crowds(4, spare=False)
    await crowd.come("a", 10)
    await crowd.come("b")
    await crowd.come("c")
    assert crowd.held == {"a": 4}

    await crowd.release(2)

    assert crowd.served[4:] == ["b", "c"], "and not the six that came before them"


async def test_keys_take_turns(crowds: Callable[..., Crowd]) -> None:
    crowd = crowds(1, spare=False)
    for key_id in ("first", "a", "b", "c"):
        await crowd.come(key_id, 1 if key_id == "first" else 3)
    for _ in range(9):
        await crowd.release()

    assert crowd.served == ["first", *"abc" * 3]


@pytest.mark.parametrize("spare", [True, False])
async def test_no_slot_is_lost_or_made_whoever_leaves_when(spare: bool) -> None:
    rng = random.Random(7)
    slots = FairSlots(5, spare=spare)
    crowd = Crowd(slots)
    for _ in range(300):
        await crowd.come(rng.choice("abcd"), rng.randint(1, 3))
        running = [task for task in crowd.tasks if not task.done()]
        for task in rng.sample(running, min(len(running), rng.randint(0, 4))):
            task.cancel()
        if rng.random() < 0.5:
            await crowd.release(rng.randint(0, 2))
        assert 0 <= slots.free <= 5
        assert spare or not (slots.free and slots.waiting)
    await crowd.disperse()

    assert (slots.free, slots.waiting) == (5, 0)


async def test_thread_that_is_left_keeps_its_slot_until_it_ends() -> None:
    """Callers that start work, leave and come again never have more of it running than there are threads."""
    threads = FairThreads(2, "test")
    go_on = threading.Event()
    started: list[str] = []

    def work() -> None:
        started.append("greedy")
        go_on.wait(10)

    try:
        for _ in range(10):
            with working_for("greedy"):
                tasks = [asyncio.create_task(threads.run(work)) for _ in range(4)]
            await until(lambda: len(started) == 2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert len(started) == 2

        with working_for("other"):
            other = asyncio.create_task(threads.run(lambda: started.append("other")))
        with working_for("greedy"):
            later = asyncio.create_task(threads.run(lambda: started.append("later")))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait_for(asyncio.gather(other, later), 5)
        assert sorted(started) == ["greedy", "greedy", "later", "other"]
    finally:
        go_on.set()
        threads.close()


async def test_work_that_fails_or_can_not_begin_gives_its_slot_back() -> None:
    threads = FairThreads(1, "test")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(threads.run(lambda: 1 // 0), 5)
    assert await asyncio.wait_for(threads.run(lambda: 5), 5) == 5
    threads.close()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shutdown"):
            await asyncio.wait_for(threads.run(lambda: 5), 5)


async def test_work_that_has_begun_keeps_its_slot_when_its_caller_leaves() -> None:
    slots = FairSlots(1, spare=False)
    go = asyncio.Event()
    begun: list[str] = []

    async def work(name: str) -> str:
        begun.append(name)
        await go.wait()
        return name

    async def call(name: str, key_id: str) -> str:
        return await slots.run_for(work(name), key_id)

    impatient = [asyncio.create_task(call(f"a{number}", "a")) for number in range(3)]
    other = asyncio.create_task(call("b", "b"))
    await asyncio.sleep(0)
    for task in impatient:
        task.cancel()
    await asyncio.gather(*impatient, return_exceptions=True)
    assert (begun, slots.free) == (["a0"], 0), "what was begun can't be stopped; what was not is dropped"

    go.set()
    assert await other == "b"
    await until(lambda: slots.free == 1)
    assert begun == ["a0", "b"]
