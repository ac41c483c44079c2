"""Every Prometheus metric of the gateway. vLLM's own `vllm:*` metrics appear on the same page, untouched.

Labels are bounded: configured model ids, route templates, status codes; never what a client typed.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.base import Usage

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


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

    def request(self, route: str, status: int, duration_s: float) -> None:
        """Count a finished request."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(duration_s)

    def first_token(self, model_id: str, seconds: float) -> None:
        """Record the time to first token of a generation."""
        self._first_token.labels(model_id).observe(seconds)

    def tokens(self, model_id: str, usage: Usage) -> None:
        """Count what a generation spent."""
        self._tokens.labels(model_id, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(model_id, "cached").inc(usage.cached_tokens)
        self._tokens.labels(model_id, "completion").inc(usage.completion_tokens)

    def render(self) -> bytes:
        """Return the page in Prometheus' text format: ours, then everything vLLM registered."""
        return generate_latest(self._registry) + generate_latest(REGISTRY)
