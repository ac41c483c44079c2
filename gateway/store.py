"""The one connection to Valkey or Redis: every command of the gateway goes through `Store.run`.

Commands that are issued together travel together, in one pipeline. None takes longer than the command timeout: the
first failure opens a circuit breaker, after which callers get StoreUnavailable at once, while a probe in the
background finds out when the store is back. Failures are logged once, when the breaker opens, never per request.

Keys, all under `sh:`; the braces are hash tags, so that what one script touches lies in one cluster slot:

    sh:schema                        version of this layout
    sh:keys                          set of API key ids
    sh:keys:version                  counter, raised by every change to a key
    sh:keys:used                     set of API key ids that have usage, those from the environment included
    sh:{k:<key id>}:key              hash: the API key's record, its secret as SHA-256
    sh:{k:<key id>}:w:<model>        hash: sliding window, see lua/window.lua
    sh:{k:<key id>}:run:<model>      sorted set: running requests by lease expiry in ms
    sh:{k:<key id>}:run              the same over all models
    sh:{k:<key id>}:day:<date>       tokens reserved or spent on that day, where the key has a daily budget
    sh:{k:<key id>}:applied          hash: gateway process -> number of its last ledger entry
    sh:{k:<key id>}:u:<date>:<model> hash: usage of that day (UTC)
    sh:{k:<key id>}:days             set of "<date>:<model>" that have usage
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
import hashlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from gateway.config import StoreSettings
from gateway.errors import StoreError, StoreRefused, StoreUnavailable
from gateway.metrics import Metrics
from gateway.valkey import EmbeddedValkey

log = logging.getLogger(__name__)

_T = TypeVar("_T")

SCHEMA = 1
_MAX_BATCH = 256
_LAG_S = 0.005  # a timer that fires this late says that the loop was busy
_MAX_FLUSHERS = 4  # one slow batch must not hold up the next
# A server that is out of memory, a replica turned read-only, a lost master, slots on the move: as good as away.
_AWAY = (ClusterDownError, MasterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError)
# RedisClusterException, of a cluster without a node that answers, is no RedisError.
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)


Command = tuple[Any, ...]
Unheard = Callable[[Any], None]
"""Takes the result that no caller waits for any more; an exception where nobody knows whether the command was run."""

# It begins with a write, so that a server which can't is not taken for one that is back.
_SCHEMA_CHECK: list[Command] = [("SET", "sh:schema", SCHEMA, "NX"), ("GET", "sh:schema")]


class Script:
    """A Lua script, made of the named files in gateway/lua.

    It is sent whole the first time in every pipeline and by its hash after that: sent by its hash alone, the first
    calls after a server's restart would fail, and the order of the pipeline with them.
    """

    def __init__(self, *names: str) -> None:
        folder = resources.files("gateway") / "lua"
        text = "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in names)
        self.text = re.sub(r"^\s*--.*\n", "", text, flags=re.MULTILINE)
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: list[str], arguments: list[Any]) -> Command:
        """Return the command that runs it atomically."""
        return (self, len(keys), *keys, *arguments)


class _Client(Protocol):
    def pipeline(self, transaction: bool = ...) -> Any: ...
    async def aclose(self) -> None: ...


@dataclass(slots=True)
class _Group:
    """Commands that must travel in one pipeline, in order."""

    commands: list[Command]
    result: asyncio.Future[list[Any]]


class Store:
    """See the module. `start` before use, `close` after."""

    def __init__(self, settings: StoreSettings, environment: Mapping[str, str], metrics: Metrics) -> None:
        """Choose the server by the environment variable that `settings` names. Raises StoreError on a bad URL."""
        self._settings = settings
        self.metrics = metrics
        self._timeout_s = settings.command_timeout_ms / 1000
        self._embedded: EmbeddedValkey | None = None
        url = environment.get(settings.url_env, "")
        if not url:
            self._embedded = EmbeddedValkey(settings.data_dir)
            url = f"unix://{self._embedded.socket}"
        self._client = _connect(url)
        self._clustered = isinstance(self._client, redis.RedisCluster)
        self._queue: deque[_Group] = deque()
        self._flushers: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None
        self.available = True
        """False while the breaker is open."""

    async def start(self) -> None:
        """Start the bundled server if there is no other. Raises StoreError; a named server may still be away."""
        if self._embedded is not None:
            await self._embedded.start()
        with contextlib.suppress(StoreUnavailable):
            await self._check_schema()

    async def _check_schema(self) -> None:
        _, found = await self.run_in_order(_SCHEMA_CHECK)
        if int(found) != SCHEMA:
            raise StoreError(f"the store has layout version {found}, this gateway speaks {SCHEMA}")

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)  # it may be starting the server
        await self.answered()
        with contextlib.suppress(*_FAILURES):
            await self._client.aclose()
        if self._embedded is not None:
            await self._embedded.close()

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
        """Do the same, with a StoreRefused in place of the result of each command that the store refuses."""
        results = await self._enqueue(commands)
        return [StoreRefused(str(result)) if isinstance(result, RedisError) else result for result in results]

    async def run_heard(self, command: Command, unheard: Unheard) -> Any:
        """Run a command whose result somebody must hear: `unheard` does, where the caller is cancelled meanwhile.

        Cancelling a caller stops no command. Raises StoreUnavailable.
        """
        answer = self._enqueue([command])
        try:
            (result,) = await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(lambda answer: unheard(answer.exception() or answer.result()[0]))
            raise
        if isinstance(result, RedisError):
            raise StoreRefused(str(result))
        return result

    async def answered(self) -> None:
        """Wait until nothing is on its way to the store."""
        await asyncio.gather(*self._flushers, return_exceptions=True)

    def _enqueue(self, commands: list[Command]) -> asyncio.Future[list[Any]]:
        result: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if not self.available:
            result.set_exception(StoreUnavailable("the store is away"))
            return result
        self._queue.append(_Group(commands, result))
        if len(self._flushers) < _MAX_FLUSHERS:
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

    async def _empty_queue(self) -> None:
        while self._queue:
            batch: list[_Group] = []
            size = 0
            while self._queue and size < _MAX_BATCH:
                batch.append(self._queue.popleft())
                size += len(batch[-1].commands)
            started = time.perf_counter()
            try:
                commands = [command for group in batch for command in group.commands]
                results = await self._within_timeout(self._send(commands))
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
            self.metrics.store_latency.observe(time.perf_counter() - started)
            for group in batch:
                if not group.result.done():  # else its caller has left
                    group.result.set_result(results[: len(group.commands)])
                del results[: len(group.commands)]

    async def _within_timeout(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await `work` for the command timeout, not counting time in which this process itself did not run.

        A busy event loop would otherwise take its own lag for a store that does not answer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        async with asyncio.timeout(None) as scope:

            def expire() -> None:
                lag_s = loop.time() - deadline
                scope.reschedule(loop.time() + min(lag_s, self._timeout_s) if lag_s > _LAG_S else loop.time())

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
            if isinstance(result, Exception) and not _is_refusal(result):
                raise result
        return results

    def _open_breaker(self, error: BaseException) -> None:
        self.metrics.store_failures.inc()
        _fail(self._queue)
        self._queue.clear()
        if not self.available:
            return
        self.available = False
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        log.error("the store is away (%s); going on without it", reason)
        self._probe = asyncio.create_task(self._probe_until_back())

    async def _probe_until_back(self) -> None:
        while True:
            await asyncio.sleep(self._settings.breaker_s)
            try:
                if self._embedded is not None:
                    await self._embedded.revive()
                async with asyncio.timeout(self._timeout_s):
                    _, found = await self._send(_SCHEMA_CHECK)
            except Exception as error:  # whatever it is, nobody else would look again
                log.debug("the store is still away: %r", error)
                continue
            if str(found) != str(SCHEMA):
                log.error("the store is back with layout version %s, not %s; not using it", found, SCHEMA)
                continue
            self.available = True
            log.warning("the store is back")
            return


def _is_refusal(error: Exception) -> bool:
    """Tell whether a command's error is the server's word on that command. A cluster's pipeline returns any other."""
    away = isinstance(error, _AWAY) or str(error).startswith("MISCONF")  # it can't write to its disk
    return isinstance(error, ResponseError) and not away


