"""`shannon serve` in a process that reports its internals, run as a module with the arguments of `gateway.cli`.

Example:

    seen = ask(socket_path)  # the value of OBSERVED_SOCKET

A thread answers every connection to the unix socket named by OBSERVED_SOCKET with one JSON object: the counters of the
mock engines, the tasks of the event loop, open files and memory. Mock engines also fail on request: a prompt that says
`fail:overloaded`, `fail:error` or `fail:invalid` ends that way, after two tokens if streamed, otherwise at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import psutil

from engine import mock
from engine.base import Delta, EngineError, EngineOverloaded, InvalidRequest, Prepared
from gateway import cli
from gateway.serving import server

_FAILURES = {
    "fail:overloaded": EngineOverloaded("full"),
    "fail:error": EngineError("broken"),
    "fail:invalid": InvalidRequest("no", "prompt"),
}
_engines: list[ObservedEngine] = []
_loops: list[asyncio.AbstractEventLoop] = []
_servers: list[server.Server] = []


class ObservedEngine(mock.MockEngine):
    """A mock engine that is counted, remembers no requests, and fails when a prompt asks for it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _engines.append(self)

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        self.requests.clear()
        request = prepared.payload[0]
        text = str(request.messages or request.prompt)
        failure = next((error for word, error in _FAILURES.items() if word in text), None)
        async with contextlib.aclosing(super().generate(prepared)) as deltas:
            number = 0
            async for delta in deltas:
                if failure is not None and number == (2 if request.stream else 0):
                    raise failure
                yield delta
                number += 1


class _Server(server.Server):
    async def startup(self, sockets: Any = None) -> None:
        _loops.append(asyncio.get_running_loop())
        _servers.append(self)
        await super().startup(sockets)


def observe() -> dict[str, Any]:
    """Return what is in this process."""
    gc.collect()
    tasks = Counter(str(getattr(task.get_coro(), "__qualname__", task)) for task in _tasks())
    process = psutil.Process()
    return {
        "prompt": sum(engine.counters.prompt_tokens for engine in _engines),
        "completion": sum(engine.counters.completion_tokens for engine in _engines),
        "unfinished": sum(engine.unfinished_requests for engine in _engines),
        "tasks": dict(tasks),
        "connections": sum(len(running.server_state.connections) for running in _servers),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "memory_bytes": process.memory_info().rss,
    }


def _tasks() -> list[asyncio.Task[Any]]:
    for _ in range(5):
        try:
            return [task for loop in _loops for task in asyncio.all_tasks(loop)]
        except RuntimeError:  # the set changed meanwhile
            continue
    return []


def _answer(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(json.dumps(observe()).encode())


def main() -> int:
    path = Path(os.environ.pop("OBSERVED_SOCKET"))
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    threading.Thread(target=_answer, args=(listener,), daemon=True).start()
    mock.MockEngine = ObservedEngine  # type: ignore[misc]
    server.Server = _Server  # type: ignore[misc]
    return cli.main(sys.argv[1:])


def ask(path: Path) -> dict[str, Any]:
    """Return what an observed gateway tells at its socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    facts: dict[str, Any] = json.loads(data)
    return facts


if __name__ == "__main__":
    sys.exit(main())
