"""An engine that is watched, and rebuilt when it dies or hangs.

`SupervisedEngine` is an `Engine` around a factory of engines. It asks the current one for its health every second. An
engine that neither answers nor uses CPU time for `engine_stall_s` counts as dead. This finds a frozen core. An engine
that does not answer but works, because it compiles or captures graphs, has `engine_busy_s`. This bound finds a core
that spins without progress, for example because its GPU hangs. A dead engine is closed, which ends its running
generations with EngineDied, and a new one is built in the same process. More than `max_engine_restarts` within
`restart_window_s`, or a first start that fails, is final: `failed` is set, and the owner of the process should end it
so that an outside supervisor takes over. A lazy engine stays idle until the first request, which waits for it to load.
A load that fails counts as a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Literal

from engine.base import (
    Delta,
    Engine,
    EngineDied,
    EngineError,
    EngineUnavailable,
    GenerationRequest,
    Prepared,
    Request,
    Task,
)
from engine.wrapper import EngineWrapper

log = logging.getLogger(__name__)

State = Literal["idle", "loading", "starting", "ready", "restarting", "failed", "closed"]
Cause = Literal["died", "stalled", "load"]
"""Why an engine was restarted; `load` is a lazy engine that failed to load."""

_BUSY_SHARE = 0.05
"""Share of one CPU above which an engine is busy. A compiling core uses a whole CPU, a waiting one none."""

_SENTENCES: dict[State, str] = {
    "idle": "The engine has not been loaded yet.",
    "loading": "The engine is being loaded. Try again shortly.",
    "starting": "The engine is still starting. Try again shortly.",
    "restarting": "The engine is restarting after a failure. Try again shortly.",
    "failed": "The engine has failed.",
    "closed": "The engine has been shut down.",
}


class SupervisedEngine(EngineWrapper):
    """An engine that is replaced when it fails. `name` is from the configuration, for logs and readiness."""

    def __init__(
        self,
        name: str,
        build: Callable[[], Engine],
        *,
        lazy: bool = False,
        engine_stall_s: float = 20.0,
        engine_busy_s: float = 300.0,
        max_engine_restarts: int = 3,
        restart_window_s: float = 600.0,
        check_every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.state: State = "starting"
        self.ready = asyncio.Event()
        """Set while requests are accepted: `state` is "ready", "idle" or "loading". In the latter two requests wait."""
        self.failed = asyncio.Event()
        self.failure: EngineError | None = None
        """Reason why `failed` is set."""
        self.restarts: dict[Cause, int] = {"died": 0, "stalled": 0, "load": 0}
        """Number of restarts since the start of the process."""
        self._build = build
        self._lazy = lazy
        self._loading: asyncio.Task[None] | None = None
        self._unused = True  # the engine that was built first has not been started yet
        self._engine = build()
        self._engine_stall_s = engine_stall_s
        self._engine_busy_s = engine_busy_s
        self._max_engine_restarts = max_engine_restarts
        self._restart_window_s = restart_window_s
        self._check_every_s = check_every_s
        self._clock = clock
        self._restarts: deque[float] = deque()
        self._died = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    @property
    def unfinished_requests(self) -> int:
        return self._engine.unfinished_requests

    @property
    def current(self) -> Engine:
        """The supervised engine; a restart replaces it."""
        return self._engine

    @property
    def wrapped(self) -> Engine:
        """The engine that receives requests now. Raises EngineUnavailable unless it is ready."""
        if self.state != "ready":
            raise EngineUnavailable(_SENTENCES[self.state])
        return self._engine

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The engine's tasks, whether or not it is ready."""
        return self._engine.tasks

    async def start(self) -> None:
        """Start the engine and its health checks; do nothing if it is lazy. A failure sets `failed` and is raised."""
        if self._lazy:
            self._become("idle")
            return
        try:
            await self._engine.start()
        except Exception as error:  # of whatever type: unseen, it would leave an engine "starting" for ever
            failure = error if isinstance(error, EngineError) else EngineError(f"{type(error).__name__}: {error}")
            self._give_up(failure)
            raise failure from error
        self._watch_from_now()

    async def load(self) -> None:
        """Wait until a lazy engine is loaded. Raises EngineUnavailable, also if another engine is not ready."""
        if self.state == "idle":
            self._become("loading")
            self._loading = asyncio.create_task(self._load(), name=f"load engine {self.name}")
        if self._loading is not None:
            # The first caller may leave. Other and later requests still need the engine.
            await asyncio.wait([self._loading])
            if self.state == "idle":
                raise EngineUnavailable("The engine could not be loaded. Try again shortly.")
        _ = self.wrapped

    async def _load(self) -> None:
        log.info("loading engine %s", self.name)
        try:
            if not self._unused:
                self._engine = self._build()
            self._unused = False
            await self._engine.start()
        except Exception as error:
            log.error("engine %s could not be loaded: %s", self.name, error)
            with contextlib.suppress(Exception):
                await self._engine.close()
            if self._spend_restart("load", error):
                self._become("idle")
        else:
            self._watch_from_now()
        finally:
            self._loading = None

    def _watch_from_now(self) -> None:
        self._become("ready")
        self._watch = asyncio.create_task(self._watch_health(), name=f"watch engine {self.name}")

    async def prepare(self, request: Request) -> Prepared:
        await self.load()
        return await self.wrapped.prepare(request)

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        await self.load()
        return await self.wrapped.tokenize(request)

    async def detokenize(self, token_ids: list[int]) -> str:
        await self.load()
        return await self.wrapped.detokenize(token_ids)

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        try:
            return await self.wrapped.pool(prepared)
        except EngineDied:
            self._died.set()
            raise

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        try:
            async with contextlib.aclosing(self.wrapped.generate(prepared)) as deltas:
                async for delta in deltas:
                    yield delta
        except EngineDied:
            self._died.set()
            raise

    def cpu_time_s(self) -> float | None:
        return self._engine.cpu_time_s()

    async def close(self) -> None:
        for task in (self._loading, self._watch):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._become("closed")
        await self._engine.close()

    def _become(self, state: State) -> None:
        self.state = state
        if state in ("ready", "idle", "loading"):
            self.ready.set()
        else:
            self.ready.clear()

    def _give_up(self, error: EngineError) -> None:
        self._become("failed")
        self.failure = error
        self.failed.set()

    async def _watch_health(self) -> None:
        while self.state != "failed":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_every_s):
                    await self._died.wait()
            self._died.clear()
            if (cause := await self._examine()) is not None:
                await self._restart(cause)

    async def _examine(self) -> Cause | None:
        """Check the engine's health. Returns the cause for a restart, or None."""
        asked = asyncio.ensure_future(self._engine.check_health())
        try:
            silent_s = await self._await_sign(asked)
            if asked.done():
                await asked
                return None
            log.error("engine %s has not answered for %g s", self.name, silent_s)
            return "stalled"
        except Exception as error:  # one that can't even be asked is dead
            log.error("engine %s is dead: %s", self.name, error)
            return "died"
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    async def _await_sign(self, asked: asyncio.Future[None]) -> float:
        """Wait until `asked` is answered, or the engine counts as stalled. Returns how many seconds it was silent.

        Waits in steps and counts those: an event loop that was held up itself has still asked only once.
        """
        step_s = min(self._check_every_s, self._engine_stall_s / 4)
        most_s = max(self._engine_busy_s, self._engine_stall_s)
        silent_s = idle_s = 0.0
        used_s: float | None = None
        noted = False
        while idle_s < self._engine_stall_s and silent_s < most_s:
            if (await asyncio.wait([asked], timeout=step_s))[0]:
                break
            used_before_s, used_s = used_s, self._engine.cpu_time_s()
            works = used_s is not None and used_before_s is not None and used_s - used_before_s >= _BUSY_SHARE * step_s
            silent_s += step_s
            idle_s = 0.0 if works else idle_s + step_s
            if works and silent_s >= self._engine_stall_s and not noted:
                noted = True
                log.warning("engine %s has not answered for %g s, but works", self.name, silent_s)
        return silent_s

    def _spend_restart(self, cause: Cause, reason: Exception | None = None) -> bool:
        """Take one restart from the budget, or fail permanently, with `reason` if it is known."""
        now = self._clock()
        while self._restarts and now - self._restarts[0] > self._restart_window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_engine_restarts:
            message = f"Engine {self.name} failed {len(self._restarts) + 1} times in {self._restart_window_s:g} s"
            self._give_up(EngineUnavailable(f"{message}: {reason}" if reason is not None else f"{message}."))
            return False
        self._restarts.append(now)
        self.restarts[cause] += 1
        return True

    async def _restart(self, cause: Cause) -> None:
        """Close the engine and build a new one, until one starts or the budget is used up."""
        self._become("restarting")
        reason: Exception | None = None
        while True:
            try:
                await self._engine.close()
            except Exception:  # whatever is wrong with the old one, the watch must live to build the next
                log.exception("engine %s could not be closed", self.name)
            if not self._spend_restart(cause, reason):
                return
            started = self._clock()
            log.warning("restarting engine %s, attempt %d", self.name, len(self._restarts))
            try:
                self._engine = self._build()
                await self._engine.start()
            except Exception as error:
                log.error("engine %s could not restart: %s", self.name, error)
                reason = error
                continue
            self._died.clear()
            self._become("ready")
            log.warning("engine %s is ready again after %.1f s", self.name, self._clock() - started)
            return
