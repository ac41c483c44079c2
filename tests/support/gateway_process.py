"""Runs the product as a user does: `shannon serve` as a child process on a free port.

Example:

    with serve(tmp_path, {"engines": {"main": {"kind": "mock"}}}) as gateway:
        gateway.wait_until_ready()
        assert gateway.chat().status_code == 200
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.access.keys import make_key

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180
ENVIRONMENT = dict(os.environ)
"""As the tests were started with: engines in this process add variables of their own, which no child should get."""
UNLIMITED = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12}
"""Limits that no test reaches."""


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    """Wait for a condition that has no event of its own; fails with `what`, which is how things are until then."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@dataclass
class GatewayProcess:
    """A running `shannon serve`."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    log: Path

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def ready(self) -> bool:
        """Ask /ready once."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        return False

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait for /ready. Returns how long it took, in seconds. Raises RuntimeError with the log's end."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            if self.ready():
                return time.monotonic() - started
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"not ready (exit code {self.process.poll()}):\n{self.log.read_text()[-4000:]}")

    def engine_core(self) -> psutil.Process:
        """Return vLLM's EngineCore process."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.ZombieProcess):  # one that was killed before, and is not yet waited for
                if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline()):
                    return child
        raise RuntimeError("there is no EngineCore process")

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return /metrics as {(name, label value, ...): value}."""
        page = httpx.get(f"{self.url}/metrics", headers=self.authorization, timeout=10).text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return {(sample.name, *sample.labels.values()): sample.value for sample in samples}

    def metric(self, name: str) -> float:
        """Return the sum of the samples of one metric."""
        return sum(value for key, value in self.metrics().items() if key[0] == name)

    def counted(self) -> tuple[float, float]:
        """Return the prompt and completion tokens that vLLM counted."""
        return self.metric("vllm:prompt_tokens_total"), self.metric("vllm:generation_tokens_total")

    def booked(self) -> tuple[float, float]:
        """Return the prompt and completion tokens that the ledger holds, over all keys."""
        url = f"{self.url}/v1/usage?key_id=all"
        rows = httpx.get(url, headers=self.authorization, timeout=10).raise_for_status().json()["data"]
        return sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows)

    def unbooked(self) -> tuple[float, float]:
        """Return the prompt and completion tokens that vLLM counted and the ledger does not hold, once nothing runs.

        Prompts of requests with `n` > 1 stay in it: vLLM counts them once per choice, the ledger once.
        """
        wait_until(lambda: not self.metric("shannon_engine_unfinished_requests"), "requests were left in the engine")
        self.chat(messages=[{"role": "user", "content": "Say hello."}], max_tokens=1).raise_for_status()
        # What was aborted is counted when vLLM steps again, which it now has.
        (prompt, completion), (prompt_booked, completion_booked) = self.counted(), self.booked()
        return prompt - prompt_booked, completion - completion_booked

    def chat(self, **fields: Any) -> httpx.Response:
        """Post a chat completion and return the whole response."""
        return httpx.post(f"{self.url}/v1/chat/completions", json=fields, headers=self.authorization, timeout=60)


@contextlib.contextmanager
def serve(
    folder: Path, tree: dict[str, Any], key: str | None = None, *, module: str = "gateway.cli", **environment: str
) -> Iterator[GatewayProcess]:
    """Run `shannon serve` on a configuration tree, listening but perhaps not ready yet; stop it at the end.

    `module` runs in place of `gateway.cli`, with its arguments.
    """
    tree = dict(tree)
    folder.mkdir(exist_ok=True)
    path = folder / "gateway.yaml"
    store = {"data_dir": str(folder / "data"), **tree.pop("store", {})}
    path.write_text(yaml.safe_dump({"include": str(ROOT / "configs/models.yaml"), "store": store, **tree}))
    log = folder / "gateway.log"
    key = key or make_key()
    command = [module, "serve", "--config", str(path), "--port", "0"]
    with child(command, log, {"SHANNON_BOOTSTRAP_KEY": key} | environment) as process:
        yield GatewayProcess(process, printed(process, log, r"Uvicorn running on (\S+)"), key, log)


@contextlib.contextmanager
def child(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module with its arguments, in a process group of its own that writes to `log`; stop it at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def printed(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    """Return the group of a pattern once a line of the log has it: servers on a free port print their URL."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(pattern, log.read_text(), re.M):
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"not listening (exit code {process.poll()}):\n{log.read_text()[-4000:]}")
