"""Every Prometheus metric of the gateway. vLLM's own `vllm:*` metrics appear on the same page, untouched.

Labels are bounded: configured model ids, route templates, status codes; never what a client typed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.base import Usage

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Total(Collector):
    """A counter that is kept elsewhere: its values, by label values, are set again for every page."""

    def __init__(self, name: str, documentation: str, labels: list[str], *, registry: CollectorRegistry) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self._family = name, documentation, labels
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        name, documentation, labels = self._family
        return [CounterMetricFamily(name, documentation, labels=labels)]

    def collect(self) -> Iterable[Metric]:
        name, documentation, labels = self._family
        family = CounterMetricFamily(name, documentation, labels=labels)
        for of, value in self.values.items():
            family.add_metric(of, value)
        return [family]


class LaneMetrics:
    """The metrics of one lane to the store."""

    def __init__(self, name: str, what: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> None:
        self.latency = Histogram(
            f"{name}_latency_seconds",
            f"Time that the store took to answer a batch of {what}.",
            buckets=buckets,
            registry=registry,
        )
        self.failures = Counter(
            f"{name}_failures", f"Batches of {what} that the store did not answer in time.", registry=registry
        )
        self.openings = Counter(
            f"{name}_breaker_openings", f"Times that the store was given up for {what}.", registry=registry
        )
        self.available = Gauge(f"{name}_available", f"1 while the store answers {what}.", registry=registry)


class Metrics:
    """The gateway's metrics in a registry of their own, so that two apps in one process don't collide."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "shannon_requests",
            "HTTP requests by route template and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._duration = Histogram(
            "shannon_request_duration_seconds",
            "Time from the request's first byte to the response's last.",
            ["route"],
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "shannon_time_to_first_token_seconds",
            "Time from the start of a generation to its first token.",
            ["model"],
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        self._tokens = Counter(
            "shannon_tokens",
            "Tokens really spent, by kind: prompt, cached (part of prompt), completion.",
            ["model", "kind"],
            registry=self._registry,
        )
        self._limited = Counter(
            "shannon_limit_rejections",
            "Requests refused by a limit, by kind: requests, tokens, concurrent, daily_tokens.",
            ["model", "kind"],
            registry=self._registry,
        )
        self.limited_locally = Counter(
            "shannon_limits_local",
            "Limit decisions made by this process alone, while the store was away.",
            registry=self._registry,
        )
        self._errors = Counter(
            "shannon_errors",
            "Requests that ended with an error, by error code.",
            ["code"],
            registry=self._registry,
        )
        self.connections = Gauge("shannon_connections", "Clients that are connected now.", registry=self._registry)
        self.connections_closed = Counter(
            "shannon_connections_closed",
            "Connections without a running request of a key that were closed to make room for new ones.",
            registry=self._registry,
        )
        self._stream_failures = Counter(
            "shannon_stream_failures",
            "Streams that ended with an error frame, after a 200, by error code.",
            ["code"],
            registry=self._registry,
        )
        self._queue = Histogram(
            "shannon_queue_time_seconds",
            "Time that a generation waited, in front of the engine and in its own queue.",
            ["model"],
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        self._queue_rejections = Counter(
            "shannon_queue_rejections",
            "Generations that found no room in front of the engine, by reason: full, share (of its key), hopeless, "
            "timeout, engine (its own).",
            ["engine", "reason"],
            registry=self._registry,
        )
        self.queue_depth = Gauge(
            "shannon_queue_depth",
            "Generations that wait in front of the engine now.",
            ["engine"],
            registry=self._registry,
        )
        self.queue_longest_wait = Gauge(
            "shannon_queue_longest_wait_seconds",
            "How long the generation that has waited longest in front of the engine has waited.",
            ["engine"],
            registry=self._registry,
        )
        self._unused = Histogram(
            "shannon_reservation_unused_tokens",
            "Tokens that a reservation held and its generation did not use.",
            ["model"],
            buckets=(0, 16, 64, 256, 1024, 4096, 16384, 65536),
            registry=self._registry,
        )
        self._token_gap = Histogram(
            "shannon_inter_token_latency_seconds",
            "Mean time between the tokens of a generation.",
            ["model"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
            registry=self._registry,
        )
        self.store = LaneMetrics(
            "shannon_store",
            "commands of limits, keys and usage",
            (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
            self._registry,
        )
        self.store_bulk = LaneMetrics(
            "shannon_store_bulk",
            "commands of sessions, streams, responses, jobs and administration",
            (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2),
            self._registry,
        )
        self.store_writes_refused = Gauge(
            "shannon_store_writes_refused",
            "1 while the store answers but takes no writes, by reason: full (maxmemory), disk, replicas.",
            ["reason"],
            registry=self._registry,
        )
        for reason in ("full", "disk", "replicas"):
            self.store_writes_refused.labels(reason).set(0)
        self.store_memory_used = Gauge(
            "shannon_store_memory_used_bytes",
            "Memory of the store's server that counts against its maxmemory; of a cluster, its fullest node's.",
            registry=self._registry,
        )
        self.store_memory_max = Gauge(
            "shannon_store_memory_max_bytes",
            "maxmemory of the store's server, 0 where there is none.",
            registry=self._registry,
        )
        self.journal_bytes = Gauge(
            "shannon_usage_journal_bytes",
            "Usage on this gateway's disk that the store does not have yet, its predecessors' included.",
            registry=self._registry,
        )
        self.usage_refused = Counter(
            "shannon_usage_refused",
            "Usage entries that the store or a full disk refused; they are only in the log.",
            registry=self._registry,
        )
        self._sessions = Counter(
            "shannon_sessions",
            "Sessions by how they began: created, collided with another tenant's, or unavailable for want of a store.",
            ["outcome"],
            registry=self._registry,
        )
        self.streams_open = Gauge("shannon_streams_open", "Event streams open now.", registry=self._registry)
        self.engine_ready = Gauge(
            "shannon_engine_ready",
            "1 while the engine takes requests.",
            ["engine"],
            registry=self._registry,
        )
        self.engine_unfinished = Gauge(
            "shannon_engine_unfinished_requests",
            "Generations that the engine holds now, waiting or running.",
            ["engine"],
            registry=self._registry,
        )
        self.engine_restarts = Total(
            "shannon_engine_restarts",
            "How often the engine was rebuilt, by cause: died, stalled, load (of a lazy one failed).",
            ["engine", "cause"],
            registry=self._registry,
        )
        self.upstream_available = Gauge(
            "shannon_upstream_available",
            "1 while requests are sent to this server of a remote engine, 0 while its breaker is open.",
            ["engine", "upstream"],
            registry=self._registry,
        )
        self.upstream_in_flight = Gauge(
            "shannon_upstream_requests_in_flight",
            "Requests of this gateway that a server of a remote engine works on now.",
            ["engine", "upstream"],
            registry=self._registry,
        )
        self.upstream_discarded = Total(
            "shannon_upstream_discarded_tokens",
            "Tokens of a server's answers that broke off before they reached a client. No key pays for them.",
            ["engine", "upstream"],
            registry=self._registry,
        )
        self.draining = Gauge("shannon_draining", "1 from SIGTERM on.", registry=self._registry)
        self.drain_interrupted = Total(
            "shannon_drain_interrupted_requests",
            "Requests that shutdowns cut short, at all gateways of the store: the one that drains is gone too soon.",
            [],
            registry=self._registry,
        )

        self._reloads = Counter(
            "shannon_config_reloads",
            "Times that the configuration was read again on SIGHUP, by result: applied, refused.",
            ["result"],
            registry=self._registry,
        )
        self._reload_successful = Gauge(
            "shannon_config_last_reload_successful",
            "0 from a reload that was refused until one that is applied, else 1.",
            registry=self._registry,
        )
        self._reload_successful.set(1)
        self.restart_pending = Gauge(
            "shannon_config_restart_pending",
            "1 while the configuration, as last read, asks for what only a restart can change.",
            registry=self._registry,
        )

        # Finding a labelled child costs more than counting on it, so the ones of every request are found once.
        self._of_route = cache(
            lambda route, status: (self._requests.labels(route, status), self._duration.labels(route))
        )
        self._of_model = cache(
            lambda model_id: tuple(metric.labels(model_id) for metric in (self._queue, self._unused, self._token_gap))
        )

    def request(self, route: str, status: int, duration_s: float) -> None:
        """Count a finished request."""
        requests, duration = self._of_route(route, status)
        requests.inc()
        duration.observe(duration_s)

    def first_token(self, model_id: str, seconds: float) -> None:
        """Record the time to first token of a generation."""
        self._first_token.labels(model_id).observe(seconds)

    def limited(self, model_id: str, kind: str) -> None:
        """Count a refusal by a limit."""
        self._limited.labels(model_id, kind).inc()

    def queue_rejected(self, engine: str, reason: str) -> None:
        """Count a generation for which there was no room."""
        self._queue_rejections.labels(engine, reason).inc()

    def error(self, code: str) -> None:
        """Count a request, or work without a request, that ended with an error.

        `gateway.serving.middleware` counts those of all requests; only work that outlives its request counts its own.
        """
        self._errors.labels(code).inc()

    def stream_failure(self, code: str) -> None:
        """Count a stream that ended with an error frame."""
        self._stream_failures.labels(code).inc()

    def reloaded(self, result: Literal["applied", "refused"]) -> None:
        """Count a reload of the configuration."""
        self._reloads.labels(result).inc()
        self._reload_successful.set(result == "applied")

    def session(self, outcome: str) -> None:
        """Count how a session began."""
        self._sessions.labels(outcome).inc()

    def generation(self, model_id: str, *, queue_s: float, unused_tokens: int, tokens: int, streaming_s: float) -> None:
        """Record a generation's end: its wait, what it did not use, and its pace after the first token."""
        queue, unused, token_gap = self._of_model(model_id)
        queue.observe(queue_s)
        unused.observe(unused_tokens)
        if tokens > 1 and streaming_s > 0:
            token_gap.observe(streaming_s / (tokens - 1))

    def tokens(self, model_id: str, usage: Usage) -> None:
        """Count what a generation spent."""
        self._tokens.labels(model_id, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(model_id, "cached").inc(usage.cached_tokens)
        self._tokens.labels(model_id, "completion").inc(usage.completion_tokens)

    def render(self) -> bytes:
        """Return the page in Prometheus' text format: ours, then everything vLLM registered."""
        return generate_latest(self._registry) + generate_latest(REGISTRY)
