"""One way to the store: connections, a queue in front of them, a deadline, and a circuit breaker.

Commands that are issued together travel together, in one pipeline. None takes longer than the lane's deadline. The
first failure opens the breaker, after which callers get StoreUnavailable at once, while a probe in the background finds
out when the store is back. Failures are logged once, when the breaker opens, never per request. A server that is full
or can't write to its disk is not away: it refuses writes, which raises WritesRefused, and answers reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.exceptions import ClusterCrossSlotError, RedisClusterException, RedisError, ResponseError

from engine.breaker import Breaker
from gateway.errors import StoreRefused, StoreUnavailable, WritesRefused
from gateway.store import layout
from gateway.store.script import Command, Script
from gateway.store.server_state import REFUSALS, StoreState, refusal_of
from gateway.store.url import Client, close, reconnect
from gateway.telemetry.metrics import LaneMetrics

log = logging.getLogger(__name__)

_T = TypeVar("_T")

SCHEMA = 1
"""Version of the layout that `gateway.store.layout` describes."""
SCHEMA_CHECK: list[Command] = [Script("schema").call([layout.SCHEMA], [SCHEMA]), ("GET", layout.SCHEMA)]
"""A script: a server that runs none for this gateway, by its ACL, is of no use to it."""
_LAG_S = 0.005  # a timer that fires this late says that the loop was busy
_MAX_WAITS = 5
"""A command that has queued for this many times the lane's patience fails without being sent."""
_CODE = re.compile(r"([A-Z]{3,32}) ")
"""Code at the start of a server's error, unless it is ERR, which redis-py removes."""
# RedisClusterException, of a cluster without a node that answers, is no RedisError.
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)


Unheard = Callable[[Any], None]
"""Receives a result that no caller waits for any more, or an exception if it is unknown whether the command ran."""


@dataclass(slots=True)
class _Group:
    """Commands that must be sent in one pipeline, in order."""

    commands: list[Command]
    result: asyncio.Future[list[Any]]
    queued_at: float
    """On the loop's clock."""
    sent: bool = False

    def fail(self, message: str) -> None:
        if not self.result.done():
            self.result.set_exception(StoreUnavailable(message, sent=self.sent))


