"""The processes of an engine core: their death, their CPU time, and every wait for their answer.

A core that dies answers nothing, and vLLM 0.32 leaves some of those who wait for it alone: a call to one of the core's
own methods (`get_supported_tasks` before the first request, `is_sleeping`) never returns. So every wait for a core is
made inside `CoreProcesses.answer`, which ends it when a process dies or the engine is closed. The kernel reports a
death: the sentinel of a process becomes readable.

Knows processes on this machine only. Cores that Ray started elsewhere have none here; vLLM watches those itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing.connection
import os
from collections.abc import AsyncIterator, Callable, Iterable
from multiprocessing.process import BaseProcess

import psutil

from engine.base import EngineDied

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def died() -> EngineDied:
    """Return the error of a request whose core is gone."""
    return EngineDied()


class CoreProcesses:
    """Watches processes from construction until `end`, which is also called when one of them dies."""

    def __init__(self, processes: Iterable[BaseProcess], on_end: Callable[[], None]) -> None:
        """Watch `processes` on the running event loop. `on_end` is called once, on that loop."""
        self.ended = False
        self._processes = list(processes)
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._waits: set[asyncio.Timeout] = set()
        # Copies, because vLLM's own watch closes the originals at a time of its choice.
        self._sentinels = [os.dup(process.sentinel) for process in self._processes]
        for sentinel in self._sentinels:
            self._loop.add_reader(sentinel, self.end)

    @contextlib.asynccontextmanager
    async def answer(self) -> AsyncIterator[None]:
        """Context for awaiting the core. Raises EngineDied if the core dies or the engine is closed."""
        if self.ended:
            raise died()
        wait = asyncio.timeout(None)
        try:
            async with wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if wait.expired():
                raise died() from None
            raise

    def end(self) -> None:
        """End every wait and the watch. Idempotent."""
        if self.ended:
            return
        self.ended = True
        for sentinel in self._sentinels:
            self._loop.remove_reader(sentinel)
            os.close(sentinel)
        for wait in list(self._waits):
            wait.reschedule(self._loop.time())
        self._on_end()

    def any_died(self) -> bool:
        """Return whether one of the processes has died."""
        # By their sentinels: `is_alive` says yes for a moment while a thread of vLLM's reaps the dead one.
        return self.ended or bool(multiprocessing.connection.wait(self._sentinels, timeout=0))

    def cpu_time_s(self) -> float | None:
        """Return the CPU seconds of the processes, see `cpu_time_s` of the module."""
        return cpu_time_s(self._processes)


def cpu_time_s(processes: Iterable[BaseProcess]) -> float | None:
    """Return the CPU seconds that processes and all their children have used, ended children included.

    None if there is no process, or if one is stopped (SIGSTOP, a debugger): there is no progress then, although the
    others may spin while they wait for it. Takes some milliseconds on a machine with thousands of processes.
    """
    used_s = None
    for process in processes:
        with contextlib.suppress(psutil.Error, ValueError):  # gone, or closed by its owner
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if one.status() in _STOPPED:
                        return None
                    used_s = (used_s or 0.0) + sum(one.cpu_times()[:4])
    return used_s
