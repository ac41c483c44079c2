"""The connections to Valkey or Redis: every command of the gateway goes through a `Lane`.

There are two. `Store` itself is the fast lane, for the small commands that a request waits for: limits, keys, usage.
`Store.bulk` has connections, a deadline and a circuit breaker of its own, for values of any size: sessions, responses,
streams, jobs, and for what may wait: administration. The server runs one command at a time, so few bulk commands are
under way at once, and each has to be cheap.

Commands that are issued together travel together, in one pipeline. None takes longer than its lane's deadline. The
first failure opens the lane's breaker, after which callers get StoreUnavailable at once, while a probe in the
background finds out when the store is back. Failures are logged once, when the breaker opens, never per request. A
server that is full or can't write to its disk is not away: it refuses writes, which raises WritesRefused, and answers
reads.

Keys, all under `sh:`; the braces are hash tags, so that what one script touches lies in one cluster slot:

    sh:schema                        version of this layout
    sh:keys                          set of API key ids
    sh:keys:version                  counter, raised after every change to a key
    sh:keys:used                     set of API key ids that have usage, those from the environment included
    sh:{k:<key id>}:key              the API key's record as JSON, its secret as SHA-256
    sh:{k:<key id>}:w:<model>        hash: sliding window, see lua/window.lua; for a minute
    sh:{k:<key id>}:run:<model>      sorted set: running requests by lease expiry in ms
    sh:{k:<key id>}:run              the same over all models
    sh:{k:<key id>}:day:<date>       tokens reserved or spent on that day, where the key has a daily budget; two days
    sh:{k:<key id>}:open             hash: reservations that are not settled, see lua/reservation.lua; two days
    sh:{k:<key id>}:open:until       sorted set: the same by lease expiry in ms
    sh:{k:<key id>}:applied          hash: gateway process -> number of its last ledger entry, for 30 days
    sh:{k:<key id>}:applied:at       sorted set: the same processes by the Unix second of that entry
    sh:{k:<key id>}:u:<date>:<model> hash: usage of that day (UTC), for 400 days
    sh:{k:<key id>}:days             set of "<date>:<model>" that have usage, for 400 days
    sh:{k:<key id>}:derived          hash: sessions of requests that named none, by id, as JSON; `:at` by expiry,
                                     `:prompts` and `:seen` digests of their prompts, see derived_sessions.py
    sh:{k:<key id>}:kept             sorted set: sessions and responses that the key pays for, by expiry in ms; `:b`
                                     hash: their bytes. `:logs`, `:jobs`: the same of event logs and waiting jobs
    sh:cache-salt                    secret that the gateways of this store salt cached prompts with
    sh:drain:interrupted             how many exchanges shutdowns have cut short
    sh:{s:<session id>}              hash: owner, creation time, incarnation, turns begun, bytes, API key that pays
    sh:{s:<session id>}:t            sorted set: turns as JSON, by turn number, see lua/session_turns.lua
    sh:{s:<session id>}:x            there for a minute after a derived session was deleted
    sh:{r:<response id>}             a response as JSON: its owner, object, input items, and the ids before it
    sh:{r:<response id>}:h           hash: its owner and state, for scripts
    sh:{r:<response id>}:t           what was said in it, as JSON; large values are in `:0` and `:1`, see pieces.py
    sh:{r:<response id>}:l           there while a gateway is making it
    sh:{r:<response id>}:x           there for an hour after one was deleted whose gateway had lost its lease
    sh:{l:<log id>}                  hash: an event log's owner, writer, newest reader, and how far it is; the id is a
                                     completion's, or <key id>:<client id>
    sh:{l:<log id>}:e                stream: its frames in batches, under the number of the last of each
    sh:{l:<log id>}:q                list: a client's jobs as JSON, the one that runs first
    sh:{p:<gateway process>}:pokes   set of log ids that this process is to look at, for a minute
    sh:{p:<gateway process>}:cancelled  set of response ids that this process is to cancel, for a minute
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from gateway.config import StoreSettings
from gateway.errors import StoreError, StoreRefused, StoreUnavailable, WritesRefused
from gateway.metrics import LaneMetrics, Metrics
from gateway.script import Command, Script
from gateway.store_state import REFUSALS, StoreState, refusal_of
from gateway.store_url import Client, close, connect, reconnect
from gateway.valkey import EmbeddedValkey

__all__ = ["Command", "Lane", "Script", "Store", "Unheard"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

SCHEMA = 1
_OLDEST_REDIS = 7
"""The first whose scripts may say that they write to a full server."""
_MAX_BATCH = 256
_LAG_S = 0.005  # a timer that fires this late says that the loop was busy
_MAX_FLUSHERS = 4  # one slow batch must not hold up the next
_BULK_FLUSHERS = 2
"""Bulk commands under way at once. A fast command may find as many in front of it at the server."""
_MAX_WAITS = 5
"""A command that has waited this often its lane's patience for those before it is given up without being sent."""
_POLL_S = 5.0
# A replica turned read-only may not know the latest keys: it is as good as away, and so is a lost primary, or slots on
# the move.
_AWAY = (ClusterDownError, MasterDownError, ReadOnlyError, TryAgainError)
# RedisClusterException, of a cluster without a node that answers, is no RedisError.
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)