def _fail(batch: Iterable[_Group]) -> None:
    for group in batch:
        if not group.result.done():
            group.result.set_exception(StoreUnavailable("the store does not answer"))


def _connect(url: str) -> _Client:
    """Return a client for `url`. Raises StoreError. Connections are made on first use."""
    options: dict[str, Any] = {"decode_responses": True, "retry": Retry(NoBackoff(), 0)}
    scheme, _, rest = url.partition("://")
    try:
        if scheme.startswith(("redis+cluster", "rediss+cluster")):
            cluster: _Client = redis.RedisCluster.from_url(
                f"{scheme.partition('+')[0]}://{rest}", decode_responses=True
            )
            return cluster
        if scheme == "redis+sentinel":
            return _sentinel_master(url, options)
        client: _Client = redis.Redis.from_url(url, **options)
    except (ValueError, RedisError) as error:
        raise StoreError(f"the store's URL can't be used: {error}") from error
    return client


def _sentinel_master(url: str, options: dict[str, Any]) -> _Client:
    parts = urlsplit(url)
    _, _, location = parts.netloc.rpartition("@")
    hosts = [(host, int(port or 26379)) for host, _, port in (entry.partition(":") for entry in location.split(","))]
    service = parts.path.strip("/")
    if not service:
        raise StoreError("the store's URL names no sentinel service: redis+sentinel://host:port,host:port/SERVICE")
    password = unquote(parts.password) if parts.password else None
    sentinel = Sentinel(hosts, password=password)  # type: ignore[no-untyped-call]
    master: _Client = sentinel.master_for(service, password=password, **options)
    return master
