"""A gateway to send hostile requests to, and what is watched meanwhile: its event loop and its memory."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.support.gateway_process import ROOT, UNLIMITED, GatewayProcess, serve

TIMEOUT_S = 60.0
MODELS: dict[str, Any] = yaml.safe_load((ROOT / "configs/models.yaml").read_text())["models"]
AGENT_MODELS = [name for name, model in MODELS.items() if "workflow" in model]
_BUDGET = {"seconds": 20, "tokens": 10**9, "tool_calls": 20}
_PAUSE_S = 0.002


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and what it cost."""

    status: int
    body: bytes
    seconds: float
    pause_s: float
    """The longest that /health took meanwhile, without what either side waited for a processor."""
    memory_bytes: int
    """By how much the process's resident memory grew at most."""


@contextlib.contextmanager
def gateway(folder: Path) -> Iterator[GatewayProcess]:
    """Run the gateway with the mock engine, whose context holds everything, limits that nobody reaches, and documents
    for agents to search in."""
    documents = folder / "documents"
    documents.mkdir()
    (documents / "hello.md").write_text("# Hello\n\nhi there, a word of abcd\n" * 1000)
    agents = {name: MODELS[name] | {"limits": UNLIMITED, "budget": _BUDGET} for name in AGENT_MODELS}
    tree = {
        "engines": {"main": {"kind": "mock", "args": {"max_model_len": 100_000_000}}},
        "models": {"shannon-chat": {"description": "Chat", "limits": UNLIMITED}, **agents},
        "tools": {"local_search": {"folder": str(documents)}},
        "inspector": {"enabled": True, "public": True, "requests_per_minute": 10**6, "burst": 10**6},
    }
    with serve(folder, tree) as process:
        process.wait_until_ready()
        yield process


class Target:
    """One gateway under fire."""

    def __init__(self, process: GatewayProcess) -> None:
        self._process = process
        self._proc = Path(f"/proc/{process.process.pid}")
        self._address = urlsplit(process.url).netloc

    def post(self, path: str, body: bytes) -> Answer:
        """Send a body while a second client asks for /health. Raises OSError where nothing comes back."""
        before = self._memory("VmRSS")
        (self._proc / "clear_refs").write_text("5")  # the peak begins anew
        with _Watch(self._address, self._proc) as watch:
            connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
            started = time.perf_counter()
            headers = self._process.authorization | {"Content-Type": "application/json", "anthropic-version": "1"}
            with contextlib.closing(connection):
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                answer = response.read()
            seconds = time.perf_counter() - started
        return Answer(response.status, answer, seconds, watch.longest_s, self._memory("VmHWM") - before)

    def _memory(self, name: str) -> int:
        for line in (self._proc / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"there is no {name}")


class _Watch:
    """Asks for /health again and again, from a thread, on a connection of its own."""

    def __init__(self, address: str, proc: Path) -> None:
        self.longest_s = 0.0
        self._proc = proc
        self._address = address
        self._stop = threading.Event()
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        self._asked.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _waited_s(self) -> float:
        """Return how long the gateway's threads and this one have been ready to run, but others ran."""
        waited_ns = 0
        for path in (Path("/proc/thread-self/schedstat"), *self._proc.glob("task/*/schedstat")):
            with contextlib.suppress(OSError):  # a thread that has ended
                waited_ns += int(path.read_text().split()[1])
        return waited_ns / 1e9

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            while not self._stop.is_set():
                started = time.perf_counter() - self._waited_s()
                connection.request("GET", "/health")
                connection.getresponse().read()
                if self._asked.is_set():
                    self.longest_s = max(self.longest_s, time.perf_counter() - self._waited_s() - started)
                self._asked.set()
                self._stop.wait(_PAUSE_S)
