"""The connections to Valkey or Redis: every command of the gateway goes through a `Lane`.

There are three. `Store` itself is the fast lane, for the small commands that a request waits for: limits, keys, usage.
`Store.bulk` has connections, a deadline and a circuit breaker of its own, for values of any size: sessions, responses,
streams, jobs. The server runs one command at a time, so few bulk commands are under way at once, and each has to be
cheap. `Store.patient` is for what may wait, where a late answer is better than none: administration and start-up.

The names of all keys are in `gateway.store.layout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import redis.asyncio as redis

from gateway.errors import StoreError, StoreUnavailable
from gateway.settings.config import StoreSettings
from gateway.store.lane import SCHEMA, SCHEMA_CHECK, Lane, Unheard, end, speaks
from gateway.store.script import Command, Script
from gateway.store.server_state import StoreState
from gateway.store.url import connect
from gateway.store.valkey import EmbeddedValkey
from gateway.telemetry.metrics import Metrics

__all__ = ["Command", "Lane", "Script", "Store", "Unheard"]

log = logging.getLogger(__name__)

_OLDEST_REDIS = 7
"""The first version whose scripts can declare that they write to a full server."""
_MAX_BATCH = 256
_MAX_FLUSHERS = 4  # one slow batch must not hold up the next
_BULK_FLUSHERS = 2
"""Bulk commands in flight. At most this many are ahead of a fast command at the server."""
_BULK = "for sessions, streams, responses and jobs"
_POLL_S = 5.0


class Store(Lane):
    """The fast lane, and `bulk` beside it. `start` before use, `close` after."""

    def __init__(self, settings: StoreSettings, environment: Mapping[str, str], metrics: Metrics) -> None:
        """The URL is in the environment variable that `settings` names. Raises StoreError on a bad URL."""
        self.metrics = metrics
        self._embedded: EmbeddedValkey | None = None
        url = environment.get(settings.url_env, "")
        if not url:
            self._embedded = EmbeddedValkey(settings.data_dir, settings.max_memory_mb)
            url = f"unix://{self._embedded.socket}"
        state = StoreState(metrics)
        common: dict[str, Any] = {
            "breaker_s": settings.breaker_s,
            "revive": self._embedded.revive if self._embedded is not None else None,
        }
        unhurried = common | {
            "timeout_s": settings.bulk_timeout_ms / 1000,
            "patience_s": settings.bulk_timeout_ms / 1000,
            "max_batch": 1,
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
            in_flight=_BULK_FLUSHERS,
            words=(f"does not answer {_BULK}", f"answers {_BULK} again"),
            doubt_s=self.timeout_s,
            check=lambda: self.run("PING"),
            **unhurried,
        )
        """For values of any size."""
        self.patient = Lane(
            connect(url),
            metrics.store_bulk,
            state,
            in_flight=1,
            words=("does not answer administration", "answers administration again"),
            **unhurried,
        )
        """For commands that may wait."""
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the bundled server if there is no other. Raises StoreError; a named server may still be away."""
        if self._embedded is not None:
            await self._embedded.start()
        with contextlib.suppress(StoreUnavailable):
            _, found = await self.greet()
            if not speaks(found):
                raise StoreError(f"the store has layout version {found}, this gateway needs {SCHEMA}")
            version = await self._version()
            if int(version.partition(".")[0]) < _OLDEST_REDIS:
                raise StoreError(f"the store is Redis {version}; Redis {_OLDEST_REDIS} or Valkey is needed")
            await self.look()
        self._watch = asyncio.create_task(self._watch_state())

    async def _version(self) -> str:
        """Return the Redis version that the server reports, or the oldest supported one if it reports none."""
        client = self.patient._client
        try:
            async with asyncio.timeout(self._patience_s):
                if isinstance(client, redis.RedisCluster):
                    info = await client.info("server", target_nodes=client.get_default_node())
                else:
                    (info,) = await self.patient._send([("INFO", "server")])
        except Exception as error:  # an ACL may leave it out
            log.debug("the store's version can't be read: %r", error)
            return str(_OLDEST_REDIS)
        return str(info["redis_version"])

    async def close(self) -> None:
        await end(self._watch)
        await self.patient.close()
        await self.bulk.close()
        await super().close()
        if self._embedded is not None:
            await self._embedded.close()

    async def _watch_state(self) -> None:
        """Ask for the server's clock and memory now and then."""
        while True:
            self.state.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S if self.state.refusal is None else self._breaker_s):
                    await self.state.changed.wait()
            if self.available:
                await self.look()

    async def look(self) -> None:
        """Read the server's clock and memory. Failures are ignored: commands detect an unavailable server."""
        try:
            await self._within_timeout(self._look(), self._patience_s)
        except Exception as error:  # a server that words its answers in another way is still a store
            log.debug("the store's state can't be read: %r", error)

    async def _look(self) -> None:
        client = self.patient._client
        ((seconds, microseconds),) = await self.patient._send([("TIME",)])
        self.state.set_clock(int(seconds) + int(microseconds) / 1e6)
        if isinstance(client, redis.RedisCluster):
            nodes = await client.info("memory", target_nodes=redis.RedisCluster.PRIMARIES)
            info = nodes if "used_memory" in nodes else max(nodes.values(), key=_fullness)
        else:
            (info,) = await self.patient._send([("INFO", "memory")])
        self.state.remember(info)
        (written,) = await self.patient._send(SCHEMA_CHECK[:1])
        if not isinstance(written, Exception):
            self.state.accepted()


def _fullness(info: Mapping[str, Any]) -> float:
    return float(info.get("used_memory", 0)) / float(info.get("maxmemory", 0) or 2**62)