Unheard = Callable[[Any], None]
"""Takes the result that no caller waits for any more; an exception where nobody knows whether the command was run."""

_SCHEMA_CHECK: list[Command] = [("SET", "sh:schema", SCHEMA, "NX"), ("GET", "sh:schema")]


@dataclass(slots=True)
class _Group:
    """Commands that must travel in one pipeline, in order."""

    commands: list[Command]
    result: asyncio.Future[list[Any]]
    queued_at: float
    """On the loop's clock."""
    sent: bool = False

    def fail(self, message: str) -> None:
        if not self.result.done():
            self.result.set_exception(StoreUnavailable(message, sent=self.sent))


class Lane:
    """One way to the store: connections, a deadline, and a breaker."""

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
        name: str = "",
        doubt_s: float = 0.0,
        check: Callable[[], Coroutine[Any, Any, Any]] | None = None,
    ) -> None:
        """Use `client` for at most `in_flight` pipelines at once, each of `max_batch` commands, or one group of them.

        `patience_s` is how long connecting may take when nobody waits, `revive` starts a server that is gone, and
        `name` says in the log what the lane is for. `check` raises StoreUnavailable if the server does not answer at
        all. It is called when an answer takes longer than `doubt_s`: a large value may take that long, but nobody is to
        wait out the whole timeout for a server that is gone.
        """
        self._client = client
        self._clustered = isinstance(client, redis.RedisCluster)
        self._metrics = metrics
        self.state = state
        self.timeout_s = timeout_s
        """Longest wait for a pipeline."""
        self._patience_s = patience_s
        self._breaker_s = breaker_s
        self._revive = revive
        self._in_flight = in_flight
        self._max_batch = max_batch
        self._name = name
        self._doubt_s = doubt_s
        self._check = check
        self._queue: deque[_Group] = deque()
        self._flushers: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None
        self.available = True
        """False while the breaker is open."""
        self.on_back: list[Callable[[], None]] = []
        """Called when the breaker closes."""

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
        """Do the same, with a StoreRefused in place of the result of each command that the store refuses.

        Raises WritesRefused where the store takes no writes.
        """
        return [self._checked(result) for result in await self._enqueue(commands)]

    async def run_heard(self, command: Command, unheard: Unheard) -> Any:
        """Run a command whose result must not get lost: `unheard` gets it if the caller is cancelled meanwhile.

        Cancelling a caller stops no command. Raises StoreUnavailable.
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
        """Wait until nothing is on its way to the store."""
        await asyncio.gather(*self._flushers, return_exceptions=True)

    async def greet(self) -> list[Any]:
        """Connect, with patience, and return the results of the layout's check. Opens the breaker where that fails.

        Raises StoreUnavailable.
        """
        try:
            return await self._within_timeout(self._send(_SCHEMA_CHECK), self._patience_s)
        except _FAILURES as error:
            self._open_breaker(error)
            raise StoreUnavailable("the store does not answer") from error

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)  # it may be starting the server
        await self.answered()
        with contextlib.suppress(*_FAILURES):
            await close(self._client)

    def _checked(self, result: Any) -> Any:
        """Return a command's result, with a StoreRefused for a refusal. Raises WritesRefused."""
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
        """Take the next groups off the queue. Fails those that have waited too long."""
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
                results = await self._answers(commands)
            except _FAILURES as error:
                self._open_breaker(error)
                _fail(batch)
                return
            except BaseException as error:  # whatever it is, nobody shall wait for ever
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

    async def _answers(self, commands: list[Command]) -> list[Any]:
        """Return the results of commands that are sent now. Raises one of _FAILURES."""
        if self._check is None:
            return await self._within_timeout(self._send(commands), self.timeout_s)
        answer = asyncio.create_task(self._within_timeout(self._send(commands), self.timeout_s))
        try:
            while not (await asyncio.wait([answer], timeout=self._doubt_s))[0]:
                await self._check()
            return answer.result()
        except StoreUnavailable:
            raise TimeoutError from None
        finally:
            answer.cancel()
            await asyncio.wait([answer])

    async def _within_timeout(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Await `work` for `timeout_s`, not counting time in which this process itself did not run.

        A busy event loop would otherwise take its own lag for a store that does not answer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        async with asyncio.timeout(None) as scope:

            def expire() -> None:
                lag_s = loop.time() - deadline
                scope.reschedule(loop.time() + min(lag_s, timeout_s) if lag_s > _LAG_S else loop.time())

            timer = loop.call_at(deadline, expire)
            try:
                return await work
            finally:
                timer.cancel()

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
        self.available = False
        self._metrics.openings.inc()
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        log.error("the store is away%s (%s); continuing without it", self._name, reason)
        self._probe = asyncio.create_task(self._probe_until_back())

    async def _probe_until_back(self) -> None:
        while True:
            await asyncio.sleep(self._breaker_s)
            try:
                if self._revive is not None:
                    await self._revive()
                await reconnect(self._client)
                # A new connection, with TLS or by way of a Sentinel, takes longer than a command may.
                await self._within_timeout(self._send([("PING",)]), self._patience_s)
                async with asyncio.timeout(self.timeout_s):
                    _, found = await self._send(_SCHEMA_CHECK)
            except Exception as error:  # whatever it is, nobody else would look again
                log.debug("the store is still away: %r", error)
                continue
            if not _speaks(found):
                log.error("the store is back with layout version %s, not %s; not using it", found, SCHEMA)
                continue
            self.available = True
            log.warning("the store is back%s", self._name)
            for callback in self.on_back:
                callback()
            return


class Store(Lane):
    """The fast lane, and `bulk` beside it. `start` before use, `close` after."""

    def __init__(self, settings: StoreSettings, environment: Mapping[str, str], metrics: Metrics) -> None:
        """Choose the server by the environment variable that `settings` names. Raises StoreError on a bad URL."""
        self.metrics = metrics
        self._embedded: EmbeddedValkey | None = None
        url = environment.get(settings.url_env, "")
        if not url:
            self._embedded = EmbeddedValkey(settings.data_dir, settings.max_memory_mb)
            url = f"unix://{self._embedded.socket}"
        state = StoreState(metrics)
        bulk_timeout_s = settings.bulk_timeout_ms / 1000
        common: dict[str, Any] = {
            "breaker_s": settings.breaker_s,
            "revive": self._embedded.revive if self._embedded is not None else None,
        }
        super().__init__(
            connect(url),
            metrics.store,
            state,
            timeout_s=settings.command_timeout_ms / 1000,
            patience_s=max(settings.command_timeout_ms, settings.bulk_timeout_ms) / 1000,
            in_flight=_MAX_FLUSHERS,
            max_batch=_MAX_BATCH,
            **common,
        )
        self.bulk = Lane(
            connect(url),
            metrics.store_bulk,
            state,
            timeout_s=bulk_timeout_s,
            patience_s=bulk_timeout_s,
            in_flight=_BULK_FLUSHERS,
            max_batch=1,
            name=" for sessions, streams, responses and jobs",
            doubt_s=self.timeout_s,
            check=lambda: self.run("PING"),
            **common,
        )
        """For values of any size, and for what may wait."""
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the bundled server if there is no other. Raises StoreError; a named server may still be away."""
        if self._embedded is not None:
            await self._embedded.start()
        with contextlib.suppress(StoreUnavailable):
            _, found = await self.greet()
            if not _speaks(found):
                raise StoreError(f"the store has layout version {found}, this gateway speaks {SCHEMA}")
            version = str((await self.bulk.run("INFO", "server")).get("redis_version", _OLDEST_REDIS))
            if int(version.partition(".")[0]) < _OLDEST_REDIS:
                raise StoreError(f"the store is Redis {version}; Redis {_OLDEST_REDIS} or Valkey is needed")
            await self.look()
        self._watch = asyncio.create_task(self._watch_state())

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self.bulk.close()
        await super().close()
        if self._embedded is not None:
            await self._embedded.close()

    async def _watch_state(self) -> None:
        """Ask for the server's clock and memory now and then."""
        while True:
            await asyncio.sleep(_POLL_S if self.state.refusal is None else self._breaker_s)
            if self.available:
                await self.look()

    async def look(self) -> None:
        """Learn the server's clock and memory. Whether it is away is for commands to find out."""
        try:
            await self._within_timeout(self._look(), self._patience_s)
        except Exception as error:  # a server that words its answers in another way is still a store
            log.debug("the store's state can't be read: %r", error)

    async def _look(self) -> None:
        client = self.bulk._client
        (seconds, microseconds), written = await self.bulk._send([("TIME",), _SCHEMA_CHECK[0]])
        self.state.set_clock(int(seconds) + int(microseconds) / 1e6)
        if isinstance(client, redis.RedisCluster):
            nodes = await client.info("memory", target_nodes=redis.RedisCluster.PRIMARIES)
            info = nodes if "used_memory" in nodes else max(nodes.values(), key=_fullness)
        else:
            (info,) = await self.bulk._send([("INFO", "memory")])
        self.state.learn(info, refusal_of(written) if isinstance(written, Exception) else None)


def _fullness(info: Mapping[str, Any]) -> float:
    return float(info.get("used_memory", 0)) / float(info.get("maxmemory", 0) or 2**62)


def _speaks(found: Any) -> bool:
    """Tell whether the layout version found is ours. A new server that takes no writes has none."""
    return found is None or str(found) == str(SCHEMA)


def _is_refusal(error: Exception) -> bool:
    """Tell whether a command's error is the server's word on that command. A cluster's pipeline returns any other."""
    return isinstance(error, ResponseError) and not isinstance(error, _AWAY)


def _fail(batch: Iterable[_Group]) -> None:
    for group in batch:
        group.fail("the store does not answer")
