"""Waits for an engine's core: a death ends each of them at once, whenever it comes; nothing else does."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

from engine.base import EngineDied
from engine.local.core_processes import CoreProcesses, cpu_time_s
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

HANG_S = 10.0
"""Only a wait that nobody ends lasts so long."""


def spin() -> None:
    while True:
        pass


def sleep() -> None:
    time.sleep(600)


class Processes:
    """Starts child processes, which the test's end kills."""

    def __init__(self) -> None:
        self.started: list[BaseProcess] = []

    def __call__(self, target: object = sleep) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=target, daemon=True)  # type: ignore[arg-type]
        process.start()
        self.started.append(process)
        return process


@pytest.fixture
def start_process() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    for process in processes.started:
        process.kill()
        process.join()


async def never() -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("offset_ms", [-5, -1, 0, 1, 5, 20, 50])
async def test_wait_that_begins_around_the_death_ends(start_process: Processes, offset_ms: int) -> None:
    process = start_process()
    ended: list[bool] = []
    core = CoreProcesses([process], lambda: ended.append(True))

    async def ask() -> None:
        async with core.answer():
            await never()

    waits = [asyncio.create_task(ask())]
    if offset_ms >= 0:
        process.kill()
    await asyncio.sleep(abs(offset_ms) / 1000)
    waits += [asyncio.create_task(ask()) for _ in range(20)]
    process.kill()

    for outcome in await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), HANG_S):
        assert isinstance(outcome, EngineDied)
    assert ended == [True]
    assert core.any_died()


async def test_death_of_one_of_several_is_that_of_all(start_process: Processes) -> None:
    first, second = start_process(), start_process()
    core = CoreProcesses([first, second], lambda: None)
    second.kill()

    with pytest.raises(EngineDied):
        async with asyncio.timeout(HANG_S), core.answer():
            await never()


async def test_end_ends_waits_without_a_death(start_process: Processes) -> None:
    core = CoreProcesses([start_process()], lambda: None)

    async def ask() -> None:
        async with core.answer():
            await never()

    waits = [asyncio.create_task(ask()) for _ in range(3)]
    await asyncio.sleep(0)
    core.end()
    core.end()

    for outcome in await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), HANG_S):
        assert isinstance(outcome, EngineDied)


async def test_answer_errors_and_leaving_pass_through(start_process: Processes) -> None:
    core = CoreProcesses([start_process()], lambda: None)
    async with core.answer():
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with core.answer():
            raise TimeoutError  # of what was awaited, not ours

    async def ask() -> None:
        async with core.answer():
            await never()

    wait = asyncio.create_task(ask())
    await asyncio.sleep(0)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    assert not core._waits
    core.end()


async def test_original_sentinels_may_be_closed_by_others(start_process: Processes) -> None:
    """vLLM closes them from a thread of its own when it has seen the death."""
    process = start_process()
    core = CoreProcesses([process], lambda: None)
    process.kill()
    process.join()
    start_process.started.remove(process)
    process.close()
    await until(lambda: core.ended)
    assert core.cpu_time_s() is None


async def test_working_processes_use_cpu_time_and_waiting_ones_do_not(start_process: Processes) -> None:
    working, waiting = start_process(spin), start_process()
    before = cpu_time_s([working]), cpu_time_s([waiting])
    assert None not in before
    await until(lambda: (cpu_time_s([working]) or 0) > (before[0] or 0) + 0.5)
    assert (cpu_time_s([waiting]) or 0) < (before[1] or 0) + 0.1, "no more than it took to start"
    assert (cpu_time_s([working, waiting]) or 0) > (before[0] or 0)


async def test_stopped_process_uses_none_though_another_spins(start_process: Processes) -> None:
    working, stopped = start_process(spin), start_process()
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGSTOP)
    await until(lambda: cpu_time_s([working, stopped]) is None)
    os.kill(stopped.pid, signal.SIGCONT)
    await until(lambda: cpu_time_s([working, stopped]) is not None)
    assert cpu_time_s([]) is None


async def test_children_count_even_when_they_have_ended(start_process: Processes) -> None:
    def compile_something() -> None:
        if (child := os.fork()) == 0:
            deadline = time.process_time() + 0.2
            while time.process_time() < deadline:
                pass
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(600)

    process = start_process(compile_something)
    await until(lambda: (cpu_time_s([process]) or 0) >= 0.15)