class Lane:
    """Connections to the store, with a deadline and a breaker."""

    def __init__(
        self,
        client: Client,
        metrics: LaneMetrics,
        state: StoreState,
        *,
        timeout_s: float,
        patience_s: float,
        breaker_s: float,
        revive: Callable[[], Coroutine[Any, Any, None]] | None,
        in_flight: int,
        max_batch: int,
        words: tuple[str, str] = ("is away", "is back"),
        doubt_s: float = 0.0,
        check: Callable[[], Coroutine[Any, Any, Any]] | None = None,
    ) -> None:
        """Use `client` for at most `in_flight` pipelines at once, each of `max_batch` commands, or one group of them.

        `patience_s` is how long connecting may take when no caller waits, `revive` starts a server that is gone, and
        `words` say in the log that the breaker opened and closed. `check` raises StoreUnavailable if the server does
        not answer at all. It is called when an answer takes longer than `doubt_s`: a large value may take that long,
        but no caller should wait for the whole timeout if the server is gone.
        """
        self._client = client
        self._clustered = isinstance(client, redis.RedisCluster)
        self._metrics = metrics
        self.state = state
        self.timeout_s = timeout_s
        """Longest wait for a pipeline."""
        self._patience_s = patience_s
        self._breaker_s = breaker_s
        self._breaker = Breaker(1, breaker_s)
        self._revive = revive
        self._in_flight = in_flight
        self._max_batch = max_batch
        self._away, self._back = words
        self._doubt_s = doubt_s
        self._check = check
        self._queue: deque[_Group] = deque()
        self._flushers: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None
        self.on_back: list[Callable[[], None]] = []
        """Called when the breaker closes."""

    @property
    def available(self) -> bool:
        """False while the breaker is open."""
        return self._breaker.state == "closed"

    async def run(self, *command: Any) -> Any:
        """Run one command. Raises StoreUnavailable."""
        return (await self.run_in_order([command]))[0]

    async def run_in_order(self, commands: list[Command]) -> list[Any]:
        """Run commands one after the other, in one pipeline. Raises StoreUnavailable."""
        results = await self.try_in_order(commands)
        for result in results:
            if isinstance(result, StoreRefused):
                raise result
        return results

    async def try_in_order(self, commands: list[Command]) -> list[Any]:
        """Like `run_in_order`, but return a StoreRefused as the result of each refused command.

        Raises WritesRefused if the store takes no writes.
        """
        return [self._checked(result) for result in await self._enqueue(commands)]

    async def run_heard(self, command: Command, unheard: Unheard) -> Any:
        """Run a command whose result must not be lost: if the caller is cancelled, `unheard` gets the result.

        Cancellation of the caller does not stop the command. Raises StoreUnavailable.
        """
        answer = self._enqueue([command])
        try:
            (result,) = await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(lambda answer: unheard(answer.exception() or answer.result()[0]))
            raise
        result = self._checked(result)
        if isinstance(result, StoreRefused):
            raise result
        return result

    async def answered(self) -> None:
        """Wait until no command is in flight."""
        await asyncio.gather(*self._flushers, return_exceptions=True)

    async def greet(self) -> list[Any]:
        """Connect, with patience, and return the results of the layout's check. Opens the breaker where that fails.

        Raises StoreUnavailable.
        """
        try:
            return await self._within_timeout(self._send(SCHEMA_CHECK), self._patience_s)
        except _FAILURES as error:
            self._open_breaker(error)
            raise StoreUnavailable("the store does not answer") from error

    async def close(self) -> None:
        await end(self._probe)  # it may be starting the server
        await self.answered()
        with contextlib.suppress(*_FAILURES):
            await close(self._client)

    def _checked(self, result: Any) -> Any:
        """Return a command's result, or a StoreRefused if it was refused. Raises WritesRefused."""
        if not isinstance(result, RedisError):
            return result
        if (refusal := refusal_of(result)) is not None:
            raise WritesRefused(REFUSALS[refusal], refusal)
        return StoreRefused(str(result))

    def _enqueue(self, commands: list[Command]) -> asyncio.Future[list[Any]]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[Any]] = loop.create_future()
        if not self.available:
            result.set_exception(StoreUnavailable("the store is away"))
            return result
        self._queue.append(_Group(commands, result, loop.time()))
        if len(self._flushers) < self._in_flight:
            self._flushers.add(asyncio.create_task(self._flush()))
        return result

    async def _flush(self) -> None:
        flusher = asyncio.current_task()
        assert flusher is not None
        try:
            await self._empty_queue()
        finally:
            # At once, not by a done callback: what is queued before that ran would wait for one who has gone.
            self._flushers.discard(flusher)

    def _next_batch(self) -> list[_Group]:
        """Take the next groups from the queue. Groups that have waited too long fail."""
        batch: list[_Group] = []
        size = 0
        oldest = asyncio.get_running_loop().time() - _MAX_WAITS * self._patience_s
        while self._queue and (not batch or size + len(self._queue[0].commands) <= self._max_batch):
            group = self._queue.popleft()
            if group.queued_at < oldest:
                group.fail("the store has too much to do")
                continue
            group.sent = True
            batch.append(group)
            size += len(group.commands)
        return batch

    async def _empty_queue(self) -> None:
        while batch := self._next_batch():
            started = time.perf_counter()
            try:
                commands = [command for group in batch for command in group.commands]
                results = await self._within_timeout(self._send(commands), self.timeout_s, doubt=True)
            except _FAILURES as error:
                self._open_breaker(error)
                _fail(batch)
                return
            except BaseException as error:  # of any kind, because no caller may wait forever
                _fail([*batch, *self._queue])
                self._queue.clear()
                if not isinstance(error, Exception):
                    raise
                log.exception("the store can't be asked")
                return
            self._metrics.latency.observe(time.perf_counter() - started)
            for group in batch:
                if not group.result.done():  # else its caller has left
                    group.result.set_result(results[: len(group.commands)])
                del results[: len(group.commands)]

    async def _within_timeout(self, work: Coroutine[Any, Any, _T], timeout_s: float, *, doubt: bool = False) -> _T:
        """Await `work` for `timeout_s`, not counting time in which this process was not running.

        Otherwise a busy event loop would mistake its own lag for a store that does not answer. With `doubt` the server
        is checked meanwhile; if it does not answer at all, the wait ends. Raises TimeoutError.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        checking: asyncio.Task[None] | None = None
        async with asyncio.timeout(None) as scope:

            def expire() -> None:
                lag_s = loop.time() - deadline
                scope.reschedule(loop.time() + min(lag_s, timeout_s) if lag_s > _LAG_S else loop.time())

            async def check(ask: Callable[[], Coroutine[Any, Any, Any]]) -> None:
                with contextlib.suppress(StoreUnavailable):
                    while True:
                        await ask()
                        await asyncio.sleep(self._doubt_s)
                scope.reschedule(loop.time())

            def begin(ask: Callable[[], Coroutine[Any, Any, Any]]) -> None:
                nonlocal checking
                checking = asyncio.create_task(check(ask))

            timers = [loop.call_at(deadline, expire)]
            if doubt and self._check is not None:
                timers.append(loop.call_later(self._doubt_s, begin, self._check))
            try:
                return await work
            finally:
                for timer in timers:
                    timer.cancel()
                if checking is not None:
                    checking.cancel()

    async def _send(self, commands: list[Command]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        sent: set[Script] = set()
        for name, *rest in commands:
            if not isinstance(name, Script):
                pipeline.execute_command(name, *rest)
            elif name in sent:
                pipeline.execute_command("EVALSHA", name.sha, *rest)
            else:
                pipeline.execute_command("EVAL", name.text, *rest)
                if not self._clustered:  # there a pipeline goes to several servers
                    sent.add(name)
        results: list[Any] = await pipeline.execute(raise_on_error=False)
        for result in results:
            if not isinstance(result, Exception):
                continue
            if (refusal := refusal_of(result)) is not None:
                self.state.refused(refusal)
            elif not _is_refusal(result):
                raise result
        return results

    def _open_breaker(self, error: BaseException) -> None:
        self._metrics.failures.inc()
        _fail(self._queue)
        self._queue.clear()
        if not self.available:
            return
        self._breaker.fail()
        self._metrics.openings.inc()
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        log.error("the store %s (%s); continuing without it", self._away, reason)
        self._probe = asyncio.create_task(self._probe_until_back())

    async def _probe_until_back(self) -> None:
        while True:
            await asyncio.sleep(self._breaker.wait_s)
            try:
                if self._revive is not None:
                    await self._revive()
                await self._within_timeout(reconnect(self._client), self._patience_s)
                # A new connection, with TLS or by way of a Sentinel, takes longer than a command may.
                await self._within_timeout(self._send([("PING",)]), self._patience_s)
                _, found = await self._within_timeout(self._send(SCHEMA_CHECK), self.timeout_s)
            except Exception as error:  # of any kind, because only this task looks again
                log.debug("the store is still away: %r", error)
                self._breaker.fail()
                continue
            if not speaks(found):
                self._breaker.fail()
                log.error("the store is back with layout version %s, not %s; not using it", found, SCHEMA)
                continue
            self._breaker.succeed()
            log.warning("the store %s", self._back)
            for callback in self.on_back:
                callback()
            return


async def end(task: asyncio.Task[None] | None) -> None:
    """Cancel a task until it has ended: redis-py may mistake a cancellation for its own timeout and continue."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


def speaks(found: Any) -> bool:
    """Return whether the schema version is ours. A new server that takes no writes has none."""
    return found is None or str(found) == str(SCHEMA)


def _is_refusal(error: Exception) -> bool:
    """Return whether an error concerns only its command: the script, or a value of another type.

    Every other error means that the server can't serve this gateway now, and the next command would get it as well:
    READONLY of a replica, which may not know the latest keys, CLUSTERDOWN, TRYAGAIN and MOVED of a cluster, MASTERDOWN,
    BUSY during a long script, NOPERM after a change of its ACL, and unknown codes.
    """
    if isinstance(error, ClusterCrossSlotError):
        return True
    code = _CODE.match(str(error))
    return type(error) is ResponseError and (code is None or code[1] == "WRONGTYPE")


def _fail(batch: Iterable[_Group]) -> None:
    for group in batch:
        group.fail("the store does not answer")
