"""A gateway that has been used, vLLM's metrics page, and a Prometheus that scrapes both as the chart configures it.

Example:

    with watch(tmp_path, [str(rules)]) as watched:
        assert watched.answers("shannon_requests_total")

The gateway has a mock and a remote engine. vLLM's page has recorded metric names.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from gateway.access.keys import make_key
from tests.support.app import HELLO
from tests.support.deploy.chart import NAMESPACE, RELEASE, find
from tests.support.deploy.prometheus import Prometheus, run_prometheus
from tests.support.gateway_process import UNLIMITED, GatewayProcess, serve
from tests.support.upstream_server import Connection, chunk, run_upstream_beside

SERVICE = f"{RELEASE}-shannon"
INSTANCE = "gateway:8080"
NOWHERE = "http://127.0.0.1:9/v1"
"""A server of the remote engine that is not there."""
VLLM = yaml.safe_load(Path(__file__).with_name("vllm_metrics.yaml").read_text())
"""`version` of vLLM, and its `samples`: name -> labels."""


@dataclass
class Watched:
    """A Prometheus that watches a gateway and vLLM's page."""

    prometheus: Prometheus
    gateway: GatewayProcess
    names: set[str]
    """Of all samples on the two pages."""

    def answers(self, expression: str) -> bool:
        """Ask whether a query has any answer yet."""
        return bool(self.prometheus.query(expression))


async def cut_after_a_token(connection: Connection) -> None:
    await connection.begin()
    await connection.frames(chunk("Hello", usage=(7, 1)))
    connection.cut()


def tree(upstreams: list[str]) -> dict[str, Any]:
    """Return a configuration in which everything that is counted can happen."""
    model = {"description": "Chat", "workflow": "chat", "limits": UNLIMITED}
    admission = {"max_in_flight": 1, "max_queued_requests": 1, "max_wait_s": 60}
    return {
        "engines": {
            "main": {"kind": "mock"},
            "narrow": {"kind": "mock", "args": {"token_s": 0.05}, "admission": admission},
            "far": {
                "kind": "remote",
                "model": "demo",
                "urls": upstreams,
                "breaker_max_open_s": 60,
                "breaker_open_s": 60,
            },
        },
        "models": {
            "shannon-chat": model,
            "shannon-limited": model | {"limits": {"requests_per_minute": 1, "tokens_per_minute": 10**9}},
            "shannon-narrow": model | {"engine": "narrow"},
            "shannon-far": model | {"engine": "far"},
        },
        "keys": [{"name": "metrics", "key_env": "SHANNON_METRICS_KEY", "models": [], "metrics": True}],
    }


def use(gateway: GatewayProcess) -> None:
    """Make what is counted happen."""
    for model in ("shannon-chat", "shannon-limited", "shannon-limited"):
        gateway.chat(model=model, messages=HELLO)
    gateway.chat(model="shannon-chat", messages=HELLO, stream=True)
    cut = gateway.chat(model="shannon-far", messages=HELLO, stream=True)
    assert cut.status_code == 200
    assert "error" in cut.text
    with ThreadPoolExecutor(4) as clients:
        slow = {"model": "shannon-narrow", "messages": HELLO, "max_tokens": 10, "ignore_eos": True}
        statuses = [answer.status_code for answer in clients.map(lambda _: gateway.chat(**slow), range(4))]
    assert 503 in statuses
    assert httpx.get(f"{gateway.url}/v1/models", headers={"X-API-Key": "wrong"}).status_code == 401


class VllmPage(BaseHTTPRequestHandler):
    """A page with every sample that vLLM's has; its counters rise."""

    turns = itertools.count(1)

    def do_GET(self) -> None:
        turn = next(self.turns)
        lines = []
        for name, labels in VLLM["samples"].items():
            values = {label: {"le": "+Inf", "engine": "0", "model_name": "main"}.get(label, "any") for label in labels}
            written = ",".join(f'{label}="{value}"' for label, value in values.items())
            lines.append(f"{name}{{{written}}} {turn}\n")
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write("".join(lines).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def vllm_page() -> Iterator[str]:
    """Serve VllmPage; give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), VllmPage)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scrape_config(metrics_key: str, *targets: str) -> dict[str, Any]:
    """Return what the operator makes of the chart's ServiceMonitor, with the labels that it gives to a pod."""
    monitor = find("default", "ServiceMonitor", SERVICE, "monitoring.serviceMonitor.enabled=true")
    (endpoint,) = monitor["spec"]["endpoints"]
    labels = {"namespace": NAMESPACE, "service": SERVICE, "instance": INSTANCE, "pod": "shannon-0"}
    return {
        "job_name": SERVICE,
        "metrics_path": endpoint["path"],
        "authorization": {"credentials": metrics_key},
        "metric_relabel_configs": [
            {{"sourceLabels": "source_labels"}.get(name, name): value for name, value in relabeling.items()}
            for relabeling in endpoint["metricRelabelings"]
        ],
        "static_configs": [{"targets": list(targets), "labels": labels}],
    }


@contextlib.contextmanager
def watch(folder: Path, rule_files: list[str]) -> Iterator[Watched]:
    """Run all of it, and use the gateway."""
    metrics_key = make_key()
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(run_upstream_beside(cut_after_a_token))
        configuration = tree([upstream.url, NOWHERE])
        environment = {"SHANNON_METRICS_KEY": metrics_key}
        gateway = stack.enter_context(serve(folder / "gateway", configuration, **environment))
        gateway.wait_until_ready()
        address = stack.enter_context(vllm_page())
        scrapes = [scrape_config(metrics_key, gateway.url.removeprefix("http://"), address)]
        prometheus = stack.enter_context(run_prometheus(folder, scrapes, rule_files))
        use(gateway)
        yield Watched(prometheus, gateway, {name for name, *_ in gateway.metrics()} | set(VLLM["samples"]))
