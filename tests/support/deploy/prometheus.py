"""A real Prometheus on loopback, from Debian's package. Skips the test if it is not available.

Example:

    with run_prometheus(tmp_path, [scrape_config], [str(rules)]) as server:
        samples = server.query("up == 1")
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.debian import program
from tests.support.gateway_process import wait_until

_START_S = 60.0
_KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")


def promtool(*arguments: str | Path, content: str | None = None) -> str:
    """Run promtool on `content` as its input, expect it to succeed, and return what it said."""
    command = [program("promtool", "prometheus"), *map(str, arguments)]
    done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics_of(expression: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression, which is known to parse."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", bare)
    bare = _GROUPING.sub(" ", bare)
    names = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", bare)
    return {name for name in names if name.lower() not in _KEYWORDS}


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10)

    def close(self) -> None:
        self._client.close()

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._client.get("/-/ready").status_code == 200
        return False

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an API call; an error fails with Prometheus' own words."""
        body = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant vector: their `metric`, which is their labels, and `value`."""
        data = self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        samples: list[dict[str, Any]] = data["result"]
        return samples


@contextlib.contextmanager
def run_prometheus(folder: Path, scrape_configs: list[dict[str, Any]], rule_files: list[str]) -> Iterator[Prometheus]:
    """Run Prometheus, scraping and evaluating every second."""
    binary = program("prometheus", "prometheus")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "scrape_configs": scrape_configs,
        "rule_files": rule_files,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"config.file": "prometheus.yaml", "storage.tsdb.path": "tsdb", "web.listen-address": f"127.0.0.1:{port}"}
    with (folder / "prometheus.log").open("wb") as log:
        command = [binary, *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: server.ready() or process.poll() is not None, "Prometheus starts", _START_S)
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(timeout=30)
