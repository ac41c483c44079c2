"""uvicorn with our shutdown: SIGTERM drains first, and a failed engine ends the process. SIGHUP reloads.

uvicorn alone closes its listening socket at once on SIGTERM. Here it continues listening while running requests
finish, so that new ones get a 503 they can retry elsewhere instead of a refused connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from gateway.errors import StoreUnavailable
from gateway.services import Services
from gateway.serving import listeners
from gateway.serving.connection import Connection
from gateway.serving.connection_limit import ConnectionLimit, most_connections
from gateway.serving.lifespan import Lifespan
from gateway.serving.refused_heads import RefusedHeads
from gateway.settings.config import ConfigError
from gateway.store import layout

log = logging.getLogger(__name__)

# After the drain has ended every exchange, only idle connections are left to close.
_CLOSE_CONNECTIONS_S = 2


class Server(uvicorn.Server):
    """Serves one app until SIGTERM, SIGINT or the failure of an engine."""

    def __init__(
        self,
        app: FastAPI,
        *,
        host: str | Sequence[str],
        port: int,
        on_ready: Callable[[str], None],
        reload: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`host` is one address or several. `on_ready` is called with the base URL once every engine answers, `reload`
        on SIGHUP, one at a time."""
        self._app = app
        self._hosts = [host] if isinstance(host, str) else host
        self._port = port
        self._on_ready = on_ready
        self._reload = reload
        self._hung_up = asyncio.Event()
        self.exit_code = 0
        services = self._services
        most = most_connections(services.config.server.max_connections)
        connection = functools.partial(
            Connection, limit=ConnectionLimit(most, services.metrics), refused=RefusedHeads(services.metrics)
        )
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=connection,  # type: ignore[arg-type]  # makes what a class would
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(self._services.config.server.trusted_proxies),
                forwarded_allow_ips=self._services.config.server.trusted_proxies or None,
                timeout_keep_alive=self._services.config.server.idle_connection_s,
                timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
            )
        )
        self.config.load()
        self.config.lifespan_class = functools.partial(Lifespan, app)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals ourselves; uvicorn's handlers would stop listening and raise the signal again at the end."""
        loop = asyncio.get_running_loop()
        signals = [signal.SIGTERM, signal.SIGINT]
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        tasks = [loop.create_task(self._exit_on_failure(name)) for name in self._services.engines]
        if self._reload is not None:
            # Under nohup, the end of the terminal must have no effect.
            in_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup, in_terminal)
            signals.append(signal.SIGHUP)
            tasks.append(loop.create_task(self._reload_on_hangup(self._reload)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for number in signals:
                loop.remove_signal_handler(number)

    @property
    def _services(self) -> Services:
        services: Services = self._app.state.services
        return services

    @property
    def url(self) -> str:
        """The base URL, with the port that was really taken."""
        return listeners.url(self._sockets)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end. Raises ConfigError, before anything is started, where an address can't be had."""
        self._sockets = sockets or listeners.bind(self._hosts, self._port)
        try:
            await super().serve(self._sockets)
        finally:
            for bound in self._sockets:
                bound.close()

    def _on_signal(self) -> None:
        drain = self._services.drain
        if drain.hurried:
            log.warning("third signal: closing without errors to clients and without the last usage")
            self.force_exit = self.should_exit = True
            return
        if drain.draining:
            log.warning("second signal: interrupting what still runs")
            drain.hurry()
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    def _on_hangup(self, in_terminal: bool) -> None:
        if self._services.drain.draining:
            log.warning("SIGHUP is ignored: the server is shutting down")
        elif in_terminal and not _has_terminal():  # it was closed, which is what the signal first meant
            self._on_signal()
        else:
            self._hung_up.set()

    async def _reload_on_hangup(self, reload: Callable[[], Awaitable[None]]) -> None:
        """Reload once for all signals that came meanwhile: the last one is sure to find its file read."""
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            await reload()

    async def _drain(self) -> None:
        timeout_s = self._services.config.server.drain_timeout_s
        log.info("draining for up to %g s", timeout_s)
        interrupted = await self._services.drain.run(timeout_s)
        log.info("drained, %d interrupted", interrupted)
        if interrupted:
            with contextlib.suppress(StoreUnavailable):
                await self._services.store.patient.run("INCRBY", layout.DRAIN_INTERRUPTED, interrupted)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process has begun to listen there since
            await self.lifespan.shutdown()
            raise ConfigError(f"server.host: can't listen on {self.url}: {error.strerror or error}") from error
        log.info("Uvicorn running on %s (Press CTRL+C to quit)", self.url)
        self._announcement = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        for engine in self._services.engines.values():
            await engine.ready.wait()
        self._on_ready(self.url)

    async def _exit_on_failure(self, name: str) -> None:
        engine = self._services.engines[name]
        await engine.failed.wait()
        log.critical("engine %s has failed permanently: %s", name, engine.failure)
        self.exit_code = 1
        await self._drain()  # other engines may still be streaming


def _has_terminal() -> bool:
    """Whether this process has a terminal that could be closed under it."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
